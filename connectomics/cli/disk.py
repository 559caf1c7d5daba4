"""``doctor FOLDER``: can several processes share runs on this disk, and what is to be set for them?"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from connectomics.cli.diagnosis import LOW_DISK_BYTES, Diagnosis
from connectomics.cli.usage import say
from connectomics.commands.disk.disk_check import DiskReport, check_disk
from connectomics.commands.disk.disk_facts import FILE_FSYNC, FOLDER_FSYNC, LINK, RENAME, SYMLINK, DiskFacts
from connectomics.commands.disk.disk_pair import Creation

KEY = "system.stale_after_s"
DEFAULT_S = 180.0  # never less where other machines may write, too: they pause, or are cut off, for a minute or two
SMALLEST_S = 2.0
DELAYS, MARGIN_S, LOCAL_MARGIN_S = 3, 30.0, 1.0  # caches keep names up to twice as long in folders that stay quiet
LOW_FILES = 10_000
CLOCK_S = 60.0
WAYS = {"link": "by link", "open": "by exclusive opening"}
NOT_SHARED = (
    "several processes must not share runs on this disk; run one process at a time in each output folder, or choose "
    "another disk"
)
WITHOUT = {
    FOLDER_FSYNC: "a loss of power can lose what was finished last; kills lose nothing",
    FILE_FSYNC: "a loss of power can lose what was finished; kills lose nothing",
    LINK: "files are put in place by renaming alone instead",
    SYMLINK: "names are made by exclusive opening instead",
}


def examine_disk(folder: Path, stale_after_s: float, *, peer: bool) -> list[Diagnosis]:
    """Measure the disk of a folder, and hold it and ``system.stale_after_s`` against what shared runs need."""
    return findings_of(check_disk(folder, lambda text: say(text, sys.stderr), peer=peer), stale_after_s)


def findings_of(report: DiskReport, stale_after_s: float) -> list[Diagnosis]:
    """What a report means."""
    findings = [_space(report), *_creations(report.pair.creations), *_delay(report)]
    return [*findings, *_single(report.facts), _lock(report), _limit(report, stale_after_s)]


def needed_s(delay_s: float, *, local: bool) -> float:
    """The shortest ``system.stale_after_s`` for a disk on which names are seen so late, in whole seconds."""
    if local:
        return max(SMALLEST_S, math.ceil(DELAYS * delay_s + LOCAL_MARGIN_S))
    return max(DEFAULT_S, math.ceil(DELAYS * delay_s + MARGIN_S))


def _space(report: DiskReport) -> Diagnosis:
    facts = report.facts
    files = "files are not counted" if facts.free_files is None else f"{facts.free_files:,} files free"
    place = "of this machine" if report.is_local else "that other machines may use, too"
    text = f"{report.folder}: {facts.kind or 'unknown'}, a disk {place}; {facts.free_bytes / 2**30:.1f} GiB, {files}"
    few = facts.free_files is not None and facts.free_files < LOW_FILES
    return Diagnosis(
        "disk", text, "free the disk, or choose another" if few or facts.free_bytes < LOW_DISK_BYTES else ""
    )


def _creations(creations: Mapping[str, Creation]) -> Iterator[Diagnosis]:
    """What became of the names that were raced for; one way that works is enough, one that lies is too much."""
    for way, words in WAYS.items():
        made = creations[way]
        count = sum(made.won) - made.twice + made.never
        if made.refused:
            other = any(not c.refused for c in creations.values())
            yield Diagnosis("creation", f"{words}: refused ({made.refused})", "" if other else NOT_SHARED, noted=other)
        elif made.exclusive:
            text = f"{words}: each of {count} names had one maker ({made.won[0]} and {made.won[1]})"
            hardly = "" if made.contested else "; the two processes hardly met, measure again"
            yield Diagnosis("creation", text + hardly, noted=not made.contested)
        else:
            text = f"{words}: of {count} names {made.twice} were made by both processes, {made.never} by neither"
            yield Diagnosis("creation", text, NOT_SHARED)


def _delay(report: DiskReport) -> list[Diagnosis]:
    sights = report.pair.sights
    by_name, by_listing = max(s.by_name_s for s in sights), max(s.by_listing_s for s in sights)
    other = f"{report.host} and this machine see" if report.host else "two processes of this machine see"
    text = f"{other} each other's files after {_seconds(by_name)} by name, {_seconds(by_listing)} by listing"
    found = [Diagnosis("delay", text, "" if math.isfinite(report.pair.delay_s) else NOT_SHARED)]
    if report.with_child and not report.is_local:
        text = (
            "both processes ran on this machine, which remembers names for both: before several machines share runs, "
            f"run connectomics doctor {report.folder} --peer on two of them at the same time"
        )
        found.append(Diagnosis("machines", text, noted=True))
    return found


def _seconds(delay_s: float) -> str:
    return f"at most {math.ceil(100 * delay_s) / 100:.2f} s" if math.isfinite(delay_s) else "never"


def _single(facts: DiskFacts) -> list[Diagnosis]:
    ahead, refused = facts.clock_ahead_s, facts.refused
    words = f"{abs(ahead):.2f} s {'ahead of' if ahead > 0 else 'behind'} this machine's; runs compare no clocks"
    found = [Diagnosis("clock", f"the disk's clock is {words}", noted=abs(ahead) > CLOCK_S)]
    work = [name for name in (FILE_FSYNC, FOLDER_FSYNC, LINK, SYMLINK, RENAME) if name not in refused]
    found += [Diagnosis("operations", f"{', '.join(work)} work")] if work else []
    for name, why in refused.items():
        if name in WITHOUT:
            found.append(Diagnosis("operations", f"{name}: refused ({why}); {WITHOUT[name]}", noted=True))
        else:
            found.append(Diagnosis("operations", f"{name}: refused ({why})", "choose another disk for results"))
    if facts.ignores_case:
        text = "a and A are one name: volumes whose names differ in nothing else need folders of their own"
        return [*found, Diagnosis("case", text, noted=True)]
    return [*found, Diagnosis("case", "a and A are two names")]


def _lock(report: DiskReport) -> Diagnosis:
    why = report.pair.lock
    if why:
        return Diagnosis("flock", f"does not keep the other process out ({why}); runs do without", noted=True)
    return Diagnosis("flock", "keeps the other process out")


def _limit(report: DiskReport, stated_s: float) -> Diagnosis:
    """Hold ``system.stale_after_s`` against the delay; less than the default is for who asks for it on a local disk."""
    delay = report.pair.delay_s
    if not math.isfinite(delay):
        return Diagnosis("limit", f"no {KEY} is long enough", NOT_SHARED)
    least = needed_s(delay, local=report.is_local and stated_s < DEFAULT_S)
    margin = LOCAL_MARGIN_S if report.is_local else MARGIN_S
    why = f"{DELAYS} times the delay and {margin:g} s are {DELAYS * delay + margin:.0f} s"
    if stated_s < least:
        if least == DEFAULT_S:
            why = f"less than {DEFAULT_S:g} is for disks of one machine, for others can be cut off for a minute or two"
        else:
            why += ", and a process whose sign of life is seen late is not dead"
        return Diagnosis("limit", f"{KEY}={stated_s:g} is too short: {why}", f"set {KEY}={least:g}")
    return Diagnosis("limit", f"{KEY}={stated_s:g} is long enough: {why}")
