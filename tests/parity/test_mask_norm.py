"""Plans with ``use_mask_for_norm``: inputs, labels and probabilities are nnU-Net's, however the volume is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from scipy.ndimage import binary_fill_holes

from connectomics.cli import main
from connectomics.core.errors import OutputError
from connectomics.core.geometry import AxisOrder, BlockGrid, Box, Vec3, vec3
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.stage import Workspace
from connectomics.inference.case import CaseInput
from connectomics.inference.resample import ResampledInput
from connectomics.lightning.inference import InferenceManager
from connectomics.stages.decode.context import VOXEL_BYTES
from connectomics.stages.predict.segmenter import Segmenter
from connectomics.stages.survey import mask as masks
from connectomics.stages.survey.mask import make_mask
from connectomics.stages.survey.survey import survey

import oracle
from decoding import in_order
from nnunet_models import make_model
from parity_table import ArrayVolume, scene

WORDS = ["system.device=cpu", "system.num_cpus=1", "inference.output.save_probabilities=true"]
Z, CT = "ZScoreNormalization", "CTNormalization"


@dataclass(frozen=True, slots=True)
class Trial:
    """A model, its channels' flags, and how the image is given."""

    dimensions: int
    masked: tuple[bool, ...]
    by_slice: bool = False
    scheme: tuple[str, ...] = (Z, Z)
    dtype: str = "uint8"
    order: Vec3 = (0, 1, 2)
    spacing: tuple[float, float, float] | None = None

    @property
    def words(self) -> list[str]:
        """Configuration."""
        if self.spacing is None:
            return WORDS
        return [*WORDS, "inference.resample=plan", f"inference.spacing=[{','.join(map(str, self.spacing))}]"]


TRIALS = {
    "3D": Trial(3, (True,)),
    "3D, one channel of two": Trial(3, (False, True), dtype="uint16"),
    "3D, a scheme that does not look": Trial(3, (True, True), scheme=(Z, CT), dtype="float32"),
    "3D transposed": Trial(3, (True, False), order=(1, 2, 0)),
    "2D of a volume": Trial(2, (True, True), dtype="float32"),
    "2D of a volume, transposed": Trial(2, (True,), order=(2, 0, 1)),
    "2D slices": Trial(2, (True,), by_slice=True),
    "2D slices, one channel of two": Trial(2, (True, False), by_slice=True, dtype="float32"),
    "2D slices, transposed": Trial(2, (False, True), by_slice=True, order=(0, 2, 1)),
    "3D resampled": Trial(3, (True,), spacing=(0.7, 1.3, 0.9)),
    "3D thick sections": Trial(3, (True, False), spacing=(5.3, 1.4, 1.4)),
    "2D of a volume, resampled": Trial(2, (False, True), spacing=(2.0, 1.3, 0.8)),
}


def model_of(trial: Trial, folder: Path) -> Path:
    flat = trial.dimensions == 2
    thick = trial.spacing is not None and trial.spacing[0] > 4
    return make_model(
        folder,
        dimensions=trial.dimensions,
        channels=len(trial.masked),
        classes=3,
        patch=(16, 24) if flat else (8, 16, 12),
        reader="NaturalImage2DIO" if trial.by_slice else "SimpleITKIO",
        scheme=trial.scheme[: len(trial.masked)],
        masked=trial.masked,
        spacing=(4.0, 1.0, 1.0) if thick else (1.0,) * trial.dimensions,
        mirror_axes=(0,),
        axis_order=trial.order,
        seed=4,
    )


