"""Planes: a 2D model along xy, xz and yz gives the mean of three runs of nnU-Net over volumes transposed by numpy."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from connectomics.cli import main
from connectomics.commands.verify import verify
from connectomics.config.load import load_config
from connectomics.core.errors import ConfigError, ModelError, VolumeError
from connectomics.core.geometry import Block, BlockGrid, Box
from connectomics.execution.task import Computed
from connectomics.lightning.inference import InferenceManager, Prediction
from connectomics.models.spec import ChannelNormalisation
from connectomics.stages.predict.task import PredictTask
from connectomics.stages.survey.survey import load_survey, save_survey, survey

import oracle
from nnunet_models import make_model
from parity_table import ArrayVolume, ParityCase, scene, train
from small_jobs import infer_words, ledger_lines, write_h5

WORDS = ("system.device=cpu", "system.num_cpus=1", "inference.output.save_probabilities=true")
ALL = "inference.planes=[xy,xz,yz]"
TRANSPOSED = {"xy": (0, 1, 2), "xz": (1, 0, 2), "yz": (2, 0, 1)}  # sections, rows, columns, written down here again
EXTENT = (13, 20, 27)
REGIONS: dict[str, int | list[int]] = {"background": 0, "whole": [1, 2], "core": 2}
KINDS = {
    "slices": {"reader": "NaturalImage2DIO"},
    "volume": {"reader": "SimpleITKIO"},
    "regions": {"reader": "NaturalImage2DIO", "labels": REGIONS, "regions_class_order": [1, 2]},
    "turned": {"reader": "SimpleITKIO", "axis_order": (0, 2, 1)},
    "masked": {"reader": "SimpleITKIO", "masked": [True]},
}


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Zeros at some faces, so that every section of every plane has a nonzero box of its own."""
    pixels: np.ndarray = (scene(1, EXTENT, 6)[0] * 255).astype(np.uint8)
    pixels[:, :1] = 0
    pixels[:, :, :3] = 0
    pixels[:, :, :, -4:] = 0
    pixels[:, :9, :9, :9] = 0
    return pixels


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that have learned the classes of the image: of random ones the mean is one class almost everywhere."""
    torch.set_num_threads(1)
    folder, options = tmp_path_factory.mktemp("planes"), {"dimensions": 2, "classes": 3, "patch": (16, 24)}
    learned: dict[str, dict[str, torch.Tensor]] = {}

    def learn(network: torch.nn.Module, kind: str) -> None:
        if kind not in learned:
            train(network, ParityCase(2, "plain", 1, "whole", True, "ZScoreNormalization", "uint8", kind))
            learned[kind] = network.state_dict()
        network.load_state_dict(learned[kind])

    found = {}
    for name, kind in KINDS.items():
        weights = functools.partial(learn, kind="regions" if name == "regions" else "plain")
        found[name] = make_model(folder / name, give_weights=weights, **(options | kind))  # type: ignore[arg-type]
    return found


def manager_of(model: Path, *more: str) -> InferenceManager:
    return InferenceManager.from_checkpoint(model, [*WORDS, *more])


def of_nnunet(
    model: Path, image: np.ndarray, planes: Sequence[str], spacing: Sequence[float] | None = None
) -> oracle.Answer:
    """nnU-Net's own mean of its own runs, one for each plane: transposed before, transposed back afterwards."""
    manager = InferenceManager.from_checkpoint(model, WORDS)
    member, predictor = manager.engine.segmenter.members[0], oracle.make_predictor(model, manager.engine.spec.folds)
    answers = []
    for plane in planes:
        axes = TRANSPOSED[plane]
        turned = np.ascontiguousarray(image.transpose(0, *(a + 1 for a in axes)))
        cases = survey(
            ArrayVolume(turned), "turned", member.schemes, by_slice=member.by_slice, with_mask=member.keeps_mask
        )
        own = None if spacing is None else [spacing[a] for a in axes]
        labels, probabilities = oracle.predict_cases(predictor, turned, cases, own, inject=True)
        back = np.argsort(axes)
        answers.append((labels.transpose(back), probabilities.transpose(0, *(back + 1))))
    return oracle.ensembled(predictor.label_manager, answers)


def equal(ours: Prediction, theirs: oracle.Answer) -> None:
    assert ours.probabilities is not None and len(np.unique(theirs[0])) == 3
    np.testing.assert_array_equal(ours.labels, theirs[0])
    assert np.abs(ours.probabilities - theirs[1]).max() <= 1e-5


@pytest.mark.parametrize(
    "kind",
    ["slices", "regions", "turned", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("volume", "masked"))],
)
def test_labels_are_those_of_the_mean_of_three_runs_of_nnunet(
    models: dict[str, Path], image: np.ndarray, kind: str
) -> None:
    ours = manager_of(models[kind], ALL).predict(image)
    equal(ours, of_nnunet(models[kind], image, tuple(TRANSPOSED)))
    assert (ours.labels != manager_of(models[kind]).predict(image).labels).any()


