"""What other libraries say of a stored volume: voxels, voxel size, origin; for ``check_real_files.py``.

Nothing of ``connectomics`` is imported, so that the two can disagree. Each library is imported where it is needed.
Every reader takes a path, the part inside it or None, and the letters of the stored axes where the list states them.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Triple = tuple[float, float, float]

PICOMETRES = {
    "pm": 1, "picometer": 1, "picometre": 1,
    "å": 100, "angstrom": 100,
    "nm": 1_000, "nanometer": 1_000, "nanometre": 1_000,
    "um": 10**6, "micron": 10**6, "micrometer": 10**6, "micrometre": 10**6,
    "mm": 10**9, "millimeter": 10**9, "millimetre": 10**9,
    "cm": 10**10, "centimeter": 10**10, "inch": 254 * 10**8,
    "m": 10**12, "meter": 10**12, "metre": 10**12,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reading:
    """What a library says of a volume.

    Parameters
    ----------
    voxels
        (c, z, y, x).
    voxel_size_nm
        (z, y, x), or None where the file does not state all three with a unit that is a length.
    origin_nm
        Centre of the first voxel (z, y, x), or None where the format has no position along its own axes.
    spacing
        (z, y, x) without a unit, as nnU-Net's reader of the format states it, or None where it states none.
    """

    voxels: Array
    voxel_size_nm: Triple | None = None
    origin_nm: Triple | None = None
    spacing: Triple | None = None


def nanometres(unit: object) -> float:
    """Nanometres in a unit; not a number where it is no length."""
    plain = str(unit).strip().lower()
    plain = re.sub(r"\\u(00b5|03bc)|\u00b5|\u03bc", "u", plain)
    return PICOMETRES.get(plain, PICOMETRES.get(plain.removesuffix("s"), math.nan)) / 1000


def triple(values: Sequence[float]) -> Triple | None:
    """Three positive lengths, or None."""
    z, y, x = (float(value) for value in values)
    return (z, y, x) if all(math.isfinite(v) and v > 0 for v in (z, y, x)) else None


def arranged(array: Array, letters: str) -> Array:
    """The array as (c, z, y, x); axes of other letters must have length 1.

    Raises
    ------
    ValueError
        If one has not.
    """
    if len(letters) != array.ndim:
        raise ValueError(f"the axes {letters!r} do not fit the shape {array.shape}")
    for at in reversed([i for i, letter in enumerate(letters) if letter not in "czyx"]):
        if array.shape[at] != 1:
            raise ValueError(f"an axis {letters[at]!r} of length {array.shape[at]}")
        array, letters = array.take(0, axis=at), letters[:at] + letters[at + 1 :]
    present = [letter for letter in "czyx" if letter in letters]
    array = array.transpose([letters.index(letter) for letter in present])
    for at, letter in enumerate("czyx"):
        array = array if letter in present else np.expand_dims(array, at)
    return array.astype(np.uint8) if array.dtype == bool else array


def read_mrc(path: Path, inner: str | None, axes: str | None) -> Reading:
    """By mrcfile; the cell is in angstrom."""
    import mrcfile

    with mrcfile.open(path, permissive=True) as file:
        order = [int(file.header[name]) for name in ("maps", "mapr", "mapc")]
        letters = "".join("xyz"[i - 1] for i in order) if sorted(order) == [1, 2, 3] else "zyx"
        size = [float(file.voxel_size[letter]) / 10 for letter in "zyx"]
        return Reading(arranged(np.array(file.data), letters[3 - file.data.ndim :]), triple(size))


def read_tiff(path: Path, inner: str | None, axes: str | None) -> Reading:
    """By tifffile; pages of no stated meaning are sections."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        series = file.series[int(inner or 0)]
        letters = series.axes.translate(str.maketrans("QISC", "zzcc")).lower()
        voxels = arranged(series.asarray(), letters)
        grey = series.keyframe.photometric == 2 and voxels.shape[0] == 3 and (voxels == voxels[:1]).all()
        voxels = voxels[:1] if grey else voxels  # grey that was saved as colour
        if file.is_ome:
            return Reading(voxels, _ome_size(tifffile.xml2dict(file.ome_metadata)))
        return Reading(voxels, _imagej_size(file) if file.is_imagej else None)


def _ome_size(metadata: dict[str, Any]) -> Triple | None:
    image = metadata["OME"]["Image"]
    pixels = (image[0] if isinstance(image, list) else image)["Pixels"]
    return triple(
        [
            pixels.get(f"PhysicalSize{axis}", math.nan) * nanometres(pixels.get(f"PhysicalSize{axis}Unit", "um"))
            for axis in "ZYX"
        ]
    )


