"""The command line: words in, objects from below, progress on stderr, results and paths on stdout, exit codes.

0 all done; 2 wrong usage or configuration; 3 some volumes failed or nothing could be done; 130, 138, 143 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from connectomics.cli import forecast
from connectomics.cli.arguments import INSTANCES, parse_command, parse_mode
from connectomics.cli.exit import FAILED, guarded, leave
from connectomics.cli.usage import named_disk, named_run, overrides_of, right_form, say, told_apart
from connectomics.core.errors import ConfigError
from connectomics.core.places import local_path

if TYPE_CHECKING:
    from connectomics.assembly.engine.engine import Engine
    from connectomics.commands.evaluate import Scores
    from connectomics.config.load import Stated
    from connectomics.config.schema import Config
    from connectomics.jobs.outcome import VolumeOutcome
    from connectomics.volumes.listing import VolumeSource


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    words = parse_command(arguments)
    return guarded(_COMMANDS[words.command], words)


def run_program() -> NoReturn:
    """The program ``connectomics``: as ``main``, and the process ends."""
    leave(main)


def script_main(arguments: Sequence[str] | None = None) -> int:
    """Run a command as ``main`` does, for ``scripts/main.py``, where ``--mode`` names the command."""
    words = parse_mode(arguments, __doc__)
    return guarded(_COMMANDS[words.command], words)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """While open, nothing is collected, and all there is afterwards is never looked at until the command ends.

    What imports make stays, which the garbage collector would find out time and again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _configured(words: argparse.Namespace, overrides: Stated | None = None) -> Config:
    """The configuration of a command, some of which take no file; ``overrides`` instead of all words."""
    from connectomics.config.load import load_config

    return load_config(vars(words).get("config"), overrides_of(words) if overrides is None else overrides)


def _infer_volume(words: argparse.Namespace) -> int:
    config, checkpoint = named_run(words)
    with _importing():
        from connectomics.assembly.engine.make_engine import build_engine
        from connectomics.assembly.volumes import named_sources, share_of, stated_volumes

    volumes = stated_volumes(config.inference.volume_mode)
    engine = build_engine(config, checkpoint)
    named = named_sources(volumes, engine.spec.channels, engine.settings.folder)
    sources = share_of(config.inference.volume_mode, named)
    forecast.check_limits(words, engine, sources)
    return _ended(_run(config, engine, sources))


def _run(config: Config, engine: Engine, sources: Sequence[VolumeSource]) -> list[VolumeOutcome]:
    from connectomics.assembly.engine.identity import case_note
    from connectomics.assembly.provenance import batch_note
    from connectomics.cli.progress import ProgressBar
    from connectomics.lightning.inference import VolumeProcessor, check_output_folder

    check_output_folder(engine.settings.folder)
    say(case_note(engine), file=sys.stderr)
    for deviation in engine.identity.deviations:
        say(f"not nnU-Net: {deviation}", file=sys.stderr)
    if config.system.backend == "auto":
        chosen = ", ".join(f"{key} {value}" for key, value in engine.settings.numeric_class.items())
        say(f"system.backend=auto: {chosen}", file=sys.stderr)
    for note in batch_note(engine):
        say(note, file=sys.stderr)
    if not config.decoding:
        with ProgressBar() as bar:
            return VolumeProcessor(config, engine, bar).run(sources)
    from connectomics.assembly.decode_jobs import check_run, decoding_request
    from connectomics.commands.decode import decode_outcomes

    request = decoding_request(config)
    check_run(request, engine)
    with ProgressBar() as bar:
        outcomes = VolumeProcessor(config, engine, bar).run(sources)
    with ProgressBar() as bar:
        return decode_outcomes(request, engine, outcomes, bar)


def _ended(outcomes: Sequence[VolumeOutcome]) -> int:
    """Print paths and the closing table; the exit code."""
    for outcome in outcomes:
        for path in outcome.paths:
            say(path)
    states = ("done", "skipped", "failed")
    counts = {state: sum(o.state == state for o in outcomes) for state in states}
    say("\n" + "\n".join(f"{state:8} {counts[state]:>6}" for state in states))
    for outcome in outcomes:
        if outcome.state == "failed":
            say(f"  failed: {outcome.name}: {outcome.reason}")
    return FAILED if counts["failed"] else 0


