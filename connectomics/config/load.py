"""From a YAML file and ``key=value`` words to one typed, validated ``Config``, with the steps of its ``decoding``.

Every refusal is a ConfigError of one sentence. Hydra's grammar is imported only when there are overrides.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import pickle
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from connectomics.config.key_rules import kind_in_words
from connectomics.config.python_values import parts_of, plain_value
from connectomics.config.schema import Config
from connectomics.config.validation import shown, validate
from connectomics.config.yaml_file import first_line, read_yaml
from connectomics.core.errors import ConfigError
from connectomics.core.features import DECODING_STEPS
from connectomics.core.places import local_path, refusal

_FILE_LIST = "inference.volume_mode.file_list"
_DECODING = "decoding"
_INTERPOLATION = re.compile(r"\$\{(?:[\w.]+|oc\.env:[^${}]+)\}")
_LITERAL = re.compile(r'(\\*)("|$)')
_WHOLE = 1 << 63  # integers beyond are none that the program could use
_ALIKE = 1.1  # of 2: at most 1 from the whole key and 1 from its last part


Given = str | os.PathLike[str] | Mapping[str, object]
"""What a file holds, or its name."""
Overrides = Sequence[str | Mapping[str, object]] | Mapping[str, object]
"""What is stated beside a file: words ``key=value``, values by key, nested or with dots, or several of both."""


def load_config(path: Given | None = None, overrides: Overrides = ()) -> Config:
    """Read a configuration.

    Parameters
    ----------
    path
        YAML file, or None for the defaults of the schema. Paths in it are used as they stand, that is
        relative to the working directory. A mapping is taken for the content of a file.
    overrides
        Words ``key=value`` in Hydra's override grammar, or a mapping of values, whose keys are nested or have dots;
        they win over the file, later ones over earlier ones.

    Returns
    -------
    Config
        Complete and validated. A single value given for a list becomes a list of one; a ``file_list`` that
        names a text file becomes the volumes listed in it, one a line (blank lines and # lines are skipped).

    Raises
    ------
    ConfigError
        If the file cannot be read, a key is unknown, or a value has the wrong type or is impossible.

    Examples
    --------
    >>> load_config(None, ["inference.sliding_window.window_size=[256,256]"]).inference.sliding_window.window_size
    [256, 256]
    >>> load_config({"system": {"device": "cpu"}}, {"system.num_cpus": 2}).system.num_cpus
    2
    """
    stated: dict[str, object] = {}
    if isinstance(path, Mapping):
        stated.update(_of_mapping(path))
    elif path is not None:
        file = local_path(path, "the configuration file")
        stated.update(_stated_in(read_yaml(file), "", f"configuration file {file}"))
    for part in parts_of(overrides):
        stated.update(_of_mapping(part) if isinstance(part, Mapping) else _override(part))
    config = _typed(_resolved(stated))
    validate(config)
    return config


def as_config(stated: Config | Given | None) -> Config:
    """The configuration that somebody means: itself, a YAML file, a mapping of values, or None for the defaults.

    Raises
    ------
    ConfigError
        As ``load_config``.
    """
    return stated if isinstance(stated, Config) else load_config(stated)


def _of_mapping(values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Dotted key and value of all that a mapping states, whose keys may have dots themselves."""
    where = "configuration"
    for name, value in values.items():
        key = str(name)
        if key not in kinds():
            raise _unknown(key, where)
        section, _, last = key.rpartition(".")
        yield from _stated_in({last: plain_value(key, value)}, f"{section}." if section else "", where)


def known_keys() -> tuple[str, ...]:
    """All dotted keys that hold a value, in the schema's order.

    Examples
    --------
    >>> known_keys()[:3]
    ('experiment_name', 'description', 'system.device')
    """
    return tuple(key for key, kind in kinds().items() if not dataclasses.is_dataclass(kind))


@functools.cache
def kinds() -> Mapping[str, Any]:
    """Return the type of every section and every value by its dotted key."""
    return dict(_schema(Config, ""))


def _schema(owner: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, kind in typing.get_type_hints(owner).items():
        yield prefix + name, kind
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _schema(kind, f"{prefix}{name}.")


def _stated_in(tree: Mapping[str, object], prefix: str, where: str) -> Iterator[tuple[str, object]]:
    """Dotted key and value of everything a nested mapping states; an unknown key is an error."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if "." in str(name):
            raise ConfigError(f"{where}: {shown(name)} has dots; keys in a mapping are nested, as in a: {{b: 1}}")
        if key not in kinds():
            raise _unknown(key, where)
        is_section = dataclasses.is_dataclass(kinds()[key])
        if is_section and isinstance(value, Mapping):
            yield from _stated_in(value, f"{key}.", where)
        elif is_section and value is not None:  # a section whose keys are all commented out is null
            raise ConfigError(f"{where}: {key} is a section with keys of its own, found {shown(value)}")
        elif isinstance(value, Mapping):
            raise ConfigError(f"{where}: {key} holds one value, found the keys {shown(list(value))}")
        elif not is_section:
            yield key, value


def _unknown(key: str, where: str) -> ConfigError:
    def likeness(known: str) -> float:
        return _ratio(key, known) + _ratio(key.rpartition(".")[2], known.rpartition(".")[2])

    nearest = max(kinds(), key=likeness)
    hint = f"the nearest known key is {nearest}"
    if likeness(nearest) < _ALIKE:
        hint = f"no known key is like it; the top level holds {', '.join(k for k in kinds() if '.' not in k)}"
    return ConfigError(f"{where}: unknown key {shown(key)}; {hint}")


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _override(text: str) -> Iterator[tuple[str, object]]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    where = f"override {shown(text)}"
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError, RecursionError) as error:
        name, mark, literal = text.lstrip("+").partition("=")
        if mark and kinds().get(name) in (str, str | None):
            return iter([(name, literal)])
        raise ConfigError(
            f"{where} cannot be read ({first_line(error)}); write key=value, and give a value with '=', "
            "commas or other signs quotes of its own: 'key=\"value\"'"
        ) from error
    if override.is_delete():
        raise ConfigError(f"{where} deletes a key, but every key has a value; write key=null or leave it out")
    if override.is_sweep_override():
        raise ConfigError(f"{where} asks for several runs; write a list as [a,b], or start one run a value")
    key, value = override.key_or_group, override.value()
    if override.package is not None:
        raise _unknown(f"{key}@{override.package}", where)
    if key not in kinds():
        raise _unknown(key, where)
    if value is None and dataclasses.is_dataclass(kinds()[key]):
        raise ConfigError(f"{where}: {key} is a section with keys of its own; set those")
    section, _, name = key.rpartition(".")
    return _stated_in({name: value}, f"{section}." if section else "", where)


def _resolved(stated: Mapping[str, object]) -> dict[str, object]:
    """The stated values with their interpolations replaced."""
    for key, value in stated.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.count("${") != len(_INTERPOLATION.findall(text)):
                raise ConfigError(f"{key} is {shown(text)}, but only ${{a.key}} and ${{oc.env:NAME}} are replaced")
    tree = pickle.loads(_untyped_defaults())  # noqa: S301 - our own bytes
    try:
        for key, value in stated.items():
            OmegaConf.update(tree, key, value)
        OmegaConf.resolve(tree)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"a ${{…}} in the configuration has no value: {first_line(error)}") from error
    values = {key: OmegaConf.select(tree, key) for key in stated}
    return {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in values.items()}


def _typed(values: Mapping[str, object]) -> Config:
    """The schema with ``values`` put in, each checked against its type."""
    config = pickle.loads(_typed_defaults())  # noqa: S301 - our own bytes
    for key, value in values.items():
        if key != _DECODING:
            _put(config, key, read_file_list(value) if key == _FILE_LIST and isinstance(value, str) else value)
    steps = read_steps(values.get(_DECODING, []))
    return dataclasses.replace(typing.cast(Config, OmegaConf.to_object(config)), decoding=steps)


def with_values(section: Any, values: Mapping[str, object]) -> Any:
    """Return a section, or the whole configuration, with other values at some dotted keys; they are not judged."""
    for key, value in values.items():
        name, _, rest = key.partition(".")
        own = with_values(getattr(section, name), {rest: value}) if rest else value
        section = dataclasses.replace(section, **{name: own})
    return section


@functools.cache
def _typed_defaults() -> bytes:
    """Return the schema as OmegaConf reads it, pickled: reading it takes longer than all the rest of loading."""
    config = OmegaConf.structured(Config)
    OmegaConf.set_readonly(config, False)  # OmegaConf takes a frozen dataclass for read-only
    for key, kind in kinds().items():
        if dataclasses.is_dataclass(kind):
            OmegaConf.set_readonly(OmegaConf.select(config, key), False)
    return pickle.dumps(config)


@functools.cache
def _untyped_defaults() -> bytes:
    """Return the defaults without their types, in which interpolations are looked up, pickled."""
    return pickle.dumps(OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(Config))))


def written(value: object) -> str:
    """A value as it stands behind ``key=`` on the command line.

    Examples
    --------
    >>> written([{"name": "filters", "min_voxels": 3, "max_voxels": None}])
    '[{name: "filters", min_voxels: 3, max_voxels: null}]'
    >>> print(written('a "größe"'))
    "a \\"größe\\""
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(written, value)) + "]"
    return f'"{_LITERAL.sub(_escaped, value)}"' if isinstance(value, str) else json.dumps(value)


def _escaped(found: re.Match[str]) -> str:
    """Backslashes before a quote or the end, doubled, and the quote behind one; Hydra takes all others as they are."""
    return found[1] * 2 + ('\\"' if found[2] else "")


def _put(config: DictConfig, key: str, value: object) -> None:
    stated = kind = kinds()[key]
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    is_list = typing.get_origin(kind) is list
    nested = is_list and typing.get_origin(typing.get_args(kind)[0]) is list
    if is_list and isinstance(value, str | int | float):
        value = [value]
    parts = value if is_list and isinstance(value, list) else [value]
    if nested:
        parts = [number for part in parts for number in (part if isinstance(part, list) else [part])]
    scalars = all(isinstance(part, str | int | float) and part != "???" for part in parts)
    scalars = scalars and all(-_WHOLE <= part < _WHOLE for part in parts if isinstance(part, int))
    try:
        if scalars or value is None:  # "???" is OmegaConf's sign for a missing value
            OmegaConf.update(config, key, value)
            return
    except OmegaConfBaseException:
        pass
    raise ConfigError(f"{key} is {shown(value)}, expected {kind_in_words(stated)}")


def read_file_list(value: str) -> list[str]:
    """The volumes named in a text file, one a line.

    Raises
    ------
    ConfigError
        If it cannot be read.
    """
    if refusal(value):
        raise ConfigError(f"{_FILE_LIST} is {shown(value)}, but {refusal(value)}")
    try:
        lines = [line.strip() for line in Path(value).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        finding = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(
            f"{_FILE_LIST} is {shown(value)}, which must be a text file, one volume a line, but: {finding}; "
            "write a volume itself as [path]"
        ) from error
    return [line for line in lines if line and not line.startswith("#")]


def read_steps(value: object) -> list[Any]:
    """Return the steps of a list of mappings.

    A step's keys are the fields of its class, a frozen dataclass that gives ``rules``; ``core.features`` names them.

    Raises
    ------
    ConfigError
        If it is no such list, a name or key is unknown, or a value has the wrong type or is impossible.
    """
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise ConfigError(
            f"decoding is {shown(value)}, expected a list of steps, such as [{{name: connected_components}}]"
        )
    steps = [_step(f"decoding[{i}]", item) for i, item in enumerate(value)]
    for i, step in enumerate(steps):
        for key, (possible, rule) in step.rules().items():
            if not possible:
                found = shown(dataclasses.asdict(step)[key])
                raise ConfigError(f"decoding[{i}].{key} is {found}, but {rule}")
    return steps


def _step(where: str, stated: Mapping[str, object]) -> Any:
    name = stated.get("name")
    if name not in DECODING_STEPS:
        known = DECODING_STEPS.names()
        raise ConfigError(
            f"{where}.name is {shown(name)}, known steps are {', '.join(known)}{_nearest(str(name), known)}"
        )
    kind = DECODING_STEPS.load(str(name))
    types_of = typing.get_type_hints(kind)
    hints = {field.name: types_of[field.name] for field in dataclasses.fields(kind)}
    values = {}
    for key, value in stated.items():
        if key not in hints:
            raise ConfigError(
                f"{where}: unknown key {shown(key)} of {name}, which has {', '.join(hints)}{_nearest(key, hints)}"
            )
        values[key] = _step_value(f"{where}.{key}", hints[key], value)
    return kind(**values)


def _nearest(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _step_value(key: str, hint: Any, value: object) -> Any:
    optional = isinstance(hint, types.UnionType)
    kind = typing.get_args(hint)[0] if optional else hint
    if value is None and optional:
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{key} is {shown(value)}, expected {kind_in_words(hint)}")
    if isinstance(value, str) and refusal(value):
        raise ConfigError(f"{key} is {shown(value)}, but {refusal(value)}")
    return str(value) if kind is str else value  # Hydra's quoted text is a class of its own
