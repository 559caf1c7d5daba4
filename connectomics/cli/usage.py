"""Which of the words are models, volumes and configuration, and what is said where they are none of these."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from connectomics.core.errors import NO_MODEL, ConfigError
from connectomics.core.places import local_path, refusal
from connectomics.core.text import visible

if TYPE_CHECKING:
    from connectomics.config.schema import Config

FORMS = {
    "infer-volume": "MODEL VOLUME… -o OUT key=value…",
    "plan": "MODEL VOLUME… key=value…",
    "test": "MODEL test.data.test_image=VOLUME test.data.test_label=TRUTH -o OUT",
    "doctor": "FOLDER, or MODEL VOLUME… key=value…",
    "tune": "MODEL VOLUME key=value…",
    "evaluate": "PREDICTION TRUTH -o OUT key=value…",
    "inspect": "MODEL_OR_VOLUME key=value…",
    "config": "keys PREFIX",
    "verify": "MODEL VOLUME [OUTPUT] key=value…",
    "decode": "VOLUME_OR_RUN 'decoding=[{name: connected_components}]' -o OUT",
    "reproduce": "OUTPUT",
    "status": "RUN",
    "verify-run": "RUN",
    "convert": "MODEL OUTPUT",
    "demo": "--output FOLDER",
    "from-nnunet": "-i IMAGES -o LABELS -m MODEL",
}
"""The words behind each command, in the shortest form that works."""
OTHERS = {
    **dict.fromkeys(("predict", "infer", "inference", "segment", "label", "run"), "infer-volume"),
    **dict.fromkeys(("info", "show", "describe", "header", "ls"), "inspect"),
    **dict.fromkeys(("score", "eval", "compare", "metrics"), "evaluate"),
    **dict.fromkeys(("check", "check-install", "env"), "doctor"),
    **dict.fromkeys(("nnUNetv2_predict", "nnunet", "nnunetv2"), "from-nnunet"),
    **dict.fromkeys(("estimate", "dry-run", "forecast"), "plan"),
    **dict.fromkeys(("export", "exports"), "convert"),
    **dict.fromkeys(("benchmark", "calibrate"), "tune"),
    **dict.fromkeys(("instances", "components", "objects", "watershed"), "decode"),
    **dict.fromkeys(("keys", "help"), "config"),
    **dict.fromkeys(("example",), "demo"),
}
"""What other programs call a command."""
OPTIONS = {
    "output": "inference.data.output_path",
    "gpu": "system.device",
    "threads": "system.num_cpus",
    "cpus": "system.num_cpus",
    "input": "inference.volume_mode.file_pattern",
    "batch_size": "inference.sliding_window.sw_batch_size",
    "disable_tta": "inference.test_time_augmentation.enabled",
    "memory": "system.memory_budget_gb",
    "verbose": "description",
}
_KEY = re.compile(r"[+~]*[A-Za-z_][\w.@]*")
OUTPUT_KEY, VOLUMES = "inference.data.output_path", "inference.volume_mode"


class Parser(argparse.ArgumentParser):
    """A parser whose errors end with the nearest right form."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and the right form, and end the process with 2."""
        unknown = re.match(r"argument COMMAND: invalid choice: '(.*)' \(", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], FORMS, 1, 0.4)
            command = OTHERS.get(unknown[1]) or (near[0] if near else "")
            hint = f"; did you mean {command}?" if command else f"; commands are {', '.join(FORMS)}"
            message = f"there is no command {unknown[1]!r}{hint}"
        else:
            command = self.prog.rpartition(" ")[2]
        usage = f"usage: connectomics {command} {FORMS[command]}\n" if command in FORMS else self.format_usage()
        self.exit(2, f"{usage}{self.prog}: error: {visible(message)}\n")


def right_form(command: str) -> str:
    """How a command is written.

    Examples
    --------
    >>> right_form("status")
    'write connectomics status RUN'
    """
    return f"write connectomics {command} {FORMS[command]}"


def hint_of(option: str, known: Sequence[str]) -> str:
    """What stands for an option that there is none of: the nearest one, a key, or a file of that name."""
    if Path(option).exists():
        return f"the file of that name is ./{option}"
    name = option.partition("=")[0]
    near = difflib.get_close_matches(name, known, 1, 0.8)
    if near:
        return f"did you mean {near[0]}?"
    from connectomics.config.load import known_keys

    plain = name.lstrip("-").replace("-", "_")
    last = {key.rpartition(".")[2]: key for key in known_keys()}
    close = difflib.get_close_matches(plain, last, 1, 0.75)
    key = OPTIONS.get(plain) or (plain if plain in known_keys() else "") or (last[close[0]] if close else "")
    return f"write {key}=VALUE" if key else ""


def folder(word: str) -> Path:
    """A path on a local disk; for argparse."""
    try:
        return local_path(word, "it")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def volume(word: str) -> str:
    """A volume on a local disk, or a phantom; for argparse."""
    if refusal(word):
        raise argparse.ArgumentTypeError(f"{word}: {refusal(word)}")
    return word