@pytest.mark.parametrize("planes", [("xz",), ("yz",), ("xy", "yz")], ids=" + ".join)
def test_any_planes_can_be_chosen_in_any_order(
    models: dict[str, Path], image: np.ndarray, planes: tuple[str, ...]
) -> None:
    managers = [manager_of(models["slices"], f"inference.planes={json.dumps(p)}") for p in (planes, planes[::-1])]
    one, other = (manager.predict(image) for manager in managers)
    equal(one, of_nnunet(models["slices"], image, planes))
    assert one.labels.tobytes() == other.labels.tobytes()
    assert managers[0].engine.identity.facts == managers[1].engine.identity.facts


def test_each_plane_is_resampled_to_the_models_pixels(models: dict[str, Path], image: np.ndarray) -> None:
    """A volume of thick sections, which planes could not be used in as it is."""
    spacing = (1.7, 1.2, 0.9)
    manager = manager_of(models["volume"], ALL, "inference.resample=plan")
    equal(manager.predict(image, spacing), of_nnunet(models["volume"], image, tuple(TRANSPOSED), spacing))


@pytest.mark.parametrize("kind", ["slices", "volume"])
def test_any_blocks_give_the_same_bytes(models: dict[str, Path], image: np.ndarray, kind: str) -> None:
    manager = manager_of(models[kind], ALL, "inference.test_time_augmentation.enabled=false")
    segmenter, reader = manager.engine.segmenter, ArrayVolume(image)
    surveyed = segmenter.survey(reader, "image")
    whole = segmenter.segment(reader.read, surveyed, Box.of_shape(EXTENT))
    for shape in ((5, 20, 27), (13, 20, 9), (8, 11, 14)):
        blocks = list(BlockGrid(EXTENT, shape))
        random.Random(0).shuffle(blocks)
        for block in blocks:
            part = segmenter.segment(reader.read, surveyed, block.core)
            for name, array in whole.items():
                assert part[name].tobytes() == array[(slice(None), *block.core.slices)].tobytes()


@pytest.mark.parametrize(("kind", "shape"), [("slices", [7, 20, 14]), ("volume", [13, 11, 27])])
def test_a_run_on_disk_is_killed_continued_and_skipped(
    models: dict[str, Path],
    image: np.ndarray,
    kind: str,
    shape: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    volume, output = write_h5(tmp_path / "v.h5", image[0]), tmp_path / "out"
    words = infer_words(models[kind], output, volume, ALL, WORDS[-1], f"inference.block_shape={json.dumps(shape)}")
    compute = PredictTask.compute

    def breaking(self: PredictTask, block: Block) -> Computed:
        if any(block.index):
            raise OSError(28, "No space left on device")
        return compute(self, block)

    with monkeypatch.context() as broken:
        broken.setattr(PredictTask, "compute", breaking)
        assert main(words) == 3
    begun = len(ledger_lines(output / "v_labels.run"))
    assert begun == 1
    assert main(words) == 0
    report = json.loads((output / "v_labels.run" / "report.json").read_text())
    assert report["planned"] == (4 if kind == "slices" else 2) and report["skipped"] == begun
    with h5py.File(output / "v_labels.h5") as file, h5py.File(output / "v_labels_probabilities.h5") as shares:
        equal(Prediction(file["main"][:], shares["main"][:]), of_nnunet(models[kind], image, tuple(TRANSPOSED)))
    told = json.loads((output / "v_labels.run" / "provenance.json").read_text())
    assert told["planes"] == ["xy", "xz", "yz"] and "a mean over the planes xy, xz, yz" in told["nnunet"]
    written = (output / "v_labels.h5").stat().st_mtime_ns
    assert main(words) == 0 and (output / "v_labels.h5").stat().st_mtime_ns == written


def test_a_box_of_the_volume_is_that_of_the_full_run(models: dict[str, Path], image: np.ndarray) -> None:
    full, part = (
        manager_of(models["slices"], ALL, *more).predict(image).labels
        for more in ((), ("inference.roi=[[4,8,2],[11,18,25]]",))
    )
    box = (slice(4, 11), slice(8, 18), slice(2, 25))
    np.testing.assert_array_equal(part[box], full[box])
    assert full[box].any() and part.sum() == part[box].sum()


def test_the_planes_are_in_the_result_key_unless_they_are_xy_alone(models: dict[str, Path]) -> None:
    stated = ((), ("inference.planes=[xy]",), (ALL,))
    facts = [dict(manager_of(models["slices"], *words).engine.identity.facts) for words in stated]
    assert facts[0] == facts[1] and "planes" not in facts[0]
    assert facts[2] == facts[0] | {"planes": ["xy", "xz", "yz"]}


def test_an_ensemble_averages_every_model_along_every_plane(models: dict[str, Path], image: np.ndarray) -> None:
    other = f"model.ensemble=['{models['turned']}']"
    manager = manager_of(models["slices"], other, "model.ensemble_weights=[3,1]", ALL)
    assert len(manager.engine.segmenter.members) == 6 and manager.engine.identity.facts["planes"] == ["xy", "xz", "yz"]
    single = [manager_of(models[name], ALL).predict(image).probabilities for name in ("slices", "turned")]
    ours = manager.predict(image).probabilities
    assert ours is not None
    np.testing.assert_allclose(ours, np.average(np.stack(single), axis=0, weights=[3, 1]), atol=1e-6)


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        (["inference.planes=[]"], "must name at least one of xy, xz, yz"),
        (["inference.planes=[xy,zx]"], "must be one of xy, xz, yz"),
        (["inference.planes=[xy,xy]"], "each value may stand only once"),
        ([ALL, "inference.sliding_window.engine=monai"], "inference.planes other than .xy. needs nnunet"),
        ([ALL, "inference.test_time_augmentation.act=none"], "there are no logits to keep"),
        (["inference.allow_anisotropic_planes=true"], "takes effect only where inference.planes names xz or yz"),
    ],
)
def test_planes_that_cannot_be_are_refused(models: dict[str, Path], words: list[str], finding: str) -> None:
    with pytest.raises(ConfigError, match=finding):
        manager_of(models["slices"], *words)


