"""What a disk may hold after a loss of power: a recorded run, cut after any of its file operations.

``tests/shims/power_loss.c`` records a run. ``Disk`` replays it up to a cut and says, of each entry of a folder and each
byte of a file, what was flushed; of what was not, ``Disk.build`` leaves any part out.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath

PAGE = 4096
FATES = ("old", "zeros", "torn", "whole")
"""What becomes of the written and never flushed bytes of a file: none, its new size alone, some pages, all."""


@dataclass(frozen=True)
class Event:
    """One operation: its name, the inode it is about, a number (an offset or a size), two paths, bytes."""

    name: str
    inode: int
    number: int
    path: str
    other: str
    content: bytes


def read_record(log: Path, folder: Path) -> list[Event]:
    """Read the operations below a folder, whose paths are made relative to it."""
    found, events, place = log.read_bytes(), list[Event](), 0
    while place < len(found):
        end = found.index(b"\n", place)
        name, *numbers = found[place:end].decode().split()
        inode, number, *lengths = map(int, numbers)
        parts, place = [], end + 1
        for length in lengths:
            parts.append(found[place : place + length])
            place += length
        path, other = (os.path.relpath(os.fsdecode(part), folder) if part else "" for part in parts[:2])
        events.append(Event(name, inode, number, path, other, parts[2]))
    return events


@dataclass(eq=False)
class File:
    """Bytes as the process sees them, and as they were flushed last."""

    now: bytearray = field(default_factory=bytearray)
    flushed: bytes = b""

    @property
    def clean(self) -> bool:
        return self.now == self.flushed


@dataclass(eq=False)
class Symlink:
    """Its target, which is on the disk with its entry."""

    target: bytes


@dataclass(eq=False)
class Folder:
    """Entries as the process sees them, and as they were flushed."""

    now: dict[str, Node] = field(default_factory=dict)
    flushed: dict[str, Node] = field(default_factory=dict)


Node = File | Symlink | Folder
Change = dict[tuple[Folder, str], Node | None]
"""Entries that one operation sets or removes: all of them or none."""


class Disk:
    """The folder of a recorded run after its first operations."""

    def __init__(self, folder: Path | None = None) -> None:
        """Begin with what lies in a folder, all of it flushed, or with nothing."""
        self._of: dict[int, Node] = {}
        self._waiting: list[Change] = []
        top = Folder() if folder is None else self._found(folder)
        assert isinstance(top, Folder)
        self.top = top

    def _found(self, path: Path) -> Node:
        if path.is_symlink():
            node: Node = Symlink(os.fsencode(path.readlink()))
        elif path.is_dir():
            entries = {inner.name: self._found(inner) for inner in path.iterdir()}
            node = Folder(entries, dict(entries))
        else:
            node = File(bytearray(path.read_bytes()), path.read_bytes())
        return self._of.setdefault(path.lstat().st_ino, node)

    def after(self, events: Sequence[Event]) -> Disk:
        """Return the disk after some operations; this one stays as it is."""
        disk = copy.deepcopy(self)
        for event in events:
            disk.do(event)
        return disk

    def do(self, event: Event) -> None:
        """Do one operation."""
        if event.name in ("file", "folder", "symlink"):
            made: Node = {"file": File, "folder": Folder}.get(event.name, lambda: Symlink(event.content))()
            self._of[event.inode] = made
            if event.path == ".":  # the folder that is watched, itself
                self.top = made if isinstance(made, Folder) else self.top
            else:
                self._change({self._place(event.path): made})
        elif event.name == "link":
            self._change({self._place(event.other): self.node(event.path)})
        elif event.name == "remove":
            self._change({self._place(event.path): None})
        elif event.name == "rename":
            moved = self.node(event.path)
            self._change({self._place(event.path): None, self._place(event.other): moved})
        elif event.name == "sync":
            self._sync(self._of.get(event.inode, self.top))
        else:
            self._fill(event)

    def _fill(self, event: Event) -> None:
        file = self._of[event.inode]
        assert isinstance(file, File)
        size = event.number + len(event.content)
        if event.name == "size":
            del file.now[size:]
        file.now.extend(bytes(max(0, size - len(file.now))))
        file.now[event.number : size] = event.content if event.name == "write" else file.now[event.number : size]

    def _place(self, path: str) -> tuple[Folder, str]:
        above, _, name = path.rpartition("/")
        folder = self.node(above or ".")
        assert isinstance(folder, Folder), path
        return folder, name

    def node(self, path: str) -> Node:
        """Return what the process sees at a path."""
        found: Node = self.top
        for name in path.split("/") if path != "." else []:
            assert isinstance(found, Folder), path
            found = found.now[name]
        return found

    def _change(self, change: Change) -> None:
        for (folder, name), node in change.items():
            _set(folder.now, name, node)
        self._waiting.append(change)

    def _sync(self, node: Node) -> None:
        """Flush a file's bytes, or a folder's entries; a rename is one step, whichever folder is flushed."""
        if isinstance(node, File):
            node.flushed = bytes(node.now)
        done = [change for change in self._waiting if any(folder is node for folder, _ in change)]
        for change in done:
            for (folder, name), entry in change.items():
                _set(folder.flushed, name, entry)
                for earlier in self._waiting[: self._waiting.index(change)]:
                    earlier.pop((folder, name), None)
            self._waiting.remove(change)

    def build(self, place: Path, chance: random.Random, *, kept: float, fates: Sequence[str] = FATES) -> None:
        """Make a folder that the disk may hold after a loss of power.

        Parameters
        ----------
        place
            Where; absent.
        chance
            Decides what is left of what was not flushed.
        kept
            Share of entries that were changed and not flushed and are on the disk nevertheless.
        fates
            One of these is the fate of each file with bytes that were not flushed.
        """
        entries = {folder: dict(folder.flushed) for folder in self._folders()}
        for change in self._waiting:
            if chance.random() < kept:
                for (folder, name), node in change.items():
                    _set(entries[folder], name, node)
        made: dict[Node, Path] = {}

        def make(node: Node, path: Path) -> None:
            if isinstance(node, Folder):
                path.mkdir()
                for name, inner in sorted(entries[node].items()):
                    make(inner, path / name)
            elif isinstance(node, Symlink):
                path.symlink_to(os.fsdecode(node.target))
            elif node in made:
                os.link(made[node], path)
            else:
                made[node] = path
                path.write_bytes(_left_of(node, chance, chance.choice(fates)))

        make(self.top, place)

    def _folders(self) -> set[Folder]:
        """All folders that may be on the disk."""
        waiting = {node for change in self._waiting for node in change.values() if isinstance(node, Folder)}
        found, look = set[Folder](), [self.top, *waiting, *(folder for change in self._waiting for folder, _ in change)]
        while look:
            folder = look.pop()
            if folder not in found:
                found.add(folder)
                inner = (*folder.now.values(), *folder.flushed.values())
                look += [node for node in inner if isinstance(node, Folder)]
        return found

    def unflushed(self, path: str) -> Iterator[str]:
        """Yield what a loss of power may take at a path and below it: entries and bytes."""
        node = self.node(path)
        if isinstance(node, File) and not node.clean:
            yield path
        if isinstance(node, Folder):
            for name, inner in sorted(node.now.items()):
                below = name if path == "." else f"{path}/{name}"
                if node.flushed.get(name) is not inner:
                    yield f"{below} (its entry)"
                yield from self.unflushed(below)

    def flushed_bytes(self, path: str) -> bytes | None:
        """Return the bytes at a path that a loss of power cannot take, None where it may take the file."""
        node: Node = self.top
        for name in path.split("/"):
            if not isinstance(node, Folder) or node.flushed.get(name) is None:
                return None
            node = node.flushed[name]
        return node.flushed if isinstance(node, File) else None


def _set(entries: dict[str, Node], name: str, node: Node | None) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node


def _left_of(file: File, chance: random.Random, fate: str) -> bytes:
    """Return what is on the disk of a file."""
    now, old = bytes(file.now), file.flushed
    if file.clean or fate == "old":
        return old
    grown = (old + bytes(max(0, len(now) - len(old))))[: len(now)]
    if fate in ("zeros", "whole"):
        return grown if fate == "zeros" else now
    pages = range(0, len(now), PAGE)
    torn = b"".join((now if chance.random() < 0.5 else grown)[page : page + PAGE] for page in pages)
    return torn[: chance.choice([len(torn), *pages])] if len(now) > len(old) else torn


def publishing(events: Sequence[Event]) -> list[int]:
    """Return the numbers of the operations that say that something is there: renames, links, lines of a ledger."""
    return [
        number
        for number, event in enumerate(events)
        if event.name in ("rename", "link") or (event.name == "write" and _is_ledger(events, event))
    ]


def _is_ledger(events: Sequence[Event], event: Event) -> bool:
    return any(e.inode == event.inode and e.name == "file" and e.path.endswith(".jsonl") for e in events)


def without_flushing(events: Sequence[Event], pattern: str) -> list[Event]:
    """Leave out that files or folders were flushed whose path fits a pattern, as if the program forgot it."""
    left = [event for event in events if event.name != "sync" or not re.search(pattern, event.path)]
    assert len(left) < len(events), f"nothing called {pattern} is flushed"
    return left


def published_too_early(start: Disk, events: Sequence[Event], ignored: Sequence[str] = ()) -> list[str]:
    """Return what a loss of power might take although something said that it is there.

    A folder or file that gets a name that is not hidden must be on the disk with all that is in it, and the files whose
    sha256 a line of a ledger states must be on the disk with their entries.
    """
    disk, found, ledgers = start.after([]), list[str](), dict[int, str]()
    for event in events:
        if event.name == "file" and event.path.endswith(".jsonl"):
            ledgers[event.inode] = event.path
        if event.name == "rename" and not PurePosixPath(event.other).name.startswith("."):
            found += [f"{event.other} is put in place before {lost}" for lost in disk.unflushed(event.path)]
        if event.name == "write" and event.inode in ledgers:
            found += [f"{ledgers[event.inode]} tells of {lost}" for lost in _untold(disk, ledgers[event.inode], event)]
        disk.do(event)
    found += [f"at the end {lost}" for lost in disk.unflushed(".") if not lost.split(" ")[0].endswith(tuple(ignored))]
    return found


def _untold(disk: Disk, ledger: str, event: Event) -> Iterator[str]:
    """Yield files of a record that a loss of power may take."""
    work = PurePosixPath(ledger).parents[1].as_posix()
    for line in event.content.splitlines():
        for name, checksum in json.loads(line).get("checksums", {}).items():
            if "/" not in name:
                continue  # voxels of a level
            kept = disk.flushed_bytes(f"{work}/{name}")
            if kept is None or sha256(kept).hexdigest() != checksum:
                yield f"{work}/{name}"
