"""The documents hold: their commands run and print what is shown, names, keys, messages and links in them exist.

Fences and what is done with them: ``bash run`` runs every command in a folder of small volumes; ``text output``
shows lines the block before it printed (… stands for anything); other ``bash`` is only parsed; ``python`` is a doctest.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import doctest
import functools
import importlib
import io
import json
import os
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import pytest
from answers import never_twice
from PIL import Image

import connectomics
from connectomics import Box, Config, load_config, open_volume
from connectomics.cli import program as cli
from connectomics.cli.usage import told_apart
from connectomics.config.load import known_keys
from connectomics.config.validation import shown

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "connectomics"
MODEL = PACKAGE / "example" / "phantom_mito_2d"
GUIDE = REPOSITORY / "docs" / "nnunet_integration.md"
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/decisions/*.md", "changelog.d/*.md", "connectomics/example/*.md")
    for path in REPOSITORY.glob(pattern)
)
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = ("connectomics ", "python scripts/main.py ")
MACHINE = re.compile(r"(?<![\w.])/(root|home|mnt|opt)/|index-url")


@dataclass(frozen=True, slots=True)
class Fence:
    """A fenced block: its info string and its text."""

    info: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """Words of each command; a backslash continues a line, # begins a comment."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def fences(path: Path) -> list[Fence]:
    return [Fence(match["info"].strip(), match["text"]) for match in FENCE.finditer(path.read_text())]


def named(paths: Sequence[Path]) -> list[object]:
    return [pytest.param(path, id=path.relative_to(REPOSITORY).as_posix()) for path in paths]


def having(*infos: str) -> list[object]:
    return named([path for path in DOCUMENTS if any(fence.info in infos for fence in fences(path))])


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two volumes in data/, their truth, and an image."""
    folder = tmp_path_factory.mktemp("volumes")
    for name, uri in (("cell_1", "phantom:2x256x256?seed=7"), ("cell_2", "phantom:1x256x256?seed=5")):
        for suffix, what in (("", "image"), ("_truth", "label")):
            reader = open_volume(f"{uri}&what={what}")
            place = folder / ("truth" if suffix else "data")
            place.mkdir(exist_ok=True)
            with h5py.File(place / f"{name}.h5", "w") as file:
                file["main"] = reader.read(Box.of_shape(reader.info.extent))[0]
    (folder / "images").mkdir()
    section = open_volume("phantom:1x256x256?seed=5").read(Box.of_shape((1, 256, 256)))[0, 0]
    Image.fromarray(section).save(folder / "images" / "section_1_0000.png")
    return folder


@pytest.fixture
def workplace(volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout, with the volumes, a checkpoint and a list; one thread is used."""
    for name in ("connectomics", "scripts", "tutorials"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "mito_semantic_2d.pth").symlink_to(MODEL / "fold_all" / "checkpoint_final.pth")
    shutil.copytree(volumes, tmp_path, dirs_exist_ok=True)
    (tmp_path / "volumes.txt").write_text("data/cell_1.h5\n")
    never_twice(monkeypatch)  # many commands label the same volume
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    return tmp_path


def run(words: list[str]) -> tuple[int, str]:
    """Exit code and output of one command of ours, run in this process."""
    printed = io.StringIO()
    if words[0] == "connectomics":
        entry, arguments = cli.main, words[1:]
    else:
        assert words[:2] == ["python", "scripts/main.py"], f"{words} is not one of our commands; leave 'run' out"
        entry, arguments = cli.script_main, words[2:]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = entry(arguments)
    return code, printed.getvalue()


def pattern_of(line: str) -> str:
    """A shown line as a regular expression: … is anything, spaces are any spaces."""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in line.strip().split("…")]
    return r"\s*.*\s*".join(parts)


@pytest.mark.parametrize("path", having("bash run"))
def test_commands_run_and_print_what_is_shown(path: Path, workplace: Path) -> None:
    printed = ""
    for fence in fences(path):
        if fence.info == "bash run":
            printed = ""
            for words in fence.commands:
                code, text = run(words)
                allowed = (0, 3) if "doctor" in words else (0,)  # a machine may be short of memory or disk
                assert code in allowed, f"{words}\n{text}"
                printed += text
        if fence.info == "text output":
            for line in filter(str.strip, fence.text.splitlines()):
                assert re.search(pattern_of(line), printed), f"{line!r} was not printed, but\n{printed}"


