"""Disks that lack what others have: links, locks, flushing of folders, a difference between ``A`` and ``a``."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from fork_server import ForkServer
from preloads import compiled, run_with

from connectomics.assembly.volumes import sources_of
from connectomics.core.errors import ConfigError
from connectomics.volumes.listing import group, refuse_collisions

from nnunet_models import make_model
from small_jobs import em_like, finals, infer_words, quick_folder, write_h5

FORMATS = "inference.output.formats=[h5,tiff,png,zarr,zarr2,n5,precomputed]"
SETTINGS = ("inference.voxel_size_nm=[30,8,8]", "inference.test_time_augmentation.enabled=false", FORMATS)
LACKS = ("links", "symlinks", "folder_sync", "locks")
ASK = "import sys; from connectomics.core.files import *; print(tells_apart(Path(sys.argv[1]), *sys.argv[2:]))"


@dataclass(frozen=True)
class Bench:
    """A model, a volume, its result, and a server."""

    folder: Path
    server: ForkServer
    reference: dict[str, bytes]

    def words(self, output: Path, volume: str = "in/v.h5") -> list[str]:
        return infer_words(self.folder / "in" / "model", output, self.folder / volume, *SETTINGS)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with quick_folder() as folder, ForkServer(folder) as server:
        make_model(folder / "in" / "model", dimensions=2, patch=(16, 16), features=(4, 8))
        write_h5(folder / "in" / "v.h5", em_like((3, 32, 48)))
        made = Bench(folder, server, {})
        ended = server.run(made.words(folder / "reference"))
        assert ended.code == 0, ended.stdout + ended.stderr
        yield Bench(folder, server, finals(folder / "reference"))


@pytest.mark.parametrize("lacks", [",".join(LACKS), *(pytest.param(one, marks=pytest.mark.long) for one in LACKS)])
def test_a_disk_that_lacks_something_gives_the_same_bytes(bench: Bench, tmp_path: Path, lacks: str) -> None:
    library, output = compiled("strange_disk", tmp_path), bench.folder / f"lacks_{lacks}"
    ended = run_with(library, bench.words(output), {"STRANGE": lacks})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert finals(output) == bench.reference
    assert not list(output.rglob("*.__lock"))
    told = (output / "v_labels.run" / "run.log").read_text().count("folders cannot be flushed")
    assert told == ("folder_sync" in lacks)


def test_a_run_folder_on_another_disk_says_what_to_do(bench: Bench) -> None:
    """A folder cannot be renamed from one disk to another; the remedy is followed."""
    output = bench.folder / "linked"
    with tempfile.TemporaryDirectory(dir="/var/tmp") as elsewhere:
        if Path(elsewhere).stat().st_dev == bench.folder.stat().st_dev:
            pytest.skip("there is one disk here")
        output.mkdir()
        (output / "v_labels.run").symlink_to(elsewhere)
        ended = bench.server.run(bench.words(output))
        assert ended.code == 3 and "Traceback" not in ended.stderr
        assert "lies on another disk" in ended.stdout and "remove that mount or link" in ended.stdout, ended.stdout
        for name, content in finals(output).items():
            assert content == bench.reference[name]
        (output / "v_labels.run").unlink()
    ended = bench.server.run(bench.words(output))
    assert ended.code == 0, ended.stdout
    assert finals(output) == bench.reference


def test_names_that_are_one_file_on_a_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told_apart(folder: Path, one: str, other: str) -> bool:
        return folder != tmp_path

    monkeypatch.setattr("connectomics.volumes.listing.tells_apart", told_apart)
    names = ["in/A.h5", "other/a.tif", "in/b.h5"]
    refuse_collisions(group(names, 1), tmp_path / "another disk")
    sources_of(names, 1, tmp_path / "another disk")
    message = rf"in/A\.h5 and other/a\.tif would both write .* one file on the disk of {tmp_path}.* 'A' from 'a'"
    with pytest.raises(ConfigError, match=message):
        sources_of(names, 1, tmp_path)
    with pytest.raises(ConfigError, match="would both write"):
        refuse_collisions(group(["in/e\u0301.h5", "in/\xe9.h5"], 1), tmp_path)  # as macOS and as Linux write it


def test_whether_a_disk_tells_names_apart_is_asked_of_the_disk(tmp_path: Path) -> None:
    library, folder = compiled("strange_disk", tmp_path), tmp_path / "disk"
    folder.mkdir()
    asked = (str(folder), "cell_Name", "cell_name")
    strange = {"STRANGE": "case", "STRANGE_FOLDER": str(folder)}
    assert run_with(library, asked, strange, ASK).stdout == "False\n"
    assert run_with(library, (str(folder / "to be made"), *asked[1:]), {"STRANGE": ""}, ASK).stdout == "True\n"
    assert list(folder.iterdir()) == []


def test_volumes_and_models_on_a_disk_that_is_read_only(bench: Bench, tmp_path: Path) -> None:
    """Nothing is written beside them, and no lock is taken there."""
    stored, still = bench.folder / "in" / "v.zarr", tmp_path / "in"
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(stored)}}
    ts.open(spec, create=True, dtype=ts.uint8, shape=[3, 32, 48]).result().write(em_like((3, 32, 48))).result()
    still.mkdir()
    place = (str(bench.folder / "in"), str(still))
    bound = subprocess.run(["mount", "--bind", "-o", "ro", *place], capture_output=True, check=False)
    if bound.returncode != 0:
        pytest.skip("this user may not mount a folder read-only")
    try:
        with pytest.raises(OSError, match="Read-only"):
            (still / "written").touch()
        for volume in ("v.h5", "v.zarr"):
            words = infer_words(still / "model", bench.folder / f"read {volume}", still / volume, *SETTINGS)
            ended = bench.server.run(words)
            assert ended.code == 0, ended.stdout + ended.stderr
            assert np.array_equal(*(_labels(bench.folder / name) for name in (f"read {volume}", "reference")))
    finally:
        subprocess.run(["umount", "--lazy", str(still)], check=True)


def _labels(output: Path) -> np.ndarray:
    import tifffile

    return tifffile.imread(output / "v_labels.tif")
