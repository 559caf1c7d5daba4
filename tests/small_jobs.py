"""Small whole jobs for the tests that run the command line: a fast folder, volumes, arguments, and what is left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


@contextlib.contextmanager
def quick_folder() -> Iterator[Path]:
    """A new folder that every user may enter, in memory where the machine offers that.

    What a killed process leaves does not depend on the disk, but thousands of fsyncs take minutes on a slow one.
    """
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    folder = Path(tempfile.mkdtemp(prefix="connectomics_", dir=memory if usable else None))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def em_like(shape: tuple[int, ...], seed: int = 0) -> Pixels:
    """A uint8 image or volume: smooth blobs and noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(40, 216, [-(-n // 4) for n in shape])
    for axis in range(len(shape)):
        coarse = coarse.repeat(4, axis=axis)
    pixels: Pixels = (coarse[tuple(slice(n) for n in shape)] + generator.integers(-30, 30, shape)).astype(np.uint8)
    return pixels


def write_png(path: Path, shape: tuple[int, int] = (24, 32), seed: int = 0) -> Path:
    """A single image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(em_like(shape, seed)).save(path)
    return path


def write_h5(path: Path, array: npt.NDArray[Any], name: str = "main") -> Path:
    """A volume in an HDF5 file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[name] = array
    return path


def read_h5(path: Path, name: str = "main") -> npt.NDArray[Any]:
    """The voxels of an HDF5 file."""
    with h5py.File(path) as file:
        voxels: npt.NDArray[Any] = file[name][:]
    return voxels


def infer_words(model: Path, output: Path, pattern: Path | str, *more: str) -> list[str]:
    """Arguments of ``connectomics infer-volume`` on one CPU thread."""
    return [
        "infer-volume",
        "--checkpoint",
        str(model),
        f"inference.volume_mode.file_pattern='{pattern}'",
        f"inference.data.output_path='{output}'",
        "system.device=cpu",
        "system.num_cpus=1",
        *more,
    ]


def finals(output: Path) -> dict[str, bytes]:
    """Every file under a final name, by its path in the output folder; RUN folders and temporaries are left out."""
    found = {}
    for top in sorted(output.iterdir()) if output.exists() else ():
        if top.suffix == ".run" or top.name.startswith("."):
            continue
        for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if file.is_file():
                found[file.relative_to(output).as_posix()] = file.read_bytes()
    return found


def final_names(output: Path) -> set[str]:
    """Final names in an output folder."""
    return {name.partition("/")[0] for name in finals(output)}


def ledger_lines(run: Path, stage: str = "ledger") -> list[dict[str, Any]]:
    """The blocks that the one ledger of a stage in a RUN folder records, whole lines that are not undone only."""
    assert len(list(run.glob(f"*/{stage}"))) <= 1
    found, voided = {}, set()
    for file in sorted(run.glob(f"*/{stage}/*.jsonl")):
        for number, line in enumerate(file.read_bytes().split(b"\n")[1:-1]):
            fields = json.loads(line)
            if "void" in fields:
                voided.add(tuple(fields["void"]))
            else:
                found[file.name, number] = fields
    return [fields for name, fields in found.items() if name not in voided]
