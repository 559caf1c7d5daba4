"""The table of objects: one line an object, as Parquet or CSV, written part by part."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.core.errors import OutputError
from connectomics.core.files import replacing
from connectomics.core.installation import install_command
from connectomics.objects.merge import OBJECTS, spans
from connectomics.objects.selection import NUMBERS
from connectomics.volumes.volume import Array

Columns = dict[str, Array | None]
ROWS_AT_ONCE = 1 << 17
CSV, PARQUET = ".csv", ".parquet"
TABLES = (CSV, PARQUET)
WHOLE, REAL, YES_OR_NO = "uint64", "float64", "bool"
COLUMNS = {
    "id": WHOLE,
    "class": WHOLE,
    "voxels": WHOLE,
    "volume_nm3": REAL,
    **{f"bbox_{end}_{axis}": WHOLE for end in ("start", "stop") for axis in "zyx"},
    **{f"centroid_{axis}": REAL for axis in "zyx"},
    **{f"centroid_{axis}_nm": REAL for axis in "zyx"},
    "mean_probability": REAL,
    "minimum_probability": REAL,
    "touches_border": YES_OR_NO,
    "sections": WHOLE,
    "equivalent_diameter_nm": REAL,
}
"""Names and types; what is not known (without a voxel size, without probabilities) is null or empty."""


@dataclass(frozen=True, slots=True)
class MeasurementUnits:
    """What turns voxels into lengths and sums into probabilities.

    Parameters
    ----------
    voxel_size_nm
        (z, y, x), or None when nothing states it.
    origin_nm
        Position of the first voxel's centre (z, y, x).
    probability_units
        What a voxel of probability 1 adds to the sum in a row, and its value as a minimum; None without probabilities.
    flat
        Whether objects lie in sections, so that the equivalent diameter is a circle's.
    classes
        Whether the rows' values are classes; otherwise they are ids.
    own_units
        The same as ``probability_units``, of the volume itself where a threshold makes foreground of it; zeros where it
        holds no probabilities, None where nothing is known but its type.
    """

    voxel_size_nm: tuple[float, float, float] | None = None
    origin_nm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    probability_units: tuple[float, float] | None = None
    flat: bool = False
    classes: bool = True
    own_units: tuple[float, float] | None = None


def columns_of(rows: Array, numbers: Array, frame: MeasurementUnits) -> Columns:
    """Values of ``COLUMNS`` for some objects, from their ``PIECE`` [n] and ids [n]."""
    voxels = rows["voxels"]
    columns: Columns = dict.fromkeys(COLUMNS) | {
        "id": numbers,
        "class": rows["value"] if frame.classes else None,
        "voxels": voxels,
        "touches_border": rows["border"],
        "sections": (rows["stop"][:, 0] - rows["start"][:, 0]).astype(np.uint64),
    }
    for i, axis in enumerate("zyx"):
        columns[f"bbox_start_{axis}"] = rows["start"][:, i].astype(np.uint64)
        columns[f"bbox_stop_{axis}"] = rows["stop"][:, i].astype(np.uint64)
        columns[f"centroid_{axis}"] = centroid = rows["sums"][:, i] / voxels
        if frame.voxel_size_nm is not None:
            columns[f"centroid_{axis}_nm"] = centroid * frame.voxel_size_nm[i] + frame.origin_nm[i]
    if frame.voxel_size_nm is not None:
        volume = voxels * math.prod(frame.voxel_size_nm)
        columns["volume_nm3"] = volume
        area = volume / frame.voxel_size_nm[0]
        diameter = np.sqrt(4 * area / math.pi) if frame.flat else np.cbrt(6 * volume / math.pi)
        columns["equivalent_diameter_nm"] = diameter
    if frame.probability_units is not None:
        of_sums, of_minima = frame.probability_units
        columns["mean_probability"] = rows["probability"] / voxels / of_sums
        columns["minimum_probability"] = rows["least"] / of_minima
    return columns


def write_table(tables: Path, count: int, path: Path, frame: MeasurementUnits, stamp: str) -> None:
    """Write the table of the ``count`` objects in a folder that ``select`` has worked on, whole or not at all.

    ``path`` ends in ``.parquet``, whose metadata keep the stamp, or in ``.csv``, which has no place for it. Raises
    OutputError if pyarrow is needed and not installed.
    """
    rows = np.load(tables / OBJECTS, mmap_mode="r")
    numbers = np.load(tables / NUMBERS, mmap_mode="r")
    parts = (columns_of(rows[span], numbers[span], frame) for span in spans(count, ROWS_AT_ONCE))
    with replacing(path) as temporary:
        if path.suffix == CSV:
            _write_csv(parts, temporary)
        else:
            _write_parquet(parts, temporary, stamp)


def require_parquet() -> None:
    """Make sure before the work that Parquet can be written; the OutputError says what to install."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise OutputError(
            f"the table of objects is written as Parquet, which needs pyarrow: {install_command('tables')}, or state "
            "inference.output.table=csv"
        ) from error


def table_key(path: Path) -> str | None:
    """The result key of the objects whose table a Parquet file is; None of CSV, and where it cannot be told."""
    if path.suffix != PARQUET:
        return None
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    try:
        found = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"connectomics")
    except (OSError, pyarrow.ArrowException):
        return None
    return None if found is None else found.decode(errors="replace")


def _write_csv(parts: Iterator[Columns], path: Path) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for columns in parts:
            count = len(columns["id"])  # type: ignore[arg-type]  # an id is always known
            lists = [[""] * count if values is None else values.tolist() for values in columns.values()]
            writer.writerows(zip(*lists, strict=True))


def _write_parquet(parts: Iterator[Columns], path: Path, stamp: str) -> None:
    require_parquet()
    import pyarrow
    import pyarrow.parquet

    kinds = {WHOLE: pyarrow.uint64(), REAL: pyarrow.float64(), YES_OR_NO: pyarrow.bool_()}
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in COLUMNS.items()], {"connectomics": stamp})
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for columns in parts:
            count = len(columns["id"])  # type: ignore[arg-type]  # an id is always known
            arrays = [
                pyarrow.nulls(count, kinds[COLUMNS[name]]) if values is None else pyarrow.array(values)
                for name, values in columns.items()
            ]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
