"""What may stand on the command line: the parsers of all commands. What the words do is said in ``cli``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from connectomics.cli.usage import Parser, folder, hint_of, volume

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Parser]

INSTANCES = "test.evaluation.metrics=[ap,f1,pq,voi,arand]"
EXAMPLES = """\
examples:
  connectomics infer-volume MODEL 'data/*.h5' -o out/
  connectomics plan MODEL 'data/*.h5'
  connectomics tune MODEL data/cell.h5
  connectomics test --config tutorials/nnunet_mito_inference.yaml --checkpoint MODEL
  connectomics evaluate out/NAME_labels.h5 TRUTH
  connectomics inspect MODEL
  connectomics inspect data/cell.h5
  connectomics convert MODEL OUTPUT
  connectomics config keys inference.output
  connectomics doctor MODEL
  connectomics doctor out/
  connectomics verify MODEL VOLUME
  connectomics decode out/NAME_labels.run 'decoding=[{name: connected_components}]' -o out/
  connectomics reproduce out/NAME_labels.h5
  connectomics status out/NAME_labels.run
  connectomics verify-run out/NAME_labels.run
  connectomics demo
  connectomics from-nnunet -i IMAGES -o LABELS -d 4 -c 2d
"""


def parse_command(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The words of ``connectomics COMMAND …``; None: those of this process."""
    parser = Parser(
        prog="connectomics",
        description="Run pre-trained nnU-Net v2 models on electron-microscopy volumes of any size.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_runs(commands)
    _add_measurements(commands)
    _add_lookups(commands)
    _add_verify(commands)
    decode = _command(
        commands,
        "decode",
        "turn labels or probabilities into objects: the steps of decoding, a volume of ids and a table",
    )
    decode.add_argument("volume", type=volume, help="a volume, or the RUN folder of an earlier run")
    _add_config(decode)
    _add_output(decode)
    _add_overrides(decode, "decoding=[…]")
    _add_records(commands)
    text = "write an inference-only copy of a model: safetensors and JSON with a manifest of digests, no pickle"
    convert = _command(commands, "convert", text)
    _add_model(convert)
    convert.add_argument("output", type=folder, help="folder to write, which must not exist yet")
    _add_overrides(convert, "model.folds=[0]")
    demo = commands.add_parser("demo", help="the whole job on an embedded example")
    demo.add_argument("--output", type=folder, default=Path("demo_output"), help="folder for the results")
    _add_from_nnunet(commands)
    return _parsed(parser, arguments)


def parse_mode(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """The words of ``scripts/main.py --mode COMMAND …``; what the mode cannot say has the command's default."""
    parser = argparse.ArgumentParser(
        prog="main.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = ["test", "infer-volume", "evaluate"]
    parser.add_argument("--mode", dest="command", required=True, choices=modes, help="what to do")
    _add_run_words(parser)
    parser.set_defaults(prediction=None, truth=None, ignore=None, instances=False, json=False)
    parser.set_defaults(max_hours=None, max_gb=None)
    return _parsed(parser, arguments)


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, with options and ``key=value`` words in any order, which argparse alone does not do."""
    words, rest = parser.parse_known_args(arguments)
    if rest and ("overrides" not in words or any(word.startswith("-") for word in rest)):
        dashed = [word for word in rest if word.startswith("-")]
        hint = hint_of(dashed[0], _options(parser, words)) if dashed else ""
        _of_command(parser, words).error(f"unrecognized arguments: {' '.join(rest)}{hint and f'; {hint}'}")
    if rest:
        words.overrides = [*words.overrides, *rest]
    return words


def _of_command(parser: argparse.ArgumentParser, words: argparse.Namespace) -> argparse.ArgumentParser:
    """The parser of the command's own words."""
    below = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return next((choices[words.command] for choices in below), parser)


def _options(parser: argparse.ArgumentParser, words: argparse.Namespace) -> list[str]:
    return [name for action in _of_command(parser, words)._actions for name in action.option_strings]


def _command(commands: Commands, name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=text)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=folder, help="YAML file; see tutorials/nnunet_mito_inference.yaml")


def _add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"configuration, e.g. {example}")


def _add_output(parser: argparse.ArgumentParser) -> None:
    text = "folder of results, short for inference.data.output_path=OUT"
    parser.add_argument("-o", "--output", dest="output_path", type=folder, metavar="OUT", help=text)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=folder, help="training folder, fold folder, exported .zip or .pth file")


