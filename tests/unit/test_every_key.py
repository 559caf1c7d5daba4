"""Every key of the configuration takes effect, or its value is refused with the reason: one entry a key sees it.

The command itself runs on a tiny model and a tiny volume; each entry compares a run with the key against one without.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn
from tuned import keep_profile, torch_trial

from connectomics.cli import main, script_main
from connectomics.commands import decode
from connectomics.config.load import known_keys
from connectomics.lightning import inference
from connectomics.models.backends import torch_eager
from connectomics.stages.survey import tiles

from nnunet_models import make_model
from parity_table import train_second_stage
from small_jobs import em_like, final_names, infer_words, quick_folder, read_h5, write_h5

WINDOW = "inference.sliding_window"
TTA = "inference.test_time_augmentation"
BINARY = "inference.postprocessing.binary"
POST = "inference.postprocessing"
MODE = "inference.volume_mode"
SAVE = "inference.output.save_probabilities=true"
BINARISED = f"{BINARY}.enabled=true"


@dataclass(frozen=True)
class Result:
    """What one call of the command did."""

    code: int
    out: str
    err: str
    output: Path

    def read(self, name: str = "v_labels") -> Any:
        return read_h5(self.output / f"{name}.h5")

    @property
    def probabilities(self) -> Any:
        return self.read("v_labels_probabilities")

    @property
    def provenance(self) -> dict[str, Any]:
        return self._json("provenance.json")

    @property
    def report(self) -> dict[str, Any]:
        return self._json("report.json")

    def _json(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.output / "v_labels.run" / name).read_text())
        return content

    def refused(self, *words: str) -> bool:
        """With one sentence that holds ``words``, and nothing done."""
        (line,) = self.err.splitlines()
        assert line.startswith("error: ") and not final_names(self.output)
        return self.code in (2, 3) and all(word in line for word in words)


class World:
    """A model, volumes, and the command; equal calls are made once."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str] | None = None) -> None:
        self.folder = folder
        self.capture = capture
        self.model = make_model(folder / "model", dimensions=2, patch=(16, 16), folds=("0", "1"), features=(4, 8))
        self.other = make_model(folder / "other", dimensions=2, patch=(16, 24), features=(4, 8), seed=8)
        shutil.copy(self.model / "fold_0" / "checkpoint_final.pth", self.model / "fold_0" / "checkpoint_other.pth")
        self.volume = write_h5(folder / "v.h5", em_like((2, 20, 24)))
        self.truth = write_h5(folder / "truth.h5", (em_like((2, 20, 24), 1) > 128).astype(np.uint8))
        self._count = 0
        self._known: dict[tuple[str, ...], Result] = {}

    def run(self, *more: str, command: str = "infer-volume", checkpoint: bool = True) -> Result:
        key = (command, str(checkpoint), *more)
        if key not in self._known:
            self._known[key] = self._run(more, command, checkpoint)
        return self._known[key]

    def again(self, output: Path, *more: str) -> Result:
        """A second run in an output folder."""
        return self._called([*infer_words(self.model, output, self.volume), *more], output)

    def _run(self, more: Sequence[str], command: str, checkpoint: bool) -> Result:
        self._count += 1
        output = self.folder / f"out_{self._count}"
        words = infer_words(self.model, output, self.volume)
        if command == "test":
            words = [word for word in words if not word.startswith(MODE)]
        if not checkpoint:
            words = words[:1] + words[3:]
        if command == "evaluate":
            return self._called(["--mode", command, *words[3:], *more], output, script_main)
        return self._called([command, *words[1:], *more], output)

    def _called(self, words: Sequence[str], output: Path, entry: Callable[[Sequence[str]], int] = main) -> Result:
        assert self.capture is not None
        self.capture.readouterr()
        code = entry(words)
        out, err = self.capture.readouterr()
        return Result(code, out, err, output)


@pytest.fixture(scope="module")
def made() -> Iterator[World]:
    with quick_folder() as folder:
        yield World(folder)


