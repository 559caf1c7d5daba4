"""What a small volume costs beside the network: many 64 x 64 PNGs to HDF5, in this checkout and in an earlier one.

Each run is a process of its own: ``connectomics infer-volume`` over all images, with a clock around forward passes and
one around the volumes, so that starting and loading the model do not count. With ``--against CHECKOUT`` (a ``git
worktree`` of the version to compare with) the two take turns, and the medians of their time beside the network are
compared, round by round. Before that each version makes a few volumes with a library preloaded that counts calls of
fsync, also those of TensorStore and HDF5. The results of both must be equal, byte for byte. Exits with 1 where a volume
takes more flushes than ``--flushes``, or this checkout more than ``--most`` of the other's time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
COUNTED = 40  # volumes of which the flushes are counted; and as many again, so that those of a whole call drop out
FIGURES = ("clock", "cpu")


def child(words: Sequence[str], figures: Path) -> int:
    """Run the command with clocks around forward passes and around all volumes; write what they say."""
    from connectomics.assembly.engine import rules
    from connectomics.cli import main as command
    from connectomics.lightning import inference

    spent = dict.fromkeys(("network_clock", "network_cpu", "clock", "cpu", "flushes"), 0.0)
    counter = ctypes.CDLL(None) if "small_volumes_counted" in os.environ else None

    class Clocked:
        def __init__(self, backend: Any) -> None:
            self._backend = backend
            self.device, self.numeric_class, self.close = backend.device, backend.numeric_class, backend.close

        def forward(self, batch: Any) -> Any:
            clock, cpu = time.perf_counter(), time.process_time()
            logits = self._backend.forward(batch)
            spent["network_clock"] += time.perf_counter() - clock
            spent["network_cpu"] += time.process_time() - cpu
            return logits

    predictor, run = rules.RollingPredictor, inference.VolumeProcessor.run

    def clocked(folds: Any, *rest: Any) -> Any:
        return predictor(tuple(Clocked(backend) for backend in folds), *rest)

    def volumes(*arguments: Any, **named: Any) -> Any:
        if counter is not None:
            counter.storm_stop(b"fsync", b"", -1)
        clock, cpu = time.perf_counter(), time.process_time()
        try:
            return run(*arguments, **named)
        finally:
            spent["clock"] = time.perf_counter() - clock - spent["network_clock"]
            spent["cpu"] = time.process_time() - cpu - spent["network_cpu"]
            spent["flushes"] = 0 if counter is None else counter.storm_count()

    rules.RollingPredictor, inference.VolumeProcessor.run = clocked, volumes  # type: ignore[misc, assignment, method-assign]
    code = command(words)
    figures.write_text(json.dumps(spent))
    return code


def measured(checkout: Path, place: Path, count: int, output: Path, stated: Mapping[str, str]) -> dict[str, float]:
    """One run over so many volumes; seconds beside the network in all, flushes in all."""
    shutil.rmtree(output, ignore_errors=True)
    figures = place / "figures.json"

    names = ", ".join(f"'{place}/data/{number:04}.png'" for number in range(count))

    command = [sys.executable, __file__, "--child", str(figures), "infer-volume", "--checkpoint", str(place / "model")]
    command += [f"inference.volume_mode.file_list=[{names}]", f"inference.data.output_path={output}"]
    command += ["system.device=cpu", "system.num_cpus=1", "inference.test_time_augmentation.enabled=false"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)} | stated
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=place)
    if done.returncode:
        raise SystemExit(f"the command ended with {done.returncode} in {checkout}:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(figures.read_text())
    return found


def flushes_a_volume(checkout: Path, place: Path, library: Path) -> float:
    """How many calls of fsync a further volume of the same call takes."""
    stated = {"LD_PRELOAD": str(library), "small_volumes_counted": "1"}
    few, more = (
        measured(checkout, place, count, place / "counted", stated)["flushes"] for count in (COUNTED, 2 * COUNTED)
    )
    return (more - few) / COUNTED


def results(output: Path) -> dict[str, bytes]:
    """The final outputs."""
    return {path.name: path.read_bytes() for path in output.glob("*.h5")}


def make_inputs(place: Path, count: int) -> None:
    """A tiny model and so many images."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from nnunet_models import make_model
    from small_jobs import write_png

    make_model(place / "model", dimensions=2, patch=(64, 64), features=(4, 8))
    for number in range(count):
        write_png(place / "data" / f"{number:04}.png", (64, 64), seed=number)


def main() -> int:
    """Measure, print, write."""
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[3:], Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="volumes of a run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="the version to compare with")
    parser.add_argument("--folder", type=Path, help="where inputs and results lie, on the disk that counts")
    parser.add_argument("--flushes", type=float, help="most flushes a volume that pass")
    parser.add_argument("--most", type=float, help="largest share of the other's time that passes")
    parser.add_argument("--json", type=Path, help="write the figures there")
    words = parser.parse_args()
    versions = {"here": REPOSITORY} | ({} if words.against is None else {"before": words.against.resolve()})
    print(f"{platform.platform()}, Python {platform.python_version()}, {words.count} volumes, one thread")
    with tempfile.TemporaryDirectory(dir=words.folder) as folder:
        place = Path(folder).resolve()
        make_inputs(place, max(words.count, 2 * COUNTED))
        from preloads import compiled

        library = compiled("storm", place)
        flushes = {name: flushes_a_volume(checkout, place, library) for name, checkout in versions.items()}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in versions}
        for number in range(words.rounds):
            for name, checkout in list(versions.items())[:: 1 if number % 2 else -1]:
                runs[name].append(measured(checkout, place, words.count, place / name, {}))
        equal = all(results(place / name) == results(place / "here") for name in versions)
    return told(words, flushes, runs, equal=equal)


def told(
    words: argparse.Namespace, flushes: dict[str, float], runs: dict[str, list[dict[str, float]]], *, equal: bool
) -> int:
    """Print and keep the figures; the exit code."""
    for name, found in runs.items():
        each = {kind: 1e3 * statistics.median(run[kind] for run in found) / words.count for kind in FIGURES}
        print(
            f"{name:7} {flushes[name]:5.1f} flushes a volume; beside the network {each['clock']:6.1f} ms, "
            f"{each['cpu']:6.1f} ms of CPU time"
        )
    ratios: dict[str, list[float]] = {}
    if "before" in runs:
        pairs = list(zip(runs["here"], runs["before"], strict=True))
        ratios = {kind: [here[kind] / before[kind] for here, before in pairs] for kind in FIGURES}
        shares = ", ".join(f"{kind} {statistics.median(each):.2f}" for kind, each in ratios.items())
        print(f"here / before, median of {len(pairs)} rounds: {shares}; results {'equal' if equal else 'DIFFER'}")
    if words.json:
        words.json.write_text(json.dumps({"flushes": flushes, "runs": runs, "ratios": ratios}, indent=1))
    slow = words.most is not None and any(statistics.median(each) > words.most for each in ratios.values())
    return int(slow or not equal or (words.flushes is not None and flushes["here"] > words.flushes))


if __name__ == "__main__":
    sys.exit(main())
