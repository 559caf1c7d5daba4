"""Small volumes that other programs' libraries write with metadata, and what is right for each; for the matrix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import nibabel
import numpy as np
import tensorstore as ts
import tifffile
import zarr
from PIL import Image

Size = tuple[float, float, float]
ZYX = np.random.default_rng(3).integers(1, 120, (5, 12, 14), dtype=np.uint8)
TWO = np.stack([ZYX, 120 - ZYX])
XYZ = ZYX.transpose(2, 1, 0).copy()
SIZE: Size = (40.0, 5.0, 4.0)


@dataclass
class Fact:
    """A volume on disk, and what is right for it; what is None is not looked at.

    Parameters
    ----------
    uri
        As for ``open_volume``.
    voxels
        (c, z, y, x), or (z, y, x) of one channel.
    size, origin
        (z, y, x) in nanometres; an empty size: none is known.
    refused
        What the refusal says, as a pattern; reading comes too late.
    remedy
        What ``open_volume`` is told, so that it opens after all.
    unread
        What the refusal of reading says, after ``spoil`` was called on the open volume.
    spoil
        Damages the files of the open volume.
    files
        Each of these changes the identity when its time does.
    """

    uri: str | Path
    voxels: np.ndarray | None = None
    size: Size | tuple[()] | None = None
    origin: Size | None = None
    refused: str = ""
    remedy: dict[str, Any] = field(default_factory=dict)
    unread: str = ""
    spoil: Callable[[], object] = lambda: None
    files: tuple[Path, ...] = ()


# ------------------------------------------------------------------------------------------- one file of each library


def h5(path: Path, data: np.ndarray = ZYX, labels: str = "", name: str = "raw", **attributes: Any) -> Path:
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(name, data=data)
        dataset.attrs.update(attributes)
        for axis, label in enumerate(labels):
            dataset.dims[axis].label = label
    return path


def tags(keys: str) -> str:
    """ilastik's description of axes, as vigra writes it."""
    flags = {"c": 1, "x": 2, "y": 2, "z": 2, "t": 8}
    axes = [{"key": key, "typeFlags": flags[key], "resolution": 0, "description": ""} for key in keys]
    return json.dumps({"axes": axes})


def imagej(path: Path, data: np.ndarray = ZYX, axes: str = "ZYX", **metadata: Any) -> Path:
    tifffile.imwrite(path, data, imagej=True, resolution=(250, 200), metadata={"axes": axes, **metadata})
    return path


def ome_tiff(path: Path, data: np.ndarray = ZYX, axes: str = "ZYX", unit: str | None = None) -> Path:
    sizes: dict[str, Any] = {}
    if unit is not None:
        sizes = {f"PhysicalSize{axis}": size for axis, size in zip("ZYX", SIZE, strict=True)}
        sizes |= {f"PhysicalSize{axis}Unit": unit for axis in "ZYX"}
    tifffile.imwrite(path, data, ome=True, photometric="minisblack", metadata={"axes": axes, **sizes})
    return path


def pngs(folder: Path, data: np.ndarray = ZYX) -> Path:
    folder.mkdir()
    for number, section in enumerate(data):
        Image.fromarray(section).save(folder / f"section_{number}.png")
    return folder


