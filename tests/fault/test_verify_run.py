"""status and verify-run: what a RUN folder tells, damage of blocks and results found, mended by the next run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from connectomics.cli import main
from connectomics.commands.status import status_of
from connectomics.commands.verify_run import verify_run
from connectomics.core.errors import QuarantineError, VolumeError
from connectomics.execution.stage import LABELS
from connectomics.execution.worker import Worker
from connectomics.jobs.outcome import attempted
from connectomics.models.spec import ChannelNormalisation
from connectomics.runs.job import VolumeJob
from connectomics.stages.output.finish import FinalOutput
from connectomics.stages.predict.filters import BinaryFilters
from connectomics.stages.predict.segmenter import EnsembleMember
from connectomics.volumes.store import open_store

from small_jobs import finals
from small_runs import BLOCKS, EXPECTED, IMAGE, Failing, NotNegative, Reader, changed, cores, job_in, labels, run


def job(folder: Path, *formats: str, **changes: Any) -> VolumeJob:
    return job_in(folder, outputs=(FinalOutput(LABELS, "v_labels", "k", formats or ("h5",)),), **changes)


def run_folder(folder: Path) -> Path:
    return folder / "v_labels.run"


def interrupted(folder: Path, blocks: int = 5) -> None:
    with pytest.raises(VolumeError):
        run(folder, job(folder), Failing(after=blocks))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


DAMAGES: list[Callable[[Path], None]] = [flip_a_byte, Path.unlink, lambda path: os.truncate(path, 9)]


def shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("labels.zarr/0/c/*/*/*") if path.is_file())


def checked(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["verify-run", str(run_folder(folder)), *words])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_blocks_of_an_unfinished_run_are_found_and_computed_again(
    folder: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(folder)
    code, out = checked(folder, capsys)
    assert (code, "blocks of predict: 5 read, 0 damaged\n" in out) == (0, True)
    damage(shards(folder)[1])
    code, out = checked(folder, capsys, "--all")
    assert code == 3
    assert "5 read, 1 damaged\n  damaged: 0-0-1\n  the next run mends them\n" in out
    code, out = checked(folder, capsys)
    assert (code, "4 read, 0 damaged" in out) == (0, True), "it is undone now"
    again = job(folder)
    assert run(folder, again).done == BLOCKS - 4
    assert (labels(folder) == EXPECTED).all()


def test_a_sample_reads_so_many_evenly(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(folder, blocks=15)
    code, out = checked(folder, capsys, "--sample", "3")
    assert (code, "blocks of predict: 3 read, 0 damaged" in out) == (0, True)
    assert main(["verify-run", str(run_folder(folder)), "--sample", "0"]) == 2


@pytest.mark.parametrize("form", ["h5", "tiff", "png"])
def test_a_damaged_result_is_set_aside_and_made_again(
    folder: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, job(folder, form))
    reference = finals(folder)
    assert checked(folder, capsys)[0] == 0
    name = sorted(reference)[0]
    flip_a_byte(folder / name)
    top = name.partition("/")[0]
    code, out = checked(folder, capsys)
    assert code == 3
    assert f"{top}, files: {len(reference)} read, 1 damaged\n  damaged: {name}\n" in out
    assert f"it was renamed {top}.damaged; the next run makes it again" in out
    assert not (folder / top).exists()
    shutil.rmtree(folder / f"{top}.damaged") if (folder / f"{top}.damaged").is_dir() else (
        folder / f"{top}.damaged"
    ).unlink()
    run(folder, job(folder, form))
    assert finals(folder) == reference
    assert checked(folder, capsys)[0] == 0


@pytest.mark.parametrize("result", ["v_labels", "v_labels_probabilities"])
@pytest.mark.parametrize(
    ("file", "damage", "lost"),
    [("0/c/0/0/0", damage, lost) for damage, lost in zip(DAMAGES, (1, BLOCKS, BLOCKS), strict=True)]
    + [("1/c/0/0/0", flip_a_byte, 0), ("zarr.json", flip_a_byte, BLOCKS)],
)
def test_of_a_damaged_zarr_result_only_the_damaged_blocks_are_computed_again(
    folder: Path, result: str, file: str, damage: Callable[[Path], None], lost: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file holds all blocks here: of its bytes one lies in one block, and coarser levels are made of finer ones."""

    def wanted() -> VolumeJob:
        made = job_in(folder, probabilities=True)
        return replace(made, outputs=tuple(replace(output, formats=("h5", "zarr")) for output in made.outputs))

    run(folder, wanted())
    reference = finals(folder)
    damage(folder / f"{result}.zarr" / file)
    code, out = checked(folder, capsys)
    assert (code, "1 damaged" in out) == (3, True)
    assert f"it was renamed {result}.zarr.damaged; the next run makes it again" in out
    kept = f"computing {lost} of its blocks; all others were kept in v_labels.run" in out
    assert kept == (file != "zarr.json"), "nothing is known of a result without its stamp"
    assert status_of(run_folder(folder)).stages[0].done == BLOCKS - lost * kept, "the others are undone in the ledger"
    shutil.rmtree(folder / f"{result}.zarr.damaged")
    again = wanted()
    assert run(folder, again).done == len(cores(again)) == lost
    assert finals(folder) == reference
    assert checked(folder, capsys)[0] == 0