@pytest.mark.parametrize("path", having("bash"))
def test_other_commands_are_written_rightly(
    path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(command: object, words: argparse.Namespace) -> int:
        stated = vars(words)
        plain, settings = told_apart(stated.get("overrides", []))
        assert not plain or stated["command"] in ("verify", "infer-volume", "plan", "doctor", "test"), plain
        load_config(stated.get("config"), settings)
        return 0

    monkeypatch.setattr(cli, "guarded", check)
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for fence in fences(path):
        if fence.info != "bash":
            continue
        for line in fence.text.replace("\\\n", " ").splitlines():
            line = re.sub(r"\$\w+", "0", line.strip().removesuffix("&"))
            if line.startswith("sbatch "):
                script, _, rest = line.partition(".sh ")
                assert (REPOSITORY / f"{script.split()[-1]}.sh").is_file(), line
                line = f"connectomics infer-volume {rest}"
            if line.startswith(PROGRAMS):
                assert run(shlex.split(line, comments=True))[0] == 0, line
            if line.startswith("make"):
                words = shlex.split(line, comments=True)[1:]
                assert {word for word in words if "=" not in word} <= set(targets), line


@pytest.mark.parametrize("path", having("python"))
def test_python_in_documents(path: Path, workplace: Path) -> None:
    source = "\n".join(fence.text for fence in fences(path) if fence.info == "python")
    examples = doctest.DocTestParser().get_doctest(source, {}, path.name, str(path), 0)
    assert examples.examples, "python blocks are doctests: begin their lines with >>>"
    report = io.StringIO()
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=report.write)
    assert outcome.failed == 0, report.getvalue()


def slugs(path: Path) -> set[str]:
    """Anchors of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text())):
        if target.startswith(("https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{path.name} links to {target}, which is absent"
        assert not anchor or anchor in slugs(linked), f"{path.name}: no heading for #{anchor} in {linked.name}"


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_no_paths_of_a_machine_and_no_registries(path: Path) -> None:
    assert not MACHINE.search(path.read_text())


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_files_that_are_named_exist(path: Path) -> None:
    """Paths in backticks that begin with one of our folders."""
    for name in re.findall(r"`((?:connectomics|tests|docs|scripts|benchmarks|tutorials)/[\w./-]+)`", path.read_text()):
        assert (REPOSITORY / name).exists(), f"{path.name} names {name}, which is absent"


@pytest.mark.parametrize("name", ["demo.png", "instances.png"])
def test_the_readmes_pictures_are_small(name: str) -> None:
    picture = REPOSITORY / "docs" / "images" / name
    assert picture.stat().st_size < 500_000
    with Image.open(picture) as image:
        image.verify()


def value_at(config: Config, key: str) -> object:
    value: object = dataclasses.asdict(config)
    for part in key.split("."):
        assert isinstance(value, dict)
        value = value[part]
    return value


def test_the_guides_table_has_every_key_with_its_default() -> None:
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| `([^`]*)` \| (.+) \|$", GUIDE.read_text(), re.MULTILINE)
    assert [key for key, _, _ in rows] == list(known_keys())
    defaults = Config()
    for key, default, meaning in rows:
        value = value_at(defaults, key)
        text = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else shown(value).strip("'")
        assert default == (text or '""'), key
        assert len(meaning) > 5, key


@functools.cache
def source_texts() -> tuple[str, ...]:
    """All string literals of the package; what an f-string fills in is a NUL."""
    texts = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return tuple(dict.fromkeys(texts))


def quoted_messages() -> list[str]:
    text = (REPOSITORY / "TROUBLESHOOTING_NNUNET.md").read_text()
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def test_at_least_twenty_messages_are_explained() -> None:
    assert len(set(quoted_messages())) >= 20


@pytest.mark.parametrize("message", quoted_messages())
def test_messages_that_are_explained_exist(message: str) -> None:
    parts = re.split(r"\s*…\s*", message)
    searched, longest = re.compile(".*".join(map(re.escape, parts)), re.DOTALL), max(parts, key=len)
    assert len(message.replace("…", "").strip()) >= 12
    assert any(searched.search(text) for text in source_texts() if longest in text)


def names_in(body: Sequence[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{name}" for name in names_in(node.body))
        if isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


@functools.cache
def defined_in(path: Path) -> frozenset[str]:
    """Names of functions, classes and constants and, as Class.name, of methods and fields."""
    return frozenset(names_in(ast.parse(path.read_text()).body))


@functools.cache
def python_files() -> tuple[Path, ...]:
    folders = ("connectomics", "tests", "scripts", "benchmarks")
    return tuple(path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py")))


@functools.cache
def defined_names() -> frozenset[str]:
    return frozenset(name for source in python_files() for name in defined_in(source))


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_code_that_is_named_exists(path: Path) -> None:
    """``file.py`` is the end of a file's path, and ``file.py:name`` is defined in such a file."""
    for file, name in re.findall(r"`([\w./-]+\.py)(?:: ?([\w.]+))?`", path.read_text()):
        found = [source for source in python_files() if f"/{source.relative_to(REPOSITORY)}".endswith(f"/{file}")]
        assert found, f"{path.name} names {file}, which is absent"
        assert not name or any(name in defined_in(source) for source in found), f"{path.name}: {file} defines no {name}"


