"""Text that files bring, made harmless to a terminal; whatever is printed or logged goes through ``visible``."""

from __future__ import annotations

import logging
import re

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufff9-\ufffb]"
)
"""Control characters but tab and end of line, what turns the direction of text, what has no width, and bytes that are
no UTF-8, which Python keeps in names as surrogates."""


def visible(text: str) -> str:
    r"""Text with what a terminal would obey or hide written out.

    Examples
    --------
    >>> visible("mito\x1b[2J"), visible("null\tzéro\n"), visible("caf\udce9.h5")
    ('mito\\x1b[2J', 'null\tzéro\n', 'caf\\xe9.h5')
    """
    return _HIDDEN.sub(_written, text)


def _written(found: re.Match[str]) -> str:
    number = ord(found[0])
    if 0xDC80 <= number <= 0xDCFF:
        number -= 0xDC00
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


class VisibleFormatter(logging.Formatter):
    """Formats records of a log with ``visible``."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a text."""
        return visible(super().format(record))
