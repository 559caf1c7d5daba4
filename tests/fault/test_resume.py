"""Continuing is never a stale mix: other models, settings, inputs, machines, lost and damaged files, signals."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from fork_server import Ended, ForkServer

from connectomics.stages.output.export import FORMATS, export_path, read_stamp

from nnunet_models import make_model
from small_jobs import em_like, final_names, finals, infer_words, ledger_lines, quick_folder, read_h5, write_h5

BLOCKS = 6
CUT = ("inference.block_shape=[1,24,32]", "inference.test_time_augmentation.enabled=false")
SHARD = ".zarr/0/c/"


@dataclass(frozen=True)
class Bench:
    """A server, two models and the undisturbed result."""

    server: ForkServer
    folder: Path
    model: Path
    other_model: Path
    reference: dict[str, bytes]


@dataclass(frozen=True)
class Job:
    """One volume of its own, to be interrupted and continued."""

    bench: Bench
    volume: Path
    output: Path

    @property
    def run_folder(self) -> Path:
        return self.output / "v_labels.run"

    @property
    def work(self) -> Path:
        (found,) = (path.parent for path in self.run_folder.glob("*/ledger"))
        return found

    def run(self, *more: str, model: Path | None = None, **how: Any) -> Ended:
        words = infer_words(model or self.bench.model, self.output, self.volume, *CUT, *more)
        return self.bench.server.run(words, **how)

    def interrupt(self, *more: str, blocks: int = 3) -> None:
        """Kill a run that has recorded so many blocks."""
        ended = self.run(*more, watched=self.output, kill_at=(SHARD, blocks + 1))
        assert ended.code == -signal.SIGKILL, ended.stderr
        assert not final_names(self.output)

    def report(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.run_folder / "report.json").read_text())
        return content

    def require_done(self, ended: Ended, *, computed: int) -> None:
        """The undisturbed bytes, and only so many blocks computed."""
        assert ended.code == 0, ended.stderr
        assert finals(self.output) == self.bench.reference
        assert (self.report()["done"], self.report()["skipped"]) == (computed, BLOCKS - computed)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with quick_folder() as folder:
        model, other = (
            make_model(folder / f"model{i}", dimensions=2, patch=(16, 16), features=(4, 8), seed=i) for i in (0, 1)
        )
        with ForkServer(folder) as server:
            job = Job(Bench(server, folder, model, other, {}), make_volume(folder / "v.h5"), folder / "undisturbed")
            assert job.run().code == 0
            yield Bench(server, folder, model, other, finals(job.output))


def make_volume(path: Path, seed: int = 0) -> Path:
    """The same volume each time, its modification time included."""
    write_h5(path, em_like((3, 24, 64), seed))
    os.utime(path, ns=(10**18, 10**18))
    return path


@pytest.fixture
def job(bench: Bench) -> Iterator[Job]:
    folder = bench.folder / "job"
    folder.mkdir()
    yield Job(bench, make_volume(folder / "v.h5"), folder / "out")
    shutil.rmtree(folder)


def labels(output: Path) -> Any:
    return read_h5(output / "v_labels.h5")


def test_what_a_run_leaves(job: Job) -> None:
    job.require_done(job.run(), computed=BLOCKS)
    assert {path.name for path in job.output.iterdir()} == {"v_labels.h5", "v_labels.run"}
    assert {p.name for p in job.run_folder.iterdir()} == {
        "run.log",
        "report.json",
        "provenance.json",
        "checksums",
        job.work.name,
    }
    provenance = json.loads((job.run_folder / "provenance.json").read_text())
    with h5py.File(job.output / "v_labels.h5") as file:
        stamp = json.loads(file.attrs["connectomics"])
    assert provenance.pop("command")[:2] == ["infer-volume", "--checkpoint"]
    assert provenance.pop("result_keys") == {"labels": stamp["result_key"]}
    assert provenance.pop("outputs") == ["v_labels.h5"]
    assert stamp == provenance | {"result_key": stamp["result_key"]}
    assert job.report()["windows"] == sum(line["windows"] for line in ledger_lines(job.run_folder))


def test_a_finished_volume_is_skipped_untouched(job: Job) -> None:
    job.run()
    before = (job.output / "v_labels.h5").stat()
    ended = job.run()
    assert ended.code == 0
    assert "Skipped 1/1 finished, processing 0" in ended.stderr
    after = (job.output / "v_labels.h5").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def change(job: Job, what: str) -> tuple[list[str], dict[str, Any]]:
    """Change what decides the result; further words and options of the run that follows."""
    if what == "input":
        os.utime(make_volume(job.volume, seed=5))
    model = job.bench.other_model if what == "model" else None
    words = {"setting": ["inference.sliding_window.overlap=0.25"], "box": ["inference.roi=[[1,0,0],[3,20,60]]"]}
    return words.get(what, []), {"model": model}


@pytest.mark.parametrize("what", ["model", "setting", "input", "box"])
def test_a_final_output_of_something_else_is_refused_unless_overwritten(job: Job, what: str) -> None:
    job.run()
    before = finals(job.output)
    more, how = change(job, what)

    ended = job.run(*more, **how)
    assert ended.code == 3
    assert "v_labels.h5: exists, but was made by another model, setting or input" in ended.stdout
    assert "inference.output.overwrite=true" in ended.stdout
    assert finals(job.output) == before

    ended = job.run(*more, "inference.output.overwrite=true", **how)
    assert ended.code == 0
    assert finals(job.output) != before
    assert "Skipped 1/1" in job.run(*more, **how).stderr


def contents(work: Path) -> dict[Path, bytes]:
    """All files of unfinished work but those that say who works on it."""
    files = (path for path in work.rglob("*") if path.is_file() and path.parent.name != "coordination")
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("what", ["model", "setting", "input", "box"])
def test_unfinished_work_of_something_else_is_neither_used_nor_touched(job: Job, what: str) -> None:
    job.interrupt()
    begun = job.work
    before = contents(begun)
    more, how = change(job, what)

    ended = job.run(*more, **how)
    assert ended.code == 0
    assert (job.report()["done"], job.report()["skipped"]) == (4 if what == "box" else BLOCKS, 0)
    assert f"unfinished work of other settings ({begun.name})" in ended.stderr
    assert contents(begun) == before
    assert not (labels(job.output) == labels(job.bench.folder / "undisturbed")).all()


@pytest.mark.parametrize("saved", ["false", "true"], ids=["labels", "probabilities"])
def test_work_on_a_part_is_continued(job: Job, saved: str) -> None:
    """Four blocks hold wanted voxels; the others are written too where background is not 0."""
    mask = np.zeros((3, 12, 16), np.uint8)
    mask[:2, 3:8, 5:12] = 1
    words = [f"inference.mask='{write_h5(job.output.parent / 'mask.h5', mask)}'"]
    words.append(f"inference.output.save_probabilities={saved}")
    undisturbed = Job(job.bench, job.volume, job.output.parent / "undisturbed")
    assert undisturbed.run(*words).code == 0
    planned = undisturbed.report()["planned"]
    assert planned == (BLOCKS if saved == "true" else 4)
    job.interrupt(*words)
    recorded = len(ledger_lines(job.run_folder))
    ended = job.run(*words)
    assert ended.code == 0, ended.stderr
    assert finals(job.output) == finals(undisturbed.output)
    assert 0 < recorded < planned
    assert (job.report()["skipped"], job.report()["done"]) == (recorded, planned - recorded)


def test_another_numeric_class_is_refused_unless_allowed(job: Job) -> None:
    job.interrupt()
    ended = job.run("system.num_cpus=2")
    assert ended.code == 3
    assert "'threads': 1" in ended.stdout
    assert "'threads': 2" in ended.stdout
    assert "system.allow_mixed_devices=true" in ended.stdout
    assert not final_names(job.output)

    ended = job.run("system.num_cpus=2", "system.allow_mixed_devices=true")
    assert ended.code == 0
    assert job.report()["skipped"] == 3
    assert json.loads((job.run_folder / "provenance.json").read_text())["numeric_class"] == "mixed"


def test_mixing_is_remembered(job: Job) -> None:
    job.interrupt(blocks=2)
    job.interrupt("system.num_cpus=2", "system.allow_mixed_devices=true", blocks=4)
    assert len(ledger_lines(job.run_folder)) > 2
    assert job.run().code == 0
    assert json.loads((job.run_folder / "provenance.json").read_text())["numeric_class"] == "mixed"


def test_a_run_without_a_finished_block_may_change_its_numeric_class(job: Job) -> None:
    job.interrupt(blocks=0)
    ended = job.run("system.num_cpus=2")
    assert ended.code == 0
    provenance = json.loads((job.run_folder / "provenance.json").read_text())
    assert provenance["numeric_class"]["threads"] == 2


def shards(job: Job) -> list[Path]:
    return sorted(path for path in (job.work / "labels.zarr" / "0" / "c").rglob("*") if path.is_file())


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, flip_a_byte, lambda path: path.write_bytes(b""), lambda path: os.truncate(path, 20)],
    ids=["missing", "flipped byte", "empty", "cut short"],
)
def test_a_recorded_block_that_is_damaged_is_computed_again(job: Job, damage: Callable[[Path], None]) -> None:
    job.interrupt()
    damage(shards(job)[1])
    ended = job.run()
    job.require_done(ended, computed=BLOCKS - 2)
    assert "1 recorded blocks are missing or damaged" in ended.stderr
    assert len(ledger_lines(job.run_folder)) == BLOCKS


def ledger_of(job: Job) -> Path:
    """The one worker's file of the ledger."""
    (found,) = (job.work / "ledger").glob("*.jsonl")
    return found


