"""The source of a package, read and never imported: definitions, where names come from, what is read of a parameter.

``scripts/structure.py`` measures with it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar

PACKAGE = "connectomics"
Function = ast.FunctionDef | ast.AsyncFunctionDef
Node = TypeVar("Node", bound=ast.AST, covariant=True)
SELF = ("self", "cls")
UNKNOWN = "?"
"""Stands for the first name of an attribute of something that has none, such as a call."""


@dataclass(frozen=True)
class Module:
    """A file of the package.

    Parameters
    ----------
    path
        Where it is below the package: ``io/tiff.py``.
    name
        How it is imported: ``connectomics.io.tiff``.
    text
        What it holds.
    tree
        The same, parsed.
    """

    path: PurePosixPath
    name: str
    text: str
    tree: ast.Module

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """Every node of the tree."""
        return tuple(ast.walk(self.tree))

    @cached_property
    def origins(self) -> Mapping[str, str]:
        """What each imported name means: ``Box`` is ``connectomics.geometry.Box``."""
        found = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for name in node.names:
                    root = name.name.partition(".")[0]
                    found[name.asname or root] = name.name if name.asname else root
            elif isinstance(node, ast.ImportFrom):
                room = self.name.split(".") if self.path.name == "__init__.py" else self.name.split(".")[:-1]
                above = room[: len(room) + 1 - node.level] if node.level else []
                start = ".".join([*above, *filter(None, [node.module])])
                found.update({name.asname or name.name: f"{start}.{name.name}" for name in node.names})
        return found

    @cached_property
    def docstrings(self) -> Mapping[int, str]:
        """The docstrings of module, classes and functions, by the identity of their node."""
        found = {}
        for node in self.nodes:
            if isinstance(node, ast.Module | ast.ClassDef | Function) and node.body:
                text = node.body[0].value if isinstance(node.body[0], ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[id(text)] = text.value
        return found

    @cached_property
    def strings(self) -> Sequence[str]:
        """Strings other than docstrings, pieces of f-strings among them."""
        return [
            node.value
            for node in self.nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in self.docstrings
        ]

    @cached_property
    def attributes(self) -> Collection[str]:
        """Every attribute with the name in front of it, without its underscores: ``output.formats``."""
        found = (dotted(node).split(".")[-2:] for node in self.nodes if isinstance(node, ast.Attribute))
        return {f"{owner.lstrip('_')}.{name}" for owner, name in found}

    @cached_property
    def identifiers(self) -> Sequence[str]:
        """Every name that stands in the code, as often as it stands there, and the names of file and folders."""
        found = [*self.path.with_suffix("").parts]
        for node in self.nodes:
            for field in ("id", "arg", "attr", "name", "asname", "module"):
                value = getattr(node, field, None)  # of syntax trees, whose nodes have one or another
                if isinstance(value, str):
                    found += value.split(".")
        return found


@dataclass(frozen=True, slots=True)
class Definition(Generic[Node]):
    """A class or function; ``name`` holds the names around it (``Runner.run``), ``owner`` is its class."""

    module: Module
    name: str
    node: Node
    owner: ast.ClassDef | None

    def __str__(self) -> str:
        return f"{self.module.path}: {self.name}"


def _definitions(
    module: Module, node: ast.AST, around: str, owner: ast.ClassDef | None
) -> Iterator[Definition[ast.ClassDef | Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | Function):
            yield Definition(module, around + child.name, child, owner)
            inner = child if isinstance(child, ast.ClassDef) else None
            yield from _definitions(module, child, f"{around}{child.name}.", inner)
        else:
            yield from _definitions(module, child, around, owner)


def dotted(node: ast.AST) -> str:
    """Return ``a.b.c`` for such an expression; what is no name is ``?``."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.NamedExpr):
        return dotted(node.value)
    return node.id if isinstance(node, ast.Name) else UNKNOWN


def parameters(node: Function) -> list[ast.arg]:
    """Return all parameters, starred ones too."""
    every = node.args
    starred = [one for one in (every.vararg, every.kwarg) if one is not None]
    return [*every.posonlyargs, *every.args, *every.kwonlyargs, *starred]


def fields(node: ast.ClassDef) -> list[tuple[str, ast.expr, ast.expr | None]]:
    """Return name, annotation and default of the annotated names of a class, without ``ClassVar`` and ``KW_ONLY``."""
    return [
        (item.target.id, item.annotation, item.value)
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and not re.match(r"'?(\w+\.)?(ClassVar|KW_ONLY)\b", ast.unparse(item.annotation))
    ]


def is_record(node: ast.ClassDef) -> bool:
    """Tell whether a class is a dataclass, a named tuple or a typed dictionary."""
    marks = [mark.func if isinstance(mark, ast.Call) else mark for mark in node.decorator_list]
    names = {dotted(mark).rpartition(".")[2] for mark in [*marks, *node.bases]}
    return bool(names & {"dataclass", "NamedTuple", "TypedDict"})


def aliases(module: Module) -> Iterator[tuple[str, ast.expr]]:
    """Yield the type aliases at the top of a module, ``NewType`` and ``TypeVar`` among them, with what they mean.

    An alias is assigned a name, an attribute, a subscript or a union, and its own name is written LikeThis.
    """
    outer = [*module.tree.body, *(item for node in module.tree.body if isinstance(node, ast.If) for item in node.body)]
    for node in outer:
        target = (
            node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", getattr(node, "name", None))
        )
        value = getattr(node, "value", None)
        if not isinstance(target, ast.Name) or not re.fullmatch(r"_?[A-Z]\w*[a-z]\w*|_?[A-Z]", target.id):
            continue
        made = isinstance(value, ast.Call) and dotted(value.func).rpartition(".")[2] in ("NewType", "TypeVar")
        stated = isinstance(node, ast.AnnAssign) and dotted(node.annotation).endswith("TypeAlias")
        named = isinstance(value, ast.Name | ast.Attribute | ast.Subscript | ast.BinOp)
        if isinstance(value, ast.expr) and (made or stated or named):
            yield target.id, value


