"""The command line: words in, objects from below, progress on stderr, results and paths on stdout, exit codes.

0 all done; 2 wrong usage or configuration; 3 some volumes failed or nothing could be done; 130, 138, 143 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from connectomics import cli_forecast
from connectomics.errors import ConfigError, ConnectomicsError

if TYPE_CHECKING:
    from connectomics.build.engine import Engine
    from connectomics.config.schema import Config
    from connectomics.io.listing import VolumeSource
    from connectomics.lightning.evaluation import Scores
    from connectomics.lightning.inference import VolumeOutcome

FAILED = 3
_INSTANCES = "test.evaluation.metrics=[ap,f1,pq,voi,arand]"
INTERRUPTED = 128  # plus the signal's number
EXAMPLES = """\
examples:
  connectomics infer-volume --checkpoint MODEL inference.volume_mode.file_pattern='data/*.h5' \\
      inference.data.output_path=out/
  connectomics plan --checkpoint MODEL inference.volume_mode.file_pattern='data/*.h5'
  connectomics tune MODEL data/cell.h5
  connectomics test --config tutorials/nnunet_mito_inference.yaml --checkpoint MODEL
  connectomics evaluate out/NAME_labels.h5 TRUTH
  connectomics inspect MODEL
  connectomics convert MODEL OUTPUT
  connectomics doctor --checkpoint MODEL
  connectomics verify MODEL VOLUME
  connectomics decode out/NAME_labels.run 'decoding=[{name: connected_components}]' inference.data.output_path=out/
  connectomics reproduce out/NAME_labels.h5
  connectomics status out/NAME_labels.run
  connectomics verify-run out/NAME_labels.run
  connectomics demo
  connectomics from-nnunet -i IMAGES -o LABELS -d 4 -c 2d
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    return _guarded(_parsed(_parser(), arguments))