@pytest.fixture
def world(made: World, capsys: pytest.CaptureFixture[str]) -> World:
    made.capture = capsys
    return made


Check = Callable[[World], bool]


def changes(what: Callable[[Result], Any], *words: str, given: Sequence[str] = ()) -> Check:
    """``what`` differs between runs with and without the key (both with ``given``)."""

    def check(world: World) -> bool:
        without, with_key = world.run(*given), world.run(*given, *words)
        assert (without.code, with_key.code) == (0, 0), with_key.err + with_key.out
        before, after = what(without), what(with_key)
        return bool(before != after) if not isinstance(before, np.ndarray) else not np.array_equal(before, after)

    return check


def refuses(word: str, *finding: str) -> Check:
    return lambda world: world.run(word).refused(*finding)


def both(*checks: Check) -> Check:
    return lambda world: all(check(world) for check in checks)


def provenance(name: str) -> Callable[[Result], Any]:
    return lambda result: result.provenance[name]


def labels(result: Result) -> Any:
    return result.read()


def probabilities(result: Result) -> Any:
    return result.probabilities


def seed(world: World) -> bool:
    world.again(world.folder / "seed", "system.seed=77")
    return torch.initial_seed() == 77


def thread_count(*words: str) -> Check:
    """Threads of a forward pass."""

    def check(world: World) -> bool:
        seen = set()
        inner = nn.Conv2d.forward

        def counted(self: nn.Conv2d, values: torch.Tensor) -> torch.Tensor:
            seen.add(torch.get_num_threads())
            return inner(self, values)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Conv2d, "forward", counted)
            world.again(world.folder / f"threads_{len(words)}", *words)
        return seen == {3}

    return check


def workers(world: World) -> bool:
    """Threads that read ahead."""
    seen = []

    class Pool(tiles.ThreadPoolExecutor):  # type: ignore[misc, name-defined]
        def __init__(self, max_workers: int) -> None:
            seen.append(max_workers)
            super().__init__(max_workers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "ThreadPoolExecutor", Pool)
        world.again(world.folder / "workers", "system.inference.num_workers=3")
    return seen == [3]


def batches(world: World) -> bool:
    """Rows that the network sees at once."""
    seen = set()
    forward = torch_eager.TorchBackend.forward

    def spy(self: torch_eager.TorchBackend, batch: torch.Tensor) -> torch.Tensor:
        seen.add(batch.shape[0])
        return forward(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_eager.TorchBackend, "forward", spy)
        result = world.again(world.folder / "batches", f"{WINDOW}.sw_batch_size=3")
        stated, cache = max(seen), world.folder / "batches_cache"
        seen.clear()
        keep_profile(cache, world.model, torch_trial(1, 0.1), torch_trial(2, 0.01))
        measured = world.again(world.folder / "measured", f"system.cache_dir='{cache}'", "system.backend=auto")
    return (stated, max(seen)) == (3, 2) and result.code == measured.code == 0


def memory_budget(world: World) -> bool:
    result = world.run("system.memory_budget_gb=0.000001")
    return result.code == 3 and "the memory budget is" in result.out


def mixed_devices(world: World) -> bool:
    """A ledger of another numeric class is continued only when allowed."""
    output = world.folder / "mixed"
    cut = ["inference.block_shape=[1,20,24]"]
    world.again(output, *cut)
    (output / "v_labels.h5").unlink()
    refused = world.again(output, *cut, "system.num_cpus=2")
    allowed = world.again(output, *cut, "system.num_cpus=2", "system.allow_mixed_devices=true")
    return refused.code == 3 and "system.allow_mixed_devices=true" in refused.out and allowed.code == 0


