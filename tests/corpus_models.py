"""Hostile and damaged models: training folders, bare checkpoints, exported zips and converted copies.

``MODELS`` gives for each name what it starts from and what damages it: a function that gets the model's folder and the
path of a canary that hostile code would make, and returns the path to hand to the command.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import stat
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mutations import HUGE, TEXTS, blind, odd_json, odd_text, zeros_deflated

CHECKPOINT = "fold_0/checkpoint_final.pth"
Damage = Callable[[Path, Path], Path]


class Calls:
    """Unpickling an instance without restriction calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def on_file(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(root: Path, canary: Path) -> Path:
        (root / name).write_bytes(change((root / name).read_bytes()))
        return root

    return damage


def on_checkpoint(change: Callable[[dict[str, Any], Path], object]) -> Damage:
    def damage(root: Path, canary: Path) -> Path:
        content = torch.load(root / CHECKPOINT, weights_only=False)
        change(content, canary)
        torch.save(content, root / CHECKPOINT)
        return root

    return damage


def on_plans(change: Callable[[dict[str, Any]], object]) -> Damage:
    def apply(text: bytes) -> bytes:
        value = json.loads(text)
        change(value)
        return json.dumps(value).encode()

    return on_file("plans.json", apply)


def configuration(plans: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = plans["configurations"]["2d"]
    return found


def argument(**values: Any) -> Damage:
    return on_plans(lambda p: configuration(p)["architecture"]["arch_kwargs"].update(values))


def written(content: Callable[[Path], bytes]) -> Damage:
    """Put other bytes in the checkpoint's place."""

    def damage(root: Path, canary: Path) -> Path:
        (root / CHECKPOINT).write_bytes(content(canary))
        return root

    return damage


def torch_zip(pickled: bytes, *, packed: bool = False) -> bytes:
    """What torch.save writes, around any pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(
        stream, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED, compresslevel=1
    ) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", bytes(16))
    return stream.getvalue()


def command(canary: Path) -> str:
    return f"touch '{canary}'"


def stretched(content: dict[str, Any], canary: Path) -> None:
    """Each weight repeats one number, so that the file is small whatever the shape."""
    weights = content["network_weights"]
    for name, tensor in weights.items():
        weights[name] = torch.zeros(1).expand(tensor.shape)


def vast_network(root: Path, canary: Path) -> Path:
    """Plans of a network of many gigabytes, and a small checkpoint whose weights claim to fit it."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    values = json.loads((root / "plans.json").read_text())
    arguments = configuration(values)["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = [8192, 8192]
    (root / "plans.json").write_text(json.dumps(values))
    layers = {"conv_op": torch.nn.Conv2d, "norm_op": torch.nn.InstanceNorm2d, "nonlin": torch.nn.LeakyReLU}
    with torch.device("meta"):
        network = PlainConvUNet(1, num_classes=2, deep_supervision=True, **{**arguments, **layers})
    content = torch.load(root / CHECKPOINT, weights_only=False)
    content["network_weights"] = {k: torch.zeros(1).expand(t.shape) for k, t in network.state_dict().items()}
    torch.save(content, root / CHECKPOINT)
    return root


def named_outside(root: Path, canary: Path) -> Path:
    """The fold is a link to a folder that holds another link, and so on in a circle."""
    (root / "fold_1").symlink_to(root, target_is_directory=True)
    (root / "fold_0" / "again").symlink_to(root, target_is_directory=True)
    (root / CHECKPOINT).unlink()
    (root / CHECKPOINT).symlink_to(root / CHECKPOINT)
    return root


def piped(name: str) -> Damage:
    def damage(root: Path, canary: Path) -> Path:
        (root / name).unlink()
        os.mkfifo(root / name)
        return root

    return damage


def bare(root: Path, canary: Path) -> Path:
    (root / "plans.json").write_text("[]")
    return root / CHECKPOINT


MEMO = b"\x80\x02]" + b"r\xff\xff\xff\x7f" + b"."  # LONG_BINPUT 2147483647
LONG = b"\x80\x04\x8b\xff\xff\xff\x7f" + bytes(64)  # LONG4 of 2 GB
TEXT = b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"x."  # BINUNICODE8 of 1 TB
DOUBLING = b"\x80\x02]q\0" + b"".join(b"(h\0h\0" for _ in range(30000)) + b"."
NESTED = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."

FOLDER: dict[str, Damage] = {
    "os.system": on_checkpoint(lambda c, canary: c.update(note=Calls(os.system, command(canary)))),
    "builtins.eval": on_checkpoint(lambda c, canary: c.update(note=Calls(eval, f"open({str(canary)!r}, 'w')"))),
    "builtins.exec": on_checkpoint(lambda c, canary: c.update(note=Calls(exec, f"open({str(canary)!r}, 'w')"))),
    "open": on_checkpoint(lambda c, canary: c.update(note=Calls(open, str(canary), "w"))),
    "subprocess": on_checkpoint(lambda c, canary: c.update(note=Calls(subprocess.check_call, ["touch", str(canary)]))),
    "getattr": on_checkpoint(lambda c, canary: c.update(note=Calls(builtins.getattr, dict, "clear"))),
    "weights call": on_checkpoint(lambda c, canary: c["network_weights"].update(x=Calls(os.mkdir, str(canary)))),
    "bare os.system": written(lambda canary: pickle.dumps(Calls(os.system, command(canary)))),
    "bare protocol 0": written(lambda canary: pickle.dumps(Calls(os.system, command(canary)), 0)),
    "bare instance": written(lambda canary: b"(S'" + command(canary).encode() + b"'\nios\nsystem\n."),
    "bare protocol 5": written(lambda canary: pickle.dumps(Calls(os.mkdir, str(canary)), 5)),
    "memo bomb": written(lambda canary: torch_zip(MEMO)),
    "bare memo bomb": written(lambda canary: MEMO),
    "long number": written(lambda canary: torch_zip(LONG)),
    "bare long number": written(lambda canary: LONG),
    "long text": written(lambda canary: torch_zip(TEXT)),
    "bare long text": written(lambda canary: TEXT),
    "doubling": written(lambda canary: torch_zip(DOUBLING)),
    "nested": written(lambda canary: torch_zip(NESTED)),
    "nested dict": written(lambda canary: torch_zip(b"\x80\x02" + b"}K\0" * 50_000 + b"N" + b"s" * 50_000 + b".")),
    "deflated pickle": written(lambda canary: torch_zip(b"\x80\x02" + b"N0" * (100 << 20) + b"N.", packed=True)),
    "deflated zeros": written(lambda canary: torch_zip(bytes(1 << 29), packed=True)),
    "persistent": written(lambda canary: torch_zip(b"\x80\x02" + b"X\x04\0\0\0evil" + b"Q.")),
    "extension": written(lambda canary: torch_zip(b"\x80\x02\x84\xff\xff\xff\x7f.")),
    "build": written(lambda canary: torch_zip(b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\0\0\0ax\x01\0\0\0bsb.")),
    "stretched weights": on_checkpoint(stretched),
    "vast network": vast_network,
    "vast tensor": on_checkpoint(
        lambda c, canary: c["network_weights"].update({"decoder.seg_layers.0.bias": torch.zeros(1).expand(HUGE)})
    ),
    "complex weights": on_checkpoint(
        lambda c, canary: c["network_weights"].update(x=torch.ones(2, dtype=torch.cfloat))
    ),
    "sparse weights": on_checkpoint(lambda c, canary: c["network_weights"].update(x=torch.eye(3).to_sparse())),
    "no weights": on_checkpoint(lambda c, canary: c["network_weights"].clear()),
    "million names": on_checkpoint(lambda c, canary: c["network_weights"].update({str(i): 1 for i in range(100_000)})),
    "mirror axes": on_checkpoint(lambda c, canary: c.update(inference_allowed_mirroring_axes=(0, 99))),
    "trainer": on_checkpoint(lambda c, canary: c.update(trainer_name="../../os.system")),
    "long trainer": on_checkpoint(lambda c, canary: c.update(trainer_name="x" * 10**6)),
    "configuration": on_checkpoint(lambda c, canary: c["init_args"].update(configuration="../2d")),
    "circle of links": named_outside,
    "piped checkpoint": piped(CHECKPOINT),
    "piped plans": piped("plans.json"),
    "bare": bare,
    "network os.system": on_plans(lambda p: configuration(p)["architecture"].update(network_class_name="os.system")),
    "nonlin os.system": argument(nonlin="os.system"),
    "norm eval": argument(norm_op="builtins.eval"),
    "import os": on_plans(
        lambda p: configuration(p)["architecture"].update(_kw_requires_import=["os.system", None, 7])
    ),
    "reader": on_plans(lambda p: p.update(image_reader_writer="os.system")),
    "resampling": on_plans(lambda p: configuration(p).update(resampling_fn_data="os.system")),
    "planner": on_plans(lambda p: p.update(experiment_planner_used="os.system")),
    "inherits itself": on_plans(lambda p: configuration(p).update(inherits_from="2d")),
    "inherits in a circle": on_plans(
        lambda p: [configuration(p).update(inherits_from="b"), p["configurations"].update(b={"inherits_from": "2d"})]
    ),
    "inherits a list": on_plans(lambda p: configuration(p).update(inherits_from=["2d"])),
    "long inheritance": on_plans(
        lambda p: [
            configuration(p).update(inherits_from="c0"),
            p["configurations"].update({f"c{i}": {"inherits_from": f"c{i + 1}"} for i in range(5000)}),
            p["configurations"].update(c5000={}),
        ]
    ),
    "convolutions": argument(n_conv_per_stage=[10**9, 1]),
    "decoder convolutions": argument(n_conv_per_stage_decoder=[10**9]),
    "kernel": argument(kernel_sizes=[[10**6, 10**6], [3, 3]]),
    "strides": argument(strides=[[1, 1], [10**9, 10**9]]),
    "features": argument(features_per_stage=[8192, 8192]),
    "norm arguments": argument(norm_op_kwargs={"eps": "x", "affine": []}),
    "nonlin arguments": argument(nonlin_kwargs={"inplace": True, "forward": "os.system"}),
    "dropout": argument(dropout_op="torch.nn.Dropout2d", dropout_op_kwargs={"p": 7}),
    "patch": on_plans(lambda p: configuration(p).update(patch_size=[HUGE, HUGE])),
    "spacing": on_plans(lambda p: configuration(p).update(spacing=[float("nan"), float("inf")])),
}
EDITED: dict[str, Damage] = {
    **{f"plans {i}": on_file("plans.json", lambda d, i=i: odd_json(i, json.loads(d))) for i in range(16)},
    **{f"dataset {i}": on_file("dataset.json", lambda d, i=i: odd_json(i, json.loads(d))) for i in range(10)},
    **{f"plans {t}": on_file("plans.json", lambda d, t=t: odd_text(t, d)) for t in TEXTS},
    **{f"checkpoint {i}": on_file(CHECKPOINT, blind(i)) for i in range(20)},
}

# ------------------------------------------------------------------------------------- exported zips, converted copies


def packed(change: Callable[[zipfile.ZipFile, Path], object], alter: Callable[[bytes], bytes] = bytes) -> Damage:
    """An export with further entries, its bytes changed afterwards."""

    def damage(root: Path, canary: Path) -> Path:
        path = root.parent / "export.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(p for p in root.rglob("*") if p.is_file()):
                archive.write(file, file.relative_to(root.parent).as_posix())
            change(archive, canary)
        path.write_bytes(alter(path.read_bytes()))
        return path

    return damage


def entry(name: str, data: bytes = b"x", mode: int = 0o100644) -> Callable[[zipfile.ZipFile, Path], None]:
    def add(archive: zipfile.ZipFile, canary: Path) -> None:
        info = zipfile.ZipInfo(name.replace("CANARY", str(canary)))
        info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
        archive.writestr(info, data)

    return add


def nothing(archive: zipfile.ZipFile, canary: Path) -> None:
    """No further entry."""


MODEL = "nnUNetTrainer__nnUNetPlans__2d"
ZIPPED: dict[str, Damage] = {
    "zip climbs": packed(entry("../canary")),
    "zip climbs far": packed(entry("../../../../../../../../../../tmp/canary")),
    "zip climbs within": packed(entry(f"{MODEL}/fold_0/../../../canary")),
    "zip absolute": packed(entry("CANARY")),
    "zip drive": packed(entry("C:\\canary")),
    "zip backslash": packed(entry("..\\canary")),
    "zip link": packed(entry(f"{MODEL}/fold_1", b"/tmp", stat.S_IFLNK | 0o777)),
    "zip link and file": packed(
        lambda z, c: [entry("out", str(c.parent).encode(), stat.S_IFLNK | 0o777)(z, c), entry("out/canary")(z, c)]
    ),
    "zip pipe": packed(entry(f"{MODEL}/fold_0/pipe", b"", stat.S_IFIFO | 0o666)),
    "zip checkpoint outside": packed(entry("../fold_0/checkpoint_final.pth")),
    "zip bomb": packed(entry(f"{MODEL}/fold_1/checkpoint_final.pth", bytes(1 << 29))),
    "zip of zips": packed(lambda z, c: z.writestr("inner.zip", zlib.compress(zeros_deflated(1 << 28)))),
    "zip folder twice": packed(entry(f"{MODEL}/fold_0/checkpoint_final.pth/")),
    **{f"zip {i}": packed(nothing, blind(i)) for i in range(10)},
}


def signed(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Change a file of a copy and bring the manifest's digests up to date, as a forger would."""

    def damage(root: Path, canary: Path) -> Path:
        from connectomics.core.fingerprint import key_of, sha256_of_file

        (root / name).write_bytes(change((root / name).read_bytes()))
        manifest = json.loads((root / "manifest.json").read_text())
        manifest.pop("sha256")
        manifest["files"] = {file: sha256_of_file(root / file) for file in manifest["files"]}
        manifest["sha256"] = key_of(manifest)
        (root / "manifest.json").write_text(json.dumps(manifest))
        return root

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Change the header of a safetensors file."""

    def apply(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        values = json.loads(data[8:end])
        change(values)
        text = json.dumps(values).encode()
        return len(text).to_bytes(8, "little") + text + data[end:]

    return apply


WEIGHTS = "fold_0/weights.safetensors"
COPIES: dict[str, Damage] = {
    **{f"copy weights {i}": signed(WEIGHTS, blind(i)) for i in range(8)},
    **{f"copy header {i}": signed(WEIGHTS, flip) for i, flip in enumerate(blind(5 * n + 1) for n in range(4))},
    **{f"copy manifest {i}": on_file("manifest.json", lambda d, i=i: odd_json(i, json.loads(d))) for i in range(10)},
    **{f"copy manifest {t}": on_file("manifest.json", lambda d, t=t: odd_text(t, d)) for t in TEXTS},
    **{f"copy plans {t}": signed("plans.json", lambda d, t=t: odd_text(t, d)) for t in ("deep", "digits", "latin")},
    "copy of os.system": signed("plans.json", lambda d: d.replace(b"torch.nn.LeakyReLU", b"os.system")),
    "copy of 1 PB": signed(
        WEIGHTS, header(lambda h: h.update(x={"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}))
    ),
    "copy aliases": signed(WEIGHTS, header(lambda h: h["__metadata__"].update(aliases="[" * 100_000))),
    "copy piped": piped("manifest.json"),
    "copy piped weights": piped(WEIGHTS),
}
MODELS: dict[str, tuple[str, Damage]] = {
    **{name: ("folder", damage) for name, damage in (FOLDER | EDITED | ZIPPED).items()},
    **{name: ("copy", damage) for name, damage in COPIES.items()},
}
