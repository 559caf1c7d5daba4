"""Volumes as the libraries of other programs write them, for the readers' contract: by name, what writes one."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudvolume
import h5py
import hdf5plugin
import mrcfile
import numcodecs
import numpy as np
import SimpleITK
import wkw
import zarr

from connectomics.testing.volume_reader import WrittenVolume as Written

RNG = np.random.default_rng(21)
ZYX = (5, 37, 29)
SIZE = (30.0, 5.0, 4.0)


def voxels(dtype: str = "uint16", shape: tuple[int, ...] = ZYX) -> np.ndarray:
    return RNG.integers(0, 200, shape).astype(dtype)


def itk(name: str, dtype: str = "uint16", *, channels: int = 1, packed: bool = False) -> Callable[[Path], Written]:
    """By SimpleITK."""

    def write(folder: Path) -> Written:
        data = voxels(dtype, (*ZYX, channels))
        image = SimpleITK.GetImageFromArray(data if channels > 1 else data[..., 0], isVector=channels > 1)
        image.SetSpacing((4, 5, 30))
        SimpleITK.WriteImage(image, str(folder / name), useCompression=packed)
        return Written(str(folder / name), data.transpose(3, 0, 1, 2))

    return write


def nrrd(**header: Any) -> Callable[[Path], Written]:
    """By pynrrd's rules, written out: the fastest axis first."""

    def write(folder: Path) -> Written:
        data = voxels("int16")
        fields = {"type": "short", "dimension": 3, "sizes": "29 37 5", "endian": "big", **header}
        text = "NRRD0005\n# comment\n" + "".join(f"{key}: {value}\n" for key, value in fields.items()) + "\n"
        stored = data.astype(">i2").tobytes()
        if header["encoding"] == "ascii":
            stored = " ".join(map(str, data.ravel())).encode()
        (folder / "a.nrrd").write_bytes(text.encode() + stored)
        return Written(str(folder / "a.nrrd"), data[None], voxel_size_nm=SIZE if "space units" in header else None)

    return write


MICRONS = {
    "encoding": "raw",
    "space dimension": 3,
    "space directions": "(0.004,0,0) (0,0.005,0) (0,0,0.03)",
    "space units": '"microns" "microns" "microns"',
}


def hdf5_packed(**options: Any) -> Callable[[Path], Written]:
    """By a plugin of hdf5plugin."""

    def write(folder: Path) -> Written:
        data = voxels()
        with h5py.File(folder / "a.h5", "w") as file:
            file.create_dataset("main", data=data, chunks=(2, 16, 16), **options)
        return Written(str(folder / "a.h5"), data[None])

    return write


def zarr_coded(version: int, **options: Any) -> Callable[[Path], Written]:
    """By zarr-python with filters and codecs of numcodecs."""

    def write(folder: Path) -> Written:
        data = voxels()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about codecs outside the specification
            array = zarr.create_array(
                folder / "a.zarr", shape=ZYX, dtype="uint16", chunks=(2, 16, 16), zarr_format=version, **options
            )
            array[:] = data
        return Written(str(folder / "a.zarr"), data[None])

    return write


def zarr_of_java(version: int) -> Callable[[Path], Written]:
    """With what n5-zarr writes: gzip of level -1, in version 2 also a fill value in quotes."""

    def write(folder: Path) -> Written:
        data = voxels()
        packing: Any = numcodecs.GZip(5) if version == 2 else zarr.codecs.GzipCodec(level=5)
        zarr.create_array(folder / "a.zarr", data=data, chunks=(2, 16, 16), zarr_format=version, compressors=packing)
        path = folder / "a.zarr" / (".zarray" if version == 2 else "zarr.json")
        stated = json.loads(path.read_text())
        if version == 2:
            stated["compressor"]["level"], stated["fill_value"] = -1, "0"
        else:
            stated["codecs"][-1]["configuration"]["level"] = -1
        path.write_text(json.dumps(stated))
        return Written(str(folder / "a.zarr"), data[None])

    return write


def zarr_zipped(version: int, name: str = "a.zarr.zip", inner: str = "") -> Callable[[Path], Written]:
    """By zarr-python's own store of zip files."""

    def write(folder: Path) -> Written:
        data = voxels()
        with zarr.storage.ZipStore(folder / name, mode="w") as store:
            zarr.create_array(store, name="raw", data=data, chunks=(2, 16, 16), zarr_format=version)
        return Written(f"{folder / name}{inner}", data[None])

    return write


