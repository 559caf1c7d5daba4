"""Real disks that refuse: a small one that fills up, one that becomes read-only, one that is forbidden, one that goes.

The disks are mounted for the test, which needs the right to do so; nothing is lost, and after the mend the same command
gives the undisturbed bytes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from fork_server import Ended, ForkServer

from nnunet_models import make_model
from small_jobs import em_like, final_names, finals, infer_words, ledger_lines, quick_folder, write_h5

BLOCKS = 12
SETTINGS = (
    "inference.block_shape=[1,48,64]",
    "inference.output.formats=[h5,zarr,tiff]",
    "inference.test_time_augmentation.enabled=false",
    "inference.output.save_probabilities=true",
    "inference.postprocessing.binary.enabled=true",
    "inference.postprocessing.binary.remove_small_objects=6",
)


def mounted(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0


@dataclass(frozen=True)
class Bench:
    """A server, a job, its undisturbed result, and how many bytes it takes at each stage."""

    server: ForkServer
    folder: Path
    model: Path
    volume: Path
    reference: dict[str, bytes]
    disk: Path

    def run(self, output: Path, *more: str) -> Ended:
        return self.server.run(infer_words(self.model, output, self.volume, *SETTINGS, *more))


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[ForkServer, Path, Path, Path, dict[str, bytes]]]:
    with quick_folder() as folder:
        model = make_model(folder / "model", dimensions=2, patch=(16, 16), features=(4, 8))
        volume = write_h5(folder / "v.h5", em_like((3, 96, 128)))
        with ForkServer(folder) as running:
            ended = running.run(infer_words(model, folder / "undisturbed", volume, *SETTINGS))
            assert ended.code == 0, ended.stderr
            yield running, folder, model, volume, finals(folder / "undisturbed")


@pytest.fixture
def bench(server: tuple[ForkServer, Path, Path, Path, dict[str, bytes]], tmp_path: Path) -> Iterator[Bench]:
    running, folder, model, volume, reference = server
    disk = folder / "disk"
    disk.mkdir()
    if not mounted("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)):
        disk.rmdir()
        pytest.skip("this user may not mount a small disk")
    yield Bench(running, folder, model, volume, reference, disk)
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
    disk.rmdir()


def require_clear(ended: Ended, *words: str) -> None:
    """The volume failed with one sentence that names the cause and what to do."""
    assert ended.code == 3, ended.stdout + ended.stderr
    assert any(word in ended.stdout for word in words), ended.stdout
    assert "run again" in ended.stdout or "rerun" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr


def require_mended(bench: Bench, output: Path, *, lost: int = 0) -> None:
    """Running again gives the undisturbed bytes; finished blocks are not done again, but for a few that were lost."""
    recorded = len(ledger_lines(output / "v_labels.run"))
    for name, content in finals(output).items():
        assert bench.reference[name] == content, f"{name} stands under its final name and is not whole"
    ended = bench.run(output)
    assert ended.code == 0, ended.stdout + ended.stderr
    assert finals(output) == bench.reference
    assert len(ledger_lines(output / "v_labels.run")) == BLOCKS
    log = (output / "v_labels.run" / "run.log").read_text()
    skipped = int(re.findall(rf"predict: {BLOCKS} blocks planned, (\d+) finished before", log)[-1])
    assert recorded - lost <= skipped <= recorded


@pytest.mark.parametrize("kilobytes", [8, 60, *(pytest.param(some, marks=pytest.mark.long) for some in (30, 220, 420))])
def test_a_disk_that_fills_up(bench: Bench, kilobytes: int) -> None:
    """With so much room left the disk is full in the ledger's folder, in the blocks, in a filter or in an export."""
    output = bench.disk / "out"
    output.mkdir()
    filler = bench.disk / "filler"
    free = shutil.disk_usage(bench.disk).free
    with filler.open("wb") as stream:
        stream.write(bytes(free - kilobytes * 1024))
    ended = bench.run(output)
    require_clear(ended, "No space left on device", "free the disk", "Free disk space")
    filler.unlink()
    require_mended(bench, output)


@pytest.mark.parametrize(
    "kilobytes", [500, *(pytest.param(some, marks=pytest.mark.long) for some in range(50, 700, 100))]
)
def test_a_disk_that_fills_up_while_objects_are_joined(bench: Bench, kilobytes: int) -> None:
    """Tables of objects are mapped: a page for which there was no room killed the process."""
    noise = np.random.default_rng(0).random((8, 48, 64)) > 0.7
    volume, output, filler = bench.folder / "noise.h5", bench.disk / "out", bench.disk / "filler"
    if not volume.exists():
        write_h5(volume, noise.astype(np.uint8))

    def words(output: Path) -> list[str]:
        settings = ("decoding=[{name: connected_components, connectivity: 6}]", "inference.block_shape=[4,48,64]")
        return ["decode", str(volume), *settings, f"inference.data.output_path='{output}'"]

    reference = bench.folder / "objects"
    if not reference.exists():
        assert bench.server.run(words(reference)).code == 0
    output.mkdir()
    with filler.open("wb") as stream:
        stream.write(bytes(shutil.disk_usage(bench.disk).free - kilobytes * 1024))
    require_clear(bench.server.run(words(output)), "No space left on device")
    filler.unlink()
    assert bench.server.run(words(output)).code == 0
    assert finals(output) == finals(reference)


