"""Blocks that kill every process that does them: the others are done, these are named, and nobody else is."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fork_server import Ended, ForkServer

from connectomics.execution.coordination import DiskStore
from connectomics.execution.lease import lease_of

from nnunet_models import make_model
from small_jobs import em_like, final_names, finals, infer_words, ledger_lines, quick_folder, write_h5

KILLER = Path(__file__).parents[1] / "killer"
SETTINGS = ("inference.block_shape=[1,32,64]", "inference.test_time_augmentation.enabled=false")
NAMED = "killed its process (signal 9; out of memory?)"


@dataclass(frozen=True)
class Bench:
    """A server, a model, and what undisturbed runs made of volumes, by the number of sections."""

    server: ForkServer
    folder: Path
    model: Path
    results: dict[int, dict[str, bytes]]

    def words(self, output: Path, sections: int, *more: str) -> list[str]:
        """A run on a volume of four blocks a section; its undisturbed result is made if it is not there."""
        volume = self.folder / f"v{sections}.h5"
        if sections not in self.results:
            write_h5(volume, em_like((sections, 64, 128)))
            whole = self.folder / f"whole_{sections}"
            ended = self.server.run(infer_words(self.model, whole, volume, *SETTINGS))
            assert ended.code == 0, ended.stderr
            self.results[sections] = finals(whole)
        return infer_words(self.model, output, volume, *SETTINGS, *more)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with quick_folder() as folder:
        model = make_model(folder / "model", dimensions=2, patch=(32, 32), features=(4, 8))
        with ForkServer(folder) as server:
            yield Bench(server, folder, model, {})


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Kills, from now on, every process that opens a file in whose path the pattern is found; empty: none."""

    def set_killer(pattern: str) -> None:
        monkeypatch.setenv("KILLER", pattern)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(KILLER), *paths]))

    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return set_killer


def quarantined(output: Path) -> dict[str, str]:
    """The blocks in quarantine, and what is said of each."""
    return {path.stem: path.read_text() for path in output.glob("*.run/**/quarantine/*.txt")}


def require_named(ended: list[Ended], output: Path, block: str, planned: int) -> None:
    """All that lived on say so, and of each stage but this block all is done."""
    assert [one.code for one in ended] == [3] * len(ended), [one.stdout + one.stderr for one in ended]
    for one in ended:
        assert f"1 of {planned} blocks failed and are quarantined ({block}, voxels" in one.stdout
        assert NAMED in one.stdout
    assert {block} == set(quarantined(output)) and NAMED in quarantined(output)[block]
    assert final_names(output) == set()


def run_with_killer(bench: Bench, words: list[str], output: Path, count: int) -> list[Ended]:
    """Workers at once, of which two must die; the others."""
    ended = sorted(bench.server.run_together(words, count, watched=output), key=lambda one: one.code)
    assert [one.code for one in ended[:2]] == [-signal.SIGKILL] * 2, [one.stderr for one in ended]
    return ended[2:]


@pytest.mark.parametrize(("sections", "count"), [(3, 3), pytest.param(15, 4, marks=pytest.mark.long)])
def test_one_killer_among_many_blocks_is_named_and_all_others_are_done(
    bench: Bench, kill_at: Callable[[str], None], sections: int, count: int
) -> None:
    output, planned = bench.folder / f"killed_{sections}", 4 * sections
    words = bench.words(output, sections)
    kill_at("_labels.run/.*labels.zarr/0/c/1/1/0$")
    require_named(run_with_killer(bench, words, output, count), output, "1-1-0", planned)
    assert len({line["block"] for line in ledger_lines(output / f"v{sections}_labels.run")}) == planned - 1
    if count > 3:
        require_named(bench.server.run_together(words, 2, watched=output), output, "1-1-0", planned)  # nobody dies
    kill_at("")  # more memory, say
    ended = bench.server.run(words)
    assert ended.code == 0 and quarantined(output) == {}, ended.stderr
    assert "it gets one of its own" in ended.stderr, "and does it in there"
    assert finals(output) == bench.results[sections]


@pytest.mark.long
def test_killed_by_something_else_a_block_is_done_in_a_process_of_its_own(bench: Bench) -> None:
    output = bench.folder / "innocent"
    words = bench.words(output, 3)
    for _ in range(2):
        ended = bench.server.run(words, watched=output, kill_at=("labels.zarr/0/c/1/1/0", 1))
        assert ended.code == -signal.SIGKILL
    ended = bench.server.run(words)
    assert ended.code == 0 and quarantined(output) == {}, ended.stderr
    assert "block 1-1-0: 2 processes ended at it; it gets one of its own" in ended.stderr
    assert finals(output) == bench.results[3]


def deaths(output: Path) -> dict[int, int]:
    """How many deaths are counted at blocks, by their numbers."""
    (folder,) = output.glob("*.run/*/coordination")
    store, found = DiskStore(folder), dict[int, int]()
    for name in store.list("predict.blocks-"):
        seen = store.read(name)
        lease = None if seen is None else lease_of(seen)
        found |= lease.blocks.deaths if lease is not None and lease.blocks is not None else {}
    return found


@pytest.mark.parametrize(("sections", "count"), [(3, 1), pytest.param(15, 4, marks=pytest.mark.long)])
def test_preempted_workers_name_nothing(bench: Bench, sections: int, count: int) -> None:
    """Asked to end again and again, as a scheduler does, which asks first."""
    output, term = bench.folder / f"preempted_{sections}", signal.SIGTERM
    words, at = bench.words(output, sections), ("labels.zarr/0/c/1/1/0", 1)
    for _ in range(3):
        first, *others = bench.server.run_together(words, count, watched=output, kill_first_at=at, number=term)
        assert first.code in (128 + term, 0), "others may have been quicker"
        assert all(one.code == 0 for one in others)
        assert first.code == 0 or others or deaths(output) == {}
    ended = bench.server.run(words)
    assert ended.code == 0 and quarantined(output) == {}
    assert "it gets one of its own" not in ended.stderr
    assert finals(output) == bench.results[sections]


@pytest.mark.long
@pytest.mark.parametrize(
    ("pattern", "block", "planned"),
    [(r"filter.dust.cut/0-1-1\.", "0-1-1", 12), (r"labels.final.zarr/0/c/0/0/\.0\.", "0-0-0", 1)],
    ids=["a filter", "a level"],
)
def test_killers_of_other_stages_are_named_too(
    bench: Bench, kill_at: Callable[[str], None], pattern: str, block: str, planned: int
) -> None:
    output = bench.folder / pattern[:6]
    words = bench.words(
        output,
        3,
        "inference.output.formats=[zarr]",
        "inference.postprocessing.binary.enabled=true",
        "inference.postprocessing.binary.remove_small_objects=6",
    )
    kill_at(pattern)
    require_named(run_with_killer(bench, words, output, 3), output, block, planned)
    kill_at("")
    ended = bench.server.run(words)
    assert ended.code == 0 and quarantined(output) == {}, ended.stderr
