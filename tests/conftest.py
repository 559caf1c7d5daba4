"""Shared fixtures: where the real data are, a folder that is quick to write to, one torch thread for every test."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fork_server
import hypothesis
import pytest

from small_jobs import quick_folder

REPOSITORY = Path(__file__).resolve().parents[1]
hypothesis.settings.register_profile("no clock", deadline=None)  # no test asserts a time: other work may be going on
hypothesis.settings.load_profile("no clock")
SLOW_FIRST = (REPOSITORY / "tests" / "slow_files.txt").read_text().split()
"""Files that take more than a few seconds, the slowest first: so the last ones to be run are short."""


MEMORY, NEEDED_BYTES = Path("/dev/shm"), 4 << 30


def pytest_configure() -> None:
    """Give a test one thread, and temporary folders memory where there is any: runs wait for many fsyncs.

    As in ``small_jobs.quick_folder``; what a killed process leaves does not depend on the disk.
    """
    usable = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= NEEDED_BYTES
    if usable:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
        os.environ.setdefault("TMPDIR", str(MEMORY))
        tempfile.tempdir = None
        tempfile.gettempdir()  # is looked for anew now, not when a test has set TMPDIR to a folder of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many workers as cores: more threads wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow files; a worker takes whole files, so that it makes what their tests share once."""
    place = {name: i for i, name in enumerate(SLOW_FIRST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from what all the modules have made, which it would look at again and again."""
    gc.collect()
    gc.freeze()


def shared_data_folder() -> Path | None:
    """The folder of real EM, trained models and nnU-Net's reference outputs, or None where it is absent."""
    stated = os.environ.get("CONNECTOMICS_SHARED_DATA")
    folder = Path(stated) if stated else REPOSITORY.parent / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled networks of the tests are kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def forked_processes() -> Iterator[None]:
    """The server that some tests start ends with the session."""
    yield
    fork_server.end()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A new folder in memory, where the machine offers that."""
    with quick_folder() as made:
        yield made


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = shared_data_folder()
    if folder is None:
        if os.environ.get("CI") == "true":
            pytest.fail("the shared real data must be present in CI (set CONNECTOMICS_SHARED_DATA)")
        pytest.skip("the shared real data are not on this machine (set CONNECTOMICS_SHARED_DATA to their folder)")
    return folder
