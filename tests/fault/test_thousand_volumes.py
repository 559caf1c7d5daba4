"""Many small volumes in one call, five of them broken: the others done, 5 named, memory flat, a rerun that skips."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from fork_server import ForkServer
from PIL import Image

from nnunet_models import make_model
from small_jobs import em_like, infer_words, write_png

SHAPE = (32, 48)
BROKEN = (  # what is said of them, in the order of the volumes
    "0 bytes",
    "{}.png",  # cut short
    "{}.png",  # text
    "has 3 channels, the model expects 1",
    "a symbolic link",
)


def write_volumes(folder: Path, count: int) -> list[str]:
    """Equal volumes, and five that are not; the names of those."""
    names = [f"v{i:04}" for i in range(count)]
    whole = write_png(folder / "v0000.png", SHAPE).read_bytes()
    for name in names:
        (folder / f"{name}.png").write_bytes(whole)
    broken = [names[i] for i in (3, count // 4, count // 2, 3 * count // 4, count - 1)]
    empty, cut, text, colours, link = (folder / f"{name}.png" for name in broken)
    empty.write_bytes(b"")
    cut.write_bytes(whole[: len(whole) // 2])
    text.write_text("not an image")
    image = em_like(SHAPE)
    Image.fromarray(np.stack([image, 255 - image, image], -1)).save(colours)
    link.unlink()
    link.symlink_to(folder / "nowhere.png")
    return broken


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


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.long)])
def test_many_volumes_in_one_call(folder: Path, count: int) -> None:
    broken = write_volumes(folder / "data", count)
    model = make_model(folder / "model", dimensions=2, patch=SHAPE, features=(4, 8))
    output, good = folder / "out", count - len(BROKEN)
    words = infer_words(model, output, folder / "data" / "*.png", "inference.test_time_augmentation.enabled=false")

    code, out, err, samples = run(words, output)
    assert code == 3
    assert f"Skipped 0/{count} finished, processing {count}" in err
    assert re.search(rf"done +{good}\nskipped +0\nfailed +5\n", out)
    failures = re.findall(r"failed: (\S+?): (.*)", out)
    assert [Path(name).stem for name, _ in failures] == broken
    for (_, reason), name, words_of_it in zip(failures, broken, BROKEN, strict=True):
        assert words_of_it.format(name) in reason
    assert err.count("failed:") == 5
    assert "Traceback" not in err
    assert len([path for path in output.iterdir() if path.suffix == ".h5"]) == good

    settled = min(count // 3, 200)  # volumes after which every cache and allocator has its size
    resident = [bytes_ for done, bytes_ in samples if done >= settled and bytes_]
    growth = resident[-2] - resident[0]
    assert growth < max(20 << 20, 0.05 * resident[0]), f"{resident[0] >> 20} MiB grew by {growth >> 20} MiB"

    with ForkServer(folder) as server:
        again = server.run(words)
    assert again.code == 3
    assert f"Skipped {good}/{count} finished, processing 5" in again.stderr
    assert re.search(rf"done +0\nskipped +{good}\nfailed +5\n", again.stdout)