def _imagej_size(file: Any) -> Triple | None:
    """ImageJ counts pixels a unit; rows and sections have units of their own, where ``yunit`` and ``zunit`` stand."""
    stated, tags = file.imagej_metadata, file.pages[0].tags
    z, y, x = (nanometres(stated.get(key, stated.get("unit", ""))) for key in ("zunit", "yunit", "unit"))
    above, below = zip(
        *(tags[f"{a}Resolution"].value if f"{a}Resolution" in tags else (0, 1) for a in "YX"), strict=True
    )
    rows, columns = (b / a if a else math.nan for a, b in zip(above, below, strict=True))
    return triple([abs(stated.get("spacing", math.nan)) * z, rows * y, columns * x])


def read_image(path: Path, inner: str | None, axes: str | None) -> Reading:
    """By scikit-image as nnU-Net does: an image, or a folder of sections in the order of the numbers in their names."""
    if path.is_dir():
        files = sorted(path.iterdir(), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
        return Reading(np.concatenate([read_image(file, None, None).voxels for file in files], axis=1))
    import skimage.io

    pixels = skimage.io.imread(path)
    if pixels.ndim == 3 and pixels.shape[2] == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]  # grey that was saved as colour
    return Reading(arranged(pixels, "yxc"[: pixels.ndim]))


def read_hdf5(path: Path, inner: str | None, axes: str | None) -> Reading:
    """By h5py; axes by ilastik's ``axistags``, sizes by ``element_size_um``; BigDataViewer's and Imaris' by layout."""
    import h5py

    with h5py.File(path, "r") as file:
        if path.suffix == ".ims":
            return _imaris(file)
        names: list[str] = []
        file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
        dataset = file[inner or names[0]]
        letters = axes or {2: "yx", 3: "zyx", 4: "czyx"}.get(dataset.ndim, "?" * dataset.ndim)
        if "axistags" in dataset.attrs:
            letters = "".join(axis["key"] for axis in json.loads(dataset.attrs["axistags"])["axes"])
        voxels = dataset[()]
        if re.fullmatch(r"/t\d{5}/s\d{2}/\d+/cells", dataset.name):
            voxels = voxels.view(np.uint16)
        size = dataset.attrs.get("element_size_um")
        stated = None if size is None else triple([float(n) * 1000 for n in size])
        return Reading(arranged(voxels, letters), stated)


def _imaris(file: Any) -> Reading:
    """Imaris states the edges of the box, in micrometres where no unit is named, and pads the arrays."""
    stated = {key: b"".join(value).decode() for key, value in file["DataSetInfo/Image"].attrs.items()}
    level = file["DataSet/ResolutionLevel 0/TimePoint 0"]
    channels = [level[name] for name in sorted(level, key=lambda name: int(name.split()[-1]))]
    sizes = [int(b"".join(channels[0].attrs[f"ImageSize{axis}"])) for axis in "ZYX"]
    voxels = np.stack([channel["Data"][: sizes[0], : sizes[1], : sizes[2]] for channel in channels])
    edges = [float(stated[f"ExtMax{i}"]) - float(stated[f"ExtMin{i}"]) for i in (2, 1, 0)]
    unit = nanometres(stated.get("Unit", "um"))
    return Reading(voxels, triple([edge / n * unit for edge, n in zip(edges, sizes, strict=True)]))


def read_zarr(path: Path, inner: str | None, axes: str | None) -> Reading:
    """By zarr-python; axes, sizes and origin by OME's multiscales. A zip file is read through its store."""
    import zarr

    node = zarr.open(zarr.storage.ZipStore(path) if path.suffix == ".zip" else path / (inner or ""), mode="r")
    if isinstance(node, zarr.Array):
        names = getattr(node.metadata, "dimension_names", None) or node.attrs.get("_ARRAY_DIMENSIONS")
        default = axes or {2: "yx", 3: "zyx", 4: "czyx"}[node.ndim]
        return Reading(arranged(node[...], "".join(names) if names and all(names) else default))
    stated = node.attrs.get("ome", node.attrs).get("multiscales")
    if stated is None:  # bioformats2raw's root, whose images are numbered
        node = node["0"]
        stated = node.attrs.get("ome", node.attrs)["multiscales"]
    multiscale = stated[0]
    dataset = multiscale["datasets"][0]
    named = multiscale.get("axes") or multiscale.get("coordinateSystems", [{}])[0].get("axes") or list("tczyx")
    named = [{"name": axis} if isinstance(axis, str) else axis for axis in named]
    voxels = arranged(node[dataset["path"]][...], "".join(axis["name"].lower() for axis in named))
    return Reading(voxels, *_ome_frame(named, [dataset, multiscale]))


