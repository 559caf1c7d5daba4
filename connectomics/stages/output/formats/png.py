"""The output format ``png``: a folder with an image for each section, of labels of 8 or 16 bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from connectomics.core.geometry import Box
from connectomics.stages.output.formats.contract import STAMP_FILE, FileFormat, WholeVolume, stamp_in
from connectomics.stages.output.size import FILE_BYTES, STAMP_BYTES, OutputSize, packed
from connectomics.stages.output.slabs import EXPORT_COPIES, SLAB_BYTES, section_bytes, sections
from connectomics.volumes.formats.images import open_stack
from connectomics.volumes.volume import VolumeInfo


def _refusal(info: VolumeInfo, budget_bytes: int | None) -> str:
    if info.channels != 1 or info.dtype not in (np.uint8, np.uint16):
        return (
            f"png holds one channel of uint8 or uint16, not {info.channels} of {info.dtype}; use another of "
            "inference.output.formats."
        )
    need = EXPORT_COPIES * section_bytes(info)
    if budget_bytes is None or need <= budget_bytes:
        return ""
    return (
        f"png holds whole sections, and writing one of {info.extent[1:]} pixels takes about {need / 1e9:.2f} GB, the "
        f"memory budget is {budget_bytes / 1e9:.2f} GB; use tiff or a chunked format, or raise "
        "system.memory_budget_gb."
    )


def _write_png(source: WholeVolume, path: Path, stamp: dict[str, object]) -> None:
    path.mkdir()
    info = source.info
    digits = max(4, len(str(info.extent[0] - 1)))
    for z in range(info.extent[0]):
        section = source.read(Box((z, 0, 0), (z + 1, *info.extent[1:])))[0, 0]
        Image.fromarray(section).save(path / f"{z:0{digits}}.png", compress_level=3)
    (path / STAMP_FILE).write_text(json.dumps(stamp, allow_nan=False))


def _largest_size(info: VolumeInfo) -> OutputSize:
    rows = info.extent[0] * info.extent[1]
    nbytes = packed(math.prod(info.shape) * info.dtype.itemsize, info.extent[0])
    return OutputSize(nbytes + rows + info.extent[0] * FILE_BYTES + STAMP_BYTES, info.extent[0] + 1)


PNG = FileFormat(
    "_png",
    _write_png,
    open_stack,
    sections,
    stamp_of=lambda folder: stamp_in(folder / STAMP_FILE),
    largest_size=_largest_size,
    refusal=_refusal,
    held_bytes=lambda section: max(SLAB_BYTES, section),
)
