"""The ledger: what is appended is read back by everybody, torn lines are unfinished blocks, nothing foreign goes on."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from connectomics.core.errors import LedgerError, StorageError
from connectomics.core.geometry import BlockGrid
from connectomics.execution import ledger as ledgers
from connectomics.execution.append_log import READ_BYTES
from connectomics.execution.block_plan import BlockPlan, plan_of
from connectomics.execution.ledger import Ledger
from connectomics.execution.task import BlockRecord

from small_jobs import quick_folder

CLASS = {"backend": "torch", "threads": 1}
OTHER_CLASS = {"backend": "torch", "threads": 2}
PLAN = BlockPlan((1, 64, 64), (1, 32, 32))
VOLUME = (2, 200, 70)
GRID = BlockGrid(VOLUME, PLAN.block_shape)
RECORDS = [BlockRecord(f"0-{i}-0", {"labels.zarr/0": f"{i}" * 64}, 4 + i, 0.125 * i) for i in range(3)]


LEDGERS: list[Ledger] = []


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        yield place / "work" / "ledger"
        while LEDGERS:
            LEDGERS.pop().close()


def opened(folder: Path, *, allow: bool = False, numeric_class: dict[str, object] | None = None) -> Ledger:
    LEDGERS.append(Ledger(folder, "key", numeric_class or CLASS, PLAN, VOLUME, allow_other_class=allow))
    return LEDGERS[-1]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def filled(folder: Path, count: int = 3) -> bytes:
    ledger = opened(folder)
    for record in RECORDS[:count]:
        ledger.append(record)
    ledger.close()
    return files(folder)[0].read_bytes()


def keys(ledger: Ledger) -> list[str]:
    """Of the blocks that are done, according to the count, the blocks and the records alike."""
    done = [block.key for block in GRID if ledger.is_done(block)]
    assert ledger.finished == len(done)
    assert done == sorted({record.block for record in ledger.records()})
    assert [ledger.grid.numbered(n).key for n in ledger.unfinished()] == [b.key for b in GRID if b.key not in done]
    return done


def test_records_are_read_back(folder: Path) -> None:
    filled(folder)
    ledger = opened(folder)
    assert list(ledger.records()) == RECORDS
    assert keys(ledger) == ["0-0-0", "0-1-0", "0-2-0"]


def test_a_line_is_on_the_disk_when_append_returns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fsync

    def spy(descriptor: int) -> None:
        real(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    ledger = opened(folder)
    monkeypatch.setattr(os, "fsync", spy)
    for record in RECORDS:
        ledger.append(record)
        assert synced[-1] == files(folder)[0].stat().st_size
        assert json.loads(files(folder)[0].read_bytes().split(b"\n")[-2])["block"] == record.block
    ledger.close()


def test_what_stands_in_the_folder(folder: Path) -> None:
    lines = [json.loads(line) for line in filled(folder).splitlines()]
    assert json.loads((folder / "header.json").read_text()) == {
        "ledger": 2,
        "run_key": "key",
        "numeric_class": CLASS,
        "mixed": False,
        "plan": {"block_shape": [1, 64, 64], "chunk_shape": [1, 32, 32]},
        "volume": list(VOLUME),
    }
    assert lines[0] == {"numeric_class": CLASS}
    assert [line["block"] for line in lines[1:]] == [record.block for record in RECORDS]
    assert all(abs(line["at"] - time.time()) < 60 for line in lines[1:])


@pytest.mark.parametrize("apart", [9, pytest.param(1, marks=pytest.mark.long)])
def test_whatever_length_a_torn_file_has_a_prefix_of_the_blocks_is_found_and_the_run_goes_on(
    folder: Path, apart: int
) -> None:
    """Every length beside the end of a line, and others so far apart."""
    content = filled(folder)
    (path,) = files(folder)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    beside = {end + more for end in ends for more in (-2, -1, 0, 1)} & set(range(len(content) + 1))
    for length in sorted({*range(0, len(content) + 1, apart), *beside}):
        path.write_bytes(content[:length])
        whole = max(0, sum(end <= length for end in ends) - 1)
        ledger = opened(folder)
        assert keys(ledger) == [record.block for record in RECORDS[:whole]]
        for record in RECORDS[whole:]:
            ledger.append(record)
        ledger.close()
        assert len(keys(opened(folder))) == 3
        assert path.read_bytes() == content[:length], "nobody appends to the file of another"
        for other in files(folder):
            if other != path:
                other.unlink()


@pytest.mark.parametrize(
    "line", [b"garbage", b"[]", b'{"block": "9-9-9"}', b"\xff\xfe", b"null", b'{"block": "0-1", "checksums": {}}']
)
def test_nothing_from_a_damaged_line_on_is_trusted(folder: Path, line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    lines = filled(folder).split(b"\n")
    files(folder)[0].write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]))
    ledger = opened(folder)
    assert keys(ledger) == [RECORDS[0].block]
    assert "nothing from there on is trusted" in caplog.text
    ledger.append(RECORDS[1])
    ledger.close()
    assert keys(opened(folder)) == ["0-0-0", "0-1-0"]


def test_workers_hear_of_each_other(folder: Path) -> None:
    one, two = opened(folder), opened(folder)
    one.append(RECORDS[0])
    two.append(RECORDS[1])
    assert (one.finished, two.finished) == (1, 1)
    one.append(RECORDS[2])
    two.refresh()
    assert keys(two) == ["0-0-0", "0-1-0", "0-2-0"]
    one.refresh()
    one.refresh()
    assert keys(one) == keys(two) == keys(opened(folder))
    assert len(files(folder)) == 2


def test_a_line_that_is_being_written_is_taken_when_it_is_whole(folder: Path) -> None:
    ledger = opened(folder)
    content = filled(folder, 1)
    (path,) = files(folder)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        ledger.refresh()
        assert ledger.finished == 0
    path.write_bytes(content)
    ledger.refresh()
    assert keys(ledger) == ["0-0-0"]


def test_a_block_is_done_while_one_of_its_records_stands(folder: Path) -> None:
    one, two = opened(folder), opened(folder)
    for ledger in (one, two):
        ledger.append(RECORDS[0])
    one.refresh()
    names = [name for name, _ in one.named_records()]
    assert len(names) == 2
    one.void(names[0], "0-0-0")
    assert keys(one) == ["0-0-0"]
    one.void(names[1], "0-0-0")
    one.void(names[1], "0-0-0")
    two.refresh()
    for ledger in (one, two, opened(folder)):
        assert keys(ledger) == []
    two.append(RECORDS[0])
    one.refresh()
    assert keys(one) == keys(opened(folder)) == ["0-0-0"]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_order_of_files_does_not_matter_to_undoing(folder: Path, order: list[int]) -> None:
    filled(folder)
    (first,) = files(folder)
    ledger = opened(folder)
    ledger.void(next(name for name, record in ledger.named_records() if record.block == "0-1-0"), "0-1-0")
    ledger.close()
    (second,) = set(files(folder)) - {first}
    name = f"{order[0]}.jsonl"
    first.rename(folder / name)
    second.write_text(second.read_text().replace(first.name, name))
    second.rename(folder / f"{order[1]}.jsonl")
    assert keys(opened(folder)) == ["0-0-0", "0-2-0"]


@pytest.mark.parametrize("header", [b"", b"\0\0", b"[]", b"3", b'{"ledger": 1}'])
def test_a_folder_without_a_header_of_this_version_is_refused(folder: Path, header: bytes) -> None:
    filled(folder)
    (folder / "header.json").write_bytes(header)
    for use in (opened, plan_of):
        with pytest.raises(LedgerError, match=r"header\.json: .*remove"):
            use(folder)


def test_the_ledger_of_another_run_is_refused(folder: Path) -> None:
    filled(folder)
    with pytest.raises(LedgerError, match="records the run key, expected other"):
        Ledger(folder, "other", CLASS, PLAN, VOLUME)


def test_another_numeric_class_is_refused_unless_allowed_and_then_remembered(folder: Path) -> None:
    filled(folder, 1)
    with pytest.raises(LedgerError, match=r"'threads': 1.*'threads': 2.*allow_mixed_devices"):
        opened(folder, numeric_class=OTHER_CLASS)
    assert not opened(folder).mixed
    ledger = opened(folder, numeric_class=OTHER_CLASS, allow=True)
    assert ledger.mixed
    ledger.append(RECORDS[1])
    ledger.close()
    assert keys(opened(folder)) == ["0-0-0", "0-1-0"]
    assert opened(folder).mixed


def test_without_a_block_the_numeric_class_may_change(folder: Path) -> None:
    opened(folder).close()
    assert not opened(folder, numeric_class=OTHER_CLASS).mixed
    assert json.loads((folder / "header.json").read_text())["numeric_class"] == OTHER_CLASS


def test_of_two_classes_that_begin_at_once_one_is_refused(folder: Path) -> None:
    one, two = opened(folder), opened(folder, numeric_class=OTHER_CLASS)
    two.append(RECORDS[0])
    with pytest.raises(LedgerError, match="allow_mixed_devices"):
        one.append(RECORDS[1])
    lenient = opened(folder, allow=True)
    lenient.append(RECORDS[1])
    two.refresh()
    assert lenient.mixed and two.mixed


def test_the_plan_is_kept_for_whoever_continues(folder: Path) -> None:
    assert plan_of(folder) is None
    filled(folder)
    assert plan_of(folder) == PLAN


def gone(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


@pytest.fixture
def no_file_grows() -> Iterator[Callable[[Path], None]]:
    """Files of this process cannot grow, as on a full disk, from when it is called."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda folder: resource.setrlimit(resource.RLIMIT_FSIZE, (30, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_folder_that_is_gone_is_named(folder: Path) -> None:
    ledger = opened(folder)
    ledger._require_same_class = lambda: None  # type: ignore[method-assign]  # the file is the next that is met
    gone(folder)
    with pytest.raises(StorageError, match=r"cannot record block 0-0-0 .*finished blocks are kept"):
        ledger.append(RECORDS[0])
    assert ledger.finished == 0
    ledger.close()


