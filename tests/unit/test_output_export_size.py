"""The size of an output is bounded before it is written: noise, which nothing compresses, stays below, and near."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from connectomics.core.geometry import BlockGrid, Vec3
from connectomics.stages.output import slabs
from connectomics.stages.output.export import FORMATS, export_path, largest_size
from connectomics.stages.output.finish import FinalOutput
from connectomics.stages.output.size import STAMP_BYTES, OutputSize, store_size
from connectomics.testing.output_format import export_store
from connectomics.volumes.store import create_store
from connectomics.volumes.volume import VolumeInfo

SIZE = (40.0, 4.0, 5.0)
FLAT: tuple[Vec3, Vec3] = ((1, 128, 128), (2, 256, 384))
CUBES: tuple[Vec3, Vec3] = ((32, 32, 32), (32, 64, 128))
KINDS: list[tuple[str, tuple[int, int, int, int], str, tuple[Vec3, Vec3]]] = [
    ("labels", (1, 5, 700, 300), "uint8", FLAT),
    ("labels", (1, 50, 200, 130), "uint16", CUBES),
    ("labels", (1, 50, 200, 65), "uint64", CUBES),
    ("probabilities", (3, 4, 260, 300), "float32", FLAT),
    ("probabilities", (2, 40, 100, 130), "float16", CUBES),
]
GROWN = ("zarr2", "n5", "precomputed", "tiff")
NOT_PNG = {"float32", "float16", "uint64"}


def size_of(path: Path) -> OutputSize:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return OutputSize(sum(f.stat().st_size for f in files), len(files))


def noise(shape: tuple[int, ...], dtype: str) -> Any:
    generator = np.random.default_rng(3)
    if dtype.startswith("float"):
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(1, np.iinfo(dtype).max, shape, dtype)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[2])
def test_noise_is_smaller_than_its_bound(
    tmp_path: Path, form: str, kind: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, shape, dtype, (chunk, shard) = kind
    if form == "png" and dtype in NOT_PNG:
        pytest.skip("png cannot hold it")
    if dtype == "uint16":
        monkeypatch.setattr(slabs, "SLAB_BYTES", 1 << 14)  # tiled TIFF
    info, voxels = VolumeInfo(shape, np.dtype(dtype), chunk, SIZE), noise(shape, dtype)
    store = create_store(tmp_path / "labels.zarr", info, shard_shape=shard, attributes={})
    for block in BlockGrid(info.extent, shard):
        store.write(block.core, voxels[(slice(None), *block.core.slices)])
    kept, bound = size_of(store.path), store_size(info, shard)
    assert kept.nbytes <= bound.nbytes <= 4 * kept.nbytes and kept.files == bound.files
    (tmp_path / "out").mkdir()
    bound = largest_size(info, form, shard, labels=name == "labels")
    export_store(store, FinalOutput(name, "a", "k", (form,)), tmp_path / "out", {})
    found = size_of(export_path(tmp_path / "out", "a", form))
    near = 12 if form in GROWN and chunk == CUBES[0] else 4  # what fills up chunks at the far faces compresses well
    assert found.nbytes <= bound.nbytes <= near * found.nbytes + 3 * STAMP_BYTES
    assert found.files <= bound.files <= 1.5 * found.files + 3


def test_a_pyramid_that_is_not_wanted_is_not_counted() -> None:
    info = VolumeInfo((1, 8, 2048, 2048), np.dtype(np.uint8), (1, 512, 512), SIZE)
    whole, flat = (largest_size(info, "n5", (8, 2048, 2048), labels=True, levels=n) for n in (None, 1))
    assert 1.3 < (whole.nbytes - STAMP_BYTES) / (flat.nbytes - STAMP_BYTES) < 1.36  # 1 + 1/4 + 1/16 + …


GUIDE = Path(__file__).parents[2] / "docs" / "nnunet_integration.md"
COUNTS: dict[int, Vec3] = {1: (1, 1, 1), 12: (3, 2, 2), 100: (5, 5, 4), 10_000: (25, 20, 20)}


@pytest.mark.parametrize(
    ("kind", "block", "chunk"),
    [
        ("a section of 512², 0.26 MB", (1, 512, 512), (1, 512, 512)),
        ("a section of 2,048², 4 MB", (1, 2048, 2048), (1, 512, 512)),
        ("a cube of 512³, 134 MB", (512, 512, 512), (64, 64, 64)),
    ],
)
def test_the_guide_tells_how_many_files_there_are(kind: str, block: Vec3, chunk: Vec3) -> None:
    table, rows = GUIDE.read_text(), []
    for formats in (("zarr",), ("zarr2", "n5"), ("precomputed",), ("png",)):
        (files,) = {tuple(files_of(form, block, chunk, blocks) for blocks in COUNTS) for form in formats}
        rows.append(f"| {', '.join(formats)} | {' | '.join(f'{count:,}' for count in files)} |")
        assert formats != ("zarr",) or (files[2] < 100 and files[3] < 3500)
    assert f"| {kind} " + "\n| ".join(rows) + "\n" in table


def files_of(form: str, block: Vec3, chunk: Vec3, blocks: int) -> int:
    """At most, of so many blocks: sections one after the other, or a box of cubes."""
    counts = (blocks, 1, 1) if block[0] == 1 else COUNTS[blocks]
    z, y, x = (n * b for n, b in zip(counts, block, strict=True))
    info = VolumeInfo((1, z, y, x), np.dtype(np.uint8), chunk, (40.0, 8.0, 8.0))
    return largest_size(info, form, block, labels=True).files