@pytest.mark.parametrize("what", ["metadata", "filtered"])
def test_a_zarr_result_that_blocks_alone_cannot_mend_is_made_again_whole(
    folder: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filters = BinaryFilters(minimum_voxels=3) if what == "filtered" else BinaryFilters()
    run(folder, job(folder, "zarr", filters=filters))
    reference = finals(folder)
    flip_a_byte(folder / "v_labels.zarr" / "0" / ("c/0/0/0" if what == "filtered" else "zarr.json"))
    code, out = checked(folder, capsys)
    assert (code, "renamed v_labels.zarr.damaged" in out) == (3, True)
    assert run(folder, job(folder, "zarr", filters=filters)).done == BLOCKS
    shutil.rmtree(folder / "v_labels.zarr.damaged")
    assert finals(folder) == reference


def test_a_result_that_is_gone_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, job(folder))
    (folder / "v_labels.h5").unlink()
    code, out = checked(folder, capsys)
    assert (code, "it is not there; the next run makes it again" in out) == (3, True)
    run(folder, job(folder))
    assert checked(folder, capsys)[0] == 0


def test_the_checksums_are_those_of_sha256sum(folder: Path) -> None:
    run(folder, job(folder, "h5", "zarr"))
    records = sorted((run_folder(folder) / "checksums").iterdir())
    assert [path.name for path in records] == ["v_labels.h5.sha256", "v_labels.zarr.sha256"]
    for record in records:
        command = ["sha256sum", "--check", "--strict", "--quiet", str(record)]
        assert subprocess.run(command, cwd=folder, check=False).returncode == 0
        flip_a_byte(folder / record.read_text().splitlines()[0].split("  ")[1])
        assert subprocess.run(command, cwd=folder, check=False, capture_output=True).returncode == 1


def test_what_was_made_of_damaged_blocks_is_removed(folder: Path) -> None:
    interrupted(folder)
    (work,) = (path.parent for path in run_folder(folder).glob("*/ledger"))
    shutil.copytree(work / "labels.zarr", work / "filtered.zarr")
    shutil.copytree(work / "labels.zarr", work / "labels.n5")
    shutil.copytree(work / "ledger", work / "ledger_labels.n5.1")
    flip_a_byte(shards(folder)[0])
    findings = verify_run(run_folder(folder))
    assert {finding.damaged for finding in findings} == {("0-0-0",)}
    assert {path.name for path in work.iterdir() if path.is_dir()} == {"ledger", "coordination", "labels.zarr"}
    open_store(work / "labels.zarr").close()


def test_all_is_made_again_that_was_made_with_a_damaged_mask(folder: Path, tmp_path: Path) -> None:
    image = IMAGE.copy()
    image[:, :, :4] = image[:, 1:3, 6:8, 5:9] = 0
    scheme = ChannelNormalisation("ZScoreNormalization", masked=True)

    def masked(place: Path) -> VolumeJob:
        made = job(place, reader=Reader(image))
        members = (EnsembleMember(NotNegative(), (scheme,)),)
        return changed(made, segmenter=replace(made.labeller.segmenter, members=members))

    run(tmp_path, masked(tmp_path))
    with pytest.raises(VolumeError):
        run(folder, masked(folder), Failing(after=len(["cut", "join", "paint"]) + 5))
    stages = [stage.stage for stage in status_of(run_folder(folder)).stages]
    assert stages == ["mask.cut", "mask.join", "mask.paint", "predict"], "in the order in which they were begun"
    (mask,) = folder.rglob("mask.zarr/0/c/0/0/0")
    flip_a_byte(mask)
    damaged = [finding.subject for finding in verify_run(run_folder(folder)) if finding.damaged]
    assert len(damaged) == 1 and damaged[0].endswith("blocks of mask.paint")
    (work,) = (path.parent for path in run_folder(folder).glob("*/coordination"))
    assert {path.name for path in work.iterdir() if path.name != "mask.ledgers.json"} == {"coordination"}
    assert run(folder, masked(folder)).done == BLOCKS
    assert labels(folder).tobytes() == labels(tmp_path).tobytes()


