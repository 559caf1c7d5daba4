"""Where a path or URI leads. Only local disks are read and written; this file alone says so, for the words of the
command line, for keys of the configuration and for Python. Stores that are supported some day are let through here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from connectomics.core.errors import ConfigError

_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.:-]*)://")
_REMOTE = "s3|gs|gcs|https?|ftp|sftp|ssh|az|abfss?|adl|hdfs|dvid|graphene|brainmaps|boss|precomputed|zarr[23]?|n5|file"
_FOLDED = re.compile(rf"\s*((?:{_REMOTE}):)/", re.IGNORECASE)
"""What ``pathlib`` makes of ``s3://bucket``."""


def refusal(word: str) -> str:
    """Why a path or URI is neither read nor written, and what to do; empty where it is local.

    Examples
    --------
    >>> refusal("data/cell.h5"), refusal("phantom:1x8x8?seed=7")
    ('', '')
    >>> refusal("zarr://s3://bucket/em")
    'only local paths and phantom: are read and written, not s3://; copy it to a local disk and name that path'
    """
    schemes, rest = [], word
    while found := _SCHEME.match(rest) or _FOLDED.match(rest):
        schemes.append(found[1].rpartition("::")[2].rstrip(":").lower())
        rest = rest[found.end() :]
    if not schemes:
        return ""
    remedy = "copy it to a local disk and name that path"
    if rest.startswith("/") and set(schemes) & {"file"}:
        remedy = f"name the path alone, {rest}"
    return f"only local paths and phantom: are read and written, not {schemes[-1]}://; {remedy}"


def is_local(word: str) -> bool:
    """Whether a path or URI is read and written."""
    return not refusal(word)


def local_path(word: str | os.PathLike[str], what: str) -> Path:
    """A path that somebody stated.

    Parameters
    ----------
    word
        The path.
    what
        It is, for the message.

    Raises
    ------
    ConfigError
        If it is empty, no path, or leads to another place than a local disk.
    """
    if not isinstance(word, str | os.PathLike):
        raise ConfigError(f"{what} is {word!r:.80}, expected a path; give a str or a pathlib.Path")
    text = os.fspath(word)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"{what} is {text!r:.80}, which is no path; name a file or a folder")
    why = refusal(text)
    if why:
        raise ConfigError(f"{what} is {text}, but {why}")
    return Path(text)
