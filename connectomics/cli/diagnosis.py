"""What the doctor says: one line for each thing that was looked at, and what to do where it is not ok."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LOW_DISK_BYTES = 10 << 30


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One thing that was looked at.

    Parameters
    ----------
    subject
        What it is.
    text
        What was found.
    mend
        What to do when it is not ok.
    noted
        Whether it is less than one could wish, but runs live with it.
    """

    subject: str
    text: str
    mend: str = ""
    noted: bool = False

    @property
    def ok(self) -> bool:
        """Whether there is nothing to mend."""
        return not self.mend


def lines_of(findings: Iterable[Diagnosis]) -> Iterator[str]:
    """What is printed."""
    for finding in findings:
        mark = "MEND" if finding.mend else "note" if finding.noted else "ok  "
        yield f"{mark} {finding.subject:12} {finding.text}"
        if finding.mend:
            yield f"     {'':12} → {finding.mend}"
