"""Loss of power: after a run that was cut anywhere the same command gives the same bytes, whatever the disk kept."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from fork_server import Ended, ForkServer
from power_loss import (
    FATES,
    Disk,
    Event,
    File,
    Node,
    Symlink,
    published_too_early,
    publishing,
    read_record,
    without_flushing,
)
from preloads import compiled, run_with

from connectomics.assembly.reproduction import reproduce
from connectomics.stages.output.export import read_stamp

from nnunet_models import make_model
from small_jobs import em_like, final_names, finals, infer_words, quick_folder, write_h5, write_png

FORMATS = "inference.output.formats=[h5,tiff,png,zarr,zarr2,n5,precomputed]"
SIZE = "inference.voxel_size_nm=[30,8,8]"
INFER = (SIZE, FORMATS, "inference.block_shape=[1,32,48]", "inference.test_time_augmentation.enabled=false")
DECODE = "decoding=[{name: connected_components, connectivity: 6}, {name: filters, min_voxels: 4, fill_holes: 2d}]"
MORE = {
    "watershed": "decoding=[{name: watershed, seed_distance_nm: 8, max_component_voxels: 4096}]",
    "linking": "decoding=[{name: slice_linking}]",
}
ENDINGS = {".h5": "h5", ".tif": "tiff", "_png": "png", "s.zarr": "zarr", ".v2.zarr": "zarr2", ".n5": "n5"}
ENDINGS |= {".precomputed": "precomputed"}
NEVER_FLUSHED = (".log", ".lease", ".worker")
NOTHING = (0.0, ("old",))
"""What the disk keeps at the worst: no entry and no byte that was not flushed."""
Cut = tuple[int, float, Sequence[str]]
"""After how many operations; share of entries that the disk kept; what may have become of files."""


@dataclass(frozen=True)
class Recorded:
    """A run of the command line.

    Its words without the output folder, what was there before, its file operations, its results, those of before.
    """

    server: ForkServer
    folder: Path
    words: tuple[str, ...]
    start: Disk
    events: list[Event]
    reference: dict[str, bytes]
    before: dict[str, bytes]

    def ended(self, output: Path) -> Ended:
        return self.server.run([*self.words, f"inference.data.output_path='{output}'"])

    def after(self, cut: Cut, seed: int, output: Path) -> str:
        """Make what a loss of power leaves; where and how it came."""
        number, kept, fates = cut
        self.start.after(self.events[:number]).build(output, random.Random(seed), kept=kept, fates=fates)
        return f"after {number} of {len(self.events)} operations, {kept} kept, {list(fates)}, seed {seed}: "

    def failure(self, cut: Cut, seed: int) -> str:
        """Say what is wrong after a loss of power and the same command; nothing where all is well."""
        output = self.folder / "after"
        where = self.after(cut, seed, output)
        left = finals(output)
        lies = [name for name in stamped(output) if of_one(name, left) not in self.whole(name)]
        ended = self.ended(output)
        found = finals(output)
        lies += [f"checksum of {name}" for name in _wrong_checksums(output)] if ended.code == 0 else []
        shutil.rmtree(output)
        wrong = sorted(name for name, content in found.items() if self.reference.get(name) != content)
        absent = sorted(set(self.reference) - set(found))
        if ended.code == 0 and not wrong and not absent and not lies:
            return ""
        told = f"{ended.stdout[-500:]}{ended.stderr[-500:]}"
        return f"{where}told wrongly {lies}, exit code {ended.code}, wrong {wrong}, absent {absent}: {told}"

    def whole(self, name: str) -> list[dict[str, bytes]]:
        """Return the results that may be called so: the one of before, if there was one, and the new one."""
        return [of_one(name, results) for results in (self.before, self.reference)]


@pytest.fixture(scope="module")
def bench() -> Iterator[tuple[Path, ForkServer]]:
    """A folder with a model, volumes, and a server that records what its children do."""
    with quick_folder() as folder:
        library = compiled("power_loss", folder)
        make_model(folder / "model", dimensions=2, patch=(16, 16), features=(4, 8))
        write_h5(folder / "v.h5", em_like((2, 32, 48)))
        for name in "ab":
            write_png(folder / "small" / f"{name}.png", (16, 24), seed=ord(name))
        write_h5(folder / "cells.h5", (em_like((4, 32, 48)) > 150).astype(np.uint8))
        with ForkServer(folder, library) as server:
            yield folder, server


def recorded(bench: tuple[Path, ForkServer], name: str, words: Sequence[str]) -> Recorded:
    """Run a command undisturbed and record it; in its output folder there may be something."""
    folder, server = bench
    output, log = folder / name, folder / f"{name}.record"
    start = Disk(output if output.exists() else None)
    made = Recorded(server, folder, tuple(words), start, [], {}, finals(output))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POWER_LOSS_FOLDER", str(output))
        patch.setenv("POWER_LOSS_LOG", str(log))
        ended = made.ended(output)
    assert ended.code == 0, ended.stdout + ended.stderr
    events = read_record(log, output)
    require_same(start.after(events).top, output)
    return dataclasses.replace(made, events=events, reference=finals(output))


def stamped(output: Path) -> list[str]:
    """Return the final names whose stamps say that they are finished."""
    names = final_names(output) if output.exists() else set()
    forms = ((name, form) for name in names for end, form in ENDINGS.items() if name.endswith(end))
    return [name for name, form in forms if read_stamp(output / name, form) is not None]


def _wrong_checksums(output: Path) -> list[str]:
    """Return the files that are not what the checksums beside them say."""
    lines = [line for record in output.glob("*.run/checksums/*") for line in record.read_text().splitlines()]
    told = [(line[:64], line[66:]) for line in lines]
    whole = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    return [n for told_of, n in told if n not in whole or sha256((output / n).read_bytes()).hexdigest() != told_of]


def of_one(name: str, results: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files of one result."""
    return {file: content for file, content in results.items() if file.partition("/")[0] == name}


