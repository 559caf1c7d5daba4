"""The last stage of a run: filters on the whole volume, exports under final names, stamps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from connectomics.decode.filters import fill_holes, remove_small_objects
from connectomics.errors import OutputError
from connectomics.geometry import BlockGrid
from connectomics.io.export import export_path, export_volume, read_stamp
from connectomics.io.store import Store, open_store
from connectomics.io.volume import Array
from connectomics.pipeline.filtering import filter_labels

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Filters:
    """Filters that see whole objects; they change labels only.

    Parameters
    ----------
    minimum_voxels
        Objects smaller than this are removed; 0 for none.
    fill_holes
        Whether holes inside objects take the object's label.
    """

    minimum_voxels: int = 0
    fill_holes: bool = False

    @property
    def active(self) -> bool:
        """Whether there is anything to do."""
        return self.fill_holes or self.minimum_voxels > 0

    def apply(self, labels: Array) -> Array:
        """Filtered labels (z, y, x) of a whole volume."""
        if self.minimum_voxels > 0:
            labels = remove_small_objects(labels, self.minimum_voxels)
        return fill_holes(labels) if self.fill_holes else labels


@dataclass(frozen=True, slots=True)
class Output:
    """One final result of a volume.

    Parameters
    ----------
    name
        Of the working store: ``labels`` or ``probabilities``.
    stem
        Final file name without its suffix.
    result_key
        sha256 of all that decides its content.
    formats
        In which it is wanted.
    """

    name: str
    stem: str
    result_key: str
    formats: tuple[str, ...]

    def paths(self, folder: Path) -> dict[str, Path]:
        """Final path of each format."""
        return {f: export_path(folder, self.stem, f) for f in self.formats}

    def missing(self, folder: Path) -> tuple[str, ...]:
        """Formats that are not there with this result key, the consuming one (zarr) last."""
        wanted = [f for f, path in self.paths(folder).items() if _key_at(path, f) != self.result_key]
        return tuple(sorted(wanted, key=lambda f: f == "zarr"))

    def taken(self, folder: Path) -> list[Path]:
        """Final names that exist with another result key, or none that can be read."""
        return [p for f, p in self.paths(folder).items() if p.exists() and _key_at(p, f) != self.result_key]


def _key_at(path: Path, form: str) -> object:
    stamp = read_stamp(path, form)
    return None if stamp is None else stamp.get("result_key")


def check_names(outputs: Sequence[Output], folder: Path, *, overwrite: bool) -> None:
    """Refuse to replace what another model, setting or input made.

    Raises
    ------
    OutputError
        If a final name is taken and ``overwrite`` is false.
    """
    taken = [path for output in outputs for path in output.taken(folder)]
    if taken and not overwrite:
        raise OutputError(
            f"{taken[0]}: exists, but was made by another model, setting or input (or another program); choose another "
            "inference.volume_mode.output_suffix or output_path, or state inference.output.overwrite=true"
        )


def filter_store(store: Store, grid: BlockGrid, target: Path, filters: Filters) -> Store:
    """Apply whole-volume filters to a store of labels; the filtered one stands at ``target``."""
    if target.exists():
        return open_store(target)
    return filter_labels(store, grid, target, minimum_voxels=filters.minimum_voxels, fill_holes=filters.fill_holes)


def export_output(store: Store, output: Output, folder: Path, stamp: dict[str, object]) -> list[Path]:
    """Write what is missing of an output; return all its final paths.

    Raises
    ------
    OutputError
        If the disk refuses or a written file does not read back equal.
    """
    paths = output.paths(folder)
    for form in output.missing(folder):
        export_volume(store, paths[form], form, stamp | {"result_key": output.result_key})
        log.info("wrote %s", paths[form])
    return list(paths.values())
