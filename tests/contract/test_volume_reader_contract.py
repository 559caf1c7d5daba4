"""Every reader runs through the suite that is shipped; other libraries wrote the arrays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import nibabel
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from connectomics.core.geometry import AxisOrder, Box
from connectomics.testing.volume_reader import VolumeReaderContract
from connectomics.testing.volume_reader import WrittenVolume as Written
from connectomics.volumes.in_memory import ArrayVolume
from connectomics.volumes.opening import open_channels
from connectomics.volumes.reoriented import Orientation, ReorientedVolume
from connectomics.volumes.store import create_store
from connectomics.volumes.volume import VolumeInfo, VolumeReader

from chunk_writers import write_n5, write_precomputed
from exchanged_volumes import EXCHANGED

RNG = np.random.default_rng(20)
ZYX = (5, 37, 29)


def voxels(shape: tuple[int, ...], dtype: str = "uint8") -> np.ndarray:
    kind = np.dtype(dtype).kind
    if kind == "f":
        return RNG.normal(size=shape).astype(dtype)
    if kind == "b":
        return RNG.integers(0, 2, shape).astype(bool)
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max, shape, dtype=np.dtype(dtype).newbyteorder("="), endpoint=True).astype(
        dtype
    )


def hdf5(shape: tuple[int, ...], dtype: str, **options: Any) -> Callable[[Path], Written]:
    def write(folder: Path) -> Written:
        data = voxels(shape, dtype)
        with h5py.File(folder / "a.h5", "w") as file:
            file.create_dataset("main", data=data, **options)
        return Written(str(folder / "a.h5"), data.reshape((1,) * (4 - data.ndim) + data.shape))

    return write


def hdf5_named(folder: Path) -> Written:
    data = voxels((29, 37, 5, 2), "int16")
    with h5py.File(folder / "a.hdf5", "w") as file:
        file.create_dataset("deep/raw", data=data, chunks=(8, 8, 5, 1))
        file["other"] = np.zeros(3)
        file["deep/raw"].attrs["resolution"] = (30.0, 4.0, 4.5)
    return Written(f"{folder / 'a.hdf5'}::deep/raw", data.transpose(3, 2, 1, 0), {"axes": "xyzc"}, (30.0, 4.0, 4.5))


def hdf5_only_one(folder: Path) -> Written:
    data = voxels(ZYX)
    with h5py.File(folder / "a.he5", "w") as file:
        file["volumes/raw"] = data
        file.attrs["element_size_um"] = (0.03, 0.004, 0.005)
    return Written(str(folder / "a.he5"), data[None], voxel_size_nm=(30.0, 4.0, 5.0))


def tiff(shape: tuple[int, ...], dtype: str = "uint8", **options: Any) -> Callable[[Path], Written]:
    def write(folder: Path) -> Written:
        data = voxels(shape, dtype)
        tifffile.imwrite(folder / "a.tif", data, photometric="minisblack", **options)
        return Written(str(folder / "a.tif"), data.reshape((1,) * (4 - data.ndim) + data.shape))

    return write


def tiff_page_by_page(folder: Path) -> Written:
    data = voxels(ZYX, "uint16")
    with tifffile.TiffWriter(folder / "a.tiff", byteorder=">") as writer:
        for page in data:
            writer.write(page, metadata=None, rowsperstrip=7, contiguous=False)
    return Written(str(folder / "a.tiff"), data[None])


def tiff_strips_apart(folder: Path) -> Written:
    data = voxels(ZYX, "uint16")
    with tifffile.TiffWriter(folder / "a.tiff") as writer:
        for page in data:
            writer.write(page, metadata=None, rowsperstrip=10, compression="deflate", predictor=True)
    return Written(str(folder / "a.tiff"), data[None])


def tiff_imagej(folder: Path) -> Written:
    data = voxels((5, 2, 37, 29), "uint16")
    tifffile.imwrite(
        folder / "a.tif",
        data,
        imagej=True,
        resolution=(1 / 0.004, 1 / 0.005),
        metadata={"axes": "ZCYX", "spacing": 0.03, "unit": "um"},
    )
    return Written(str(folder / "a.tif"), data.transpose(1, 0, 2, 3), voxel_size_nm=(30.0, 5.0, 4.0))


def tiff_imagej_over_4gb(options: dict[str, Any]) -> Callable[[Path], Written]:
    """The layout of ImageJ's stacks over 4 GB: one page, and all planes behind it."""

    def write(folder: Path) -> Written:
        data = voxels((5, 2, 37, 29), "uint16")
        tifffile.imwrite(folder / "a.tif", data, truncate=True, metadata={"axes": "ZCYX"}, **options)
        return Written(str(folder / "a.tif"), data.transpose(1, 0, 2, 3))

    return write


