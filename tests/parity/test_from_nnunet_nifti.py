"""``from-nnunet`` on NIfTI beside the real ``nnUNetv2_predict``, with each of nnU-Net's readers."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from connectomics.cli import main

import oracle
from nnunet_models import make_model
from parity_table import ParityCase, patch_of, scene, train
from small_jobs import quick_folder

SHARE = 1e-4  # labels that may differ from stock nnU-Net, which adds windows up in half precision
SHARE_EXACT = 1e-5  # ... and from nnU-Net in float32, with its own statistics
READERS = ("SimpleITKIO", "NibabelIO", "NibabelIOWithReorient")
FLAT = "flat"  # stands for SimpleITKIO with the 2D model
PLAN = (2.0, 1.0, 1.0)
AFFINES = {  # stored axes are x, y, z
    "plain": np.diag([1.0, 1.0, 2.0, 1.0]),
    "flipped": np.array([[-1.2, 0, 0, 9.5], [0, -0.9, 0, -4], [0, 0, 2.6, 1.25], [0, 0, 0, 1.0]]),
    "turned": np.array([[0, 1.1, 0, 5], [0, 0, -1.7, 1], [0.9, 0, 0, 0], [0, 0, 0, 1.0]]),
    "thick": np.array([[1.0, 0, 0, 0], [0, -1.0, 0, 3], [0, 0, 3.6, 0], [0, 0, 0, 1.0]]),
}


def _model(folder: Path, dimensions: int) -> Path:
    case = ParityCase(dimensions, "plain", 2, "whole", False, "ZScoreNormalization", "uint8")
    return make_model(
        folder,
        dimensions=dimensions,
        channels=2,
        classes=3,
        patch=patch_of(case),
        reader="SimpleITKIO",
        spacing=PLAN[-dimensions:],
        give_weights=functools.partial(train, case=case),
    )


def _models(folder: Path) -> None:
    """A 3D model, its dataset read by each reader, and a 2D one."""
    shutil.copytree(_model(folder / "made", 2), folder / FLAT)
    made = _model(folder / "made", 3)
    for reader in READERS:
        shutil.copytree(made, folder / reader)
        plans = json.loads((made / "plans.json").read_text()) | {"image_reader_writer": reader}
        (folder / reader / "plans.json").write_text(json.dumps(plans))


def _images(folder: Path) -> None:
    for kind in ("images", f"images_{FLAT}"):
        (folder / kind).mkdir()
    for channel, image in enumerate(scene(2, (1, 60, 71), 9)[0]):
        stored = nibabel.Nifti1Image((250 * image[0].T).astype(np.uint8), AFFINES["flipped"])
        nibabel.save(stored, folder / f"images_{FLAT}" / f"section_{channel:04d}.nii.gz")
    for seed, (name, affine) in enumerate(AFFINES.items()):
        extent = (17, 34, 36) if name == "thick" else (20 + seed, 34, 36)
        for channel, image in enumerate(scene(2, extent, seed)[0]):
            stored = nibabel.Nifti1Image((250 * image.transpose(2, 1, 0)).astype(np.uint8), affine)
            nibabel.save(stored, folder / "images" / f"{name}_{channel:04d}.nii.gz")
    for path in (folder / "images").glob("flipped_*"):
        shutil.copy(path, folder / f"images_{FLAT}")


def words(world: Path, reader: str, output: str, *more: str) -> list[str]:
    images = f"images_{FLAT}" if reader == FLAT else "images"
    place = ["-i", str(world / images), "-o", str(world / output), "-m", str(world / reader), "-f", "0"]
    return [*place, "-device", "cpu", "--disable_tta", *more]


@pytest.fixture(scope="module")
def world() -> Iterator[Path]:
    with quick_folder() as folder:
        _models(folder)
        _images(folder)
        for reader, output in ((READERS[0], "stock"), *((reader, f"theirs_{reader}") for reader in (*READERS, FLAT))):
            entry, exact = "predict_entry_point_modelfolder", output != "stock"
            oracle.command(words(folder, reader, output), entry=entry, exact=exact)
        yield folder


def ours(world: Path, reader: str, output: str, *more: str) -> int:
    return main(["from-nnunet", *words(world, reader, output, *more), "system.num_cpus=1"])


def assert_same_frame(ours: Path, theirs: Path) -> None:
    a, b = (nibabel.load(path) for path in (ours, theirs))
    np.testing.assert_array_equal(a.affine, b.affine)
    assert a.header.binaryblock == b.header.binaryblock
    a, b = (SimpleITK.ReadImage(str(path)) for path in (ours, theirs))
    for stated in ("GetSpacing", "GetOrigin", "GetDirection", "GetSize", "GetPixelID"):
        assert getattr(a, stated)() == getattr(b, stated)()


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


@pytest.mark.parametrize("reader", [*READERS, FLAT])
def test_the_same_files_with_each_reader(world: Path, reader: str) -> None:
    assert ours(world, reader, f"ours_{reader}") == 0
    total = differ = 0
    names = sorted(path.name for path in (world / f"theirs_{reader}").glob("*.nii.gz"))
    assert len(names) == (2 if reader == FLAT else 4)
    for name in names:
        theirs, mine = world / f"theirs_{reader}" / name, world / f"ours_{reader}" / name
        assert_same_frame(mine, theirs)
        expected = voxels(theirs)
        assert len(np.unique(expected)) == 3
        differ += int((expected != voxels(mine)).sum())
        total += expected.size
    assert differ <= SHARE_EXACT * total
    listed = {path.name for path in (world / f"ours_{reader}").iterdir()} - {"connectomics"}
    theirs_listed = {path.name for path in (world / f"theirs_{reader}").iterdir()}
    assert listed == theirs_listed - {"predict_from_raw_data_args.json"}


def test_stock_nnunet_agrees_and_the_readers_differ(world: Path) -> None:
    """The second half says that the comparison above can fail: turned axes give other labels."""
    assert ours(world, READERS[0], "ours_SimpleITKIO", "--continue_prediction") == 0
    pairs = [
        (voxels(world / "stock" / f"{n}.nii.gz"), voxels(world / "ours_SimpleITKIO" / f"{n}.nii.gz")) for n in AFFINES
    ]
    assert sum(int((a != b).sum()) for a, b in pairs) <= SHARE * sum(a.size for a, _ in pairs)
    a, b = (voxels(world / f"theirs_{reader}" / "turned.nii.gz") for reader in READERS[1:])
    assert (a != b).mean() > 10 * SHARE


def test_parts_and_finished_cases(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader, output = "NibabelIOWithReorient", world / "parts"
    assert ours(world, reader, "parts", "-num_parts", "2", "-part_id", "1") == 0
    assert {path.name for path in output.glob("*.nii.gz")} == {"plain.nii.gz", "turned.nii.gz"}
    (output / "plain.nii.gz").write_bytes(b"made by another program")
    capsys.readouterr()
    assert ours(world, reader, "parts", "--continue_prediction") == 0
    assert "done          2\nskipped       2" in capsys.readouterr().out
    assert (output / "plain.nii.gz").read_bytes() == b"made by another program"


def test_a_bad_case_leaves_the_others_be(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = world / "some"
    images.mkdir()
    for name in ("flipped_0000", "flipped_0001", "turned_0000"):
        shutil.copy(world / "images" / f"{name}.nii.gz", images)
    for channel in (0, 1):
        (images / f"broken_{channel:04d}.nii.gz").write_bytes(b"no NIfTI")
    stated = words(world, "NibabelIO", "some_out")
    stated[1] = str(images)
    assert main(["from-nnunet", *stated, "system.num_cpus=1"]) == 3
    said = capsys.readouterr().out
    assert "done          1\nskipped       0\nfailed        2" in said
    assert "nnU-Net's NibabelIO cannot read it" in said
    assert "has 1 channels, the model expects 2" in said
