"""Our own steps run through the suite that is shipped for others."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from connectomics import load_config
from connectomics.core.errors import ConfigError
from connectomics.core.features import DECODING_STEPS
from connectomics.stages.decode.connected_components import ConnectedComponents
from connectomics.testing.decoding_step import DecodingStepContract, StepSample

RANDOM = np.random.default_rng(7)
LIKELY = ndimage.gaussian_filter(RANDOM.random((7, 18, 15)), 0.9).astype(np.float32)


def labels(shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    smooth = ndimage.gaussian_filter(RANDOM.random(shape), 0.8)
    found = (smooth > np.quantile(smooth, 0.7)).astype(np.uint8)
    found[..., shape[2] // 2 :] *= 2
    return found


def hollow() -> npt.NDArray[np.uint8]:
    volume = np.zeros((8, 12, 11), np.uint8)
    volume[1:7, 1:11, 1:10] = 1
    volume[3:5, 3:9, 3:5] = 0
    volume[0, 0, 0] = 3
    return volume


SMALL, LARGE = labels((6, 13, 11)), labels((9, 12, 20))
LABELS = (
    StepSample(SMALL, RANDOM.integers(0, 256, SMALL.shape, np.uint8)),
    StepSample(LARGE),
    StepSample(labels((1, 9, 14))),
)


class TestConnectedComponents(DecodingStepContract):
    stated: ClassVar = {"name": "connected_components", "connectivity": 6}
    refused: ClassVar = ({"connectivity": 7}, {"channel": -1}, {"threshold": 0.5, "probabilities": "p.h5"})
    samples: ClassVar = LABELS


class TestConnectedComponentsOfProbabilities(DecodingStepContract):
    stated: ClassVar = {"name": "connected_components", "connectivity": 8, "threshold": 0.52}
    refused: ClassVar = ({"connectivity": 0},)
    samples: ClassVar = (StepSample(LIKELY),)


class TestFilters(DecodingStepContract):
    stated: ClassVar = {"name": "filters", "min_voxels": 2, "keep_largest": 6, "fill_holes": "3d"}
    refused: ClassVar = (
        {"min_voxels": -1},
        {"max_voxels": 1},
        {"min_volume_nm3": 5.0, "max_volume_nm3": 4.0},
        {"keep_largest": 0},
        {"fill_holes": "4d"},
    )
    samples: ClassVar = (
        StepSample(SMALL, LABELS[0].probabilities, (ConnectedComponents(),)),
        StepSample(hollow()),
    )


class TestSliceLinking(DecodingStepContract):
    stated: ClassVar = {"name": "slice_linking", "max_gap": 1}
    refused: ClassVar = ({"measure": "dice"}, {"threshold": 1.5}, {"max_gap": -1})
    samples: ClassVar = (*LABELS, StepSample(SMALL, None, (ConnectedComponents(connectivity=4),)))


class TestWatershedOfProbabilities(DecodingStepContract):
    stated: ClassVar = {
        "name": "watershed",
        "threshold": 0.45,
        "seed_threshold": 0.56,
        "max_component_voxels": 4096,
    }
    refused: ClassVar = ({"seed_threshold": 0.4}, {"seed_distance_nm": 9.0}, {"max_component_voxels": 100})
    samples: ClassVar = (
        StepSample(LIKELY),
        StepSample(ndimage.gaussian_filter(RANDOM.random((16, 30, 36)), 0.9).astype(np.float32)),
    )


class TestWatershedOfDistances(DecodingStepContract):
    stated: ClassVar = {"name": "watershed", "seed_distance_nm": 7.0, "connectivity": 8}
    refused: ClassVar = ({"seed_distance_nm": 0.0}, {"connectivity": 5}, {"seed_threshold": 0.5})
    samples: ClassVar = LABELS


PLUGIN = """
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from connectomics.stages.decode.context import DecodingState
from connectomics.stages.decode.step_contract import check_values
from connectomics.stages.decode.tasks import BlockPieces


@dataclass(frozen=True, slots=True, kw_only=True)
class OneObject:
    name: str = "one_object"
    by_block: bool = False
    above: int = 0
    probabilities: ClassVar[None] = None
    selects: ClassVar[bool] = True

    def rules(self):
        return {"above": (self.above >= 0, "must be 0 or more")}

    def check(self, key, given):
        check_values(key, given)
        return dataclasses.replace(given, ids=True)

    def plan(self, key, info, memory, plan):
        return plan

    def run(self, state, context):
        def read(box):
            inside = (state.volume.read(box)[0] > self.above).astype(np.uint32)
            return inside * (1 + box.start[2]) if self.by_block else inside

        pieces = context.pieces(BlockPieces(read, None, probabilities=state.probabilities))
        tables, count, _ = context.objects(pieces, context.selection, joined=False, by_first=True)
        store = context.paint(pieces, tables, state.volume.info, np.dtype(np.uint32))
        return DecodingState(store, state.frame, state.probabilities, tables, count=count)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that adds a step by an entry point."""
    package = tmp_path / "site"
    metadata = package / "one_object-1.0.dist-info"
    metadata.mkdir(parents=True)
    (package / "one_object.py").write_text(PLUGIN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: one-object\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[connectomics.decoding_steps]\none_object = one_object:OneObject\n")
    monkeypatch.syspath_prepend(package)
    DECODING_STEPS.look_again()
    yield
    DECODING_STEPS.look_again()
    sys.modules.pop("one_object", None)


class OneObjectContract(DecodingStepContract):
    stated: ClassVar = {"name": "one_object"}
    refused: ClassVar = ({"above": -1},)
    samples: ClassVar = LABELS


class DependentContract(OneObjectContract):
    stated: ClassVar = {"name": "one_object", "by_block": True}


@pytest.mark.parametrize("name", [name for name in vars(DecodingStepContract) if name.startswith("test_")])
def test_a_step_of_another_package_passes(name: str, plugin: None, tmp_path: Path) -> None:
    test = getattr(OneObjectContract(), name)
    test(**({"tmp_path": tmp_path} if "tmp_path" in inspect.signature(test).parameters else {}))


def test_a_step_whose_objects_depend_on_blocks_is_found(plugin: None, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        DependentContract().test_blocks_change_nothing(tmp_path)


def test_a_step_of_another_package_is_read_and_named_in_errors(plugin: None) -> None:
    assert load_config(None, ["decoding=[{name: one_object, above: 3}]"]).decoding[0].above == 3
    with pytest.raises(ConfigError, match=r"known steps are .*watershed, one_object; did you mean one_object"):
        load_config(None, ["decoding=[{name: one_objekt}]"])