def stale_after(world: World) -> bool:
    """What a run and a decoding are told of when another process counts as dead."""
    seen = []

    def spy(inner: Callable[..., Any]) -> Callable[..., Any]:
        def run(job: Any, settings: Any, *more: Any, **named: Any) -> Any:
            seen.append((inner.__name__, settings.stale_s))
            return inner(job, settings, *more, **named)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "run_any_volume", spy(inference.run_any_volume))
        patch.setattr(decode, "run_decode", spy(decode.run_decode))
        result = world.again(world.folder / "stale", "system.stale_after_s=7.5", DECODED)
    return result.code == 0 and seen == [("run_any_volume", 7.5), ("run_decode", 7.5)]


OPENVINO = "system.backend=openvino"
FAST = "inference.precision=fast"


def backend(world: World) -> bool:
    default, other = world.run(SAVE), world.run(SAVE, OPENVINO)
    names = [result.provenance["numeric_class"]["backend"].split()[0] for result in (default, other)]
    close = np.allclose(default.probabilities, other.probabilities, rtol=0, atol=1e-5)
    return names == ["torch", "openvino"] and close and (labels(default) != labels(other)).mean() <= 1e-5


def cache_dir(world: World) -> bool:
    folder = world.folder / "cache"
    result = world.again(world.folder / "cached", OPENVINO, f"system.cache_dir='{folder}'")
    return result.code == 0 and len(list(folder.glob("*.compiled"))) == 2  # one a fold


def precision(world: World) -> bool:
    exact, fast = world.run(SAVE), world.run(SAVE, FAST, "inference.max_disagreement=1")
    measured = fast.provenance["agreement"]
    return (
        fast.provenance["numeric_class"]["precision"] == "fast"
        and not np.array_equal(exact.probabilities, fast.probabilities)
        and (measured["voxels"], measured["differ"]) == (exact.read().size, (labels(exact) != labels(fast)).sum())
        and f"{measured['differ']} of {measured['voxels']} sampled labels differ" in fast.err
    )


def max_disagreement(world: World) -> bool:
    result = world.run(FAST, "inference.max_disagreement=0")
    return result.code == 3 and "inference.precision=exact" in result.out and not final_names(result.output)


def checkpoint(world: World) -> bool:
    without = world.run(checkpoint=False)
    named = world.run(f"model.nnunet_checkpoint='{world.model}'", checkpoint=False)
    return without.refused("no model is named") and np.array_equal(labels(named), labels(world.run()))


def json_beside(name: str) -> Check:
    """A file elsewhere is used instead of the one beside the checkpoint."""

    def check(world: World) -> bool:
        folder = world.folder / f"without_{name}"
        shutil.copytree(world.model, folder)
        elsewhere = shutil.move(folder / f"{name}.json", world.folder / f"elsewhere_{name}.json")
        words = [f"model.nnunet_checkpoint='{folder}'"]
        without = world.run(*words, checkpoint=False)
        stated = world.run(*words, f"model.nnunet_{name}='{elsewhere}'", checkpoint=False)
        return without.refused(f"{name}.json") and np.array_equal(labels(stated), labels(world.run()))

    return check


def digest(world: World) -> bool:
    stated = world.run("model.folds=[0]").provenance["model_weights_sha256"]
    right = world.run("model.folds=[0]", f"model.sha256={stated}")
    wrong = world.run("model.folds=[0]", f"model.sha256={'0' * 64}")
    return right.code == 0 and wrong.refused("sha256", stated)


def trust(world: World) -> bool:
    folder = world.folder / "foreign"
    shutil.copytree(world.model, folder)
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["nonlin"] = "torch.nn.modules.activation.Hardswish"
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["nonlin_kwargs"] = {}
    (folder / "plans.json").write_text(json.dumps(plans))
    words = [f"model.nnunet_checkpoint='{folder}'"]
    refused = world.run(*words, checkpoint=False)
    trusted = world.run(*words, "model.trust_code=true", checkpoint=False)
    return refused.refused("Hardswish", "model.trust_code") and trusted.code == 0


def mode_enabled(world: World) -> bool:
    return world.run(f"{MODE}.enabled=false").refused(f"{MODE}.enabled is false")


