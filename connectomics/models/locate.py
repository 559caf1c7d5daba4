"""Finds a model's files: a bare checkpoint, a fold's folder, a training folder. Called by ``checkpoint``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from connectomics.core.errors import ModelError

CHECKPOINT_NAME = "checkpoint_final.pth"
_FOLD = "fold_"


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """Which model is to be read, and how far its files are trusted.

    Parameters
    ----------
    path
        A checkpoint file with plans.json and dataset.json beside it or above it (else its own copies are
        used), a fold's folder, a nnU-Net training folder ``Trainer__Plans__configuration``, or an exported ``.zip``
        (``MODEL.zip/Trainer__Plans__configuration`` where it holds several), or a folder that ``connectomics
        convert`` wrote.
    folds
        Folds of a training folder in the order of their mean, for example ``("0", "1")`` or ``("all",)``;
        None: all numbered folds that hold the checkpoint, else ``fold_all``.
    checkpoint_name
        File within a fold's folder.
    plans, dataset
        The JSON files, where they lie elsewhere.
    sha256
        Expected ``ModelSpec.weights_sha256``, compared before anything is unpickled.
    trust_code
        Unpickle without restriction and import the classes that the plans name.
    architecture
        Name of a registered architecture.
    """

    path: Path
    folds: Sequence[str] | None = None
    checkpoint_name: str = CHECKPOINT_NAME
    plans: Path | None = None
    dataset: Path | None = None
    sha256: str | None = None
    trust_code: bool = False
    architecture: str = "nnunet"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model.

    Parameters
    ----------
    root
        The folder that names in messages and records are relative to.
    checkpoints
        One file a fold.
    folds
        Names of the folds, or None for a bare checkpoint, which says itself.
    plans, dataset
        The JSON files, or None where a bare checkpoint has none and its own copy is used.
    """

    root: Path
    checkpoints: tuple[Path, ...]
    folds: tuple[str, ...] | None
    plans: Path | None
    dataset: Path | None

    def name_of(self, path: Path) -> str:
        """The name of a file within the model: relative to the root, or the bare file name outside of it."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.name


def looks_like_model(path: Path) -> bool:
    """Whether a path is meant for a model rather than a volume; nothing is opened."""
    if any(part.suffix == ".zip" for part in (path, *path.parents)):
        return not path.name.endswith(".zarr.zip")
    if path.suffix in (".pth", ".pt") or path.name.startswith(_FOLD):
        return True
    try:
        if not path.is_dir():
            return False
        signs = ("plans.json", "manifest.json", f"{_FOLD}*", "*.pth", "*/plans.json", "*/*/plans.json")
        return any(next(path.glob(sign), None) is not None for sign in signs)
    except OSError:  # opening it says why
        return False


def training_folder(path: Path) -> Path:
    """The training folder that a folder means: itself, or the only one up to two levels below it.

    What an exported zip or a hub's snapshot unpacks to has it there: ``Dataset004_EM/Trainer__Plans__configuration``.
    What holds no training folder is given back as it is.

    Raises
    ------
    ModelError
        If there are several, naming them.
    """
    try:
        if not path.is_dir() or _holds_folds(path) or any(path.glob("*.pth")) or (path / "plans.json").is_file():
            return path
        below = [f for pattern in ("*", "*/*") for f in sorted(path.glob(pattern)) if is_visible(f.name)]
        found = [f for f in below if f.is_dir() and not f.name.startswith(_FOLD) and _holds_folds(f)]
    except OSError as error:
        raise ModelError(
            f"{error.filename or path}: the model cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    if len(found) > 1:
        names = ", ".join(f.relative_to(path).as_posix() for f in found[:8])
        raise ModelError(f"{path}: holds {len(found)} trained models ({names}); name one, such as {found[0]}")
    return found[0] if found else path


def _holds_folds(folder: Path) -> bool:
    return any(is_visible(f.name) for f in folder.glob(f"{_FOLD}*/*.pth"))


def is_visible(name: str) -> bool:
    """Whether a file is the user's own: Finder and Windows leave others beside them."""
    return not name.startswith("._") and name not in ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")


def locate_model(request: ModelRequest) -> ModelFiles:
    """Find what belongs to a model that is not packed; a ModelError if that is missing, unreadable or contradictory."""
    try:
        return _locate(request)
    except OSError as error:
        raise ModelError(
            f"{error.filename or request.path}: the model cannot be read ({error.strerror}); check the path and its "
            "permissions"
        ) from error