def _add_run_words(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--checkpoint", type=folder, help="nnU-Net training folder or .pth file, instead of MODEL")
    _add_output(parser)
    text = "the model, volumes or patterns, and configuration, e.g. system.device=cuda:0"
    parser.add_argument("overrides", nargs="*", metavar="MODEL VOLUME key=value", help=text)


def _add_runs(commands: Commands) -> None:
    """The commands that take a configuration, a model and volumes."""
    for name, text in (
        ("infer-volume", "label a list of volumes; finished ones are skipped, unfinished ones resumed"),
        ("plan", "say what infer-volume would take with these words: time, memory, disk, reading"),
        ("test", "label the volumes of test.data and, where labels are given, measure the result"),
        ("doctor", "check versions, device, memory, disk, model and volumes, or what the disk of a FOLDER can do"),
    ):
        command = _command(commands, name, text)
        _add_run_words(command)
        if name in ("infer-volume", "plan"):
            text = "refuse volumes that are predicted to take longer, all together"
            command.add_argument("--max-hours", type=float, metavar="H", help=text)
            text = "refuse volumes whose outputs may take more than that many 10^9 bytes, all together"
            command.add_argument("--max-gb", type=float, metavar="G", help=text)
        if name == "plan":
            _add_json(command)
        if name == "doctor":
            text = "measure the disk of FOLDER with the same command on a second machine, run at the same time"
            command.add_argument("--peer", action="store_true", help=text)


def _add_measurements(commands: Commands) -> None:
    text = "measure backends, precisions, batches and threads on this machine, for what runs leave open"
    tune = _command(commands, "tune", text)
    _add_model(tune)
    tune.add_argument("volume", type=volume, help="a volume that the model is for")
    tune.add_argument("--seconds", type=float, default=60.0, help="about how long; default: %(default)s")
    _add_json(tune)
    _add_config(tune)
    _add_overrides(tune, "system.num_cpus=4")
    evaluate = _command(commands, "evaluate", "measure labels or objects against their truth; no model is needed")
    evaluate.add_argument("prediction", type=volume, help="a volume of labels or, with --instances, of ids")
    evaluate.add_argument("truth", type=volume, help="a volume of the same shape; format, type and chunks may differ")
    evaluate.add_argument("--ignore", type=volume, metavar="VOLUME", help="where it is not 0, voxels are not counted")
    text = f"short for {INSTANCES}: compare objects by their ids"
    evaluate.add_argument("--instances", action="store_true", help=text)
    _add_json(evaluate)
    _add_config(evaluate)
    _add_output(evaluate)
    _add_overrides(evaluate, "test.evaluation.…")
    evaluate.set_defaults(checkpoint=None)


def _add_lookups(commands: Commands) -> None:
    """The commands that say what a model or a volume is, and what can be configured."""
    text = "say what a model is, without running anything it brings, or what a volume is and where that is stated"
    inspect = _command(commands, "inspect", text)
    inspect.add_argument("model", type=volume, metavar="MODEL_OR_VOLUME", help="a model, or a volume to be read")
    _add_json(inspect)
    _add_overrides(inspect, "model.folds=[0], inference.axes=zyx")
    config = commands.add_parser("config", help="what can be configured")
    topics = config.add_subparsers(dest="topic", required=True, metavar="TOPIC")
    keys = _command(
        topics, "keys", "print each key of the configuration, its default, what it means and [what it takes]"
    )
    keys.add_argument("prefix", nargs="?", default="", help="only keys that begin so, such as inference.output")
    _add_json(keys)


def _add_verify(commands: Commands) -> None:
    text = "let nnunetv2 label samples of a volume, hold ours or an existing output against them, write a certificate"
    verify = _command(commands, "verify", text)
    verify.add_argument("model", type=folder, help="training folder, fold folder or .pth file")
    verify.add_argument(
        "volume", type=volume, help="the volume: a path, a pattern, [FILE,FILE] or a text file of its files"
    )
    verify.add_argument("--samples", type=int, default=3, help="sections to compare, where each is a case")
    verify.add_argument("--max-voxels", type=int, default=1 << 24, help="of a volume that nnU-Net is given at once")
    verify.add_argument("--threshold", type=float, default=1e-4, help="largest share of differing labels that passes")
    verify.add_argument("--certificate", type=folder, default=Path("certificate.json"), help="JSON file to write")
    text = "labels of the whole volume that a run wrote (else ours are computed), and configuration of ours"
    verify.add_argument("overrides", nargs="*", metavar="OUTPUT, key=value", help=text)


def _add_records(commands: Commands) -> None:
    """The commands that look at what a run has left."""
    reproduce = _command(commands, "reproduce", "print the command that made an output")
    reproduce.add_argument("output", type=folder, help="a final output; its RUN folder lies beside it")
    status = _command(commands, "status", "how far a run has come, who works on it and how long it will take")
    status.add_argument("run", type=folder, help="RUN folder, OUTPUT_PATH/NAME_labels.run")
    _add_json(status)
    text = "read again what a run wrote and compare checksums; what is damaged is made again by the next run"
    reread = _command(commands, "verify-run", text)
    reread.add_argument("run", type=folder, help="RUN folder, OUTPUT_PATH/NAME_labels.run")
    amount = reread.add_mutually_exclusive_group()
    amount.add_argument("--sample", type=int, metavar="N", help="blocks of each stage and files of each output to read")
    amount.add_argument("--all", action="store_true", help="read everything, which is the default")


def _add_from_nnunet(commands: Commands) -> None:
    """The arguments of ``nnUNetv2_predict`` and ``nnUNetv2_predict_from_modelfolder``, with their defaults.

    Those that decide the result are called as the fields of ``commands.from_nnunet.NnunetCall``.
    """
    parser = commands.add_parser("from-nnunet", help="take the arguments of nnUNetv2_predict, write its file names")
    add = parser.add_argument
    text = "images CASE_0000.png, CASE_0001.png, …"
    add("-i", dest="input_folder", type=folder, required=True, metavar="FOLDER", help=text)
    add("-o", dest="output_folder", type=folder, required=True, metavar="FOLDER", help="where the labels CASE.png go")
    add("-m", type=folder, metavar="FOLDER", help="training folder, instead of -d, -c, -p and -tr")
    add("-d", metavar="DATASET", help="name or number of the dataset, found under $nnUNet_results")
    add("-c", metavar="CONFIGURATION", help="for example 2d or 3d_fullres")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="default: %(default)s")
    add("-tr", default="nnUNetTrainer", metavar="TRAINER", help="default: %(default)s")
    text = "default: 0 1 2 3 4"
    add("-f", dest="folds", nargs="+", default=["0", "1", "2", "3", "4"], metavar="FOLD", help=text)
    add("-chk", dest="checkpoint_name", default="checkpoint_final.pth", metavar="NAME", help="default: %(default)s")
    add("-step_size", type=float, default=0.5, help="step between windows, a share of the patch; default: %(default)s")
    add("--disable_tta", dest="mirroring", action="store_false", help="no mirroring")
    add("--save_probabilities", action="store_true", help="also write probabilities, as HDF5")
    text = "leave cases alone whose labels are there"
    add("--continue_prediction", "--c", dest="keep_finished", action="store_true", help=text)
    add("-num_parts", type=int, default=1, help="of how many calls this is one; default: %(default)s")
    add("-part_id", type=int, default=0, help="which of them, from 0 on; default: %(default)s")
    add("-device", choices=["cuda", "cpu", "mps"], default="cuda", help="default: %(default)s")
    add("--disable_progress_bar", action="store_true", help="no progress")
    text = "labels CASE.png of a cascade's first stage"
    add("-prev_stage_predictions", dest="previous_folder", type=folder, metavar="FOLDER", help=text)
    for word in ("-npp", "-nps"):
        add(word, type=int, help="ignored: no processes are needed for reading and writing")
    for word in ("--verbose", "--not_on_device"):
        add(word, action="store_true", help="ignored")
    _add_overrides(parser, "system.memory_budget_gb=8")