def tiff_imagej_frames(folder: Path) -> Written:
    data = voxels(ZYX)
    tifffile.imwrite(folder / "a.tif", data, imagej=True, metadata={"axes": "TYX"})
    return Written(str(folder / "a.tif"), data[None], {"axes": "zyx"})


def tiff_ome_pyramid(folder: Path) -> Written:
    data = voxels((3, 2, 64, 80), "uint16")
    with tifffile.TiffWriter(folder / "a.ome.tif", bigtiff=True) as writer:
        sizes = {
            "PhysicalSizeX": 4,
            "PhysicalSizeXUnit": "nm",
            "PhysicalSizeY": 0.005,
            "PhysicalSizeYUnit": "µm",
        }
        metadata = {"axes": "ZCYX", "PhysicalSizeZ": 3e-5, "PhysicalSizeZUnit": "mm", **sizes}
        writer.write(data, subifds=1, metadata=metadata, tile=(16, 32), compression="zstd", photometric="minisblack")
        writer.write(data[..., ::2, ::2], subfiletype=1, tile=(16, 16), compression="zstd", photometric="minisblack")
    return Written(str(folder / "a.ome.tif"), data.transpose(1, 0, 2, 3), voxel_size_nm=(30.0, 5.0, 4.0))


def tiff_rgb(planar: str) -> Callable[[Path], Written]:
    def write(folder: Path) -> Written:
        data = voxels((5, 3, 37, 29))
        pages = data if planar == "separate" else data.transpose(0, 2, 3, 1)
        options = {"photometric": "rgb", "planarconfig": planar, "compression": "lzw", "tile": (16, 16)}
        tifffile.imwrite(folder / "a.tif", pages, **options)
        return Written(str(folder / "a.tif"), data.transpose(1, 0, 2, 3))

    return write


def tiff_jpeg(folder: Path) -> Written:
    data = voxels((2, 64, 48))
    tifffile.imwrite(folder / "a.tif", data, compression="jpeg", tile=(16, 16), photometric="minisblack")
    return Written(str(folder / "a.tif"), tifffile.imread(folder / "a.tif")[None])


def tiff_series(folder: Path) -> Written:
    first, second = voxels((4, 8, 9)), voxels(ZYX, "float32")
    with tifffile.TiffWriter(folder / "a.tif") as writer:
        writer.write(first, photometric="minisblack")
        writer.write(second, photometric="minisblack")
    return Written(f"{folder / 'a.tif'}::1", second[None])


def tiff_volumetric_tiles(folder: Path) -> Written:
    data = voxels((20, 37, 29), "uint16")
    tifffile.imwrite(folder / "a.tif", data, volumetric=True, tile=(16, 16, 16), photometric="minisblack")
    return Written(str(folder / "a.tif"), data[None])


def tiff_sparse_tiles(folder: Path) -> Written:
    data = voxels((1, 32, 48))
    data[0, 16:, 16:32] = 0
    tiles = [data[0, y : y + 16, x : x + 16] for y in (0, 16) for x in (0, 16, 32)]
    stored = (tile if tile.any() else None for tile in tiles)
    tifffile.imwrite(folder / "a.tif", stored, shape=(32, 48), dtype="u1", tile=(16, 16), photometric="minisblack")
    return Written(str(folder / "a.tif"), data[None])


def stack(suffix: str, dtype: str = "uint8", sections: int = 12) -> Callable[[Path], Written]:
    def write(folder: Path) -> Written:
        data = voxels((sections, 37, 29), dtype)
        for z, section in enumerate(data):
            if suffix in (".tif", ".tiff"):
                tifffile.imwrite(folder / f"section {z}{suffix}", section, compression="zlib")
            else:
                Image.fromarray(section).save(folder / f"section {z}{suffix}")
        (folder / "notes.txt").write_text("not an image")
        (folder / ".hidden.png").write_text("not an image either")
        read = [np.asarray(Image.open(folder / f"section {z}{suffix}")) for z in range(sections)]
        return Written(str(folder), (np.stack(read) if suffix == ".jpg" else data)[None])

    return write


