"""Broken volumes: each is refused with one error that names it; none runs what a file brings."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import nibabel
import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box
from connectomics.volumes.opening import open_volume

from chunk_writers import write_n5, write_precomputed

RNG = np.random.default_rng(4)
VOXELS = RNG.integers(0, 255, (6, 40, 50), dtype=np.uint8)
WIDE = VOXELS.astype(np.int16)
Made = tuple[Path, dict[str, Any]]


def cut(path: Path, share: float = 0.5) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def h5(folder: Path, **datasets: Any) -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        for name, data in datasets.items():
            file[name] = data
    return folder / "a.h5"


def tif(folder: Path, **options: Any) -> Path:
    tifffile.imwrite(folder / "a.tif", VOXELS, photometric="minisblack", **options)
    return folder / "a.tif"


def tif_of(folder: Path, *arrays: np.ndarray, name: str = "a.tif") -> Path:
    with tifffile.TiffWriter(folder / name) as writer:
        for array in arrays:
            writer.write(array, photometric="minisblack", metadata=None)
    return folder / name


def pngs(folder: Path, names: str, shape: tuple[int, ...] = (20, 30)) -> Path:
    for name in names.split():
        Image.fromarray(RNG.integers(0, 255, shape, dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def odd_png(folder: Path, name: str, array: np.ndarray) -> Path:
    Image.fromarray(array).save(folder / f"{name}.png")
    return folder


def zarr_of(folder: Path, version: int = 3, **options: Any) -> Path:
    array = zarr.create_array(
        folder / "a.zarr", shape=VOXELS.shape, dtype="u1", chunks=(3, 20, 25), zarr_format=version, **options
    )
    array[:] = VOXELS
    return folder / "a.zarr"


def zarr_with(folder: Path, version: int = 3, **metadata: Any) -> Path:
    path = zarr_of(folder, version)
    file = path / ("zarr.json" if version == 3 else ".zarray")
    file.write_text(json.dumps(json.loads(file.read_text()) | metadata))
    return path


def zarr_group(folder: Path, multiscales: Any = None, *arrays: str) -> Path:
    attributes = {} if multiscales is None else {"ome": {"version": "0.5", "multiscales": multiscales}}
    group = zarr.open_group(folder / "a.zarr", mode="w", zarr_format=3, attributes=attributes)
    for name in arrays:
        group.create_array(name, data=VOXELS)
    return folder / "a.zarr"


def cut_chunk(path: Path, name: str) -> Path:
    cut(path / name)
    return path


def linked(folder: Path, target: str, name: str) -> Path:
    (folder / name).symlink_to(folder / target)
    return folder / name


def file_of(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def broken_last_page(path: Path) -> Path:
    """A chain of pages whose end is missing, as a copy that stopped leaves it."""
    with tifffile.TiffFile(path) as opened:
        end = opened.pages[3].offset  # type: ignore[union-attr]  # pages of a file
    return cut(path, end / path.stat().st_size)


def text_among_images(folder: Path) -> Path:
    pngs(folder, "1 2")
    return file_of(folder / "3.png", b"not an image").parent


def animated_png(folder: Path) -> Path:
    frames = [Image.fromarray(RNG.integers(0, 255, (20, 30), dtype=np.uint8)) for _ in range(2)]
    frames[0].save(folder / "a.png", save_all=True, append_images=frames[1:])
    return folder / "a.png"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.h5")
    return folder / "a.h5"


OME_XML = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:0">'
    '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" '
    'SizeX="50" SizeY="40" SizeZ="9" SizeC="1" SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>'
    "{}</Pixels></Image></OME>"
)
PARTS = "".join(
    f'<TiffData FirstZ="{z}" IFD="{z % 6}" PlaneCount="1"><UUID FileName="{name}">urn:uuid:{name}</UUID></TiffData>'
    for z, name in enumerate(["a.tif"] * 6 + ["b.tif"] * 3)
)


def ome_set(folder: Path) -> Path:
    for name in ("a.tif", "b.tif"):
        xml = OME_XML.format(PARTS).replace("urn:uuid:0", f"urn:uuid:{name}")
        tifffile.imwrite(folder / name, VOXELS, photometric="minisblack", description=xml, metadata=None)
    return folder / "a.tif"


def ome_lacking_pages(folder: Path) -> Path:
    return tif(folder, description=OME_XML.format("<TiffData/>"), metadata=None)


def nii(folder: Path, name: str = "a.nii", data: np.ndarray = VOXELS, **fields: Any) -> Path:
    """A NIfTI file with fields of its header changed afterwards."""
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), folder / "whole.nii")
    content = bytearray((folder / "whole.nii").read_bytes())
    header = np.frombuffer(content, nibabel.Nifti1Header.template_dtype, 1)
    for field, value in fields.items():
        header[field] = value
    (folder / "whole.nii").unlink()
    return file_of(folder / name, gzip.compress(bytes(content)) if name.endswith(".gz") else bytes(content))


def npy(folder: Path, data: Any, **header: Any) -> Path:
    """An npy file, with entries of its header replaced."""
    np.save(folder / "a.npy", data, allow_pickle=True)
    if header:
        found = {"descr": "|u1", "fortran_order": False, "shape": np.shape(data)} | header
        text = repr(found).encode() + b" \n"
        body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + np.asarray(data).tobytes()
        (folder / "a.npy").write_bytes(body)
    return folder / "a.npy"


def mrc(folder: Path, data: np.ndarray = WIDE, flags: int | None = None, **fields: Any) -> Path:
    """An MRC file with fields of its header changed."""
    with mrcfile.new(folder / "a.mrc", data) as file:
        for field, value in fields.items():
            file.header[field] = value
        if flags is not None:
            file.header.extra2 = bytes(40) + struct.pack("<ii", 1146047817, flags) + bytes(36)
    return folder / "a.mrc"


def precomputed(folder: Path, scale: dict[str, Any] | None = None, **info: Any) -> Path:
    """A precomputed volume with entries of its info, or of its only scale, replaced."""
    path = write_precomputed(folder / "em", {"4_5_30": VOXELS.T[..., None]}, chunk=(50, 40, 6), **info)
    if scale is not None:
        content = json.loads((path / "info").read_text())
        content["scales"][0] |= scale
        (path / "info").write_text(json.dumps(content))
    return path


def without(path: Path, name: str) -> Path:
    target = path / name
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    return path


def packed_chunks(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """Every chunk of a precomputed volume packed with gzip, and then changed."""
    for chunk in list((path / "4_5_30").iterdir()):
        file_of(chunk.with_name(f"{chunk.name}.gz"), change(gzip.compress(chunk.read_bytes())))
        chunk.unlink()
    return path


def n5(folder: Path, *names: str, **attributes: Any) -> Path:
    """An N5 container with an array at each name, or at its root."""
    for name in names or ("",):
        write_n5(folder / "a.n5" / name, VOXELS.T, block=(50, 40, 6), **attributes)
    return folder / "a.n5"


RGB = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])


def multiscale(path: str, axes: Any = None, **step: Any) -> list[dict[str, Any]]:
    steps = [{"type": "scale", "scale": [1, 1, 1]} | step]
    return [{"axes": axes or list("zyx"), "datasets": [{"path": path, "coordinateTransformations": steps}]}]


TIME = [*"tyx"]
ODD = [{"name": "angle"}, {"name": "y"}, {"name": "x"}]
V3_BLOSC2 = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "magic", "configuration": {}}]
STRUCTURED = [["a", "|u1"], ["b", "<f4"]]

BROKEN: dict[str, tuple[Callable[[Path], Path], str, dict[str, Any]]] = {
    # name: (make it, what the message says, options of open_volume; "inner" goes behind the name)
    "missing file": (lambda f: f / "absent.h5", "no such file", {}),
    "missing folder": (lambda f: f / "absent.zarr", "no such file", {}),
    "dangling link": (lambda f: linked(f, "gone.h5", "a.h5"), "gone.h5, which is absent", {}),
    "endless link": (lambda f: linked(f, "a.h5", "a.h5"), "symbolic link", {}),
    "named pipe": (pipe, "neither a file nor a folder", {}),
    "empty file": (lambda f: file_of(f / "a.tif", b""), "0 bytes", {}),
    "unknown format": (lambda f: file_of(f / "a.xyz", b"123"), "unknown format '.xyz'", {}),
    "no suffix": (lambda f: file_of(f / "a", b"123"), "without suffix", {}),
    "folder named as file": (lambda f: (f / "a.h5").mkdir() or f / "a.h5", "a folder, where .h5", {}),
    "file named as folder": (lambda f: file_of(f / "a.zarr", b"123"), "a file, where .zarr", {}),
    "hdf5: wrong magic": (lambda f: file_of(f / "a.h5", b"not hdf5" * 99), "as HDF5", {}),
    "hdf5: truncated": (lambda f: cut(h5(f, main=VOXELS)), "as HDF5: .*truncated", {}),
    "hdf5: no such dataset": (
        lambda f: h5(f, raw=VOXELS, x=[1]),
        "no dataset 'other'.*raw, x",
        {"inner": "other"},
    ),
    "hdf5: two datasets": (lambda f: h5(f, raw=VOXELS, seg=VOXELS), "no dataset 'main'.*raw, seg", {}),
    "hdf5: no dataset": (lambda f: h5(f), "no dataset", {}),
    "hdf5: many datasets": (lambda f: h5(f, **{f"d{i:02}": [1] for i in range(14)}), "d09 and 4 more", {}),
    "hdf5: group named": (
        lambda f: h5(f, **{"g/a": VOXELS, "g/b": VOXELS}),
        "no dataset 'g'",
        {"inner": "g"},
    ),
    "hdf5: text": (lambda f: h5(f, main=[[b"a", b"b"]]), "cannot be read as", {}),
    "hdf5: compound": (lambda f: h5(f, main=np.zeros((2, 3), "u1,f4")), "cannot be read as", {}),
    "hdf5: complex": (lambda f: h5(f, main=np.zeros((2, 3), complex)), "complex128 cannot be read", {}),
    "hdf5: long double": (lambda f: h5(f, main=np.zeros((2, 3), "longdouble")), "at most 64 bit", {}),
    "hdf5: null": (lambda f: h5(f, main=h5py.Empty("u1")), "null dataset", {}),
    "hdf5: scalar": (lambda f: h5(f, main=3), "has 0 axes", {}),
    "hdf5: five axes": (lambda f: h5(f, main=np.zeros((1, 2, 2, 3, 4))), "has 5 axes", {}),
    "hdf5: empty axis": (lambda f: h5(f, main=np.zeros((3, 0, 4))), "without voxels", {}),
    "hdf5: axes too few": (lambda f: h5(f, main=VOXELS), "'yx' name 2 axes.*has 3", {"axes": "yx"}),
    "hdf5: axes twice": (lambda f: h5(f, main=VOXELS), "cannot use the axes 'zyy'", {"axes": "zyy"}),
    "hdf5: axes unknown": (lambda f: h5(f, main=VOXELS), "cannot use the axes 'abc'", {"axes": "abc"}),
    "hdf5: no x": (lambda f: h5(f, main=VOXELS), "cannot use the axes 'czy'", {"axes": "czy"}),
    "tiff: wrong magic": (lambda f: file_of(f / "a.tif", b"not tiff" * 9), "as TIFF", {}),
    "tiff: header only": (lambda f: file_of(f / "a.tif", b"II*\0\x08\0\0\0"), "TIFF", {}),
    "tiff: truncated": (lambda f: cut(tif(f)), "", {}),
    "tiff: truncated imagej": (lambda f: cut(tif(f, imagej=True, metadata={"axes": "ZYX"})), "", {}),
    "tiff: truncated zlib": (lambda f: cut(tif(f, compression="zlib"), 0.9), "", {}),
    "tiff: later pages lost": (lambda f: broken_last_page(tif_of(f, *VOXELS)), "truncated or lacks", {}),
    "tiff: pages of two sizes": (
        lambda f: tif_of(f, VOXELS, VOXELS[:, :9]),
        "2 image series that differ",
        {},
    ),
    "tiff: no such series": (lambda f: tif_of(f, VOXELS), "no image series '3'", {"inner": "3"}),
    "tiff: series not a number": (lambda f: tif_of(f, VOXELS), "no image series 'main'", {"inner": "main"}),
    "tiff: time": (lambda f: tif(f, imagej=True, metadata={"axes": "TYX"}), "time axis of length 6", {}),
    "tiff: complex": (lambda f: tif_of(f, VOXELS.astype("c8")), "complex64 cannot be read", {}),
    "tiff: set of files": (ome_set, "one part of an OME-TIFF set", {}),
    "tiff: ome lacks pages": (ome_lacking_pages, "", {}),
    "image: truncated": (lambda f: cut(pngs(f, "a") / "a.png"), "truncated", {}),
    "image: wrong magic": (
        lambda f: file_of(f / "a.png", b"GIF89a--"),
        "not as a PNG, JPEG, BMP or TIFF",
        {},
    ),
    "image: broken header": (
        lambda f: file_of(f / "a.png", b"\x89PNG\r\n\x1a\n" + b"0" * 30),
        "as an image",
        {},
    ),
    "image: animated": (animated_png, "animated PNG", {}),
    "image: axes": (lambda f: pngs(f, "a") / "a.png", "'zyx' do not fit an image of 2 axes", {"axes": "zyx"}),
    "stack: empty folder": (lambda f: f, "no image among the 0 files", {}),
    "stack: text only": (lambda f: file_of(f / "a.txt", b"hello").parent, "no image among the 1 files", {}),
    "stack: a text named png": (text_among_images, "3.png", {}),
    "stack: sizes differ": (lambda f: pngs(pngs(f, "1 2 4"), "3", (20, 31)), "3.png is 20 × 31", {}),
    "stack: dtypes differ": (
        lambda f: odd_png(pngs(f, "1"), "2", np.zeros((20, 30), np.uint16)),
        "2.png is .*16",
        {},
    ),
    "stack: colours differ": (lambda f: pngs(pngs(f, "1"), "2", (20, 30, 3)), "2.png is .* 3 channel", {}),
    "stack: missing channel": (lambda f: pngs(f, "a_0000 a_0001 b_0000"), "section b lacks channel 0001", {}),
    "stack: two formats": (
        lambda f: tif_of(pngs(f, "1"), VOXELS[0], name="2.tif").parent,
        "different formats",
        {},
    ),
    "stack: pages in a section": (
        lambda f: tif_of(f, VOXELS, name="1.tif").parent,
        "6 pages in one file",
        {},
    ),
    "stack: dangling link": (lambda f: linked(pngs(f, "1"), "gone", "2.png").parent, "2.png", {}),
    "stack: inner part": (lambda f: pngs(f, "1 2"), "has no inner part", {"inner": "main"}),
    "stack: axes without files": (lambda f: pngs(f, "1 2"), "leave no axis for 2 files", {"axes": "yx"}),
    "stack: axes unknown": (lambda f: pngs(f, "1 2"), "cannot use the axes 'tyx'", {"axes": "tyx"}),
    "stack: colours not named": (lambda f: pngs(f, "1 2", (20, 30, 3)), "name no c axis", {"axes": "zyx"}),
    "stack: truncated section": (lambda f: cut(pngs(f, "1 2") / "2.png").parent, "2.png", {}),
    "zarr: no array": (lambda f: (f / "a.zarr").mkdir() or f / "a.zarr", "no Zarr array", {}),
    "zarr: several arrays": (lambda f: zarr_group(f, None, "raw", "seg"), "several arrays .*raw, seg", {}),
    "zarr: no such level": (
        lambda f: zarr_group(f, multiscale("0"), "0"),
        "no array or level '7'",
        {"inner": "7"},
    ),
    "zarr: level not there": (
        lambda f: zarr_group(f, multiscale("0"), "1"),
        "name the array '0', which is absent",
        {},
    ),
    "zarr: level elsewhere": (lambda f: zarr_group(f, multiscale("../b"), "0"), "../b', which is absent", {}),
    "zarr: inner elsewhere": (
        lambda f: zarr_group(f, None, "0"),
        "outside the Zarr",
        {"inner": "../a.zarr/0"},
    ),
    "zarr: time": (lambda f: zarr_group(f, multiscale("0", TIME), "0"), "time axis of length 6", {}),
    "zarr: unknown axis": (
        lambda f: zarr_group(f, multiscale("0", ODD), "0"),
        "unknown kind of length 6",
        {},
    ),
    "zarr: scale of two": (
        lambda f: zarr_group(f, multiscale("0", scale=[1, 2]), "0"),
        "expected 3 numbers, one an",
        {},
    ),
    "zarr: metadata cut": (lambda f: cut(zarr_of(f) / "zarr.json").parent, "as Zarr", {}),
    "zarr: metadata a list": (
        lambda f: file_of(zarr_of(f) / "zarr.json", b"[]").parent,
        "not a JSON object",
        {},
    ),
    "zarr v2: metadata cut": (lambda f: cut(zarr_of(f, 2) / ".zarray").parent, "as Zarr", {}),
    "zarr: no shape": (lambda f: zarr_with(f, shape="large"), "no usable shape", {}),
    "zarr: empty axis": (lambda f: zarr_with(f, shape=[6, 0, 50]), "without voxels", {}),
    "zarr: unknown codec": (lambda f: zarr_with(f, codecs=V3_BLOSC2), "its codec '.*write the array again", {}),
    "zarr v2: unknown codec": (
        lambda f: zarr_with(f, 2, compressor={"id": "magic"}),
        "its codec 'magic'.*write the array again",
        {},
    ),
    "zarr v2: object dtype": (lambda f: zarr_with(f, 2, dtype="|O", filters=[{"id": "pickle"}]), "'|O'", {}),
    "zarr v2: structured": (lambda f: zarr_with(f, 2, dtype=STRUCTURED), "cannot be read as", {}),
    "zarr v2: complex": (lambda f: zarr_with(f, 2, dtype="<c8"), "'<c8' cannot be read", {}),
    "zarr: text": (lambda f: zarr_with(f, data_type="string"), "'string' cannot be read", {}),
    "zarr: chunk cut": (lambda f: cut_chunk(zarr_of(f), "c/0/0/0"), "a.zarr", {}),
    "zarr v2: chunk cut": (lambda f: cut_chunk(zarr_of(f, 2), "0.0.0"), "a.zarr", {}),
    "nifti: wrong magic": (lambda f: file_of(f / "a.nii", b"nifti?" * 99), "not start with a NIfTI header", {}),
    "nifti: cut in the header": (lambda f: file_of(f / "a.nii", b"\x5c\x01\0\0"), "NIfTI header", {}),
    "nifti: truncated": (lambda f: cut(nii(f)), "its header promises 12352; it was cut short", {}),
    "nifti: packed, truncated": (lambda f: cut(nii(f, "a.nii.gz")), "end-of-stream", {}),
    "nifti: packed, cut at the end": (lambda f: cut(nii(f, "a.nii.gz"), 0.9995), "end-of-stream", {}),
    "nifti: packed array cut": (lambda f: nii(f, "a.nii.gz", dim=[3, 6, 40, 51, 1, 1, 1, 1]), "it was cut", {}),
    "nifti: not packed": (lambda f: nii(f).rename(f / "a.nii.gz"), "as NIfTI: Not a gzipped", {}),
    "nifti: packed as plain": (lambda f: nii(f, "a.nii.gz").rename(f / "a.nii"), "NIfTI header", {}),
    "nifti: more than gzip can pack": (
        lambda f: nii(f, "a.nii.gz", dim=[4, 32767, 32767, 32767, 32767, 1, 1, 1]),
        "more than the file can hold",
        {},
    ),
    "nifti: pair": (lambda f: nii(f, magic=b"ni1"), "in another file", {}),
    "nifti: five axes": (lambda f: nii(f, data=np.zeros((2, 3, 4, 5, 6), "u1")), "time axis of length 5", {}),
    "nifti: one axis": (lambda f: nii(f, dim=[1, 9, 1, 1, 1, 1, 1, 1]), "has 1 axes", {}),
    "nifti: empty axis": (lambda f: nii(f, dim=[3, 6, 0, 50, 1, 1, 1, 1]), "without voxels", {}),
    "nifti: unknown type": (lambda f: nii(f, datatype=77), "as NIfTI: data code 77", {}),
    "nifti: colours": (lambda f: nii(f, data=RGB), "cannot be read as", {}),
    "nifti: complex": (lambda f: nii(f, data=np.zeros((4, 5, 6), "c8")), "complex64 cannot be read", {}),
    "nifti: intercept": (lambda f: nii(f, scl_slope=2, scl_inter=np.nan), "as NIfTI: .*intercept", {}),
    "nifti: no direction": (
        lambda f: nii(f, sform_code=1, srow_x=0, srow_y=0, srow_z=0),
        "no direction",
        {"inner": "ras"},
    ),
    "nifti: turned twice": (lambda f: nii(f), "both turn the volume", {"inner": "ras", "axes": "zyx"}),
    "nifti: inner part": (lambda f: nii(f), "no inner part 'main'", {"inner": "main"}),
    "mrc: wrong magic": (
        lambda f: file_of(f / "a.mrc", b"not mrc!" * 200),
        "as MRC: its header promises an extended header",
        {},
    ),
    "mrc: cut in the header": (lambda f: cut(mrc(f), 0.02), "as MRC: Couldn't read enough", {}),
    "mrc: cut in the extended header": (lambda f: mrc(f, nsymbt=2**30), "an extended header of 1073741824 bytes", {}),
    "mrc: truncated": (lambda f: cut(mrc(f)), "its header promises 25024; it was cut short", {}),
    "mrc: byte order": (lambda f: mrc(f, machst=[1, 2, 3, 4]), "as MRC: .*achine stamp", {}),
    "mrc: unknown mode": (lambda f: mrc(f, mode=101), "as MRC: .*mode", {}),
    "mrc: complex": (lambda f: mrc(f, data=np.zeros((4, 5, 6), "c8")), "complex64 cannot be read", {}),
    "mrc: half bytes": (lambda f: mrc(f, data=VOXELS.astype("i1"), flags=16), "two voxels of 4 bit", {}),
    "mrc: empty axis": (lambda f: mrc(f, ny=0), "without voxels", {}),
    "mrc: stack of volumes": (lambda f: mrc(f, ispg=401, mz=2), "unknown kind of length 3", {}),
    "mrc: stack of nothing": (lambda f: mrc(f, ispg=401, mz=0), "as MRC: .*zero", {}),
    "mrc: huge": (lambda f: mrc(f, nx=2**31 - 1, ny=2**31 - 1, nz=2**31 - 1), "it was cut short", {}),
    "mrc: inner part": (lambda f: mrc(f), "no inner part 'main'", {"inner": "main"}),
    "precomputed: file": (lambda f: file_of(f / "em.precomputed", b"x"), "a file, where .precomputed", {}),
    "precomputed: no info": (lambda f: (f / "a.precomputed").mkdir() or f / "a.precomputed", "as precomputed", {}),
    "precomputed: info cut": (lambda f: cut(precomputed(f) / "info").parent, "as precomputed", {}),
    "precomputed: info a list": (lambda f: file_of(precomputed(f) / "info", b"[]").parent, "names no scales", {}),
    "precomputed: mesh": (lambda f: precomputed(f, scales=None), "names no scales.*mesh", {}),
    "precomputed: scale without key": (lambda f: precomputed(f, {"key": 7}), "has no key", {}),
    "precomputed: no such scale": (lambda f: precomputed(f), "no scale '1'; there are 4_5_30", {"inner": "1"}),
    "precomputed: scale elsewhere": (lambda f: precomputed(f, {"key": "../../em"}), "outside its folder", {}),
    "precomputed: scale absent": (lambda f: without(precomputed(f), "4_5_30"), "'4_5_30' is absent", {}),
    "precomputed: packed chunk cut": (
        lambda f: packed_chunks(precomputed(f), lambda data: data[:-20]),
        r"\.gz cannot be unpacked: it is cut short",
        {},
    ),
    "precomputed: packed bomb": (
        lambda f: packed_chunks(precomputed(f), lambda data: gzip.compress(bytes(1 << 20))),
        r"\.gz cannot be unpacked: it unpacks to more than",
        {},
    ),
    "precomputed: encoding": (lambda f: precomputed(f, {"encoding": "fpzip"}), "encoding 'fpzip' cannot be read", {}),
    "precomputed: type": (lambda f: precomputed(f, data_type="complex64"), "'complex64' cannot be read", {}),
    "precomputed: size": (lambda f: precomputed(f, {"size": [50, 40]}), "as precomputed", {}),
    "precomputed: empty axis": (lambda f: precomputed(f, {"size": [50, 0, 6]}), "without voxels", {}),
    "precomputed: chunk cut": (lambda f: cut_chunk(precomputed(f), "4_5_30/10-60_20-60_3-9"), "em", {}),
    "precomputed: jpeg broken": (lambda f: precomputed(f, {"encoding": "jpeg"}), "cannot read .*em", {}),
    "n5: file": (lambda f: file_of(f / "a.n5", b"x"), "a file, where .n5", {}),
    "n5: no array": (lambda f: (f / "a.n5").mkdir() or f / "a.n5", "no N5 array", {}),
    "n5: several arrays": (lambda f: n5(f, "raw", "seg"), "several arrays.*raw, seg", {}),
    "n5: two sets of levels": (lambda f: n5(f, "c0/s0", "c0/s1", "c1/s0"), "several arrays", {}),
    "n5: no such array": (lambda f: n5(f, "raw"), "no array 'seg'; the folder holds raw", {"inner": "seg"}),
    "n5: inner elsewhere": (lambda f: n5(f, "raw"), "outside the N5 folder", {"inner": "../a.n5/raw"}),
    "n5: attributes cut": (lambda f: cut(n5(f) / "attributes.json").parent, "as N5", {}),
    "n5: attributes a list": (lambda f: file_of(n5(f) / "attributes.json", b"[]").parent, "not a JSON object", {}),
    "n5: dimensions": (lambda f: n5(f, dimensions="large"), "no usable dimensions", {}),
    "n5: five axes": (lambda f: n5(f, dimensions=[1, 1, 2, 3, 4]), "time axis of length 4", {}),
    "n5: empty axis": (lambda f: n5(f, dimensions=[50, 0, 6]), "without voxels", {}),
    "n5: objects": (lambda f: n5(f, dataType="object"), "N5 type 'object' cannot", {}),
    "n5: no compression": (lambda f: n5(f, compression={}), "N5 compression None cannot", {}),
    "n5: compression": (lambda f: n5(f, compression={"type": "magic"}), "N5 compression 'magic' cannot", {}),
    "n5: transform": (
        lambda f: n5(f, transform={"axes": ["z"], "units": ["nm"], "scale": ["a"]}),
        "as N5: could not convert",
        {},
    ),
    "n5: resolution of two": (lambda f: n5(f, resolution=[4, 5]), "as N5", {}),
    "n5: chunk cut": (lambda f: cut_chunk(n5(f), "0/0/0"), "a.n5", {}),
    "npy: wrong magic": (lambda f: file_of(f / "a.npy", b"not numpy" * 9), "as npy", {}),
    "npy: a zip": (lambda f: file_of(f / "a.npy", b"PK\x03\x04" * 9), "as npy", {}),
    "npy: header cut": (lambda f: cut(npy(f, VOXELS), 0.005), "as npy", {}),
    "npy: truncated": (lambda f: cut(npy(f, VOXELS)), "its header promises 12128; it was cut short", {}),
    "npy: objects": (lambda f: npy(f, np.array([[{}, []]], object)), "type object cannot be read", {}),
    "npy: text": (lambda f: npy(f, np.array([["a", "b"]])), "<U1 cannot be read", {}),
    "npy: structured": (lambda f: npy(f, RGB), "cannot be read as", {}),
    "npy: complex": (lambda f: npy(f, np.zeros((2, 3), complex)), "complex128 cannot be read", {}),
    "npy: five axes": (lambda f: npy(f, np.zeros((1, 2, 2, 3, 4))), "has 5 axes", {}),
    "npy: empty axis": (lambda f: npy(f, np.zeros((3, 0, 4))), "without voxels", {}),
    "npy: negative axis": (lambda f: npy(f, VOXELS, shape=(6, -40, -50)), "without voxels", {}),
    "npy: huge": (lambda f: npy(f, VOXELS, shape=(2**62, 2**62, 16)), "it was cut short", {}),
    "npy: a program as header": (
        lambda f: npy(f, VOXELS, shape=(), descr=type("Call", (), {"__repr__": lambda s: "exit()"})()),
        "as npy",
        {},
    ),
    "npy: later version": (
        lambda f: file_of(f / "a.npy", b"\x93NUMPY\x03\x00" + b" " * 200),
        "format 3.0, expected 1.0 or 2.0",
        {},
    ),
    "npy: inner part": (lambda f: npy(f, VOXELS), "no inner part 'main'", {"inner": "main"}),
    "zarr: shard cut": (lambda f: cut_chunk(zarr_of(f, 3, shards=(6, 40, 50)), "c/0/0/0"), "a.zarr", {}),
}


def read_all(uri: str, **options: Any) -> np.ndarray:
    reader = open_volume(uri, **options)
    try:
        return reader.read(Box.of_shape(reader.info.extent))
    finally:
        reader.close()


def test_a_packed_file_larger_than_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nii(tmp_path, "a.nii.gz")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=10))
    with pytest.raises(VolumeError, match=r"unpacked it takes \d+ bytes, but .* has 10 free; set TMPDIR"):
        read_all(str(path))


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_volume_is_named_in_one_error(tmp_path: Path, name: str) -> None:
    make, finding, options = BROKEN[name]
    path = make(tmp_path)
    inner = f"::{options['inner']}" if "inner" in options else ""
    with pytest.raises(VolumeError, match=f"(?s).*{finding}") as caught:
        read_all(f"{path}{inner}", **{k: v for k, v in options.items() if k != "inner"})
    message = str(caught.value)
    assert path.name in message and "\n" not in message
    assert len(message) < 600


def test_schemes_that_are_not_read_are_named() -> None:
    with pytest.raises(VolumeError, match="not s3://"):
        open_volume("s3://bucket/a.zarr")


@pytest.mark.parametrize("change", ["gone", "smaller", "larger"])
def test_a_stack_that_changes_while_open_is_noticed(tmp_path: Path, change: str) -> None:
    reader = open_volume(str(pngs(tmp_path, "1 2")))
    if change == "gone":
        (tmp_path / "2.png").unlink()
    else:
        pngs(tmp_path, "2", (10, 30) if change == "smaller" else (40, 30))
    with pytest.raises(VolumeError, match=r"2\.png"):
        reader.read(Box((0, 0, 0), (2, 20, 30)))
    if change == "gone":
        with pytest.raises(VolumeError, match="cannot examine"):
            _ = reader.identity
    reader.close()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["BOMB"],))


def test_nothing_a_file_brings_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "went off"))
    load = pickle.dumps(Bomb())
    zarr_v2 = zarr_with(tmp_path, 2, dtype="|O", filters=[{"id": "pickle"}], compressor=None)
    for chunk in zarr_v2.glob("[0-9]*"):
        chunk.write_bytes(load)
    pickled = npy(tmp_path, np.array([[Bomb()]], object)).rename(tmp_path / "b.npy")
    names = ("a.h5", "a.tif", "a.npy", "a.nii")
    for path in (zarr_v2, pickled, *(file_of(tmp_path / name, load) for name in names)):
        with pytest.raises(VolumeError):
            read_all(str(path))
    assert not (tmp_path / "went off").exists()
    pickle.loads(load)
    assert (tmp_path / "went off").exists()


AS_NOBODY = """
import json, mmap, os, sys
import h5py, tensorstore, tifffile
import connectomics.volumes.formats.hdf5, connectomics.volumes.formats.images, connectomics.volumes.formats.zarr
from connectomics.core.errors import VolumeError
from connectomics.volumes.opening import open_volume
if os.geteuid() == 0:
    os.setuid(65534)
