"""Formats × metadata: what states each fact in a file, and what is right; ``MATRIX`` is tested and stands in the docs.

A cell is a function that writes volumes, or the reason why its format cannot state the fact.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import nibabel
import numpy as np
import tifffile
from metadata_files import (
    SIZE,
    TWO,
    XYZ,
    ZYX,
    Fact,
    h5,
    imagej,
    linked,
    mrc,
    n5,
    nii,
    npy,
    ome_tiff,
    ome_zarr,
    pngs,
    precomputed,
    raw_storage,
    tags,
    virtual,
    without,
    zarr_array,
)

Writer = Callable[[Path], Iterator[Fact]]
Cell = Writer | str
KNOWN = {"voxel_size_nm": SIZE}
SIGNED = ZYX.astype(np.int8)
FURLONG = r"furlong.*no known unit"


# ---------------------------------------------------------------------------------------------------- order of axes


def axes_hdf5(f: Path) -> Iterator[Fact]:
    yield Fact(h5(f / "labels.h5", XYZ, "xyz"), ZYX)
    for keys, data, right in (
        ("xyz", XYZ, ZYX),
        ("zyxc", np.moveaxis(TWO, 0, -1), TWO),
        ("yxc", np.moveaxis(TWO[:, 0], 0, -1), TWO[:, :1]),
    ):
        yield Fact(h5(f / f"{keys}.h5", data, axistags=tags(keys)), right)
    yield Fact(h5(f / "t.h5", axistags=tags("tyx")), refused="time axis of length 5", remedy={"axes": "zyx"})


def axes_imagej(f: Path) -> Iterator[Fact]:
    yield Fact(imagej(f / "a.tif", TWO.transpose(1, 0, 2, 3), "ZCYX"), TWO)


def axes_ome_tiff(f: Path) -> Iterator[Fact]:
    yield Fact(ome_tiff(f / "a.ome.tif", TWO, "CZYX"), TWO)
    yield Fact(ome_tiff(f / "b.ome.tif", TWO.transpose(1, 0, 2, 3), "ZCYX"), TWO)


def axes_nifti(f: Path) -> Iterator[Fact]:
    yield Fact(nii(f / "a.nii"), ZYX)
    yield Fact(nii(f / "c.nii", TWO.transpose(3, 2, 1, 0)), TWO)


def axes_mrc(f: Path) -> Iterator[Fact]:
    yield Fact(mrc(f / "a.mrc", SIGNED.T, mapc=3, mapr=2, maps=1, mx=14, mz=5), SIGNED)


def axes_zarr(f: Path) -> Iterator[Fact]:
    for key, names in (("_ARRAY_DIMENSIONS", [*"xyz"]), ("axis_names", [*"XYZ"]), ("dimension_names", ["x", "y", "z"])):
        yield Fact(zarr_array(f / f"{key}.zarr", XYZ, attributes={key: names}), ZYX)
    names = ["z", "Y", "x", "channel"]
    yield Fact(zarr_array(f / "3.zarr", np.moveaxis(TWO, 0, -1), 3, dimension_names=names), TWO)
    yield Fact(zarr_array(f / "part.zarr", ZYX, 3, dimension_names=[None, "y", "x"]), ZYX)
    yield Fact(
        zarr_array(f / "odd.zarr", ZYX, 3, dimension_names=["angle", "y", "x"]),
        refused="unknown kind of length 5",
        remedy={"axes": "zyx"},
    )


def axes_ome_zarr(f: Path) -> Iterator[Fact]:
    yield Fact(ome_zarr(f / "a.zarr", XYZ, "xyz"), ZYX, SIZE)
    yield Fact(ome_zarr(f / "b.zarr", TWO, "czyx"), TWO)


def axes_n5(f: Path) -> Iterator[Fact]:
    yield Fact(n5(f / "a.n5"), ZYX)
    yield Fact(n5(f / "b.n5", ZYX, axes=[*"zyx"]), ZYX)
    yield Fact(n5(f / "c.n5", XYZ, axis_names=[*"zyx"]), ZYX)


def axes_precomputed(f: Path) -> Iterator[Fact]:
    yield Fact(precomputed(f / "em", TWO.transpose(3, 2, 1, 0)), TWO)


# ----------------------------------------------------------------------------------------------- axes of length one


def ones_hdf5(f: Path) -> Iterator[Fact]:
    yield Fact(h5(f / "five.h5", ZYX[None, None]), ZYX)
    yield Fact(h5(f / "last.h5", ZYX[..., None]), ZYX)
    yield Fact(h5(f / "tags.h5", ZYX[None, ..., None], axistags=tags("tzyxc")), ZYX)
    four = ZYX[None, :, :, :, None].repeat(2, -1)
    yield Fact(h5(f / "four.h5", four), refused="has 5 axes.*'tczyx'", remedy={"axes": "tzyxc"})


def ones_imagej(f: Path) -> Iterator[Fact]:
    yield Fact(imagej(f / "a.tif", ZYX[None, :, None], "TZCYX"), ZYX)


def ones_ome_tiff(f: Path) -> Iterator[Fact]:
    yield Fact(ome_tiff(f / "a.ome.tif", ZYX[None, None], "TCZYX"), ZYX)


def ones_nifti(f: Path) -> Iterator[Fact]:
    yield Fact(nii(f / "a.nii", XYZ[..., None]), ZYX)
    yield Fact(nii(f / "b.nii", TWO.transpose(3, 2, 1, 0)[:, :, :, None]), TWO)


def ones_mrc(f: Path) -> Iterator[Fact]:
    yield Fact(mrc(f / "a.mrc", SIGNED[None]), SIGNED)


def ones_npy(f: Path) -> Iterator[Fact]:
    yield Fact(npy(f / "a.npy", ZYX[None, None]), ZYX)
    yield Fact(npy(f / "b.npy", ZYX[..., None]), ZYX)


def ones_zarr(f: Path) -> Iterator[Fact]:
    yield Fact(zarr_array(f / "a.zarr", ZYX[None, None], 3), ZYX)
    yield Fact(zarr_array(f / "b.zarr", ZYX[..., None], attributes={"_ARRAY_DIMENSIONS": ["z", "y", "x", "band"]}), ZYX)


def ones_ome_zarr(f: Path) -> Iterator[Fact]:
    yield Fact(ome_zarr(f / "a.zarr", ZYX[None, None], "tczyx"), ZYX, SIZE)
    yield Fact(ome_zarr(f / "b.zarr", ZYX[..., None, None], "zyxct"), ZYX, SIZE)


def ones_n5(f: Path) -> Iterator[Fact]:
    yield Fact(n5(f / "a.n5", XYZ[..., None, None]), ZYX)


def ones_precomputed(f: Path) -> Iterator[Fact]:
    yield Fact(precomputed(f / "em"), ZYX)


# ------------------------------------------------------------------------------------------------------ size and unit

SMALL = [0.04, 0.005, 0.004]


def size_hdf5(f: Path) -> Iterator[Fact]:
    for number, unit in enumerate(("um", "µm", "micron", "micrometers", b"um", r"\u00B5m", ["um", "um", "um"])):
        key = "units" if isinstance(unit, list) else "unit"
        yield Fact(h5(f / f"{number}.h5", resolution=SMALL, **{key: unit}), size=SIZE)
    yield Fact(h5(f / "nm.h5", resolution=SIZE), size=SIZE)
    yield Fact(h5(f / "voxel_size.h5", voxel_size=SMALL, units="um"), size=SIZE)
    yield Fact(h5(f / "each.h5", resolution=[0.04, 5, 40], units=["um", "nm", "angstrom"]), size=SIZE)
    yield Fact(h5(f / "named.h5", element_size_um=SMALL), size=SIZE)
    yield Fact(h5(f / "xyz.h5", XYZ, "xyz", resolution=SIZE[::-1]), ZYX, SIZE)
    yield Fact(h5(f / "czyx.h5", TWO, resolution=[1, *SIZE], units=["", "nm", "nm", "nm"]), TWO, SIZE)


def size_imagej(f: Path) -> Iterator[Fact]:
    for number, unit in enumerate(("um", "micron", r"\u00B5m", r"\u03bcm")):
        yield Fact(imagej(f / f"{number}.tif", spacing=0.04, unit=unit), size=SIZE)
    yield Fact(imagej(f / "z.tif", spacing=-40.0, unit="um", zunit="nm"), size=SIZE)
    yield Fact(imagej(f / "y.tif", spacing=0.04, unit="um", yunit="mm"), size=(40.0, 5000.0, 4.0))


def size_ome_tiff(f: Path) -> Iterator[Fact]:
    yield Fact(ome_tiff(f / "nm.ome.tif", unit="nm"), size=SIZE)
    yield Fact(ome_tiff(f / "angstrom.ome.tif", unit="Å"), size=(4.0, 0.5, 0.4))


def size_nifti(f: Path) -> Iterator[Fact]:
    yield Fact(nii(f / "a.nii"), size=SIZE)
    yield Fact(nii(f / "b.nii", unit="mm"), size=(4e4, 5e3, 4e3))


def size_mrc(f: Path) -> Iterator[Fact]:
    yield Fact(mrc(f / "a.mrc"), size=SIZE)


def size_zarr(f: Path) -> Iterator[Fact]:
    yield Fact(zarr_array(f / "gunpowder.zarr", attributes={"resolution": SIZE, "offset": [0, 0, 0]}), size=SIZE)
    stated = {"voxel_size": SMALL, "units": ["um"] * 3, "axis_names": [*"zyx"]}
    yield Fact(zarr_array(f / "funlib.zarr", attributes=stated), size=SIZE)
    stated = {"voxel_size": [4, 5, 40], "units": ["nm"] * 3, "axis_names": [*"xyz"]}
    yield Fact(zarr_array(f / "xyz.zarr", XYZ, 3, attributes=stated), ZYX, SIZE)
    stated = {"transform": {"axes": [*"zyx"], "units": ["nm"] * 3, "scale": SIZE, "translate": [0, 0, 0]}}
    yield Fact(zarr_array(f / "cosem.zarr", attributes=stated), size=SIZE)


def size_ome_zarr(f: Path) -> Iterator[Fact]:
    yield Fact(ome_zarr(f / "a.zarr"), size=SIZE)
    yield Fact(f"{ome_zarr(f / 'b.zarr', unit='micrometer')}/0", size=(4e4, 5e3, 4e3))


def size_n5(f: Path) -> Iterator[Fact]:
    yield Fact(n5(f / "a.n5", resolution=[4, 5, 40]), size=SIZE)
    yield Fact(n5(f / "b.n5", resolution=[4, 5, 0.04], units=["nm", "nm", "um"]), size=SIZE)
    unit = {"dimensions": SMALL[::-1], "unit": "µm"}
    yield Fact(n5(f / "c.n5", pixelResolution=unit), size=SIZE)
    n5(f / "d.n5/c0/s1", downsamplingFactors=[2, 2, 1])
    (f / "d.n5/c0/attributes.json").write_text(json.dumps({"pixelResolution": unit}))
    for uri in (f"{f / 'd.n5'}::c0/s1", f / "d.n5/c0/s1"):  # named by its path it says the same
        yield Fact(uri, size=(40.0, 10.0, 8.0))
    stated = {"axes": [*"zyx"], "units": ["nm"] * 3, "scale": SIZE, "translate": [0, 0, 0]}
    yield Fact(n5(f / "e.n5", transform=stated), size=SIZE)


def size_precomputed(f: Path) -> Iterator[Fact]:
    yield Fact(precomputed(f / "em"), size=SIZE)


def unknown_hdf5(f: Path) -> Iterator[Fact]:
    path = h5(f / "a.h5", resolution=SIZE, units="furlong")
    yield Fact(path, size=SIZE, refused=f"`units` of `/raw`.*{FURLONG}", remedy=KNOWN)


def unknown_imagej(f: Path) -> Iterator[Fact]:
    yield Fact(imagej(f / "a.tif", spacing=40, unit="furlong"), refused=f"`unit`.*{FURLONG}", remedy=KNOWN)
    path = imagej(f / "b.tif", spacing=40, unit="nm", zunit="furlong")
    yield Fact(path, refused=f"`zunit`.*{FURLONG}", remedy=KNOWN)


def unknown_ome_tiff(f: Path) -> Iterator[Fact]:
    yield Fact(ome_tiff(f / "a.ome.tif", unit="furlong"), refused=f"PhysicalSizeZUnit.*{FURLONG}", remedy=KNOWN)


def unknown_zarr(f: Path) -> Iterator[Fact]:
    path = zarr_array(f / "a.zarr", attributes={"voxel_size": SIZE, "units": ["nm", "nm", "furlong"]})
    yield Fact(path, size=SIZE, refused=f"`units`.*{FURLONG}", remedy=KNOWN)


def unknown_ome_zarr(f: Path) -> Iterator[Fact]:
    yield Fact(ome_zarr(f / "a.zarr", unit="furlong"), refused=f"`unit` of axis z.*{FURLONG}", remedy=KNOWN)


def unknown_n5(f: Path) -> Iterator[Fact]:
    path = n5(f / "a.n5", pixelResolution={"dimensions": [4, 5, 40], "unit": "furlong"})
    yield Fact(path, refused=f"`unit` in `pixelResolution`.*{FURLONG}", remedy=KNOWN)
    yield Fact(n5(f / "b.n5", resolution=[4, 5, 40], units=["furlong"] * 3), refused=FURLONG, remedy=KNOWN)


def bare_hdf5(f: Path) -> Iterator[Fact]:
    for number, unit in enumerate(("pixel", "", ["pixels"] * 3)):
        yield Fact(h5(f / f"{number}.h5", resolution=[1, 1, 1], units=unit), size=())
    yield Fact(h5(f / "zero.h5", element_size_um=[0, 0, 0]), size=())
    yield Fact(h5(f / "none.h5"), size=())


def bare_imagej(f: Path) -> Iterator[Fact]:
    for number, unit in enumerate(("pixel", "")):
        yield Fact(imagej(f / f"{number}.tif", spacing=1, unit=unit), size=())
    yield Fact(imagej(f / "none.tif", spacing=1), size=())


def bare_ome_tiff(f: Path) -> Iterator[Fact]:
    yield Fact(ome_tiff(f / "a.ome.tif", unit="pixel"), size=())
    yield Fact(ome_tiff(f / "b.ome.tif"), size=())


def bare_nifti(f: Path) -> Iterator[Fact]:
    yield Fact(nii(f / "a.nii", unit="unknown"), size=())


def bare_mrc(f: Path) -> Iterator[Fact]:
    yield Fact(mrc(f / "a.mrc", cella=(0, 0, 0)), size=())
    yield Fact(mrc(f / "b.mrc", mz=0), size=())


def bare_zarr(f: Path) -> Iterator[Fact]:
    yield Fact(zarr_array(f / "a.zarr", attributes={"voxel_size": [1, 1, 1], "units": [""] * 3}), size=())
    yield Fact(zarr_array(f / "b.zarr"), size=())


def bare_ome_zarr(f: Path) -> Iterator[Fact]:
    yield Fact(ome_zarr(f / "a.zarr", unit=None), size=())
    yield Fact(ome_zarr(f / "b.zarr", unit="pixel"), size=())


def bare_n5(f: Path) -> Iterator[Fact]:
    yield Fact(n5(f / "a.n5", pixelResolution={"dimensions": [1, 1, 1], "unit": "pixel"}), size=())
    yield Fact(n5(f / "b.n5"), size=())


# ------------------------------------------------------------------------------------------------------------- origin


def origin_hdf5(f: Path) -> Iterator[Fact]:
    yield Fact(h5(f / "a.h5", resolution=SIZE, offset=[400, 50, 40]), size=SIZE, origin=(400.0, 50.0, 40.0))
    path = h5(f / "b.h5", resolution=SMALL, offset=[0.4, 0.05, 0.04], unit="um")
    yield Fact(path, size=SIZE, origin=(400.0, 50.0, 40.0))


def origin_imagej(f: Path) -> Iterator[Fact]:
    path = imagej(f / "a.tif", spacing=0.04, unit="um", xorigin=2, zorigin=-10)
    yield Fact(path, size=SIZE, origin=(400.0, 0.0, -8.0))


def origin_zarr(f: Path) -> Iterator[Fact]:
    path = zarr_array(f / "a.zarr", attributes={"resolution": SIZE, "offset": [400, 50, 40]})
    yield Fact(path, size=SIZE, origin=(400.0, 50.0, 40.0))
    stated = {"voxel_size": SMALL, "offset": [0.4, 0.05, 0.04], "units": ["um"] * 3}
    yield Fact(zarr_array(f / "b.zarr", version=3, attributes=stated), size=SIZE, origin=(400.0, 50.0, 40.0))


def origin_ome_zarr(f: Path) -> Iterator[Fact]:
    yield Fact(ome_zarr(f / "a.zarr"), size=SIZE, origin=(400.0, 50.0, 40.0))


def origin_n5(f: Path) -> Iterator[Fact]:
    path = n5(f / "a.n5", resolution=[4, 5, 40], offset=[40, 50, 400])
    yield Fact(path, size=SIZE, origin=(400.0, 50.0, 40.0))
    stated = {"axes": [*"zyx"], "units": ["nm"] * 3, "scale": SIZE, "translate": [400, 50, 40]}
    yield Fact(n5(f / "b.n5", transform=stated), size=SIZE, origin=(400.0, 50.0, 40.0))


def origin_precomputed(f: Path) -> Iterator[Fact]:
    yield Fact(precomputed(f / "em", offset=(10, 10, 10)), ZYX, SIZE, (400.0, 50.0, 40.0))


# -------------------------------------------------------------------------------------- signedness and contradictions

WIDE = ZYX.astype(np.uint16) + 50_000


def sign_hdf5(f: Path) -> Iterator[Fact]:
    path = h5(f / "bdv.h5", WIDE.view(np.int16), name="t00000/s00/0/cells")
    with h5py.File(path, "a") as file:
        file["s00/resolutions"] = [[1.0, 1.0, 1.0]]
    yield Fact(f"{path}::t00000/s00/0/cells", WIDE)
    yield Fact(h5(f / "other.h5", WIDE.view(np.int16), name="t00000/s00/0/cells"), WIDE.view(np.int16))
    yield Fact(h5(f / "plain.h5", WIDE.view(np.int16)), WIDE.view(np.int16))


def sign_mrc(f: Path) -> Iterator[Fact]:
    high = (ZYX + 100).astype(np.uint8)
    stamp = np.zeros(84, np.uint8)
    for flags, right in ((0, high), (1, high.view(np.int8))):
        stamp[40:48] = np.frombuffer(np.array([1146047817, flags], "<i4").tobytes(), np.uint8)
        yield Fact(mrc(f / f"imod{flags}.mrc", high.view(np.int8), extra2=stamp.tobytes()), right)
    yield Fact(mrc(f / "extremes.mrc", high.view(np.int8), dmin=100, dmax=220), high)
    yield Fact(mrc(f / "signed.mrc", high.view(np.int8), dmin=-128, dmax=127), high.view(np.int8))
    yield Fact(mrc(f / "unknown.mrc", high.view(np.int8), dmin=0, dmax=-1), high.view(np.int8))


def against_hdf5(f: Path) -> Iterator[Fact]:
    path = h5(f / "size.h5", resolution=SIZE, element_size_um=SIZE)
    yield Fact(path, refused="`element_size_um` of `/raw` says.*`resolution` of `/raw` says", remedy=KNOWN)
    path = h5(f / "axes.h5", labels="xyz", axistags=tags("zyx"))
    yield Fact(path, refused="axistags.*'zyx'.*labels.*'xyz'", remedy={"axes": "zyx"})
    yield Fact(h5(f / "few.h5", axistags=tags("yx")), refused="2 axes for an array of 3", remedy={"axes": "zyx"})
    yield Fact(h5(f / "unit.h5", element_size_um=SMALL, unit="nm"), refused="`unit` of `/raw`", remedy=KNOWN)


def against_mrc(f: Path) -> Iterator[Fact]:
    yield Fact(mrc(f / "a.mrc", dmin=-3, dmax=200), refused="from -3 to 200")


def against_zarr(f: Path) -> Iterator[Fact]:
    path = zarr_array(f / "a.zarr", version=3, dimension_names=[*"zyx"], attributes={"axis_names": [*"xyz"]})
    yield Fact(path, refused="dimension_names.*'zyx'.*axis_names.*'xyz'", remedy={"axes": "zyx"})
    path = zarr_array(f / "b.zarr", attributes={"resolution": SIZE, "voxel_size": [1, 1, 1]})
    yield Fact(path, refused="`resolution`.*`voxel_size`", remedy=KNOWN)


def against_ome_zarr(f: Path) -> Iterator[Fact]:
    yield Fact(ome_zarr(f / "a.zarr", resolution=[1, 1, 1]), refused="`multiscales`.*`resolution`", remedy=KNOWN)
    path = ome_zarr(f / "b.zarr", _ARRAY_DIMENSIONS=[*"xyz"])
    yield Fact(path, refused="multiscales.*'zyx'.*_ARRAY_DIMENSIONS.*'xyz'", remedy={"axes": "zyx"})


def against_n5(f: Path) -> Iterator[Fact]:
    path = n5(f / "a.n5", resolution=[4, 5, 40], pixelResolution={"dimensions": [1, 1, 1], "unit": "nm"})
    yield Fact(path, refused="`pixelResolution`.*`resolution`", remedy=KNOWN)


# ----------------------------------------------------------------------------------- missing parts, files that change


def missing_hdf5(f: Path) -> Iterator[Fact]:
    path = virtual(f)
    yield Fact(path, ZYX)
    with h5py.File(f / "part3.h5", "a") as file:
        del file["raw"]
        file["raw"] = ZYX[3, :4]
    yield Fact(path, refused="from part3.h5.*cut short")
    without(f / "part3.h5")
    yield Fact(path, refused="part3.h5 is absent")
    uri = linked(f)
    without(f / "far.h5")
    yield Fact(uri, refused="link to far.h5.*file is absent")
    path = raw_storage(f)
    yield Fact(path, ZYX)
    os.truncate(f / "voxels.raw", 100)
    yield Fact(path, refused="voxels.raw.*has 100 bytes, expected 840")
    without(f / "voxels.raw")
    yield Fact(path, refused="voxels.raw is absent")
    (f / "below").mkdir()
    yield Fact(raw_storage(f / "below", "../voxels.raw"), refused="outside the folder")


def missing_tiff(f: Path) -> Iterator[Fact]:
    path = f / "pages.tif"
    with tifffile.TiffWriter(path) as writer:
        for page in ZYX:
            writer.write(page, metadata=None, contiguous=False)
    with tifffile.TiffFile(path) as tif:
        end = tif.pages[3].offset  # type: ignore[union-attr]  # pages of a file
    os.truncate(path, end)
    yield Fact(path, refused="truncated or lacks pages")


def missing_ome_tiff(f: Path) -> Iterator[Fact]:
    xml = '<BinaryOnly MetadataFile="a.companion.ome" UUID="urn:uuid:0"/>'
    xml = f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{xml}</OME>'
    tifffile.imwrite(f / "a.ome.tif", ZYX[0], description=xml, metadata=None)
    yield Fact(f / "a.ome.tif", refused="one part of an OME-TIFF set")


def missing_images(f: Path) -> Iterator[Fact]:
    path = pngs(f / "stack")
    yield Fact(path, unread=r"section_2\.png", spoil=lambda: without(path / "section_2.png"))


def missing_nifti(f: Path) -> Iterator[Fact]:
    nibabel.save(nibabel.Nifti1Pair(XYZ, np.eye(4)), f / "a.img")
    (f / "a.hdr").rename(f / "a.nii")
    yield Fact(f / "a.nii", refused="its voxels are in another file")


def missing_zarr(f: Path) -> Iterator[Fact]:
    path = zarr_array(f / "a.zarr", fill_value=0)
    without(path / "0.1.1")
    right = ZYX.copy()
    right[:, 8:, 8:] = 0
    yield Fact(path, right)  # its fill value says what is absent
    file = path / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fill_value": None}))
    yield Fact(path, unread="chunk.*is missing|absent")


def missing_ome_zarr(f: Path) -> Iterator[Fact]:
    path = ome_zarr(f / "a.zarr")
    without(path / "0")
    yield Fact(path, refused="array '0', which is absent")


def missing_precomputed(f: Path) -> Iterator[Fact]:
    path = precomputed(f / "em")
    without(path / "4_5_40")
    yield Fact(path, refused="folder of scale '4_5_40' is absent")


def cut(path: Path) -> Callable[[], None]:
    return lambda: os.truncate(path, path.stat().st_size // 2)


def cut_file(write: Callable[[Path], Path], name: str) -> Writer:
    def cell(f: Path) -> Iterator[Fact]:
        path = write(f / name)
        yield Fact(path, unread=re.escape(name), spoil=cut(path))

    return cell


def cut_hdf5(f: Path) -> Iterator[Fact]:
    path = h5(f / "a.h5")
    yield Fact(path, unread=r"a\.h5 changed", spoil=cut(path))
    path = virtual(f)
    yield Fact(path, unread=r"part2\.h5 (changed|was removed)", spoil=lambda: without(f / "part2.h5"))


def cut_images(f: Path) -> Iterator[Fact]:
    path = pngs(f / "stack")
    yield Fact(path, unread=r"section_3\.png", spoil=cut(path / "section_3.png"))


def cut_chunk(write: Callable[[Path], Path], name: str, chunk: str) -> Writer:
    def cell(f: Path) -> Iterator[Fact]:
        path = write(f / name)
        yield Fact(path, unread=re.escape(name), spoil=cut(path / chunk))

    return cell


def same_hdf5(f: Path) -> Iterator[Fact]:
    yield Fact(h5(f / "a.h5"), files=(f / "a.h5",))
    yield Fact(virtual(f), files=(f / "virtual.h5", f / "part0.h5", f / "part4.h5"))
    yield Fact(linked(f), files=(f / "link.h5", f / "far.h5"))
    yield Fact(raw_storage(f), files=(f / "external.h5", f / "voxels.raw"))


def same_file(write: Callable[[Path], Path], name: str) -> Writer:
    def cell(f: Path) -> Iterator[Fact]:
        path = write(f / name)
        yield Fact(path, files=(path,))

    return cell


def same_folder(write: Callable[[Path], Path], name: str, *files: str) -> Writer:
    def cell(f: Path) -> Iterator[Fact]:
        path = write(f / name)
        yield Fact(path, files=tuple(path / file for file in files))

    return cell


def same_ome_zarr(f: Path) -> Iterator[Fact]:
    path = ome_zarr(f / "a.zarr")
    files = (path / "zarr.json", path / "0/zarr.json", path / "0/c/0/0/0")
    yield Fact(path, files=files)
    yield Fact(path / "0", files=files)  # named by its path it has the group's metadata, too


def same_n5(f: Path) -> Iterator[Fact]:
    path = n5(f / "a.n5/s0")
    (f / "a.n5/attributes.json").write_text("{}")
    files = (path / "0/0/0", path / "attributes.json", f / "a.n5/attributes.json")
    yield Fact(f / "a.n5", files=files)
    yield Fact(path, files=files)


# --------------------------------------------------------------------------------------------------------- the matrix

FORMATS = (
    "HDF5", "ImageJ TIFF", "OME-TIFF", "sections", "NIfTI", "MRC", "npy", "Zarr", "OME-Zarr", "N5", "precomputed"
)  # fmt: skip
NO_AXES = "the format has no names of axes, and two to four of them are usual"
PLANE = "an image is a plane of pixels; sections and channels are files, whose names order them"
NO_SIZE = "the format has no place for a size"
PRINTER = "PNG, JPEG and BMP state dots for a printer, and none between sections"
LISTED = "the unit is a number out of the format's own list"
ALWAYS = "the format has one unit, which needs no name"
REQUIRED = "the format requires a size, in nanometres"
FRAME = "the header's origin is one of a patient or of a reconstruction, with directions of its own"
STAGE = "the positions of planes are those of a microscope's stage"
TYPE = "the stored type says whether numbers are signed"
ONCE = "each fact stands in one place"
ALONE = "one file holds all"
FILL = "blocks that are absent are zeros by the format's specification"

_ROWS: dict[str, tuple[Cell, ...]] = {
    "order of axes": (
        axes_hdf5, axes_imagej, axes_ome_tiff, PLANE, axes_nifti, axes_mrc, NO_AXES, axes_zarr, axes_ome_zarr, axes_n5,
        axes_precomputed,
    ),
    "axes of length one": (
        ones_hdf5, ones_imagej, ones_ome_tiff, PLANE, ones_nifti, ones_mrc, ones_npy, ones_zarr, ones_ome_zarr, ones_n5,
        ones_precomputed,
    ),
    "voxel size and unit": (
        size_hdf5, size_imagej, size_ome_tiff, PRINTER, size_nifti, size_mrc, NO_SIZE, size_zarr, size_ome_zarr,
        size_n5, size_precomputed,
    ),
    "unknown unit": (
        unknown_hdf5, unknown_imagej, unknown_ome_tiff, PRINTER, LISTED, ALWAYS, NO_SIZE, unknown_zarr,
        unknown_ome_zarr, unknown_n5, ALWAYS,
    ),
    "uncalibrated": (
        bare_hdf5, bare_imagej, bare_ome_tiff, PRINTER, bare_nifti, bare_mrc, NO_SIZE, bare_zarr, bare_ome_zarr,
        bare_n5, REQUIRED,
    ),
    "origin": (
        origin_hdf5, origin_imagej, STAGE, PRINTER, FRAME, FRAME, NO_SIZE, origin_zarr, origin_ome_zarr, origin_n5,
        origin_precomputed,
    ),
    "signedness": (sign_hdf5, TYPE, TYPE, TYPE, TYPE, sign_mrc, TYPE, TYPE, TYPE, TYPE, TYPE),
    "contradiction": (
        against_hdf5, ONCE, ONCE, ONCE, ONCE, against_mrc, ONCE, against_zarr, against_ome_zarr, against_n5, ONCE,
    ),
    "missing part": (
        missing_hdf5, missing_tiff, missing_ome_tiff, missing_images, missing_nifti, ALONE, ALONE, missing_zarr,
        missing_ome_zarr, FILL, missing_precomputed,
    ),
    "cut short while open": (
        cut_hdf5, cut_file(imagej, "a.tif"), cut_file(ome_tiff, "a.ome.tif"), cut_images, cut_file(nii, "a.nii"),
        cut_file(mrc, "a.mrc"), cut_file(npy, "a.npy"), cut_chunk(zarr_array, "a.zarr", "0.0.0"),
        cut_chunk(ome_zarr, "a.zarr", "0/c/0/0/0"), cut_chunk(n5, "a.n5", "0/0/0"),
        cut_chunk(precomputed, "em", "4_5_40/0-8_0-8_0-5"),
    ),
    "identity": (
        same_hdf5, same_file(imagej, "a.tif"), same_file(ome_tiff, "a.ome.tif"),
        same_folder(pngs, "stack", "section_0.png", "section_4.png"), same_file(nii, "a.nii"), same_file(mrc, "a.mrc"),
        same_file(npy, "a.npy"), same_folder(zarr_array, "a.zarr", ".zarray", "0.1.1"), same_ome_zarr, same_n5,
        same_folder(precomputed, "em", "info", "4_5_40/0-8_0-8_0-5"),
    ),
}  # fmt: skip
MATRIX: dict[str, dict[str, Cell]] = {fact: dict(zip(FORMATS, cells, strict=True)) for fact, cells in _ROWS.items()}