def _ome_frame(axes: list[dict[str, Any]], holders: list[dict[str, Any]]) -> tuple[Triple | None, Triple | None]:
    scale, shift = np.ones(len(axes)), np.zeros(len(axes))
    steps = [step for holder in holders for step in holder.get("coordinateTransformations", [])]
    while steps:
        step = steps.pop(0)
        if step["type"] == "sequence":
            steps = step["transformations"] + steps
        elif step["type"] == "scale":
            scale, shift = scale * step["scale"], shift * step["scale"]
        elif step["type"] == "translation":
            shift = shift + step["translation"]
        elif step["type"] != "identity":
            raise ValueError(f"a coordinate transformation of type {step['type']}")
    unit = {axis["name"].lower(): nanometres(axis.get("unit")) for axis in axes}
    at = {axis["name"].lower(): i for i, axis in enumerate(axes)}
    if not set("zyx") <= set(at):
        return None, None
    size = triple([scale[at[letter]] * unit[letter] for letter in "zyx"])
    z, y, x = (float(shift[at[letter]] * unit[letter]) for letter in "zyx")
    return size, ((z, y, x) if size else None)


def read_n5(path: Path, inner: str | None, axes: str | None) -> Reading:
    """By z5py, which turns N5's order round; sizes as cosem, n5-viewer and Paintera write them."""
    import z5py

    with tempfile.TemporaryDirectory() as folder:  # z5py wants a container above the array
        Path(folder, "attributes.json").write_text('{"n5": "2.0.0"}')
        Path(folder, "volume").symlink_to(path.resolve(), target_is_directory=True)
        file = z5py.File(folder, "r", use_zarr_format=False)
        name = f"volume/{inner}" if inner else "volume"
        if isinstance(file[name], z5py.Group):
            name = f"{name}/s0"
        stated = _n5_attributes(Path(folder, name))
        above = _n5_attributes(Path(folder, name).parent)
        if stated.get("isLabelMultiset"):
            raise ValueError("a label multiset")
        array = file[name][...]
    voxels = arranged(array, axes[::-1] if axes else "czyx"[4 - array.ndim :])
    if "transform" in stated:
        return Reading(voxels, *_n5_transform(stated["transform"]))
    if "pixelResolution" not in stated and "resolution" not in stated:
        stated = {"downsamplingFactors": stated.get("downsamplingFactors", [1, 1, 1])} | above
    return Reading(voxels, *_n5_viewer(stated))


def _n5_attributes(folder: Path) -> dict[str, Any]:
    path = folder / "attributes.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def _n5_viewer(stated: dict[str, Any]) -> tuple[Triple | None, Triple | None]:
    """``pixelResolution`` with its unit, or Paintera's and cosem's ``resolution``, which is in nanometres."""
    pixel = stated.get("pixelResolution")
    if isinstance(pixel, list):
        return None, None
    sizes = pixel["dimensions"] if pixel else stated.get("resolution", [])
    if len(sizes) != 3:
        return None, None
    units = [pixel["unit"]] * 3 if pixel else stated.get("units", ["nm"] * 3)
    factors, offset = stated.get("downsamplingFactors", [1, 1, 1]), stated.get("offset", [0, 0, 0])
    z, y, x = (float(offset[i]) * nanometres(units[i]) for i in (2, 1, 0))
    size = triple([sizes[i] * factors[i] * nanometres(units[i]) for i in (2, 1, 0)])
    return size, (z, y, x) if size and factors == [1, 1, 1] else None


def _n5_transform(stated: dict[str, Any]) -> tuple[Triple | None, Triple | None]:
    at = {axis: i for i, axis in enumerate(stated["axes"])}
    factor = [nanometres(unit) for unit in stated["units"]]
    z, y, x = (float(stated["translate"][at[a]] * factor[at[a]]) for a in "zyx")
    return triple([stated["scale"][at[a]] * factor[at[a]] for a in "zyx"]), (z, y, x)


def read_nifti(path: Path, inner: str | None, axes: str | None) -> Reading:
    """By nibabel; axes are x, y, z and channels. The spacing of ``.nii.gz`` is SimpleITK's, in millimetres."""
    import nibabel

    image = nibabel.load(path)
    voxels = np.asanyarray(image.dataobj)
    if image.dataobj.slope != 1 or image.dataobj.inter != 0:
        voxels = voxels.astype(np.float32)
    zooms = [float(zoom) for zoom in image.header.get_zooms()[:3]]
    unit = nanometres(image.header.get_xyzt_units()[0])
    if len(zooms) < 3:
        return Reading(arranged(voxels, "xy"))
    spacing = triple(zooms[::-1])
    if (
        path.name.endswith(".gz")
        and isinstance(image, nibabel.Nifti1Image)
        and not isinstance(image, nibabel.Nifti2Image)
    ):
        import SimpleITK

        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        spacing = triple(reader.GetSpacing()[2::-1])
    return Reading(arranged(voxels, "xyzc"[: voxels.ndim]), triple([z * unit for z in zooms[::-1]]), spacing=spacing)