def script_main(arguments: Sequence[str] | None = None) -> int:
    """The entry point of ``scripts/main.py``: ``--mode`` names the command."""
    parser = argparse.ArgumentParser(
        prog="main.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", required=True, choices=["test", "infer-volume", "evaluate"], help="what to do")
    _add_run_words(parser)
    words = _parsed(parser, arguments)
    words.command = words.mode
    vars(words).update(prediction=None, truth=None, ignore=None, instances=False, json=False)
    vars(words).update(max_hours=None, max_gb=None)
    return _guarded(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="connectomics",
        description="Run pre-trained nnU-Net v2 models on electron-microscopy volumes of any size.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("infer-volume", "label a list of volumes; finished ones are skipped, unfinished ones resumed"),
        ("plan", "say what infer-volume would take with these words: time, memory, disk, reading"),
        ("test", "label the volumes of test.data and, where labels are given, measure the result"),
        ("doctor", "check versions, device, memory, disk, model and volumes"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        _add_run_words(command)
        if name in ("infer-volume", "plan"):
            cli_forecast.add_limits(command)
        if name == "plan":
            command.add_argument("--json", action="store_true", help="print JSON")
    cli_forecast.add_tune_words(commands)
    _add_evaluate_words(commands)
    inspect = commands.add_parser("inspect", help="say what a checkpoint is, without running anything it brings")
    inspect.add_argument("model", type=Path, help="training folder, fold folder, exported .zip or .pth file")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, e.g. model.folds=[0]")
    text = "let nnunetv2 label samples of a volume, hold ours or an existing output against them, write a certificate"
    verify = commands.add_parser("verify", help=text, description=text)
    verify.add_argument("model", type=Path, help="training folder, fold folder or .pth file")
    verify.add_argument("volume", help="the volume")
    verify.add_argument("--samples", type=int, default=3, help="sections to compare, where each is a case")
    verify.add_argument("--max-voxels", type=int, default=1 << 24, help="of a volume that nnU-Net is given at once")
    verify.add_argument("--threshold", type=float, default=1e-4, help="largest share of differing labels that passes")
    verify.add_argument("--certificate", type=Path, default=Path("certificate.json"), help="JSON file to write")
    text = "labels of the whole volume that a run wrote (else ours are computed), and configuration of ours"
    verify.add_argument("overrides", nargs="*", metavar="OUTPUT, key=value", help=text)
    text = "turn labels or probabilities into objects: the steps of decoding, a volume of ids and a table"
    decode = commands.add_parser("decode", help=text, description=text)
    decode.add_argument("volume", help="a volume, or the RUN folder of an earlier run")
    decode.add_argument("--config", type=Path, help="YAML file; see tutorials/nnunet_mito_inference.yaml")
    decode.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, e.g. decoding=[…]")
    text = "print the command that made an output"
    again = commands.add_parser("reproduce", help=text, description=text)
    again.add_argument("output", type=Path, help="a final output; its RUN folder lies beside it")
    text = "how far a run has come, who works on it and how long it will take"
    status = commands.add_parser("status", help=text, description=text)
    status.add_argument("run", type=Path, help="RUN folder, OUTPUT_PATH/NAME_labels.run")
    status.add_argument("--json", action="store_true", help="print JSON")
    text = "read again what a run wrote and compare checksums; what is damaged is made again by the next run"
    reread = commands.add_parser("verify-run", help=text, description=text)
    reread.add_argument("run", type=Path, help="RUN folder, OUTPUT_PATH/NAME_labels.run")
    amount = reread.add_mutually_exclusive_group()
    amount.add_argument("--sample", type=int, metavar="N", help="blocks of each stage and files of each output to read")
    amount.add_argument("--all", action="store_true", help="read everything, which is the default")
    text = "write an inference-only copy of a model: safetensors and JSON with a manifest of digests, no pickle"
    convert = commands.add_parser("convert", help=text, description=text)
    convert.add_argument("model", type=Path, help="training folder, fold folder, exported .zip or .pth file")
    convert.add_argument("output", type=Path, help="folder to write, which must not exist yet")
    convert.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, e.g. model.folds=[0]")
    demo = commands.add_parser("demo", help="the whole job on an embedded example")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the results")
    _add_nnunet_words(
        commands.add_parser("from-nnunet", help="take the arguments of nnUNetv2_predict, write its file names")
    )
    return parser


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, with options and ``key=value`` words in any order, which argparse alone does not do."""
    words, rest = parser.parse_known_args(arguments)
    if rest and ("overrides" not in words or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        words.overrides = [*words.overrides, *rest]
    return words


def _add_run_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="YAML file; see tutorials/nnunet_mito_inference.yaml")
    parser.add_argument("--checkpoint", type=Path, help="nnU-Net training folder or .pth file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, e.g. system.device=cuda:0")


def _add_evaluate_words(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "measure labels or objects against their truth; no model is needed"
    evaluate = commands.add_parser("evaluate", help=text, description=text)
    evaluate.add_argument("prediction", help="a volume of labels or, with --instances, of ids")
    evaluate.add_argument("truth", help="a volume of the same shape; format, type and chunks may differ")
    evaluate.add_argument("--ignore", metavar="VOLUME", help="where it is not 0, voxels are not counted")
    text = f"short for {_INSTANCES}: compare objects by their ids"
    evaluate.add_argument("--instances", action="store_true", help=text)
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument("--config", type=Path, help="YAML file; see tutorials/nnunet_mito_inference.yaml")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, e.g. test.evaluation.…")
    evaluate.set_defaults(checkpoint=None)


def _add_nnunet_words(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_predict`` and ``nnUNetv2_predict_from_modelfolder``, with their defaults."""
    add = parser.add_argument
    add("-i", type=Path, required=True, metavar="FOLDER", help="images CASE_0000.png, CASE_0001.png, …")
    add("-o", type=Path, required=True, metavar="FOLDER", help="where the labels CASE.png go")
    add("-m", type=Path, metavar="FOLDER", help="training folder, instead of -d, -c, -p and -tr")
    add("-d", metavar="DATASET", help="name or number of the dataset, found under $nnUNet_results")
    add("-c", metavar="CONFIGURATION", help="for example 2d or 3d_fullres")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="default: %(default)s")
    add("-tr", default="nnUNetTrainer", metavar="TRAINER", help="default: %(default)s")
    add("-f", nargs="+", default=["0", "1", "2", "3", "4"], metavar="FOLD", help="default: 0 1 2 3 4")
    add("-chk", default="checkpoint_final.pth", metavar="NAME", help="default: %(default)s")
    add("-step_size", type=float, default=0.5, help="step between windows, a share of the patch; default: %(default)s")
    add("--disable_tta", action="store_true", help="no mirroring")
    add("--save_probabilities", action="store_true", help="also write probabilities, as HDF5")
    add("--continue_prediction", "--c", action="store_true", help="leave cases alone whose labels are there")
    add("-num_parts", type=int, default=1, help="of how many calls this is one; default: %(default)s")
    add("-part_id", type=int, default=0, help="which of them, from 0 on; default: %(default)s")
    add("-device", choices=["cuda", "cpu", "mps"], default="cuda", help="default: %(default)s")
    add("--disable_progress_bar", action="store_true", help="no progress")
    add("-prev_stage_predictions", type=Path, metavar="FOLDER", help="labels CASE.png of a cascade's first stage")
    for word in ("-npp", "-nps"):
        add(word, type=int, help="ignored: no processes are needed for reading and writing")
    for word in ("--verbose", "--not_on_device"):
        add(word, action="store_true", help="ignored")
    add("overrides", nargs="*", metavar="key=value", help="configuration, e.g. system.memory_budget_gb=8")


class _Stopped(BaseException):
    """A signal asked for an end; whatever was finished is on disk already."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {signal.Signals(number).name}")
        self.number = number


def _stop(number: int, frame: FrameType | None) -> None:
    for repeated in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(repeated, signal.SIG_IGN)  # schedulers send them twice; once is enough
    raise _Stopped(number)


def _wait_asleep() -> None:
    """Let threads that wait for each other sleep, unless the environment says otherwise; before PyTorch is loaded.

    GNU OpenMP lets them spin for milliseconds, and where other programs use the same cores a network then took ten
    times as long.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _guarded(words: argparse.Namespace) -> int:
    """Run a command with errors turned into one sentence and an exit code."""
    _wait_asleep()
    before = {n: signal.signal(n, _stop) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with _warnings_on_stderr():
            return _COMMANDS[words.command](words)
    except (ConnectomicsError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code if isinstance(error, ConnectomicsError) else FAILED
    except _Stopped as stop:
        print("stopped by a signal; finished blocks are kept, the same command continues", file=sys.stderr)
        return INTERRUPTED + stop.number
    except KeyboardInterrupt:
        print("interrupted; finished blocks are kept, the same command continues", file=sys.stderr)
        return INTERRUPTED + signal.SIGINT
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """While open, warnings that the package logs are printed."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("connectomics")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _configured(words: argparse.Namespace) -> Config:
    from connectomics.config.load import load_config

    return load_config(words.config, words.overrides)


def _infer_volume(words: argparse.Namespace) -> int:
    config = _configured(words)
    from connectomics.build.engine import build_engine
    from connectomics.build.volumes import list_sources, share_of

    engine = build_engine(config, words.checkpoint)
    sources = share_of(config, list_sources(config, engine.spec.channels))
    cli_forecast.check_limits(words, config, engine, sources)
    return _ended(_run(config, engine, sources))


def _run(config: Config, engine: Engine, sources: Sequence[VolumeSource]) -> list[VolumeOutcome]:
    from connectomics.build.volumes import batch_note
    from connectomics.lightning.inference import VolumeProcessor, check_output_folder
    from connectomics.progress import ProgressBar

    for deviation in engine.deviations:
        print(f"not nnU-Net: {deviation}", file=sys.stderr)
    if config.system.backend == "auto":
        chosen = ", ".join(f"{key} {value}" for key, value in engine.settings.numeric_class.items())
        print(f"system.backend=auto: {chosen}", file=sys.stderr)
    for note in batch_note(config, engine):
        print(note, file=sys.stderr)
    check_output_folder(engine.settings.folder)
    if not config.decoding:
        with ProgressBar() as bar:
            return VolumeProcessor(config, engine, bar).run(sources)
    from connectomics.build.decoding import check_decoding
    from connectomics.build.watershed import check_run
    from connectomics.lightning.decode import decode_outcomes

    check_decoding(config)
    check_run(config, engine)
    with ProgressBar() as bar:
        outcomes = VolumeProcessor(config, engine, bar).run(sources)
    with ProgressBar() as bar:
        return decode_outcomes(config, engine, outcomes, bar)


def _ended(outcomes: Sequence[VolumeOutcome]) -> int:
    """Print paths and the closing table; the exit code."""
    for outcome in outcomes:
        for path in outcome.paths:
            print(path)
    states = ("done", "skipped", "failed")
    counts = {state: sum(o.state == state for o in outcomes) for state in states}
    print("\n" + "\n".join(f"{state:8} {counts[state]:>6}" for state in states))
    for outcome in outcomes:
        if outcome.state == "failed":
            print(f"  failed: {outcome.name}: {outcome.reason}")
    return FAILED if counts["failed"] else 0


def _test(words: argparse.Namespace) -> int:
    config = _configured(words)
    from connectomics.build.engine import build_engine
    from connectomics.build.volumes import named_sources
    from connectomics.lightning.evaluation import check_known_answers, evaluate_outcomes

    images = config.test.data.test_image
    if not images:
        raise ConfigError("test.data.test_image names no volume; set it to a path or a list of paths")
    engine = build_engine(config, words.checkpoint)
    sources = named_sources(images, engine.spec.channels)
    labels = config.test.data.test_label if config.test.evaluation.enabled else None
    if labels:
        check_known_answers(config, sources)
    outcomes = _run(config, engine, sources)
    code = _ended(outcomes)
    if labels:
        code = max(code, _print_scores(evaluate_outcomes(config, engine, outcomes), as_json=False))
    return code


def _evaluate(words: argparse.Namespace) -> int:
    from connectomics.config.load import load_config

    stated = [_INSTANCES] if words.instances else []
    config = load_config(words.config, [*stated, *words.overrides])
    from connectomics.evaluate.volumes import Comparison
    from connectomics.lightning.evaluation import evaluate_volumes, stated_comparisons
    from connectomics.lightning.inference import check_output_folder

    if words.checkpoint is not None:
        raise ConfigError(f"--checkpoint {words.checkpoint}: volumes are compared without a model; leave it out")
    named = words.prediction is not None  # the script's mode takes them from test.data
    one = [Comparison(words.prediction, words.prediction, words.truth, words.ignore)]
    jobs = one if named else stated_comparisons(config)
    check_output_folder(Path(config.inference.data.output_path))
    return _print_scores(evaluate_volumes(config, jobs), words.json)


def _print_scores(scores: Scores, as_json: bool) -> int:
    """Print a table or JSON, and where the files are; the exit code."""
    from connectomics.lightning.score_table import score_table

    print(json.dumps(scores.content, indent=1) if as_json else score_table(scores))
    for path in () if as_json else (*scores.matches, scores.path):
        print(path)
    return FAILED if scores.failures else 0


def _inspect(words: argparse.Namespace) -> int:
    from connectomics.config.load import load_config

    config = load_config(None, words.overrides)
    from connectomics.build.models import describe

    facts = describe(config, words.model)
    if words.json:
        print(json.dumps(facts, indent=1))
        return 0
    for key, value in facts.items():
        print(f"{key:18} {value}")
    return 0


def _verify(words: argparse.Namespace) -> int:
    from connectomics.config.load import load_config

    outputs = [word for word in words.overrides if "=" not in word]
    config = load_config(None, [word for word in words.overrides if "=" in word])
    if len(outputs) > 1:
        raise ConfigError(f"verify compares one output, found {', '.join(outputs)}; give one, or none")
    from connectomics.lightning.verify import report, verify

    result = verify(
        config,
        words.model,
        words.volume,
        output=Path(outputs[0]) if outputs else None,
        samples=words.samples,
        largest=words.max_voxels,
        threshold=words.threshold,
        certificate=words.certificate,
    )
    print("\n".join(report(result)))
    return 0 if result.passed else FAILED


def _decode(words: argparse.Namespace) -> int:
    config = _configured(words)
    from connectomics.build.decoding import decodable
    from connectomics.lightning.decode import Decoder
    from connectomics.lightning.inference import check_output_folder
    from connectomics.progress import ProgressBar

    source = decodable(words.volume)
    check_output_folder(Path(config.inference.data.output_path))
    with ProgressBar() as bar:
        return _ended(Decoder(config, bar).run([source]))


def _reproduce(words: argparse.Namespace) -> int:
    from connectomics.lightning.reproduce import reproduce

    print(reproduce(words.output))
    return 0


def _status(words: argparse.Namespace) -> int:
    from connectomics.pipeline.status import status_of

    status = status_of(words.run)
    print(json.dumps(status.as_dict(), indent=1) if words.json else "\n".join(status.lines()))
    return 0


def _verify_run(words: argparse.Namespace) -> int:
    from connectomics.pipeline.verify_run import verify_run

    if words.sample is not None and words.sample < 1:
        raise ConfigError(f"--sample is {words.sample}, expected at least 1")
    findings = verify_run(words.run, words.sample)
    print("\n".join(line for finding in findings for line in finding.lines()) or "nothing to read again")
    return FAILED if any(finding.damaged for finding in findings) else 0


def _convert(words: argparse.Namespace) -> int:
    from connectomics.config.load import load_config

    config = load_config(None, words.overrides)
    from connectomics.build.convert import convert

    for key, value in convert(config, words.model, words.output).items():
        print(f"{key:18} {value}")
    return 0


def _doctor(words: argparse.Namespace) -> int:
    config = _configured(words)
    from connectomics.doctor import examine

    findings = examine(config, words.checkpoint)
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'MEND'} {finding.subject:12} {finding.text}")
        if finding.mend:
            print(f"     {'':12} → {finding.mend}")
    return 0 if all(f.ok for f in findings) else FAILED


def _demo(words: argparse.Namespace) -> int:
    from connectomics.lightning.demo import run_demo
    from connectomics.progress import ProgressBar

    with ProgressBar() as bar:
        lines = run_demo(words.output, bar)
    print("\n".join(lines))
    return 0


def _from_nnunet(words: argparse.Namespace) -> int:
    model = _model_of(words)
    for word in ("npp", "nps", "verbose", "not_on_device"):
        if vars(words)[word]:
            print(f"note: {word} changes nothing here and is ignored", file=sys.stderr)
    from connectomics.lightning.from_nnunet import FolderPrediction, NnunetCall
    from connectomics.lightning.inference import check_output_folder
    from connectomics.progress import ProgressBar

    call = NnunetCall(
        words.i,
        words.o,
        model,
        tuple(words.f),
        words.chk,
        words.step_size,
        mirroring=not words.disable_tta,
        save_probabilities=words.save_probabilities,
        keep_finished=words.continue_prediction,
        num_parts=words.num_parts,
        part_id=words.part_id,
        device=words.device,
        previous_folder=words.prev_stage_predictions,
    )
    prediction = FolderPrediction(call, words.overrides)
    for deviation in prediction.deviations:
        print(f"not nnU-Net's default: {deviation}", file=sys.stderr)
    check_output_folder(prediction.own_folder)
    if call.save_probabilities:
        print(f"note: probabilities are written as HDF5 in {prediction.own_folder}, not as .npz", file=sys.stderr)
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

    return installed_model(words.d, words.c, words.p, words.tr, os.environ)


_COMMANDS = {
    "infer-volume": _infer_volume,
    "plan": cli_forecast.plan,
    "tune": cli_forecast.tune,
    "test": _test,
    "evaluate": _evaluate,
    "inspect": _inspect,
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

if __name__ == "__main__":
    sys.exit(main())
