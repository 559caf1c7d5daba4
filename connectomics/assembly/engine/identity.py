"""What decides the result of an engine, and in which ways it is not nnU-Net's own inference."""

from __future__ import annotations

import functools
import importlib.metadata
import sys

from connectomics.assembly.engine.engine import NNUNET_STEP, Engine, EngineModel
from connectomics.assembly.settings import InferenceSettings
from connectomics.core.installation import VERSION
from connectomics.models.backends.precisions import Precision
from connectomics.models.spec import SINGLE_IMAGES, ModelSpec
from connectomics.stages.predict.segmenter import EnsembleMember, Segmenter

PACKAGES = ("nnunetv2", "torch", "numpy", "scipy", "scikit-image", "tensorstore")  # that compute or write


def program_version() -> str:
    """Name and version of this program as it goes into run keys."""
    return f"connectomics {VERSION}"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute, for provenance."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, "connectomics": VERSION} | {name: _version(name) for name in PACKAGES}


@functools.cache
def _version(name: str) -> str:
    """Version of an installed package; looking it up takes milliseconds, and every volume's provenance names it."""
    return importlib.metadata.version(name)


def result_facts(
    stated: InferenceSettings, models: tuple[EngineModel, ...], segmenter: Segmenter, precision: Precision
) -> dict[str, object]:
    """Settings that decide labels and probabilities alike, as JSON values."""
    windows, volumes, filters = stated.windows, stated.volumes, stated.labels.filters
    common: dict[str, object] = {
        "engine": windows.engine,
        "padding_mode": windows.padding_mode,
        "threshold": segmenter.labels.threshold,
        "foreground": list(segmenter.labels.foreground),
        "painted": list(segmenter.labels.painted),
        "remove_small_objects": filters.minimum_voxels,
        "fill_holes": filters.fill_holes,
        "axes": volumes.axes,
        "voxel_size_nm": None if volumes.voxel_size_nm is None else list(volumes.voxel_size_nm),
    }
    common |= precision.facts
    planes = volumes.plane_names
    members = segmenter.members[:: len(planes)]  # of each model the first; the others differ in the plane alone
    own: list[dict[str, object]] = [
        {
            "model_sha256": model.spec.sha256,
            "window_size": list(model.window.patch),
            "tile_step_size": model.window.step,
            "blending": model.window.blending,
            "mirror_axes": list(model.window.mirror_axes),
            "case": "slice" if member.by_slice else "volume",
        }
        for model, member in zip(models, members, strict=True)
    ]
    if planes != ["xy"]:
        common["planes"] = planes
    if len(own) == 1:
        return common | own[0]
    for facts, member in zip(own, members, strict=True):
        facts["weight"] = member.weight
    return common | {"ensemble": own}


def deviations_of(stated: InferenceSettings, models: tuple[EngineModel, ...], segmenter: Segmenter) -> tuple[str, ...]:
    planes, region = stated.volumes.plane_names, stated.region
    tests = [
        (planes != ["xy"], f"{'a mean over the planes' if len(planes) > 1 else 'the plane'} {', '.join(planes)}"),
        (stated.windows.whole, "MONAI's window grid"),
        (stated.labels.threshold is not None, "labels by a threshold"),
        (region.box is not None, "background outside inference.roi"),
        (region.mask is not None, "background outside inference.mask"),
        (len({m.weight for m in segmenter.members}) > 1, "a weighted mean of probabilities"),
    ]
    for number, (model, member) in enumerate(zip(models, segmenter.members[:: len(planes)], strict=True), 1):
        spec, window = model.spec, model.window
        of = f" of model {number}" if len(models) > 1 else ""  # no path: it is stamped, and the same from any folder
        mirrored = stated.windows.mirroring and window.mirror_axes != spec.mirror_axes
        tests += [
            (window.patch != spec.patch_shape, f"window size{of} {window.patch} instead of {spec.patch_shape}"),
            (window.step != NNUNET_STEP, f"tile step size{of} {window.step:g} instead of {NNUNET_STEP}"),
            (window.blending != "gaussian", f"constant blending{of}"),
            (mirrored, f"mirror axes{of} {window.mirror_axes} instead of {spec.mirror_axes}"),
            (_departs(member, spec), f"case{of} {'slice' if member.by_slice else 'volume'}"),
        ]
    return tuple(text for holds, text in tests if holds)


def _departs(member: EnsembleMember, spec: ModelSpec) -> bool:
    """Whether nnU-Net would take other cases: each file is one, of single images each section."""
    as_file = not member.by_slice and spec.image_reader != SINGLE_IMAGES
    return member.by_slice != spec.slice_case and not as_file


def case_note(engine: Engine) -> str:
    """What the cases of this call are, and why, in one line; of an ensemble for each of its models."""
    notes, planes = [], len(engine.inference.volumes.plane_names)
    for model, member in zip(engine.models, engine.segmenter.members[::planes], strict=True):
        chosen = "each section" if member.by_slice else "the whole volume"
        of = f" of {model.checkpoint}" if len(engine.models) > 1 else ""
        notes.append(f"case{of}: {chosen} ({_reason(engine.inference.volumes.case, model.spec)})")
    return "; ".join(notes)


def _reason(stated: str, spec: ModelSpec) -> str:
    if stated != "auto":
        return f"inference.case={stated}"
    if spec.dimensions == 3:
        return "a 3D model"
    if spec.image_reader == SINGLE_IMAGES:
        return f"trained on single images, read by {SINGLE_IMAGES}"
    if spec.slice_case:
        return "its training saw single sections: original_median_shape_after_transp in the plans begins with 1"
    return "a 2D model that was trained on volumes"
