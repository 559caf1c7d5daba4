"""The last stage of a run: filters on the whole volume, pyramids and exports under final names, stamps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.decode.filters import fill_holes, remove_small_objects
from connectomics.errors import OutputError, ResourceError
from connectomics.geometry import BlockGrid, Box, Vec3
from connectomics.io.atomic import discard, fsync_path, put_in_place
from connectomics.io.export import PYRAMIDS, export_file, export_path, multiscale_of, read_stamp, require_exportable
from connectomics.io.source import reason
from connectomics.io.store import Store, create_store, open_store
from connectomics.io.volume import Array, VolumeInfo
from connectomics.pipeline.blocks import RunStage
from connectomics.pipeline.predict import LABELS
from connectomics.pipeline.pyramid import Pyramid, discard_ledgers, fill_pyramid

log = logging.getLogger(__name__)
FILTER_COPIES = 12  # bytes a voxel that labelling components needs at once: 4 to 8 of ids, masks, the volume twice


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
    pyramid
        Whether chunked formats get coarser levels, too.
    """

    name: str
    stem: str
    result_key: str
    formats: tuple[str, ...]
    pyramid: bool = True

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


def check_memory(filters: Filters, extent: Vec3, dtype: np.dtype[Any], budget_bytes: int) -> None:
    """Refuse filters whose volume does not fit the memory budget, before any work is done.

    Raises
    ------
    ResourceError
        Saying what they need.
    """
    need = Box.of_shape(extent).voxels * (dtype.itemsize * 2 + FILTER_COPIES)
    if filters.active and need > budget_bytes:
        raise ResourceError(
            f"removing small objects and filling holes needs the whole volume of {extent} voxels in memory, about "
            f"{need / 1e9:.2f} GB, the budget is {budget_bytes / 1e9:.2f} GB; raise system.memory_budget_gb or set "
            "inference.postprocessing.binary.remove_small_objects=0 and fill_holes=false"
        )


def filter_store(store: Store, grid: BlockGrid, target: Path, filters: Filters) -> Store:
    """Apply whole-volume filters to a store of labels; the filtered one stands at ``target``."""
    if target.exists():
        return open_store(target)
    info = store.info
    labels = filters.apply(store.read(Box.of_shape(info.extent))[0])
    partial = target.with_name(target.name + ".partial")
    discard(partial)
    filtered = create_store(partial, info, shard_shape=grid.block_shape, attributes={})
    for block in grid:
        filtered.write(block.core, labels[None][(slice(None), *block.core.slices)])
    filtered.close()
    partial.replace(target)
    fsync_path(target.parent)
    return open_store(target)


def check_exportable(output: Output, info: VolumeInfo, folder: Path, budget_bytes: int) -> None:
    """Refuse formats that cannot hold an output, before any work is done.

    Raises
    ------
    OutputError
        Saying which can.
    """
    for form, path in output.paths(folder).items():
        require_exportable(info, path, form, budget_bytes)


def export_output(
    store: Store, output: Output, folder: Path, stamp: dict[str, object], work: Path, run: RunStage
) -> None:
    """Write what is missing of an output.

    Parameters
    ----------
    store
        The complete working store; a zarr output is made of it, so it is gone then.
    folder
        Of the final outputs.
    stamp
        Facts that each carries, beside its result key.
    work
        Where chunked outputs are built.
    run
        Runs their blocks.

    Raises
    ------
    OutputError
        If the disk refuses or what is written does not read back equal.
    """
    paths = output.paths(folder)
    for form in output.missing(folder):
        full = stamp | {"result_key": output.result_key}
        if form in PYRAMIDS:
            _export_pyramid(store, output, form, paths[form], full, work, run)
        else:
            export_file(store, paths[form], form, full)
        log.info("wrote %s", paths[form])


def _export_pyramid(
    store: Store, output: Output, form: str, path: Path, stamp: dict[str, object], work: Path, run: RunStage
) -> None:
    """Build a chunked output in the work folder, stamp it and move it to its final name."""
    labels, most = output.name == LABELS, None if output.pyramid else 1
    image = multiscale_of(form, store.info, path, labels=labels, levels=most)
    itself = form == "zarr"
    place = store.path if itself else work / f"{output.name}.{form}"
    pyramid = Pyramid(f"{output.name}.{form}", image, place, 1 if itself else 0, labels)
    fill_pyramid(pyramid, store, work, run, output.result_key)
    if itself:
        store.close()
    try:
        image.stamp(place, stamp, output.stem)
        put_in_place(place, path)
        discard_ledgers(pyramid, work)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {reason(error)}. Free disk space or mend the permission, then run again; the "
            f"computed blocks are kept in {place}."
        ) from error
