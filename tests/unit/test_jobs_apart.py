"""Every block of every stage made again from plain values alone, as a child process does it: the same bytes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from connectomics.cli import main
from connectomics.core.errors import DeviceError, LedgerError, VolumeError
from connectomics.core.geometry import Block, BlockGrid
from connectomics.execution import block_claims
from connectomics.execution.executors.child_process import ChildProcess
from connectomics.execution.run_folder import stage_of
from connectomics.execution.task import BlockFailure, BlockRecord
from connectomics.jobs.apart import labelled_block

import small_bands
from nnunet_models import make_model
from parity_table import train_second_stage
from small_jobs import em_like, finals, infer_words, quick_folder, write_h5

LABELLING = (
    "inference.block_shape=[2,16,32]",
    "inference.case=volume",
    "inference.output.formats=[h5,zarr,n5]",
    "inference.output.save_probabilities=true",
    "inference.postprocessing.binary.enabled=true",
    "inference.postprocessing.binary.remove_small_objects=6",
    "inference.postprocessing.binary.fill_holes=true",
    "inference.test_time_augmentation.enabled=false",
)
LABELLING_STAGES = {
    *("survey", "mask.cut", "mask.join", "mask.paint", "predict"),
    *(f"filter.{what}.{stage}" for what in ("dust", "holes") for stage in ("cut", "join", "paint")),
    *(f"{name}.{form}.0" for name in ("labels", "probabilities") for form in ("zarr", "n5")),
}
DECODING = ("inference.block_shape=[4,16,24]", "inference.output.formats=[h5,zarr]", "inference.output.table=csv")
COMPONENTS = "{name: connected_components, threshold: 0.56}, {name: filters, min_voxels: 20, fill_holes: 3d}"
WATERSHED = "{name: watershed, threshold: 0.56, seed_threshold: 0.62, max_component_voxels: 4096}"
LINKED = f"{WATERSHED}, {{name: filters, min_voxels: 20}}, {{name: slice_linking}}"


@dataclass
class Children:
    """Stand for child processes in this one; they note the stages that they were asked for."""

    stages: dict[str, int] = field(default_factory=dict)

    def do(self, process: ChildProcess, folder: Path, block: Block) -> BlockRecord | BlockFailure:
        stage = stage_of(folder)
        self.stages[stage] = self.stages.get(stage, 0) + 1
        do = pickle.loads(pickle.dumps(process.do))
        outcome: BlockRecord | BlockFailure = do(folder, block)
        return outcome


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    """From now on every block is a suspect."""
    made = Children()
    monkeypatch.setattr(block_claims, "MOST_DEATHS", 0)
    monkeypatch.setattr(ChildProcess, "__call__", lambda process, folder, block: made.do(process, folder, block))
    return made


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def labelling(place: Path) -> list[str]:
    """The words of a run with all stages that labelling has, but for its output folder; done once undisturbed."""
    model = make_model(place / "model", dimensions=2, patch=(16, 16), features=(4, 8), masked=(True,))
    image = em_like((4, 16, 64))
    image[:, :, :5] = image[1:3, 8:12, 20:36] = 0
    words = infer_words(model, place / "OUT", write_h5(place / "v.h5", image), *LABELLING)
    assert main([word.replace("OUT", "whole") for word in words]) == 0
    return words


def test_every_block_of_labelling(
    place: Path, labelling: list[str], children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_bands.prepare(1024, 2048, 2048, monkeypatch)
    assert main([word.replace("OUT", "apart") for word in labelling]) == 0
    assert set(children.stages) >= LABELLING_STAGES
    assert children.stages["predict"] == 4
    assert children.stages["survey"] == 2
    assert finals(place / "apart") == finals(place / "whole")


@pytest.mark.parametrize(
    ("depth", "steps", "stages"), [(4, COMPONENTS, 6), pytest.param(8, LINKED, 10, marks=pytest.mark.long)]
)
def test_every_block_of_decoding(
    place: Path, request: pytest.FixtureRequest, depth: int, steps: str, stages: int
) -> None:
    likely = ndimage.gaussian_filter(np.random.default_rng(0).random((depth, 32, 48)), 0.8).astype(np.float32)
    words = ["decode", str(write_h5(place / f"likely_{depth}.h5", likely)), f"decoding=[{steps}]", *DECODING]
    whole, apart = place / f"decoded_{depth}", place / f"decoded_{depth}_apart"
    assert main([*words, f"inference.data.output_path='{whole}'"]) == 0
    children: Children = request.getfixturevalue("children")
    assert main([*words, f"inference.data.output_path='{apart}'"]) == 0
    assert finals(apart) == finals(whole)
    ledgers = [stage_of(path) for path in whole.glob("*.run/*/ledger_*")]
    assert set(children.stages) >= {*ledgers, "objects.zarr.0"} and len(ledgers) >= stages


@pytest.mark.long
def test_every_block_of_both_stages_of_a_cascade(place: Path, request: pytest.FixtureRequest) -> None:
    first = make_model(
        place / "first", dimensions=2, patch=(16, 16), features=(4, 8), classes=3, seed=2, name="2d_lowres"
    )
    second = make_model(
        place / "second",
        dimensions=2,
        patch=(16, 16),
        features=(4, 8),
        classes=3,
        seed=2,
        previous_stage="2d_lowres",
        give_weights=train_second_stage,
    )
    volume = write_h5(place / "c.h5", em_like((2, 24, 64)))
    cut = ("inference.block_shape=[1,24,32]", f"model.previous_stage={first}")
    assert main(infer_words(second, place / "cascade", volume, *cut)) == 0
    children: Children = request.getfixturevalue("children")
    assert main(infer_words(second, place / "cascade_apart", volume, *cut)) == 0
    assert finals(place / "cascade_apart") == finals(place / "cascade")
    assert children.stages["predict"] == 8, "four blocks in each stage"
    firsts = [place / name / "c_labels.run" / "previous_stage" for name in ("cascade", "cascade_apart")]
    assert finals(firsts[0]) == finals(firsts[1])


class Enough(BaseException):
    """All was looked at."""


def test_what_is_not_of_the_run_any_more_is_refused(
    place: Path, labelling: list[str], monkeypatch: pytest.MonkeyPatch, children: Children
) -> None:
    """A child that finds another run, stage, grid or numeric class does nothing."""

    def look(process: ChildProcess, folder: Path, block: Block) -> BlockRecord | BlockFailure:
        if stage_of(folder) != "predict":
            return children.do(process, folder, block)
        stated, _, source = process.do.args  # type: ignore[attr-defined]  # a partial function
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(LedgerError, match="0 of 4 blocks are done, although a later stage has begun"):
            process.do(folder.with_name("ledger_filter.dust.cut"), block)
        with pytest.raises(VolumeError, match="are not any more what they were when"):
            process.do(folder.parent.with_name("0123456789abcdef") / "ledger", block)
        with pytest.raises(LedgerError, match="the volume is cut in another way now"):
            process.do(folder, BlockGrid((4, 16, 64), (1, 16, 32)).block((0, 0, 0)))
        with pytest.raises(DeviceError, match="a process of its own computes with"):
            labelled_block(stated, {"backend": "other"}, source, folder, block)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        raise Enough

    monkeypatch.setattr(ChildProcess, "__call__", look)
    with pytest.raises(Enough):
        main([word.replace("OUT", "looked_at") for word in labelling])
