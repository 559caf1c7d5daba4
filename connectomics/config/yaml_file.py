"""A YAML file as a mapping, read without bombs; ``load`` asks."""

from __future__ import annotations

import io
import typing
from collections.abc import Mapping
from pathlib import Path

import yaml  # type: ignore[import-untyped]  # OmegaConf's parser ships no types
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from connectomics.core.errors import ConfigError

_LARGEST_BYTES = 1 << 20
_MOST_VALUES = 100_000


def read_yaml(path: Path) -> Mapping[str, object]:
    """Return what a file holds; a ConfigError where it is no mapping, too large, or cannot be read."""
    where = f"configuration file {path}"
    try:
        with path.open("rb") as stream:
            data = stream.read(_LARGEST_BYTES + 1)
        if len(data) > _LARGEST_BYTES:
            raise ConfigError(f"{where} is larger than {_LARGEST_BYTES} bytes; give a YAML file of keys and values")
        text = data.decode("utf-8-sig")
        if _expanded(yaml.compose(text, yaml.SafeLoader), {}) > _MOST_VALUES:
            raise ConfigError(f"{where} has more than {_MOST_VALUES} values, repeated ones counted; write fewer")
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (YAMLError, RecursionError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}{_yaml_finding(error)}") from error  # PyYAML says a wrong !!int with a ValueError
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where} cannot be read: {first_line(error)}") from error
    except OSError as error:
        # OmegaConf raises an OSError without errno for a document that is a bare value
        finding = f"cannot be read: {error.strerror}" if error.strerror else "is not a mapping of keys"
        raise ConfigError(f"{where} {finding}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where} is not a mapping of keys but a list")
    return typing.cast(Mapping[str, object], content)


def _expanded(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many values a document has once its aliases are written out, of which there may be powers of powers."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # while it is open: it holds itself
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def _yaml_finding(error: Exception) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f", line {error.problem_mark.line + 1}: not valid YAML ({error.problem})"
    return f" is not valid YAML ({first_line(error)})"


def first_line(error: Exception) -> str:
    """Return what an error says first, at most 200 characters."""
    line = str(error).partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:200]} …"