def _locate(request: ModelRequest) -> ModelFiles:
    path, folds = request.path, request.folds
    for stated in (request.plans, request.dataset):
        if stated is not None and not stated.is_file():
            raise ModelError(f"{stated}: there is no such file; check model.nnunet_plans and model.nnunet_dataset")
    if path.is_dir():
        return _in_folder(request)
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file or folder; give a .pth file or a nnU-Net training folder")
    if folds is not None:
        raise ModelError(
            f"{path}: folds {', '.join(folds)} cannot be chosen from a single checkpoint file; leave "
            "model.folds unset or give the training folder"
        )
    return ModelFiles(
        path.parent,
        (path,),
        None,
        request.plans or _beside(path, "plans.json"),
        dataset=request.dataset or _beside(path, "dataset.json"),
    )


def _beside(checkpoint: Path, name: str) -> Path | None:
    """The file ``name`` in the checkpoint's folder or the one above, as given or where a link leads."""
    for folder in (checkpoint.absolute().parent, checkpoint.resolve().parent):
        for candidate in (folder / name, folder.parent / name):
            if candidate.is_file():
                return candidate
    return None


def _in_folder(request: ModelRequest) -> ModelFiles:
    root = path = request.path
    folds, checkpoint_name = request.folds, request.checkpoint_name
    if path.name.startswith(_FOLD) and (path / checkpoint_name).is_file():
        own = path.name.removeprefix(_FOLD)
        if folds is not None and tuple(folds) != (own,):
            raise ModelError(f"{path}: this is fold {own}, but folds {', '.join(folds)} are asked for; give its parent")
        root, folds = path.parent, (own,)
    elif folds is None:
        folds = _available_folds(path, checkpoint_name)
    if not folds or len(set(folds)) < len(folds):
        raise ModelError(f"{path}: model.folds names {list(folds)}, expected at least one fold and each once")
    checkpoints = tuple(root / f"{_FOLD}{fold}" / checkpoint_name for fold in folds)
    for checkpoint in checkpoints:
        if not checkpoint.is_file():
            raise ModelError(f"{checkpoint}: there is no such file; {_finding(root, checkpoint_name)}")
    for name, stated in (("plans.json", request.plans), ("dataset.json", request.dataset)):
        if stated is None and not (root / name).is_file():
            raise ModelError(f"{root / name}: the training folder lacks this file; copy it from where nnU-Net wrote it")
    plans, dataset = request.plans or root / "plans.json", request.dataset or root / "dataset.json"
    return ModelFiles(root, checkpoints, tuple(folds), plans, dataset=dataset)


def _available_folds(root: Path, checkpoint_name: str) -> tuple[str, ...]:
    """Find folds as nnU-Net detects them: every numbered fold in order of its name; if there is none, fold_all."""
    folders = [f for f in root.iterdir() if f.name.startswith(_FOLD) and (f / checkpoint_name).is_file()]
    names = sorted(folder.name.removeprefix(_FOLD) for folder in folders)
    numbered = tuple(name for name in names if name.isdecimal())
    if numbered:
        return numbered
    if "all" in names:
        return ("all",)
    raise ModelError(f"{root}: no fold_X folder holds a {checkpoint_name}; {_finding(root, checkpoint_name)}")


def _finding(root: Path, checkpoint_name: str) -> str:
    """What there is instead of the checkpoints that were asked for, and the keys that choose it."""
    there = sorted(f for f in (*root.glob("*.pth"), *root.glob("*/*.pth")) if is_visible(f.name))
    found = ", ".join(f.relative_to(root).as_posix() for f in there[:8]) or "none"
    return f"checkpoints found there: {found}; {instead(((f.parent.name, f.name) for f in there), checkpoint_name)}"


def instead(found: Iterable[tuple[str, str]], asked: str = CHECKPOINT_NAME) -> str:
    """The keys that choose what there is, of checkpoints (name of the folder, name of the file).

    The checkpoint that was asked for goes first, then the final one, the best, the latest.
    """
    folds: dict[str, list[str]] = {}
    for folder, name in found:
        if folder.startswith(_FOLD):
            folds.setdefault(name, []).append(folder.removeprefix(_FOLD))
    if not folds:
        return "give a nnU-Net training folder or a .pth file"
    known = (asked, CHECKPOINT_NAME, "checkpoint_best.pth", "checkpoint_latest.pth")
    name = next((name for name in known if name in folds), min(folds))
    numbers = sorted(folds[name])
    words = f"model.folds=[{','.join(numbers)}]"
    arguments = f"-f {' '.join(numbers)}"
    if name != CHECKPOINT_NAME:
        words, arguments = f"model.checkpoint_name={name} {words}", f"-chk {name} {arguments}"
    return f"to use what is there, set {words} (with from-nnunet {arguments})"
