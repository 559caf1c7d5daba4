"""A run's memory stays within system.memory_budget_gb; one that is too small is refused with one that works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nnunet_models import make_model
from small_jobs import em_like, infer_words, write_h5

# refused at first, then run with the budget that was named; prints it and the most memory the process ever had
RUN = """
import contextlib, io, re, sys
from pathlib import Path
from connectomics.cli import main
words, said = sys.argv[1:], io.StringIO()
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    assert main([*words, "system.memory_budget_gb=0.01"]) == 3
named = re.search(r"raise system.memory_budget_gb to at least ([0-9.]+)", " ".join(said.getvalue().split())).group(1)
code = main([*words, f"system.memory_budget_gb={named}"])
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
print(code, named, peak * 1024)
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


@pytest.mark.parametrize(
    ("dimensions", "patch", "classes", "extent", "whole"),
    [(2, (256, 256), 40, (1, 1200, 1600), (1, 1536, 2048)), (3, (32, 64, 64), 20, (96, 288, 320), (128, 320, 320))],
    ids=["2D with many classes", "3D"],
)
def test_memory_stays_within_the_smallest_budget_that_a_refusal_names(
    dimensions: int, patch: tuple[int, ...], classes: int, extent: tuple[int, int, int], whole: object, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", dimensions=dimensions, classes=classes, patch=patch, seed=2)
    volume = write_h5(tmp_path / "v.h5", em_like(extent))
    words = infer_words(
        model,
        tmp_path / "out",
        volume,
        "inference.sliding_window.overlap=0",
        "inference.output.save_probabilities=true",
        "inference.output.formats=[zarr]",
    )
    ended = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    code, named, peak = ended.stdout.splitlines()[-1].split()
    assert code == "0", ended.stdout + ended.stderr
    assert int(peak) <= float(named) * 1e9
    outputs = np.prod(extent) * (1 + 4 * classes)
    provenance = json.loads((tmp_path / "out" / "v_labels.run" / "report.json").read_text())
    assert provenance["planned"] > 1, f"outputs of {outputs} bytes in one block"
