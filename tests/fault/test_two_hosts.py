"""Hosts that look alike, and hosts that see the folder late: ``scripts/two_hosts.py`` in a short form."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from small_jobs import quick_folder

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "two_hosts.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    specification = importlib.util.spec_from_file_location("two_hosts", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "two_hosts", module)
        specification.loader.exec_module(module)
        yield module


@dataclass(frozen=True)
class Place:
    """A folder to work in, and what one undisturbed process makes."""

    folder: Path
    reference: dict[str, bytes]


@pytest.fixture(scope="module")
def place(script: ModuleType) -> Iterator[Place]:
    why_not = script.obstacle(mounts=False)
    if why_not is not None:
        pytest.skip(why_not)
    with quick_folder() as folder:
        yield Place(folder, script.reference_in(folder))


SHORT: tuple[dict[str, Any], ...] = (
    {"hosts": 3, "limit_s": 2},
    {"hosts": 2, "limit_s": 2, "kill": True},
    {"hosts": 2, "limit_s": 39, "cache_s": 3},
    {"hosts": 2, "limit_s": 39, "cache_s": 3, "kill": True},
)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stated", SHORT, ids=str)
def test_hosts_make_the_bytes_of_one_process(script: ModuleType, place: Place, stated: dict[str, Any]) -> None:
    trial = script.Trial(**stated)
    why_not = script.obstacle(mounts=trial.cache_s is not None)
    if why_not is not None:
        pytest.skip(why_not)
    outcome = script.try_it(trial, place.folder, place.reference)
    told = "".join(path.read_text()[-2000:] for path in outcome.printed)
    assert outcome.good, f"{outcome.row}\n{told}"
    assert "Traceback" not in told
    assert len(outcome.shares) == trial.hosts and all(outcome.shares), "one host did it all"


@pytest.mark.long
def test_a_mount_remembers_what_was_absent(script: ModuleType, tmp_path: Path) -> None:
    why_not = script.obstacle(mounts=True)
    if why_not is not None:
        pytest.skip(why_not)
    with script.mounted(tmp_path, 2, 60) as (one, other):
        assert not (other / "name").exists()
        (one / "name").write_text("")
        assert (tmp_path / "data" / "name").exists()
        assert not (other / "name").exists(), "the mounts have no caches: they prove nothing"


@pytest.mark.parametrize(
    ("exits", "same", "kill", "good"),
    [
        ((0, 0), True, False, True),
        ((0, 0), False, False, False),
        ((0, 3), True, False, False),
        ((-9, 0), True, True, True),
        ((0, 0), True, True, False),
        ((-9, -9), True, True, False),
    ],
)
def test_what_keeps_the_promise(
    script: ModuleType, exits: tuple[int, ...], *, same: bool, kill: bool, good: bool
) -> None:
    trial = script.Trial(2, 2, kill=kill)
    outcome = script.Outcome(trial, exits, same, (1, 1), twice=0, seconds=1.0)
    assert outcome.good == good
    assert ("DIFFER" in outcome.row) != same


def test_records_are_counted_by_process_and_those_of_a_block_done_before(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "v.run" / "work" / "ledger"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"numeric_class": {}}\n{"block": "0-0-0"}\n{"block": "0-0-1"}\n')
    (folder / "b.jsonl").write_text(
        '{"numeric_class": {}}\n{"block": "0-0-1"}\n{"void": ["a.jsonl", 0], "block": "0"}\n{"bl'
    )
    assert script.recorded(tmp_path) == ((2, 1), 1)