for uri in sys.argv[1:]:
    try:
        reader = open_volume(uri)
        reader.read(connectomics.volumes.formats.images.Box((0, 0, 0), reader.info.extent))
        print("opened")
    except VolumeError as error:
        print(error)
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may enter, unlike pytest's."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        path.chmod(0o700)
    shutil.rmtree(folder)


def test_what_may_not_be_read_says_permission_denied(open_folder: Path) -> None:
    made = {}
    for state in ("fine", "closed"):
        folder = open_folder / state
        (folder / "stack").mkdir(parents=True)
        h5(folder, main=VOXELS)
        tif(folder)
        pngs(folder / "stack", "1 2")
        zarr_of(folder)
        made[state] = [
            folder / "a.h5",
            folder / "a.tif",
            folder / "stack",
            folder / "a.zarr",
            folder / "stack",
        ]
    for path in made["closed"]:
        path.chmod(0)
    inside = open_folder / "inside"
    inside.mkdir()
    partly = [pngs(inside, "1 2"), zarr_of(inside), zarr_of(open_folder)]
    (inside / "2.png").chmod(0)
    (inside / "a.zarr" / "zarr.json").chmod(0)
    (open_folder / "a.zarr" / "c" / "0" / "0" / "0").chmod(0)
    paths = [*made["fine"], *made["closed"], *partly]
    result = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *map(str, paths)], capture_output=True, text=True, check=False
    )
    lines = result.stdout.splitlines()
    assert len(lines) == len(paths), result.stderr
    assert lines[: len(made["fine"])] == ["opened"] * len(made["fine"])
    for path, line in zip(paths[len(made["fine"]) :], lines[len(made["fine"]) :], strict=True):
        assert str(path) in line and "permission denied" in line.lower()


