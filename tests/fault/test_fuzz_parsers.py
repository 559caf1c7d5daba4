"""Hypothesis against the parsers: whatever a header or a JSON text says, the answer is a value or one of our errors.

Formats that native libraries parse are read in a child process, so that a crash there is seen and named.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import corpus_volumes
import corpus_words
import pytest
from corpus_volumes import FOLDERS, original
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import STRANGE, blind, odd_json, paths_in, replaced

from connectomics.config.load import load_config
from connectomics.errors import ConnectomicsError
from connectomics.geometry import Box
from connectomics.io.opening import open_volume
from connectomics.models.checkpoint import read_spec

from nnunet_models import make_model
from small_jobs import quick_folder

QUICK, LONG = 30, 2000
MEMORY_BYTES = 1 << 30
LOOK_S = 120
JSON_VALUES = st.recursive(
    st.sampled_from(STRANGE) | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PARSED_HERE = ("nii", "nii2", "niigz", "mrc", "npy")
NATIVE = tuple(kind for kind in corpus_volumes.FILES if kind not in PARSED_HERE)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


def looked_at(uri: str) -> None:
    """Open a volume and read its corners, as long as it is no giant; only our errors may come."""
    try:
        reader = open_volume(uri)
    except ConnectomicsError as error:
        assert len(str(error)) < 2000
        return
    try:
        assert reader.identity
        last = tuple(n - 1 for n in reader.info.extent)
        reader.read(Box((0, 0, 0), (1, 1, 1)))
        reader.read(Box((last[0], last[1], last[2]), reader.info.extent))
    except ConnectomicsError as error:
        assert len(str(error)) < 2000
    finally:
        reader.close()


def both(test: Callable[..., None], strategy: dict[str, st.SearchStrategy[Any]]) -> Callable[[int], None]:
    """A run of a property with a number of examples, the same ones each time."""

    def run(examples: int) -> None:
        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        bounded = settings(
            max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks
        )
        bounded(given(**strategy)(test))()

    return run


EXAMPLES = [pytest.param(QUICK, id="quick"), pytest.param(LONG, id="long", marks=pytest.mark.long)]


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("kind", PARSED_HERE)
def test_headers(place: Path, kind: str, examples: int) -> None:
    content = original(kind)
    path = place / f"header.{corpus_volumes.FILES[kind][0]}"
    writes = st.lists(st.tuples(st.integers(0, min(len(content), 600)), st.binary(min_size=1, max_size=8)), max_size=6)

    def check(changes: list[tuple[int, bytes]], end: int) -> None:
        data = bytearray(content)
        for at, value in changes:
            data[at : at + len(value)] = value
        path.write_bytes(bytes(data[:end]))
        looked_at(str(path))

    both(check, {"changes": writes, "end": st.just(len(content)) | st.integers(0, len(content))})(examples)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("kind", [(kind, which) for kind, (_, _, files) in FOLDERS.items() for which in files], ids=str)
def test_metadata(place: Path, kind: tuple[str, str], examples: int) -> None:
    suffix, write, files = FOLDERS[kind[0]]
    root = write(place / f"{kind[0]}_{kind[1]}_{examples}.{suffix}")
    target = root / files[kind[1]]
    value = json.loads(target.read_bytes())

    def check(path: tuple[Any, ...], new: Any) -> None:
        target.write_text(json.dumps(replaced(value, path, new)))
        looked_at(str(root))

    both(check, {"path": st.sampled_from(list(paths_in(value))), "new": JSON_VALUES})(examples)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_model_json(place: Path, name: str, examples: int) -> None:
    folder = place / f"{name}_{examples}"
    root = make_model(folder, dimensions=2, patch=(16, 16), features=(4, 8))
    value = json.loads((root / name).read_text())

    def check(path: tuple[Any, ...], new: Any) -> None:
        (root / name).write_text(json.dumps(replaced(value, path, new)))
        try:
            read_spec(root)
        except ConnectomicsError as error:
            assert len(str(error)) < 2000

    both(check, {"path": st.sampled_from(list(paths_in(value))), "new": JSON_VALUES})(examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_yaml(place: Path, examples: int) -> None:
    path = place / "fuzz.yaml"
    pieces = st.sampled_from(["\n", "  ", ": ", "- ", "{", "}", "[", "]", "&a ", "*a", "!!int ", "<<: ", "${", "|", "?"])
    inserted = st.lists(st.tuples(st.integers(0, len(corpus_words.GOOD)), pieces | st.text(max_size=4)), max_size=5)

    def check(changes: list[tuple[int, str]]) -> None:
        text = corpus_words.GOOD
        for at, piece in changes:
            text = text[:at] + piece + text[at:]
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            load_config(path)
        except ConnectomicsError as error:
            assert len(str(error)) < 2000

    both(check, {"changes": inserted})(examples)


def in_a_child(paths: list[Path]) -> None:
    """Look at volumes in a forked child with little memory and time; it must end well."""
    note = Path(tempfile.mkstemp()[1])
    child = os.fork()
    if child == 0:  # pragma: no cover - its lines are not counted
        code = 1
        try:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, held + MEMORY_BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (LOOK_S, LOOK_S))
            for path in paths:
                note.write_text(str(path))
                looked_at(str(path))
            code = 0
        except BaseException as error:  # noqa: BLE001 - said to the parent
            note.write_text(f"{note.read_text()}: {error!r}")
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    text = note.read_text()
    note.unlink()
    assert os.waitstatus_to_exitcode(status) == 0, f"ended with {os.waitstatus_to_exitcode(status)} at {text}"


@pytest.mark.long
@pytest.mark.parametrize("kind", NATIVE)
def test_native_libraries(place: Path, kind: str) -> None:
    for first in range(0, 600, 100):
        folder = place / f"{kind}_{first}"
        folder.mkdir()
        suffix = corpus_volumes.FILES[kind][0]
        paths = [folder / f"{seed}.{suffix}" for seed in range(first, first + 100)]
        for seed, path in enumerate(paths, first):
            path.write_bytes(blind(seed + 1000)(original(kind)))
        in_a_child(paths)
        shutil.rmtree(folder)


@pytest.mark.long
@pytest.mark.parametrize("kind", FOLDERS)
def test_native_stores(place: Path, kind: str) -> None:
    for first in range(0, 300, 50):
        folder = place / f"{kind}_{first}"
        folder.mkdir()
        made = []
        for seed in range(first, first + 50):
            name = f"{kind}_{seed}"
            which = list(FOLDERS[kind][2])[seed % len(FOLDERS[kind][2])]
            odd = functools.partial(_odd, seed + 1000)
            made.append(corpus_volumes.json_in(name, kind, which, odd)(folder))
            made.append(corpus_volumes.chunk_in(f"{name}_chunk", kind, blind(seed + 1000))(folder))
        in_a_child(made)
        shutil.rmtree(folder)


def _odd(seed: int, text: bytes) -> bytes:
    return odd_json(seed, json.loads(text))