def share(*words: str) -> Callable[[World], list[str]]:
    """Names of what is done out of a list of four volumes."""

    def names(world: World) -> list[str]:
        folder = world.folder / "four"
        if not folder.exists():
            for i in range(4):
                write_h5(folder / f"{i}.h5", em_like((1, 16, 16), i))
        result = world.run(f"{MODE}.file_pattern='{folder}/*.h5'", *words)
        return sorted(name[0] for name in final_names(result.output))

    return names


def step(world: World) -> bool:
    return share(f"{MODE}.step=3")(world) == ["0", "3"]


def start_index(world: World) -> bool:
    return share(f"{MODE}.start_index=1", f"{MODE}.step=2")(world) == ["1", "3"]


def stop_on_error(world: World) -> bool:
    (world.folder / "empty.h5").touch()
    listed = [f"{MODE}.file_pattern=null", f"{MODE}.file_list=['{world.folder}/empty.h5','{world.volume}']"]
    on, stopped = world.run(*listed), world.run(*listed, f"{MODE}.stop_on_error=true")
    return (final_names(on.output), final_names(stopped.output)) == ({"v_labels.h5"}, set()) and stopped.code == 3


def file_list(world: World) -> bool:
    result = world.run(f"{MODE}.file_pattern=null", f"{MODE}.file_list=['{world.volume}']")
    return final_names(result.output) == {"v_labels.h5"}


def file_pattern(world: World) -> bool:
    return share()(world) == ["0", "1", "2", "3"]


def overwrite(world: World) -> bool:
    output = world.folder / "overwrite"
    world.again(output)
    refused = world.again(output, f"{WINDOW}.overlap=0.25")
    allowed = world.again(output, f"{WINDOW}.overlap=0.25", "inference.output.overwrite=true")
    return (refused.code, allowed.code) == (3, 0) and "overwrite=true" in refused.out


def axes(world: World) -> bool:
    result = world.run("inference.axes=zxy")
    return np.array_equal(result.read().shape, (2, 24, 20))


def inside(*words: str) -> Check:
    """Labels of section 0, rows 4 to 19 and columns 8 to 23 are those of the full run, all others background."""

    def check(world: World) -> bool:
        full, part = world.run(), world.run(*words)
        expected = np.zeros_like(labels(full))
        expected[:1, 4:20, 8:24] = labels(full)[:1, 4:20, 8:24]
        return np.array_equal(labels(part), expected) and expected.any() and windows(part) < windows(full)

    return check


def mask(world: World) -> bool:
    """At a quarter of y and an eighth of x."""
    wanted = np.zeros((2, 5, 3), np.uint8)
    wanted[:1, 1:5, 1:3] = 7
    return inside(f"inference.mask='{write_h5(world.folder / 'mask.h5', wanted)}'")(world)


SPACED = "inference.spacing=[5,1.5,1.5]"
AS_VOLUME = "inference.case=volume"


def large_resampling(world: World) -> bool:
    words = [AS_VOLUME, "inference.resample=plan", "inference.spacing=[5,5,1]"]
    refused = world.run(*words)
    return (
        refused.code == 3
        and "same unit" in refused.out + refused.err
        and world.run(*words, "inference.allow_large_resampling=true").code == 0
    )


def anisotropic(world: World) -> bool:
    words = ["inference.planes=[xy,xz]", "inference.voxel_size_nm=[30,8,8]"]
    refused = world.run(*words)
    return (
        refused.code == 3
        and "stretched 3.75 times" in refused.out + refused.err
        and world.run(*words, "inference.allow_anisotropic_planes=true").code == 0
    )


def output_path(world: World) -> bool:
    return world.run().output.joinpath("v_labels.h5").exists()


def measured(*words: str) -> Callable[[World], Result]:
    """``--mode test`` with a label volume."""
    return lambda world: world.run(
        f"test.data.test_image='{world.volume}'", f"test.data.test_label='{world.truth}'", *words, command="test"
    )


def scores(result: Result) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((result.output / "scores.json").read_text())
    return content["pooled"]["labels"]["label_1"]