def read_nrrd(path: Path, inner: str | None, axes: str | None) -> Reading:
    """By pynrrd; axes are counted from the fastest, and those that are no space are channels."""
    import nrrd

    voxels, header = nrrd.read(str(path), index_order="C")
    rows = header.get("space directions")
    known = [True] * voxels.ndim if rows is None else [bool(np.isfinite(row).all()) for row in rows]
    kinds = [str(kind).lower() for kind in header.get("kinds", ["space" if finite else "list" for finite in known])]
    letters = "".join({"domain": "s", "space": "s", "time": "t"}.get(kind, "c") for kind in kinds)[::-1]
    for letter in "zyx"[max(0, 3 - letters.count("s")) :]:
        letters = letters.replace("s", letter, 1)
    if rows is not None:
        lengths = [float(np.linalg.norm(row)) for row in rows if np.isfinite(row).all()]
        units = header.get("space units", [""] * 3)
    else:
        lengths = [float(n) for n in header.get("spacings", [])][:3]
        units = header.get("units", [""] * 3)[:3]
    if len(lengths) < 3:
        return Reading(arranged(voxels, letters))
    size = triple([length * nanometres(unit) for length, unit in zip(lengths[::-1], units[::-1], strict=True)])
    return Reading(arranged(voxels, letters), size, spacing=triple(lengths[::-1]))


def read_itk(path: Path, inner: str | None, axes: str | None) -> Reading:
    """By SimpleITK; the format has no unit."""
    import SimpleITK

    image = SimpleITK.ReadImage(str(path))
    voxels = SimpleITK.GetArrayFromImage(image)
    letters = "zyx"[3 - image.GetDimension() :] + ("c" if image.GetNumberOfComponentsPerPixel() > 1 else "")
    spacing = triple(image.GetSpacing()[::-1]) if image.GetDimension() == 3 else None
    return Reading(arranged(voxels, letters), spacing=spacing)


def read_precomputed(path: Path, inner: str | None, axes: str | None) -> Reading:
    """By CloudVolume."""
    import cloudvolume

    volume = cloudvolume.CloudVolume(f"precomputed://file://{path.resolve()}", mip=int(inner or 0), progress=False)
    x, y, z = (float(n) for n in volume.resolution)
    i, j, k = (float(n) for n in volume.voxel_offset)
    return Reading(arranged(np.asarray(volume[:]), "xyzc"), triple([z, y, x]), (k * z, j * y, i * x))


def read_dm(path: Path, inner: str | None, axes: str | None) -> Reading:
    """By ncempy; sizes stand in the order of the axes."""
    from ncempy.io import dm

    stated = dm.dmReader(str(path))
    voxels = stated["data"]
    size = [n * nanometres(unit) for n, unit in zip(stated["pixelSize"], stated["pixelUnit"], strict=True)]
    return Reading(arranged(voxels, {2: "yx", 3: "zyx"}[voxels.ndim]), triple(size) if len(size) == 3 else None)


def read_wkw(path: Path, inner: str | None, axes: str | None) -> Reading:
    """By wkw; WEBKNOSSOS keeps the box and the voxel size in a file two folders above the magnification."""
    import wkw

    stated = json.loads((path.parent.parent / "datasource-properties.json").read_text())
    layer = next(layer for layer in stated["dataLayers"] if layer["name"] == path.parent.name)
    box, scale = layer["boundingBox"], stated["scale"]
    x, y, z = (float(n) for n in (scale["factor"] if isinstance(scale, dict) else scale))
    start, shape = box["topLeft"], (box["width"], box["height"], box["depth"])
    with wkw.Dataset.open(str(path)) as dataset:
        return Reading(arranged(dataset.read(start, shape), "cxyz"), triple([z, y, x]))


def read_npy(path: Path, inner: str | None, axes: str | None) -> Reading:
    """By numpy."""
    array = np.load(path)
    return Reading(arranged(array, "czyx"[4 - array.ndim :]))


READERS: dict[str, Callable[[Path, str | None, str | None], Reading]] = {
    "mrcfile": read_mrc,
    "tifffile": read_tiff,
    "scikit-image": read_image,
    "h5py": read_hdf5,
    "zarr": read_zarr,
    "z5py": read_n5,
    "nibabel": read_nifti,
    "pynrrd": read_nrrd,
    "SimpleITK": read_itk,
    "cloudvolume": read_precomputed,
    "ncempy": read_dm,
    "wkw": read_wkw,
    "numpy": read_npy,
}
"""By the name of the library."""