def _test(words: argparse.Namespace) -> int:
    config, checkpoint = named_run(words)
    with _importing():
        from connectomics.assembly.engine.make_engine import build_engine
        from connectomics.assembly.volumes import named_sources
        from connectomics.commands.evaluate import check_known_answers, evaluate_outcomes

    images = config.test.data.test_image
    if not images:
        raise ConfigError("test.data.test_image names no volume; set it to a path or a list of paths")
    engine = build_engine(config, checkpoint)
    sources = named_sources(images, engine.spec.channels, engine.settings.folder)
    labels = config.test.data.test_label if config.test.evaluation.enabled else None
    if labels:
        check_known_answers(config.test, sources, decodes=bool(config.decoding))
    outcomes = _run(config, engine, sources)
    code = _ended(outcomes)
    if labels:
        code = max(code, _print_scores(evaluate_outcomes(config.test, engine, outcomes), as_json=False))
    return code


def _evaluate(words: argparse.Namespace) -> int:
    stated = [INSTANCES] if words.instances else []
    config = _configured(words, [*stated, *overrides_of(words)])
    from connectomics.assembly.settings import memory_budget_bytes
    from connectomics.commands.evaluate import evaluate_volumes, stated_comparisons
    from connectomics.evaluate.comparison import Comparison
    from connectomics.lightning.inference import check_output_folder

    if words.checkpoint is not None:
        raise ConfigError(f"--checkpoint {words.checkpoint}: volumes are compared without a model; leave it out")
    named = words.prediction is not None  # the script's mode takes them from test.data
    one = [Comparison(words.prediction, words.prediction, words.truth, words.ignore)]
    jobs = one if named else stated_comparisons(config.test.data)
    folder = Path(config.inference.data.output_path)
    check_output_folder(folder)
    budget = memory_budget_bytes(config.system.memory_budget_gb)
    return _print_scores(evaluate_volumes(folder, config.test.evaluation, jobs, budget_bytes=budget), words.json)


def _print_scores(scores: Scores, as_json: bool) -> int:
    """Print a table or JSON, and where the files are; the exit code."""
    from connectomics.commands.evaluate import score_table

    say(json.dumps(scores.content, indent=1) if as_json else score_table(scores))
    for path in () if as_json else (*scores.matches, scores.path):
        say(path)
    return FAILED if scores.failures else 0


def _inspect(words: argparse.Namespace) -> int:
    config = _configured(words)
    from connectomics.models.locate import looks_like_model

    if looks_like_model(Path(words.model)):
        from connectomics.assembly.engine.models import describe
        from connectomics.assembly.settings import model_settings

        facts = describe(model_settings(config.model, config.data, Path(words.model)))
    else:
        from connectomics.commands.inspect_volume import describe_volume

        facts = describe_volume(words.model, config.inference.axes, config.inference.voxel_size_nm)
    if words.json:
        say(json.dumps(facts, indent=1))
        return 0
    for key, value in facts.items():
        say(f"{key:18} {value}")
    return 0


def _config(words: argparse.Namespace) -> int:
    from dataclasses import asdict

    from connectomics.config.reference import entries

    found = entries(words.prefix)
    if not found:
        raise ConfigError(f"no key begins with {words.prefix!r}; connectomics config keys prints all")
    if words.json:
        say(json.dumps([asdict(entry) | {"meaning": entry.plain} for entry in found], indent=1))
        return 0
    wide = max(len(entry.key) + len(entry.default) for entry in found) + 3
    for entry in found:
        say(f"{f'{entry.key} = {entry.default}':{wide}}  {entry.plain} [{entry.allowed}]")
    return 0


def _verify(words: argparse.Namespace) -> int:
    others, overrides = told_apart(words.overrides)
    config = _configured(words, overrides)
    from connectomics.commands.verify import report, verify
    from connectomics.commands.verify_input import files_of_one

    files, outputs = files_of_one([words.volume, *others])
    if len(outputs) > 1:
        raise ConfigError(f"verify compares one output, found {', '.join(outputs)}; {right_form('verify')}")

    result = verify(
        config,
        words.model,
        files,
        output=local_path(outputs[0], "OUTPUT") if outputs else None,
        samples=words.samples,
        largest=words.max_voxels,
        threshold=words.threshold,
        certificate=words.certificate,
    )
    say("\n".join(report(result)))
    return 0 if result.passed else FAILED


def _decode(words: argparse.Namespace) -> int:
    config = _configured(words)
    from connectomics.assembly.decode_inputs import decoding_input
    from connectomics.assembly.decode_jobs import decoding_request
    from connectomics.cli.progress import ProgressBar
    from connectomics.commands.decode import Decoder
    from connectomics.lightning.inference import check_output_folder

    source = decoding_input(words.volume)
    check_output_folder(Path(config.inference.data.output_path))
    with ProgressBar() as bar:
        return _ended(Decoder(decoding_request(config), bar).run([source]))