def image_of(trial: Trial, seed: int = 8) -> np.ndarray:
    """A body of irregular outline with zeros around, a bright section, a section of zeros, and zeros inside.

    Of these the cave is a hole, the pit is open to one side and is none; others are zero in one channel of two.
    """
    extent = (9, 31, 37) if trial.dimensions == 3 else (6, 31, 37)
    top = {"uint8": 200, "uint16": 3000, "float32": 3.0}[trial.dtype]
    image = scene(len(trial.masked), extent, seed)[0] * top
    image[:, 5] = image[:, 5] * 0.3 + top * 0.9  # far above the mean, all of it
    outline = scene(1, extent, seed + 1)[1] > 0
    inner = np.zeros(extent, bool)
    inner[1:, 4:-5, 5:-3] = True
    body = inner | (outline & (np.indices(extent)[0] > 0) & (np.indices(extent)[2] > 2))
    image[:, ~body] = 0
    image[:, 2:4, 8:12, 9:15] = 0  # a cave, in a volume
    image[:, 1:5, 18:21, 20:26] = 0  # a pit: section 0 is zero
    image[:, -2] = 0
    for channel in range(len(image) if len(image) > 1 else 0):
        image[channel, 2:4, 12:16, 20 + 4 * channel : 23 + 4 * channel] = 0
    return image.astype(trial.dtype)


def summaries_of(trial: Trial, case: Any) -> list[Any]:
    """Statistics of the channels that nnU-Net's z-score asks for."""
    return [c for c, scheme in zip(case.channels, trial.scheme, strict=False) if scheme == Z]


def preprocessed(predictor: Any, image: np.ndarray, spacing: tuple[float, ...] | None, summaries: Any) -> np.ndarray:
    """What nnU-Net's network is given of one case, before padding."""
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    properties = {"spacing": list(spacing or oracle.planned_spacing(predictor))}
    with oracle.injected(summaries):
        run = DefaultPreprocessor(verbose=False).run_case_npy
        data: np.ndarray = run(image, None, properties, plans, configuration, predictor.dataset_json)[0]
    return data