def known_image(world: World) -> bool:
    return world.run(command="test").refused("test.data.test_image") and final_names(measured()(world).output) == {
        "v_labels.h5",
        "scores.json",
    }


def known_label(world: World) -> bool:
    alone = world.run(f"test.data.test_image='{world.volume}'", command="test")
    return alone.code == 0 and not (alone.output / "scores.json").exists() and 0 < scores(measured()(world))["dice"] < 1


def evaluation(world: World) -> bool:
    result = measured("test.evaluation.enabled=false")(world)
    return result.code == 0 and not (result.output / "scores.json").exists()


def metrics(world: World) -> bool:
    some, all_of_them = scores(measured("test.evaluation.metrics=[iou]")(world)), scores(measured()(world))
    return "iou" in some and "dice" not in some and {"dice", "iou", "precision", "recall"} <= set(all_of_them)


def evaluated(world: World, *words: str) -> Result:
    """``--mode evaluate`` of the truth with itself."""
    named = f"test.data.test_prediction='{world.truth}'"
    return world.run(named, f"test.data.test_label='{world.truth}'", *words, command="evaluate")


def known_objects(world: World) -> bool:
    words = ("decoding=[{name: connected_components}]", "test.evaluation.metrics=[dice,pq]")
    found = measured(*words, f"test.data.test_instances='{world.truth}'")(world)
    content = json.loads((found.output / "scores.json").read_text())
    objects = "pq" in json.dumps(content["pooled"]["instances"]) and 0 < scores(found)["dice"] < 1
    return objects and measured(*words)(world).refused("test.data.test_instances")


def masked(world: World) -> bool:
    everything = measured(f"test.data.test_ignore='{world.volume}'")(world)
    return scores(everything)["dice"] is None and scores(measured()(world))["dice"] is not None


def known_prediction(world: World) -> bool:
    alone = world.run(command="evaluate").refused("test.data.test_prediction")
    return alone and scores(evaluated(world))["dice"] == 1


def bounded(world: World) -> bool:
    result = evaluated(world, "test.evaluation.metrics=[ap]", "test.evaluation.size_bounds=[9]")
    content = json.loads((result.output / "scores.json").read_text())
    return [row["up_to_voxels"] for row in content["pooled"]["instances"]["ap_by_size"]] == [9, None]


def foreground(world: World) -> bool:
    content = json.loads((measured("test.evaluation.foreground=true")(world).output / "scores.json").read_text())
    return list(content["pooled"]["labels"]) == ["background", "foreground"]


def ignored(world: World) -> bool:
    found = scores(measured("test.evaluation.ignore_label=1")(world))
    return found["tp"] + found["fn"] == 0 < scores(measured()(world))["fn"] + scores(measured()(world))["tp"]


def fewer_objects(world: World) -> bool:
    """Small components go, large ones stay."""
    from scipy import ndimage

    whole = world.run(BINARISED).read()
    kept = world.run(BINARISED, f"{BINARY}.remove_small_objects=20").read()
    ids, count = ndimage.label(whole, np.ones((3, 3, 3)))
    sizes = np.bincount(ids.ravel())[1:]
    expected = np.isin(ids, 1 + np.flatnonzero(sizes >= 20))
    assert 0 < expected.sum() < (whole > 0).sum() and count > 1
    return np.array_equal(kept > 0, expected)


def filled(world: World) -> bool:
    from scipy import ndimage

    whole = world.run(BINARISED, f"{BINARY}.threshold=0.45").read()
    kept = world.run(BINARISED, f"{BINARY}.threshold=0.45", f"{BINARY}.fill_holes=true").read()
    return kept.sum() >= whole.sum() and np.array_equal(ndimage.binary_fill_holes(kept), kept > 0)


def threshold(world: World) -> bool:
    share = world.run(SAVE).probabilities[1]
    return all(
        np.array_equal(world.run(BINARISED, f"{BINARY}.threshold={t}").read() > 0, share > np.float32(t))
        for t in (0.3, 0.6)
    )


