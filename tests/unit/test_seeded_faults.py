"""The table of seeded faults fits the package, and the script that tries them tells a fault that survives."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "seed_faults.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("seed_faults", SCRIPT)
    assert spec is not None and spec.loader is not None
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "seed_faults", module)
        spec.loader.exec_module(module)
        yield module


def test_every_text_stands_once_and_every_test_file_is_there(script: ModuleType) -> None:
    faults = script.read_faults()
    assert script.problems(faults) == []
    assert len(faults) >= 30
    for fault in faults:
        for test in fault.tests:
            file, _, rest = test.partition("::")
            if rest:
                assert f"def {rest.partition('[')[0]}(" in (SCRIPT.parents[1] / file).read_text(), test


def test_what_does_not_fit_is_told(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\ny = 1\n")
    (tmp_path / "t.py").touch()
    good = script.Fault("a fault", "a.py", "x = 1", "x = 2", ("t.py::test",))
    assert script.problems([good], tmp_path) == []
    wrong = [
        (replace(good, file="b.py"), "there is no b.py"),
        (replace(good, text="z = 1"), "stands 0 times in a.py"),
        (replace(good, text=" = 1"), "stands 2 times in a.py"),
        (replace(good, faulty="x = 1"), "changes nothing"),
        (replace(good, faulty="x = "), "no Python any more"),
        (replace(good, tests=("u.py",)), "there is no u.py"),
        (replace(good, tests=()), "names no tests"),
    ]
    for fault, finding in wrong:
        assert [finding in told for told in script.problems([fault], tmp_path)] == [True]
    assert script.problems([good, good], tmp_path) == ["a fault: stands twice in the table"]


@pytest.fixture
def small_repository(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for the repository: a package of one function, a test of it."""

    def copied(target: Path) -> None:
        (target / "connectomics").mkdir(parents=True)
        (target / "connectomics" / "__init__.py").write_text("def double(x):\n    y = 2 * x\n    z = 3\n    return y\n")
        test = "from connectomics import double\n\ndef test_double():\n    assert double(2) == 4\n"
        (target / "test_double.py").write_text(test)
        (target / "pytest.ini").write_text("[pytest]\n")

    copied(tmp_path)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "copy_tracked", copied)
    monkeypatch.setattr(script, "problems", lambda faults: [])
    for name, value in (("DISABLE_PLUGIN_AUTOLOAD", "1"), ("PLUGINS", "xdist.plugin,pytest_timeout")):
        monkeypatch.setenv(f"PYTEST_{name}", value)  # other packages' plugins take seconds to import
    return tmp_path


def test_a_fault_is_found_or_survives_and_a_text_that_is_gone_is_told(
    script: ModuleType, small_repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(name: str, text: str, faulty: str) -> object:
        return script.Fault(name, "connectomics/__init__.py", text, faulty, ("test_double.py",))

    found, survives, gone = fault("a", "2 * x", "x + x + 1"), fault("b", "z = 3", "z = 4"), fault("c", "w = 3", "z = 4")
    monkeypatch.setattr(script, "read_faults", lambda: [found, survives])
    assert script.main([]) == 1
    told = capsys.readouterr().out
    assert "1 of 2 faults were found" in told and "not found: b\n" in told
    green = script.Verdict(0, "", 0.1, "1 passed")
    monkeypatch.setattr(script, "run_tests", lambda tree, tests: green)
    monkeypatch.setattr(script, "read_faults", lambda: [gone])
    assert script.main([]) == 2
    assert "its text does not stand once" in capsys.readouterr().err


@pytest.mark.long
def test_all_faults_are_found(
    script: ModuleType, small_repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = script.Fault("a fault", "connectomics/__init__.py", "2 * x", "x + x + 1", ("test_double.py",))
    monkeypatch.setattr(script, "read_faults", lambda: [fault])
    assert script.main([]) == 0
    assert "1 of 1 faults were found" in capsys.readouterr().out


def test_tests_that_are_red_anyway_tell_nothing(
    script: ModuleType, small_repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    red = script.Verdict(1, "test_double.py::test_double", 0.1, "1 failed")
    fault = script.Fault("a fault", "connectomics/__init__.py", "2 * x", "x", ("test_double.py",))
    monkeypatch.setattr(script, "read_faults", lambda: [fault])
    monkeypatch.setattr(script, "run_tests", lambda tree, tests: red)
    assert script.main([]) == 1
    assert "red without a fault" in capsys.readouterr().out


def test_an_unknown_name_is_refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--only", "no such fault", "--list"]) == 2
    assert "no fault is called no such fault" in capsys.readouterr().err
