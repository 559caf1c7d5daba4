"""`connectomics decode` by several processes at once against one, on real dense labels.

    python benchmarks/decode_workers.py                            # 1 and 2 processes, connected components, Zarr
    python benchmarks/decode_workers.py --steps slice_linking --every 4      # many small objects
    python benchmarks/decode_workers.py --before OTHER_CHECKOUT    # the same of another checkout, in the same rounds

The processes import everything and decode a few voxels, then wait for each other, so that the start of Python is in no
ratio; how long it takes is printed. Rounds are interleaved, ratios are medians of rounds. "Steps" are what decoding
does before it writes final outputs, from when the first process begins them; "whole" is the command from start to end.
What a process does while it holds the lease of the single writer nobody else can do beside it: its processor time is
held against that of all that is done. "Path" is the processor time of what must follow each other (of each stage its
busiest process, and all that is done alone), against one process's: what other work on the machine does not disturb.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STEPS = {
    "connected_components": "[{name: connected_components}]",
    "slice_linking": "[{name: slice_linking, ids: true}]",
    "watershed": "[{name: watershed, seed_distance_nm: 80}]",
}
VOXEL_SIZE = "[40,16,16]"
READY, GO = "ready\n", "go\n"
OTHERS = ("all", "steps", "alone, steps", "alone, output")


class Clock:
    """Wall and processor seconds of this process, by what it was doing; whether it is at the steps."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)
        self.part = "output"

    @contextlib.contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Count what is done meanwhile."""
        wall, cpu = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            self.wall[name] += time.monotonic() - wall
            self.cpu[name] += time.process_time() - cpu


def watched(clock: Clock) -> None:
    """Have the steps, their stages and the single writer's lease counted."""
    from connectomics.execution.worker import Worker
    from connectomics.runs import decoding_run

    alone: Callable[..., Any] = Worker.alone
    run: Callable[..., Any] = decoding_run.run_blocks
    objects: Callable[..., Any] = decoding_run.objects

    @contextlib.contextmanager
    def held(self: Worker, name: str, *more: Callable[[], object]) -> Iterator[None]:
        with alone(self, name, *more), clock.counting(f"alone, {clock.part}"):
            yield

    def blocks(task: Any, *arguments: Any, **named: Any) -> Any:
        with clock.counting(task.name.partition("_")[2] or task.name):
            return run(task, *arguments, **named)

    def steps(*arguments: Any, **named: Any) -> Any:
        clock.part = "steps"
        clock.wall["begin of steps"] = time.monotonic()
        try:
            with clock.counting("steps"):
                return objects(*arguments, **named)
        finally:
            clock.part = "output"
            clock.wall["end of steps"] = time.monotonic()

    Worker.alone = held  # type: ignore[method-assign]
    decoding_run.run_blocks = blocks
    decoding_run.objects = steps


def child(words: list[str]) -> None:
    """Be one of the processes: import, say so, wait, decode, and say what it took."""
    began = time.monotonic()
    from connectomics.cli.program import main as decode

    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        np.save(Path(name) / "few.npy", np.eye(4, dtype=np.uint8)[None])
        few = [word for word in words[1:] if "output_path" not in word]
        decode(["decode", str(Path(name) / "few.npy"), f"inference.data.output_path={name}", *few])
    clock = Clock()
    watched(clock)
    started = time.monotonic() - began
    sys.stdout.write(READY)
    sys.stdout.flush()
    sys.stdin.readline()
    with clock.counting("all"), contextlib.redirect_stdout(sys.stderr):
        code = decode(["decode", *words])
    told = {"code": code, "started": started, "wall": clock.wall, "cpu": clock.cpu}
    sys.stdout.write(json.dumps(told) + "\n")


def decoded(processes: int, checkout: Path, words: list[str]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Seconds from the moment all were ready until the last had ended, whole and steps, and what each has told."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", *words]
    running = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
            start_new_session=True,  # Linux shares processors among sessions: both in one would get what one gets
        )
        for _ in range(processes)
    ]
    for each in running:
        assert each.stdout is not None
        if each.stdout.readline() != READY:
            raise SystemExit(f"{' '.join(command)}: did not start")
    began = time.monotonic()
    for each in running:
        assert each.stdin is not None
        each.stdin.write(GO)
        each.stdin.flush()
    told = [json.loads(each.communicate()[0]) for each in running]
    seconds = {"whole": time.monotonic() - began}
    if any(each["code"] for each in told):
        raise SystemExit(f"{' '.join(command)}: exit codes {[each['code'] for each in told]}")
    ended, first = ([each["wall"][f"{end} of steps"] for each in told] for end in ("end", "begin"))
    seconds["steps"] = max(ended) - min(first)
    return seconds, told


def spinning(processes: int) -> int:
    """What so many processes count to in a second, together: what the machine has left for them."""
    code = "import time; n, end = 0, time.monotonic() + 1\nwhile time.monotonic() < end: n += 1\nprint(n)"
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) for _ in range(processes)
    ]
    return sum(int(each.communicate()[0]) for each in running)