def require_same(node: Node, path: Path) -> None:
    """The operations, replayed, give the folder that the run left: none was missed."""
    if isinstance(node, File):
        assert bytes(node.now) == path.read_bytes(), path
    elif not isinstance(node, Symlink):
        assert sorted(node.now) == sorted(entry.name for entry in path.iterdir()), path
        for name, inner in node.now.items():
            require_same(inner, path / name)


def infer(folder: Path, *more: str) -> list[str]:
    words = infer_words(folder / "model", Path("unused"), folder / "v.h5", *INFER, *more)
    return [word for word in words if "output_path" not in word]


def decode(folder: Path, steps: str) -> list[str]:
    given = (SIZE, "inference.block_shape=[2,32,48]", "inference.output.formats=[h5,zarr2,n5]")
    return ["decode", str(folder / "cells.h5"), steps, *given]


@pytest.fixture(scope="module")
def inference(bench: tuple[Path, ForkServer]) -> Recorded:
    return recorded(bench, "inference", infer(bench[0]))


@pytest.fixture(scope="module")
def decoding(bench: tuple[Path, ForkServer]) -> Recorded:
    return recorded(bench, "decoding", decode(bench[0], DECODE))


@pytest.fixture(scope="module")
def small(bench: tuple[Path, ForkServer]) -> Recorded:
    """Volumes of one block, which are made in memory."""
    words = infer_words(bench[0] / "model", Path("unused"), bench[0] / "small" / "*.png", INFER[-1])
    made = recorded(bench, "small_out", [word for word in words if "output_path" not in word])
    assert len(made.reference) == 2 and not any(event.path.endswith(".jsonl") for event in made.events)
    return made


@pytest.fixture(params=["inference", "decoding", "small"])
def run(request: pytest.FixtureRequest) -> Recorded:
    found: Recorded = request.getfixturevalue(request.param)
    return found


def test_nothing_is_published_before_it_is_on_the_disk(run: Recorded) -> None:
    assert published_too_early(run.start, run.events, NEVER_FLUSHED) == []