def test_a_torn_last_line_of_the_ledger_is_a_block_that_was_not_finished(job: Job) -> None:
    job.interrupt()
    content = ledger_of(job).read_bytes()
    ledger_of(job).write_bytes(content[:-20])
    job.require_done(job.run(), computed=BLOCKS - 2)
    assert len(ledger_lines(job.run_folder)) == BLOCKS


def test_nothing_behind_a_damaged_line_of_the_ledger_is_trusted(job: Job) -> None:
    job.interrupt()
    lines = ledger_of(job).read_bytes().split(b"\n")
    lines[2] = b"\0" * len(lines[2])
    ledger_of(job).write_bytes(b"\n".join(lines))
    job.require_done(job.run(), computed=BLOCKS - 1)


@pytest.mark.parametrize("header", [b"", b"[]", b'{"ledger": 99}', b"\0\0\0"])
def test_a_ledger_that_is_not_one_is_refused(job: Job, header: bytes) -> None:
    job.interrupt()
    path = job.work / "ledger" / "header.json"
    path.write_bytes(header + b"\n")
    ended = job.run()
    assert ended.code == 3
    assert str(path) in ended.stdout
    assert "remove" in ended.stdout
    assert not final_names(job.output)


def test_a_ledger_of_another_run_is_refused(job: Job) -> None:
    job.interrupt()
    path = job.work / "ledger" / "header.json"
    content = path.read_text()
    path.write_text(re.sub('"run_key": "[0-9a-f]{8}', '"run_key": "00000000', content))
    ended = job.run()
    assert ended.code == 3
    assert "records the run 00000000" in ended.stdout