def test_models_and_commands_that_planes_are_not_for_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    deep = make_model(tmp_path / "3D", dimensions=3, classes=3, patch=(8, 16, 16))
    second = make_model(tmp_path / "second", dimensions=2, classes=3, patch=(16, 24), previous_stage="2d_lowres")
    for model, finding in ((deep, "is a 3D model"), (second, "second stage of a cascade")):
        with pytest.raises(ModelError, match=finding):
            manager_of(model, ALL)
    with pytest.raises(ModelError, match="is a 3D model"):
        manager_of(models["slices"], ALL, f"model.ensemble=['{deep}']")
    config = load_config(None, [*WORDS[:2], ALL])
    with pytest.raises(ConfigError, match="nnU-Net runs a 2D model along xy only"):
        verify(config, models["slices"], "v.h5", certificate=tmp_path / "certificate.json")


def test_thick_sections_are_refused_unless_they_are_resampled_or_allowed(
    models: dict[str, Path], image: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume, thick = write_h5(tmp_path / "v.h5", image[0]), "inference.voxel_size_nm=[40,8,8]"
    assert main(infer_words(models["slices"], tmp_path / "out", volume, ALL, thick)) == 3
    told = " ".join(capsys.readouterr().out.split())
    assert "measure 40 x 8 x 8 (z, y, x)" in told and "stretched 5 times, expected at most 1.5" in told
    manager = manager_of(models["volume"], ALL)
    with pytest.raises(VolumeError, match=r"the image: its voxels measure 1.6 x 1 x 1"):
        manager.predict(image, (1.6, 1.0, 1.0))
    as_it_is = manager.predict(image).labels
    for words, spacing in (([ALL], (1.5, 1.0, 1.0)), ([ALL, thick, "inference.allow_anisotropic_planes=true"], None)):
        np.testing.assert_array_equal(manager_of(models["volume"], *words).predict(image, spacing).labels, as_it_is)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_sections_across_any_axis_have_the_statistics_of_numpys_slices(
    image: np.ndarray, dtype: str, axis: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("connectomics.stages.survey.tiles.TILE_VOXELS", 500)
    pixels = np.concatenate([image, 255 - image[:, ::-1] // 2]).astype(dtype)
    pixels[:, 5] = pixels[:, :, 7] = pixels[..., 11] = 0
    schemes = [ChannelNormalisation("ZScoreNormalization")] * 2
    cases = survey(ArrayVolume(pixels), "image", schemes, by_slice=True, section_axis=axis, workers=2)
    assert len(cases) == EXTENT[axis]
    for i, case in enumerate(cases):
        section = pixels.take([i], axis + 1)
        nonzero = np.argwhere((section != 0).any(0))
        start, stop = (nonzero.min(0), nonzero.max(0) + 1) if len(nonzero) else ((0, 0, 0), section.shape[1:])
        offset = np.eye(3, dtype=int)[axis] * i
        assert case.region == Box.of_shape(section.shape[1:]).shift(tuple(offset))  # type: ignore[arg-type]
        assert case.box == Box(tuple(map(int, start)), tuple(map(int, stop))).shift(tuple(offset))  # type: ignore[arg-type]
        for values, found in zip(section[(slice(None), *map(slice, start, stop))], case.channels, strict=True):
            assert found.mean == pytest.approx(values.mean(dtype=np.float64), abs=1e-9)
            assert found.std == pytest.approx(values.std(dtype=np.float64), abs=1e-9)
            assert (found.minimum, found.maximum) == (values.min(), values.max())
    save_survey([cases], tmp_path / "survey.json")
    assert load_survey(tmp_path / "survey.json") == (cases,)
    assert list(cases[3:5]) == [cases[3], cases[4]]


def test_infinite_values_are_named_where_they_stand(image: np.ndarray) -> None:
    pixels = image.astype(np.float32)
    pixels[0, 4, 5, 6] = np.inf
    with pytest.raises(VolumeError, match=r"voxels \(z, y, x\) \(4, 5, 6\) to \(5, 6, 7\)"):
        survey(ArrayVolume(pixels), "v", [ChannelNormalisation("ZScoreNormalization")], by_slice=True, section_axis=2)
