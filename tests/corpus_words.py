"""Hostile and damaged YAML configurations, and words of the command line. ``YAML`` and ``WORDS`` name them."""

from __future__ import annotations

import random
from collections.abc import Callable

GOOD = """\
experiment_name: fuzz
system:
  device: cpu
  num_cpus: 1
  seed: 3
inference:
  volume_mode:
    step: 1
  sliding_window:
    overlap: 0.5
  test_time_augmentation:
    flip_axes: null
"""


def laughs() -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    return "\n".join(lines).encode()


def typo(seed: int) -> bytes:
    """The good text with characters replaced, doubled or lost."""
    rng, text = random.Random(seed), list(GOOD)
    for _ in range(1 + seed % 4):
        at = rng.randrange(len(text))
        text[at] = rng.choice(
            ["", "\t", ":", "- ", "{", "*a ", "&a ", "!!binary ", "\n", "%", "'", "\0", "é", text[at] * 2]
        )
    return "".join(text).encode()


TEXTS: dict[str, Callable[[], bytes]] = {
    "python os.system": lambda: b"description: !!python/object/apply:os.system ['touch canary']",
    "python name": lambda: b"description: !!python/name:os.system",
    "python module": lambda: b"description: !!python/module:os",
    "python new": lambda: b"description: !!python/object/new:os.system ['touch canary']",
    "python tuple": lambda: b"description: !!python/tuple [1, 2]",
    "hydra target": lambda: b"system: {_target_: os.system, command: touch canary}",
    "resolver": lambda: b"description: ${oc.env:HOME}${oc.create:x}",
    "nested resolver": lambda: b"inference: {volume_mode: {file_list: [['${oc.decode:${oc.env:HOME}}']]}}",
    "interpolates itself": lambda: b"description: ${description}",
    "interpolates in a circle": lambda: b"description: ${experiment_name}\nexperiment_name: ${description}",
    "laughs": laughs,
    "laughs in a value": lambda: laughs().replace(b"a0:", b"description: 1\na0:", 1),
    "anchor of itself": lambda: b"description: &a [*a]",
    "merge of itself": lambda: b"system: &a\n  <<: *a\n  seed: 1",
    "merge bomb": lambda: b"\n".join(
        [b"a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}".encode() for i in range(1, 9))]
    ),
    "deep list": lambda: b"description: " + b"[" * 20_000,
    "deep mapping": lambda: b"".join(b" " * i + b"a:\n" for i in range(1500)),
    "digits": lambda: b"system: {seed: " + b"9" * 6000 + b"}",
    "hexadecimal": lambda: b"system: {seed: 0x" + b"f" * 6000 + b"}",
    "sexagesimal": lambda: b"system: {seed: 1" + b":59" * 4000 + b"}",
    "underscores": lambda: b"system: {seed: 1" + b"_" * 100_000 + b"}",
    "wrong integer": lambda: b"system: {seed: !!int xyz}",
    "wrong float": lambda: b"system: {seed: !!float xyz}",
    "wrong bool": lambda: b"system: {seed: !!bool xyz}",
    "wrong timestamp": lambda: b"description: !!timestamp 2001-99-99",
    "timestamp": lambda: b"description: 2001-99-99",
    "binary": lambda: b"description: !!binary \xc3\xa9\xc3\xa9",
    "set": lambda: b"system: !!set {device, seed}",
    "omap": lambda: b"system: !!omap [seed]",
    "pairs": lambda: b"system: !!pairs [seed: 1]",
    "complex key": lambda: b"? [a, {b: c}]\n: 1",
    "null key": lambda: b"~: 1",
    "number key": lambda: b"system: {7: 1, 0.5: 2, true: 3}",
    "key twice": lambda: b"system: {seed: 1}\nsystem: {seed: 2}",
    "two documents": lambda: b"system: {seed: 1}\n---\nsystem: {seed: 2}",
    "no document": lambda: b"---\n...\n",
    "empty": lambda: b"",
    "nul": lambda: bytes(100),
    "latin": lambda: b"description: \xff\xfe",
    "utf16": lambda: GOOD.encode("utf-16"),
    "surrogate": lambda: b'description: "\\ud800"',
    "escape": lambda: b'description: "\\x1b[2J\\a\\0"',
    "tabs": lambda: b"system:\n\tseed: 1",
    "directive": lambda: b"%YAML 9.9\n---\nsystem: {seed: 1}",
    "tag": lambda: b"system: !<tag:evil> {seed: 1}",
    "infinite": lambda: b"system: {memory_budget_gb: .inf}",
    "not a number": lambda: b"system: {memory_budget_gb: .nan}",
    "huge": lambda: b"system: {num_cpus: 1000000000000000}",
    "overlap": lambda: b"inference: {sliding_window: {overlap: 1.0e+400}}",
    "window": lambda: b"inference: {sliding_window: {window_size: [1000000000000, 1000000000000]}}",
    "output outside": lambda: b"inference: {data: {output_suffix: ../../canary}}",
    "missing": lambda: b"description: ???",
    "long": lambda: b"description: " + b"x" * (8 << 20),
}
YAML: dict[str, Callable[[], bytes]] = TEXTS | {f"typo {i}": (lambda i=i: typo(i)) for i in range(16)}

WORDS: dict[str, str] = {
    "deep list": "system.seed=" + "[" * 2000,
    "deep closed list": "system.seed=" + "[" * 400 + "]" * 400,
    "digits": "system.seed=" + "9" * 6000,
    "surrogate": "description=\udcff",
    "many": "description=[" + "a," * 500 + "a]",
    "function": "system.seed=range(1,1000000000000)",
    "sort": "system.seed=sort(extend_list([1],glob(*)))",
    "cast": "system.seed=" + "int(" * 50 + "1" + ")" * 50,
    "resolver": "description=${oc.decode:'${oc.env:HOME}'}",
    "newline": "description=a\nb",
}
