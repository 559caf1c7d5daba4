"""``scripts/structure.py`` counts right in small made-up packages, so its check can fail."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "structure.py"
SCHEMA = '''"""The schema."""
from __future__ import annotations
from dataclasses import dataclass, field

@dataclass
class Output:
    formats: list[str]
    overwrite: bool = False

@dataclass
class Inference:
    precision: str
    output: Output

@dataclass
class System:
    device: str = "auto"
    backend: str = "torch"

@dataclass
class Model:
    folds: list[str]

@dataclass
class Config:
    system: System
    model: Model
    inference: Inference
    decoding: list[object]
'''
CONFIG = "from connectomics.config.schema import Config\n"
TAKING = "functions that take the configuration"
FEW = "of these, reading fewer than 3 sections"
ONE_FIELD = "functions that take a section to read one field"
RECORDS = "records over 8 fields"
CALLS = "calls over 4 positional arguments"
HOMONYMS = "names of classes and aliases that mean two things"
FILE_NAMES = "file names in two folders"


@pytest.fixture(scope="module")
def structure() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        spec = importlib.util.spec_from_file_location("structure_script", SCRIPT)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        for table in ("WIDE", "LONG_CALLS", "SAME_MEANING"):
            patch.setattr(module, table, {})
        yield module


class Checkout:
    """A folder with a package in it, and its figures."""

    def __init__(self, structure: ModuleType, root: Path) -> None:
        self.structure, self.root = structure, root

    def write(self, files: Mapping[str, str]) -> None:
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def figure(self, label: str, **files: str) -> Any:
        """Write modules of the package (``io__tiff`` is io/tiff.py, as is ``io/tiff``), and measure."""
        paths = {name if "/" in name else name.replace("__", "/"): text for name, text in files.items()}
        self.write({f"connectomics/{path}.py": text for path, text in paths.items()})
        found = self.structure.figures(self.structure.Package(self.root), self.root)
        (figure,) = (each for each in found if each.label == label)
        return figure

    def over(self, label: str, **files: str) -> list[str]:
        return list(self.figure(label, **files).over)


@pytest.fixture
def checkout(structure: ModuleType, tmp_path: Path) -> Checkout:
    return Checkout(structure, tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(device: str) -> str: ...", []),
        (CONFIG + "def f(config: Config) -> None: ...", ["f"]),
        (CONFIG + "def f(*, config: Config | None = None) -> None: ...", ["f"]),
        (CONFIG + "async def f(*config: Config) -> None: ...", ["f"]),
        (CONFIG + "from typing import Optional\ndef f(config: Optional[Config]) -> None: ...", ["f"]),
        (CONFIG + "def f(config: 'Config | None') -> None: ...", ["f"]),
        (CONFIG + "def f(made: Callable[[str], Config]) -> None: ...", ["f"]),
        ("from connectomics.config import schema\ndef f(config: schema.Config) -> None: ...", ["f"]),
        ("import connectomics.config.schema as s\ndef f(config: s.Config) -> None: ...", ["f"]),
        ("import connectomics.config.schema\ndef f(c: connectomics.config.schema.Config) -> None: ...", ["f"]),
        ("from ..config.schema import Config as Whole\ndef f(config: Whole) -> None: ...", ["f"]),
        ("from connectomics.room.shared import Whole\ndef f(config: Whole) -> None: ...", ["f"]),
        ("from connectomics.room.shared import Config\ndef f(config: Config) -> None: ...", ["f"]),
        ("from connectomics.room.shared import Wider\ndef f(config: Wider) -> None: ...", ["f"]),
        ("from typing import Any\ndef f(config: Any) -> None: ...", ["f"]),
        ("def f(config: object) -> None: ...", ["f"]),
        ("def f(config) -> None: ...", ["f"]),
        ("from elsewhere import Config\ndef f(config: Config) -> None: ...", []),
        ("class Config: ...\ndef f(config: Config) -> None: ...", []),
        ("from typing import Any\ndef f(configuration: Any) -> None: ...", []),
        (CONFIG + "def f() -> Config: ...", []),
        (CONFIG + "class A:\n    def f(self, config: Config) -> None: ...", ["A.f"]),
        (
            CONFIG + "@dataclass\nclass A:\n    config: Config\ndef f(a: A) -> str:\n    return a.config.model",
            ["A", "f"],
        ),
        (
            CONFIG
            + "@dataclass\nclass A:\n    config: Config\n    def f(self) -> str:\n        return self.config.model",
            ["A"],
        ),
    ],
)
def test_whoever_takes_the_configuration_is_found(checkout: Checkout, text: str, expected: list[str]) -> None:
    shared = CONFIG + "Whole = Config | None\nclass Wider(Config): ...\n"
    figure = checkout.figure(TAKING, config__schema=SCHEMA, room__shared=shared, room__file=text)
    assert [line.partition(": ")[2].partition(" reads")[0] for line in figure.details] == expected
    assert figure.shown == str(len(expected)) and not figure.over


def test_cli_and_config_may_take_it_and_26_are_too_many(checkout: Checkout) -> None:
    taking = CONFIG + "".join(f"def f{n}(config: Config) -> None: ...\n" for n in range(25))
    free = {name: taking for name in ("cli", "cli_exit", "cli__program", "config__load")}
    assert checkout.figure(TAKING, config__schema=SCHEMA, **free).shown == "0"
    assert not checkout.over(TAKING, room__file=taking)
    assert len(checkout.over(TAKING, client=CONFIG + "def f(config: Config) -> None: ...")) == 26


@pytest.mark.parametrize(
    ("body", "sections"),
    [
        ("return other(config)", "nothing"),
        ("return config.system.device, config.system.backend", "system"),
        ("s, m = config.system, config.model\n    return s.device, m.folds", "model, system"),
        ("return config.system, config.model, config.inference.output.formats", "inference, model, system"),
        ("return replace(config, model=m, system=s, decoding=[])", "decoding, model, system"),
        ("return asdict(config)", "decoding, inference, model, system"),
    ],
)
def test_sections_that_are_read_are_counted(checkout: Checkout, body: str, sections: str) -> None:
    text = f"{CONFIG}def f(config: Config) -> object:\n    {body}\n"
    figure = checkout.figure(TAKING, config__schema=SCHEMA, room__file=text)
    assert [line.partition(" reads ")[2].partition(" (")[0] for line in figure.details] == [sections]
    assert len(checkout.over(FEW)) == (sections.count(",") < 2)


@pytest.mark.parametrize(
    ("body", "keys"),
    [
        ("s = config.system\n    return s.device, s.backend", 2),
        ("s, m = config.system, config.model\n    return s.device, s.backend, m.folds", 3),
        ("if config.system.device:\n        m = config.model\n    return m.folds, m.names.first", 3),
        ("return (s := config.system).device, s.backend", 2),
    ],
)
def test_keys_are_counted_behind_local_names(checkout: Checkout, body: str, keys: int) -> None:
    text = f"{CONFIG}def f(config: Config) -> object:\n    {body}\n"
    (line,) = checkout.figure(TAKING, config__schema=SCHEMA, room__file=text).details
    assert line.endswith(f"({keys} keys)")


def test_a_class_reads_what_its_methods_read(checkout: Checkout) -> None:
    text = (
        f"{CONFIG}class A:\n    def __init__(self, config: Config) -> None:\n        self._c = config\n"
        "    def f(self) -> object:\n        return self._c.system.device, self._c.model.folds\n"
    )
    assert checkout.over(FEW, config__schema=SCHEMA, room__file=text) == [
        "room/file.py: A.__init__ reads model, system"
    ]
    assert not checkout.over(FEW, room__file=text.replace("return", "return self._c.inference,"))


def test_a_section_for_one_field_counts(checkout: Checkout) -> None:
    text = "from connectomics.config.schema import Output as O\ndef f(o: O | None) -> object:\n    return o.formats\n"
    assert checkout.over(ONE_FIELD, config__schema=SCHEMA, room__file=text) == ["room/file.py: f reads formats"]
    assert not checkout.over(ONE_FIELD, room__file=text.replace("o.formats", "o.formats, o.overwrite"))


def test_sizes(checkout: Checkout) -> None:
    many = {f"io__f{n}": "x = 1\n" for n in range(15)}
    assert not checkout.over("files in the fullest room", **many, **{"io/__init__": ""})
    assert checkout.over("files in the fullest room", io__f15="") == ["connectomics/io: 16"]
    assert checkout.figure("rooms").shown == "1" and checkout.figure("rooms", io__formats__zarr="").shown == "2"
    assert not checkout.over("largest file, lines", a="x = 1\n" * 400)
    assert checkout.over("largest file, lines", a="x = 1\n" * 401) == ["a.py: 401"]
    function = "@decorated\ndef f() -> None:\n" + "    x = 1\n" * 59
    assert not checkout.over("largest function, lines", b=function)
    assert checkout.over("largest function, lines", b=function + "    x = 1\n") == ["b.py: f: 61"]
    label = "lines, without testing and generated files"
    before = int(checkout.figure(label).shown)
    assert int(checkout.figure(label, testing__suite="x = 1\n", c="# Generated by us.\nx = 1\n").shown) == before
    assert int(checkout.figure(label, d='"""Read generated code."""\n').shown) == before + 1
    assert checkout.over(label, e="x = 1\n" * 31000) == [str(before + 1 + 31000)]


def test_wide_records(checkout: Checkout, structure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fields(first: int, last: int) -> str:
        return "".join(f"    f{n}: int\n" for n in range(first, last))

    eight = f"@dataclasses.dataclass(frozen=True)\nclass A:\n{fields(0, 8)}    c: ClassVar[int] = 0\n"
    assert not checkout.over(RECORDS, a=eight, b="class Plain:\n" + fields(0, 9))
    assert checkout.over(RECORDS, a=eight + "    d: int\n") == ["a.py: A (9)"]
    inherits = "from connectomics.a import A\n@dataclass\nclass B(A):\n    d: int\n"
    assert checkout.over(RECORDS, a=eight, b=inherits) == ["b.py: B (9)"]
    assert checkout.over(RECORDS, b="class C(NamedTuple):\n" + fields(0, 9)) == ["b.py: C (9)"]
    monkeypatch.setattr(structure, "WIDE", {"C": "a file header"})
    assert not checkout.over(RECORDS)
    assert checkout.over(RECORDS, b="") == ["the exception C is not needed"]


@pytest.mark.parametrize(
    ("call", "counts"),
    [
        ("own(1, 2, 3, 4)", False),
        ("own(1, 2, 3, 4, 5)", True),
        ("own(1, 2, 3, 4, five=5)", False),
        ("own(1, 2, 3, *more)", False),
        ("own(1, 2, 3, 4, *more)", True),
        ("partial(own, 1, 2, 3, 4)", False),
        ("functools.partial(own, 1, 2, 3, 4, 5)", True),
        ("Own(1, 2, 3, 4, 5)", True),
        ("given.method(1, 2, 3, 4, 5)", True),
        ("given(1, 2, 3, 4, 5)", True),
        ("other.own(1, 2, 3, 4, 5)", True),
        ("given.strange(1, 2, 3, 4, 5)", False),
        ("print(1, 2, 3, 4, 5)", False),
        ("np.own(1, 2, 3, 4, 5)", False),
        ("pack(1, 2, 3, 4, 5)", False),
    ],
)
def test_long_calls(checkout: Checkout, call: str, counts: bool) -> None:
    head = "import functools\nimport numpy as np\nfrom functools import partial\nfrom struct import pack\n"
    head += "from connectomics import other\n"
    own = "def own(*all): ...\nclass Own:\n    def method(self, *all): ...\n"
    text = f"{head}from connectomics.other import own, Own\ndef f(given, more):\n    return {call}\n"
    assert len(checkout.over(CALLS, other=own, a=text)) == counts


def test_an_exception_lets_a_long_call_be(
    checkout: Checkout, structure: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure, "LONG_CALLS", {"log.info": "logging"})
    text = "class A:\n    def info(self): ...\nlog.info('%s', 1, 2, 3, 4)\n"
    assert not checkout.over(CALLS, a=text)
    assert len(checkout.over(CALLS, a=text + "a.info(1, 2, 3, 4, 5)\n")) == 1


def test_names_that_mean_two_things(checkout: Checkout) -> None:
    alias = "Array = npt.NDArray[Any]\n"
    assert not checkout.over(HOMONYMS, a=f"{alias}class Cut: ...\nLEAST = 3\n", b=f"{alias}LEAST = 4\n")
    assert checkout.over(HOMONYMS, b="class A:\n    class Cut: ...\n") == ["Cut: a.py: Cut; b.py: A.Cut"]
    assert checkout.over(HOMONYMS, b="Cut = tuple[int, int]\n") == ["Cut: a.py: Cut; b.py: Cut = tuple[int, int]"]
    assert len(checkout.over(HOMONYMS, b="Array = npt.NDArray[np.uint8]\n")) == 1
    near = checkout.figure("names that differ by underscores only", b="class _Cut: ...\n")
    assert near.details == ["Cut, _Cut"] and not checkout.over(HOMONYMS)


def test_file_names(checkout: Checkout, structure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    special = ("a/__init__", "b/__init__", "a/__main__", "b/__main__")
    assert not checkout.over(FILE_NAMES, a__zarr="", b__n5="", **dict.fromkeys(special, ""))
    assert checkout.over(FILE_NAMES, b__zarr="") == ["zarr.py (a, b)"]
    monkeypatch.setattr(structure, "SAME_MEANING", {"zarr.py": "the format"})
    assert not checkout.over(FILE_NAMES)
    silent = "files and folders whose name says nothing"
    assert checkout.over(silent, build__x="", a__utils="") == ["build", "utils"]


def test_where_a_key_is_written(checkout: Checkout) -> None:
    label = "files of the package in which a key is written, median / most"

    def places(key: str) -> list[str]:
        (line,) = (line for line in checkout.figure(label).details if line.startswith(f"{key}: "))
        return line.partition("(")[2].rstrip(")").split(", ")

    step = '@dataclass\nclass Filters:\n    """Drops."""\n    name: str = "filters"\n    min_voxels: int = 0\n'
    checkout.figure(label, config__schema=SCHEMA, objects__filters=step)
    assert places("inference.output.overwrite") == ["config/schema.py"]
    checkout.figure(
        label,
        a='raise E(f"inference.output.overwrite is {x}")\n',
        b=f"{CONFIG}x = config.inference.output.overwrite\n",
        c="x = job.output.overwrite\n",
        d='x = "overwrite"\n',
    )
    assert places("inference.output.overwrite") == ["a.py", "b.py", "config/schema.py"]
    assert places("decoding.filters.min_voxels") == ["objects/filters.py"]
    checkout.figure(label, e='RULES = {"min_voxels": 0}\n', f='"""``decoding[0].min_voxels``"""\n')
    assert places("decoding.filters.min_voxels") == ["e.py", "objects/filters.py"]
    assert not any(line.startswith("decoding.filters.name") for line in checkout.figure(label).details)
    label = "pages in which a key is written, median / most"
    page = "<!-- generated -->\n`inference.output.overwrite`\n<!-- end -->\n"
    checkout.write({"README.md": page, "docs/a.md": "Say `overwrite`.", "tutorials/a.yaml": "  overwrite: false\n"})
    assert places("inference.output.overwrite") == ["docs/a.md", "tutorials/a.yaml"]


def test_words(checkout: Checkout) -> None:
    label = "files that know of precision"
    text = '"""Of precision."""\nprecisions = "imprecision"\n'
    assert checkout.figure(label, a=text).shown == "precision 0"
    assert checkout.figure(label, b="use(fast_precision=1)\n", c='x = f"the precision {y}"\n').shown == "precision 2"
    assert checkout.figure("files that know each format", d="import zarr\n", zarr2="").shown.startswith("h5 0, zarr 1")
    label = "identifiers that are metaphors"
    assert not checkout.over(label, e="plane = ledger = roommate = scenery = 'lane'\n")
    assert checkout.over(label, e="Room = the_lanes = Room\n") == ["lane in e.py: 1", "room in e.py: 2"]
    assert checkout.over("docstrings that begin with Of") == ["a.py: Of precision."]
    unended = 'def f():\n    """Return\n    it\n\n    More.\n    """\n'
    assert checkout.over("docstrings without a full stop", f=unended) == ["f.py: Return\n    it"]


def test_the_command(checkout: Checkout, structure: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(checkout.root)]
    checkout.write({"connectomics/config/schema.py": SCHEMA, "connectomics/io/tiff.py": "x = 1\n"})
    assert structure.main([*root, "--json", "--test-seconds", "840"]) == 0
    before = checkout.root / "before.json"
    before.write_text(capsys.readouterr().out)
    assert json.loads(before.read_text())["rooms"] == {"connectomics/config": 1, "connectomics/io": 1}
    checkout.write({"connectomics/io/n5.py": "class Room: ...\n", ".make-test-seconds": "400\n"})
    assert structure.main([*root, "--before", str(before)]) == 0
    shown = capsys.readouterr()
    assert "| connectomics/io | 1 | 2 |" in shown.out and "| make test, seconds | 840 | 400 | 420 |" in shown.out
    assert structure.main([*root, "--before", str(before), "--check"]) == 1
    assert capsys.readouterr().err == "identifiers that are metaphors (limit 0): room in io/n5.py: 1\n"
    checkout.write({"connectomics/io/n5.py": "", ".make-test-seconds": "421"})
    assert structure.main([*root, "--before", str(before), "--check"]) == 1
    assert capsys.readouterr().err == "make test, seconds (limit 420): 421\n"
    assert structure.main([*root, "--before", str(before), "--check", "--test-seconds", "419"]) == 0


def test_every_row_has_a_figure_of_before(checkout: Checkout, structure: ModuleType) -> None:
    rows = [each.label for each in structure.figures(structure.Package(checkout.root), checkout.root)]
    assert list(json.loads(structure.BEFORE.read_text())["figures"]) == rows
