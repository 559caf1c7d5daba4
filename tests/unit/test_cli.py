"""The command line: help at once, inspect, doctor, the script, progress, and what goes to which stream."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

from connectomics.cli import main, progress, script_main
from connectomics.cli import program as cli
from connectomics.cli.exit import FAILED
from connectomics.commands import demo
from connectomics.core.errors import ConnectomicsError
from connectomics.jobs.outcome import VolumeOutcome

from nnunet_models import make_model
from small_jobs import em_like, final_names, infer_words, quick_folder, write_h5

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        make_model(place / "model", dimensions=2, patch=(16, 32), classes=3, folds=("0", "1"), features=(4, 8))
        write_h5(place / "v.h5", em_like((2, 24, 32)))
        write_h5(place / "truth.h5", em_like((2, 24, 32), 1) // 90)
        yield place


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    (found,) = (folder / "model").iterdir()
    return found


@pytest.mark.parametrize(
    ("stated", "expected"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "9"}, "None")],
)
def test_waiting_threads_sleep_unless_the_environment_says_otherwise(stated: dict[str, str], expected: str) -> None:
    code = (
        "import os, sys; from connectomics.cli import program as cli\n"
        "def told(words): print('torch' in sys.modules, os.environ.get('OMP_WAIT_POLICY'))\n"
        "cli._COMMANDS['status'] = told\n"
        "cli.main(['status', 'nowhere.run'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | stated
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["False", expected]


def test_help_imports_nothing_that_is_slow_to_load() -> None:
    code = (
        "import sys; from connectomics.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'numpy', 'h5py', 'tensorstore', 'hydra', 'rich'} & set(sys.modules)\n"
        "print(heavy, file=sys.stderr); sys.exit(code or len(heavy))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "infer-volume" in ended.stdout


@pytest.mark.parametrize(
    "command",
    [
        "from-nnunet",
        "infer-volume",
        "plan",
        "tune",
        "test",
        "evaluate",
        "inspect",
        "convert",
        "verify",
        "reproduce",
        "doctor",
        "demo",
    ],
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert command in capsys.readouterr().out


def test_inspect_says_what_a_checkpoint_is(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model)]) == 0
    out = capsys.readouterr().out
    facts = {line[:18].strip(): line[19:] for line in out.splitlines()}
    assert facts["patch (z, y, x)"] == "[1, 16, 32]"
    assert facts["labels"] == "0=background, 1=label_1, 2=label_2"
    assert facts["normalisation"] == "ZScoreNormalization"
    assert facts["mirror axes"] == "yx"
    assert facts["folds"] == "0, 1"
    assert len(facts["sha256"]) == 64


def test_inspect_as_json_with_overrides(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--json", "model.folds=[1]"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["folds"] == "1"
    assert facts["parameters"] > 0
    assert sum(name.startswith("fold_1/checkpoint_final.pth ") for name in facts["files"]) == 1


def test_words_and_options_come_in_any_order(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c.yaml").write_text("experiment_name: from_file\n")
    words = [f"inference.data.output_path='{folder}/mixed'", "--checkpoint", str(model), "system.device=cpu"]
    more = ["--config", str(folder / "c.yaml"), f"inference.volume_mode.file_pattern='{folder}/v.h5'"]
    assert main(["infer-volume", *words, *more, "system.num_cpus=1", "description=last"]) == 0
    provenance = json.loads((folder / "mixed" / "v_labels.run" / "provenance.json").read_text())
    assert (provenance["experiment_name"], provenance["description"]) == ("from_file", "last")


@pytest.mark.parametrize("words", [["demo", "a=1"], ["doctor", "a=1", "--jsn"], ["inspect", "m", "a=1", "-x"]])
def test_unknown_words_are_wrong_usage(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_doctor_is_content(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = infer_words(model, folder / "doctor", folder / "v.h5")[1:]
    code = main(["doctor", *words])
    out = capsys.readouterr().out
    for subject in ("python", "nnunetv2", "device", "memory", "disk", "model", "volumes"):
        assert f" {subject} " in out
    mends = [line for line in out.splitlines() if line.startswith("MEND")]
    assert code == (3 if mends else 0)
    assert not (folder / "doctor").exists()


def test_doctor_says_how_to_mend(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.h5").touch()
    assert main(["doctor", *infer_words(model, folder / "doctor", folder / "bad.h5")[1:]]) == 3
    out = capsys.readouterr().out
    assert "MEND volume" in out
    assert "0 bytes" in out
    assert "→ mend or leave out this volume" in out


def test_paths_go_to_stdout_and_progress_to_stderr(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder / "streams"
    assert main(infer_words(model, output, folder / "v.h5")) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == str(output / "v_labels.h5")
    assert err.splitlines() == [
        "case: each section (trained on single images, read by NaturalImage2DIO)",
        "Skipped 0/1 finished, processing 1",
    ]


def test_a_deviation_from_nnunet_is_said(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = infer_words(model, folder / "deviation", folder / "v.h5", "inference.sliding_window.blending=constant")
    assert main(words) == 0
    assert "not nnU-Net: constant blending\n" in capsys.readouterr().err


def test_mode_test_prints_and_saves_scores(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["test", "--checkpoint", str(model), f"inference.data.output_path='{folder}/scored'", "system.num_cpus=1"]
    volumes = [f"test.data.test_image='{folder}/v.h5'", f"test.data.test_label='{folder}/truth.h5'"]
    assert main([*words, "system.device=cpu", *volumes]) == 0
    out = capsys.readouterr().out
    saved = json.loads((folder / "scored" / "scores.json").read_text())
    dice = saved["pooled"]["labels"]["label_2"]["dice"]
    (row,) = [line for line in out.splitlines() if line.startswith("all volumes") and "label_2" in line]
    assert f"{dice:.4f}" in row
    assert out.rstrip().endswith(str(folder / "scored" / "scores.json"))


def test_a_truth_that_cannot_be_read_is_named_and_the_exit_code_says_so(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["test", "--checkpoint", str(model), f"inference.data.output_path='{folder}/unscored'"]
    volumes = [f"test.data.test_image='{folder}/v.h5'", f"test.data.test_label='{folder}/absent.h5'"]
    assert main([*words, "system.device=cpu", "system.num_cpus=1", *volumes]) == 3
    assert "not measured" in capsys.readouterr().out


def test_the_script_takes_a_mode(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = infer_words(model, folder / "script", folder / "v.h5")
    assert script_main(["--mode", *words]) == 0
    assert final_names(folder / "script") == {"v_labels.h5"}
    with pytest.raises(SystemExit) as caught:
        script_main(words[1:])
    assert caught.value.code == 2
    assert "--mode" in capsys.readouterr().err


@pytest.mark.parametrize(
    "start", [["scripts/main.py", "--mode"], pytest.param(["-m", "connectomics.cli"], marks=pytest.mark.long)]
)
def test_both_ways_to_start_it(folder: Path, model: Path, start: list[str]) -> None:
    output = folder / Path(start[-1]).name
    command = [sys.executable, *start, *infer_words(model, output, folder / "v.h5")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert ended.returncode == 0, ended.stderr
    assert final_names(output) == {"v_labels.h5"}


def test_demo_prints_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(demo, "run_demo", return_value=["one", "two"]) as run:
        assert main(["demo", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert run.call_args.args[0] == tmp_path


def raising(error: BaseException) -> Any:
    def command(words: object) -> int:
        raise error

    return mock.patch.dict(cli._COMMANDS, {"doctor": command})


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConnectomicsError("two\n  lines"), 3, "error: two lines\n"),
        (OSError(28, "No space left on device", "/x"), 3, "error: [Errno 28] No space left on device: '/x'\n"),
        (KeyboardInterrupt(), 130, "interrupted; finished blocks are kept, the same command continues\n"),
    ],
)
def test_an_end_that_is_no_result_is_one_sentence(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    with raising(error):
        assert main(["doctor"]) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_ends_the_command_and_the_handlers_are_put_back(number: signal.Signals, code: int) -> None:
    program = (
        "import os, signal, time; from connectomics.cli import program as cli\n"
        f"def command(words): os.kill(os.getpid(), {int(number)}); time.sleep(5); return 0\n"
        f"before = signal.getsignal({int(number)})\n"
        "cli._COMMANDS['doctor'] = command\n"
        f"print(cli.main(['doctor']), signal.getsignal({int(number)}) == before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == [str(code), "True"]
    assert "stopped by a signal" in done.stderr


def test_warnings_of_the_package_are_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    def command(words: object) -> int:
        logging.getLogger("connectomics.some.room").info("not this")
        logging.getLogger("connectomics.some.room").warning("look here")
        return 0

    handlers = list(logging.getLogger("connectomics").handlers)
    with mock.patch.dict(cli._COMMANDS, {"doctor": command}):
        main(["doctor"])
        main(["doctor"])
    assert capsys.readouterr().err == "WARNING: look here\n" * 2
    assert logging.getLogger("connectomics").handlers == handlers


def text_of(*, terminal: bool, width: int = 200) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width, markup=False, emoji=False, color_system=None)
    return console, stream


def test_without_a_terminal_progress_is_plain_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console, stream = text_of(terminal=False)
    with progress.ProgressBar(console) as bar:
        bar.listed(12, 2)
        for i in range(10):
            bar.began(f"v{i}")
            clock[0] += 10
            bar.block(1, 2)
            clock[0] += 10
            bar.ended(VolumeOutcome(f"v{i}", "done"))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Skipped 2/12 finished, processing 10"
    assert "volume 3/10, 60 s, 140 s left" in lines
    assert 3 < len(lines) < 8


def test_the_first_block_has_no_estimate_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console, stream = text_of(terminal=False)
    with progress.ProgressBar(console) as bar:
        bar.listed(2, 0)
        clock[0] += 31
        bar.block(1, 4)
    assert stream.getvalue().splitlines()[1] == "block 1/4, 31 s"


def test_one_large_volume_has_an_estimate_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that an earlier run finished say nothing of the speed."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console, stream = text_of(terminal=False)
    with progress.ProgressBar(console) as bar:
        bar.listed(1, 0)
        bar.began("large")
        clock[0] += 100  # the survey
        bar.block(40, 100)
        for finished in (41, 42):
            clock[0] += 60
            bar.block(finished, 100)
    assert stream.getvalue().splitlines()[1:] == [
        "block 40/100, 100 s",
        "block 41/100, 160 s, 3540 s left in this volume",
        "block 42/100, 220 s, 3480 s left in this volume",
    ]


def test_a_stage_that_begins_after_a_resume_has_no_negative_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console, stream = text_of(terminal=False)
    with progress.ProgressBar(console) as bar:
        bar.listed(1, 0)
        bar.began("large")
        bar.block(60, 64)
        for finished in (0, 16):
            clock[0] += 60
            bar.block(finished, 64)
    assert stream.getvalue().splitlines()[1:] == ["block 0/64, 60 s", "block 16/64, 120 s, 180 s left in this volume"]


def test_blocks_of_minutes_have_an_estimate_on_a_terminal() -> None:
    clock = [0.0]
    console, stream = text_of(terminal=True)
    with progress.ProgressBar(console) as bar:
        bar._bars.get_time = lambda: clock[0]
        bar.listed(1, 0)
        bar.began("large")
        for finished in range(4):
            clock[0] += 90
            bar.block(finished, 10)
        bar._bars.refresh()
    assert "0:10:30" in stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_names_are_never_markup(terminal: bool) -> None:
    """Brackets, a closing tag and an emoji code are parts of a file's name."""
    name = "data[/b]/[red]x:smile:.png"
    console, stream = text_of(terminal=terminal)
    with progress.ProgressBar(console) as bar:
        bar.listed(1, 0)
        bar.began(name)
        bar.block(1, 2)
        bar.ended(VolumeOutcome(name, "failed", "[Errno 13] no"))
    assert f"failed: {name}: [Errno 13] no" in stream.getvalue()


