"""Hostile and damaged volumes: a small valid original of each format, and ways to damage it. ``VOLUMES`` names them."""

from __future__ import annotations

import functools
import gzip
import io
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import mrcfile
import nibabel
import numcodecs
import numpy as np
import SimpleITK
import tifffile
import wkw
import zarr
from mutations import HUGE, TEXTS, Bytes, blind, odd_json, odd_text, put, zeros_deflated, zeros_gzipped
from PIL import Image

from chunk_writers import write_n5, write_precomputed
from exchanged_volumes import dm3_bytes, imaris
from small_jobs import em_like

GOOD = em_like((2, 24, 32))
XYZ = np.ascontiguousarray(GOOD.T)
Make = Callable[[Path], Path]
WIDE = 100_000

# ------------------------------------------------------------------------------------------------- valid originals


def hdf5(path: Path, **options: Any) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("main", data=GOOD, **options).attrs["voxel_size_nm"] = (30.0, 4.0, 4.0)


def nifti(path: Path, kind: Any = nibabel.Nifti1Image) -> None:
    nibabel.save(kind(XYZ, np.eye(4)), path)


def mrc(path: Path) -> None:
    with mrcfile.new(path) as file:
        file.set_data(GOOD.astype(np.uint16))


def itk(path: Path, *, packed: bool = False) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(GOOD), str(path), useCompression=packed)


def mrc_without_map(path: Path) -> None:
    with mrcfile.new(path) as file:
        file.set_data(GOOD.astype(np.uint16))
    path.write_bytes(put(208, bytes(8))(path.read_bytes()))


def zarr_zip(path: Path) -> None:
    with zarr.storage.ZipStore(path, mode="w") as store:
        zarr.create_array(store, data=GOOD, chunks=(1, 24, 32))


FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "h5": ("h5", hdf5),
    "h5packed": ("h5", lambda p: hdf5(p, chunks=(1, 8, 8), compression="gzip", shuffle=True, fletcher32=True)),
    "h5new": ("h5", lambda p: h5py.File(p, "w", libver="latest").create_dataset("main", data=GOOD, chunks=(1, 8, 32))),
    "tif": ("tif", lambda p: tifffile.imwrite(p, GOOD, photometric="minisblack")),
    "tifpacked": ("tif", lambda p: tifffile.imwrite(p, GOOD, tile=(16, 16), compression="zlib", predictor=True)),
    "tifbig": ("tif", lambda p: tifffile.imwrite(p, GOOD, bigtiff=True, compression="lzw", photometric="minisblack")),
    "tifj": ("tif", lambda p: tifffile.imwrite(p, GOOD, imagej=True, metadata={"axes": "ZYX", "spacing": 3})),
    "ome": ("ome.tif", lambda p: tifffile.imwrite(p, GOOD, ome=True, metadata={"axes": "ZYX"})),
    "png": ("png", lambda p: Image.fromarray(GOOD[0]).save(p)),
    "jpg": ("jpg", lambda p: Image.fromarray(GOOD[0]).save(p)),
    "bmp": ("bmp", lambda p: Image.fromarray(GOOD[0]).save(p)),
    "nii": ("nii", nifti),
    "nii2": ("nii", lambda p: nifti(p, nibabel.Nifti2Image)),
    "niigz": ("nii.gz", nifti),
    "mrc": ("mrc", mrc),
    "npy": ("npy", lambda p: np.save(p, GOOD)),
    "tifjbig": ("tif", lambda p: tifffile.imwrite(p, GOOD, imagej=True, truncate=True, metadata={"axes": "ZYX"})),
    "mrcold": ("st", mrc_without_map),
    "h5zstd": ("h5", lambda p: hdf5(p, chunks=(1, 8, 8), **hdf5plugin.Zstd())),
    "nrrd": ("nrrd", itk),
    "nrrdgz": ("nrrd", lambda p: itk(p, packed=True)),
    "mha": ("mha", itk),
    "mhapacked": ("mha", lambda p: itk(p, packed=True)),
    "gipl": ("gipl", itk),
    "dm3": ("dm3", lambda p: p.write_bytes(dm3_bytes(GOOD))),
    "ims": ("ims", lambda p: imaris(p.parent).uri and (p.parent / "a.ims").rename(p)),
    "zarrzip": ("zarr.zip", zarr_zip),
}


