"""Exported models (.zip of ``nnUNetv2_export_model_to_zip``): checks every name, unpacks only what is needed.

Called by ``checkpoint``. Nothing is ever written outside of a private temporary folder, which is gone afterwards.
"""

from __future__ import annotations

import contextlib
import lzma
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from connectomics.core.errors import ModelError, ResourceError
from connectomics.models.locate import ModelRequest, instead, is_visible, training_folder

_SUFFIX = ".zip"
_MOST_MEMBERS = 100_000
_LARGEST_BYTES = {".json": 1 << 26, ".pth": 1 << 34}
_LARGEST_RATIO = 200  # weights hardly shrink and JSON shrinks thirtyfold
_RATIO_FROM_BYTES = 1 << 20
_JSON = ("plans.json", "dataset.json")
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, EOFError, RuntimeError, ValueError)


@contextlib.contextmanager
def unpacked(request: ModelRequest) -> Iterator[ModelRequest]:
    """The same request for a model in a folder, which is there as long as the context is open.

    Parameters
    ----------
    request
        For an exported ``.zip``, or ``MODEL.zip/Trainer__Plans__configuration`` for one of its models (a fold's folder
        may follow). Checkpoints that are not asked for stay packed, and so does what Finder adds. Of any other the
        training folder is found, which may lie one or two levels below.

    Raises
    ------
    ModelError
        If the archive is damaged, a name in it leads outside, or it does not hold the model that is asked for.
    ResourceError
        If the temporary folder has no room for the weights.
    """
    path = request.path
    try:
        archive_path = next((p for p in (path, *path.parents) if p.suffix.lower() == _SUFFIX and p.is_file()), None)
    except OSError as error:
        raise ModelError(f"{path}: the model cannot be read ({error.strerror}); check the path") from error
    if archive_path is None:
        yield replace(request, path=training_folder(path))
        return
    with tempfile.TemporaryDirectory(prefix="connectomics_") as folder:
        root = Path(folder, archive_path.name)
        try:
            place = _unpack(
                archive_path,
                path.relative_to(archive_path),
                root,
                request.folds,
                checkpoint_name=request.checkpoint_name,
            )
            yield replace(request, path=place)
        except ModelError as error:
            raise type(error)(str(error).replace(str(root), str(archive_path))) from error


