"""Hypothesis against the parsers: whatever a header or a JSON text says, the answer is a value or one of our errors.

Formats that native libraries parse are read in a child process, so that a crash there is seen and named.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import corpus_volumes
import corpus_words
import pytest
from corpus_volumes import FOLDERS, original
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import STRANGE, blind, paths_in, replaced
from volume_looker import look_at, look_from_outside

from connectomics.config.load import load_config
from connectomics.core.errors import ConnectomicsError
from connectomics.models.checkpoint import read_spec

from nnunet_models import make_model
from small_jobs import quick_folder

QUICK, LONG = 30, 2000
BATCH = 400
NUMBERS = (1, 2, 3, 2**20, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, -(2**62), -(2**63))
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
        look_at(str(path))

    both(check, {"changes": writes, "end": st.just(len(content)) | st.integers(0, len(content))})(examples)


@pytest.mark.parametrize("kind", [(kind, which) for kind, (_, _, files) in FOLDERS.items() for which in files], ids=str)
def test_metadata(place: Path, kind: tuple[str, str]) -> None:
    suffix, write, files = FOLDERS[kind[0]]
    root = write(place / f"{kind[0]}_{kind[1]}.{suffix}")
    target = root / files[kind[1]]
    value = json.loads(target.read_bytes())

    def check(path: tuple[Any, ...], new: Any) -> None:
        target.write_text(json.dumps(replaced(value, path, new)))
        look_at(str(root))

    both(check, {"path": st.sampled_from(list(paths_in(value))), "new": JSON_VALUES})(QUICK)


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
    pieces = st.sampled_from(
        ["\n", "  ", ": ", "- ", "{", "}", "[", "]", "&a ", "*a", "!!int ", "<<: ", "${", "|", "?"]
    )
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
        look_from_outside(paths)
        shutil.rmtree(folder)


@pytest.mark.long
@pytest.mark.parametrize("kind", FOLDERS)
def test_native_stores(place: Path, kind: str) -> None:
    """Every value of the metadata replaced by everything strange, and damaged chunks."""
    folder = place / f"{kind}_all"
    folder.mkdir()
    made = [corpus_volumes.chunk_in(f"chunk_{seed}", kind, blind(seed + 1000))(folder) for seed in range(200)]
    for which, inner in FOLDERS[kind][2].items():
        good = json.loads((corpus_volumes.folder_of(f"good_{which}", kind, str)(folder) / inner).read_bytes())
        texts = [json.dumps(replaced(good, path, new)) for path in paths_in(good) for new in (*STRANGE, *NUMBERS)]
        for i, text in enumerate(texts):
            change = functools.partial(_put, text.encode())
            made.append(corpus_volumes.json_in(f"{which}_{i}", kind, which, change)(folder))
    for first in range(0, len(made), BATCH):
        look_from_outside(made[first : first + BATCH])
    shutil.rmtree(folder)


def _put(text: bytes, found: bytes) -> bytes:
    return text
