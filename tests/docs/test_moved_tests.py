"""The lists of slow files and of tests that became shorter are true: what they name exists, and is long where they say.

``moved_tests.tsv`` has a row for each test that was removed, became shorter or was marked long: its id before, what
became of it, the test that always runs and the one of the long form. An id without brackets means all its parameters.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROWS = [line.split("\t") for line in (TESTS / "moved_tests.tsv").read_text().splitlines()[1:]]


@functools.cache
def functions(file: str) -> dict[str, str]:
    """The test functions of a file, each with the text of its decorators."""
    text = (TESTS.parent / file).read_text()
    found = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {f.name: " ".join(ast.unparse(d) for d in f.decorator_list) for f in found}


def decorators(test: str) -> str:
    file, _, name = test.partition("[")[0].partition("::")
    assert name in functions(file), f"{test} does not exist; state the test that covers {name} now"
    return functions(file)[name]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].partition("::")[2])
def test_what_covers_a_test_exists(row: list[str]) -> None:
    before, became, short, long = row
    assert before.startswith("tests/") and became
    assert not decorators(short).startswith("pytest.mark.long"), f"{short} is not of the short form"
    assert "pytest.mark.long" in decorators(long), f"{long} is not of the long form"


def test_slow_files_exist() -> None:
    listed = (TESTS / "slow_files.txt").read_text().split()
    assert len(set(listed)) == len(listed)
    assert [name for name in listed if not (TESTS.parent / name).is_file()] == []
