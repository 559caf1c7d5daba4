"""Small jobs whose keys are kept in ``tests/golden``: what each is called with, and what its outputs say of it.

All goes through the command line and the files that a run leaves. ``tests/golden/make_golden.py`` makes the golden
material with this, and the tests beside it hold the program to that material.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import connectomics
from connectomics.cli import main

GOLDEN = Path(__file__).resolve().parent / "golden"
KEYS = GOLDEN / "keys.json"
MODELS = GOLDEN / "models"
HALF_DONE, FINISHED = GOLDEN / "half_done", GOLDEN / "finished"
OUTPUT = "out"
PROGRAM = "connectomics 0.1.0"
MACHINE = ("system.device=cpu", "system.memory_budget_gb=4")
PHANTOM_MODEL = "phantom_mito_2d"  # the embedded one
VOLUME, REGIONS, SECOND = "volume_3d", "regions_2d", "second_stage_3d"  # those in ``MODELS``
FLAT, DEEP, SMALL = "phantom:2x64x64?seed=7", "phantom:8x32x32?seed=7", "phantom:3x12x16?seed=7"
MASK = "phantom:2x64x64?seed=4&what=label"
LABELS, IDS = "phantom:4x64x64?seed=4&what=label", "phantom:4x64x64?seed=6&what=instances"
SEEN = "phantom:4x64x64?seed=4"
TURNED, BLOBS, PAIR = "turned.npy", "blobs.npy", ("pair_0000.npy", "pair_0001.npy")  # made by ``write_inputs``
PHANTOM_NM = [30.0, 8.0, 8.0]
DECODED = {"probabilities": None, "axes": None, "voxel_size_nm": PHANTOM_NM}

IN_KEYS = (
    *("input", "model_sha256", "ensemble", "previous_stage", "engine", "padding_mode", "window_size", "tile_step_size"),
    *("blending", "mirror_axes", "case", "planes", "precision", "resample", "wanted", "axes", "voxel_size_nm"),
    *("threshold", "foreground", "painted", "remove_small_objects", "fill_holes", "decoding"),
)
"""Entries of provenance.json that go into the result key of labels or objects."""

DESCRIBING = (
    *("agreement", "axis_order", "backend_choice", "cases", "command", "configuration", "description"),
    *("experiment_name", "filtered", "folds", "labels", "model_weights_sha256", "models", "nnunet", "numeric_class"),
    *("objects", "plan_spacing", "program", "regions", "result_keys", "run_key", "seed", "statistics", "trainer"),
    "versions",
)
"""Entries that do not; a step of decoding adds one that begins with its number."""


@dataclass(frozen=True, slots=True)
class GoldenCase:
    """A job that makes keys.

    Parameters
    ----------
    words
        What the command line is given beside what every job is; ``@models`` stands for the folder of models.
    volume
        The volume, or the files of its channels.
    model
        Name of the model; empty for ``connectomics decode``.
    unstated
        Facts in result keys that provenance.json does not state: of decoding, and what is kept of probabilities.
    """

    words: Sequence[str] = ()
    volume: str | Sequence[str] = FLAT
    model: str = PHANTOM_MODEL
    unstated: Mapping[str, Any] = field(default_factory=dict)


def window(*words: str) -> tuple[str, ...]:
    """Words beside smaller windows, with which the network takes milliseconds."""
    return ("inference.sliding_window.window_size=[64,64]", *words)


def kept(channels: Sequence[int], activation: str, scale: float, dtype: str) -> dict[str, Any]:
    """What is kept of probabilities, as it goes into their key."""
    return {"probabilities": {"channels": list(channels), "activation": activation, "scale": scale, "dtype": dtype}}


def decoding(steps: str, volume: str = LABELS, *words: str, **facts: Any) -> GoldenCase:
    """A job that decodes; ``facts`` replace those of a phantom without further words."""
    words = (f"decoding=[{steps}]", "inference.output.table=none", *words)
    return GoldenCase(words, volume, "", DECODED | facts)


MIRROR, BINARY = "inference.test_time_augmentation", "inference.postprocessing.binary"
SAVED, SCALED = "inference.output.save_probabilities=true", "inference.postprocessing.intensity"
COMPONENTS = "{name: connected_components}"
CASES: Mapping[str, GoldenCase] = {
    "nnU-Net's own settings": GoldenCase(),
    "smaller windows": GoldenCase(window()),
    "less overlap": GoldenCase(window("inference.sliding_window.overlap=0.25")),
    "constant blending": GoldenCase(window("inference.sliding_window.blending=constant")),
    "no mirroring": GoldenCase(window(f"{MIRROR}.enabled=false")),
    "mirrored along x": GoldenCase(window(f"{MIRROR}.flip_axes=[2]")),
    "the volume is the case": GoldenCase(window("inference.case=volume")),
    "two windows a batch, of OpenVINO": GoldenCase(
        window("inference.sliding_window.sw_batch_size=2", "system.backend=openvino")
    ),
    "fast": GoldenCase(window("inference.precision=fast", "inference.max_disagreement=1")),
    "a threshold": GoldenCase(window(f"{BINARY}.enabled=true", f"{BINARY}.threshold=0.3")),
    "a threshold of one channel": GoldenCase(window(f"{BINARY}.enabled=true", f"{MIRROR}.select_channel=[0]")),
    "small objects and holes": GoldenCase(
        window(f"{BINARY}.enabled=true", f"{BINARY}.remove_small_objects=9", f"{BINARY}.fill_holes=true")
    ),
    "a box": GoldenCase(window("inference.roi=[[0,0,8],[2,40,64]]")),
    "a mask": GoldenCase(window(f"inference.mask='{MASK}'")),
    "a box and a mask": GoldenCase(window("inference.roi=[[1,0,0],[2,64,50]]", f"inference.mask='{MASK}'")),
    "three planes": GoldenCase(
        window("inference.planes=[yz,xz,xy]", "inference.allow_anisotropic_planes=true"), SMALL
    ),
    "one other plane": GoldenCase(
        window("inference.planes=[xz]", "inference.allow_anisotropic_planes=true"), SMALL
    ),
    "resampled sections": GoldenCase(
        window("inference.case=volume", "inference.resample=plan", "inference.spacing=[30,1.5,1.25]")
    ),
    "an ensemble": GoldenCase(window("model.ensemble=['@phantom_mito_2d']")),
    "an ensemble with weights": GoldenCase(
        window("model.ensemble=['@phantom_mito_2d']", "model.ensemble_weights=[1,3]")
    ),
    "probabilities": GoldenCase(window(SAVED), unstated=kept([0, 1], "softmax", 1.0, "<f4")),
    "probabilities in bytes": GoldenCase(
        window(SAVED, f"{SCALED}_dtype=uint8", f"{SCALED}_scale=255", f"{MIRROR}.select_channel=[1]"),
        unstated=kept([1], "softmax", 255.0, "|u1"),
    ),
    "logits": GoldenCase(
        window(SAVED, f"{MIRROR}.act=none", f"{SCALED}_dtype=float16"), unstated=kept([0, 1], "none", 1.0, "<f2")
    ),
    "a file with axes x, y, z": GoldenCase(window("inference.axes=xyz"), TURNED),
    "a stated voxel size": GoldenCase(window("inference.voxel_size_nm=[40,4,4]")),
    "stated blocks": GoldenCase(window("inference.block_shape=[1,32,64]")),
    "every format": GoldenCase(window("inference.output.formats=[h5,zarr,tiff,png,zarr2,n5,precomputed]")),
    "another suffix and name": GoldenCase(window("inference.volume_mode.output_suffix=mito", "experiment_name=other")),
    "MONAI's windows": GoldenCase(window("inference.sliding_window.engine=monai")),
    "MONAI's windows, reflected": GoldenCase(
        window("inference.sliding_window.engine=monai", "inference.sliding_window.padding_mode=reflect")
    ),
    "3D, two folds": GoldenCase(volume=DEEP, model=VOLUME),
    "3D, one fold": GoldenCase(["model.folds=[1]"], DEEP, VOLUME),
    "3D, mirrored along z": GoldenCase(
        [f"{MIRROR}.flip_axes=[0]", SAVED], DEEP, VOLUME, kept([0, 1, 2], "softmax", 1.0, "<f4")
    ),
    "3D, resampled": GoldenCase(["inference.resample=plan", "inference.spacing=[3,1,2]"], DEEP, VOLUME),
    "regions of two channels": GoldenCase([SAVED], PAIR, REGIONS, kept([0, 1], "sigmoid", 1.0, "<f4")),
    "a threshold of a region": GoldenCase(
        [f"{BINARY}.enabled=true", f"{BINARY}.threshold=0.6", f"{MIRROR}.select_channel=[1]"], PAIR, REGIONS
    ),
    "a second stage after given labels": GoldenCase(
        ["model.previous_stage='phantom:8x32x32?seed=4&what=label'"], DEEP, SECOND
    ),
    "a second stage after its first": GoldenCase(["model.previous_stage='@volume_3d'"], DEEP, SECOND),
    "labels and their objects": GoldenCase(
        window("decoding=[{name: connected_components, connectivity: 6}]", "inference.output.table=none"),
        SEEN,
        unstated=DECODED,
    ),
    "components": decoding(COMPONENTS),
    "components within sections, of all labels": decoding(
        "{name: connected_components, connectivity: 4, per_class: false}"
    ),
    "components of intensities, in blocks": decoding(
        "{name: connected_components, connectivity: 18, threshold: 100, channel: 0}",
        SEEN,
        "inference.block_shape=[2,32,64]",
    ),
    "every filter": decoding(
        f"{COMPONENTS}, {{name: filters, min_voxels: 3, max_voxels: 9000, min_volume_nm3: 4e3, max_volume_nm3: 9e7, "
        "drop_border: true, keep_largest: 5, fill_holes: 2d}"
    ),
    "linked sections": decoding("{name: slice_linking}, {name: filters, min_voxels: 20, fill_holes: 3d}"),
    "linked ids over gaps": decoding(
        "{name: slice_linking, measure: overlap, threshold: 0.5, max_gap: 2, one_to_one: true, ids: true}", IDS
    ),
    "watershed from deep seeds": decoding(
        "{name: watershed, connectivity: 6, seed_distance_nm: 40, keep_unseeded: false, max_component_voxels: 8192}"
    ),
    "watershed from bright seeds": decoding("{name: watershed, threshold: 100, seed_threshold: 150}", SEEN),
    "components of a file with axes and voxel size": decoding(
        f"{COMPONENTS}, {{name: filters, min_volume_nm3: 4e5}}",
        BLOBS,
        "inference.axes=yxz",
        "inference.voxel_size_nm=[20,10,10]",
        axes="yxz",
        voxel_size_nm=[20.0, 10.0, 10.0],
    ),
    "components with probabilities beside": decoding(
        f"{{name: connected_components, probabilities: '{SEEN}'}}",
        probabilities={"phantom": f"{SEEN}&what=image", "version": 1},
    ),
}  # fmt: skip

RUNS: Mapping[str, GoldenCase] = {
    "labels": GoldenCase(["inference.block_shape=[1,96,96]"], "phantom:6x96x96?seed=4"),
    "objects": GoldenCase(
        [
            "decoding=[{name: connected_components}, {name: filters, min_voxels: 20}]",
            "inference.block_shape=[3,48,48]",
            "inference.output.table=csv",
        ],
        "phantom:6x96x96?seed=2&what=label",
        "",
    ),
}
"""Jobs of which ``HALF_DONE`` has a RUN that was killed, and ``FINISHED`` the results."""


def write_inputs(folder: Path) -> None:
    """Write the volumes that are files, the same each time: names, sizes and modification times are in the keys."""
    z, y, x = np.indices((2, 48, 40))
    smooth = 900 + 300 * ((y // 12 + x // 10 + z) % 2) + (7 * z + 5 * y + 3 * x) % 29
    np.save(folder / TURNED, np.ascontiguousarray(smooth.transpose().astype(np.uint16)))
    np.save(folder / BLOBS, np.moveaxis(smooth > 1200, 0, 2).astype(np.uint8))
    for name, values in zip(PAIR, (smooth // 8, smooth[:, ::-1] // 9), strict=True):
        np.save(folder / name, values.astype(np.uint8))
    for path in folder.glob("*.npy"):
        os.utime(path, ns=(10**18, 10**18))


def model_path(name: str) -> Path:
    """Folder of a model."""
    if name == PHANTOM_MODEL:
        return Path(connectomics.__path__[0]) / "example" / PHANTOM_MODEL
    return MODELS / name


def words_of(case: GoldenCase, threads: int = 1) -> list[str]:
    """The words of the command line, from a folder with the volumes; outputs go to ``OUTPUT`` in it."""
    words = [*MACHINE, f"system.num_cpus={threads}", f"inference.data.output_path={OUTPUT}", *case.words]
    for name in (PHANTOM_MODEL, VOLUME):
        words = [word.replace(f"@{name}", str(model_path(name))) for word in words]
    if not case.model:
        return ["decode", str(case.volume), *words]
    uris = [case.volume] if isinstance(case.volume, str) else case.volume
    listed = ",".join(f"'{uri}'" for uri in uris)
    model = str(model_path(case.model))
    return ["infer-volume", "--checkpoint", model, f"inference.volume_mode.file_list=[{listed}]", *words]


def run_case(case: GoldenCase, folder: Path, threads: int = 1) -> dict[str, dict[str, Any]]:
    """Run a job in the working folder, which must be ``folder`` and empty; what ``keys_of`` finds then."""
    write_inputs(folder)
    code = main(words_of(case, threads))
    assert code == 0, f"the command ended with {code}"
    return keys_of(folder / OUTPUT, case)


def keys_of(output: Path, case: GoldenCase) -> dict[str, dict[str, Any]]:
    """Keys of each RUN in an output folder by its name, and the facts that they were made of.

    Each has ``result_keys`` by the output's name, ``run_key``, ``grid`` (z, y, x), ``facts``, ``program``, and in
    ``unknown`` names of what provenance.json holds beside what it held when the golden keys were made.
    """
    found = {path.parent: json.loads(path.read_text()) for path in sorted(output.rglob("provenance.json"))}
    described = {}
    for run, provenance in found.items():
        result_keys, run_key = provenance["result_keys"], provenance["run_key"]
        facts = {name: provenance[name] for name in IN_KEYS if name in provenance}
        for inner in found:
            if run in inner.parents:  # a cascade, whose second stage depends on the first by its key
                facts["previous_stage"] = found[inner]["result_keys"]["labels"]
        if "objects" in result_keys or "probabilities" in result_keys:
            facts |= case.unstated
        grids = [json.loads(header.read_text())["plan"]["block_shape"] for header in run.glob("*/ledger*/header.json")]
        grids = grids or [_logged_grid(run / "run.log")]
        assert all(grid == grids[0] for grid in grids)
        if run.parent == output:
            _require_stamped(run, result_keys, run_key)
        described[run.relative_to(output).as_posix()] = {
            "result_keys": result_keys,
            "run_key": run_key,
            "grid": grids[0],
            "facts": facts,
            "program": provenance["program"],
            "unknown": sorted(n for n in provenance if n not in IN_KEYS + DESCRIBING and not n[0].isdecimal()),
        }
    return described


def _logged_grid(log: Path) -> list[int]:
    """The block's shape of a volume that was made in memory, which leaves no ledger."""
    found = re.findall(r"plan: 1 blocks of \((\d+), (\d+), (\d+)\) voxels", log.read_text())
    assert found, f"{log.parent} has neither a ledger nor the plan of one block"
    return [int(n) for n in found[-1]]


