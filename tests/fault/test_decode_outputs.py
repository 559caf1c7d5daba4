"""Objects as any output: formats that other programs read, checksums, what status and verify-run say, many hands."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from fork_server import ForkServer
from tifffile import imread

from connectomics.cli import main

from decoding import Array, whole_components
from pyramids import READERS
from small_jobs import em_like, final_names, finals, ledger_lines, quick_folder, write_h5

COMPONENTS = "decoding=[{name: connected_components, connectivity: 6}]"
NAMES = {f"v_instances{ending}" for ending in (".h5", ".zarr", ".v2.zarr", ".n5", ".precomputed", ".tif", ".parquet")}
STAGES = ("cut", "join", "paint")
CHUNKED = ("zarr", "zarr2", "n5", "precomputed")
BLOCKS = 8


@dataclass(frozen=True)
class Bench:
    """A volume of labels, its objects in every format, and a server that decodes it again."""

    server: ForkServer
    folder: Path
    ids: Array

    @property
    def reference(self) -> Path:
        return self.folder / "one"

    def words(self, output: Path) -> list[str]:
        given = ("inference.output.formats=[h5,zarr,zarr2,n5,precomputed,tiff,png]", "inference.block_shape=[4,16,32]")
        place = ("inference.voxel_size_nm=[30,8,8]", f"inference.data.output_path='{output}'")
        return ["decode", str(self.folder / "v.h5"), COMPONENTS, *given, *place]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with quick_folder() as folder:
        labels = (em_like((8, 32, 64)) > 150).astype(np.uint8)
        write_h5(folder / "v.h5", labels)
        with ForkServer(folder) as server:
            made = Bench(server, folder, whole_components(labels, 6))
            ended = server.run(made.words(made.reference))
            assert ended.code == 0, ended.stdout + ended.stderr
            assert final_names(made.reference) == NAMES
            yield made


@pytest.fixture
def output(bench: Bench, tmp_path: Path) -> Iterator[Path]:
    """A place of one test's own."""
    with quick_folder() as folder:
        yield folder / "out"


def test_other_programs_read_the_same_ids(bench: Bench) -> None:
    for form, ending in (("zarr", ".zarr"), ("zarr2", ".v2.zarr"), ("n5", ".n5"), ("precomputed", ".precomputed")):
        found = READERS[form](bench.reference / f"v_instances{ending}", 0).reshape(bench.ids.shape)
        assert found.dtype == np.uint32 and np.array_equal(found, bench.ids), form
        coarse = READERS[form](bench.reference / f"v_instances{ending}", 1)
        assert set(np.unique(coarse)) <= set(np.unique(bench.ids)), "ids are not averaged"
    assert np.array_equal(imread(bench.reference / "v_instances.tif"), bench.ids)
    info = json.loads((bench.reference / "v_instances.precomputed" / "info").read_text())
    assert info["type"] == "segmentation"
    assert {scale["encoding"] for scale in info["scales"]} == {"compressed_segmentation"}


def test_every_final_output_has_checksums(bench: Bench) -> None:
    checksums = bench.reference / "v_instances.run" / "checksums"
    assert {path.name for path in checksums.iterdir()} == {f"{name}.sha256" for name in NAMES}


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: str) -> tuple[int, str]:
        code = main(list(words))
        return code, capsys.readouterr().out

    return run


def test_status_lists_the_stages_in_order(bench: Bench, command: Command) -> None:
    code, printed = command("status", str(bench.reference / "v_instances.run"), "--json")
    status = json.loads(printed)
    assert code == 0
    steps, exports = status["stages"][: len(STAGES)], status["stages"][len(STAGES) :]
    assert [stage["stage"] for stage in steps] == [f"1_connected_components.{name}" for name in STAGES]
    assert {stage["stage"].rpartition(".")[0] for stage in exports} == {f"objects.{form}" for form in CHUNKED}
    assert all(stage["done"] == stage["planned"] for stage in status["stages"])
    assert {stage["planned"] for stage in steps} == {BLOCKS}
    assert set(status["finished"]) == NAMES
    lines = command("status", str(bench.reference / "v_instances.run"))[1].splitlines()
    assert "1_connected_components.paint 8/8 blocks (100.0%)" in lines[3]


def test_a_damaged_table_or_volume_is_found_and_made_again(bench: Bench, output: Path, command: Command) -> None:
    assert bench.server.run(bench.words(output)).code == 0
    run = str(output / "v_instances.run")
    assert command("verify-run", run)[0] == 0
    for name in ("v_instances.parquet", "v_instances.n5/s0/attributes.json", "v_instances.zarr/0/c/0/0/0"):
        file = output / name
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        code, printed = command("verify-run", run)
        assert code == 3 and name in printed
        assert bench.server.run(bench.words(output)).code == 0
        expected = finals(bench.reference)
        assert {path: content for path, content in finals(output).items() if ".damaged" not in path} == expected


def test_damage_to_unfinished_work_is_found_and_mended(bench: Bench, output: Path, command: Command) -> None:
    ended = bench.server.run(bench.words(output), watched=output, kill_at=("components.zarr/0/c/", 5))
    assert ended.code == -signal.SIGKILL
    run = output / "v_instances.run"
    (piece,) = run.glob("*/1_connected_components.cut/1-0-1*")
    piece.write_bytes(piece.read_bytes()[:-1] + b"?")
    code, printed = command("verify-run", str(run))
    assert code == 3 and "blocks of 1_connected_components.cut: 8 read, 1 damaged" in printed
    ended = bench.server.run(bench.words(output))
    assert ended.code == 0 and finals(output) == finals(bench.reference)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_processes_share_the_blocks(bench: Bench, output: Path, count: int) -> None:
    for ended in bench.server.run_together(bench.words(output), count, watched=output):
        assert ended.code == 0, ended.stdout + ended.stderr
    assert finals(output) == finals(bench.reference)
    run = output / "v_instances.run"
    for stage in STAGES:
        lines = ledger_lines(run, f"ledger_1_connected_components.{stage}")
        assert len(lines) == len({line["block"] for line in lines}) == BLOCKS
    assert not list(run.glob("*/coordination")) and not list(run.glob("*/*.zarr"))


@pytest.mark.parametrize(
    "where",
    [("components.cut", 9), *(pytest.param((text, 4), marks=pytest.mark.long) for text in ("join", "tables", ".h5"))],
)
def test_the_other_takes_over_from_one_that_is_killed(bench: Bench, output: Path, where: tuple[str, int]) -> None:
    _, other = bench.server.run_together(bench.words(output), 2, watched=output, kill_first_at=where)
    assert other.code == 0, other.stdout + other.stderr
    assert finals(output) == finals(bench.reference)
