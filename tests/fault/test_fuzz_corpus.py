"""The corpus at the real command: no traceback, no hang, no memory by a header's claim, nothing run, nothing partial.

The corpus is made by code (``corpus_volumes``, ``corpus_stores``, ``corpus_models``, ``corpus_words``); each input is a
valid original with one damage. What can still be decoded may succeed.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import corpus_models
import corpus_stores
import corpus_volumes
import corpus_words
import h5py
import pytest
from corpus_volumes import GOOD, Make
from fork_server import Ended, ForkServer

from connectomics.cli import main

from nnunet_models import make_model
from small_jobs import final_names, finals, infer_words, quick_folder, write_h5

MEMORY_BYTES = 1 << 30
BATCH_S = 120.0
SINGLE_S = 30.0
LONGEST = 900  # characters of a sentence
LIBRARY_TEXT = re.compile(
    r"\b(FAILED_PRECONDITION|INVALID_ARGUMENT|NOT_FOUND|DATA_LOSS|OUT_OF_RANGE|UNIMPLEMENTED|INTERNAL|UNKNOWN|"
    r"RESOURCE_EXHAUSTED|UNAVAILABLE)\b|tensorstore_spec|synchronously|H5[A-Z][a-z]*|\((inflate|filter)|itk::|sitk::|"
    r"Exception thrown|rsciio|wkw::|source_location"
)
"""What TensorStore, HDF5, ITK and others write, and no message of ours may contain."""
CANARY = "canary"

GROUPS: dict[str, dict[str, Make]] = {
    "damaged files": corpus_volumes.BLIND,
    "odd metadata": corpus_volumes.ODD | corpus_volumes.GARBLED,
    "chunks and sizes": corpus_volumes.CHUNKS | corpus_volumes.SIZES,
    "stores": corpus_stores.STORES,
}
QUICK_MODELS = tuple(
    name for name in corpus_models.MODELS if not re.fullmatch(r"(plans|dataset|checkpoint|zip|copy \w+) \w+", name)
)
OTHER_MODELS = tuple(name for name in corpus_models.MODELS if name not in QUICK_MODELS)


@dataclass(frozen=True)
class Bench:
    """A folder with a good model in two forms, two good volumes and their undisturbed results."""

    folder: Path
    model: Path
    server: ForkServer
    results: dict[str, bytes]

    @property
    def good(self) -> Path:
        return self.folder / "good"

    @property
    def temporary(self) -> Path:
        return self.folder / "temporary"

    def run(self, words: list[str], limit_s: float) -> Ended:
        ended = self.server.run(words, after_s=limit_s, memory_bytes=MEMORY_BYTES, working_folder=self.folder)
        assert ended.code in (0, 2, 3), (ended.code, ended.stderr[-2000:])
        for text in (ended.stdout, ended.stderr):
            assert "Traceback" not in text, text[-3000:]
            assert "(unexpected;" not in text, text
            assert not re.search("MemoryError|out of memory|[Uu]nable to allocate|bad_alloc", text), text
        left = [path for path in self.folder.rglob("*canary*") if "result" not in path.name]
        assert not left, "code of the input ran, or it was written outside"
        assert list(self.temporary.iterdir()) == []
        return ended


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with quick_folder() as folder, pytest.MonkeyPatch.context() as patch:
        model = make_model(folder / "model", dimensions=2, patch=(16, 16), features=(4, 8))
        assert main(["convert", str(model), str(folder / "copy")]) == 0
        for name in ("good_first", "good_last"):
            write_h5(folder / "good" / f"{name}.h5", GOOD)
        (folder / "temporary").mkdir()
        patch.setenv("TMPDIR", str(folder / "temporary"))
        patch.setattr(tempfile, "tempdir", None)
        with ForkServer(folder) as server:
            assert server.run(infer_words(model, folder / "undisturbed", folder / "good" / "*.h5")).code == 0
            yield Bench(folder, model, server, finals(folder / "undisturbed"))


@pytest.mark.parametrize("group", GROUPS)
def test_volumes(bench: Bench, group: str) -> None:
    folder, output = bench.folder / group, bench.folder / f"{group} out"
    folder.mkdir()
    try:
        made = {name: make(folder) for name, make in GROUPS[group].items()}
        volumes = [bench.good / "good_first.h5", *made.values(), bench.good / "good_last.h5"]
        (folder / "volumes.txt").write_text("\n".join(map(str, volumes)))
        words = infer_words(bench.model, output, "x", f"inference.volume_mode.file_list='{folder}/volumes.txt'")
        ended = bench.run([word for word in words if "file_pattern" not in word], BATCH_S)
        reasons = dict(re.findall(r"^  failed: (.*?): (.*)$", ended.stdout, re.M))
        done = {name for name, path in made.items() if str(path) not in reasons}
        assert [reason for reason in reasons.values() if len(reason) > LONGEST or not reason.isprintable()] == []
        assert [reason for reason in reasons.values() if LIBRARY_TEXT.search(reason)] == []
        assert set(reasons) == {str(path) for name, path in made.items() if name not in done}
        assert final_names(output) == {f"{name}_labels.h5" for name in (*done, "good_first", "good_last")}
        assert not list(output.glob(".*"))
        results = finals(output)
        assert {name: results[name] for name in bench.results} == bench.results
        for name in done:
            with h5py.File(output / f"{name}_labels.h5") as file:
                assert file["main"].ndim == 3
                assert file["main"][:].max() <= 1
        assert len(done) < len(made) / 2, "the corpus hardly damages anything"
    finally:
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(folder)


def _refused_or_done(bench: Bench, words: list[str], output: Path) -> None:
    before = _names(bench.folder)
    ended = bench.run(words, SINGLE_S)
    if ended.code == 0:
        assert final_names(output) == {"good_first_labels.h5"}
    else:
        (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert len(line) < LONGEST
        assert line.isprintable()
        assert not output.exists()
    shutil.rmtree(output, ignore_errors=True)
    assert _names(bench.folder) == before


def _names(folder: Path) -> set[str]:
    return {f"{root}/{name}" for root, folders, files in os.walk(folder) for name in (*folders, *files)}


@pytest.mark.parametrize("name", [*QUICK_MODELS, *(pytest.param(n, marks=pytest.mark.long) for n in OTHER_MODELS)])
def test_models(bench: Bench, name: str) -> None:
    start, damage = corpus_models.MODELS[name]
    place = bench.folder / "damaged"
    root = shutil.copytree(bench.model if start == "folder" else bench.folder / "copy", place / bench.model.name)
    try:
        path = damage(root, place / CANARY)
        output = bench.folder / "result"
        _refused_or_done(bench, infer_words(path, output, bench.good / "good_first.h5"), output)
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("name", corpus_words.YAML)
def test_configurations(bench: Bench, name: str) -> None:
    path, output = bench.folder / "configuration.yaml", bench.folder / "result"
    path.write_bytes(corpus_words.YAML[name]())
    words = infer_words(bench.model, output, bench.good / "good_first.h5")
    _refused_or_done(bench, [*words, "--config", str(path)], output)


@pytest.mark.parametrize("name", corpus_words.WORDS)
def test_words(bench: Bench, name: str) -> None:
    output = bench.folder / "result"
    words = infer_words(bench.model, output, bench.good / "good_first.h5")
    _refused_or_done(bench, [*words, corpus_words.WORDS[name]], output)


def test_the_corpus_is_large_enough() -> None:
    always = [*(name for group in GROUPS.values() for name in group), *QUICK_MODELS, *corpus_words.YAML]
    assert len(set(always)) >= 200
    assert len(QUICK_MODELS) >= 60