def selected(world: World) -> bool:
    both_classes = world.run(SAVE).probabilities
    one = world.run(SAVE, f"{TTA}.select_channel=[1]").probabilities
    return np.array_equal(one, both_classes[1])


def logits(world: World) -> bool:
    raw = torch.from_numpy(world.run(SAVE, f"{TTA}.act=none").probabilities)
    share = torch.softmax(raw, 0).numpy()
    return raw.min() < 0 and np.allclose(share, world.run(SAVE).probabilities, rtol=0, atol=1e-6)


def scaled(world: World) -> bool:
    once = world.run(SAVE).probabilities
    return np.array_equal(world.run(SAVE, f"{POST}.intensity_scale=4").probabilities, once * np.float32(4))


def rounded(world: World) -> bool:
    words = (SAVE, f"{POST}.intensity_scale=255", f"{POST}.intensity_dtype=uint8")
    expected = np.rint(world.run(SAVE).probabilities * np.float32(255)).astype(np.uint8)
    return np.array_equal(world.run(*words).probabilities, expected)


def monai_pads(world: World) -> bool:
    """A volume smaller than the window is padded in another way."""
    small = write_h5(world.folder / "v_small" / "v.h5", em_like((1, 12, 12)))
    given = [f"{MODE}.file_pattern='{small}'", f"{WINDOW}.engine=monai", SAVE]
    return changes(probabilities, f"{WINDOW}.padding_mode=reflect", given=given)(world)


def names_of(result: Result) -> set[str]:
    return final_names(result.output)


def windows(result: Result) -> int:
    count: int = result.report["windows"]
    return count


def ensemble(world: World) -> bool:
    return changes(probabilities, f"model.ensemble=['{world.other}']", given=[SAVE])(world)


def previous_stage(world: World) -> bool:
    """The labels that a second stage is given decide its own."""
    second = make_model(
        world.folder / "second",
        dimensions=2,
        classes=3,
        patch=(16, 16),
        previous_stage="2d_lowres",
        give_weights=train_second_stage,
    )

    def found(number: int) -> Any:
        given = write_h5(world.folder / f"given_{number}.h5", np.full((2, 20, 24), number, np.uint8))
        output = world.folder / f"second_{number}"
        assert main(infer_words(second, output, world.volume, f"model.previous_stage='{given}'")) == 0
        return Result(0, "", "", output).read()

    return not np.array_equal(found(0), found(2))


def ensemble_weights(world: World) -> bool:
    given = [SAVE, f"model.ensemble=['{world.other}']"]
    return changes(probabilities, "model.ensemble_weights=[1,3]", given=given)(world)


def voxel_size(result: Result) -> Any:
    with h5py.File(result.output / "v_labels.h5") as file:
        return list(file["main"].attrs.get("voxel_size_nm", []))


DECODED = "decoding=[{name: connected_components, connectivity: 6}, {name: filters, min_voxels: 3}]"


def decoded(world: World) -> bool:
    """Objects of the labels, numbered and filtered; the table has the probabilities that were saved."""
    import cc3d
    import pyarrow.parquet

    result = world.run(DECODED, SAVE)
    ids = cc3d.connected_components(result.read(), connectivity=6)
    sizes = np.bincount(ids.ravel())
    kept = np.where(sizes[ids] >= 3, ids, 0)
    table = pyarrow.parquet.read_table(result.output / "v_labels_instances.parquet").to_pydict()
    likely = [result.probabilities[1][kept == i].mean() for i in table["id"]]
    assert 0 < len(table["id"]) < ids.max()
    return np.array_equal(result.read("v_labels_instances"), kept) and np.allclose(table["mean_probability"], likely)