def nii(path: Path, data: np.ndarray = XYZ, unit: str = "micron") -> Path:
    image = nibabel.Nifti1Image(data, np.diag([0.004, 0.005, 0.04, 1]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    return path


def mrc(path: Path, data: np.ndarray | None = None, **fields: Any) -> Path:
    with mrcfile.new(path, ZYX.astype(np.int8) if data is None else data) as file:
        file.voxel_size = (40, 50, 400)
        for name, value in fields.items():
            file.header[name] = value
    return path


def npy(path: Path, data: np.ndarray = ZYX) -> Path:
    np.save(path, data)
    return path


def zarr_array(path: Path, data: np.ndarray = ZYX, version: int = 2, **options: Any) -> Path:
    attributes = options.pop("attributes", {})
    array = zarr.create_array(
        path, shape=data.shape, dtype="u1", chunks=tuple(min(n, 8) for n in data.shape), zarr_format=version, **options
    )
    array[...] = data
    array.attrs.update(attributes)
    return path


def ome_zarr(path: Path, data: np.ndarray = ZYX, axes: str = "zyx", unit: str | None = "nanometer", **own: Any) -> Path:
    stated = [{"name": a, **({"unit": unit} if unit and a in "zyx" else {})} for a in axes]
    lengths = dict(zip("zyx", SIZE, strict=True))
    steps = [
        {"type": "scale", "scale": [lengths.get(a, 1.0) for a in axes]},
        {"type": "translation", "translation": [10 * lengths.get(a, 0.0) for a in axes]},
    ]
    image = {"axes": stated, "datasets": [{"path": "0", "coordinateTransformations": steps}]}
    group = zarr.open_group(
        path, mode="w", zarr_format=3, attributes={"ome": {"version": "0.5", "multiscales": [image]}}
    )
    array = group.create_array("0", data=data, chunks=tuple(min(n, 8) for n in data.shape))
    array.attrs.update(own)
    return path


def chunked(driver: str, path: Path, data: np.ndarray, **options: Any) -> Path:
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{path}/"}, **options}
    array = ts.open(spec, create=True, dtype=ts.uint8, shape=data.shape).result()
    array.write(data).result()
    return path


def n5(path: Path, data: np.ndarray = XYZ, **attributes: Any) -> Path:
    block = [min(n, 8) for n in data.shape]
    chunked("n5", path, data, metadata={"blockSize": block, "compression": {"type": "gzip"}})
    file = path / "attributes.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | attributes))
    return path


def precomputed(path: Path, data: np.ndarray = XYZ, offset: tuple[int, int, int] = (0, 0, 0)) -> Path:
    scale = {"key": "4_5_40", "size": list(data.shape[:3]), "resolution": [4, 5, 40], "encoding": "raw"}
    scale |= {"voxel_offset": list(offset), "chunk_size": [8, 8, 8]}
    spec = {"driver": "neuroglancer_precomputed", "kvstore": {"driver": "file", "path": f"{path}/"}}
    info = {"type": "image", "num_channels": 1 if data.ndim == 3 else data.shape[3]}
    array = ts.open(
        {**spec, "scale_metadata": scale, "multiscale_metadata": info}, create=True, dtype=ts.uint8
    ).result()
    array[ts.d[:].translate_to[0]].write(data if data.ndim == 4 else data[..., None]).result()
    return path


# --------------------------------------------------------------------------------------------- files that lack a part


def virtual(folder: Path) -> Path:
    """A dataset of which every section lies in a file of its own."""
    layout = h5py.VirtualLayout(ZYX.shape, "u1")
    for z, section in enumerate(ZYX):
        h5(folder / f"part{z}.h5", section)
        layout[z] = h5py.VirtualSource(f"part{z}.h5", "raw", section.shape)
    with h5py.File(folder / "virtual.h5", "w") as file:
        file.create_virtual_dataset("raw", layout)
    return folder / "virtual.h5"


def linked(folder: Path) -> str:
    """A dataset in another file."""
    h5(folder / "far.h5")
    with h5py.File(folder / "link.h5", "w") as file:
        file["raw"] = h5py.ExternalLink("far.h5", "/raw")
    return f"{folder / 'link.h5'}::raw"


def raw_storage(folder: Path, name: str = "voxels.raw") -> Path:
    """A dataset whose voxels lie in a file without a header."""
    path = folder / "external.h5"
    (path.parent / name).write_bytes(ZYX.tobytes())
    with h5py.File(path, "w") as file:
        file.create_dataset("raw", ZYX.shape, "u1", external=[(name, 0, ZYX.nbytes)])
    return path


def without(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
