"""Both stages of a cascade in one call: killed in either, continued to the bytes of an undisturbed run."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
from fork_server import Ended, ForkServer
from tuned import keep_profile, torch_trial

from connectomics.cli import main
from connectomics.execution.run_folder import CHECKSUMS

from nnunet_models import make_model
from parity_table import train_second_stage
from small_jobs import em_like, final_names, finals, infer_words, ledger_lines, quick_folder, read_h5, write_h5

BLOCKS = 6
CUT = ("inference.block_shape=[1,24,32]", "inference.test_time_augmentation.enabled=false")
FIRST, SHARD = "previous_stage", ".zarr/0/c/"  # in RUN, and in the path of a working store's shard


@dataclass(frozen=True)
class Bench:
    """A server, both models, a volume, and what an undisturbed run made of it."""

    server: ForkServer
    folder: Path
    first: Path
    second: Path
    volume: Path
    reference: dict[str, bytes]

    def words(self, output: Path, *more: str) -> list[str]:
        stage = f"model.previous_stage={self.first}"
        return infer_words(self.second, output, self.volume, *CUT, stage, *more)

    def run(self, output: Path, kill_at: tuple[str, int] | None = None, *more: str) -> Ended:
        return self.server.run(self.words(output, *more), watched=output, kill_at=kill_at)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with quick_folder() as folder:
        common = {"dimensions": 2, "patch": (16, 16), "features": (4, 8), "classes": 3, "seed": 2}
        first = make_model(folder / "first", name="2d_lowres", **common)  # type: ignore[arg-type]
        second = make_model(
            folder / "second",
            previous_stage="2d_lowres",
            give_weights=train_second_stage,
            **common,  # type: ignore[arg-type]
        )
        volume = write_h5(folder / "v.h5", em_like((3, 24, 64)))
        with ForkServer(folder) as server:
            made = Bench(server, folder, first, second, volume, {})
            assert main(made.words(folder / "undisturbed")) == 0
            yield Bench(server, folder, first, second, volume, finals(folder / "undisturbed"))


def recorded(run: Path) -> int:
    return len(ledger_lines(run))


def test_killed_in_each_stage_it_ends_with_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    run = tmp_path / "v_labels.run"
    undisturbed = bench.folder / "undisturbed" / "v_labels.run"
    (second,) = (path.name for path in undisturbed.iterdir() if path.is_dir() and path.name not in (FIRST, CHECKSUMS))
    moments = ((f"/{FIRST}/", SHARD, 4), (f"/{second}", "", 1), (f"/{second}/", SHARD, 4))
    for stage, what, number in moments:
        text = SHARD if what else stage  # each stage's shards are the first that its call touches
        ended = bench.run(tmp_path, (text, number))
        assert (ended.code, final_names(tmp_path)) == (-signal.SIGKILL, set()), ended.stderr
        assert stage in ended.touched[-1] and what in ended.touched[-1]
        finished = stage != f"/{FIRST}/"
        assert (run / FIRST / "v_labels.zarr").exists() == finished
        assert recorded(run / FIRST / "v_labels.run") == (BLOCKS if finished else number - 1)
    assert recorded(run) == 3
    ended = bench.run(tmp_path)
    assert ended.code == 0, ended.stderr
    assert finals(tmp_path) == bench.reference
    assert (run / "run.log").read_text().count("the previous stage, configuration 2d_lowres") == 2
    assert "Skipped 1/1" in bench.run(tmp_path).stderr


def test_each_stage_has_its_own_batch_and_goes_on_with_it(bench: Bench, tmp_path: Path) -> None:
    """The first one, killed, does so after something else was measured of it; the second is not asked to follow."""
    words = (f"system.cache_dir='{tmp_path}/cache'", "system.backend=auto")
    output, first = tmp_path / "out", tmp_path / "out" / "v_labels.run"
    keep_profile(tmp_path / "cache", bench.first, torch_trial(1, 0.1), torch_trial(4, 0.05))
    ended = bench.run(output, (SHARD, 4), *words)
    assert (ended.code, recorded(first / FIRST / "v_labels.run")) == (-signal.SIGKILL, 3), ended.stderr
    keep_profile(tmp_path / "cache", bench.first, torch_trial(1, 0.1))
    ended = bench.run(output, None, *words)
    assert ended.code == 0, ended.stderr
    runs = [json.loads((run / "provenance.json").read_text()) for run in (first / FIRST / "v_labels.run", first)]
    assert [run["numeric_class"]["batch"] for run in runs] == [4, 1]


def test_both_stages_give_what_they_give_one_after_the_other(bench: Bench, tmp_path: Path) -> None:
    assert main(infer_words(bench.first, tmp_path / "first", bench.volume, *CUT)) == 0
    given = f"model.previous_stage='{tmp_path}/first/*_labels.h5'"
    words = infer_words(bench.second, tmp_path / "second", bench.volume, *CUT, given)
    assert main(words) == 0
    expected = read_h5(bench.folder / "undisturbed" / "v_labels.h5")
    np.testing.assert_array_equal(read_h5(tmp_path / "second" / "v_labels.h5"), expected)
    alone = read_h5(tmp_path / "first" / "v_labels.h5")
    assert (alone != expected).any() and len(np.unique(expected)) > 1
    with h5py.File(tmp_path / "first" / "v_labels.h5", "a") as file:
        file["main"][:] = np.roll(alone, 5, 2)
    assert main(words) == 3, "another previous stage is another result"
    assert main([*words, "inference.output.overwrite=true"]) == 0
    assert (read_h5(tmp_path / "second" / "v_labels.h5") != expected).any()


def test_a_box_restricts_the_second_stage_alone(bench: Bench, tmp_path: Path) -> None:
    """Its windows reach beyond the box, and the first stage's labels are wanted there too."""
    assert main(bench.words(tmp_path, "inference.roi=[[1,4,20],[2,20,40]]")) == 0
    full = read_h5(bench.folder / "undisturbed" / "v_labels.h5")
    expected = np.zeros_like(full)
    expected[1:2, 4:20, 20:40] = full[1:2, 4:20, 20:40]
    assert expected.any()
    np.testing.assert_array_equal(read_h5(tmp_path / "v_labels.h5"), expected)
    report = json.loads((tmp_path / "v_labels.run" / "report.json").read_text())
    assert report["planned"] == 2
    first = json.loads((tmp_path / "v_labels.run" / FIRST / "v_labels.run" / "report.json").read_text())
    assert first["planned"] == BLOCKS


def test_the_records_name_the_previous_stage(bench: Bench) -> None:
    record = json.loads((bench.folder / "undisturbed" / "v_labels.run" / "provenance.json").read_text())
    assert record["previous_stage"]["configuration"] == "2d_lowres"
    assert f'model.previous_stage="{bench.first}"' in record["command"]
