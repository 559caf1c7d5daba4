"""A thousand small volumes in one call, five of them broken: 995 done, 5 named, memory flat, and a rerun that skips."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from nnunet_models import make_model
from small_jobs import em_like, infer_words, quick_folder, write_png

SHAPE = (32, 48)
SETTLED = 200  # volumes after which every cache and allocator has its size
BROKEN = {
    "v0003": "0 bytes",
    "v0250": "v0250.png",  # cut short
    "v0500": "v0500.png",  # text
    "v0750": "has 3 channels, the model expects 1",
    "v0999": "a symbolic link",
}


def write_volumes(folder: Path) -> None:
    whole = write_png(folder / "v0000.png", SHAPE).read_bytes()
    for i in range(1, 1000):
        (folder / f"v{i:04}.png").write_bytes(whole)
    (folder / "v0003.png").write_bytes(b"")
    (folder / "v0250.png").write_bytes(whole[: len(whole) // 2])
    (folder / "v0500.png").write_text("not an image")
    Image.fromarray(np.stack([em_like(SHAPE)] * 3, -1)).save(folder / "v0750.png")
    (folder / "v0999.png").unlink()
    (folder / "v0999.png").symlink_to(folder / "nowhere.png")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with quick_folder() as folder:
        write_volumes(folder / "data")
        yield folder


def run(words: list[str], output: Path) -> tuple[int, str, str, list[tuple[int, int]]]:
    """Exit code, stdout, stderr, and (volumes finished, resident bytes) over time."""
    logs = [output.parent / "stdout", output.parent / "stderr"]
    samples = []
    with logs[0].open("w") as out, logs[1].open("w") as err:
        command = [sys.executable, "-m", "connectomics.cli", *words]
        with subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                resident = watched.memory_info().rss
                count = sum(path.suffix == ".h5" for path in output.iterdir()) if output.exists() else 0
                samples.append((count, resident))
                time.sleep(0.05)
    return process.returncode, logs[0].read_text(), logs[1].read_text(), samples


def test_a_thousand_volumes(place: Path) -> None:
    model = make_model(place / "model", dimensions=2, patch=SHAPE, features=(4, 8))
    output = place / "out"
    words = infer_words(model, output, place / "data" / "*.png", "inference.test_time_augmentation.enabled=false")

    code, out, err, samples = run(words, output)
    assert code == 3
    assert "Skipped 0/1000 finished, processing 1000" in err
    assert re.search(r"done +995\nskipped +0\nfailed +5\n", out)
    failures = re.findall(r"failed: (\S+?): (.*)", out)
    assert [Path(name).stem for name, _ in failures] == list(BROKEN)
    for (_, reason), words_of_it in zip(failures, BROKEN.values(), strict=True):
        assert words_of_it in reason
    assert err.count("failed:") == 5
    assert "Traceback" not in err
    assert len([path for path in output.iterdir() if path.suffix == ".h5"]) == 995

    resident = [bytes_ for count, bytes_ in samples if count >= SETTLED and bytes_]
    growth = resident[-2] - resident[0]
    assert growth < max(20 << 20, 0.05 * resident[0]), f"{resident[0] >> 20} MiB grew by {growth >> 20} MiB"

    code, out, err, _ = run(words, output)
    assert code == 3
    assert "Skipped 995/1000 finished, processing 5" in err
    assert re.search(r"done +0\nskipped +995\nfailed +5\n", out)