def stack_of_channels(folder: Path) -> Written:
    data = voxels((2, 3, 37, 29))
    for c, z in np.ndindex(2, 3):
        Image.fromarray(data[c, z]).save(folder / f"s{z + 8}_{c:04}.png")
    return Written(str(folder), data)


def stack_of_colours(folder: Path) -> Written:
    data = voxels((3, 4, 37, 29))
    for z in range(4):
        Image.fromarray(np.ascontiguousarray(data[:, z].transpose(1, 2, 0))).save(folder / f"{z}.png")
    return Written(str(folder), data)


def stack_stated_as_channels(folder: Path) -> Written:
    data = voxels((6, 37, 29))
    for c in range(6):
        Image.fromarray(data[c]).save(folder / f"s_{c:04}.png")
    return Written(str(folder), data[:, None].transpose(0, 1, 3, 2), {"axes": "cxy"})


def stack_numbered_like_channels(folder: Path) -> Written:
    data = voxels((6, 37, 29))
    for z in range(6):
        Image.fromarray(data[z]).save(folder / f"s_{z:04}.png")
    return Written(str(folder), data[None])


def image(folder: Path) -> Written:
    data = voxels((37, 29), "uint16")
    Image.fromarray(data).save(folder / "one_0000.png")
    Image.fromarray(data + 1).save(folder / "one_0001.png")
    options = {"axes": "xy", "voxel_size_nm": (30.0, 5.0, 4.0)}
    return Written(str(folder / "one_0000.png"), data.T[None, None], options, (30.0, 5.0, 4.0))


def zarr_array(version: int, dtype: str = "uint8", **options: Any) -> Callable[[Path], Written]:
    def write(folder: Path) -> Written:
        data = voxels(ZYX, dtype)
        path = folder / "a.zarr"
        array = zarr.create_array(path, shape=ZYX, dtype=data.dtype, chunks=(2, 16, 16), zarr_format=version, **options)
        array[:] = data
        return Written(str(path), data[None])

    return write


def zarr_missing_chunks(folder: Path) -> Written:
    array = zarr.create_array(
        folder / "a.zarr",
        shape=ZYX,
        dtype="int32",
        chunks=(2, 16, 16),
        fill_value=-7,
        zarr_format=3,
        dimension_names=[*"zyx"],
    )
    array[:2, :16, :16] = 3
    return Written(str(folder / "a.zarr"), np.asarray(array[:])[None])


def zarr_in_group(folder: Path) -> Written:
    data = voxels((29, 37, 5))
    group = zarr.open_group(folder / "plain", mode="w", zarr_format=2)
    group.create_group("volumes").create_array("raw", data=data, chunks=(8, 8, 5))
    return Written(str(folder / "plain"), data.transpose(2, 1, 0)[None], {"axes": "xyz"})


