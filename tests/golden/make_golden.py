"""Make the golden material of this folder, to which later versions of the program are held.

    PYTHONPATH=tests python tests/golden/make_golden.py [models] [keys] [runs]

``models`` are small networks with random weights, written by nnU-Net's own trainer. ``keys`` are the result and run
keys of the jobs in ``golden_cases.py``, found twice, in other folders, processes and numbers of threads, and found to
follow from their facts. ``runs`` are RUN folders of runs that were killed after some blocks, and the results of the
same commands undisturbed.

It was made by version 0.1.0, before the package was rearranged, and is made anew only when keys are changed on purpose:
whatever users have begun or finished by then is begun anew.

What names the machine is taken out of the killed RUN folders: heartbeats and leases, the mark of the process in the
name of a ledger's file, and its number in run.log. Nothing else is changed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from fork_server import ForkServer
from golden_cases import (
    CASES,
    FINISHED,
    HALF_DONE,
    KEYS,
    MODELS,
    OUTPUT,
    PROGRAM,
    REGIONS,
    RUNS,
    SECOND,
    VOLUME,
    derived_keys,
    model_path,
    run_case,
    words_of,
)

from nnunet_models import make_model

NOBODY = "00000000-1-1-00000000"  # stands for the mark of the process that was killed
KILLS: Mapping[str, tuple[str, int]] = {"labels": ("labels.zarr/0/c/", 5), "objects": (".zarr/0/c/", 4)}
"""Before which file operation a run is killed: the n-th whose path contains the text."""


def make_models() -> None:
    """Write the models; only what inference needs stays of their checkpoints."""
    deep = {"dimensions": 3, "patch": (8, 16, 16), "features": (2, 4), "classes": 3, "spacing": [2.0, 1.0, 1.0]}
    made: Mapping[str, dict[str, Any]] = {
        VOLUME: deep | {"reader": "SimpleITKIO", "folds": ("0", "1"), "seed": 1},
        SECOND: deep | {"reader": "SimpleITKIO", "previous_stage": "3d_fullres", "seed": 2},
        REGIONS: {
            "dimensions": 2,
            "patch": (16, 16),
            "features": (2, 4),
            "channels": 2,
            "labels": {"background": 0, "whole": [1, 2], "core": 2},
            "regions_class_order": [1, 2],
            "seed": 3,
        },
    }
    for name, how in made.items():
        shutil.rmtree(MODELS / name, ignore_errors=True)
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(make_model(Path(folder), **how), MODELS / name)
        for path in (MODELS / name).rglob("*.pth"):
            content = torch.load(path, "cpu", weights_only=False)
            del content["optimizer_state"], content["logging"]
            torch.save(content, path)


def _keys_of_all(folder: Path, threads: int) -> dict[str, Any]:
    """Keys of all jobs, each run in a folder of its own."""
    found = {}
    for number, (name, case) in enumerate(CASES.items()):
        (folder / str(number)).mkdir(parents=True)
        os.chdir(folder / str(number))
        found[name] = run_case(case, folder / str(number), threads)
    return found


def make_keys() -> None:
    """Find the keys twice and write them."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(Path(folder) / "a", 1), (Path(folder) / "another" / "place", 2)]
        with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
            first, second = pool.starmap(_keys_of_all, jobs, chunksize=1)
    for name in CASES:
        assert first[name] == second[name], f"{name}: keys depend on folder, process or threads"
        for described in first[name].values():
            assert (described.pop("program"), described.pop("unknown")) == (PROGRAM, []), name
            assert derived_keys(described) == (described["result_keys"], described["run_key"]), name
    KEYS.write_text(_written({"program": PROGRAM, "configurations": first}) + "\n")


def _written(value: Any, depth: int = 0) -> str:
    """JSON of few long lines: what is in a RUN has a line each."""
    if not isinstance(value, dict) or depth > 3:
        return json.dumps(value)
    pad = " " * (depth + 1)
    lines = [f"{pad}{json.dumps(name)}: {_written(inner, depth + 1)}" for name, inner in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{pad[1:]}}}"


def make_runs() -> None:
    """Write the killed RUN folders and the undisturbed results."""
    for folder in (HALF_DONE, FINISHED):
        shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as place, ForkServer(model_path(RUNS["labels"].model), Path(place)) as server:
        for name, case in RUNS.items():
            killed, whole = Path(place) / name / "killed", Path(place) / name / "whole"
            for folder in (killed, whole):
                folder.mkdir(parents=True)
            ended = server.run(words_of(case), watched=Path(OUTPUT), kill_at=KILLS[name], working_folder=killed)
            assert ended.code == -signal.SIGKILL, ended.stderr
            (run,) = (killed / OUTPUT).iterdir()
            _take_out_the_machine(run)
            shutil.copytree(run, HALF_DONE / name / run.name)
            ended = server.run(words_of(case), working_folder=whole)
            assert ended.code == 0, ended.stderr
            (FINISHED / name).mkdir(parents=True)
            shutil.copy(whole / OUTPUT / run.name / "report.json", FINISHED / name)
            for path in (whole / OUTPUT).iterdir():
                if path.is_file():
                    shutil.copy(path, FINISHED / name)


def _take_out_the_machine(run: Path) -> None:
    """See the module's text."""
    for workers in run.glob("*/workers"):
        shutil.rmtree(workers)
    for path in list(run.glob("*/ledger*/*.jsonl")):
        path.rename(path.with_name(f"{NOBODY}.jsonl"))
    log = run / "run.log"
    log.write_text(re.sub(r"(?m)^(\S+ \S+) \S+ \S+ ", r"\1 host 1 ", log.read_text()))


PARTS: Mapping[str, Callable[[], None]] = {"models": make_models, "keys": make_keys, "runs": make_runs}


def main() -> None:
    """Make the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them where none is named")
    for part in parser.parse_args().parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
