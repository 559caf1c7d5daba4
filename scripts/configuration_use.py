"""What the configuration of a package consists of, who takes it, and where its keys are written.

``scripts/structure.py`` measures with it; its docstring defines what is counted.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from package_source import PACKAGE, Definition, Function, Package, dotted, fields, kept_as, parameters, reads

STEPS = ("connected_components", "filters", "slice_linking", "watershed")


@dataclass(frozen=True, slots=True)
class Key:
    """A configuration key, the classes that declare it, and the names by which its section goes in the code."""

    name: str
    declared_by: frozenset[str]
    sections: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration consists of: its class, its sections, the classes of sections at any depth, its keys."""

    whole: str
    sections: frozenset[str]
    classes: frozenset[str]
    keys: Sequence[Key]


def settings(package: Package) -> Settings:
    """Find the configuration, by its class ``Config`` in the room ``config``, and the decoding steps by their names."""
    whole = [name for name in package.classes if re.fullmatch(rf"{PACKAGE}\.config(\.\w+)*\.Config", name)]
    keys: list[Key] = []
    top, classes = {"decoding"}, set[str]()

    def gather(name: str, above: tuple[str, ...]) -> None:
        one = package.classes[name]
        for field, annotation, _ in fields(one.node):
            inner = package.mentioned(one.module, annotation) & package.classes.keys()
            if inner:
                classes.update(inner)
                top.update([] if above else [field])
                for each in sorted(inner):
                    gather(each, (*above, field))
            else:
                keys.append(Key(".".join((*above, field)), frozenset([name]), (*above[-1:],) or ("config",)))

    for name in whole:
        gather(name, ())
    steps: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name, one in package.classes.items():
        step = _stated_name(one.node)
        for field, _, _ in fields(one.node) if step in STEPS else ():
            if field != "name":
                steps[step, field].add(name)
    for (step, field), owners in steps.items():
        parents = (step, "step", *sorted(owner.rpartition(".")[2] for owner in owners))
        keys.append(Key(f"decoding.{step}.{field}", frozenset(owners), parents))
    return Settings("".join(whole[:1]), frozenset(top), frozenset(classes), keys)


def _stated_name(node: ast.ClassDef) -> str:
    """Return the constant that a class gives its attribute ``name``."""
    for item in node.body:
        if isinstance(item, ast.Assign | ast.AnnAssign) and isinstance(item.value, ast.Constant):
            target = item.targets[0] if isinstance(item, ast.Assign) else item.target
            if dotted(target) == "name":
                return str(item.value.value)
    return ""


def takers(
    package: Package, kinds: Iterable[str], everything: Iterable[str], *, through_others: bool
) -> Iterator[tuple[Definition[ast.ClassDef | Function], set[str]]]:
    """Yield each function or record outside ``cli`` and ``config`` that takes one of these, and what it reads of it.

    With ``through_others`` also those that read it off another object.
    """
    meant, everything = package.with_aliases(set(kinds)), set(everything)
    outside = [one for one in package.definitions if not re.match(r"cli\b|cli_\w+\.py|config/", str(one.module.path))]
    taken: list[set[str]] = []
    kept: list[set[str]] = []
    for one in outside:
        if isinstance(one.node, ast.ClassDef):
            named = [(name, kind) for name, kind, _ in fields(one.node)]
        else:
            named = [(each.arg, each.annotation or ast.Name("object")) for each in parameters(one.node)]
        hidden = {"typing.Any", f"{one.module.name}.object"} if through_others else set()
        mine = {
            name
            for name, kind in named
            if package.mentioned(one.module, kind) & (meant | hidden if name == "config" else meant)
        }
        taken.append(mine)
        kept.append(mine if isinstance(one.node, ast.ClassDef) else kept_as(one.node, mine))
    holders: set[str] = set().union(*kept) if through_others else set()
    for one, mine, attributes in zip(outside, taken, kept, strict=True):
        own = {f"self.{name}" for name in attributes}
        around = one.owner if one.owner and one.node.name == "__init__" else one.node
        read = reads(one.node, mine, holders=set() if mine else holders, everything=everything)
        read |= reads(around, own, holders=(), everything=everything) if own else set()
        if mine or (read and isinstance(one.node, Function)):
            yield one, read


Taker = tuple[Definition[ast.ClassDef | Function], set[str]]


def handed_on(found: Iterable[Taker], kinds: Iterable[str]) -> list[Taker]:
    """Credit who hands a whole of these classes to another taker with what that one reads of it."""
    takers = list(found)
    whole = re.compile(rf"\b({'|'.join(kind.rpartition('.')[2] for kind in kinds) or '-'})\b")
    reads = {(one.owner if one.owner and one.node.name == "__init__" else one.node).name: read for one, read in takers}
    for _ in takers:  # one more hand each time
        for one, read in takers:
            mine = {
                each.arg
                for each in (parameters(one.node) if isinstance(one.node, Function) else ())
                if each.annotation is not None and whole.search(ast.unparse(each.annotation))
            }
            for call in ast.walk(one.node):
                if isinstance(call, ast.Call) and mine & {arg.id for arg in call.args if isinstance(arg, ast.Name)}:
                    read |= reads.get(dotted(call.func).rpartition(".")[2], set())
    return takers


def in_package(package: Package, key: Key) -> set[str]:
    """Return the files of the package in which a key is written."""
    last = key.name.rpartition(".")[2]
    found = {str(package.classes[owner].module.path) for owner in key.declared_by}
    spelled = re.compile(rf"\b({'|'.join(key.sections)}|{key.name.rpartition('.')[0]})(\[\S*\])?\.{last}\b")
    attributes = {f"{section}.{last}" for section in key.sections}
    for module in package.modules.values():
        said = any(map(spelled.search, (*module.strings, *module.docstrings.values())))
        quoted = "_" in last and last in module.strings
        knowing = any(origin.startswith(f"{PACKAGE}.config.") for origin in module.origins.values())
        if said or quoted or (knowing and not attributes.isdisjoint(module.attributes)):
            found.add(str(module.path))
    return found


def in_pages(pages: Mapping[str, str], key: Key) -> set[str]:
    """Return the pages in which a key is written."""
    last = key.name.rpartition(".")[2]
    spelled = re.compile(rf"\b({'|'.join(key.sections)})\.{last}\b|`{last}`|(?<![\w.]){last}(:\s|=)")
    return {name for name, text in pages.items() if spelled.search(text)}


def pages(root: Path) -> dict[str, str]:
    """Read README, docs and tutorials, without what is generated."""
    found = [
        *root.glob("README.md"),
        *root.glob("TROUBLE*.md"),
        *root.glob("docs/**/*.md"),
        *root.glob("tutorials/**/*.y*ml"),
    ]
    whole = re.compile(r"<!-- generated.*?<!-- end -->", re.DOTALL)
    return {path.relative_to(root).as_posix(): whole.sub("", path.read_text(encoding="utf-8")) for path in found}
