"""Finds nnU-Net's trainer classes by reading their source; imports only one that builds its own network.

nnunetv2's own search imports every trainer module it has, some of which need packages that are not installed.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnunetv2

from connectomics.errors import ModelError

ROOT_TRAINER = "nnUNetTrainer"
_BUILD = "build_network_architecture"


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
        Whether folders in the environment variable ``nnUNet_extTrainer`` may be searched (and imported) too.

    Raises
    ------
    ModelError
        If there is no such trainer, or its module cannot be imported.
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
    external = _external_trainer(name) if trust_code else None
    if external is None:
        raise ModelError(
            f"{where}: unknown trainer '{name}', not among the {len(stock_trainers())} of the installed "
            "nnunetv2; custom trainers come with model.trust_code=true and the environment variable "
            "nnUNet_extTrainer naming their folder"
        )
    return external


def _external_trainer(name: str) -> Any | None:
    from nnunetv2.paths import nnUNet_extTrainer
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    for folder in (nnUNet_extTrainer.get() or "").split(os.pathsep):
        if folder.strip() and Path(folder).is_dir():
            trainer = recursive_find_python_class(folder, name, None, base_folder=folder)
            if trainer is not None:
                return trainer
    return None
