"""Measure how the package is laid out, and print a table of before and now: ``make structure``.

Everything is counted in the source, which is parsed and never imported. ``--details`` lists what was counted,
``--check`` names each thing over a limit and exits with 1, ``--json`` prints the figures; ``structure_before.json``
holds those of before the move. Files whose first line is a comment with the word "generated" do not count anywhere.

rooms, files in a room
    A room is a folder that holds a .py file other than ``__init__.py``; these files are counted, each folder by itself.
largest file, largest function
    All lines of a file; the lines of a function or method from ``def`` to its end, decorators not included.
lines
    All lines of all files, except those in ``connectomics/testing``.
functions that take the configuration
    ``cli``, ``cli*.py`` and ``config`` are left out. A function counts if the annotation of a parameter names the
    class ``Config`` of the room ``config``: optional, quoted, in a list, as what a callable returns, by an imported
    name, an alias or a subclass; also if a parameter called ``config`` is Any or object. A record with such a field
    counts, and a function that reads the configuration off another object (``engine.config.system``). A section is a
    field of ``Config`` whose type is a class, or ``decoding``. A section is read where its attribute is, also through
    a local name; ``__init__`` reads what its class reads through the attribute that keeps the configuration. Who hands
    the configuration on as a whole is credited with what that function reads.
functions that take a section to read one field
    The same for parameters annotated with the class of a section, at any depth, if they read at most one field.
records over 8 fields
    Dataclasses, named tuples and typed dictionaries, with the fields they inherit from classes of the package.
calls over 4 positional arguments
    Calls of functions, classes and methods that are defined in the package (methods are known by their name alone), and
    calls of parameters and local names. A starred argument is one; arguments of ``partial`` count as its function's.
names that mean two things
    Names of several classes, nested ones too, and of type aliases that are not the same everywhere. Names that differ
    only by underscores in front are counted apart.
file names in two folders
    Names of files other than ``__init__.py`` and ``__main__.py``.
files in which a key is written
    The keys are the leaves of ``Config`` and the fields of decoding steps but ``name``. A file of the package counts
    if it declares the key, if a string or docstring has the key behind its section (``output.formats``), if a string
    is the key and has an underscore, or if it imports from ``config`` and has the key as an attribute of its section.
    A page (README, troubleshooting, docs, tutorials) counts if it has the key behind its section, in backticks, or
    before ``:`` or ``=``; what stands between ``<!-- generated`` and ``<!-- end -->`` does not count.
files that know a word
    Files of the package in which an identifier, a file name or a string, docstrings not included, has the whole word.
identifiers that are metaphors
    Identifiers, as often as they stand in the code, that have one of the words among their words.
docstrings
    Of modules, classes and functions: first word "Of"; first paragraph without punctuation at its end.
make test
    The seconds that ``make test`` wrote to ``.make-test-seconds`` when it last passed. The 840 of before are the 14
    minutes that were known when the work began; this script did not measure them.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configuration_use import STEPS, Settings, handed_on, in_package, in_pages, pages, settings, takers
from package_source import PACKAGE, Function, Module, Package, aliases, dotted, is_record

BEFORE = Path(__file__).with_name("structure_before.json")
FILES, FILE_LINES, FUNCTION_LINES, LINES = 15, 400, 60, 30274
TAKERS, SECTIONS, FIELDS, POSITIONAL, SECONDS = 25, 3, 8, 4, 420

WIDE: Mapping[str, str] = {
    "SystemConfig": "mirrors the YAML",
    "ModelConfig": "mirrors the YAML",
    "InferenceConfig": "mirrors the YAML",
    "Watershed": "mirrors the YAML",
    "_NiftiHeader": "mirrors the header of a NIfTI file",
    "NetworkPlan": "mirrors nnU-Net's plans",
    "NnunetCall": "mirrors the arguments of nnUNetv2_predict",
    "RunReport": "mirrors report.json",
    "Manifest": "mirrors manifest.json",
    "ModelSpec": "mirrors nnU-Net's plans and dataset.json",
    "Trial": "mirrors an entry of the file that tune keeps",
}
"""Records that may have more fields, and why: what mirrors YAML, a file header or nnU-Net's plans."""

LONG_CALLS: Mapping[str, str] = {
    "key": "takes any number of rules",
    "hashed": "takes any number of integers to hash",
    "log.info": "takes what fills its message by position",
}
"""Callees, as they stand in the code, that may be given more positional arguments, and why."""

PUBLIC: Mapping[str, str] = {"list_sources": "is a name of the package's interface, which takes the configuration"}
"""Functions that may take the whole configuration though they read less of it, and why."""

