"""Ways to damage a file or a JSON value that every kind of input shares; each is decided by a seed alone."""

from __future__ import annotations

import copy
import functools
import json
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

HUGE = 10**15
STRANGE: tuple[Any, ...] = (
    None,
    True,
    "",
    "x" * 5000,
    "../../../../etc/passwd",
    "os.system",
    [],
    {},
    [[[]]],
    {"a": {"a": None}},
    0,
    -1,
    0.5,
    HUGE,
    -HUGE,
    10**30,
    float("nan"),
    float("inf"),
    "\ud800",
    "\0",
    "1e9",
    ["a", None, 3.5],
)
"""What may stand in place of any JSON value."""

Bytes = Callable[[bytes], bytes]


def flipped(seed: int, count: int = 8, first: int = 0, last: int | None = None) -> Bytes:
    """Flip ``count`` bits between two offsets."""

    def change(data: bytes) -> bytes:
        rng, changed = random.Random(seed), bytearray(data)
        for _ in range(count):
            changed[rng.randrange(first, min(len(data), last or len(data)))] ^= 1 << rng.randrange(8)
        return bytes(changed)

    return change


def cut(share: float) -> Bytes:
    """Keep the first part of a file."""
    return lambda data: data[: int(len(data) * share)]


def overwritten(seed: int, count: int = 32) -> Bytes:
    """Put noise over a part of a file."""

    def change(data: bytes) -> bytes:
        rng = random.Random(seed)
        at = rng.randrange(max(1, len(data) - count))
        return data[:at] + rng.randbytes(count) + data[at + count :]

    return change


def repeated(seed: int, longest: int = 64) -> Bytes:
    """Double a part of a file, so that all behind it moves."""

    def change(data: bytes) -> bytes:
        rng = random.Random(seed)
        at = rng.randrange(len(data))
        return data[:at] + data[at : at + rng.randrange(1, longest)] + data[at:]

    return change


def put(offset: int, value: bytes) -> Bytes:
    """Write a field over what stands at an offset."""
    return lambda data: data[:offset] + value + data[offset + len(value) :]


def blind(seed: int) -> Bytes:
    """Any of the ways above, chosen by the seed."""
    ways = (
        flipped(seed),
        flipped(seed, 3, 0, 512),
        overwritten(seed),
        repeated(seed),
        cut(random.Random(seed).random()),
    )
    return ways[seed % len(ways)]


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value within a JSON value stands, parents first."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a JSON value with one value within replaced."""
    changed = copy.deepcopy(value)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = new
    return changed


def odd_json(seed: int, value: Any) -> bytes:
    """A JSON text in which one value was deleted, replaced by something strange, or stands twice."""
    rng = random.Random(seed)
    path = rng.choice(list(paths_in(value)))
    if seed % 4 == 0:
        changed = copy.deepcopy(value)
        holder = changed
        for key in path[:-1]:
            holder = holder[key]
        del holder[path[-1]]
        return json.dumps(changed).encode()
    if seed % 17 == 1:
        text = json.dumps(value)
        return (text[:-1] + ", " + json.dumps({str(path[-1]): rng.choice(STRANGE)})[1:]).encode()
    return json.dumps(replaced(value, path, rng.choice(STRANGE))).encode()


def odd_text(name: str, text: bytes) -> bytes:
    """A damage of a JSON text by its name."""
    damages: dict[str, Callable[[], bytes]] = {
        "cut": lambda: text[: len(text) // 2],
        "latin": lambda: text[:-1] + b', "\xff\xfe": 1}',
        "deep": lambda: b'{"a":' * 50_000 + text,
        "deep_value": lambda: text[:-1] + b', "a": ' + b"[" * 500_000 + b"]" * 500_000 + b"}",
        "digits": lambda: text[:-1] + b', "a": ' + b"9" * 6000 + b"}",
        "list": lambda: b"[" + text + b"]",
        "bare": lambda: b"7",
        "nul": lambda: bytes(64),
        "bom": lambda: b"\xef\xbb\xbf" + text,
        "utf16": lambda: text.decode().encode("utf-16"),
    }
    return damages[name]()


TEXTS = ("cut", "latin", "deep", "deep_value", "digits", "list", "bare", "nul", "bom", "utf16")


def zeros_deflated(count: int) -> bytes:
    """A zlib stream of zeros: a thousandth of what it unpacks to; ``count`` is whole mebibytes."""
    check = (count % 65521) << 16 | 1  # Adler-32: the sum of the bytes is 0, that of the sums counts them
    return b"\x78\xda" + _zeros(count) + check.to_bytes(4, "big")


@functools.cache
def zeros_gzipped(count: int) -> bytes:
    """The same as a gzip file."""
    piece, check = bytes(1 << 20), 0
    for _ in range(count >> 20):
        check = zlib.crc32(piece, check)
    head = b"\x1f\x8b\x08" + bytes(6) + b"\xff"
    return head + _zeros(count) + check.to_bytes(4, "little") + (count % 2**32).to_bytes(4, "little")


def _zeros(count: int) -> bytes:
    """Deflated zeros: a mebibyte is packed once and then repeated, which a full flush makes possible."""
    packer = zlib.compressobj(9, wbits=-15)
    piece = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return piece * (count >> 20) + b"\x03\x00"
