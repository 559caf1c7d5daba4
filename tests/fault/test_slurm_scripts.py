"""The SLURM scripts: shares without gaps, signals passed on, requeued, exit codes kept; and all of it on a real SLURM.

What needs no SLURM runs with its variables set by hand, a program in python's place, and a noted ``scontrol``.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from PIL import Image
from slurm_sandbox import (
    PYTHON,
    REPOSITORY,
    SHORT_S,
    START,
    STEP,
    Bench,
    Sandbox,
    array,
    bench_in,
    program,
    slurm_sandbox,
    until,
)

SCRIPTS = REPOSITORY / "scripts" / "slurm"
ARRAY = SCRIPTS / "infer_volume_array.sh"
GPUS = SCRIPTS / "infer_volume_4gpu.sh"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return bench_in(tmp_path)


@pytest.mark.parametrize("ids", [[0, 1, 2], [4, 5, 6, 7], [0, 2, 4, 6], [3, 10, 17], [3, 7], [5]])
def test_the_shares_of_an_array_are_dense(bench: Bench, ids: list[int]) -> None:
    for task in ids:
        assert bench.run(ARRAY, **array(ids, task))[0] == 0
    assert [(w[START], w[STEP]) for w in bench.stated()] == [(str(i), str(len(ids))) for i in range(len(ids))]


@pytest.mark.parametrize(("ids", "task"), [([1, 2, 4], 2), ([0, 2, 3, 6], 3)])
def test_an_array_with_gaps_is_refused(bench: Bench, ids: list[int], task: int) -> None:
    code, stderr = bench.run(ARRAY, **array(ids, task))
    assert code == 2
    assert f"use --array=0-{len(ids) - 1}" in stderr
    assert bench.words() == []


def test_without_slurm_one_process_takes_all(bench: Bench) -> None:
    assert bench.run(ARRAY, "--checkpoint", "a model", "model.folds=[0, 1]", "description='* $HOME'")[0] == 0
    expected = ["-m", "connectomics.cli", "infer-volume", "--checkpoint", "a model", "model.folds=[0, 1]"]
    assert bench.words() == [[*expected, "description='* $HOME'", f"{START}=0", f"{STEP}=1"]]


def test_device_and_threads_follow_the_allocation_unless_stated(bench: Bench) -> None:
    given = {"CUDA_VISIBLE_DEVICES": "2", "SLURM_CPUS_PER_TASK": "16"}
    assert bench.run(ARRAY, "system.device=cpu", "system.num_cpus=3", **given, **array([0, 1], 0))[0] == 0
    assert bench.run(ARRAY, **given, **array([0, 1], 1))[0] == 0
    assert bench.run(ARRAY, CUDA_VISIBLE_DEVICES="NoDevFiles", **array([0, 1, 2], 2))[0] == 0
    seen = [(w.get("system.device"), w.get("system.num_cpus")) for w in bench.stated()]
    assert seen == [("cpu", "3"), ("cuda", "8"), (None, None)]
    assert sum(word.startswith("system.") for word in bench.words()[0]) == 2


@pytest.mark.parametrize("script", [ARRAY, GPUS])
@pytest.mark.parametrize("key", [START, STEP])
def test_a_stated_share_is_refused(bench: Bench, script: Path, key: str) -> None:
    code, stderr = bench.run(script, f"{key}=1")
    assert (code, key in stderr, bench.words()) == (2, True, [])


@pytest.mark.parametrize("code", [0, 2, 3])
def test_the_exit_code_is_passed_on(bench: Bench, code: int) -> None:
    assert bench.run(ARRAY, **array([4, 5], 5), EXIT_1=str(code))[0] == code
    assert bench.scontrol() == []


def test_before_the_time_limit_a_task_stops_and_is_requeued(bench: Bench) -> None:
    code, stderr = bench.signalled(signal.SIGUSR1, ARRAY, 1, **array([5], 5))
    assert code == 0
    # by task: the bare number of the last task is also that of the whole array
    assert bench.scontrol() == ["requeue 77_5"]
    assert "77_5 is requeued" in stderr


def test_a_single_job_is_requeued_by_its_number(bench: Bench) -> None:
    assert bench.signalled(signal.SIGUSR1, ARRAY, 1, SLURM_JOB_ID="81")[0] == 0
    assert bench.scontrol() == ["requeue 81"]


@pytest.mark.parametrize("script", [ARRAY, GPUS])
def test_a_preempted_job_ends_and_leaves_requeueing_to_slurm(bench: Bench, script: Path) -> None:
    assert bench.signalled(signal.SIGTERM, script, 1, SLURM_JOB_ID="81", GPUS="1")[0] == 143
    assert bench.scontrol() == []


@pytest.mark.parametrize("script", [ARRAY, GPUS])
def test_what_cannot_be_requeued_says_so(bench: Bench, script: Path) -> None:
    refused = bench.signalled(signal.SIGUSR1, script, 1, SLURM_JOB_ID="81", GPUS="1", SCONTROL_EXIT="1")
    assert refused[0] == 138
    assert "could not be requeued; submit it again" in refused[1]


@pytest.mark.parametrize("script", [ARRAY, GPUS])
def test_a_job_is_not_requeued_for_ever(bench: Bench, script: Path) -> None:
    job = {"SLURM_JOB_ID": "81", "SLURM_RESTART_COUNT": "7", "CONNECTOMICS_MAX_RESTARTS": "7", "GPUS": "1"}
    code, stderr = bench.signalled(signal.SIGUSR1, script, 1, **job)
    assert (code, bench.scontrol()) == (138, [])
    assert "was restarted 7 times and is not requeued" in stderr


@pytest.mark.parametrize("script", [ARRAY, GPUS])
def test_without_slurm_a_stop_is_only_a_stop(bench: Bench, script: Path) -> None:
    assert bench.signalled(signal.SIGUSR1, script, 1, GPUS="1")[0] == 138
    assert bench.scontrol() == []


@pytest.mark.parametrize("script", [ARRAY, GPUS])
def test_the_program_is_looked_for_in_the_stated_order(bench: Bench, script: Path) -> None:
    absent = {"CONNECTOMICS_PYTHON": "", "GPUS": "1", "DEVICE": "cpu"}
    code, stderr = bench.run(script, **absent)
    assert code == 2
    assert "CONNECTOMICS_HOME (not set)" in stderr
    assert str(bench.folder) in stderr
    program(bench.folder / "bin" / "connectomics", PYTHON)
    for name in ("submitted", "home"):
        program(bench.folder / name / ".venv" / "bin" / "python", PYTHON)
        program(bench.folder / name / "pyproject.toml", "")
    submitted = absent | {"SLURM_SUBMIT_DIR": str(bench.folder / "submitted")}
    home = submitted | {"CONNECTOMICS_HOME": str(bench.folder / "home")}
    stated = home | {"CONNECTOMICS_PYTHON": str(bench.folder / "bin" / "python")}
    expected = ["bin/connectomics", "submitted/.venv/bin/python", "home/.venv/bin/python", "bin/python"]
    for variables, path in zip((absent, submitted, home, stated), expected, strict=True):
        shutil.rmtree(bench.folder / "notes")
        (bench.folder / "notes").mkdir()
        assert bench.run(script, **variables)[0] == 0
        [note] = bench.notes()
        module = [] if path == "bin/connectomics" else ["-m", "connectomics.cli"]
        assert note[: len(module) + 2] == [str(bench.folder / path), *module, "infer-volume"]


def test_every_gpu_gets_its_process_and_its_log(bench: Bench) -> None:
    job = {"CUDA_VISIBLE_DEVICES": "4,5,7", "SLURM_CPUS_PER_TASK": "12", "SLURM_JOB_ID": "81"}
    code, stderr = bench.run(GPUS, "--checkpoint", "a model", **job, LOGS="the logs", EXIT_0="2", EXIT_1="3")
    assert code == 3
    assert [w[3:5] for w in bench.words()] == [["--checkpoint", "a model"]] * 3
    assert bench.stated() == [
        {START: str(i), STEP: "3", "system.device": f"cuda:{i}", "system.num_cpus": "4"} for i in range(3)
    ]
    logs = [f"the logs/infer_volume_4gpu_81_{i}.log" for i in range(3)]
    assert all((bench.folder / log).exists() and log in stderr for log in logs)
    assert [f"share {i} of 3 ended with exit code {c}" in stderr for i, c in enumerate((2, 3, 0))] == [True] * 3


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({}, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        ({"GPUS": "2", "CUDA_VISIBLE_DEVICES": "0,1,2"}, ["cuda:0", "cuda:1"]),
        ({"GPUS": "3", "DEVICE": "cpu"}, ["cpu"] * 3),
    ],
)
def test_how_many_processes_and_where(bench: Bench, variables: dict[str, str], devices: list[str]) -> None:
    assert bench.run(GPUS, "system.num_cpus=1", **variables)[0] == 0
    assert [w["system.device"] for w in bench.stated()] == devices
    assert [w[STEP] for w in bench.stated()] == [str(len(devices))] * len(devices)


@pytest.mark.parametrize(
    ("variables", "word", "finding"),
    [
        ({"GPUS": "four"}, "", "GPUS is 'four'"),
        ({"GPUS": "0"}, "", "GPUS is '0'"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "", "infer_volume_array.sh"),
        ({}, "system.device=cuda:1", "system.device is set"),
    ],
)
def test_what_four_processes_cannot_do(bench: Bench, variables: dict[str, str], word: str, finding: str) -> None:
    code, stderr = bench.run(GPUS, *filter(None, [word]), **variables)
    assert (code, finding in stderr, bench.words()) == (2, True, [])


def test_all_processes_stop_and_the_job_is_requeued_once(bench: Bench) -> None:
    assert bench.signalled(signal.SIGUSR1, GPUS, 3, GPUS="3", SLURM_JOB_ID="81")[0] == 0
    assert bench.scontrol() == ["requeue 81"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_all_processes_end_when_interrupted(bench: Bench, number: signal.Signals) -> None:
    code, stderr = bench.signalled(number, GPUS, 2, GPUS="2")
    assert code == 143
    assert stderr.count("ended with exit code 143") == 2


def test_only_living_processes_are_signalled(bench: Bench) -> None:
    process = bench.start(GPUS, GPUS="2", EXIT_0="wait", EXIT_1="3")
    assert process.stderr is not None
    living, dead = (int(process.stderr.readline().split("process ")[1].split(",")[0]) for _ in range(2))
    until(lambda: len(bench.words()) == 2 and not psutil.pid_exists(dead), "the second process to end", SHORT_S)
    process.send_signal(signal.SIGTERM)
    code, stderr = bench.end(process)
    assert code == 143
    assert f"(processes {living}) is told" in stderr


def test_the_scripts_are_sound_bash() -> None:
    checker = [found, "--severity=style"] if (found := shutil.which("shellcheck")) else ["bash", "-n"]
    for script in (ARRAY, GPUS):
        subprocess.run([*checker, script], check=True)


def crops(shared_data: Path, folder: Path, side: int, count: int) -> None:
    """Sections of real EM as ``c00.png``, ``c01.png``, ..."""
    folder.mkdir()
    for i in range(count):
        with Image.open(shared_data / "em" / "vnc" / "raw" / f"{i:02d}.png") as section:
            section.crop((20 * i, 10 * i, 20 * i + side, 10 * i + side)).save(folder / f"c{i:02d}.png")


def job_words(shared_data: Path, pattern: str, output: Path) -> list[str]:
    return [
        "--checkpoint",
        str(shared_data / "models" / "vnc_mito_2d"),
        "model.folds=[0]",
        f"inference.volume_mode.file_pattern={pattern}",
        f"inference.data.output_path={output}",
        "system.num_cpus=1",
    ]


def real_environment() -> dict[str, str]:
    return {"CONNECTOMICS_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def test_two_real_processes_label_every_volume_once(shared_data: Path, tmp_path: Path) -> None:
    crops(shared_data, tmp_path / "raw", 200, 3)
    words = job_words(shared_data, str(tmp_path / "raw" / "*.png"), tmp_path / "out")
    words.append("inference.test_time_augmentation.enabled=false")
    environment = {**os.environ, **real_environment(), "GPUS": "2", "DEVICE": "cpu"}
    subprocess.run(["bash", GPUS, *words], env=environment, cwd=tmp_path, check=True, timeout=300)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.h5")) == [f"c{i:02d}_labels.h5" for i in range(3)]
    logs = [(tmp_path / f"infer_volume_4gpu_local_{i}.log").read_text() for i in range(2)]
    assert [re.findall(r"^(?:done|failed) +(\d+)$", log, re.MULTILINE) for log in logs] == [
        ["2", "0"],
        ["1", "0"],
    ]


@dataclass(frozen=True, slots=True)
class Site:
    """A real SLURM, real volumes (twelve whole and one broken), and what an undisturbed run makes of them."""

    sandbox: Sandbox
    folder: Path
    shared_data: Path

    def words(self, output: str) -> list[str]:
        return job_words(self.shared_data, str(self.folder / "raw" / "*.png"), self.folder / output)

    def submit(self, *words: str, **variables: str) -> str:
        return self.sandbox.submit(self.folder, *words, **real_environment(), **variables)

    def results(self, output: str) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (self.folder / output).glob("*.h5")}

    def log(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def finished(self, output: str) -> int:
        return len(list((self.folder / output).glob("*.h5")))


@pytest.fixture(scope="module")
def site(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    crops(shared_data, folder / "raw", 512, 13)
    broken = folder / "raw" / "c04.png"
    broken.write_bytes(broken.read_bytes()[:3000])
    with slurm_sandbox() as sandbox:
        made = Site(sandbox, folder, shared_data)
        plain = subprocess.run(
            [sys.executable, "-m", "connectomics.cli", "infer-volume", *made.words("plain")],
            env={**os.environ, **real_environment()},
            check=False,
            timeout=600,
            capture_output=True,
        )
        assert (plain.returncode, made.finished("plain")) == (3, 12)
        yield made


@pytest.mark.long
def test_an_array_on_slurm_with_a_broken_volume_and_a_requeued_task(site: Site) -> None:
    job = site.submit("--array=4-8:2", "--time=10", str(ARRAY), *site.words("array"))
    first = site.folder / "array" / "c00_labels.h5"
    until(first.exists, "the first volume", 120)
    site.sandbox.command("scontrol", "requeue", f"{job}_4")
    site.sandbox.wait(job, 300)
    assert site.results("array") == site.results("plain")
    codes = [site.sandbox.fact(f"{job}_{task}", "ExitCode") for task in (4, 6, 8)]
    assert codes == ["0:0", "3:0", "0:0"]
    assert [site.sandbox.fact(f"{job}_{task}", "Restarts") for task in (4, 6, 8)] == ["1", "0", "0"]
    logs = [site.log(f"infer_volume_{job}_{task}.log") for task in (4, 6, 8)]
    assert [re.findall(r"share (\d) of 3 .* restarts (\d)", log) for log in logs] == [
        [("0", "0"), ("0", "1")],
        [("1", "0")],
        [("2", "0")],
    ]
    assert re.search(r"Skipped [1-4]/5 finished", logs[0])
    assert "failed        1" in logs[1]


@pytest.mark.long
def test_a_task_near_its_time_limit_is_requeued_and_ends_with_the_same_bytes(site: Site) -> None:
    limit = ("--time=1", "--signal=B:USR1@25", "--output=limit.log")
    job = site.submit("--array=5-5", *limit, str(ARRAY), *site.words("limit"))
    until(lambda: site.finished("limit") > 0, "the first volume", 120)
    # hold the process until SLURM has sent its signal, so that it surely comes in the middle
    output = f"inference.data.output_path={site.folder / 'limit'}"
    worker = next(
        p
        for p in psutil.process_iter(["cmdline"])
        if output in (words := p.info["cmdline"] or []) and words[1:3] == ["-m", "connectomics.cli"]
    )
    worker.suspend()
    until(lambda: "SIGUSR1" in site.log("limit.log"), "SLURM's signal before the limit", 120)
    worker.resume()
    site.sandbox.wait(job, 300)
    assert site.results("limit") == site.results("plain")
    assert site.sandbox.fact(f"{job}_5", "ExitCode") == "3:0"
    assert int(site.sandbox.fact(f"{job}_5", "Restarts")) >= 1
    assert "stopped by a signal" in site.log("limit.log")
    assert f"{job}_5 is requeued and continues" in site.log("limit.log")


@pytest.mark.long
def test_one_node_with_two_processes_on_slurm(site: Site) -> None:
    words = ("--gres=gpu:2", "--cpus-per-task=2", "--time=10", str(GPUS), *site.words("gpus"))
    job = site.submit(*words, DEVICE="cpu")
    site.sandbox.wait(job, 300)
    assert site.results("gpus") == site.results("plain")
    assert site.sandbox.fact(job, "ExitCode") == "3:0"
    assert "share 1 of 2" in site.log(f"infer_volume_4gpu_{job}.log")
