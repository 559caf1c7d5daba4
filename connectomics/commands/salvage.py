"""What is intact of a damaged Zarr output becomes a working store again, so that only other blocks are computed anew.

``verify_run`` calls it. A shard of the output covers several blocks, and the ledger knows the checksum of each block's
own shard in the working store: a block that is read from the output and written again with this checksum is intact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

from connectomics.core.errors import VolumeError
from connectomics.core.files import discard
from connectomics.execution.lease import Worker
from connectomics.execution.ledger import HEADER, Ledger, plan_of, read_header
from connectomics.execution.run_folder import LEDGER, PROVENANCE, SINGLE_WRITER, WORKERS
from connectomics.execution.runner import write_block
from connectomics.stages.output.export import read_stamp
from connectomics.volumes.opening import open_volume
from connectomics.volumes.source import READ_ERRORS
from connectomics.volumes.store import create_store
from connectomics.volumes.volume import VolumeReader


def salvage(output: Path, run: Path, works: list[Path]) -> int | None:
    """Copy the intact blocks of a damaged Zarr output into a working store, and undo the records of all others.

    Parameters
    ----------
    output
        The final output, which is only read.
    run
        RUN, whose provenance names the output.
    works
        Its work folders.

    Returns
    -------
    lost
        How many blocks have to be computed again; None where blocks alone do not make the output, nothing is known of
        them any more, or it cannot be opened.

    Raises
    ------
    OutputError
        If the disk refuses; the output is as it was.
    """
    stamp = read_stamp(output, "zarr")
    if stamp is None or stamp.get("filtered") is not False:
        return None  # the ledger tells of blocks before they were filtered
    name = _name_of(stamp.get("result_key"), run)
    begun = [work / LEDGER for work in works if (work / LEDGER / HEADER).exists()]
    folder = next((f for f in begun if read_header(f)["run_key"] == stamp.get("run_key")), None)
    if name is None or folder is None:
        return None
    try:
        reader = open_volume(str(output))
    except VolumeError:
        return None
    with contextlib.closing(reader), Worker(folder.parent / WORKERS) as worker, worker.alone(SINGLE_WRITER):
        return _copy_back(reader, folder, folder.parent / f"{name}.zarr")


def _name_of(result_key: object, run: Path) -> str | None:
    """The working store's name of the output with a result key."""
    try:
        keys: dict[str, object] = json.loads((run / PROVENANCE).read_text())["result_keys"]
        return next((name for name, key in keys.items() if key == result_key), None)
    except READ_ERRORS:
        return None


def _copy_back(reader: VolumeReader, folder: Path, path: Path) -> int:
    plan = plan_of(folder)
    assert plan is not None, "its header was read"
    discard(path)  # half of it, of another call
    info = dataclasses.replace(reader.info, chunk_shape=plan.chunk_shape)
    store = create_store(path, info, shard_shape=plan.block_shape, attributes={})
    lost: set[str] = set()
    with contextlib.closing(store), contextlib.closing(Ledger.existing(folder)) as ledger:
        for place, record in ledger.named_records():
            block = ledger.block(record.block)
            try:
                shard, checksum = write_block(store, block, reader.read(block.core))
            except VolumeError:
                intact = False
            else:
                intact = record.checksums.get(shard) == checksum
            if not intact:
                ledger.void(place, record.block)
                lost.add(record.block)
    return len(lost)