ROOMS = ["architecture", "contracts", "glossary", "gpu", "memory", "objects", "path_of_a_voxel", "recovery"]
PAGES_OF_THE_CODE = [
    REPOSITORY / "CONTRIBUTING.md",
    *(REPOSITORY / "docs" / f"{page}.md" for page in ROOMS),
    *sorted((REPOSITORY / "docs" / "decisions").glob("*.md")),
]


@pytest.mark.parametrize("path", named(PAGES_OF_THE_CODE))
def test_classes_and_folders_that_are_named_exist(path: Path) -> None:
    for name in re.findall(r"`((?:[A-Z]+[a-z]\w*)(?:\.\w+)?)`", path.read_text()):
        assert name in defined_names(), f"{path.name} names {name}, which nothing defines"
    for folder in re.findall(r"`([a-z_]+/[a-z_/]*)`", path.read_text()):
        roots = [root for root in (REPOSITORY, PACKAGE) if (root / folder.partition("/")[0]).is_dir()]
        assert not roots or any((root / folder).is_dir() for root in roots), f"{path.name} names {folder}"


@pytest.mark.parametrize(("page", "least"), [("path_of_a_voxel.md", 35), ("glossary.md", 55), ("architecture.md", 0)])
def test_pages_name_rooms_and_stops(page: str, least: int) -> None:
    """Stops are given by their whole path in the package, so that a reader finds them."""
    text = (REPOSITORY / "docs" / page).read_text()
    stops = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    assert len(stops) >= least
    for file, name in stops:
        assert name in defined_in(PACKAGE / file), f"{file} defines no {name}"


def test_the_picture_of_the_rooms_is_the_one_that_is_checked() -> None:
    """The rows of docs/architecture.md are those of import-linter's contract, and each room has a paragraph."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    rows = [re.findall(r"\w+", row) for row in project["tool"]["importlinter"]["contracts"][0]["layers"]]
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    drawn = [re.match(r"[\w]+(?: · \w+)*", row) for row in re.findall(r"^ +\d+ +(\w.*)$", text, re.MULTILINE)]
    assert [re.findall(r"\w+", row[0]) for row in drawn if row] == rows
    paragraphs = re.findall(r"^\*\*`(\w+)`\*\* ", text, re.MULTILINE)
    assert sorted(paragraphs) == sorted(room for row in rows for room in row)
    assert len(text.split()) <= 1500


def test_decisions_are_dated_and_have_a_context_and_a_price() -> None:
    decisions = sorted((REPOSITORY / "docs" / "decisions").glob("*.md"))
    assert len(decisions) >= 10
    for path in decisions:
        text = path.read_text()
        assert re.search(r"^" + path.name[:10] + "$", text, re.MULTILINE), f"{path.name} states no date, or another"
        headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert headings == ["Context", "Decision", "Price"], path.name


WITH_EXAMPLES = [path for path in python_files() if PACKAGE in path.parents and ">>>" in path.read_text()]


@pytest.mark.parametrize("path", named(WITH_EXAMPLES))
def test_examples_in_docstrings(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0
    assert found.attempted > 0


def test_the_api_page_names_every_public_name() -> None:
    headings = re.findall(r"^### `(\w+)", (REPOSITORY / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(connectomics.__all__)


TUTORIAL = ["python", "scripts/main.py", "--config", "tutorials/nnunet_mito_inference.yaml"]
SMALL = "phantom:1x256x256?seed=7"


def test_the_tutorial_runs_in_both_modes(workplace: Path) -> None:
    words = [*TUTORIAL, "--checkpoint", "mito_semantic_2d.pth"]
    images = [f"test.data.test_image='{SMALL}'", f"test.data.test_label='{SMALL}&what=label'"]
    code, printed = run([*words, "--mode", "test", *images])
    assert code == 0, printed
    dice = re.search(r"all volumes\s+mitochondrion\s+([0-9.]+)", printed)
    assert dice is not None and float(dice[1]) > 0.95
    pattern = "inference.volume_mode.file_pattern='data/*.h5'"
    code, printed = run([*words, "--mode", "infer-volume", pattern, "inference.data.output_path=out/"])
    assert code == 0, printed
    assert re.search(r"done\s+2\n", printed)
    assert {path.name for path in Path("out").glob("*.h5")} == {"cell_1_labels.h5", "cell_2_labels.h5"}
    guide = GUIDE.read_text()
    for name in ("report.json", "provenance.json"):
        told = json.loads((Path("out") / "cell_1_labels.run" / name).read_text())
        assert [key for key in told if f"`{key}`" not in guide] == [], name