def test_after_a_full_disk_appending_goes_on_in_another_file(
    folder: Path, no_file_grows: Callable[[Path], None]
) -> None:
    ledger = opened(folder)
    ledger.append(RECORDS[0])
    no_file_grows(folder)
    with pytest.raises(StorageError, match=r"cannot record block 0-1-0 \(.*finished blocks are kept"):
        ledger.append(RECORDS[1])
    assert keys(ledger) == ["0-0-0"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ledger.append(RECORDS[1])
    ledger.append(RECORDS[2])
    ledger.close()
    assert keys(ledger) == keys(opened(folder)) == ["0-0-0", "0-1-0", "0-2-0"]
    assert len(files(folder)) == 2


def test_closing_twice_is_fine(folder: Path) -> None:
    ledger = opened(folder)
    ledger.append(RECORDS[0])
    ledger.close()
    ledger.close()


def long_ledger(folder: Path, count: int) -> tuple[int, int, int]:
    """A ledger of so many finished blocks; the volume they cut."""
    volume = (count, 64, 64)
    Ledger(folder, "key", CLASS, PLAN, volume).close()
    with (folder / "one.jsonl").open("w") as stream:
        stream.write(json.dumps({"numeric_class": CLASS}) + "\n")
        for i in range(count):
            record = BlockRecord(f"{i}-0-0", {f"labels.zarr/0/c/{i}/0/0": "0" * 64}, 16, 1.5)
            stream.write(json.dumps(asdict(record) | {"at": 0}) + "\n")
    return volume


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_many_blocks_are_read_in_a_moment(folder: Path, count: int) -> None:
    """Beside Python's own JSON in a loop; benchmarks/ledger.py has the seconds of a million."""
    volume = long_ledger(folder, count)
    began = time.perf_counter()
    for line in files(folder)[0].read_bytes().splitlines():
        json.loads(line)
    floor = time.perf_counter() - began
    began = time.perf_counter()
    ledger = Ledger(folder, "key", CLASS, PLAN, volume)
    seconds = time.perf_counter() - began
    assert ledger.finished == count
    assert next(ledger.unfinished(), None) is None
    assert seconds < 12 * floor, f"{seconds:.2f} s, reading the JSON alone takes {floor:.2f} s"


@pytest.mark.parametrize("count", [6_000, pytest.param(20_000, marks=pytest.mark.long)])
def test_memory_holds_a_byte_a_block(folder: Path, count: int) -> None:
    volume = long_ledger(folder, count)
    tracemalloc.start()
    ledger = Ledger(folder, "key", CLASS, PLAN, volume)
    for _ in ledger.records():
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < READ_BYTES + 80_000 + 6 * count


def test_blocks_that_are_left_out_are_neither_planned_nor_unfinished(folder: Path) -> None:
    flags = np.zeros(GRID.counts, bool)
    flags[0, :2] = True
    ledger = opened(folder)
    assert ledger.planned == len(GRID)
    ledger.choose(flags)
    assert list(ledger.unfinished()) == list(np.flatnonzero(flags))
    ledger.append(RECORDS[1])
    ledger.close()
    again = Ledger.existing(folder)
    assert (again.planned, again.finished) == (int(flags.sum()), 1)
    again.close()


def test_who_comes_later_begins_with_what_others_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process kept of its reading, where it is whole and all that was read is still there."""
    monkeypatch.setattr(ledgers, "GENERATION_LINES", 4)
    seen = list[int]()
    more = [BlockRecord(block.key, {}, 1, 0.0) for block in GRID]
    first = opened(folder)
    for record in more[:5]:
        first.append(record)
    (name, undone), *_ = first.named_records()
    first.void(name, undone.block)
    opened(folder).close()
    first.append(more[5])
    real = ledgers.whole_lines

    def whole_lines(path: Path, start: int) -> Iterator[tuple[bytes, int]]:
        seen.append(start)
        return real(path, start)

    monkeypatch.setattr(ledgers, "whole_lines", whole_lines)
    later = opened(folder)
    keys = {record.block for record in more[:6]} - {undone.block}
    assert {record.block for record in later.records()} == keys and later.finished == 5
    assert later.was_undone(GRID.number(later.block(undone.block).index))
    assert seen[0] > 0, "it read only what came after"
    (kept,) = folder.glob("generation-*")
    kept.write_bytes(kept.read_bytes().replace(b"counts", b"stnuoc"))
    seen.clear()
    assert opened(folder).finished == 5 and seen[0] == 0


def test_what_was_read_of_a_file_that_is_gone_is_not_believed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "GENERATION_LINES", 1)
    first = opened(folder)
    for record in RECORDS[:3]:
        first.append(record)
    first.close()
    opened(folder).close()
    assert list(folder.glob("generation-*"))
    for path in folder.glob("*.jsonl"):
        path.unlink()
    assert opened(folder).finished == 0


def test_what_one_process_recorded_alone_is_kept_for_whoever_comes_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "GENERATION_LINES", 2)
    alone = opened(folder)
    for record in RECORDS:
        alone.append(record)
    assert not list(folder.glob("generation-*"))
    alone.refresh()
    assert list(folder.glob("generation-*")) and opened(folder).finished == len(RECORDS)