def zarr3(folder: Path) -> Path:
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    group.create_array("0", data=GOOD, chunks=(1, 8, 8), shards=(1, 24, 32))
    axes = [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    steps = [{"type": "scale", "scale": [30, 4, 4]}, {"type": "translation", "translation": [0, 1, 2]}]
    multiscale = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": steps}]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [multiscale]}
    return folder


def zarr2(folder: Path) -> Path:
    zarr.create_array(folder, data=GOOD, chunks=(1, 24, 32), zarr_format=2)
    return folder


def n5(folder: Path) -> Path:
    return write_n5(folder, XYZ, block=(16, 16, 1), resolution=[4, 4, 30], offset=[1, 2, 3])


def precomputed(folder: Path) -> Path:
    return write_precomputed(folder, {"4_4_30": XYZ[..., None]})


def zarr_filtered(folder: Path) -> Path:
    array = zarr.create_array(
        folder, shape=GOOD.shape, dtype=GOOD.dtype, chunks=(1, 24, 32), zarr_format=2, filters=[numcodecs.Delta("u1")]
    )
    array[:] = GOOD
    return folder


def packed_precomputed(folder: Path) -> Path:
    precomputed(folder)
    for chunk in list((folder / "4_4_30").iterdir()):
        chunk.with_name(f"{chunk.name}.gz").write_bytes(gzip.compress(chunk.read_bytes()))
        chunk.unlink()
    return folder


def wkw_dataset(folder: Path) -> Path:
    header = wkw.Header(np.uint8, block_type=wkw.Header.BLOCK_TYPE_LZ4, block_len=8, file_len=4)
    with wkw.Dataset.create(str(folder), header) as dataset:
        dataset.write((0, 0, 0), np.pad(XYZ, ((0, 0), (0, 8), (0, 30))))
    return folder


# the folder's suffix, what makes it, and its metadata by the name that mutants have
FOLDERS: dict[str, tuple[str, Callable[[Path], Path], dict[str, str]]] = {
    "zarr3": ("zarr", zarr3, {"array": "0/zarr.json", "group": "zarr.json"}),
    "zarr2": ("zarr", zarr2, {"array": ".zarray"}),
    "n5": ("n5", n5, {"array": "attributes.json"}),
    "precomputed": ("precomputed", precomputed, {"info": "info"}),
    "zarrfiltered": ("zarr", zarr_filtered, {"array": ".zarray"}),
    "precomputedgz": ("precomputed", packed_precomputed, {"info": "info"}),
}
PACKED_FOLDERS: dict[str, tuple[str, Callable[[Path], Path], dict[str, str]]] = {"wkw": ("wkw", wkw_dataset, {})}
"""Folders whose metadata are no JSON."""


@functools.cache
def original(kind: str) -> bytes:
    """The bytes of a valid file."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        suffix, write = FILES[kind]
        path = Path(folder, f"good.{suffix}")
        made = write(path)
        if isinstance(made, h5py.Dataset):
            made.file.close()
        return path.read_bytes()


def file_of(name: str, kind: str, change: Bytes) -> Make:
    """A damaged file."""

    def make(folder: Path) -> Path:
        path = folder / f"{name}.{FILES[kind][0]}"
        path.write_bytes(change(original(kind)))
        return path

    return make


def folder_of(name: str, kind: str, change: Callable[[Path], object]) -> Make:
    """A damaged folder."""

    def make(folder: Path) -> Path:
        suffix, write, _ = (FOLDERS | PACKED_FOLDERS)[kind]
        root = write(folder / f"{name}.{suffix}")
        change(root)
        return root

    return make


def json_in(name: str, kind: str, which: str, change: Callable[[bytes], bytes]) -> Make:
    """A folder with one damaged metadata file."""
    inner = FOLDERS[kind][2][which]
    return folder_of(name, kind, lambda root: (root / inner).write_bytes(change((root / inner).read_bytes())))


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Change a JSON object."""

    def apply(text: bytes) -> bytes:
        value = json.loads(text)
        change(value)
        return json.dumps(value).encode()

    return apply


def chunk_in(name: str, kind: str, change: Bytes) -> Make:
    """A folder whose first chunk is damaged."""

    def apply(root: Path) -> None:
        metadata = {".zarray", ".zattrs", "zarr.json", "attributes.json", "info", "header.wkw"}
        path = min(p for p in root.rglob("*") if p.is_file() and p.name not in metadata)
        path.write_bytes(change(path.read_bytes()))

    return folder_of(name, kind, apply)


# ----------------------------------------------------------------------------- what seeds and names alone decide

BLIND = {
    f"{kind}_{seed}": file_of(f"{kind}_{seed}", kind, blind(seed))
    for number, kind in enumerate(FILES)
    for seed in range(5 * number, 5 * number + 5)
}
ODD = {
    f"{kind}_{which}_{seed}": json_in(
        f"{kind}_{which}_{seed}", kind, which, lambda text, seed=seed: odd_json(seed, json.loads(text))
    )
    for kind, (_, _, files) in FOLDERS.items()
    for which in files
    for seed in range(12)
}
GARBLED = {
    f"{kind}_{which}_{text}": json_in(
        f"{kind}_{which}_{text}", kind, which, lambda found, text=text: odd_text(text, found)
    )
    for number, (kind, which) in enumerate((k, w) for k, (_, _, files) in FOLDERS.items() for w in files)
    for text in TEXTS[number % 2 :: 2]
}
CHUNKS = {
    f"{kind}_chunk_{seed}": chunk_in(f"{kind}_chunk_{seed}", kind, blind(seed))
    for kind in FOLDERS | PACKED_FOLDERS
    for seed in range(4)
}

# ----------------------------------------------------------------------------------- sizes that nobody should believe


def png_of(width: int, height: int, packed: bytes, *, first: tuple[bytes, bytes] | None = None) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    extra = chunk(*first) if first else b""
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def npy_of(header: str) -> bytes:
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + GOOD.tobytes()


def npy_shape(shape: str, descr: str = "|u1") -> bytes:
    return npy_of(f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}")


def tiff_of(tags: dict[int, tuple[int, int, int]], *, following: int = 0, count: int | None = None) -> bytes:
    """A TIFF of one page: tag number → (type, count, value); ``count`` of tags as stated."""
    entries = b"".join(struct.pack("<HHII", tag, *tags[tag]) for tag in sorted(tags))
    stated = len(tags) if count is None else count
    return b"II*\0\x08\0\0\0" + struct.pack("<H", stated) + entries + struct.pack("<I", following) + GOOD.tobytes()


PAGE = {
    256: (4, 1, 32),
    257: (4, 1, 24),
    258: (3, 1, 8),
    259: (3, 1, 1),
    262: (3, 1, 1),
    273: (4, 1, 200),
    277: (3, 1, 1),
    278: (4, 1, 24),
    279: (4, 1, 768),
}


def described(text: str) -> bytes:
    """A TIFF of two pages with an image description."""
    stream = io.BytesIO()
    tifffile.imwrite(stream, GOOD, description=text, metadata=None, photometric="minisblack")
    return stream.getvalue()


def ome(size: int, inside: str = "") -> bytes:
    pixels = (
        f'<Pixels DimensionOrder="XYZCT" Type="uint8" SizeX="32" SizeY="24" SizeZ="{size}" SizeC="1" SizeT="1" ID="P">'
    )
    schema = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    return described(
        f'<?xml version="1.0"?><OME xmlns="{schema}"><Image ID="I">{pixels}{inside}</Pixels></Image></OME>'
    )


LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE OME [<!ENTITY a "aaaaaaaaaaaaaaaaaaaa">'
    + "".join(f'<!ENTITY {b} "{f"&{a};" * 20}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + ']><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">&i;</OME>'
)
OTHER = '<TiffData IFD="0"><UUID FileName="/etc/passwd">urn:uuid:1</UUID></TiffData>'


def nifti_at(offset: int, form: str, *values: float) -> Bytes:
    return put(offset, struct.pack(f"<{form}", *values))


def mrc_at(word: int, *values: int) -> Bytes:
    return put(4 * word, struct.pack(f"<{len(values)}i", *values))


def gz(change: Bytes) -> Bytes:
    return lambda data: gzip.compress(change(gzip.decompress(data)))


WRITTEN: dict[str, tuple[str, Callable[[], bytes]]] = {
    "npy_huge": ("npy", lambda: npy_shape(f"({WIDE}, {WIDE}, {WIDE})")),
    "npy_beyond": ("npy", lambda: npy_shape(f"({2**62}, 8, {2**62})")),
    "npy_negative": ("npy", lambda: npy_shape("(-2, -24, 32)")),
    "npy_float": ("npy", lambda: npy_shape("(2.0, 24, 32)")),
    "npy_bool": ("npy", lambda: npy_shape("(True, 24, 32)")),
    "npy_no_shape": ("npy", lambda: npy_shape("()")),
    "npy_calls": ("npy", lambda: npy_shape("__import__('os').system('touch canary')")),
    "npy_unary": ("npy", lambda: npy_shape("-" * 9000 + "1")),
    "npy_brackets": ("npy", lambda: npy_shape("(" * 4000)),
    "npy_objects": ("npy", lambda: npy_shape("(2, 24, 32)", "|O")),
    "npy_void": ("npy", lambda: npy_shape("(2, 24, 32)", "|V1000000000")),
    "npy_dtype": ("npy", lambda: npy_shape("(2, 24, 32)", "f99999999999")),
    "npy_fields": ("npy", lambda: npy_of("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2, 24, 32), }")),
    "npy_header": ("npy", lambda: b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(100)),
    "png_wide": ("png", lambda: png_of(2**31 - 1, 2**31 - 1, zlib.compress(bytes(64)))),
    "png_million": ("png", lambda: png_of(10**6, 10**6, zlib.compress(bytes(64)))),
    "png_bomb": ("png", lambda: png_of(32, 24, zeros_deflated(1 << 29))),
    "png_text_bomb": (
        "png",
        lambda: png_of(32, 24, zlib.compress(bytes(33 * 24)), first=(b"zTXt", b"a\0\0" + zeros_deflated(1 << 29))),
    ),
    "png_profile_bomb": (
        "png",
        lambda: png_of(32, 24, zlib.compress(bytes(33 * 24)), first=(b"iCCP", b"a\0\0" + zeros_deflated(1 << 29))),
    ),
    "png_flat": ("png", lambda: png_of(0, 0, b"")),
    "tif_wide": ("tif", lambda: tiff_of(PAGE | {256: (4, 1, 2**32 - 1), 257: (4, 1, 2**32 - 1)})),
    "tif_rows": ("tif", lambda: tiff_of(PAGE | {278: (4, 1, 0)})),
    "tif_tile": ("tif", lambda: tiff_of(PAGE | {322: (4, 1, 0), 323: (4, 1, 0)})),
    "tif_wide_tile": ("tif", lambda: tiff_of(PAGE | {322: (4, 1, 2**31 - 16), 323: (4, 1, 2**31 - 16)})),
    "tif_packed_tile": (
        "tif",
        lambda: tiff_of(
            PAGE | {259: (3, 1, 8), 322: (4, 1, 2**18), 323: (4, 1, 2**18), 324: (4, 1, 200), 325: (4, 1, 90)}
        ),
    ),
    "tif_samples": ("tif", lambda: tiff_of(PAGE | {277: (3, 1, 65535)})),
    "tif_bits": ("tif", lambda: tiff_of(PAGE | {258: (3, 1, 65535)})),
    "tif_counts": ("tif", lambda: tiff_of(PAGE | {279: (4, 2**32 - 1, 8)})),
    "tif_strip": ("tif", lambda: tiff_of(PAGE | {279: (4, 1, 2**32 - 1), 273: (4, 1, 2**32 - 1)})),
    "tif_packed_strip": ("tif", lambda: tiff_of(PAGE | {259: (3, 1, 8), 279: (4, 1, 2**32 - 1)})),
    "tif_circle": ("tif", lambda: tiff_of(PAGE, following=8)),
    "tif_tags": ("tif", lambda: tiff_of(PAGE, count=65535)),
    "tif_ome_planes": ("ome.tif", lambda: ome(HUGE)),
    "tif_ome_million": ("ome.tif", lambda: ome(10**8)),
    "tif_ome_minus": ("ome.tif", lambda: ome(-5)),
    "tif_ome_other": ("ome.tif", lambda: ome(2, OTHER)),
    "tif_ome_laughs": ("ome.tif", lambda: described(LAUGHS)),
    "tif_imagej": ("tif", lambda: described(f"ImageJ=1.11a\nimages={HUGE}\nslices={HUGE}\n")),
    "tif_shaped": ("tif", lambda: described(json.dumps({"shape": [WIDE, WIDE, WIDE]}))),
    "tif_shaped_deep": ("tif", lambda: described('{"shape": ' + "[" * 20000 + "]" * 20000 + "}")),
    "nii_zip": ("nii.gz", lambda: gzip.compress(original("nii"))[:-8] + bytes(8)),
    "nii_tail": ("nii.gz", lambda: gzip.compress(original("nii")) + zeros_gzipped(1 << 29)),
    "nii_plain": ("nii.gz", lambda: original("nii")),
}
CHANGED: dict[str, tuple[str, Bytes]] = {
    "nii_axes": ("nii", nifti_at(40, "8h", 7, *(32767,) * 7)),
    "nii_no_axes": ("nii", nifti_at(40, "h", 0)),
    "nii_negative": ("nii", nifti_at(40, "4h", 3, -32, 24, 2)),
    "nii_large": ("nii", nifti_at(40, "5h", 4, *(32767,) * 4)),
    "nii_offset": ("nii", nifti_at(108, "f", 1e30)),
    "nii_no_offset": ("nii", nifti_at(108, "f", float("nan"))),
    "nii_slope": ("nii", nifti_at(112, "2f", float("inf"), float("nan"))),
    "nii_zooms": ("nii", nifti_at(76, "8f", *(float("nan"),) * 8)),
    "nii_type": ("nii", nifti_at(70, "2h", 2304, 32)),
    "nii_magic": ("nii", put(344, b"ni1\0")),
    "nii2_huge": ("nii2", nifti_at(16, "8q", 3, WIDE, WIDE, WIDE, 1, 1, 1, 1)),
    "nii2_beyond": ("nii2", nifti_at(16, "8q", 7, *(2**62,) * 7)),
    "niigz_huge": ("niigz", gz(nifti_at(40, "4h", 3, *(32767,) * 3))),
    "mrc_huge": ("mrc", mrc_at(0, WIDE, WIDE, WIDE)),
    "mrc_largest": ("mrc", mrc_at(0, *(2**31 - 1,) * 3)),
    "mrc_negative": ("mrc", mrc_at(0, -32, -24, 2)),
    "mrc_mode": ("mrc", mrc_at(3, 1000)),
    "mrc_header": ("mrc", mrc_at(23, 2**31 - 1)),
    "mrc_no_header": ("mrc", mrc_at(23, -1)),
    "mrc_axes": ("mrc", mrc_at(16, 0, 7, -3)),
    "mrc_volumes": ("mrc", lambda d: mrc_at(22, 401)(mrc_at(9, 0)(d))),
    "nrrd_sizes": ("nrrd", lambda d: re.sub(rb"sizes: [^\n]*", b"sizes: 9999999 9999999 9999999", d)),
    "nrrd_negative": ("nrrd", lambda d: re.sub(rb"sizes: [^\n]*", b"sizes: -32 -24 2", d)),
    "nrrd_skip": ("nrrd", lambda d: d.replace(b"encoding:", b"byte skip: 99999999999999\nencoding:")),
    "nrrd_lines": ("nrrd", lambda d: d.replace(b"encoding:", b"line skip: 99999999999999\nencoding:")),
    "nrrd_outside": ("nrrd", lambda d: d.replace(b"encoding:", b"data file: /etc/passwd\nencoding:")),
    "nrrd_bomb": ("nrrdgz", lambda d: d.partition(b"\n\n")[0] + b"\n\n" + zeros_gzipped(1 << 29)),
    "mha_sizes": ("mha", lambda d: d.replace(b"DimSize = 32 24 2", b"DimSize = 9999999 9999999 9999")),
    "mha_channels": ("mha", lambda d: d.replace(b"ElementType", b"ElementNumberOfChannels = 999999999\nElementType")),
    "mha_outside": ("mha", lambda d: d.replace(b"= LOCAL", b"= ../../etc/passwd")),
    "mha_bomb": ("mhapacked", lambda d: d.partition(b"= LOCAL\n")[0] + b"= LOCAL\n" + zeros_deflated(1 << 29)),
    "gipl_sizes": ("gipl", put(0, b"\xff" * 8)),
    "dm3_tags": ("dm3", put(14, b"\xff" * 4)),
    "dm3_dims": ("dm3", lambda d: put(d.index(b"Dimensions") + 31, b"\xff" * 3)(d)),
    "zarrzip_text": ("zarrzip", lambda d: d.replace(b"zarr_format", b"zarr_formal")),
    "zarrzip_cut": ("zarrzip", lambda d: d[:-30]),
    "bmp_wide": ("bmp", put(18, struct.pack("<ii", 2**31 - 1, 2**31 - 1))),
    "bmp_palette": ("bmp", put(46, struct.pack("<i", 2**31 - 1))),
    "jpg_wide": ("jpg", lambda d: put(d.index(b"\xff\xc0") + 5, b"\xff\xff\xff\xff")(d)),
}
SIZES = {
    **{
        name: (
            lambda folder, name=name, suffix=suffix, content=content: _written(folder / f"{name}.{suffix}", content())
        )
        for name, (suffix, content) in WRITTEN.items()
    },
    **{name: file_of(name, kind, change) for name, (kind, change) in CHANGED.items()},
}


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
