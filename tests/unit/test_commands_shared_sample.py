"""Small volumes of one call are held to one sample of fast against exact; large ones, and one alone, to their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from connectomics.assembly import shared_sample
from connectomics.cli import main
from connectomics.stages.predict.precision_check import Agreement, FastContract

from nnunet_models import make_model
from small_jobs import em_like, final_names, finals, infer_words, quick_folder, read_h5, write_h5

FAST = ("inference.precision=fast", "inference.max_disagreement=1")
SHAPE = (2, 24, 32)
VOXELS = 2 * 24 * 32
NAMES = [f"v{i}" for i in range(6)]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with quick_folder() as made:
        make_model(made / "model", dimensions=2, patch=(16, 16), features=(4, 8), mirror_axes=())
        for seed, name in enumerate(NAMES):
            write_h5(made / f"{name}.h5", em_like(SHAPE, seed))
        yield made


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Volumes that were measured, and how many voxels at least; a sample of three volumes suffices here."""
    calls: list[tuple[str, int]] = []
    measure = FastContract.measure

    def noted(self: FastContract, *arguments: Any, **named: Any) -> Agreement:
        name, voxels = named["name"], named["voxels"]
        calls.append((name.removesuffix(".h5"), voxels))
        return measure(self, *arguments, **named)

    monkeypatch.setattr(FastContract, "measure", noted)
    monkeypatch.setattr(shared_sample, "SAMPLED_VOXELS", 3 * VOXELS)
    return calls


def run(folder: Path, output: Path, *words: str) -> int:
    (model,) = (folder / "model").iterdir()
    return main(infer_words(model, output, folder / "v*.h5", *words))


def agreement(output: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / f"{name}_labels.run" / "provenance.json").read_text())["agreement"]
    return found | {"boxes": [(of.removesuffix(".h5"), start, stop) for of, start, stop in found["boxes"]]}


def test_one_sample_of_volumes_that_lie_apart_serves_all(
    folder: Path, tmp_path: Path, measured: list[tuple[str, int]]
) -> None:
    assert run(folder, tmp_path / "fast", *FAST) == 0
    assert run(folder, tmp_path / "exact") == 0
    found = agreement(tmp_path / "fast", "v0")
    assert all(agreement(tmp_path / "fast", name) == found for name in NAMES)
    assert len({name for name, _ in measured}) == len(measured) < len(NAMES)
    assert {name for name, _ in measured} == {name for name, _, _ in found["boxes"]}
    assert found["voxels"] >= 3 * VOXELS
    exact, fast = ({n: read_h5(tmp_path / p / f"{n}_labels.h5") for n in NAMES} for p in ("exact", "fast"))
    counted = 0
    for name, start, stop in found["boxes"]:
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        counted += int((exact[name][box] != fast[name][box]).sum())
    assert found["differ"] == counted > 0


def test_a_rerun_takes_the_same_sample(folder: Path, tmp_path: Path, measured: list[tuple[str, int]]) -> None:
    assert run(folder, tmp_path, *FAST) == 0
    before, first = finals(tmp_path), list(measured)
    for name in ("v3", "v5"):
        (tmp_path / f"{name}_labels.h5").unlink()
        for kept in (tmp_path / f"{name}_labels.run").glob("*/agreement.json"):
            kept.unlink()
    assert run(folder, tmp_path, *FAST) == 0
    assert finals(tmp_path) == before
    assert measured == 2 * first


def test_what_cannot_be_read_costs_the_others_nothing(
    folder: Path, tmp_path: Path, measured: list[tuple[str, int]]
) -> None:
    broken = folder / "v2_broken.h5"
    broken.touch()
    try:
        assert run(folder, tmp_path, *FAST) == 3
    finally:
        broken.unlink()
    assert final_names(tmp_path) == {f"{name}_labels.h5" for name in NAMES}
    assert agreement(tmp_path, "v0")["voxels"] >= 3 * VOXELS


def test_all_are_refused_where_too_much_differs(
    folder: Path, tmp_path: Path, measured: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, tmp_path, "inference.precision=fast", "inference.max_disagreement=0") == 3
    assert capsys.readouterr().out.count("set inference.precision=exact") >= len(NAMES)
    assert finals(tmp_path) == {}
    assert len(measured) < len(NAMES)


def test_a_large_volume_has_its_own(
    folder: Path, tmp_path: Path, measured: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_sample, "SMALL_VOXELS", 2 * VOXELS)
    large = write_h5(folder / "v_large.h5", em_like((4, 24, 32)))
    try:
        assert run(folder, tmp_path, *FAST) == 0
    finally:
        large.unlink()
    assert {name for name, _, _ in agreement(tmp_path, "v_large")["boxes"]} == {"v_large"}
    assert "v_large" not in {name for name, _, _ in agreement(tmp_path, "v0")["boxes"]}
    assert [name for name, _ in measured].count("v_large") == 1