def bioformats2raw(folder: Path) -> Written:
    """The root of a conversion, whose only image is the group ``0``."""
    data = voxels("uint8")
    root = zarr.open_group(folder / "a.zarr", mode="w", zarr_format=2, attributes={"bioformats2raw.layout": 3})
    root.create_group("OME", attributes={"series": ["0"]})
    axes = [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    scale = [{"type": "scale", "scale": list(SIZE)}]
    entry = {"version": "0.4", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
    root.create_group("0", attributes={"multiscales": [entry]}).create_array("0", data=data, chunks=(2, 16, 16))
    return Written(str(folder / "a.zarr"), data[None], voxel_size_nm=SIZE)


def cloud(compress: str, encoding: str = "raw") -> Callable[[Path], Written]:
    """By CloudVolume, which packs each chunk into a file ``.gz`` or ``.br``."""

    def write(folder: Path) -> Written:
        data = voxels("uint16" if encoding == "raw" else "uint64", ZYX[::-1])
        place = f"file://{folder / 'em'}"
        info = cloudvolume.CloudVolume.create_new_info(
            1,
            "image" if encoding == "raw" else "segmentation",
            str(data.dtype),
            encoding,
            resolution=(4, 5, 30),
            voxel_offset=(10, 20, 3),
            volume_size=data.shape,
            chunk_size=(16, 16, 4),
        )
        volume = cloudvolume.CloudVolume(place, info=info, compress=compress, progress=False)
        volume.commit_info()
        volume[:] = data[..., None]
        return Written(str(folder / "em"), data.T[None], {}, SIZE, (90.0, 100.0, 40.0))

    return write


def webknossos(folder: Path, block_type: int = wkw.Header.BLOCK_TYPE_LZ4) -> Written:
    """By the package wkw, with the properties that WEBKNOSSOS keeps beside; the box begins within a file."""
    data = voxels("uint16", (2, *ZYX[::-1]))
    place = folder / "em" / "color" / "2-2-1"
    place.parent.mkdir(parents=True)
    header = wkw.Header(np.uint16, num_channels=2, block_type=block_type, block_len=8, file_len=8)
    with wkw.Dataset.create(str(place), header) as dataset:
        padded = np.zeros((2, 64, 64, 64), "uint16")
        padded[:, 7:36, 3:40, 2:7] = data
        dataset.write((0, 0, 0), padded)
    box = {"topLeft": [14, 6, 2], "width": 58, "height": 74, "depth": 5}
    layer = {"name": "color", "boundingBox": box}
    properties = {"dataLayers": [layer], "scale": {"factor": [2, 2.5, 30], "unit": "nanometer"}}
    (folder / "em" / "datasource-properties.json").write_text(json.dumps(properties))
    return Written(str(place), data.transpose(0, 3, 2, 1), {}, SIZE, (60.0, 15.0, 28.0))


def imaris(folder: Path) -> Written:
    """The layout of ImarisWriter: attributes letter by letter, arrays padded to whole chunks."""
    data = voxels("uint8", (2, *ZYX))

    def letters(value: object) -> np.ndarray:
        return np.array([bytes([byte]) for byte in str(value).encode()], "S1")

    with h5py.File(folder / "a.ims", "w") as file:
        image = file.create_group("DataSetInfo/Image")
        edges = {"ExtMin": (1, 2, 3), "ExtMax": (1 + 29 * 0.004, 2 + 37 * 0.005, 3 + 5 * 0.03)}
        for key, values in edges.items():
            for i, value in enumerate(values):
                image.attrs[f"{key}{i}"] = letters(value)
        image.attrs["Unit"] = letters("um")
        for c in range(2):
            channel = file.create_group(f"DataSet/ResolutionLevel 0/TimePoint 0/Channel {c}")
            for axis, n in zip("ZYX", ZYX, strict=True):
                channel.attrs[f"ImageSize{axis}"] = letters(n)
            padded = np.zeros((8, 48, 32), "uint8")
            padded[:5, :37, :29] = data[c]
            channel.create_dataset("Data", data=padded, chunks=(8, 16, 16), compression="gzip")
    return Written(str(folder / "a.ims"), data, voxel_size_nm=SIZE)


def dm3_bytes(data: np.ndarray, sizes: tuple[float, ...] = (4.0, 5.0, 30.0), unit: str = "nm") -> bytes:
    """A DM3 file of one image: tags, big endian but for values; data types by Gatan's numbers."""

    def tag(name: str, kind: bytes, content: bytes) -> bytes:
        return kind + struct.pack(">H", len(name)) + name.encode() + content

    def group(name: str, entries: list[bytes]) -> bytes:
        return tag(name, b"\x14", b"\1\0" + struct.pack(">I", len(entries)) + b"".join(entries))

    def number(name: str, value: float, form: str = "i", kind: int = 3) -> bytes:
        return tag(name, b"\x15", b"%%%%" + struct.pack(">II", 1, kind) + struct.pack(f"<{form}", value))

    def array(name: str, values: bytes, kind: int, count: int) -> bytes:
        return tag(name, b"\x15", b"%%%%" + struct.pack(">IIII", 3, 20, kind, count) + values)

    encoded = unit.encode("utf-16-le")
    axes = [
        group("", [number("Origin", 0, "f", 6), number("Scale", s, "f", 6), array("Units", encoded, 4, len(unit))])
        for s in sizes
    ]
    codes = {"uint8": (6, 8), "int16": (1, 2), "uint16": (10, 4), "float32": (2, 6)}
    code, kind = codes[str(data.dtype)]
    image = [
        group("Calibrations", [group("Dimension", axes)]),
        array("Data", data.tobytes(), kind, data.size),
        number("DataType", code, "I", 5),
        group("Dimensions", [number("", n, "I", 5) for n in data.shape[::-1]]),
        number("PixelDepth", data.dtype.itemsize, "I", 5),
    ]
    body = group("ImageList", [group("", [group("ImageData", image), group("ImageTags", [])])])
    root = b"\1\0" + struct.pack(">I", 1) + body
    return struct.pack(">III", 3, len(root), 1) + root + bytes(8)


def dm3(folder: Path) -> Written:
    data = voxels("int16")
    (folder / "a.dm3").write_bytes(dm3_bytes(data))
    return Written(str(folder / "a.dm3"), data[None], voxel_size_nm=SIZE)


def mrc_without_map(order: str, name: str) -> Callable[[Path], Written]:
    """Without the word MAP and the machine stamp, as IMOD wrote before 2000."""

    def write(folder: Path) -> Written:
        data = voxels("int16").astype(f"{order}i2")
        with mrcfile.new(folder / name, data) as file:
            file.voxel_size = (40, 50, 300)
        content = bytearray((folder / name).read_bytes())
        content[208:216] = bytes(8)
        (folder / name).write_bytes(content)
        return Written(str(folder / name), data[None], voxel_size_nm=SIZE)

    return write


def nameless(writer: Callable[[Path], Written]) -> Callable[[Path], Written]:
    """The file of another case under a name without a suffix: its first bytes tell what it is."""

    def write(folder: Path) -> Written:
        written = writer(folder)
        Path(written.uri).rename(folder / "scan")
        return Written(str(folder / "scan"), written.expected, written.options, written.voxel_size_nm)

    return write


EXCHANGED: dict[str, Callable[[Path], Written]] = {
    "mha": itk("a.mha"),
    "mha packed": itk("a.mha", "float32", packed=True),
    "mha channels": itk("a.mha", "uint8", channels=3),
    "mhd": itk("a.mhd", "int16"),
    "nrrd of itk, packed": itk("a.nrrd", "float64", packed=True),
    "nrrd of itk, channels": itk("a.nrrd", "uint8", channels=3),
    "nhdr": itk("a.nhdr", "int32"),
    "nrrd in microns": nrrd(**MICRONS),
    "nrrd as text": nrrd(encoding="ascii"),
    "gipl": itk("a.gipl", "int16"),
    "gipl packed": itk("a.gipl.gz", "uint8"),
    "hdf5 blosc": hdf5_packed(**hdf5plugin.Blosc()),
    "hdf5 zstd": hdf5_packed(**hdf5plugin.Zstd()),
    "hdf5 lz4": hdf5_packed(**hdf5plugin.LZ4()),
    "hdf5 bitshuffle": hdf5_packed(**hdf5plugin.Bitshuffle()),
    "zarr v2 delta": zarr_coded(2, filters=[numcodecs.Delta("u2")]),
    "zarr v2 lz4": zarr_coded(2, compressors=numcodecs.LZ4()),
    "zarr v3 delta": zarr_coded(3, filters=[{"name": "numcodecs.delta", "configuration": {"dtype": "<u2"}}]),
    "zarr v2 of java": zarr_of_java(2),
    "zarr v3 of java": zarr_of_java(3),
    "zarr v2 zipped": zarr_zipped(2),
    "zarr v3 zipped array": zarr_zipped(3, "a.zip", "::raw"),
    "zarr of bioformats2raw": bioformats2raw,
    "precomputed gzip": cloud("gzip"),
    "precomputed brotli": cloud("br"),
    "precomputed labels gzip": cloud("gzip", "compressed_segmentation"),
    "wkw": webknossos,
    "imaris": imaris,
    "dm3": dm3,
    "mrc without map": mrc_without_map("<", "a.st"),
    "mrc without map, big endian": mrc_without_map(">", "a.mrcs"),
    "no suffix, dm3": nameless(dm3),
    "no suffix, mha": nameless(itk("a.mha")),
    "no suffix, hdf5": nameless(hdf5_packed(**hdf5plugin.Zstd())),
    "no suffix, zarr.zip": nameless(zarr_zipped(3)),
}