SAME_MEANING: Mapping[str, str] = {
    "cascade.py": "nnU-Net's cascade: making its engines, running its stages, feeding labels to a network",
    "contract.py": "the Protocol of a seam and its values",
    "filters.py": "filters of whole objects: the arithmetic, and where a run applies them",
    "forecast.py": "the forecast of a run: the command, and the values",
    "hdf5.py": "the format HDF5: reading and writing",
    "memory.py": "memory that a block's work takes: counting it, and asking for a volume",
    "n5.py": "the format N5: reading and writing",
    "nifti.py": "the format NIfTI: reading it, and writing as nnU-Net does",
    "precomputed.py": "the format precomputed: reading and writing",
    "task.py": "a task of blocks: the contract, and the one that predicts",
    "tiff.py": "the format TIFF: reading and writing",
    "volume.py": "one volume: the contract, the phantom, a run",
    "volumes.py": "the volumes of a call: what is made for each, and what each will take",
    "zarr.py": "the format Zarr: reading and writing",
}
"""File names that may stand in several folders, and the one thing they mean."""

SAYING_NOTHING = ("build", "dist", "env", "lib", "out", "tmp", "utils", "util", "helpers", "misc", "common")
METAPHORS = (
    *("house", "scene", "room", "workshop", "ledge", "lane"),
    *("foresight", "continuation", "silence", "frugal", "remembering"),
)
FORMATS = ("h5", "zarr", "tiff", "png", "zarr2", "n5", "precomputed")
BACKENDS = ("openvino",)  # torch and compile are words of Python and of its libraries too


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of the table: what is shown, what is allowed, the things over it, and all that was counted."""

    label: str
    shown: str
    limit: str = ""
    over: Sequence[str] = ()
    details: Sequence[str] = ()


def largest(label: str, sizes: Mapping[str, int], limit: int) -> Figure:
    """Return the row of a largest size."""
    ranked = sorted(sizes.items(), key=lambda item: -item[1])
    lines = [f"{name}: {size}" for name, size in ranked]
    shown = f"{ranked[0][1]} ({ranked[0][0]})" if ranked else "0"
    return Figure(label, shown, str(limit), [f"{name}: {size}" for name, size in ranked if size > limit], lines)


def none_of(label: str, found: Iterable[str], allowed: int = 0) -> Figure:
    """Return the row of things of which there may be none, or few."""
    lines = sorted(found)
    return Figure(label, str(len(lines)), str(allowed), lines if len(lines) > allowed else [], lines)


def excepted(label: str, found: Mapping[str, object], exceptions: Mapping[str, str]) -> Figure:
    """Return the row of things of which only the exceptions may be there; an exception that nothing needs is named."""
    names = {line: line.rpartition(": ")[2] for line in found}
    over = [f"{line} ({amount})" for line, amount in found.items() if names[line] not in exceptions]
    fine = [
        f"{line} ({amount}) {exceptions[names[line]]}" for line, amount in found.items() if names[line] in exceptions
    ]
    rotten = [f"the exception {name} is not needed" for name in exceptions if name not in names.values()]
    return Figure(label, f"{len(over)} and {len(fine)} excepted", "0", over + rotten, over + fine)


def rooms(package: Package) -> dict[str, int]:
    """Count the files of each folder."""
    files = [each.path for each in package.modules.values() if each.path.name != "__init__.py"]
    return dict(sorted(Counter(f"{PACKAGE}/{path.parent}".removesuffix("/.") for path in files).items()))


def sizes(package: Package) -> list[Figure]:
    """Measure rooms, files, functions and all lines."""
    modules = list(package.modules.values())
    functions = {
        str(one): (one.node.end_lineno or 0) - one.node.lineno + 1
        for one in package.definitions
        if isinstance(one.node, Function)
    }
    lines = {str(each.path): len(each.text.splitlines()) for each in modules}
    total = sum(lines[str(each.path)] for each in modules if each.path.parts[0] != "testing")
    found = rooms(package)
    return [
        Figure("rooms", str(len(found)), details=[f"{room}: {count}" for room, count in found.items()]),
        largest("files in the fullest room", found, FILES),
        largest("largest file, lines", lines, FILE_LINES),
        largest("largest function, lines", functions, FUNCTION_LINES),
        Figure("lines, without testing and generated files", str(total), str(LINES), [f"{total}"] * (total > LINES)),
    ]


def configuration(package: Package, known: Settings) -> list[Figure]:
    """Count who takes the configuration, or a section of it for one field."""
    taken = handed_on(takers(package, [known.whole], known.sections, through_others=True), [known.whole])
    found = [(str(one), read, sorted({key.partition(".")[0] for key in read} & known.sections)) for one, read in taken]
    lines = [f"{where} reads {', '.join(top) or 'nothing'} ({len(read)} keys)" for where, read, top in found]
    narrow = [(where, top) for where, _, top in found if len(top) < SECTIONS and where.split()[-1] not in PUBLIC]
    of_sections = handed_on(takers(package, known.classes, ("all", "fields"), through_others=False), known.classes)
    one_field = [
        f"{one} reads {', '.join(read) or 'nothing'}"
        for one, read in of_sections
        if len({key.partition(".")[0] for key in read}) < 2 and isinstance(one.node, Function)
    ]
    return [
        none_of("functions that take the configuration", lines, TAKERS),
        none_of(
            "of these, reading fewer than 3 sections",
            [f"{where} reads {', '.join(top) or 'nothing'}" for where, top in narrow],
        ),
        Figure("of these, reading no key or one", str(sum(len(read) < 2 for _, read, _ in found))),
        none_of("functions that take a section to read one field", one_field),
    ]


def callee(node: ast.Call) -> tuple[str, int]:
    """Return the name of what is called and the count of its positional arguments, looking through ``partial``."""
    name = dotted(node.func)
    if name.rpartition(".")[2] == "partial" and node.args:
        return dotted(node.args[0]), len(node.args) - 1
    return name, len(node.args)


def is_ours(package: Package, module: Module, name: str, defined: set[str]) -> bool:
    """Tell whether a callee is defined in the package, or a local name that may stand for anything."""
    root, _, rest = name.partition(".")
    if root in module.origins:
        return package.origin(module, name).startswith(f"{PACKAGE}.")
    return name.rpartition(".")[2] in defined if rest else name != "?" and not hasattr(builtins, name)


def shapes(package: Package) -> list[Figure]:
    """Count wide records and long calls."""
    records = {str(one): package.record_fields(name) for name, one in package.classes.items() if is_record(one.node)}
    wide = [name for name, count in records.items() if count > FIELDS]
    defined = {one.node.name for one in package.definitions}
    calls = {}
    for module in package.modules.values():
        for node in module.nodes:
            name, given = callee(node) if isinstance(node, ast.Call) else ("", 0)
            if isinstance(node, ast.Call) and is_ours(package, module, name, defined):
                calls[f"{module.path}:{node.lineno}:{node.col_offset}: {name}"] = given
    long = [name for name, given in calls.items() if given > POSITIONAL]
    return [
        excepted("records over 8 fields", {name: records[name] for name in wide}, WIDE),
        excepted("calls over 4 positional arguments", {name: calls[name] for name in long}, LONG_CALLS),
    ]


def names(package: Package) -> list[Figure]:
    """Find names that mean two things, or nothing."""
    meanings: dict[str, dict[str, str]] = defaultdict(dict)
    for full, one in package.classes.items():
        meanings[one.node.name][full] = str(one)
    for module in package.modules.values():
        for name, value in aliases(module):
            meanings[name].setdefault(ast.unparse(value), f"{module.path}: {name} = {ast.unparse(value)}")
    same = [f"{name}: {'; '.join(found.values())}" for name, found in meanings.items() if len(found) > 1]
    near: dict[str, list[str]] = defaultdict(list)
    for name in meanings:
        near[name.lstrip("_")].append(name)
    underscored = [", ".join(sorted(group)) for group in near.values() if len(group) > 1]
    folders: dict[str, list[str]] = defaultdict(list)
    for module in package.modules.values():
        if module.path.name not in ("__init__.py", "__main__.py"):
            folders[module.path.name].append(str(module.path.parent))
    twice = {name: ", ".join(places) for name, places in folders.items() if len(places) > 1}
    words = {part for module in package.modules.values() for part in module.path.with_suffix("").parts}
    return [
        none_of("names of classes and aliases that mean two things", same),
        Figure("names that differ by underscores only", str(len(underscored)), details=underscored),
        excepted("file names in two folders", twice, SAME_MEANING),
        none_of("files and folders whose name says nothing", words & set(SAYING_NOTHING)),
    ]


def homes(package: Package, known: Settings, written: Mapping[str, str]) -> list[Figure]:
    """Count the files in which keys are written and those that know a feature."""
    places = {key.name: sorted(in_package(package, key)) for key in known.keys}
    told = {key.name: sorted(in_pages(written, key)) for key in known.keys}
    figures = []
    for label, found in (("files of the package", places), ("pages", told)):
        counts = [len(files) for files in found.values()] or [0]
        ranked = sorted(found.items(), key=lambda item: -len(item[1]))
        lines = [f"{key}: {len(files)} ({', '.join(files)})" for key, files in ranked]
        shown = f"{statistics.median(counts):g} / {max(counts)}"
        figures.append(Figure(f"{label} in which a key is written, median / most", shown, details=lines))
    groups = {"of precision": ("precision",), "each format": FORMATS, "each step": STEPS, "a backend": BACKENDS}
    for label, group in groups.items():
        knowing = {word: [str(m.path) for m in package.modules.values() if knows(m, word)] for word in group}
        shown = ", ".join(f"{word} {len(files)}" for word, files in knowing.items())
        lines = [f"{word}: {', '.join(files)}" for word, files in knowing.items()]
        figures.append(Figure(f"files that know {label}", shown, details=lines))
    return figures


def knows(module: Module, word: str) -> bool:
    """Tell whether a word stands in an identifier or a string."""
    whole = re.compile(rf"(?<![A-Za-z0-9]){word}(?![A-Za-z0-9])")
    return any(map(whole.search, module.identifiers)) or any(map(whole.search, module.strings))


def wording(package: Package) -> list[Figure]:
    """Count metaphors and docstrings that are no sentences."""
    metaphors: Counter[str] = Counter()
    of, unended = [], []
    for module in package.modules.values():
        for name in module.identifiers:
            parts = {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
            metaphors.update(f"{word} in {module.path}" for word in METAPHORS if parts & {word, f"{word}s"})
        for text in module.docstrings.values():
            first = text.strip().split("\n\n")[0]
            of += [f"{module.path}: {first[:60]}"] if re.match(r"Of\b", first) else []
            unended += [f"{module.path}: {first[-60:]}"] if not re.search(r"[.!?:]\W*$", first) else []
    lines = [f"{where}: {count}" for where, count in sorted(metaphors.items())]
    return [
        Figure("identifiers that are metaphors", str(sum(metaphors.values())), "0", lines, lines),
        none_of("docstrings that begin with Of", of),
        none_of("docstrings without a full stop", unended),
    ]


def figures(package: Package, root: Path, seconds: float | None = None) -> list[Figure]:
    """Measure a checkout."""
    known = settings(package)
    record = root / ".make-test-seconds"
    if seconds is None and record.exists():
        seconds = float(record.read_text())
    slow = [f"{seconds:g}"] if seconds is not None and seconds > SECONDS else []
    return [
        *sizes(package),
        *configuration(package, known),
        *shapes(package),
        *names(package),
        *homes(package, known, pages(root)),
        *wording(package),
        Figure("make test, seconds", "not measured" if seconds is None else f"{seconds:g}", str(SECONDS), slow),
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(words: Sequence[str] | None = None) -> int:
    """Print the table, and return 1 where ``--check`` finds something over a limit."""
    parser = argparse.ArgumentParser(description="Measure how the package is laid out.")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="another checkout")
    parser.add_argument("--before", type=Path, default=BEFORE, help="figures that --json wrote")
    parser.add_argument("--test-seconds", type=float, help="what make test took, instead of what it wrote down")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--details", action="store_true", help="list what was counted")
    parser.add_argument(
        "--check", action="store_true", help="name what is over a limit, and exit with 1 if anything is"
    )
    stated = parser.parse_args(words)
    package = Package(stated.root)
    found = figures(package, stated.root, stated.test_seconds)
    now: dict[str, dict[str, object]] = {
        "figures": {each.label: each.shown for each in found},
        "rooms": {**rooms(package)},
    }
    if stated.json:
        print(json.dumps(now, indent=2, ensure_ascii=False))
        return 0
    before = json.loads(stated.before.read_text(encoding="utf-8"))
    rows = [[each.label, before["figures"].get(each.label, "?"), each.shown, each.limit] for each in found]
    print(table(["what", "before", "now", "limit"], rows), end="\n\n")
    every = sorted({**before["rooms"], **now["rooms"]})
    counts = [[room, *(str(side["rooms"].get(room, "-")) for side in (before, now))] for room in every]
    print(table(["files a folder", "before", "now"], counts))
    for each in found if stated.details else ():
        print(f"\n{each.label}", *each.details, sep="\n  ")
    over = [f"{each.label} (limit {each.limit}): {line}" for each in found for line in each.over]
    if stated.check and over:
        print(*over, sep="\n", file=sys.stderr)
    return int(stated.check and bool(over))


if __name__ == "__main__":
    sys.exit(main())