def test_a_lost_survey_is_made_again(job: Job) -> None:
    job.interrupt()
    (job.work / "survey.json").unlink()
    job.require_done(job.run(), computed=BLOCKS - 3)


@pytest.mark.parametrize("content", ["", "[]", '[{"region": 1}]', "{}"])
def test_a_damaged_survey_is_made_again(job: Job, content: str) -> None:
    job.interrupt()
    (job.work / "survey.json").write_text(content)
    job.require_done(job.run(), computed=BLOCKS - 3)


def test_a_lost_ledger_begins_anew(job: Job) -> None:
    job.interrupt()
    shutil.rmtree(job.work / "ledger")
    job.require_done(job.run(), computed=BLOCKS)


def test_a_lost_ledger_and_other_blocks_begin_anew(job: Job) -> None:
    job.interrupt()
    shutil.rmtree(job.work / "ledger")
    ended = job.run("inference.block_shape=[3,24,32]")
    assert ended.code == 0
    assert job.report()["planned"] == 2
    assert (labels(job.output) == labels(job.bench.folder / "undisturbed")).all()


def test_other_blocks_are_stated_on_resume_but_the_first_ones_stay(job: Job) -> None:
    job.interrupt()
    job.require_done(job.run("inference.block_shape=[3,24,64]"), computed=BLOCKS - 3)


def test_a_deleted_final_output_is_made_again(job: Job) -> None:
    job.run()
    (job.output / "v_labels.h5").unlink()
    job.require_done(job.run(), computed=BLOCKS)


def test_a_final_output_that_is_cut_short_is_refused_unless_overwritten(job: Job) -> None:
    job.run()
    os.truncate(job.output / "v_labels.h5", 500)
    ended = job.run()
    assert ended.code == 3
    assert "v_labels.h5: exists" in ended.stdout
    job.require_done(job.run("inference.output.overwrite=true"), computed=BLOCKS)