def test_after_a_loss_of_power_the_same_command_gives_the_same_bytes(run: Recorded) -> None:
    steps = publishing(run.events)
    cuts: list[Cut] = [(step + 1, 0.5, FATES) for step in steps[1 :: len(steps) // 8]]
    cuts += [(number, *NOTHING) for number in (steps[len(steps) // 2], steps[-1], len(run.events))]
    assert [found for seed, cut in enumerate(cuts) if (found := run.failure(cut, seed))] == []


@pytest.mark.parametrize("forgotten", [r"\.n5/s0$", r"\.n5/s0/0$", r"\.v2\.zarr|\.zarr2/0/0$", r"\.final\.h5$"])
def test_flushing_that_is_forgotten_is_found(inference: Recorded, forgotten: str) -> None:
    """The entries of the chunk folders that TensorStore makes, and the bytes of a file that is renamed."""
    run = dataclasses.replace(inference, events=without_flushing(inference.events, forgotten))
    assert published_too_early(run.start, run.events, NEVER_FLUSHED)
    assert run.failure((len(run.events), *NOTHING), 0)


@pytest.mark.parametrize("forgotten", [r"/staging\.[^/]*$", r"/a_labels\.h5$", r"provenance\.json$"])
def test_flushing_of_small_volumes_that_is_forgotten_is_found(small: Recorded, forgotten: str) -> None:
    run = dataclasses.replace(small, events=without_flushing(small.events, forgotten))
    assert published_too_early(run.start, run.events, NEVER_FLUSHED)


def test_what_stands_of_small_volumes_tells_how_it_was_made(small: Recorded, tmp_path: Path) -> None:
    """Whatever the disk kept, a result that is there has its provenance beside it."""
    found = 0
    for seed, step in enumerate(publishing(small.events)):
        for kept in (0.0, 0.5, 1.0):
            output = tmp_path / f"{seed}_{kept}"
            small.after((step + 1, kept, FATES), seed, output)
            for name in stamped(output) if output.exists() else ():
                assert reproduce(output / name).startswith("connectomics infer-volume")
                found += 1
    assert found > 10


def test_mapped_pages_are_lost_until_they_are_flushed(tmp_path: Path) -> None:
    folder, log = tmp_path / "disk", tmp_path / "record"
    code = """
import os, sys
import numpy as np
os.makedirs(sys.argv[1])
table = np.memmap(sys.argv[1] + "/table", np.uint8, "w+", shape=(3,))
table[0] = 1
table.flush()
table[1] = 2
with open(sys.argv[1] + "/table", "rb") as stream:
    os.fsync(stream.fileno())
table[2] = 3
"""
    stated = {"POWER_LOSS_FOLDER": str(folder), "POWER_LOSS_LOG": str(log)}
    assert run_with(compiled("power_loss", tmp_path), [str(folder)], stated, code).returncode == 0
    found = list[bytes]()
    for number in range(len(events := read_record(log, folder)) + 1):
        file = Disk().after(events[:number]).top.now.get("table")
        if isinstance(file, File) and file.flushed not in found:
            found.append(file.flushed)
    assert found == [b"", b"\x01\0\0", b"\x01\x02\0"]


def cuts_everywhere(events: Sequence[Event], chance: random.Random) -> list[Cut]:
    """Before and after every publishing step, when nothing or something of what was not flushed is there; elsewhere.

    Elsewhere is also after each removal, whose entry may be on the disk before what replaces it.
    """
    close = [step + after for step in publishing(events) for after in (0, 1)]
    cuts: list[Cut] = [(number, *NOTHING) for number in close]
    cuts += [(number, chance.choice([0.3, 0.7, 1.0]), FATES) for number in close]
    cuts += [(number + 1, chance.random(), FATES) for number, event in enumerate(events) if event.name == "remove"]
    return cuts + [(chance.randrange(len(events)), chance.random(), FATES) for _ in range(max(40, 220 - len(cuts)))]


@pytest.mark.long
def test_loss_of_power_at_every_publishing_step(run: Recorded) -> None:
    cuts = cuts_everywhere(run.events, random.Random(0))
    assert len(cuts) >= 200
    assert [found for seed, cut in enumerate(cuts) if (found := run.failure(cut, seed))] == []


@pytest.mark.long
@pytest.mark.parametrize("step", sorted(MORE))
def test_loss_of_power_in_other_steps_of_decoding(bench: tuple[Path, ForkServer], step: str) -> None:
    run = recorded(bench, step, decode(bench[0], MORE[step]))
    assert published_too_early(run.start, run.events, NEVER_FLUSHED) == []
    cuts = cuts_everywhere(run.events, random.Random(step))[::3]
    assert [found for seed, cut in enumerate(cuts) if (found := run.failure(cut, seed))] == []


@pytest.mark.long
def test_loss_of_power_while_a_run_goes_on_after_one(bench: tuple[Path, ForkServer], inference: Recorded) -> None:
    middle = publishing(inference.events)[len(publishing(inference.events)) // 2]
    inference.after((middle + 1, 0.5, FATES), 1, bench[0] / "resumed")
    run = recorded(bench, "resumed", inference.words)
    assert run.reference == inference.reference
    cuts = cuts_everywhere(run.events, random.Random(1))[::2]
    assert [found for seed, cut in enumerate(cuts) if (found := run.failure(cut, seed))] == []


@pytest.mark.long
def test_loss_of_power_while_results_are_replaced(bench: tuple[Path, ForkServer], inference: Recorded) -> None:
    """Whatever says that it is finished is whole, be it the result of before or the new one."""
    output = bench[0] / "replaced"
    shutil.copytree(bench[0] / "inference", output, symlinks=True)
    words = infer(bench[0], "inference.output.overwrite=true", "inference.test_time_augmentation.flip_axes=[2]")
    words = [word for word in words if "augmentation.enabled" not in word]
    run = recorded(bench, "replaced", words)
    assert published_too_early(run.start, run.events, NEVER_FLUSHED) == []
    changed = {name.partition("/")[0] for name in run.reference if run.reference[name] != inference.reference.get(name)}
    assert changed == {name.partition("/")[0] for name in inference.reference}, "each has a stamp of its own"
    cuts = cuts_everywhere(run.events, random.Random(2))
    assert [found for seed, cut in enumerate(cuts) if (found := run.failure(cut, seed))] == []