def test_a_terminal_shows_volumes_and_blocks() -> None:
    console, stream = text_of(terminal=True)
    with progress.ProgressBar(console) as bar:
        bar.listed(3, 0)
        bar.began("first")
        bar.block(2, 5)
        bar.ended(VolumeOutcome("first", "done"))
        bar.ended(VolumeOutcome("second", "skipped"))
    shown = stream.getvalue()
    assert "2/5" in shown
    assert "1/3" in shown
    assert "left" in shown


@pytest.mark.parametrize(("code", "target", "expected"), [(0, "null", 0), (2, "null", 2), (0, "full", FAILED)])
def test_a_process_ends_with_its_code_after_what_was_registered(
    tmp_path: Path, code: int, target: str, expected: int
) -> None:
    device = Path("/dev") / target
    if not device.exists():
        pytest.skip(f"there is no {device} here")
    words = (
        "import atexit, pathlib; from connectomics.cli.exit import leave\n"
        "def command():\n    atexit.register(pathlib.Path('done').touch)\n    print('a result')\n"
    )
    with device.open("w") as stream:
        ended = subprocess.run(
            [sys.executable, "-c", f"{words}    return {code}\nleave(command)"],
            cwd=tmp_path,
            stdout=stream,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "PYTHONUNBUFFERED": ""},
        )
    assert ended.returncode == expected
    assert (tmp_path / "done").exists()