def when(condition: Callable[[], bool], action: Callable[[], object]) -> threading.Thread:
    """Do something as soon as a condition holds; ends after a minute in any case."""

    def watch() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.002)
        action()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_store_that_becomes_read_only_in_the_middle(bench: Bench) -> None:
    """The folder of the blocks is mounted again read-only over itself, as a kernel does when a disk errs."""
    output = bench.disk / "out"
    run, frozen = output / "v_labels.run", []

    def freeze() -> None:
        (store,) = run.glob("*/labels.zarr")
        frozen.append(str(store))
        assert mounted("--bind", str(store), str(store))
        assert mounted("-o", "remount,bind,ro", str(store))

    thread = when(lambda: len(ledger_lines(run)) >= 3, freeze)
    ended = bench.run(output)
    thread.join()
    subprocess.run(["umount", "--lazy", *frozen], check=True)
    require_clear(ended, "Read-only file system")
    assert 3 <= len(ledger_lines(run)) < BLOCKS
    require_mended(bench, output)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take rights away from others")
@pytest.mark.parametrize(
    "forbidden",
    ["ledger", *(pytest.param(name, marks=pytest.mark.long) for name in ("labels.zarr/0/c", "coordination"))],
)
def test_a_folder_that_may_not_be_written_to(bench: Bench, forbidden: str) -> None:
    """As another user, who may write to the output and not to one of the run's folders."""
    output = bench.disk / "out"
    output.mkdir(mode=0o777)
    output.chmod(0o777)
    words = infer_words(bench.model, output, bench.volume, *SETTINGS)
    shared = bench.server.run(words, watched=output, kill_at=(".zarr/0/c/", 7), unprivileged=True)
    assert shared.code < 0, shared.stderr
    (work,) = (path.parent for path in (output / "v_labels.run").glob("*/ledger"))
    folder = work / forbidden
    owner, mode = folder.stat().st_uid, folder.stat().st_mode
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            os.chown(path, 0, 0)
            path.chmod(0o555)
    ended = bench.server.run(words, unprivileged=True)
    require_clear(ended, "ermission denied")
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            os.chown(path, owner, owner)
            path.chmod(mode & 0o777)
    recorded = len(ledger_lines(output / "v_labels.run"))
    assert recorded >= 3
    require_mended(bench, output)


def test_a_disk_that_goes_away_and_comes_back(bench: Bench) -> None:
    """The output's folder is unmounted in the middle; what is written into the empty mount point does no harm.

    The ledger's file is open and still reaches the disk; last lines whose blocks went elsewhere are found out: of the
    block that was computed meanwhile, and of the one before, which was being written.
    """
    inner = bench.disk / "mount"
    inner.mkdir()
    image = bench.folder / "kept"
    image.mkdir(exist_ok=True)
    assert mounted("--bind", str(image), str(inner))
    output = inner / "out"
    thread = when(
        lambda: len(ledger_lines(output / "v_labels.run")) >= 3,
        lambda: subprocess.run(["umount", "--lazy", str(inner)], check=True),
    )
    ended = bench.run(output)
    thread.join()
    assert ended.code == 3, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert (
        "removed or unmounted" in ended.stdout
        or "No such file or directory" in ended.stdout
        or "quarantined" in ended.stdout
    ), ended.stdout
    assert not final_names(output)
    shutil.rmtree(output, ignore_errors=True)
    assert mounted("--bind", str(image), str(inner))
    try:
        require_mended(bench, output, lost=2)
    finally:
        subprocess.run(["umount", "--lazy", str(inner)], check=True)
        shutil.rmtree(image)


def test_other_volumes_are_not_begun_on_a_full_disk(bench: Bench) -> None:
    output = bench.disk / "out"
    output.mkdir()
    for name in ("w", "x"):
        shutil.copy(bench.volume, bench.disk / f"{name}.h5")
    with (bench.disk / "filler").open("wb") as stream:
        stream.write(bytes(shutil.disk_usage(bench.disk).free - 60 * 1024))
    words = infer_words(bench.model, output, bench.disk / "?.h5", *SETTINGS)
    ended = bench.server.run(words)
    assert ended.code == 3
    assert ended.stdout.count("No space left on device") == 1, ended.stdout
    assert ended.stdout.count("not begun, because the disk of the results refused") == 1
    (bench.disk / "filler").unlink()
    assert bench.server.run(words).code == 0
    for name in ("w", "x"):
        assert (output / f"{name}_labels.h5").exists()