def test_many_damaged_blocks_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(folder, blocks=15)
    for shard in shards(folder):
        flip_a_byte(shard)
    code, out = checked(folder, capsys)
    assert code == 3
    assert out.count("damaged: ") == 10 and "  … and 5 more\n" in out


def test_what_is_no_run_folder_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "verify-run"):
        assert main([command, str(folder)]) == 2
        assert "is not the RUN folder of a run" in capsys.readouterr().err


def status(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The JSON and the lines."""
    assert main(["status", str(run_folder(folder)), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert main(["status", str(run_folder(folder))]) == 0
    return found, capsys.readouterr().out


def test_status_of_an_interrupted_and_of_a_finished_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(folder)
    found, out = status(folder, capsys)
    (stage,) = found["stages"]
    assert (stage["stage"], stage["planned"], stage["done"]) == ("predict", BLOCKS, 5)
    assert (stage["blocks_per_s"], stage["left_s"], found["workers"]) == (0.0, None, [])
    assert 0 <= stage["last_block_s_ago"] < 60
    assert found["surveyed"] and not found["finished"] and found["last_error"] is None
    assert "predict      5/16 blocks (31.2%), last block" in out
    assert "workers      none" in out
    run(folder, job(folder))
    found, out = status(folder, capsys)
    assert found["stages"][0]["done"] == BLOCKS
    assert found["finished"] == ["v_labels.h5"]
    assert "finished     v_labels.h5" in out


def test_status_tells_of_workers_rate_and_time_left(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(folder)
    (ledger,) = run_folder(folder).glob("*/ledger/*.jsonl")
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    slow = "\n".join(json.dumps(line | {"seconds": 2.0} if "block" in line else line) for line in lines)
    ledger.write_text(slow + "\n")
    with Worker.of(ledger.parent.parent / "coordination"):
        found, out = status(folder, capsys)
    (worker,) = found["workers"]
    assert worker["pid"] == os.getpid()
    assert found["stages"][0]["blocks_per_s"] == pytest.approx(0.5)
    assert found["stages"][0]["left_s"] == pytest.approx(22)
    assert "0.5 blocks/s, about 22 s left" in out
    assert f"process {os.getpid()}, since 20" in out


def test_status_tells_of_quarantined_blocks_and_the_last_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Torn(Reader):
        def read(self, box: Any) -> Any:
            if box.start == (2, 0, 10):
                raise VolumeError("the section is torn")
            return super().read(box)

    with pytest.raises(QuarantineError):
        run(folder, job(folder, reader=Torn()))
    log = run_folder(folder) / "run.log"
    log.write_text("1 INFO a: b\n2 7 ERROR connectomics: block 2-0-1 is quarantined\n3 INFO c: d\n")
    found, out = status(folder, capsys)
    assert found["stages"][0]["quarantined"] == ["2-0-1"]
    assert "15/16 blocks (93.8%), 1 quarantined" in out and "quarantined: 2-0-1" in out
    assert found["last_error"] == "2 7 ERROR connectomics: block 2-0-1 is quarantined"
    assert "last error   2 7 ERROR" in out


def test_status_of_a_volume_that_failed_before_its_first_block(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "v_labels.run"

    def run() -> Any:
        raise VolumeError("NaN in voxels (0, 3, 3)")

    assert attempted("v.h5", folder, run).reason == "NaN in voxels (0, 3, 3)"
    assert main(["status", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "blocks       none was begun" in out and "last error" in out and "NaN in voxels (0, 3, 3)" in out
    assert main(["status", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["stages"], found["surveyed"], found["finished"]) == ([], False, [])
    assert found["last_error"].endswith("stopped: NaN in voxels (0, 3, 3)")


def test_long_times_are_told_in_minutes_and_hours(folder: Path) -> None:
    interrupted(folder)
    found = status_of(run_folder(folder))
    for rate, text in ((1.0, "11 s"), (0.1, "2 min"), (0.001, "3.1 h")):
        stages = (replace(found.stages[0], blocks_per_s=rate),)
        assert f"about {text} left" in "\n".join(replace(found, stages=stages).lines())