@pytest.fixture(scope="module", params=TRIALS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """A trial with its model's folder, our manager, nnU-Net's predictor, the image and its cases."""
    torch.set_num_threads(1)
    trial = TRIALS[request.param]
    model, image = model_of(trial, tmp_path_factory.mktemp("model")), image_of(trial)
    manager = InferenceManager.from_checkpoint(model, trial.words)
    cases = survey(ArrayVolume(image), "image", manager.segmenter().members[0].schemes, by_slice=trial.by_slice)
    return trial, model, manager, oracle.make_predictor(model, ["0"]), image, cases


def test_the_network_is_given_what_nnunets_is(world: tuple[Any, ...]) -> None:
    trial, _, manager, predictor, image, cases = world
    order = AxisOrder(trial.order)
    (member,) = manager.segmenter().members
    for case in cases:
        part = image[(slice(None), *case.region.slices)]
        expected = preprocessed(predictor, part, trial.spacing, summaries_of(trial, case))
        source = CaseInput(case, member.schemes, ArrayVolume(image).read)
        if trial.spacing is None:
            found = source.get(case.box).transpose(order.of_array)
            np.testing.assert_array_equal(found, expected)
        else:
            resampled = ResampledInput(source, member.resampling)
            np.testing.assert_allclose(resampled.get(resampled.box), expected, atol=2e-6)


def test_statistics_are_those_of_the_mask(world: tuple[Any, ...]) -> None:
    trial, _, _, _, image, cases = world
    for case in cases:
        part = image[(slice(None), *case.region.slices)].astype(np.float64)
        mask = binary_fill_holes((part != 0).any(axis=0))
        for c, summary in enumerate(case.channels):
            values = part[c][mask] if trial.masked[c] and trial.scheme[c] == Z else image[c][case.box.slices]
            expected = (values.mean(), values.std(), values.min(), values.max()) if values.size else (0, 0, 0, 0)
            found = (summary.mean, summary.std, summary.minimum, summary.maximum)
            assert found == pytest.approx(expected, rel=1e-6)


def test_labels_and_probabilities_equal_the_oracles(world: tuple[Any, ...]) -> None:
    trial, _, manager, predictor, image, cases = world
    ours = manager.predict(image)
    occurring: set[int] = set()
    for case in cases:
        part = image[(slice(None), *case.region.slices)]
        labels, probabilities = oracle.predict(
            predictor, part, summaries=summaries_of(trial, case), probabilities=True, spacing=trial.spacing
        )
        np.testing.assert_array_equal(ours.labels[case.region.slices], labels)
        found = ours.probabilities[(slice(None), *case.region.slices)]
        assert np.abs(found - probabilities).max() <= 1e-5
        occurring |= set(np.unique(labels))
    assert len(occurring) > 1


@pytest.mark.parametrize(
    "world",
    [
        "3D, one channel of two",
        "2D slices",
        *(pytest.param(f"2D of a volume, {how}", marks=pytest.mark.long) for how in ("transposed", "resampled")),
    ],
    indirect=True,
)
def test_any_blocks_give_the_same_bytes(world: tuple[Any, ...]) -> None:
    _, _, manager, _, image, cases = world
    segmenter, reader = manager.segmenter(), ArrayVolume(image)
    whole = manager.predict(image)
    for shape in ((4, 9, 37), (5, 31, 16)):
        for block in BlockGrid(reader.info.extent, shape):
            arrays = segmenter.segment(reader.read, [cases], block.core)
            assert arrays["labels"][0].tobytes() == whole.labels[block.core.slices].tobytes()
            part = whole.probabilities[(slice(None), *block.core.slices)]
            assert arrays["probabilities"].tobytes() == part.tobytes()


@pytest.mark.parametrize("name", ["3D, one channel of two", "2D slices"])
@pytest.mark.parametrize("chunk", [(1, 5, 7), (4, 31, 10)])
def test_the_mask_does_not_depend_on_the_volumes_chunks(name: str, chunk: Vec3, tmp_path: Path) -> None:
    trial = TRIALS[name]
    image = image_of(trial)
    schemes = InferenceManager.from_checkpoint(model_of(trial, tmp_path), trial.words).segmenter().members[0].schemes
    reader = ArrayVolume(image)
    whole = survey(reader, "image", schemes, by_slice=trial.by_slice)
    again = survey(ArrayVolume(image, chunk), "image", schemes, by_slice=trial.by_slice, workers=2)
    assert [replace(case, mask=None) for case in again] == [replace(case, mask=None) for case in whole]
    for a, b in zip(again, whole, strict=True):
        assert (a.mask is None) == trial.by_slice
        if not trial.by_slice:
            np.testing.assert_array_equal(a.mask(a.box), b.mask(b.box))


class Watched(ArrayVolume):
    """Remembers how many voxels were read at once."""

    most = 0

    def read(self, box: Box) -> np.ndarray:
        self.most = max(self.most, box.voxels)
        return super().read(box)


def filled(mask: np.ndarray, workspace: Workspace | None = None) -> np.ndarray:
    """Our mask of a volume that is not zero where ``mask`` says so; with ``workspace`` one block is read at a time."""
    volume = Watched(mask[None].astype(np.uint8))
    box = Box.of_shape(vec3(mask.shape))
    found = make_mask(volume, box, None, workspace)
    assert workspace is None or volume.most <= workspace.block_bytes // VOXEL_BYTES
    return found(box)[0]


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(bool, st.tuples(*(st.integers(1, 7),) * 3), elements=st.sampled_from([True, True, False])))
def test_holes_are_filled_as_scipy_fills_them(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(filled(mask), binary_fill_holes(mask))


def test_a_winding_way_out_is_followed_from_block_to_block(tmp_path: Path) -> None:
    mask = np.ones((9, 9, 9), bool)
    mask[1:8, 1, 1] = mask[7, 1:4, 1] = mask[2:8, 3, 1] = mask[2, 3:6, 1] = mask[2:8, 5, 1] = False
    opened = mask.copy()
    opened[7, 5, 0] = False
    np.testing.assert_array_equal(binary_fill_holes(opened), opened)
    for name, holed, expected in (("closed", mask, np.ones_like(mask)), ("opened", opened, opened)):
        (tmp_path / name).mkdir()
        workspace = Workspace(tmp_path / name, in_order, 30 * (VOXEL_BYTES + 1))  # of 30 voxels
        np.testing.assert_array_equal(filled(holed, workspace), expected)
        assert len(list((tmp_path / name / "mask.cut").iterdir())) > 20


@pytest.mark.parametrize("shape", [(9, 22, 20), (1, 30, 40), (2, 2, 2), (16, 5, 33)])
def test_a_mask_in_blocks_is_filled_as_scipy_fills_it(shape: Vec3, tmp_path: Path) -> None:
    for seed in range(3):
        random = np.random.default_rng(seed)
        mask = random.random(shape) < 0.7
        mask[-1] |= seed == 1  # the outside is left through some faces only
        expected = binary_fill_holes(mask)
        work = tmp_path / str(seed)
        work.mkdir()
        np.testing.assert_array_equal(filled(mask, Workspace(work, in_order, 600 * VOXEL_BYTES)), expected)
        assert shape[0] < 9 or (expected != mask).any(), "the example must hold holes"


@pytest.mark.parametrize(
    "name", ["2D of a volume, resampled", "2D slices", pytest.param("3D, one channel of two", marks=pytest.mark.long)]
)
def test_volumes_on_disk_get_the_same_labels(name: str, tmp_path: Path) -> None:
    trial = TRIALS[name]
    model, image = model_of(trial, tmp_path / "model"), image_of(trial)
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["main"] = image if len(image) > 1 else image[0]
    axes = ["inference.axes=czyx"] if len(image) > 1 else []
    words = [*trial.words[:2], *trial.words[3:], *axes]
    files = [f"inference.volume_mode.file_list=['{tmp_path}/v.h5']", f"inference.data.output_path={tmp_path}"]
    block = "inference.block_shape=[6,31,20]"
    assert main(["infer-volume", "--checkpoint", str(model), *words, *files, block]) == 0
    with h5py.File(tmp_path / "v_labels.h5") as file:
        np.testing.assert_array_equal(
            file["main"][:], InferenceManager.from_checkpoint(model, trial.words).predict(image).labels
        )
    certificate = ["--certificate", str(tmp_path / "certificate.json"), "--threshold", "1e-3"]
    with oracle.float32_accumulators():
        assert main(["verify", str(model), str(tmp_path / "v.h5"), *words, *certificate]) == 0


def test_the_mask_is_kept_and_a_lost_block_of_it_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is interrupted after the survey; then the same with a block of the mask gone."""
    trial = TRIALS["3D"]
    model, image = model_of(trial, tmp_path / "model"), image_of(trial)
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["main"] = image[0]
    monkeypatch.setattr(masks, "decode_plan", lambda info, budget: BlockPlan((4, 16, 16), (4, 16, 16)))
    files = [f"inference.volume_mode.file_list=['{tmp_path}/v.h5']", f"inference.data.output_path={tmp_path}"]
    words = ["infer-volume", "--checkpoint", str(model), *WORDS[:2], *files, "inference.block_shape=[6,31,20]"]

    def interrupted(*_: object, **named: object) -> None:
        raise OutputError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(Segmenter, "segment_roi", interrupted)
        assert main(words) == 3
    (store,) = tmp_path.glob("v_labels.run/*/mask.zarr")
    next(path for path in sorted(store.glob("0/c/*/*/*"))[1:]).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("connectomics.stages.predict.segmenter.survey", lambda *a, **k: pytest.fail("surveyed again"))
        assert main(words) == 0
    with h5py.File(tmp_path / "v_labels.h5") as file:
        expected = InferenceManager.from_checkpoint(model, trial.words).predict(image).labels
        np.testing.assert_array_equal(file["main"][:], expected)
    assert not list(tmp_path.glob("v_labels.run/*/mask*.zarr"))
