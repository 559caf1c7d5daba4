"""Finds nnU-Net's trainer classes by reading their source; imports only one that builds its own network.

nnunetv2's own search imports every trainer module it has, some of which need packages that are not installed.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import logging
import os
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnunetv2

from connectomics.core.errors import ModelError, UnsafeModelError

ROOT_TRAINER = "nnUNetTrainer"
EXTERNAL = "nnUNet_extTrainer"
_BUILD = "build_network_architecture"
_FAILURES = (
    ImportError,
    SyntaxError,
    NameError,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    RuntimeError,
    OSError,
    AssertionError,
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainerSource:
    """Where a trainer class is defined, its bases, and whether it builds its own network."""

    name: str
    module: str
    bases: tuple[str, ...]
    builds_network: bool


@functools.cache
def stock_trainers() -> dict[str, TrainerSource]:
    """The trainer classes of the installed nnunetv2 by name."""
    root = Path(nnunetv2.__path__[0])
    found: dict[str, TrainerSource] = {}
    for path in sorted((root / "training" / "nnUNetTrainer").rglob("*.py")):
        module = ".".join(["nnunetv2", *path.relative_to(root).with_suffix("").parts])
        for trainer in _classes(path, module):
            found.setdefault(trainer.name, trainer)
    return found


def _classes(path: Path, module: str) -> Iterator[TrainerSource]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            bases = tuple(ast.unparse(base).rpartition(".")[2] for base in node.bases)
            methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            yield TrainerSource(node.name, module, bases, _BUILD in methods)


def _lineage(name: str) -> Iterator[TrainerSource]:
    """The class and its trainer bases, left to right, much as Python looks a method up."""
    trainer = stock_trainers().get(name)
    if trainer is not None:
        yield trainer
        for base in trainer.bases:
            yield from _lineage(base)


def own_network_trainer(name: str, *, where: str, trust_code: bool) -> Any | None:
    """The trainer class if it builds its own network, None if it builds what the plans say.

    Parameters
    ----------
    name
        The checkpoint's ``trainer_name``.
    where
        The checkpoint, for messages.
    trust_code
        Whether a trainer in a folder of the environment variable ``nnUNet_extTrainer`` may be imported: the one module
        that has it, and what that module imports.

    Raises
    ------
    ModelError
        If there is no such trainer, or its module cannot be imported.
    UnsafeModelError
        If it is in such a folder and ``trust_code`` is not set.
    """
    lineage = list(_lineage(name))
    if any(trainer.name == ROOT_TRAINER for trainer in lineage):
        if next(trainer for trainer in lineage if trainer.builds_network).name == ROOT_TRAINER:
            return None
        try:
            return vars(importlib.import_module(lineage[0].module))[name]
        except ImportError as error:
            raise ModelError(
                f"{where}: the trainer '{name}' builds its own network, but nnunetv2's module "
                f"{lineage[0].module} cannot be imported ({error}); install what it needs"
            ) from error
    outside = _external_module(name)
    if outside is None:
        raise ModelError(
            f"{where}: unknown trainer '{name:.80}', not among the {len(stock_trainers())} of the installed "
            "nnunetv2; custom trainers come with model.trust_code=true and the environment variable "
            "nnUNet_extTrainer naming their folder"
        )
    if not trust_code:
        raise UnsafeModelError(
            f"{where}: the trainer '{name}' is code outside of nnunetv2 ({outside.path}); nothing of it was run; if "
            "you trust it, set model.trust_code=true"
        )
    return _imported(outside, name, where)


@dataclass(frozen=True, slots=True)
class _ExternalModule:
    """A module in one of the folders of ``nnUNet_extTrainer``."""

    folder: Path
    name: str
    path: Path


def _external_module(trainer: str) -> _ExternalModule | None:
    """The first module that has the trainer, folders and modules in nnunetv2's order; nothing is imported."""
    for text in os.environ.get(EXTERNAL, "").split(os.pathsep):
        folder = Path(text.strip())
        if text.strip() and folder.is_dir():
            for module in _modules_in(folder.absolute(), folder.absolute(), ""):
                if trainer in _bound_names(module.path):
                    return module
    return None


def _modules_in(base: Path, folder: Path, prefix: str) -> Iterator[_ExternalModule]:
    """Modules of a folder, then those of its packages; what a package's __init__ has is in one of them."""
    found = sorted(pkgutil.iter_modules([str(folder)]), key=lambda module: module.name)
    for module in found:
        path = folder / f"{module.name}.py"
        if not module.ispkg and path.is_file():
            yield _ExternalModule(base, prefix + module.name, path)
    for module in found:
        if module.ispkg:
            yield from _modules_in(base, folder / module.name, f"{prefix}{module.name}.")


def _bound_names(path: Path) -> set[str]:
    """Names of classes that a file defines, imports or assigns."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        _log.warning("%s: passed over in the search for a trainer: %s", path, error)
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return names


def _imported(module: _ExternalModule, name: str, where: str) -> Any | None:
    """The trainer class, or None if it builds what the plans say."""
    try:
        with _importing_from(module):
            trainer = vars(importlib.import_module(module.name))[name]
            stock = vars(importlib.import_module(stock_trainers()[ROOT_TRAINER].module))[ROOT_TRAINER]
    except _FAILURES as error:
        raise ModelError(
            f"{where}: the trainer '{name}' cannot be imported from {module.path} ({type(error).__name__}: "
            f"{error!s:.160}); install what it needs or mend {EXTERNAL}"
        ) from error
    if not isinstance(trainer, type) or not issubclass(trainer, stock):
        raise ModelError(
            f"{where}: '{name}' in {module.path} is not a subclass of {ROOT_TRAINER}; nnU-Net would refuse it too, so "
            "derive it from that class"
        )
    own: Any = trainer
    return own if own.build_network_architecture is not stock.build_network_architecture else None


@contextlib.contextmanager
def _importing_from(module: _ExternalModule) -> Iterator[None]:
    """While open, the module's folder comes first; afterwards no module of it is known, so folders do not mix."""
    top = module.name.partition(".")[0]
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == top}
    known = set(sys.modules)
    sys.path.insert(0, str(module.folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(module.folder))
        for name in set(sys.modules) - known:
            file = vars(sys.modules[name]).get("__file__")
            if name.partition(".")[0] == top or (file and Path(file).is_relative_to(module.folder)):
                del sys.modules[name]
        sys.modules.update(before)
