"""``doctor FOLDER``: what two processes measure of a disk, on this one and on stand-ins for strange ones."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import connectomics
from connectomics.cli import disk, main
from connectomics.cli.arguments import parse_command
from connectomics.cli.diagnosis import Diagnosis, lines_of
from connectomics.cli.usage import named_disk
from connectomics.commands.disk import disk_check
from connectomics.commands.disk.disk_check import DiskReport, check_disk, child, together
from connectomics.commands.disk.disk_facts import FOLDER_FSYNC, LINK, RENAME, SYMLINK, DiskFacts
from connectomics.commands.disk.disk_pair import Creation, Pair, furnish
from connectomics.commands.disk.disk_sight import SECOND, Sight, Tempo
from connectomics.config.load import load_config
from connectomics.core.errors import ConfigError, ConnectomicsError, OutputError, StorageError
from connectomics.core.files import temporary_beside

QUICK = Tempo(least_s=0.1, longest_s=3.0, wait_s=5.0, names=10)


@contextlib.contextmanager
def in_thread(place: Path) -> Iterator[Callable[[], str]]:
    """The second process as a thread of this one, so that stand-ins reach it, too."""
    stop, failed = threading.Event(), list[str]()

    def run() -> None:
        try:
            together(place, SECOND, lambda: "stopped" * stop.is_set(), tempo=QUICK, tell=print)
        except (ConnectomicsError, OSError) as error:
            failed.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield lambda: "; ".join(failed)
    finally:
        stop.set()
        thread.join()


def measured(folder: Path) -> DiskReport:
    report = check_disk(folder, print, tempo=QUICK, second=in_thread)
    assert list(folder.iterdir()) == []
    return report


def found(report: DiskReport, subject: str, stale_after_s: float = 180.0) -> list[Diagnosis]:
    return [finding for finding in disk.findings_of(report, stale_after_s) if finding.subject == subject]


def test_a_good_disk_is_good(tmp_path: Path) -> None:
    report = measured(tmp_path)
    assert all(creation.exclusive and sum(creation.won) == 10 for creation in report.pair.creations.values())
    assert 0 <= report.pair.delay_s < 1.5
    for sight in report.pair.sights:  # two threads have one clock
        least, most = sight.ahead_s
        assert -1 < least < 0.05 and 0 <= most < 1
    assert report.pair.lock == "" and report.facts.refused == {} and report.host == ""
    assert abs(report.facts.clock_ahead_s) < 1


@pytest.mark.skipif(sys.platform != "linux", reason="df tells kinds of file systems on Linux")
def test_kind_and_space_are_those_of_df(tmp_path: Path) -> None:
    words = ["df", "--output=fstype,avail,iavail", "-B1", tmp_path]
    kind, free, files = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-3:]
    facts = measured(tmp_path).facts
    assert facts.kind == kind
    assert facts.free_bytes == pytest.approx(int(free), rel=0.2)
    assert (facts.free_files or 0) == pytest.approx(0 if files == "-" else int(files), rel=0.2)


def test_the_command_measures_with_a_child_and_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from connectomics.cli import main\n"
        "code = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
    )
    words = [sys.executable, "-c", code, "doctor", str(tmp_path), "system.stale_after_s=2"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    *lines, torch = ended.stdout.splitlines()
    assert torch == "False" and ended.stderr == ""
    assert ended.returncode == (3 if any(line.startswith("MEND") for line in lines) else 0)
    made = [line for line in lines if "creation" in line]
    assert len(made) == 2 and all("each of 50 names had one maker" in line for line in made), ended.stdout
    assert list(tmp_path.iterdir()) == []


def failing(number: int, matching: Callable[..., bool], inner: Callable[..., Any]) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        if matching(*arguments):
            raise OSError(number, os.strerror(number))
        return inner(*arguments, **options)

    return fail


def test_a_disk_without_links_is_shared_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM, lambda *paths: True, os.link))
    monkeypatch.setattr(os, "symlink", failing(errno.EPERM, lambda *paths: True, os.symlink))
    report = measured(tmp_path)
    assert set(report.facts.refused) == {LINK, SYMLINK}
    assert report.pair.creations["link"].refused == "Operation not permitted"
    assert report.pair.creations["open"].exclusive
    marks = {line[:4] for line in lines_of(found(report, "creation") + found(report, "operations"))}
    assert marks == {"ok  ", "note"}


def test_a_disk_that_cannot_flush_folders_or_lock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL, lambda fd: Path(f"/dev/fd/{fd}").is_dir(), os.fsync))
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK, lambda *words: True, fcntl.flock))
    report = measured(tmp_path)
    assert report.facts.refused == {FOLDER_FSYNC: "Invalid argument"}
    (lock,) = found(report, "flock")
    assert (lock.ok, lock.noted) == (True, True) and "No locks available" in lock.text


def test_locks_that_keep_nobody_out_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, how: None)
    assert measured(tmp_path).pair.lock == "two processes hold it at once"


def test_a_disk_that_cannot_rename_over_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "replace", failing(errno.EEXIST, lambda old, new: True, Path.replace))
    report = measured(tmp_path)
    assert set(report.facts.refused) == {RENAME}
    assert [finding.ok for finding in found(report, "operations")] == [True, False]


def linked_anyway(old: str, new: Path, *more: Any) -> None:
    with contextlib.suppress(FileExistsError):
        LINKED(old, new)


def opened_anyway(path: Any, flags: int, *more: Any, **options: Any) -> int:
    return OPENED(path, flags & ~os.O_EXCL if "raced" in str(path) else flags, *more, **options)


LINKED, OPENED = os.symlink, os.open


@pytest.mark.parametrize(("name", "wrong"), [("symlink", linked_anyway), ("open", opened_anyway)])
def test_a_name_with_two_makers_ends_with_3(
    name: str,
    wrong: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, name, wrong)
    monkeypatch.setattr(disk, "check_disk", functools.partial(check_disk, tempo=QUICK, second=in_thread))
    assert main(["doctor", str(tmp_path)]) == 3
    out = capsys.readouterr().out
    assert "of 10 names 10 were made by both processes, 0 by neither" in out
    assert "several processes must not share runs on this disk" in out
    assert "each of 10 names had one maker" in out, "the other way is right"
    assert list(tmp_path.iterdir()) == []


def test_a_lost_reply_is_no_lost_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def linked(old: str, new: Path, *more: Any) -> None:
        LINKED(old, new)
        if "raced" in str(new):
            raise FileExistsError(errno.EEXIST, "exists")

    monkeypatch.setattr(os, "symlink", linked)
    assert measured(tmp_path).pair.creations["link"].exclusive


class LateDisk:
    """A disk on which each process remembers for a while that a name was absent, or what a folder held."""

    def __init__(self, patch: pytest.MonkeyPatch, *, late_s: float, names: bool, listings: bool) -> None:
        self._late_s = late_s
        self._known: dict[tuple[int, str], tuple[float, Any]] = {}
        self._read, self._iterdir = Path.read_text, Path.iterdir
        if names:
            patch.setattr(Path, "read_text", lambda path, *more: self.read(path, *more))
        if listings:
            patch.setattr(Path, "iterdir", lambda path: self.list(path))

    def read(self, path: Path, *more: Any) -> str:
        key = (threading.get_ident(), str(path))
        if key in self._known and time.monotonic() < self._known[key][0]:
            raise FileNotFoundError(errno.ENOENT, "absent")
        try:
            return self._read(path, *more)
        except FileNotFoundError:
            self._known[key] = (time.monotonic() + self._late_s, None)
            raise

    def list(self, path: Path) -> Iterator[Path]:
        key = (threading.get_ident(), str(path))
        if key not in self._known or time.monotonic() >= self._known[key][0]:
            self._known[key] = (time.monotonic() + self._late_s, list(self._iterdir(path)))
        return iter(self._known[key][1])


@pytest.mark.parametrize("names", [True, False])
def test_names_that_are_seen_late_are_timed(names: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        LateDisk(patch, late_s=0.25, names=names, listings=not names)
        report = check_disk(tmp_path, print, tempo=QUICK, second=in_thread)
    assert list(tmp_path.iterdir()) == []
    for sight in report.pair.sights:
        late, prompt = sight.by_name_s, sight.by_listing_s
        if not names:
            late, prompt = prompt, late
        assert 0.2 < late < 1.5 and prompt < late


def report_of(delay_s: float, kind: str = "nfs4", host: str = "node2") -> DiskReport:
    facts = DiskFacts(kind, 1 << 40, None, clock_ahead_s=-75.0, refused={}, ignores_case=True)
    sights = (Sight(0.01, 0.01, (0.0, 0.0)), Sight(0.01, delay_s, (0.0, 0.0)))
    made = Creation((25, 25))
    return DiskReport(Path("out"), facts, Pair(sights, {"link": made, "open": made}, ""), host, with_child=False)


@pytest.mark.parametrize(
    ("report", "stated_s", "least_s", "why"),
    [
        (report_of(60.0), 180.0, 210, "3 times the delay and 30 s are 210 s"),
        (report_of(0.01), 20.0, 180, "less than 180 is for disks of one machine"),
        (report_of(0.01, "ext4"), 20.0, 180, "less than 180 is for disks of one machine"),
        (report_of(0.01, "ext4", ""), 1.0, 2, "3 times the delay and 1 s"),
        (report_of(100.0, "ext4", ""), 180.0, 330, "3 times the delay"),
    ],
)
def test_the_limit_that_is_named_is_long_enough(report: DiskReport, stated_s: float, least_s: int, why: str) -> None:
    (short,) = found(report, "limit", stated_s)
    assert why in short.text
    word = short.mend.removeprefix("set ")
    assert word == f"system.stale_after_s={least_s}"
    (enough,) = found(report, "limit", load_config(None, [word]).system.stale_after_s)
    assert enough.ok


def test_what_is_strange_is_noted_and_what_is_never_seen_is_refused() -> None:
    assert [line[:4] for line in lines_of(disk.findings_of(report_of(1.0), 180.0))].count("note") == 2  # clock, case
    assert all(finding.ok for finding in disk.findings_of(report_of(1.0), 180.0))
    assert "--peer" in found(replace(report_of(1.0, host=""), with_child=True), "machines")[0].text
    assert found(report_of(1.0, host=""), "machines") == found(report_of(1.0, "xfs", ""), "machines") == []
    never = report_of(math.inf)
    assert "never" in found(never, "delay")[0].text
    assert [found(never, subject)[0].ok for subject in ("delay", "limit")] == [False, False]
    twice = replace(never.pair, creations={"link": Creation((3, 1), never=1), "open": Creation((0, 0), refused="no")})
    assert [finding.ok for finding in found(replace(never, pair=twice), "creation")] == [False, True]
    hardly = replace(never.pair, creations={way: Creation((5, 0)) for way in ("link", "open")})
    assert [finding.noted for finding in found(replace(never, pair=hardly), "creation")] == [True, True]


def test_a_disk_that_cannot_be_written_to_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Path, "mkdir", failing(errno.EROFS, lambda path: tmp_path in path.parents, Path.mkdir))
    assert main(["doctor", str(tmp_path)]) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {tmp_path}: cannot be written to or read (Read-only file system); ")
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder that nobody can write to")
def test_a_folder_that_nobody_can_write_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "/proc"]) == 3
    assert "error: /proc: cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_nothing_is_left_whatever_happens(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*words: Any, **options: Any) -> Pair:
        if threading.current_thread() is threading.main_thread():
            raise error
        return inner(*words, **options)

    inner = disk_check.measure
    monkeypatch.setattr(disk_check, "measure", measure)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else StorageError
    with pytest.raises(expected):
        check_disk(tmp_path, print, tempo=QUICK, second=in_thread)
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_ends_says_why(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    with child(tmp_path / "place") as ended:
        until = time.monotonic() + 30
        while not ended() and time.monotonic() < until:
            time.sleep(0.05)
        assert "No such file or directory" in ended() or "exit code" in ended()

    @contextlib.contextmanager
    def gone(place: Path) -> Iterator[Callable[[], str]]:
        yield lambda: "exit code -9"

    with pytest.raises(OutputError, match=r"ended before .*exit code -9"):
        check_disk(tmp_path, print, second=gone)


def test_two_machines_meet(tmp_path: Path) -> None:
    left = temporary_beside(tmp_path / "connectomics-doctor-peer")
    furnish(left)
    (left / "ready").touch()
    left = left.rename(left.with_name(".connectomics-doctor-peer.00000000-1-1-00000000.partial"))
    os.utime(left, (time.time() - 3600,) * 2)  # of a machine that was switched off
    reports, heard = list[DiskReport](), list[str]()

    def run() -> None:
        reports.append(check_disk(tmp_path, heard.append, peer=True, tempo=QUICK))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reports[0].pair == reports[1].pair and all(c.exclusive for c in reports[0].pair.creations.values())
    assert [path.name for path in tmp_path.iterdir()] == [left.name]
    assert f"connectomics doctor {tmp_path} --peer" in heard[0]


def test_who_waits_for_nobody_says_so(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no other process has come"):
        check_disk(tmp_path, print, peer=True, tempo=replace(QUICK, wait_s=0.1))
    with pytest.raises(ConfigError, match="is no folder"):
        check_disk(tmp_path / "absent", print)
    assert list(tmp_path.iterdir()) == []


def test_a_third_process_is_told(tmp_path: Path) -> None:
    furnish(tmp_path)
    (tmp_path / "messages" / "first.joined").write_text('{"token": "of another", "host": "a", "machine": "b"}')
    with pytest.raises(OutputError, match="measured by two other processes"):
        together(tmp_path, SECOND, str, tempo=QUICK, tell=print)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from connectomics.core.process import new_mark; print(new_mark())"],
        capture_output=True,
        text=True,
        check=True,
    )
    furnish(tmp_path / f".connectomics-doctor.{done.stdout.strip()}.partial")
    measured(tmp_path)


def test_a_folder_is_told_from_a_model_and_a_volume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "a.run").mkdir(parents=True)
    (tmp_path / "v.zarr").mkdir()
    (tmp_path / "n5").mkdir()
    (tmp_path / "n5" / "attributes.json").touch()
    model = Path(connectomics.__file__).parent / "example" / "phantom_mito_2d"

    def meant(*words: str) -> Path | None:
        named = named_disk(parse_command(["doctor", *words]))
        return None if named is None else named[0]

    out = tmp_path / "out"
    assert meant(str(out)) == meant(str(out), "system.stale_after_s=9") == meant(str(out), "--peer") == out
    for path in (tmp_path / "v.zarr", tmp_path / "n5", tmp_path / "absent", model):
        assert meant(str(path)) is None
    assert meant() is meant(str(model), str(out)) is meant("--checkpoint", str(model), str(out)) is None
    assert meant(f"model.nnunet_checkpoint={model}", str(out)) is None
    assert main(["doctor", "--peer"]) == 2
    assert "write connectomics doctor FOLDER --peer" in capsys.readouterr().err
