"""What the texts of TensorStore, HDF5 and ITK mean, in words of this program; ``source.reason`` asks."""

from __future__ import annotations

import os
import re

_TENSORSTORE = re.compile(
    r"\b(CANCELLED|UNKNOWN|INVALID_ARGUMENT|DEADLINE_EXCEEDED|NOT_FOUND|ALREADY_EXISTS|PERMISSION_DENIED|"
    r"RESOURCE_EXHAUSTED|FAILED_PRECONDITION|ABORTED|OUT_OF_RANGE|UNIMPLEMENTED|INTERNAL|UNAVAILABLE|DATA_LOSS|"
    r"UNAUTHENTICATED): "
)
_FILE = re.compile(r'(?:local file|reading|writing) "([^"]+)"')
_SYSTEM = re.compile(r"\[os_error_code='(\d+)'\]")
_MEMBER = re.compile(r'Error parsing object member "([^"]{1,40})"')
_STATUSES = {
    "NOT_FOUND": "is absent",
    "PERMISSION_DENIED": "cannot be read: permission denied; make it readable for this user",
    "RESOURCE_EXHAUSTED": "cannot be read, as the machine has no room or handles left",
    "UNAVAILABLE": "cannot be read at the moment",
    "DEADLINE_EXCEEDED": "cannot be read at the moment",
}
_HDF5 = re.compile(
    r"^(?:\[Errno (\d+)\] )?(?:Unable|Can't|Cannot|Could not|Couldn't|Unspecified error)\b.*?\((.*)\)$", re.DOTALL
)
_HDF5_CAUSES = (
    ("file signature not found", "it does not begin as an HDF5 file does"),
    ("truncated file", "it is truncated"),
    ("unable to lock file", "another program has it open for writing; close it there"),
    ("is not registered", "its chunks are packed by a filter that is not installed"),
    ("filter", "a chunk cannot be unpacked, so it is damaged"),
    ("inflate", "a chunk cannot be unpacked, so it is damaged"),
    ("checksum", "a chunk has another checksum than it should, so it is damaged"),
    ("external", "a file with its voxels is absent"),
)
_ITK = re.compile(r"Exception thrown in SimpleITK|itk::ERROR|sitk::ERROR")


def in_our_words(text: str) -> str | None:
    """What the text of an error of a storage library says; None where it is no text of theirs.

    Examples
    --------
    >>> in_our_words('DATA_LOSS: Error reading local file "/data/em.n5/0/0/1": corrupted')
    'em.n5/0/0/1 is damaged, or not as its format prescribes'
    >>> in_our_words("Unable to synchronously open file (file signature not found)")
    'it does not begin as an HDF5 file does'
    """
    status = _TENSORSTORE.search(text)
    if status:
        return _of_tensorstore(text, status[1])
    found = _HDF5.match(text)
    if found:
        number, cause = found[1], found[2]
        if number and int(number) > 0:
            return os.strerror(int(number)).lower()
        return next((words for part, words in _HDF5_CAUSES if part in cause), "the structure of the file is damaged")
    if _ITK.search(text):
        return "ITK cannot read it, so it is damaged"
    return None


def _of_tensorstore(text: str, status: str) -> str:
    file = _FILE.search(text)
    where = "/".join(file[1].rstrip("/").split("/")[-4:]).removeprefix("instead/") if file else "a part of it"
    members = [member for member in _MEMBER.findall(text) if member.isprintable()]
    refused = _SYSTEM.search(text) if "writing" in text else None
    if refused:
        return f"{where}: {os.strerror(int(refused[1]))}"
    if members:
        return f"{where} states for {' of '.join(repr(m) for m in reversed(members))} what cannot be used"
    return f"{where} {_STATUSES.get(status, 'is damaged, or not as its format prescribes')}"
