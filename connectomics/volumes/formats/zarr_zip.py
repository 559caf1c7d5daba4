"""A Zarr hierarchy in one zip file (``.zarr.zip``), read where it lies; ``NAME.zarr.zip::0`` picks a level.

The metadata are copied into a temporary folder, in which ``zarr`` finds the array; TensorStore reads its chunks from
the zip file. For ``opening``.
"""

from __future__ import annotations

import dataclasses
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from connectomics.core.errors import VolumeError
from connectomics.volumes.formats.zarr import METADATA_FILES, open_zarr_in
from connectomics.volumes.source import LARGEST_JSON_BYTES, READ_ERRORS, Source, file_identity, unreadable
from connectomics.volumes.stored import StoredVolume

COPIED = (*METADATA_FILES, ".zattrs")
MOST_COPIED = 10_000
PACKED_AS_STORED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def open_zarr_zip(source: Source) -> StoredVolume:
    """Open one array of a zipped Zarr hierarchy for lazy reading; the root may be a folder in the zip file.

    Raises
    ------
    VolumeError
        If it is no zip file, holds no Zarr array, is encrypted, or what ``open_zarr`` refuses.
    """
    try:
        identity = file_identity(source.path) | {"array": source.inner or ""}
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder, source.path.name)  # a name that messages may tell
            here = _copy_metadata(source, root)
            at = {"driver": "zip", "base": {"driver": "file", "path": str(source.path.resolve())}}
            inside = dataclasses.replace(source, path=here)
            return open_zarr_in(
                inside,
                store=lambda array: at | {"path": f"{array.relative_to(root)}/".removeprefix("./")},
                identity=lambda: identity,
            )
    except (zipfile.BadZipFile, NotImplementedError, *READ_ERRORS) as error:
        raise unreadable(source, "zipped Zarr", error) from error


def _copy_metadata(source: Source, folder: Path) -> Path:
    """Copy the metadata files into a folder; the root, which is this folder or the only one in it."""
    with zipfile.ZipFile(source.path) as archive:
        found = [one for one in archive.infolist() if PurePosixPath(one.filename).name in COPIED]
        if not found:
            raise VolumeError(
                f"{source.uri}: a zip file without a Zarr array; unpack it and name the volume that is in it."
            )
        if len(found) > MOST_COPIED or sum(one.file_size for one in found) > LARGEST_JSON_BYTES:
            raise ValueError(f"it holds more than {MOST_COPIED} metadata files or {LARGEST_JSON_BYTES} bytes of them")
        for one in found:
            name = PurePosixPath(one.filename)
            if (
                name.is_absolute()
                or ".." in name.parts
                or one.flag_bits & 1
                or one.compress_type not in PACKED_AS_STORED
            ):
                raise ValueError(f"its entry {one.filename!r:.80} is encrypted, packed unusually or leads outside")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(one))
    entries = list(folder.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else folder
