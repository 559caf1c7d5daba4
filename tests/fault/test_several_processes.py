"""Several processes on one run, by mistake or on purpose: the bytes of one, shared work, each ends when all is done."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fork_server import ForkServer

from nnunet_models import make_model
from small_jobs import em_like, finals, infer_words, ledger_lines, quick_folder, write_h5

BLOCKS = 24
LATER = (
    ("/coordination/predict", 5),
    ("survey.json", 1),
    ("filter.dust.zarr", 2),
    ("v_labels.h5", 1),
    ("checksums", 1),
)
SETTINGS = (
    "inference.block_shape=[1,32,64]",
    "inference.output.formats=[h5,zarr,png]",
    "inference.test_time_augmentation.enabled=false",
    "inference.postprocessing.binary.enabled=true",
    "inference.postprocessing.binary.remove_small_objects=6",
)


@dataclass(frozen=True)
class Bench:
    """A server, a job and its undisturbed result."""

    server: ForkServer
    folder: Path
    model: Path
    volume: Path
    reference: dict[str, bytes]

    def words(self, output: Path) -> list[str]:
        return infer_words(self.model, output, self.volume, *SETTINGS)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with quick_folder() as folder:
        model = make_model(folder / "model", dimensions=2, patch=(16, 16), features=(4, 8))
        volume = write_h5(folder / "v.h5", em_like((4, 96, 128)))
        with ForkServer(folder) as server:
            output = folder / "one"
            ended = server.run(infer_words(model, output, volume, *SETTINGS))
            assert ended.code == 0, ended.stderr
            yield Bench(server, folder, model, volume, finals(output))


def require_shared(bench: Bench, output: Path, *, most: int) -> list[int]:
    """The bytes of one process, no leftovers, each block done about once; blocks done by each process."""
    assert finals(output) == bench.reference
    run = output / "v_labels.run"
    assert {path.name for path in output.iterdir()} == {"v_labels.h5", "v_labels.zarr", "v_labels_png", "v_labels.run"}
    assert not list(run.glob("*/*.zarr")) and not list(run.glob("*/coordination"))
    lines = ledger_lines(run)
    assert len({line["block"] for line in lines}) == BLOCKS
    assert BLOCKS <= len(lines) <= most
    require_told(run, len(lines) - BLOCKS)
    return [path.read_bytes().count(b"\n") - 1 for path in run.glob("*/ledger/*.jsonl")]


def require_told(run: Path, repeated: int) -> None:
    """The report is the sum over all, whoever wrote it last; the log's lines say whose they are."""
    report = json.loads((run / "report.json").read_text())
    assert (report["planned"], report["skipped"] + report["done"], report["failed"]) == (BLOCKS, BLOCKS, 0)
    workers, ledgers = report["workers"], list(run.glob("*/ledger/*.jsonl"))
    assert sum(worker["blocks"] for worker in workers) == BLOCKS
    if report["skipped"] == 0:  # else one was killed before the others came
        assert sum(worker["windows"] for worker in workers) == report["windows"]
    assert report["repeated"] == repeated
    assert {worker["pid"] for worker in workers if worker["blocks"]} <= {int(p.name.split("-")[1]) for p in ledgers}
    assert len([worker for worker in workers if worker["until"] is None]) <= 1, "one at most was killed"
    logged = re.findall(r"(?m)^\S+ \S+ \S+ (\w{8}-\d+) INFO \S+: predict, block", (run / "run.log").read_text())
    assert set(logged) <= {"-".join(path.name.split("-")[:2]) for path in ledgers}
    assert len(set(logged)) >= len(ledgers) - 1


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_one_run(bench: Bench, count: int) -> None:
    output = bench.folder / f"shared_{count}"
    for ended in bench.server.run_together(bench.words(output), count, watched=output):
        assert ended.code == 0, ended.stdout + ended.stderr
        assert re.search(r"(done|skipped) +1\n", ended.stdout)
        assert "Traceback" not in ended.stderr
    shares = require_shared(bench, output, most=BLOCKS)
    assert len(shares) > 1, "one process did it all"
    assert json.loads((output / "v_labels.run" / "report.json").read_text())["done"] == BLOCKS


@pytest.mark.parametrize(
    "where", [(".zarr/0/c/", 3), *(pytest.param(where, marks=pytest.mark.long) for where in LATER)], ids=str
)
def test_the_others_take_over_from_one_that_is_killed(bench: Bench, where: tuple[str, int]) -> None:
    output = bench.folder / f"killed_{where[1]}"
    first, *others = bench.server.run_together(bench.words(output), 3, watched=output, kill_first_at=where)
    assert first.code in (-signal.SIGKILL, 0), "the others may have been quicker everywhere"
    for ended in others:
        assert ended.code == 0, ended.stdout + ended.stderr
    require_shared(bench, output, most=BLOCKS + 1)


@pytest.mark.long
@pytest.mark.parametrize("moment", range(1, 61))
def test_a_storm_among_four(bench: Bench, moment: int) -> None:
    output = bench.folder / f"storm_{moment}"
    _, *others = bench.server.run_together(
        bench.words(output), 4, watched=output, kill_first_at=("v_labels.run", 3 * moment)
    )
    for ended in others:
        assert ended.code == 0, ended.stdout + ended.stderr
    require_shared(bench, output, most=BLOCKS + 2)