def told_apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths and volumes, and words of configuration: those with a known key before their first ``=``.

    What looks like ``key=value`` is configuration, too, so that a mistaken key is told, unless it is there on disk.

    Raises
    ------
    ConfigError
        If a word is a key without a value.

    Examples
    --------
    >>> told_apart(["model", "phantom:1x8x8?seed=7", "system.device=cpu", "seed=1"])
    (['model', 'phantom:1x8x8?seed=7'], ['system.device=cpu', 'seed=1'])
    """
    from connectomics.config.load import kinds

    plain, overrides = [], []
    for word in words:
        head, mark, _ = word.partition("=")
        if mark and (_key_of(word) in kinds() or (_KEY.fullmatch(head) and not Path(word).exists())):
            overrides.append(word)
        elif not mark and "." in word and word in kinds() and not Path(word).exists():
            raise ConfigError(f"{word} is a key without a value; write key=value, here {word}=VALUE")
        else:
            plain.append(word)
    return plain, overrides


def overrides_of(words: argparse.Namespace) -> list[str | Mapping[str, object]]:
    """The words of configuration of a command that takes no further paths.

    Raises
    ------
    ConfigError
        If there are other words.
    """
    plain, overrides = told_apart(words.overrides)
    if plain:
        raise ConfigError(f"{plain[0]} is one word too many, and no key=value; {right_form(words.command)}")
    return [*overrides, *_output(words, overrides)]


def _output(words: argparse.Namespace, overrides: Sequence[str]) -> list[Mapping[str, object]]:
    """The folder of ``-o`` as configuration."""
    stated = vars(words).get("output_path")
    if stated is None:
        return []
    if OUTPUT_KEY in map(_key_of, overrides):
        raise ConfigError(f"-o {stated} and {OUTPUT_KEY} both name the folder of results; state one of them")
    return [{OUTPUT_KEY: stated}]


def _key_of(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def named_run(words: argparse.Namespace) -> tuple[Config, Path | None]:
    """The configuration and the model of a command that labels volumes, named by ``MODEL VOLUME…`` or by keys.

    Raises
    ------
    ConfigError
        If something is named twice or not at all, or a volume is not there.
    """
    from connectomics.config.load import load_config
    from connectomics.models.locate import looks_like_model
    from connectomics.volumes.listing import expand

    plain, stated_words = told_apart(words.overrides)
    overrides: list[str | Mapping[str, object]] = [*stated_words, *_output(words, stated_words)]
    config, checkpoint = load_config(words.config, overrides), words.checkpoint
    stated = config.model.nnunet_checkpoint
    if stated is None and checkpoint is None and not plain and words.command != "doctor":
        raise ConfigError(NO_MODEL)
    if plain and checkpoint is None and (stated is None or looks_like_model(Path(plain[0]))):
        checkpoint = local_path(plain.pop(0), "MODEL")
    if not plain:
        return config, checkpoint
    if words.command == "test":
        raise ConfigError(f"{plain[0]} is one word too many; {right_form('test')}")
    if {f"{VOLUMES}.file_list", f"{VOLUMES}.file_pattern"} & set(map(_key_of, stated_words)):
        raise ConfigError(f"{plain[0]} and {VOLUMES} both name volumes; leave one of them out")
    found = [uri for word in plain for uri in expand(word, word) if len(plain) == 1 or Path(uri).suffix != ".run"]
    overrides.append({f"{VOLUMES}.file_list": list(dict.fromkeys(found)), f"{VOLUMES}.file_pattern": None})
    return load_config(words.config, overrides), checkpoint


def named_disk(words: argparse.Namespace) -> tuple[Path, Config] | None:
    """The folder whose disk ``doctor`` is to measure, and the configuration; None where its words mean a run.

    A folder is meant if it stands alone, and is neither a model nor a volume.

    Raises
    ------
    ConfigError
        If a folder must be meant and is not named.
    """
    from connectomics.config.load import load_config

    plain, stated = told_apart(words.overrides)
    if words.peer and (len(plain) != 1 or words.checkpoint is not None):
        raise ConfigError("--peer takes one folder and no model; write connectomics doctor FOLDER --peer")
    if len(plain) != 1 or words.checkpoint is not None:
        return None
    config = load_config(words.config, [*stated, *_output(words, stated)])
    named = config.model.nnunet_checkpoint is None and not refusal(plain[0])
    if words.peer or (named and _is_mere_folder(Path(plain[0]))):
        return local_path(plain[0], "FOLDER"), config
    return None


def _is_mere_folder(path: Path) -> bool:
    """Whether a path is a folder that is neither a model nor, by its name or its files, a volume."""
    from connectomics.models.locate import looks_like_model
    from connectomics.volumes.input_formats import input_formats

    if not path.is_dir() or looks_like_model(path):
        return False
    forms = [form for form in input_formats() if form.is_folder]
    suffixes = tuple(suffix for form in forms for suffix in form.suffixes)
    markers = [marker for form in forms for marker in form.markers or ()]
    return not path.name.lower().endswith(suffixes) and not any((path / marker).exists() for marker in markers)


def say(text: object = "", file: TextIO | None = None) -> None:
    """Print, with control characters and what the terminal has no letters for written out."""
    stream = file or sys.stdout
    coding = stream.encoding or "utf-8"  # a stream in memory has none
    print(visible(str(text)).encode(coding, "backslashreplace").decode(coding), file=stream)