def test_a_missing_format_is_made_beside_the_finished_one(job: Job) -> None:
    job.run()
    before = (job.output / "v_labels.h5").stat().st_mtime_ns
    ended = job.run("inference.output.formats=[h5,tiff]")
    assert ended.code == 0
    assert final_names(job.output) == {"v_labels.h5", "v_labels.tif"}
    assert (job.output / "v_labels.h5").stat().st_mtime_ns == before


def test_a_deleted_run_folder_does_not_make_a_finished_volume_unfinished(job: Job) -> None:
    job.run()
    shutil.rmtree(job.run_folder)
    assert "Skipped 1/1" in job.run().stderr


def test_colliding_names_are_refused_before_anything_starts(job: Job) -> None:
    twin = write_h5(job.volume.parent / "sub" / "v.h5", em_like((3, 24, 64)))
    words = infer_words(job.bench.model, job.output, job.volume.parent / "**" / "v.h5", *CUT)
    ended = job.bench.server.run(words)
    assert ended.code == 2
    assert str(twin) in ended.stderr
    assert "would both write results named 'v_…'" in ended.stderr
    assert not job.output.exists()


@pytest.mark.parametrize("words", [["system.device=cuda:7"], ["system.device=auto", "system.num_gpus=1"]])
def test_an_unavailable_device_is_an_error_never_a_silent_cpu_run(job: Job, words: list[str]) -> None:
    ended = job.run(*words)
    assert ended.code == 3
    assert re.fullmatch(r"error: device 'cuda\S* is not available: .*\n", ended.stderr)
    assert not job.output.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_a_signal_ends_cleanly_and_the_run_continues(job: Job, number: int, code: int) -> None:
    ended = job.run(watched=job.output, kill_at=(SHARD, 4), number=number)
    assert ended.code == code, ended.stderr
    assert "finished blocks are kept, the same command continues" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "stopped: " in (job.run_folder / "run.log").read_text()
    assert not final_names(job.output)
    recorded = len(ledger_lines(job.run_folder))
    assert recorded in (3, 4)
    job.require_done(job.run(), computed=BLOCKS - recorded)


@pytest.mark.parametrize(("limit_bytes", "stage"), [(4000, "blocks"), (9000, "export")])
def test_a_full_disk_is_named_and_the_run_continues(job: Job, limit_bytes: int, stage: str) -> None:
    write_h5(job.volume, np.random.default_rng(0).integers(0, 255, (3, 24, 64), np.uint8))
    more = ("inference.output.save_probabilities=true", "inference.output.formats=[tiff]")
    ended = job.run(*more, file_limit_bytes=limit_bytes)
    assert ended.code == 3
    assert "Free disk space" in ended.stdout
    assert "run again" in ended.stdout
    assert "Traceback" not in ended.stderr
    assert "v_labels_probabilities.tif" not in final_names(job.output)
    hidden = {path.name for path in job.output.iterdir() if path.name.startswith(".")}
    assert hidden == (set() if stage == "blocks" else {".claims"}), "an export has begun"
    recorded = len(ledger_lines(job.run_folder))
    assert recorded == (BLOCKS if stage == "export" else 0)
    ended = job.run(*more)
    assert ended.code == 0
    assert job.report()["skipped"] == recorded


def test_every_format_tells_how_it_was_made(job: Job) -> None:
    ended = job.run(f"inference.output.formats=[{','.join(FORMATS)}]", "inference.voxel_size_nm=[30,8,8]")
    assert ended.code == 0, ended.stdout + ended.stderr
    provenance = json.loads((job.run_folder / "provenance.json").read_text())
    told = {"program", "versions", "run_key", "model_sha256", "model_weights_sha256", "mirror_axes", "tile_step_size"}
    told |= {"window_size", "case", "statistics", "numeric_class", "input", "nnunet", "threshold", "resample", "seed"}
    for form in FORMATS:
        stamp = read_stamp(export_path(job.output, "v_labels", form), form)
        assert stamp is not None, form
        assert told <= set(stamp), form
        assert stamp["result_key"] == provenance["result_keys"]["labels"]
        assert {key: provenance[key] for key in told} == {key: stamp[key] for key in told}, form
    versions = {"connectomics": importlib.metadata.version("connectomics-nnunet")}
    versions |= {
        name: importlib.metadata.version(name) for name in ("nnunetv2", "torch", "numpy", "scipy", "tensorstore")
    }
    assert {name: provenance["versions"][name] for name in versions} == versions
    assert provenance["numeric_class"]["threads"] == 1
    assert provenance["input"]["name"] == "v.h5"
