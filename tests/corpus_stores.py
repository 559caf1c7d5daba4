"""Hostile chunked stores: sizes nobody should believe, bombs, links, pipes and metadata that name other places."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from corpus_volumes import GOOD, WIDE, Make, chunk_in, edit, folder_of, json_in
from mutations import zeros_deflated, zeros_gzipped

VAST = [WIDE, WIDE, WIDE]


def h5_made(name: str, write: Callable[[h5py.File], object]) -> Make:
    """An HDF5 file of any content."""

    def make(folder: Path) -> Path:
        path = folder / f"{name}.h5"
        with h5py.File(path, "w") as file:
            write(file)
        return path

    return make


def chunk_bomb(file: h5py.File) -> None:
    dataset = file.create_dataset("main", shape=GOOD.shape, dtype="u1", chunks=GOOD.shape, compression="gzip")
    dataset.id.write_direct_chunk((0, 0, 0), zeros_deflated(1 << 29))


def external(file: h5py.File) -> None:
    file.create_dataset("main", shape=(2, 8, 8), dtype="u1", external=[("/etc/passwd", 0, 128)])


def virtual_circle(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=GOOD.shape, dtype="u1")
    layout[:] = h5py.VirtualSource(".", "main", shape=GOOD.shape)
    file.create_virtual_dataset("main", layout)


def linked(file: h5py.File) -> None:
    file["main"] = h5py.SoftLink("/main")


def linked_outside(file: h5py.File) -> None:
    file["main"] = h5py.ExternalLink(file.filename, "main")


def nested(file: h5py.File) -> None:
    group = file
    for _ in range(2000):
        group = group.create_group("a")


def nested_in_circles(file: h5py.File) -> None:
    for name in "abcdefgh":
        file.require_group("g")[name] = file["/"]


def compound(file: h5py.File) -> None:
    file.create_dataset("main", data=np.zeros(GOOD.shape, [("a", "f4"), ("b", "i8")]))


def odd_attributes(file: h5py.File) -> None:
    dataset = file.create_dataset("main", data=GOOD)
    dataset.attrs["voxel_size_nm"] = np.array([b"a", b"\xff", b"c"])
    dataset.attrs["resolution"] = np.array([np.nan, -1, 1e300])


HDF5: dict[str, Callable[[h5py.File], object]] = {
    "h5_vast": lambda f: f.create_dataset("main", shape=VAST, dtype="u1", chunks=(1, 1024, 1024)),
    "h5_vast_unchunked": lambda f: f.create_dataset("main", shape=VAST, dtype="u1"),
    "h5_one_chunk": lambda f: f.create_dataset("main", data=GOOD, chunks=GOOD.shape, maxshape=(None,) * 3),
    "h5_bomb": chunk_bomb,
    "h5_external": external,
    "h5_virtual": virtual_circle,
    "h5_link": linked,
    "h5_link_out": linked_outside,
    "h5_nested": nested,
    "h5_circles": nested_in_circles,
    "h5_compound": compound,
    "h5_attributes": odd_attributes,
    "h5_reference": lambda f: f.create_dataset("main", shape=(2, 3), dtype=h5py.ref_dtype),
    "h5_text": lambda f: f.create_dataset("main", data=np.array([["a", "b"]], dtype=h5py.string_dtype())),
    "h5_null": lambda f: f.create_dataset("main", data=h5py.Empty("u1")),
    "h5_scalar": lambda f: f.create_dataset("main", data=7),
    "h5_type": lambda f: f.__setitem__("main", np.dtype("f8")),
}


def grid(chunk: list[int]) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=chunk)


def sharding(m: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = m["codecs"][0]["configuration"]
    return found


def shards_in_shards(m: dict[str, Any]) -> None:
    inner = [{"name": "bytes"}]
    for _ in range(60):
        codec = {"name": "sharding_indexed", "configuration": {"chunk_shape": [1, 8, 8], "codecs": inner}}
        codec["configuration"]["index_codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        inner = [codec]
    m["codecs"] = inner


ZARR3: dict[str, Callable[[dict[str, Any]], object]] = {
    "vast": lambda m: m.update(shape=VAST),
    "beyond": lambda m: m.update(shape=[2**62, 2**62, 2**62]),
    "vast_chunk": lambda m: [m.update(codecs=[{"name": "bytes"}]), grid(VAST)(m)],
    "huge_chunk": lambda m: [m.update(codecs=[{"name": "bytes"}]), grid([2**40, 2**40, 2**40])(m)],
    "giga_chunk": lambda m: [m.update(codecs=[{"name": "bytes"}], shape=[4, 2**16, 2**16]), grid([4, 2**16, 2**16])(m)],
    "vast_shard": lambda m: [grid([8000, 80000, 80000])(m)],
    "no_chunk": lambda m: grid([0, 0, 0])(m),
    "minus_chunk": lambda m: grid([-1, 24, 32])(m),
    "tiny_inner": lambda m: sharding(m).update(chunk_shape=[1, 1, 1]),
    "inner": lambda m: sharding(m).update(chunk_shape=[7, 7, 7]),
    "nested_shards": shards_in_shards,
    "codec": lambda m: m.update(codecs=[{"name": "os.system"}]),
    "no_codecs": lambda m: m.update(codecs=[]),
    "many_codecs": lambda m: m.update(codecs=[{"name": "gzip", "configuration": {"level": 1}}] * 5000),
    "transpose": lambda m: m.update(codecs=[{"name": "transpose", "configuration": {"order": [0, 0, 9]}}]),
    "text": lambda m: m.update(data_type="string"),
    "raw": lambda m: m.update(data_type="r99999999"),
    "fill": lambda m: m.update(fill_value="NaN"),
    "keys": lambda m: m.update(chunk_key_encoding={"name": "default", "configuration": {"separator": "../"}}),
    "bool_shape": lambda m: m.update(shape=[True, 24, 32]),
    "many_axes": lambda m: m.update(shape=[1] * 5000),
    "must_understand": lambda m: m.update(extension={"name": "x", "must_understand": True}),
}
ZARR2: dict[str, Callable[[dict[str, Any]], object]] = {
    "vast": lambda m: m.update(shape=VAST),
    "vast_chunk": lambda m: m.update(chunks=VAST),
    "no_chunk": lambda m: m.update(chunks=[0, 0, 0]),
    "pickle": lambda m: m.update(filters=[{"id": "pickle"}], dtype="|O"),
    "objects": lambda m: m.update(dtype="|O"),
    "fields": lambda m: m.update(dtype=[["a", "<f4"]]),
    "compressor": lambda m: m.update(compressor={"id": "os.system"}),
    "order": lambda m: m.update(order="Q"),
    "separator": lambda m: m.update(dimension_separator="../"),
    "fill": lambda m: m.update(fill_value={"a": 1}),
}
N5: dict[str, Callable[[dict[str, Any]], object]] = {
    "vast": lambda m: m.update(dimensions=VAST),
    "vast_block": lambda m: m.update(blockSize=VAST),
    "no_block": lambda m: m.update(blockSize=[0, 0, 0]),
    "axes": lambda m: m.update(dimensions=[32, 24]),
    "compression": lambda m: m.update(compression={"type": "blosc", "cname": "x", "clevel": -9}),
    "transform": lambda m: m.update(transform={"axes": ["z"], "units": [], "scale": ["x"], "translate": [{}]}),
    "factors": lambda m: m.update(downsamplingFactors=[0, "a", None]),
    "units": lambda m: m.update(units=[[], {}, 3]),
    "offset": lambda m: m.update(offset=["a", None, {}]),
    "resolution": lambda m: m.update(pixelResolution={"dimensions": [[1], [2], [3]], "unit": {}}),
}


def scale(m: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = m["scales"][0]
    return found


def shard_spec(**bits: int) -> dict[str, Any]:
    plain = {"@type": "neuroglancer_uint64_sharded_v1", "hash": "identity"}
    return plain | {"preshift_bits": 0, "minishard_bits": 1, "shard_bits": 1} | bits


PRECOMPUTED: dict[str, Callable[[dict[str, Any]], object]] = {
    "vast": lambda m: scale(m).update(size=VAST),
    "beyond": lambda m: scale(m).update(size=[2**62, 2**62, 2**62]),
    "vast_chunk": lambda m: scale(m).update(chunk_sizes=[VAST]),
    "deep_chunk": lambda m: scale(m)["chunk_sizes"][0].__setitem__(2, 2**31),
    "no_chunk": lambda m: scale(m).update(chunk_sizes=[[0, 0, 0]]),
    "no_chunks": lambda m: scale(m).update(chunk_sizes=[]),
    "minishards": lambda m: scale(m).update(sharding=shard_spec(minishard_bits=60)),
    "shards": lambda m: scale(m).update(sharding=shard_spec(shard_bits=64, preshift_bits=64)),
    "climbs": lambda m: scale(m).update(key="../../../../etc"),
    "here": lambda m: scale(m).update(key="."),
    "jpeg": lambda m: scale(m).update(encoding="jpeg"),
    "png": lambda m: scale(m).update(encoding="png"),
    "segmentation": lambda m: [
        m.update(data_type="uint32"),
        scale(m).update(encoding="compressed_segmentation", compressed_segmentation_block_size=[0, 0, 0]),
    ],
    "blocks": lambda m: [
        m.update(data_type="uint32"),
        scale(m).update(encoding="compressed_segmentation", compressed_segmentation_block_size=[2**31 - 1] * 3),
    ],
    "channels": lambda m: m.update(num_channels=2**60),
    "offset": lambda m: scale(m).update(voxel_offset=[2**62, -(2**62), 2**63 - 1]),
    "resolution": lambda m: scale(m).update(resolution=["a", None, {}]),
    "type": lambda m: m.update({"@type": "neuroglancer_legacy_mesh", "type": 7}),
}


def circle(root: Path, links: int = 1) -> None:
    for i in range(links):
        (root / f"loop{i}").symlink_to(root, target_is_directory=True)


def replaced_by_pipe(inner: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / inner).unlink()
        os.mkfifo(root / inner)

    return change


def bare_group(root: Path) -> None:
    """Groups alone, with links that lead back."""
    import shutil

    shutil.rmtree(root / "0")
    (root / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group"}))
    circle(root, 12)


def bare_n5(root: Path) -> None:
    (root / "attributes.json").write_text("{}")
    circle(root, 12)


def multiscales(**dataset: Any) -> Callable[[bytes], bytes]:
    return edit(lambda m: m["attributes"]["ome"]["multiscales"][0]["datasets"][0].update(dataset))


def images(name: str, fill: Callable[[Path], object]) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).mkdir()
        fill(folder / name)
        return folder / name

    return make


OTHERS: dict[str, Make] = {
    "zarr3_loop": folder_of("zarr3_loop", "zarr3", circle),
    "zarr3_loops": folder_of("zarr3_loops", "zarr3", lambda r: circle(r / "0", 3)),
    "zarr2_loops": folder_of("zarr2_loops", "zarr2", lambda r: circle(r, 3)),
    "zarr3_groups": folder_of("zarr3_groups", "zarr3", bare_group),
    "n5_groups": folder_of("n5_groups", "n5", bare_n5),
    "n5_loops": folder_of("n5_loops", "n5", lambda r: circle(r, 3)),
    "precomputed_loops": folder_of("precomputed_loops", "precomputed", lambda r: circle(r / "4_4_30", 3)),
    "zarr3_pipe": folder_of("zarr3_pipe", "zarr3", replaced_by_pipe("0/zarr.json")),
    "zarr2_pipe": folder_of("zarr2_pipe", "zarr2", replaced_by_pipe("0.0.0")),
    "n5_pipe": folder_of("n5_pipe", "n5", replaced_by_pipe("attributes.json")),
    "precomputed_pipe": folder_of("precomputed_pipe", "precomputed", replaced_by_pipe("info")),
    "zarr3_climbs": json_in("zarr3_climbs", "zarr3", "group", multiscales(path="../../other.zarr/0")),
    "zarr3_no_path": json_in("zarr3_no_path", "zarr3", "group", multiscales(path=None)),
    "zarr3_long_path": json_in("zarr3_long_path", "zarr3", "group", multiscales(path="x/" * 5000)),
    "zarr3_nul_path": json_in("zarr3_nul_path", "zarr3", "group", multiscales(path="a\0b")),
    "zarr3_steps": json_in("zarr3_steps", "zarr3", "group", multiscales(coordinateTransformations=[{"type": []}])),
    "zarr3_scale": json_in(
        "zarr3_scale",
        "zarr3",
        "group",
        multiscales(coordinateTransformations=[{"type": "scale", "scale": [1, [2], "x"]}]),
    ),
    "zarr2_bomb": chunk_in("zarr2_bomb", "zarr2", lambda d: zeros_deflated(1 << 29)),
    "n5_bomb": chunk_in("n5_bomb", "n5", lambda d: d[:16] + zeros_gzipped(1 << 29)),
    "n5_header": chunk_in("n5_header", "n5", lambda d: d[:4] + b"\xff" * 12 + d[16:]),
    "n5_many_axes": chunk_in("n5_many_axes", "n5", lambda d: b"\0\0\xff\xff" + d[4:]),
    "zarr3_index": chunk_in("zarr3_index", "zarr3", lambda d: d[:-200] + b"\xf0" * 196 + d[-4:]),
    "images_pipe": images("images_pipe", lambda f: os.mkfifo(f / "a.png")),
    "images_device": images("images_device", lambda f: (f / "a.png").symlink_to("/dev/zero")),
    "images_circle": images("images_circle", lambda f: (f / "a.png").symlink_to("a.png")),
}
BLOSC_LIAR = (
    b"\x02\x01\x13\x01"
    + (2**31 - 17).to_bytes(4, "little")
    + (1 << 18).to_bytes(4, "little")
    + (40).to_bytes(4, "little")
)
STORES: dict[str, Make] = {
    **{name: h5_made(name, write) for name, write in HDF5.items()},
    **{f"zarr3_{name}": json_in(f"zarr3_{name}", "zarr3", "array", edit(change)) for name, change in ZARR3.items()},
    **{f"zarr2_{name}": json_in(f"zarr2_{name}", "zarr2", "array", edit(change)) for name, change in ZARR2.items()},
    **{f"n5_{name}": json_in(f"n5_{name}", "n5", "array", edit(change)) for name, change in N5.items()},
    **{
        f"precomputed_{name}": json_in(f"precomputed_{name}", "precomputed", "info", edit(change))
        for name, change in PRECOMPUTED.items()
    },
    **OTHERS,
}
