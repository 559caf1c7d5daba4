"""The ledger: what is appended is read back, torn lines are unfinished blocks, nothing foreign is continued."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from connectomics.errors import LedgerError, OutputError
from connectomics.pipeline.contracts import BlockRecord
from connectomics.pipeline.ledger import Ledger, plan_of
from connectomics.pipeline.planning import BlockPlan

CLASS = {"backend": "torch", "threads": 1}
OTHER_CLASS = {"backend": "torch", "threads": 2}
PLAN = BlockPlan((1, 64, 64), (1, 32, 32))
RECORDS = [BlockRecord(f"0-{i}-0", {"labels": f"{i}" * 64}, 4 + i, 0.125 * i) for i in range(3)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def opened(path: Path, *, allow: bool = False, numeric_class: dict[str, object] | None = None) -> Ledger:
    return Ledger(path, "key", numeric_class or CLASS, PLAN, allow_other_class=allow)


def filled(path: Path, count: int = 3) -> bytes:
    ledger = opened(path)
    for record in RECORDS[:count]:
        ledger.append(record)
    ledger.close()
    return path.read_bytes()


def test_records_are_read_back(path: Path) -> None:
    filled(path)
    assert opened(path).records == {record.block: record for record in RECORDS}


def test_a_line_is_on_the_disk_when_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fsync

    def spy(descriptor: int) -> None:
        real(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    ledger = opened(path)
    monkeypatch.setattr(os, "fsync", spy)
    for record in RECORDS:
        ledger.append(record)
        assert synced[-1] == path.stat().st_size
        assert json.loads(path.read_bytes().split(b"\n")[-2])["block"] == record.block
    ledger.close()


def test_the_file_is_one_header_and_a_line_of_json_for_each_block(path: Path) -> None:
    lines = [json.loads(line) for line in filled(path).splitlines()]
    assert lines[0] == {
        "ledger": 1,
        "run_key": "key",
        "numeric_class": CLASS,
        "mixed": False,
        "plan": {"block_shape": [1, 64, 64], "chunk_shape": [1, 32, 32]},
    }
    assert [line["block"] for line in lines[1:]] == [record.block for record in RECORDS]


def test_whatever_length_a_torn_file_has_a_prefix_of_the_blocks_is_found_and_appending_goes_on(path: Path) -> None:
    content = filled(path)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for length in range(ends[0], len(content) + 1):
        path.write_bytes(content[:length])
        whole = sum(end <= length for end in ends) - 1
        ledger = opened(path)
        assert list(ledger.records) == [record.block for record in RECORDS[:whole]]
        for record in RECORDS[whole:]:
            ledger.append(record)
        ledger.close()
        assert path.read_bytes() == content


@pytest.mark.parametrize("line", [b"garbage", b"[]", b'{"block": "9-9-9"}', b"\xff\xfe", b"null"])
def test_nothing_from_a_damaged_line_on_is_trusted(path: Path, line: bytes) -> None:
    lines = filled(path).split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]))
    ledger = opened(path)
    assert list(ledger.records) == [RECORDS[0].block]
    ledger.append(RECORDS[1])
    ledger.close()
    assert path.read_bytes() == b"\n".join([*lines[:3], b""])


def test_forgotten_blocks_are_gone_for_good(path: Path) -> None:
    filled(path)
    ledger = opened(path)
    ledger.forget({"0-1-0"})
    assert list(ledger.records) == ["0-0-0", "0-2-0"]
    ledger.append(RECORDS[1])
    ledger.forget(set())
    ledger.close()
    assert list(opened(path).records) == ["0-0-0", "0-2-0", "0-1-0"]


@pytest.mark.parametrize("header", [b"", b"\0\0", b"[]", b"3", b'{"ledger": 2}'])
def test_a_file_that_is_no_ledger_is_refused(path: Path, header: bytes) -> None:
    path.write_bytes(header + b"\n")
    for use in (opened, plan_of):
        with pytest.raises(LedgerError, match=r"ledger\.jsonl: .*remove"):
            use(path)


def test_the_ledger_of_another_run_is_refused(path: Path) -> None:
    filled(path)
    with pytest.raises(LedgerError, match="records the run key, expected other"):
        Ledger(path, "other", CLASS, PLAN)


def test_another_numeric_class_is_refused_unless_allowed_and_then_remembered(path: Path) -> None:
    filled(path, 1)
    with pytest.raises(LedgerError, match=r"'threads': 1.*'threads': 2.*allow_mixed_devices"):
        opened(path, numeric_class=OTHER_CLASS)
    assert not opened(path).mixed
    ledger = opened(path, numeric_class=OTHER_CLASS, allow=True)
    assert ledger.mixed
    ledger.append(RECORDS[1])
    ledger.close()
    assert list(opened(path).records) == ["0-0-0", "0-1-0"]
    assert opened(path).mixed


def test_without_a_block_the_numeric_class_may_change(path: Path) -> None:
    opened(path).close()
    assert not opened(path, numeric_class=OTHER_CLASS).mixed
    assert json.loads(path.read_text())["numeric_class"] == OTHER_CLASS


def test_the_plan_is_kept_for_whoever_continues(path: Path) -> None:
    assert plan_of(path) is None
    filled(path)
    assert plan_of(path) == PLAN


@pytest.mark.parametrize("spoil", [Path.mkdir, lambda path: path.symlink_to("/dev/full")], ids=["folder", "full"])
def test_a_disk_that_refuses_is_named(path: Path, spoil: Callable[[Path], None]) -> None:
    ledger = opened(path)
    path.unlink()
    spoil(path)
    with pytest.raises(OutputError, match=r"cannot record block 0-0-0 .*finished blocks are kept"):
        ledger.append(RECORDS[0])
    assert not ledger.records
    ledger.close()


def test_after_a_refusal_appending_goes_on_behind_the_last_whole_line(path: Path) -> None:
    ledger = opened(path)
    ledger.append(RECORDS[0])
    whole = path.read_bytes()
    ledger.close()
    path.write_bytes(whole + b'{"block": "0-1')
    ledger.append(RECORDS[1])
    ledger.close()
    assert path.read_bytes().startswith(whole)
    assert list(opened(path).records) == ["0-0-0", "0-1-0"]


def test_closing_twice_is_fine(path: Path) -> None:
    ledger = opened(path)
    ledger.append(RECORDS[0])
    ledger.close()
    ledger.close()