def _reproduce(words: argparse.Namespace) -> int:
    from connectomics.assembly.reproduction import reproduce

    say(reproduce(words.output))
    return 0


def _status(words: argparse.Namespace) -> int:
    from connectomics.commands.status import status_of

    status = status_of(words.run)
    say(json.dumps(status.as_dict(), indent=1) if words.json else "\n".join(status.lines()))
    return 0


def _verify_run(words: argparse.Namespace) -> int:
    from connectomics.commands.verify_run import verify_run

    if words.sample is not None and words.sample < 1:
        raise ConfigError(f"--sample is {words.sample}, expected at least 1")
    findings = verify_run(words.run, words.sample)
    say("\n".join(line for finding in findings for line in finding.lines()) or "nothing to read again")
    return FAILED if any(finding.damaged for finding in findings) else 0


def _convert(words: argparse.Namespace) -> int:
    config = _configured(words)
    from connectomics.assembly.engine.models import convert
    from connectomics.assembly.settings import model_request

    for key, value in convert(model_request(config.model, words.model), words.output).items():
        say(f"{key:18} {value}")
    return 0


def _doctor(words: argparse.Namespace) -> int:
    from connectomics.cli.diagnosis import lines_of

    named = named_disk(words)
    if named is not None:
        from connectomics.cli.disk import examine_disk

        folder, config = named
        findings = examine_disk(folder, config.system.stale_after_s, peer=words.peer)
    else:
        config, checkpoint = named_run(words)
        from connectomics.cli.doctor import examine

        findings = examine(config, checkpoint)
    say("\n".join(lines_of(findings)))
    return 0 if all(f.ok for f in findings) else FAILED


def _demo(words: argparse.Namespace) -> int:
    from connectomics.cli.progress import ProgressBar
    from connectomics.commands.demo import run_demo

    with ProgressBar() as bar:
        lines = run_demo(words.output, bar)
    say("\n".join(lines))
    return 0


def _from_nnunet(words: argparse.Namespace) -> int:
    from dataclasses import fields

    model = _model_of(words)
    for word in ("npp", "nps", "verbose", "not_on_device"):
        if vars(words)[word]:
            say(f"note: {word} changes nothing here and is ignored", file=sys.stderr)
    with _importing():
        from connectomics.cli.progress import ProgressBar
        from connectomics.commands.from_nnunet import FolderPrediction, NnunetCall
        from connectomics.lightning.inference import check_output_folder

    stated = {field.name: vars(words)[field.name] for field in fields(NnunetCall) if field.name != "model"}
    call = NnunetCall(model=model, **stated)
    prediction = FolderPrediction(call, [word for word in overrides_of(words) if isinstance(word, str)])
    say(prediction.case_note, file=sys.stderr)
    for deviation in prediction.deviations:
        say(f"not nnU-Net's default: {deviation}", file=sys.stderr)
    check_output_folder(prediction.own_folder)
    if call.save_probabilities:
        say(f"note: probabilities are written as HDF5 in {prediction.own_folder}, not as .npz", file=sys.stderr)
    if words.disable_progress_bar:
        return _ended(prediction.run())
    with ProgressBar() as bar:
        outcomes = prediction.run(bar)
    return _ended(outcomes)


def _model_of(words: argparse.Namespace) -> Path:
    """The training folder that nnU-Net's arguments mean."""
    if words.m is not None and (words.d or words.c):
        raise ConfigError("-m and -d or -c both name the model; give -m FOLDER, or -d DATASET -c CONFIGURATION")
    if words.m is not None:
        return Path(words.m)
    if words.d is None or words.c is None:
        raise ConfigError("no model is named; give -d DATASET -c CONFIGURATION, or the training folder with -m")
    from connectomics.models.installed import installed_model

    return installed_model(words.d, words.c, words.p, words.tr, environment=os.environ)


_COMMANDS = {
    "infer-volume": _infer_volume,
    "plan": forecast.plan,
    "tune": forecast.tune,
    "test": _test,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "config": _config,
    "verify": _verify,
    "decode": _decode,
    "reproduce": _reproduce,
    "status": _status,
    "verify-run": _verify_run,
    "convert": _convert,
    "doctor": _doctor,
    "demo": _demo,
    "from-nnunet": _from_nnunet,
}
