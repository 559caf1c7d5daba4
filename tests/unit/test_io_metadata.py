"""What other programs write in ways of their own: read as they mean it, or refused with a name."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import zarr
from metadata_files import ZYX, h5, n5, ome_zarr

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box
from connectomics.volumes.metadata.units import length_of
from connectomics.volumes.opening import open_volume
from connectomics.volumes.volume import Array, VolumeInfo


def opened(uri: object, **options: Any) -> tuple[VolumeInfo, Array]:
    with contextlib.closing(open_volume(str(uri), **options)) as volume:
        return volume.info, volume.read(Box.of_shape(volume.info.extent))


@pytest.mark.parametrize(
    ("spelling", "length"),
    [
        *(
            (unit, 1e3)
            for unit in ("um", "µm", "μm", "Âµm", r"\u00b5m", r"\u03BCM", "&#181;m", b"\xc2\xb5m", "Microns")
        ),
        *((unit, 1.0) for unit in ("nm", "nanometer", "nanometres")),
        *((unit, 0.1) for unit in ("Å", "angstrom", "Angstroms")),
        *((unit, None) for unit in (None, "", " ", "pixel", "Pixels", "voxel", "none")),
        ("mm", 1e6),
        ("inch", 2.54e7),
        ("m", 1e9),
    ],
)
def test_units_as_programs_spell_them(spelling: object, length: float | None) -> None:
    assert length_of(spelling) == (None if length is None else pytest.approx(length))


@pytest.mark.parametrize("unit", ["furlong", "Mm", "Pm", "second", "counts"])
def test_a_unit_nobody_knows_is_no_number(unit: str) -> None:
    found = length_of(unit)
    assert found is not None and np.isnan(found)


SCALE = {"type": "scale", "scale": [40.0, 5.0, 4.0]}
SHIFT = {"type": "translation", "translation": [400.0, 50.0, 40.0]}


@pytest.mark.parametrize(
    ("step", "size", "origin"),
    [
        ({"type": "identity"}, (1, 1, 1), (0, 0, 0)),
        (SCALE, (40, 5, 4), (0, 0, 0)),
        ({"type": "sequence", "transformations": [SCALE, SHIFT]}, (40, 5, 4), (400, 50, 40)),
        ({"type": "sequence", "transformations": [SHIFT, SCALE]}, (40, 5, 4), (16000, 250, 160)),
        ({"type": "affine", "affine": [[1, 0, 0, 0]] * 3}, "'affine'", None),
        ({"type": "rotation"}, "'rotation'", None),
    ],
)
def test_ome_zarr_of_coordinate_systems(tmp_path: Path, step: Any, size: Any, origin: Any) -> None:
    path = ome_zarr(tmp_path / "a.zarr")
    axes = [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    image = {
        "coordinateSystems": [{"name": "physical", "axes": axes}],
        "datasets": [{"path": "0", "coordinateTransformations": [step | {"input": "0", "output": "physical"}]}],
    }
    zarr.open_group(path).attrs["ome"] = {"version": "0.6.dev1", "multiscales": [image]}
    if isinstance(size, str):
        with pytest.raises(VolumeError, match=f"transformation of type {size}"):
            opened(path)
        return
    info, voxels = opened(path)
    assert info.voxel_size_nm == size and info.origin_nm == origin
    np.testing.assert_array_equal(voxels[0], ZYX)


@pytest.mark.parametrize(("kind", "name"), [("plate", "A/1/0"), ("well", "0")])
def test_plates_are_refused_with_the_name_of_an_image(tmp_path: Path, kind: str, name: str) -> None:
    path = ome_zarr(tmp_path / "p.zarr" / name).parents[len(Path(name).parts) - 1]
    zarr.open_group(path, mode="a", zarr_format=3).attrs["ome"] = {kind: {}}
    with pytest.raises(VolumeError, match=f"plate.*such as p.zarr/{name}"):
        opened(path)
    assert opened(path / name)[0].extent == ZYX.shape


def test_what_java_writes_of_gzip_and_fill_values(tmp_path: Path) -> None:
    array = zarr.create_array(
        tmp_path / "a.zarr",
        data=ZYX,
        chunks=(5, 8, 8),
        zarr_format=2,
    )
    assert array.shape == ZYX.shape
    file = tmp_path / "a.zarr" / ".zarray"
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps(metadata | {"compressor": metadata["compressor"] | {"level": -1}, "fill_value": "0"}))
    np.testing.assert_array_equal(opened(tmp_path / "a.zarr")[1][0], ZYX)


def test_n5_before_2(tmp_path: Path) -> None:
    path = n5(tmp_path / "a.n5")
    file = path / "attributes.json"
    metadata = json.loads(file.read_text())
    del metadata["compression"]
    file.write_text(json.dumps(metadata | {"compressionType": "gzip"}))
    np.testing.assert_array_equal(opened(path)[1][0], ZYX)
    file.write_text(json.dumps(metadata | {"compressionType": "gzip", "isLabelMultiset": True}))
    with pytest.raises(VolumeError, match="label multiset"):
        opened(path)


def test_mrc_without_the_word_map(tmp_path: Path) -> None:
    path = tmp_path / "a.mrc"
    with mrcfile.new(path, ZYX.astype(np.int16)):
        pass
    content = bytearray(path.read_bytes())
    content[208:216] = bytes(8)
    path.write_bytes(content)
    np.testing.assert_array_equal(opened(path)[1][0], ZYX)
    path.write_bytes(content[:-1])
    with pytest.raises(VolumeError, match="lacks the word MAP and promises"):
        opened(path)


def test_parts_that_a_pattern_counts(tmp_path: Path) -> None:
    for z, section in enumerate(ZYX):
        h5(tmp_path / f"p{z}.h5", section)
    path, unlimited = tmp_path / "v.h5", h5py.h5s.UNLIMITED
    with h5py.File(path, "w", libver="latest") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        whole = h5py.h5s.create_simple(ZYX.shape, (unlimited, *ZYX.shape[1:]))
        whole.select_hyperslab((0, 0, 0), (unlimited, 1, 1), (1, 1, 1), (1, *ZYX.shape[1:]))
        plist.set_virtual(whole, b"p%b.h5", b"raw", h5py.h5s.create_simple(ZYX.shape[1:]))
        h5py.h5d.create(file.id, b"main", h5py.h5t.NATIVE_UINT8, whole, plist)
    np.testing.assert_array_equal(opened(path)[1][0], ZYX)
    (tmp_path / "p2.h5").unlink()
    with pytest.raises(VolumeError, match=r"p2\.h5 is absent, while there are p3\.h5"):
        opened(path)


def test_a_stated_axis_of_length_one_is_dropped(tmp_path: Path) -> None:
    h5(tmp_path / "a.h5", np.stack([ZYX, ZYX])[None])
    assert opened(tmp_path / "a.h5", axes="tczyx")[0].shape == (2, *ZYX.shape)