class Package:
    """The files of the package below ``root`` without generated ones, whose first line is a comment that says so."""

    def __init__(self, root: Path) -> None:
        folder = root / PACKAGE
        self.modules: dict[str, Module] = {}
        for path in sorted(folder.rglob("*.py")):
            below = PurePosixPath(path.relative_to(folder).as_posix())
            name = ".".join([PACKAGE, *below.with_suffix("").parts]).removesuffix(".__init__")
            text = path.read_text(encoding="utf-8")
            if not re.match(r"#.*\bgenerated\b", text, re.IGNORECASE):
                self.modules[name] = Module(below, name, text, ast.parse(text, str(path)))
        self.definitions = [one for each in self.modules.values() for one in _definitions(each, each.tree, "", None)]
        self.classes = {
            f"{one.module.name}.{one.name}": Definition(one.module, one.name, one.node, one.owner)
            for one in self.definitions
            if isinstance(one.node, ast.ClassDef)
        }

    def origin(self, module: Module, text: str) -> str:
        """Return what a dotted name means in a module, through imports and what other modules import again."""
        root, _, rest = text.partition(".")
        full = ".".join(filter(None, [module.origins.get(root, f"{module.name}.{root}"), rest]))
        while True:
            where, _, name = full.rpartition(".")
            further = self.modules[where].origins.get(name, full) if where in self.modules else full
            if further == full:
                return full
            full = further

    def mentioned(self, module: Module, annotation: ast.AST) -> set[str]:
        """Return what all names of an annotation mean, quoted ones too."""
        found = set()
        for node in ast.walk(annotation):
            if isinstance(node, ast.Name | ast.Attribute):
                found.add(self.origin(module, dotted(node)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                try:
                    found |= self.mentioned(module, ast.parse(node.value, mode="eval"))
                except SyntaxError:
                    continue  # the text of a Literal
        return found

    def with_aliases(self, kinds: Collection[str]) -> set[str]:
        """Add the type aliases and subclasses of classes, and those of these."""
        found: set[str] = set(kinds)
        stated = [
            (f"{module.name}.{name}", self.mentioned(module, value))
            for module in self.modules.values()
            for name, value in aliases(module)
        ]
        for name, one in self.classes.items():
            stated += [(name, self.mentioned(one.module, base)) for base in one.node.bases]
        while more := {name for name, meant in stated if meant & found} - found:
            found |= more
        return found

    def record_fields(self, name: str) -> int:
        """Count the fields of a record, inherited ones too."""
        one = self.classes[name]
        above = {self.origin(one.module, dotted(base)) for base in one.node.bases}
        return len(fields(one.node)) + sum(self.record_fields(base) for base in above & self.classes.keys())


def _assigned(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    if isinstance(node, ast.NamedExpr | ast.AnnAssign) and node.value is not None:
        yield node.target, node.value
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, node.value.elts, strict=False)
            else:
                yield target, node.value


def kept_as(node: ast.AST, names: Collection[str]) -> set[str]:
    """Return the attributes of ``self`` in which some of these names are kept."""
    return {
        target.attr
        for statement in ast.walk(node)
        for target, value in _assigned(statement)
        if isinstance(target, ast.Attribute) and dotted(target.value) == "self" and dotted(value) in names
    }


def reads(scope: ast.AST, roots: Collection[str], *, holders: Collection[str], everything: Collection[str]) -> set[str]:
    """Return what is read of a value: ``inference.output.formats`` for ``config.inference_keys.output.formats``.

    Parameters
    ----------
    scope
        The function or class that reads.
    roots
        The value's names in it: ``config``, ``self.config``.
    holders
        Attributes that hold the value in other objects: ``config`` of ``engine.config.system``.
    everything
        What is read where the value is turned into a mapping.
    """
    names = dict.fromkeys(roots, "")

    def meaning(node: ast.AST) -> str | None:
        text = dotted(node)
        for name, stands_for in names.items():
            if text == name or text.startswith(name + "."):
                return (stands_for + text[len(name) :]).strip(".")
        parts = text.split(".")
        for n, part in enumerate(parts):
            if part in holders and n > (parts[0] in SELF):
                return ".".join(parts[n + 1 :])
        return None

    found = set()
    for _ in range(2):  # once more for names that are bound below their use, as in loops
        for node in ast.walk(scope):
            for target, value in _assigned(node):
                meant = meaning(value) if isinstance(value, ast.Name | ast.Attribute) else None
                if isinstance(target, ast.Name) and meant is not None:
                    names[target.id] = meant
            if isinstance(node, ast.Attribute):
                found.add(meaning(node) or "")
            elif isinstance(node, ast.Call) and node.args and meaning(node.args[0]) == "":
                called = dotted(node.func).rpartition(".")[2]
                found |= set(everything) if called in ("asdict", "astuple", "fields") else set()
                found |= {word.arg for word in node.keywords if word.arg} if called == "replace" else set()
    return {one for one in found if one and not any(other.startswith(one + ".") for other in found)}