VALID: dict[str, Callable[[Path], Path]] = {
    "hdf5": lambda f: h5(f, main=VOXELS),
    "tiff": tif,
    "tiff tiles": lambda f: tif(f, tile=(16, 16), compression="lzw"),
    "tiff imagej": lambda f: tif(f, imagej=True, metadata={"axes": "ZYX"}),
    "png": lambda f: pngs(f, "a") / "a.png",
    "zarr": lambda f: zarr_of(f, 3, shards=(6, 40, 50)),
    "nifti": nii,
    "nifti packed": lambda f: nii(f, "a.nii.gz", scl_slope=0.5),
    "mrc": mrc,
    "npy": lambda f: npy(f, VOXELS),
    "precomputed": precomputed,
    "n5": n5,
}
INSIDE = {
    "zarr": ["zarr.json", "c/0/0/0"],
    "precomputed": ["info", "4_5_30/10-60_20-60_3-9"],
    "n5": ["attributes.json", "0/0/0"],
}


@pytest.mark.parametrize("kind", list(VALID))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_a_volume_error_or_harmless(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    path = VALID[kind](tmp_path)
    file = path / data.draw(st.sampled_from(INSIDE[kind])) if kind in INSIDE else path
    content = bytearray(file.read_bytes())
    near = st.integers(0, min(400, len(content) - 1))
    for place in data.draw(st.lists(near | st.integers(0, len(content) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(1, len(content)))])
    try:
        read_all(str(path))
    except VolumeError as error:
        assert path.name in str(error)