def labels_of(shape: tuple[int, int, int], every: int, path: Path) -> None:
    """Each so many-th voxel of the shared segmentation of neurons (z, y, x), tiled to a shape, as .npy."""
    import crackle

    stated = os.environ.get("CONNECTOMICS_SHARED_DATA")
    data = Path(stated) if stated else ROOT.parent / "shared" / "data"
    packed = data / "em" / "labels" / "cc3d_connectomics" / "connectomics.npy.ckl.gz"
    whole = crackle.decompress(gzip.decompress(packed.read_bytes())).T[::every, ::every, ::every]
    at = [np.arange(n) % size for n, size in zip(shape, whole.shape, strict=True)]
    np.save(path, np.ascontiguousarray(whole[np.ix_(*at)]))


def digest(folder: Path) -> str:
    """Of all final outputs: what they are called and their bytes, without the run folders and names of keys."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.endswith(".run") for part in path.relative_to(folder).parts):
            if path.name == "zarr.json" and path.parent.parent == folder:
                continue  # it is stamped with the path of the input and the version
            found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def shares(told: list[dict[str, Any]]) -> dict[str, float]:
    """The share that each thing has in the processor time of all processes."""
    whole = sum(each["cpu"]["all"] for each in told)
    names = {name for each in told for name in each["cpu"]}
    return {name: sum(each["cpu"].get(name, 0) for each in told) / whole for name in sorted(names)}


def measured(step: str, source: Path, place: Path, words: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one step, its medians printed."""
    sides: list[tuple[str, int, Path]] = [(f"{n}", n, ROOT) for n in words.processes]
    if words.before:
        sides += [(f"{n} before", n, words.before.resolve()) for n in words.processes]
    times: dict[str, list[dict[str, float]]] = defaultdict(list)
    told: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    digests: set[str] = set()
    spun: dict[int, list[int]] = defaultdict(list)
    for number in range(words.rounds):
        for count in words.processes:
            spun[count].append(spinning(count))
        for name, count, checkout in sides if number % 2 == 0 else sides[::-1]:
            out = place / "out"
            shutil.rmtree(out, ignore_errors=True)
            settings = [
                str(source),
                f"decoding={STEPS[step]}",
                f"inference.data.output_path={out}",
                f"inference.output.formats=[{words.format}]",
                f"inference.voxel_size_nm={VOXEL_SIZE}",
                f"system.memory_budget_gb={words.budget}",
            ]
            seconds, said = decoded(count, checkout, settings)
            times[name].append(seconds)
            told[name].append(said)
            digests.add(digest(out) if words.format != "h5" else "")
            shutil.rmtree(out)
    result: dict[str, Any] = {"step": step, "format": words.format, "equal": len(digests) == 1}
    for name in times:
        result[name] = summary = summarised(times[name], times["1"], told[name], told["1"])
        print(f"{step}, {words.format}, {name} process(es): {json.dumps(summary)}", flush=True)
    for count in words.processes:
        ratio = statistics.median(a / b for a, b in zip(spun[count], spun[words.processes[0]], strict=True))
        print(f"{step}: {count} process(es) that only count get x{ratio:.2f} of the first side here", flush=True)
    started = statistics.median(each["started"] for said in told["1"] for each in said)
    print(f"{step}: to start takes {started:.1f} s, not counted; bytes equal: {len(digests) == 1}", flush=True)
    return result


def path(said: list[dict[str, Any]]) -> float:
    """Processor seconds of the steps that follow each other: of each stage its busiest process, and all done alone."""
    stages = {name for each in said for name in each["cpu"] if name not in OTHERS and "final." not in name}
    busiest = sum(max(each["cpu"].get(stage, 0.0) for each in said) for stage in stages)
    return float(busiest + sum(each["cpu"].get("alone, steps", 0.0) for each in said))


def summarised(
    seconds: list[dict[str, float]],
    one: list[dict[str, float]],
    told: list[list[dict[str, Any]]],
    told_one: list[list[dict[str, Any]]],
) -> dict[str, Any]:
    """Medians over the rounds of one side: seconds, speed against one process, shares of processor time."""
    parts = [shares(said) for said in told]
    result: dict[str, Any] = {}
    for kind in ("whole", "steps"):
        result[f"{kind}_s"] = round(statistics.median(each[kind] for each in seconds), 2)
        result[f"{kind}_speed"] = round(
            statistics.median(a[kind] / b[kind] for a, b in zip(one, seconds, strict=True)), 2
        )
    result["cpu_s"] = round(statistics.median(sum(each["cpu"]["all"] for each in said) for said in told), 2)
    result["steps_path_speed"] = round(
        statistics.median(path(a) / path(b) for a, b in zip(told_one, told, strict=True)), 2
    )
    alone = statistics.median(part["alone, steps"] / part["steps"] for part in parts)
    result["alone_of_steps"] = round(alone, 4)
    result["share_of_cpu"] = {
        name: round(statistics.median(part[name] for part in parts), 3) for name in parts[0] if name != "all"
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=["connected_components"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", nargs=3, type=int, default=[256, 512, 512])
    parser.add_argument("--every", type=int, default=1, help="take each so many-th voxel: smaller, more objects")
    parser.add_argument("--format", default="zarr")
    parser.add_argument("--budget", type=float, default=4.0, help="memory_budget_gb")
    parser.add_argument("--before", type=Path, help="another checkout, measured in the same rounds")
    parser.add_argument("--folder", type=Path, help="where everything goes; default: the temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures here")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=words.folder) as name:
        place = Path(name)
        labels_of(tuple(words.shape), words.every, place / "labels.npy")
        results = [measured(step, place / "labels.npy", place, words) for step in words.steps]
    if words.json:
        words.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