def _require_stamped(run: Path, result_keys: Mapping[str, str], run_key: str) -> None:
    """HDF5 results beside a RUN folder carry the keys that its provenance names."""
    for name, key in result_keys.items():
        stamp = read_stamp(run.with_name(f"{run.stem}{'_probabilities' * (name == 'probabilities')}.h5"))
        assert (stamp["result_key"], stamp["run_key"]) == (key, run_key)


def read_stamp(path: Path) -> dict[str, Any]:
    """What an HDF5 result says of itself."""
    with h5py.File(path) as file:
        stamp: dict[str, Any] = json.loads(file.attrs["connectomics"])
    return stamp


def key_of_facts(facts: Mapping[str, Any]) -> str:
    """sha256 of facts as JSON with sorted names and no spaces, which is what a key is."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def derived_keys(described: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Result keys and run key as they follow from the facts of one RUN and its grid."""
    facts, cut = dict(described["facts"]), {"grid": described["grid"], "program": PROGRAM}
    if "decoding" in facts:
        key = key_of_facts(facts)
        return {"objects": key}, key_of_facts({"result": key} | cut)
    likely = facts.pop("probabilities", None)
    keys = {"labels": key_of_facts(facts)}
    if likely is not None:
        keys["probabilities"] = key_of_facts(facts | {"probabilities": likely})
    return keys, key_of_facts(keys | cut)


def differences(found: Mapping[str, Any], golden: Mapping[str, Any]) -> list[str]:
    """A sentence for each key of one RUN that is not the golden one, then for each fact that may be why."""
    keys = ("result_keys", "run_key", "grid")
    told = [f"{name} is {found[name]}, golden is {golden[name]}" for name in keys if found[name] != golden[name]]
    if not told:
        return []
    now, before = found["facts"], golden["facts"]
    changed = [name for name in sorted({*now, *before}) if now.get(name, ...) != before.get(name, ...)]
    told += [
        f"the fact {name} is {now.get(name, 'absent')!r}, golden is {before.get(name, 'absent')!r}" for name in changed
    ]
    if found["program"] != PROGRAM:
        told.append(f"program is '{found['program']}', golden is '{PROGRAM}'")
    elif not changed and found["grid"] == golden["grid"]:
        unknown = ", ".join(found["unknown"]) or "nothing"
        told.append(f"all known facts are the golden ones; {unknown} is new in provenance.json")
    return told