def ome(version: str, inner: str = "") -> Callable[[Path], Written]:
    def write(folder: Path) -> Written:
        data = voxels((1, 2, *ZYX), "uint16")
        levels = [data, data[..., ::2, ::2]]
        axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
        axes += [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"]
        datasets = []
        for i in range(len(levels)):
            scale = [1, 1, 0.015, 0.004 * 2**i, 0.005 * 2**i]
            shift = [0, 0, 0.5, 0.002 * i, 0.0025 * i]
            steps = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": shift}]
            datasets.append({"path": f"s{i}", "coordinateTransformations": steps})
        whole = [{"type": "scale", "scale": [1, 1, 2, 1, 1]}]
        multiscales = [{"axes": axes, "datasets": datasets, "coordinateTransformations": whole}]
        attributes = {"multiscales": [{"version": version, **multiscales[0]}]}
        if version == "0.5":
            attributes = {"ome": {"version": version, "multiscales": multiscales}}
        zarr_format = 3 if version == "0.5" else 2
        group = zarr.open_group(folder / "a.zarr", mode="w", zarr_format=zarr_format, attributes=attributes)
        for i, level in enumerate(levels):
            group.create_array(f"s{i}", data=level, chunks=(1, 1, 2, 16, 16))
        level = 1 if inner else 0
        size = (30.0, 4.0 * 2**level, 5.0 * 2**level)
        return Written(f"{folder / 'a.zarr'}{inner}", levels[level][0], {}, size, (1000.0, 2.0 * level, 2.5 * level))

    return write


def our_store(folder: Path) -> Written:
    data = voxels((2, *ZYX), "float32")
    info = VolumeInfo((2, *ZYX), np.dtype("float32"), (2, 8, 8), (30.0, 4.0, 5.0), (0.0, 8.0, 0.0))
    store = create_store(folder / "a.zarr", info, shard_shape=(6, 48, 32), attributes={})
    store.write(Box.of_shape(ZYX), data)
    store.close()
    return Written(str(folder / "a.zarr"), data, {}, (30.0, 4.0, 5.0), (0.0, 8.0, 0.0))


def nifti_turned() -> Callable[[Path], Written]:
    """Axes turned to right, front and up by nibabel itself."""

    def write(folder: Path) -> Written:
        affine = np.array([[0, -4.0, 0, 5], [0, 0, 30.0, 1], [-5.0, 0, 0, 0], [0, 0, 0, 1.0]])
        image = nibabel.Nifti1Image(voxels(ZYX), affine)
        image.header.set_xyzt_units("micron")
        nibabel.save(image, folder / "a.nii")
        canonical = np.asarray(nibabel.as_closest_canonical(image).dataobj)
        return Written(f"{folder / 'a.nii'}::ras", canonical.T[None], voxel_size_nm=(5e3, 30e3, 4e3))

    return write


def nifti(
    shape: tuple[int, ...],
    dtype: str = "uint8",
    *,
    name: str = "a.nii",
    kind: Any = nibabel.Nifti1Image,
    scale: tuple[float, float] | None = None,
) -> Callable[[Path], Written]:
    def write(folder: Path) -> Written:
        data = voxels(shape, dtype)
        image = kind(data, np.diag([4.0, 5.0, 30.0, 1.0]), dtype=data.dtype)
        image.header.set_xyzt_units("micron")
        expected = data
        if scale is not None:
            image.header.set_data_dtype(dtype)
            image.header.set_slope_inter(*scale)
            nibabel.save(image, folder / name)
            expected = np.asarray(nibabel.load(folder / name).get_fdata(), np.float32)
        else:
            nibabel.save(image, folder / name)
        arranged = expected.T.reshape((1,) * (4 - data.ndim) + data.shape[::-1])
        return Written(str(folder / name), arranged, voxel_size_nm=(30e3, 5e3, 4e3) if data.ndim > 2 else None)

    return write


def npy(shape: tuple[int, ...], dtype: str = "uint8", order: Any = "C", **options: Any) -> Callable[[Path], Written]:
    def write(folder: Path) -> Written:
        data = voxels(shape, dtype)
        np.save(folder / "a.npy", np.asarray(data, order=order))
        expected = data.transpose(2, 1, 0) if "axes" in options else data
        return Written(str(folder / "a.npy"), expected.reshape((1,) * (4 - data.ndim) + expected.shape), options)

    return write


def mrc(dtype: str, name: str = "a.mrc", shape: tuple[int, ...] = ZYX, **fields: int) -> Callable[[Path], Written]:
    def write(folder: Path) -> Written:
        data = voxels(shape, dtype)
        with mrcfile.new(folder / name, data) as file:
            file.voxel_size = (40, 50, 300)
            for field, value in fields.items():
                file.header[field] = value
            file.set_extended_header(np.zeros(96, "V1"))
        arranged = data.reshape((1,) * (4 - data.ndim) + data.shape)
        return Written(str(folder / name), arranged, voxel_size_nm=(30.0, 5.0, 4.0))

    return write


def mrc_turned(folder: Path) -> Written:
    data = voxels((29, 5, 37), "float32")
    with mrcfile.new(folder / "a.map", data) as file:
        file.header.maps, file.header.mapr, file.header.mapc = 1, 3, 2
        file.header.mx, file.header.my, file.header.mz = 29, 37, 5
        file.header.cella = (29 * 40, 37 * 50, 5 * 300)
    return Written(str(folder / "a.map"), data.transpose(1, 2, 0)[None], voxel_size_nm=(30.0, 5.0, 4.0))


def mrc_of_imod(flags: int) -> Callable[[Path], Written]:
    def write(folder: Path) -> Written:
        data = voxels(ZYX, "int8")
        with mrcfile.new(folder / "a.rec", data) as file:
            extra = bytearray(84)
            extra[40:48] = np.array([1146047817, flags], "<i4").tobytes()
            file.header.extra2 = bytes(extra)
        expected = data if flags & 1 else data.view("uint8")
        return Written(str(folder / "a.rec"), expected[None])

    return write


def precomputed(dtype: str, channels: int = 1, inner: str = "", name: str = "em") -> Callable[[Path], Written]:
    def write(folder: Path) -> Written:
        data = voxels((29, 37, 5, channels), dtype)
        levels = {"4_5_30": data, "8_10_30": data[::2, ::2]}
        write_precomputed(folder / name, levels)
        size, origin = ((30.0, 10.0, 8.0), (90.0, 200.0, 80.0)) if inner else ((30.0, 5.0, 4.0), (90.0, 100.0, 40.0))
        expected = levels["8_10_30" if inner else "4_5_30"].T
        return Written(f"{folder / name}{inner}", expected, {}, size, origin)

    return write


def precomputed_labels(folder: Path) -> Written:
    labels = RNG.integers(0, 2**63, (4, 5, 5, 1), dtype=np.uint64)
    data = labels.repeat(8, 0).repeat(8, 1)[:29, :37]
    path = write_precomputed(folder / "seg", {"4_5_30": data}, encoding="compressed_segmentation", chunk=(16, 16, 1))
    return Written(str(path), data.T, {}, (30.0, 5.0, 4.0), (90.0, 100.0, 40.0))


def precomputed_jpeg(folder: Path) -> Written:
    data = voxels((16, 32, 4, 1))
    path = write_precomputed(
        folder / "em", {"4_5_30": data}, encoding="jpeg", chunk=(16, 16, 4), voxel_offset=(0, 0, 0)
    )
    pages = [np.asarray(Image.open(path / "4_5_30" / f"0-16_{y}-{y + 16}_0-4")) for y in (0, 16)]
    expected = np.concatenate([page.reshape(4, 16, 16) for page in pages], axis=1)
    return Written(str(path), expected[None], {}, (30.0, 5.0, 4.0))


def n5(dtype: str, compression: str = "gzip", inner: str = "", channels: int = 0, **more: Any) -> Any:
    def write(folder: Path) -> Written:
        data = voxels((29, 37, 5, channels)[: 4 if channels else 3], dtype)
        block = (16, 16, 2, 1)[: data.ndim]
        write_n5(folder / "a.n5" / inner.removeprefix("::"), data, block=block, packing=compression, **more)
        size = (30.0, 5.0, 4.0) if more else None
        return Written(f"{folder / 'a.n5'}{inner}", data.T.reshape((1,) * (4 - data.ndim) + data.T.shape), {}, size)

    return write


def n5_levels(folder: Path) -> Written:
    data = voxels((29, 37, 5), "uint8")
    for level in range(3):
        write_n5(folder / f"em/c0/s{level}", data[:: 2**level], block=(16, 16, 2))
    (folder / "em/attributes.json").write_text('{"n5": "2.5.1"}')
    unit = {"dimensions": [0.004, 0.005, 0.03], "unit": "µm"}
    (folder / "em/c0/attributes.json").write_text(json.dumps({"pixelResolution": unit}))
    return Written(f"{folder / 'em'}", data.T[None], {}, (30.0, 5.0, 4.0))


def n5_section(folder: Path) -> Written:
    data = voxels((29, 37), "uint16")
    return Written(str(write_n5(folder / "a.n5", data, block=(16, 16), packing="raw")), data.T[None, None])


RESOLUTION = {"resolution": [4, 5, 30]}


def n5_as_others_write(change: Callable[[dict[str, Any]], object], packing: str = "gzip") -> Any:
    """Attributes with members that n5-blosc, n5-zstandard and N5 before 2.0 write."""

    def write(folder: Path) -> Written:
        data = voxels((29, 37, 5), "uint16")
        path = write_n5(folder / "a.n5", data, block=(16, 16, 2), packing=packing)
        attributes = json.loads((path / "attributes.json").read_text())
        change(attributes)
        (path / "attributes.json").write_text(json.dumps(attributes))
        return Written(str(path), data.T[None])

    return write


def n5_old(attributes: dict[str, Any]) -> None:
    attributes["compressionType"] = attributes.pop("compression")["type"]


CASES: dict[str, Callable[[Path], Written]] = {
    "hdf5 3d chunked": hdf5(ZYX, "uint8", chunks=(2, 16, 16), compression="gzip"),
    "hdf5 2d": hdf5((37, 29), "uint8"),
    "hdf5 4d big endian": hdf5((2, *ZYX), ">u2"),
    "hdf5 bool": hdf5(ZYX, "bool"),
    "hdf5 float16": hdf5(ZYX, "float16", chunks=True, compression="lzf", shuffle=True),
    "hdf5 uint64": hdf5(ZYX, "uint64"),
    "hdf5 named xyzc": hdf5_named,
    "hdf5 only dataset": hdf5_only_one,
    "tiff contiguous": tiff(ZYX),
    "tiff big endian": tiff(ZYX, "uint16", byteorder=">"),
    "tiff bigtiff float": tiff(ZYX, "float32", bigtiff=True),
    "tiff tiled": tiff(ZYX, tile=(16, 16)),
    "tiff tiled lzw predictor": tiff(ZYX, "uint16", tile=(16, 16), compression="lzw", predictor=True),
    "tiff zlib strips": tiff(ZYX, "int16", rowsperstrip=8, compression="zlib"),
    "tiff packbits one strip": tiff(ZYX, compression="packbits", rowsperstrip=37),
    "tiff bilevel": tiff(ZYX, "bool"),
    "tiff 2d": tiff((37, 29), "uint32"),
    "tiff one section": tiff((1, 37, 29), "float64"),
    "tiff one row": tiff((5, 1, 29)),
    "tiff pages apart": tiff_page_by_page,
    "tiff strips apart": tiff_strips_apart,
    "tiff imagej": tiff_imagej,
    "tiff imagej over 4 gb": tiff_imagej_over_4gb({"imagej": True}),
    "tiff shaped, planes behind one page": tiff_imagej_over_4gb({"photometric": "minisblack"}),
    "tiff imagej frames as z": tiff_imagej_frames,
    "tiff ome pyramid": tiff_ome_pyramid,
    "tiff rgb contig": tiff_rgb("contig"),
    "tiff rgb separate": tiff_rgb("separate"),
    "tiff jpeg": tiff_jpeg,
    "tiff second series": tiff_series,
    "tiff volumetric tiles": tiff_volumetric_tiles,
    "tiff sparse tiles": tiff_sparse_tiles,
    "stack png": stack(".png"),
    "stack png 16 bit": stack(".png", "uint16"),
    "stack tiff": stack(".tif", "float32"),
    "stack jpeg": stack(".jpg"),
    "stack bmp": stack(".bmp"),
    "stack channels": stack_of_channels,
    "stack colours": stack_of_colours,
    "stack as channels": stack_stated_as_channels,
    "stack numbered like channels": stack_numbered_like_channels,
    "one image": image,
    "zarr v2": zarr_array(2),
    "zarr v2 big endian": zarr_array(2, ">i4"),
    "zarr v2 bool slash": zarr_array(2, "bool", chunk_key_encoding={"name": "v2", "separator": "/"}),
    "zarr v3": zarr_array(3, "float32"),
    "zarr v3 sharded": zarr_array(3, "uint16", shards=(4, 32, 32)),
    "zarr v3 fill value": zarr_missing_chunks,
    "zarr only array": zarr_in_group,
    "ome-zarr 0.4": ome("0.4"),
    "ome-zarr 0.5": ome("0.5"),
    "ome-zarr 0.5 level": ome("0.5", "::s1"),
    "ome-zarr 0.4 level by path": ome("0.4", "/s1"),
    "working store": our_store,
    "nifti": nifti(ZYX[::-1]),
    "nifti big endian": nifti(ZYX[::-1], ">i2"),
    "nifti packed": nifti(ZYX[::-1], "uint16", name="a.nii.gz"),
    "nifti scaled": nifti(ZYX[::-1], "int16", scale=(0.37, -11.3)),
    "nifti turned": nifti_turned(),
    "nifti packed and scaled": nifti(ZYX[::-1], "uint8", name="a.nii.gz", scale=(2.0, 1.0)),
    "nifti-2 float": nifti(ZYX[::-1], "float32", kind=nibabel.Nifti2Image),
    "nifti channels": nifti((*ZYX[::-1], 2), "uint8", name="A.NII.GZ"),
    "nifti section": nifti((29, 37), "float64"),
    "mrc": mrc("int16"),
    "mrc big endian": mrc(">f4", "a.rec"),
    "mrc half float": mrc("float16"),
    "mrc axes unstated": mrc("uint16", mapc=0, mapr=0, maps=0),
    "mrc one image": mrc("int16", shape=(37, 29)),
    "mrc turned": mrc_turned,
    "mrc of imod, unsigned": mrc_of_imod(0),
    "mrc of imod, signed": mrc_of_imod(1),
    "precomputed": precomputed("uint8"),
    "precomputed float channels": precomputed("float32", 3, name="em.precomputed"),
    "precomputed scale": precomputed("uint16", inner="::8_10_30"),
    "precomputed labels": precomputed_labels,
    "precomputed jpeg": precomputed_jpeg,
    "n5": n5("uint8"),
    "n5 raw in nanometres": n5("int16", "raw", **RESOLUTION),
    "n5 dataset": n5("float32", "bzip2", "::volumes/raw"),
    "n5 of java's gzip": n5_as_others_write(lambda a: a["compression"].update(level=-1, useZlib=False, nthreads=4)),
    "n5 before 2.0": n5_as_others_write(n5_old, "raw"),
    "n5 channels": n5("uint64", "xz", channels=2),
    "n5 levels": n5_levels,
    "n5 section": n5_section,
    **EXCHANGED,
    "npy": npy(ZYX, "uint16"),
    "npy big endian channels": npy((2, *ZYX), ">f4"),
    "npy bool section": npy((37, 29), "bool"),
    "npy fortran": npy(ZYX, "int64", "F"),
    "npy fortran xyz": npy(ZYX[::-1], "uint8", "F", axes="xyz"),
}


@pytest.fixture(scope="module", params=list(CASES))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return CASES[request.param](tmp_path_factory.mktemp("volume"))


class TestReaders(VolumeReaderContract):
    def test_the_identity_names_the_file(self, written: Written, reader: VolumeReader) -> None:
        assert reader.identity["name"] == Path(written.uri.partition("::")[0]).name


class WrappedVolume(Written):
    """A volume that is no file of its own."""

    def __init__(self, expected: np.ndarray, made: Callable[[], VolumeReader]) -> None:
        super().__init__("", expected)
        self.open = made  # type: ignore[method-assign]  # of this one volume


def in_memory(folder: Path) -> WrappedVolume:
    data = voxels((2, *ZYX), "int16")
    return WrappedVolume(data, lambda: ArrayVolume(data, (3, 20, 8)))


def reoriented(folder: Path) -> WrappedVolume:
    data, turn = voxels((2, *ZYX)), Orientation((True, False, True), AxisOrder((2, 0, 1)))
    turned = data[:, ::-1, :, ::-1].transpose(0, *(axis + 1 for axis in (2, 0, 1)))
    return WrappedVolume(turned, lambda: ReorientedVolume(ArrayVolume(data), turn))


def channels(folder: Path) -> WrappedVolume:
    data = voxels((3, *ZYX), "float32")
    for c in range(3):
        np.save(folder / f"{c}.npy", data[c])
    return WrappedVolume(data, lambda: open_channels([str(folder / f"{c}.npy") for c in range(3)]))


class TestVolumesOverOthers(VolumeReaderContract):
    test_identity_is_stable_json_without_folders_and_follows_the_files = None  # type: ignore[assignment]

    @pytest.fixture(params=[in_memory, reoriented, channels])
    def written(self, request: pytest.FixtureRequest, tmp_path: Path) -> Written:
        return request.param(tmp_path)


def test_volumes_stack_as_channels(tmp_path: Path) -> None:
    data = voxels((2, 37, 29))
    for c in range(2):
        Image.fromarray(data[c]).save(tmp_path / f"case_{c:04}.png")
    reader = open_channels([str(tmp_path / f"case_{c:04}.png") for c in (1, 0)], voxel_size_nm=(30.0, 4.0, 4.0))
    assert reader.info.shape == (2, 1, 37, 29) and reader.info.voxel_size_nm == (30.0, 4.0, 4.0)
    np.testing.assert_array_equal(reader.read(Box((0, 3, 4), (1, 20, 29))), data[::-1, None, 3:20, 4:])
    names = [one["name"] for one in reader.identity["channels"]]  # type: ignore[attr-defined]  # a list of identities
    assert names == ["case_0001.png", "case_0000.png"]
    reader.close()
    reader.close()
    single = open_channels([str(tmp_path / "case_0000.png")])
    assert single.info.shape == (1, 1, 37, 29)
    single.close()
