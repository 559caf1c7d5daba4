"""The public API: its names are pinned, each is what its home defines, and the package itself imports nothing heavy."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import connectomics

PUBLIC = [
    "Box",
    "Config",
    "ConnectomicsError",
    "InferenceManager",
    "Prediction",
    "VolumeOutcome",
    "VolumeProcessor",
    "build_engine",
    "list_sources",
    "load_config",
    "open_volume",
    "read_spec",
]


def typed_homes() -> dict[str, str]:
    """Name and module as ``if TYPE_CHECKING`` states them, which is what type checkers see."""
    tree = ast.parse(Path(connectomics.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_the_public_names_are_these_and_at_most_twelve() -> None:
    assert connectomics.__all__ == PUBLIC
    assert len(PUBLIC) <= 12
    assert set(PUBLIC) <= set(dir(connectomics))
    assert set(typed_homes()) == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_name_is_what_its_home_defines(name: str) -> None:
    value = vars(importlib.import_module(typed_homes()[name]))[name]
    connectomics.__dict__.pop(name, None)
    assert getattr(connectomics, name) is value
    assert value.__module__ == typed_homes()[name]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Manager'; public are Box, .*InferenceManager"):
        connectomics.Manager  # noqa: B018 - the access is the test


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys; import connectomics; "
        "heavy = {'torch', 'numpy', 'omegaconf', 'nnunetv2', 'tensorstore'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); "
        "connectomics.open_volume('phantom:1x8x8').close(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
