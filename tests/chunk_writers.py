"""Precomputed and N5 volumes written byte by byte from their specifications, for tests of the readers."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Span = tuple[slice, ...]


def spans(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Span]]:
    """The position of each chunk in the grid and its span, cut at the volume's end."""
    for at in itertools.product(*(range(-(-n // c)) for n, c in zip(shape, chunk, strict=True))):
        yield at, tuple(slice(i * c, min(n, (i + 1) * c)) for i, c, n in zip(at, chunk, shape, strict=True))


def raw(block: np.ndarray) -> bytes:
    return block.astype(block.dtype.newbyteorder("<")).tobytes(order="F")


def jpeg(block: np.ndarray) -> bytes:
    x, y, z, channels = block.shape
    pixels = block.transpose(2, 1, 0, 3).reshape(z * y, x, channels)
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(stream, "jpeg", quality=95)
    return stream.getvalue()


def constant_blocks(block: np.ndarray) -> bytes:
    """Compressed segmentation of uint64 labels that are constant in blocks of 8 × 8 × 8: tables of one, 0 bits."""
    grid = [-(-n // 8) for n in block.shape[:3]]
    labels = [int(block[x * 8, y * 8, z * 8, 0]) for z, y, x in np.ndindex(*grid[::-1])]
    tables = 2 * len(labels)
    headers = [struct.pack("<II", tables + 2 * i, tables) for i in range(len(labels))]
    return struct.pack("<I", 1) + b"".join(headers) + struct.pack(f"<{len(labels)}Q", *labels)


ENCODERS: dict[str, Callable[[np.ndarray], bytes]] = {
    "raw": raw,
    "jpeg": jpeg,
    "compressed_segmentation": constant_blocks,
}


def write_precomputed(
    folder: Path,
    levels: dict[str, np.ndarray],
    *,
    encoding: str = "raw",
    chunk: tuple[int, int, int] = (16, 16, 2),
    voxel_offset: tuple[int, int, int] = (10, 20, 3),
    **info: Any,
) -> Path:
    """Scales of (x, y, z, channel), named by their resolution in nanometres such as ``4_5_30``."""
    scales = []
    for key, data in levels.items():
        (folder / key).mkdir(parents=True, exist_ok=True)
        scale = {
            "key": key,
            "size": list(data.shape[:3]),
            "resolution": [float(n) for n in key.split("_")],
            "voxel_offset": list(voxel_offset),
            "chunk_sizes": [list(chunk)],
            "encoding": encoding,
        }
        if encoding == "compressed_segmentation":
            scale["compressed_segmentation_block_size"] = [8, 8, 8]
        scales.append(scale)
        for _, span in spans(data.shape[:3], chunk):
            ends = zip(span, voxel_offset, strict=True)
            name = "_".join(f"{s.start + o}-{s.stop + o}" for s, o in ends)
            (folder / key / name).write_bytes(ENCODERS[encoding](data[span]))
    first = next(iter(levels.values()))
    kind = "segmentation" if encoding == "compressed_segmentation" else "image"
    content = {"type": kind, "data_type": first.dtype.name, "num_channels": first.shape[3], "scales": scales}
    (folder / "info").write_text(json.dumps(content | info))
    return folder


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "raw": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


def write_n5(
    folder: Path, data: np.ndarray, *, block: tuple[int, ...], packing: str = "gzip", **attributes: Any
) -> Path:
    """An array of axes (x, y, …): a header of big-endian numbers before each block, x fastest."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "dimensions": list(data.shape),
        "blockSize": list(block),
        "dataType": data.dtype.name,
        "compression": {"type": packing},
    }
    (folder / "attributes.json").write_text(json.dumps(content | attributes))
    for at, span in spans(data.shape, block):
        part = data[span]
        path = folder.joinpath(*map(str, at))
        path.parent.mkdir(parents=True, exist_ok=True)
        header = struct.pack(f">HH{data.ndim}I", 0, data.ndim, *part.shape)
        body = part.astype(part.dtype.newbyteorder(">")).tobytes(order="F")
        path.write_bytes(header + PACKERS[packing](body))
    return folder
