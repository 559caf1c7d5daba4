"""NIfTI frames and label files beside nnunetv2's own readers: the same voxels, spacing and bytes."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from connectomics.core.errors import OutputError, VolumeError
from connectomics.core.geometry import Box
from connectomics.volumes.nnunet.folder import FileKind, list_cases, write_labels
from connectomics.volumes.nnunet.nifti import frame_of, header_of, holds
from connectomics.volumes.opening import open_volume

from small_jobs import write_h5

RNG = np.random.default_rng(4)
READERS = {"SimpleITKIO": SimpleITKIO, "NibabelIO": NibabelIO, "NibabelIOWithReorient": NibabelIOWithReorient}
PLAIN = np.diag([1.1, 2.2, 3.3, 1.0])
C, S = np.cos(0.4), np.sin(0.4)
AFFINES = {
    "plain": PLAIN,
    "flipped": np.array([[-1.1, 0, 0, 9.5], [0, -2.2, 0, -4], [0, 0, 3.3, 1.25], [0, 0, 0, 1.0]]),
    "turned": np.array([[0, 0, -3.3, 5], [2.2, 0, 0, 1], [0, -1.1, 0, 0], [0, 0, 0, 1.0]]),
    "cycled": np.array([[0, 2.2, 0, 5], [0, 0, -3.3, 1], [1.1, 0, 0, 0], [0, 0, 0, 1.0]]),
    "oblique": np.array([[C, -2 * S, 0, 3], [S, 2 * C, 0, -7], [0, 0, -3.3, 2], [0, 0, 0, 1.0]]),
}


def written(
    path: Path, affine: np.ndarray = PLAIN, shape: tuple[int, ...] = (7, 6, 5), unit: str | None = None, seed: int = 0
) -> Path:
    path.parent.mkdir(exist_ok=True)
    image = nibabel.Nifti1Image(np.random.default_rng(seed).integers(0, 90, shape).astype(np.int16), affine)
    if unit:
        image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    return path


def plain(path: Path) -> bytes:
    return gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()


def assert_same_labels(folder: Path, reader: str, ending: str, largest: int = 2) -> None:
    """Both read the image in ``folder``, and write the same labels for it."""
    kind = FileKind(reader, ending)
    (source,) = list_cases(folder, kind)
    path = folder / f"a_0000{ending}"
    theirs: Any = READERS[reader]()
    expected, properties = theirs.read_images([str(path)])
    volume = open_volume(source.uris[0])
    np.testing.assert_array_equal(volume.read(Box.of_shape(volume.info.extent)), expected)
    if reader == "NibabelIOWithReorient":
        assert volume.info.spacing == pytest.approx(properties["spacing"], rel=1e-6)
    volume.close()
    frame = frame_of(path, reader)
    assert frame.spacing == tuple(float(value) for value in properties["spacing"])
    labels = RNG.integers(0, largest, expected.shape[1:]).astype(np.uint16)
    labels[0, 0, 0] = largest
    kept = open_volume(str(write_h5(folder.parent / "labels.h5", labels)))
    write_labels(kept, folder.parent / f"ours{ending}", kind, frame)
    kept.close()
    theirs.write_seg(labels, str(folder.parent / f"theirs{ending}"), properties)
    assert plain(folder.parent / f"ours{ending}") == plain(folder.parent / f"theirs{ending}")


@pytest.mark.parametrize("affine", list(AFFINES))
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("reader", list(READERS))
def test_files_are_those_of_each_reader(tmp_path: Path, reader: str, ending: str, affine: str) -> None:
    written(tmp_path / "in" / f"a_0000{ending}", AFFINES[affine])
    assert_same_labels(tmp_path / "in", reader, ending)


@pytest.mark.parametrize("unit", ["micron", "meter", "mm"])
@pytest.mark.parametrize("reader", list(READERS))
def test_units_are_taken_as_each_reader_takes_them(tmp_path: Path, reader: str, unit: str) -> None:
    written(tmp_path / "in" / "a_0000.nii.gz", AFFINES["turned"], unit=unit)
    assert_same_labels(tmp_path / "in", reader, ".nii.gz")


@pytest.mark.parametrize("largest", [254, 255])
@pytest.mark.parametrize("shape", [(7, 6, 1), (7, 1, 5), (70, 60, 50)])
@pytest.mark.parametrize("reader", list(READERS))
def test_thin_images_and_many_labels(
    tmp_path: Path, reader: str, shape: tuple[int, ...], largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("connectomics.volumes.nnunet.folder.SLAB_BYTES", 4000)
    written(tmp_path / "in" / "a_0000.nii.gz", AFFINES["flipped"], shape)
    assert_same_labels(tmp_path / "in", reader, ".nii.gz", largest)


def test_one_section_of_two_axes_as_simpleitk_has_it(tmp_path: Path) -> None:
    written(tmp_path / "in" / "a_0000.nii.gz", shape=(7, 6))
    assert_same_labels(tmp_path / "in", "SimpleITKIO", ".nii.gz")


@pytest.mark.parametrize(
    ("reader", "shape", "said"),
    [
        ("SimpleITKIO", (7, 6, 5, 2), "has 4 axes, and nnU-Net's SimpleITKIO writes labels of 2 or 3"),
        ("NibabelIO", (7, 6), "has 2 axes, and nnU-Net's NibabelIO reads 3"),
        ("NibabelIOWithReorient", (7, 6, 5, 2), "has 4 axes"),
    ],
)
def test_axes_that_nnunet_cannot_label(tmp_path: Path, reader: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(VolumeError, match=said):
        frame_of(written(tmp_path / "a_0000.nii.gz", shape=shape), reader)


def test_headers_that_cannot_be_read(tmp_path: Path) -> None:
    skewed = written(tmp_path / "skewed.nii", np.array([[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
    with pytest.raises(VolumeError, match=r"skewed\.nii: nnU-Net's SimpleITKIO cannot read it: .*orthonormal"):
        frame_of(skewed, "SimpleITKIO")
    (tmp_path / "broken.nii.gz").write_bytes(b"no NIfTI")
    odd = written(tmp_path / "odd.nii")
    content = bytearray(odd.read_bytes())
    content[70:72] = b"\x4d\0"  # the type of the voxels
    odd.write_bytes(content)
    for reader in READERS:
        with pytest.raises(VolumeError, match=r"odd\.nii: nnU-Net's .* cannot read it: \S"):
            frame_of(odd, reader)
        with pytest.raises(VolumeError, match=r"broken\.nii\.gz: nnU-Net's .* cannot read it: \S"):
            frame_of(tmp_path / "broken.nii.gz", reader)


def test_what_does_not_fit(tmp_path: Path) -> None:
    frame = frame_of(written(tmp_path / "a.nii"), "NibabelIO")
    with pytest.raises(OutputError, match="holds 32767 voxels along an axis"):
        header_of(frame, (1, 2, 40000), np.dtype(np.uint8))


@pytest.mark.parametrize(
    "change", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b[:-1] + b"x", lambda b: b"x" + b[1:]]
)
def test_a_file_that_reads_back_otherwise_is_seen(tmp_path: Path, change: Any) -> None:
    labels = np.ones((2, 3, 4), np.uint8)
    path = tmp_path / "a.nii"
    path.write_bytes(b"header" + labels.tobytes())
    assert holds(path, b"header", [labels], packed=False)
    path.write_bytes(change(b"header" + labels.tobytes()))
    assert not holds(path, b"header", [labels], packed=False)
