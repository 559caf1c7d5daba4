"""What every step of decoding keeps: ``DecodingStepContract``, a suite for pytest, and ``decode_array``, its means.

A package that adds a step subclasses the suite, states the step and some volumes, and lets pytest collect it.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from connectomics.config.load import read_steps
from connectomics.core.errors import ConfigError
from connectomics.core.features import DECODING_STEPS
from connectomics.core.geometry import Block, BlockGrid, Box, Vec3, vec3
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.ledger import Ledger
from connectomics.execution.runner import BlocksDone, RunStage, run_blocks
from connectomics.execution.task import BlockRecord, Task
from connectomics.execution.worker import Worker
from connectomics.objects.merge import OBJECTS
from connectomics.objects.selection import NUMBERS
from connectomics.objects.table import MeasurementUnits
from connectomics.stages.decode.context import DecodingState, StepContext, decode_plan
from connectomics.stages.decode.object_filters import Filters, passes
from connectomics.stages.decode.step_contract import DecodingMemory, DecodingPass, DecodingStep, StepInput
from connectomics.volumes.in_memory import ArrayVolume

VoxelArray = npt.NDArray[Any]
VOXEL_SIZE_NM = (40.0, 8.0, 6.0)
KINDS = (bool, int, float, str)


def volume_of(array: VoxelArray) -> ArrayVolume:
    """Return a volume over an array (z, y, x)."""
    return ArrayVolume(array[None], vec3(array.shape), voxel_size_nm=VOXEL_SIZE_NM)


def in_order(task: Task, ledger: Ledger) -> BlocksDone:
    """Run a stage without other processes."""
    with Worker.of(ledger.folder.parent / "coordination") as worker:
        return run_blocks(task, ledger, SerialExecutor(), worker, on_block=lambda done, planned: None)


@dataclass(frozen=True)
class Decoded:
    """What steps left: the ids (z, y, x), and the last state."""

    ids: VoxelArray
    state: DecodingState


@dataclass(frozen=True)
class StepSample:
    """A volume for a step: values, probabilities for the table or None, and the steps before this one."""

    values: VoxelArray
    probabilities: VoxelArray | None = None
    before: tuple[DecodingStep, ...] = ()


def decode_array(
    values: VoxelArray,
    steps: Sequence[DecodingStep],
    block: Vec3,
    folder: Path,
    probabilities: VoxelArray | None = None,
    *,
    fused: bool = False,
    run: RunStage = in_order,
    alone: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Decoded:
    """Run steps on a volume in memory, with stores, tables and ledgers in a folder.

    Parameters
    ----------
    values, probabilities
        (z, y, x); probabilities are uint8, or None.
    steps
        In order.
    block
        Shape of the blocks.
    folder
        Where the work goes; what an earlier call left there is continued.
    fused
        Whether selections are made together with the step before them, as in a run.
    run
        Brings the blocks of a stage into its ledger.
    alone
        Held while something is made that one process alone may make.
    """
    grid = BlockGrid(vec3(values.shape), block)
    read = None if probabilities is None else lambda box: probabilities[box.slices]
    units = None if probabilities is None else (255.0, 255.0)
    state = DecodingState(volume_of(values), MeasurementUnits(VOXEL_SIZE_NM, probability_units=units), read)
    context = StepContext(folder, "", BlockPlan(block, block), grid, run_key="0" * 64, run=run, alone=alone)
    made = passes(steps, VOXEL_SIZE_NM) if fused else [DecodingPass(step) for step in steps]
    for number, each in enumerate(made):
        state = each.step.run(state, dataclasses.replace(context, name=str(number), selection=each.selection))
    return Decoded(state.volume.read(Box.of_shape(vec3(values.shape)))[0], state)


@dataclass
class _Interrupting:
    """Run blocks until so many are done, then die; counts those that it has done."""

    left: int
    done: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, task: Task, ledger: Ledger) -> BlocksDone:
        return in_order(_Counted(task, self), ledger)


@dataclass(frozen=True)
class _Counted:
    task: Task
    owner: _Interrupting

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def grid(self) -> BlockGrid:
        return self.task.grid

    def process(self, block: Block) -> BlockRecord:
        if not self.owner.left:
            raise KeyboardInterrupt
        self.owner.left -= 1
        record = self.task.process(block)
        self.owner.done.append((self.name, block.key))
        return record


class DecodingStepContract:
    """What every step keeps. Subclass it as ``TestMyStep``, and state what it is about.

    Examples
    --------
    >>> class TestOpening(DecodingStepContract):
    ...     stated = {"name": "opening", "radius_nm": 40.0}
    ...     refused = [{"radius_nm": -1.0}]
    ...     samples = [StepSample(np.ones((4, 5, 6), np.uint8))]
    """

    stated: ClassVar[Mapping[str, object]]
    """The step as it stands in the configuration, with its name."""
    refused: ClassVar[Sequence[Mapping[str, object]]]
    """Impossible values, each together with the rest of ``stated``."""
    samples: ClassVar[Sequence[StepSample]]
    """Volumes of different shapes."""

    def step(self) -> DecodingStep:
        """Return the step, read as from a configuration."""
        (step,) = read_steps([dict(self.stated)])
        found: DecodingStep = step
        return found

    def whole(self, sample: StepSample, folder: Path) -> Decoded:
        """Return what the step makes of a volume in one block."""
        return self.cut(sample, vec3(sample.values.shape), folder)

    def cut(self, sample: StepSample, block: Vec3, folder: Path, run: RunStage = in_order) -> Decoded:
        """Return what the step makes of a volume in blocks."""
        steps = [*sample.before, self.step()]
        return decode_array(sample.values, steps, block, folder, probabilities=sample.probabilities, run=run)

    def test_its_fields_are_its_keys_and_in_the_result_key(self) -> None:
        step = self.step()
        kind = DECODING_STEPS.load(step.name)
        facts = dataclasses.asdict(step)  # type: ignore[call-overload]
        assert next(iter(facts)) == "name" and facts["name"] == self.stated["name"]
        assert {key: facts[key] for key in self.stated} == dict(self.stated)
        assert read_steps([facts]) == [step] and isinstance(step, kind)
        hints = typing.get_type_hints(kind)
        for each in dataclasses.fields(kind):
            kinds = typing.get_args(hints[each.name]) or (hints[each.name],)
            assert set(kinds) <= {*KINDS, type(None)}, each.name

    def test_it_refuses_unknown_keys(self) -> None:
        with pytest.raises(ConfigError, match="unknown key 'no_such_key'"):
            read_steps([{**self.stated, "no_such_key": 1}])

    def test_it_refuses_impossible_values_with_a_sentence(self) -> None:
        assert self.refused
        for values in self.refused:
            with pytest.raises(ConfigError) as refused:
                read_steps([{**self.stated, **values}])
            assert str(refused.value).startswith("decoding[0].") and " but " in str(refused.value)
            assert "\n" not in str(refused.value)

    def test_it_suits_its_samples_and_plans_blocks(self) -> None:
        for sample in self.samples:
            given = StepInput("volume", volume_of(sample.values).info, bool(sample.before), True)
            assert self.step().check("decoding[0]", given).ids
            info = volume_of(sample.values).info
            plan = decode_plan(info, 1 << 30)
            memory = DecodingMemory(1 << 40, 1 << 40)
            assert self.step().plan("decoding[0]", info, memory, plan) == plan

    def test_blocks_change_nothing(self, tmp_path: Path) -> None:
        for number, sample in enumerate(self.samples):
            whole = self.whole(sample, tmp_path / f"{number} whole")
            assert whole.ids.dtype in (np.uint32, np.uint64)
            assert len(np.unique(whole.ids[whole.ids > 0])) == whole.state.count > 0
            for block in block_shapes(vec3(sample.values.shape)):
                cut = self.cut(sample, block, tmp_path / f"{number} {block}")
                assert cut.ids.tobytes() == whole.ids.tobytes(), (number, block)
                assert cut.state.facts == whole.state.facts and cut.state.frame == whole.state.frame
                assert rows_of(cut) == rows_of(whole), (number, block)

    def test_it_continues_after_a_death_between_blocks(self, tmp_path: Path) -> None:
        sample = self.samples[0]
        block = block_shapes(vec3(sample.values.shape))[0]
        undisturbed = _Interrupting(-1)
        expected = self.cut(sample, block, tmp_path / "undisturbed", undisturbed)
        total = len(undisturbed.done)
        assert total > 3
        for died_after in sorted({0, 1, total // 2, total - 1}):
            folder, first, second = tmp_path / str(died_after), _Interrupting(died_after), _Interrupting(-1)
            with pytest.raises(KeyboardInterrupt):
                self.cut(sample, block, folder, first)
            resumed = self.cut(sample, block, folder, second)
            assert resumed.ids.tobytes() == expected.ids.tobytes() and rows_of(resumed) == rows_of(expected)
            assert sorted(first.done + second.done) == sorted(undisturbed.done), "blocks were done twice, or left out"

    def test_a_selection_with_it_is_that_of_filters_behind(self, tmp_path: Path) -> None:
        if not self.step().selects:
            return
        for number, sample in enumerate(self.samples):
            steps = [*sample.before, self.step(), Filters(min_voxels=3, keep_largest=2)]
            block, likely = block_shapes(vec3(sample.values.shape))[0], sample.probabilities
            one, two = (tmp_path / f"{number} {kind}" for kind in ("fused", "apart"))
            fused = decode_array(sample.values, steps, block, one, probabilities=likely, fused=True)
            apart = decode_array(sample.values, steps, block, two, probabilities=likely)
            assert np.array_equal(fused.ids, apart.ids) and rows_of(fused) == rows_of(apart)


def block_shapes(extent: Vec3) -> tuple[Vec3, ...]:
    """Return shapes of blocks that cut a volume: in halves, in sections, and unevenly."""
    z, y, x = extent
    halves = (max(1, -(-z // 2)), max(1, -(-y // 2)), max(1, -(-x // 2)))
    return (halves, (1, y, x), (max(1, z - 1), max(1, y // 2 + 1), max(1, x // 3)))


def rows_of(decoded: Decoded) -> tuple[bytes, bytes]:
    """Return the rows of the objects that stay, and their numbers."""
    assert decoded.state.tables is not None
    rows, numbers = (np.load(decoded.state.tables / name)[: decoded.state.count] for name in (OBJECTS, NUMBERS))
    return rows.tobytes(), numbers.tobytes()