TABLE: Mapping[str, Check] = {
    "experiment_name": changes(provenance("experiment_name"), "experiment_name=mine"),
    "description": changes(provenance("description"), "description='of mine'"),
    "system.device": refuses("system.device=cuda:9", "device 'cuda:9' is not available"),
    "system.backend": both(backend, refuses("system.backend=tvm", "must be one of auto, torch, compile, openvino")),
    "system.cache_dir": cache_dir,
    "system.seed": both(seed, changes(provenance("seed"), "system.seed=77")),
    "system.num_gpus": refuses("system.num_gpus=1", "num_gpus=1 asks for a GPU"),
    "system.num_cpus": thread_count("system.num_cpus=3"),
    "system.memory_budget_gb": memory_budget,
    "system.allow_mixed_devices": mixed_devices,
    "system.stale_after_s": both(stale_after, refuses("system.stale_after_s=1.9", "must be 2 or more")),
    "system.inference.batch_size": refuses("system.inference.batch_size=2", "sw_batch_size"),
    "system.inference.num_gpus": refuses("system.inference.num_gpus=1", "num_gpus=1 asks for a GPU"),
    "system.inference.num_cpus": thread_count("system.num_cpus=2", "system.inference.num_cpus=3"),
    "system.inference.num_workers": workers,
    "model.architecture": refuses("model.architecture=swin", "'swin'", "nnunet"),
    "model.nnunet_checkpoint": checkpoint,
    "model.nnunet_plans": json_beside("plans"),
    "model.nnunet_dataset": json_beside("dataset"),
    "model.nnunet_device": refuses("model.nnunet_device=mps", "model.nnunet_device is 'mps'", "'cpu'"),
    "model.use_deep_supervision": refuses("model.use_deep_supervision=true", "full-resolution head"),
    "model.in_channels": refuses("model.in_channels=3", "model.in_channels is 3", "has 1"),
    "model.out_channels": refuses("model.out_channels=3", "model.out_channels is 3", "has 2"),
    "model.sha256": digest,
    "model.trust_code": trust,
    "model.folds": both(changes(provenance("folds"), "model.folds=[1]"), changes(labels, "model.folds=[1]")),
    "model.checkpoint_name": both(
        changes(provenance("folds"), "model.checkpoint_name=checkpoint_other.pth"),
        refuses("model.checkpoint_name=checkpoint_best.pth", "checkpoint_best.pth"),
    ),
    "model.ensemble": ensemble,
    "model.previous_stage": both(previous_stage, refuses("model.previous_stage=x", "is no second stage of a cascade")),
    "model.ensemble_weights": both(
        ensemble_weights, refuses("model.ensemble_weights=[1,2]", "must be 1 positive numbers", "model.ensemble")
    ),
    "data.do_2d": refuses("data.do_2d=false", "data.do_2d"),
    "data.in_channels": refuses("data.in_channels=3", "data.in_channels is 3", "has 1"),
    "data.out_channels": refuses("data.out_channels=3", "data.out_channels is 3", "has 2"),
    "inference.case": both(
        changes(probabilities, "inference.case=volume", given=[SAVE]),
        changes(provenance("case"), "inference.case=volume"),
    ),
    "inference.precision": both(precision, refuses("inference.precision=half", "must be one of exact, fast")),
    "inference.max_disagreement": max_disagreement,
    "inference.planes": both(
        changes(probabilities, "inference.planes=[xy,xz,yz]", given=[SAVE, f"{TTA}.enabled=false"]),
        changes(provenance("nnunet"), "inference.planes=[xz]"),
    ),
    "inference.allow_anisotropic_planes": anisotropic,
    "inference.voxel_size_nm": changes(voxel_size, "inference.voxel_size_nm=[30,8,8]"),
    "inference.axes": axes,
    "inference.block_shape": changes(lambda r: r.report["planned"], "inference.block_shape=[1,20,12]"),
    "inference.roi": inside("inference.roi=[[0,4,8],[1,20,24]]"),
    "inference.mask": mask,
    "inference.resample": changes(probabilities, "inference.resample=plan", SPACED, given=[SAVE, AS_VOLUME]),
    "inference.spacing": changes(
        probabilities, "inference.spacing=[5,1.2,1.5]", given=[SAVE, AS_VOLUME, "inference.resample=plan", SPACED]
    ),
    "inference.allow_large_resampling": large_resampling,
    "inference.data.output_path": output_path,
    f"{MODE}.enabled": mode_enabled,
    f"{MODE}.start_index": start_index,
    f"{MODE}.step": step,
    f"{MODE}.stop_on_error": stop_on_error,
    f"{MODE}.file_list": file_list,
    f"{MODE}.file_pattern": file_pattern,
    f"{MODE}.output_suffix": lambda world: names_of(world.run(f"{MODE}.output_suffix=mito")) == {"v_mito.h5"},
    f"{WINDOW}.window_size": both(
        changes(labels, f"{WINDOW}.window_size=[24,24]"), changes(windows, f"{WINDOW}.window_size=[24,24]")
    ),
    f"{WINDOW}.overlap": changes(windows, f"{WINDOW}.overlap=0.75"),
    f"{WINDOW}.sw_batch_size": batches,
    f"{WINDOW}.blending": changes(probabilities, f"{WINDOW}.blending=constant", given=[SAVE]),
    f"{WINDOW}.padding_mode": monai_pads,
    f"{WINDOW}.engine": both(
        changes(provenance("engine"), f"{WINDOW}.engine=monai"),
        changes(probabilities, f"{WINDOW}.engine=monai", given=[SAVE, f"{WINDOW}.overlap=0.6"]),
    ),
    f"{TTA}.enabled": changes(probabilities, f"{TTA}.enabled=false", given=[SAVE]),
    f"{TTA}.flip_axes": changes(probabilities, f"{TTA}.flip_axes=[1]", given=[SAVE]),
    f"{TTA}.ensemble_mode": refuses(f"{TTA}.ensemble_mode=max", "must be mean"),
    f"{TTA}.act": logits,
    f"{TTA}.select_channel": selected,
    f"{BINARY}.enabled": changes(provenance("threshold"), BINARISED),
    f"{BINARY}.threshold": threshold,
    f"{BINARY}.remove_small_objects": fewer_objects,
    f"{BINARY}.fill_holes": filled,
    f"{POST}.intensity_scale": scaled,
    f"{POST}.intensity_dtype": rounded,
    "inference.output.formats": lambda world: (
        names_of(world.run("inference.output.formats=[zarr,tiff,png]"))
        == {"v_labels.zarr", "v_labels.tif", "v_labels_png"}
    ),
    "inference.output.pyramid": changes(
        lambda result: len([path for path in (result.output / "v_labels.n5").iterdir() if path.is_dir()]),
        "inference.output.pyramid=false",
        given=["inference.output.formats=[n5]", "inference.block_shape=[1,16,16]"],
    ),
    "inference.output.table": lambda world: (
        names_of(world.run(DECODED, "inference.output.table=csv"))
        == {
            "v_labels.h5",
            "v_labels_instances.h5",
            "v_labels_instances.csv",
        }
    ),
    "inference.output.save_probabilities": lambda world: (
        names_of(world.run(SAVE)) == {"v_labels.h5", "v_labels_probabilities.h5"}
    ),
    "inference.output.overwrite": overwrite,
    "decoding": decoded,
    "test.data.test_image": known_image,
    "test.data.test_label": known_label,
    "test.data.test_prediction": known_prediction,
    "test.data.test_instances": known_objects,
    "test.data.test_ignore": masked,
    "test.evaluation.enabled": evaluation,
    "test.evaluation.foreground": foreground,
    "test.evaluation.ignore_label": ignored,
    "test.evaluation.size_bounds": bounded,
    "test.evaluation.metrics": metrics,
}


def test_the_table_holds_every_key() -> None:
    assert set(TABLE) == set(known_keys())


@pytest.mark.parametrize("key", known_keys())
def test_the_key_takes_effect_or_is_refused(world: World, key: str) -> None:
    assert TABLE[key](world)