def _unpack(archive_path: Path, within: Path, root: Path, folds: Sequence[str] | None, checkpoint_name: str) -> Path:
    try:
        with zipfile.ZipFile(archive_path) as archive:
            members = _checked(archive_path, archive.infolist())
            model, fold = _chosen(archive_path, members, PurePosixPath(within.as_posix()))
            wanted = [model / name for name in _JSON if model / name in members]
            wanted += _checkpoints(
                archive_path, members, model, (fold,) if fold else folds, checkpoint_name=checkpoint_name
            )
            _check_sizes(archive_path, [members[name] for name in wanted], root)
            for name in wanted:
                target = root / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(members[name]) as packed, target.open("xb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 20)
                if target.stat().st_size != members[name].file_size:
                    raise zipfile.BadZipFile(f"{name} has another size than the archive's directory says")
    except _DAMAGE as error:
        raise ModelError(
            f"{archive_path}: the archive is damaged, cut short or no zip file ({error!s:.160}); copy it again and "
            "compare its sha256 with the source's"
        ) from error
    except OSError as error:
        raise ModelError(
            f"{archive_path}: the archive cannot be unpacked ({error.strerror or error}); check its permissions and "
            f"the room in {root.parent.parent}"
        ) from error
    return root / model / f"fold_{fold}" if fold else root / model


def _checked(archive_path: Path, infos: Sequence[zipfile.ZipInfo]) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """The files of an archive by name, after every entry was found to be an ordinary file or folder within it."""
    if len(infos) > _MOST_MEMBERS:
        raise ModelError(
            f"{archive_path}: holds {len(infos)} entries, expected at most {_MOST_MEMBERS}; it is not an export of "
            "nnU-Net, so export the model again"
        )
    files: dict[PurePosixPath, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.orig_filename
        parts = name.removesuffix("/").split("/")
        kind = stat.S_IFMT(info.external_attr >> 16)
        finding = ""
        if name != info.filename or "\\" in name or not name.isprintable():
            finding = "has characters that file systems read differently"
        elif name.startswith("/") or re.match("[A-Za-z]:", name) or any(part in ("", ".", "..") for part in parts):
            finding = "leads outside of the archive"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            finding = "is a link or a device"
        elif info.flag_bits & 1:
            finding = "is encrypted"
        elif PurePosixPath(name) in files:
            finding = "is there twice"
        if finding:
            raise ModelError(
                f"{archive_path}: the entry {name[:80]!r} {finding}; nothing was unpacked; export the model again with "
                "nnUNetv2_export_model_to_zip"
            )
        if not info.is_dir() and all(map(is_visible, parts)):
            files[PurePosixPath(name)] = info
    return files


def _chosen(
    archive_path: Path, members: dict[PurePosixPath, zipfile.ZipInfo], within: PurePosixPath
) -> tuple[PurePosixPath, str | None]:
    """The training folder in the archive, and the fold if one was named."""
    models = {name.parent.parent for name in members if name.suffix == ".pth" and name.parent.name.startswith("fold_")}
    fold = within.name.removeprefix("fold_") if within.name.startswith("fold_") else None
    asked = within.parent.parts if fold else within.parts
    fitting = sorted(m for m in models if not asked or m.parts[-len(asked) :] == asked)
    if len(fitting) == 1:
        return fitting[0], fold
    found = ", ".join(str(m) for m in sorted(models)[:8]) or "none"
    if fitting:
        raise ModelError(
            f"{archive_path}: holds {len(fitting)} models ({found}); name one, such as {archive_path / fitting[0].name}"
        )
    raise ModelError(
        f"{archive_path}: holds no training folder{f' {within}' if asked else ''} with fold_X/*.pth, found: {found}; "
        "give a zip that nnUNetv2_export_model_to_zip wrote"
    )


def _checkpoints(
    archive_path: Path,
    members: dict[PurePosixPath, zipfile.ZipInfo],
    model: PurePosixPath,
    folds: Sequence[str] | None,
    checkpoint_name: str,
) -> list[PurePosixPath]:
    """The checkpoints to unpack: of the folds asked for, or of all that nnU-Net would take."""
    there = sorted(name for name in members if name.suffix == ".pth" and name.parent.parent == model)
    holding = [name for name in there if name.name == checkpoint_name]
    if folds is None:
        numbered = [name for name in holding if name.parent.name.removeprefix("fold_").isdecimal()]
        wanted = numbered or holding
    else:
        wanted = [model / f"fold_{fold}" / checkpoint_name for fold in dict.fromkeys(folds)]
    missing = [name for name in wanted if name not in members]
    if missing or not wanted:
        name = missing[0] if missing else model / "fold_X" / checkpoint_name
        raise ModelError(
            f"{archive_path}: there is no {name} in it; checkpoints found there: "
            f"{', '.join(str(n.relative_to(model)) for n in there[:8])}; "
            f"{instead(((n.parent.name, n.name) for n in there), checkpoint_name)}"
        )
    return wanted


def _check_sizes(archive_path: Path, infos: Sequence[zipfile.ZipInfo], root: Path) -> None:
    for info in infos:
        largest = _LARGEST_BYTES[PurePosixPath(info.filename).suffix]
        ratio = info.file_size / max(info.compress_size, 1)
        if info.file_size > largest or (info.file_size > _RATIO_FROM_BYTES and ratio > _LARGEST_RATIO):
            raise ModelError(
                f"{archive_path}: {info.filename} would unpack to {info.file_size} bytes, {ratio:.0f} times its packed "
                f"size; expected at most {largest} bytes and {_LARGEST_RATIO} times; it is not what nnU-Net writes, "
                "so fetch the archive again from its source"
            )
    needed = sum(info.file_size for info in infos)
    free = shutil.disk_usage(root.parent).free
    if needed > free:
        raise ResourceError(
            f"{archive_path}: needs {needed} bytes in {root.parent.parent}, {free} are free; unzip it elsewhere and "
            "give the folder, or set TMPDIR to a larger disk"
        )
