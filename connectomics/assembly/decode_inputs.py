"""What is decoded: which volume a word means, who made it, and in which unit its probabilities are stored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from connectomics.assembly.provenance import stamp_of
from connectomics.core.errors import VolumeError
from connectomics.execution.run_folder import PROVENANCE
from connectomics.execution.stage import PROBABILITIES
from connectomics.stages.decode.step_contract import DecodingStep
from connectomics.stages.decode.values import NOT_PROBABILITIES, Units, probability_units
from connectomics.stages.output.export import FORMATS, export_path
from connectomics.volumes.listing import stem_of
from connectomics.volumes.opening import open_volume
from connectomics.volumes.volume import VolumeInfo, VolumeReader

SUFFIX = "_instances"
OF_LABELS = "_probabilities"  # behind the stem of the labels
RUN = ".run"
FOREGROUND_STEPS = ("connected_components", "watershed")  # which make labels of probabilities by a threshold
LABEL_STEPS = ("filters", "slice_linking")  # which cannot


@dataclass(frozen=True, slots=True)
class DecodingInput:
    """A volume to be decoded.

    Parameters
    ----------
    uri
        Labels, ids or probabilities.
    probabilities
        URI of the model's probabilities of all labels, for the table, or None.
    certain
        Their stored value of probability 1; None for what they say themselves, else the type's own.
    word
        What ``connectomics decode`` must be given so that it finds all this; empty for ``uri``.
    """

    uri: str
    probabilities: str | None = None
    certain: float | None = None
    word: str = ""

    @property
    def stem(self) -> str:
        """Return the stem of its results' names."""
        return stem_of(self.uri) + SUFFIX


@dataclass(frozen=True, slots=True)
class StoredProbabilities:
    """What a volume of probabilities that this program wrote says of its values.

    Parameters
    ----------
    channels
        The class of each.
    activation
        ``softmax``, ``sigmoid`` of regions, or ``none`` for logits.
    scale
        The stored value of probability 1.
    """

    channels: tuple[int, ...]
    activation: str
    scale: float

    @property
    def of_all_labels(self) -> bool:
        """Whether channel k has the probability of label k, for all labels from 0 on."""
        return (
            self.activation == "softmax" and len(self.channels) > 1 and self.channels == (*range(len(self.channels)),)
        )


def stored_probabilities(uri: str) -> StoredProbabilities | None:
    """Return what the stamp of a volume says of its probabilities, or None where there is no stamp that does."""
    facts = _stamp(uri).get(PROBABILITIES)
    if not isinstance(facts, dict):
        return None
    return StoredProbabilities(tuple(facts["channels"]), facts["activation"], float(facts["scale"]))


def decoding_input(word: str) -> DecodingInput:
    """Return what a volume, or the RUN folder of an earlier run, means; a run's probabilities come with its labels.

    Raises
    ------
    VolumeError
        If a RUN folder has no labels beside it.
    """
    path = Path(word)
    if path.suffix != RUN:
        return DecodingInput(word)
    stem = path.name.removesuffix(RUN)
    found = [p for p in _outputs_of(path, stem) if p.exists()]
    labels = [p for p in found if stem_of(str(p)) == stem]
    if not labels:
        raise VolumeError(
            f"{word}: no finished labels lie beside this RUN folder; run the command that began it again until it "
            "ends, or name a volume"
        )
    for likely in found:
        kept = stored_probabilities(str(likely))
        if kept is not None and kept.of_all_labels:
            return DecodingInput(str(labels[0]), str(likely), word=word)
    return DecodingInput(str(labels[0]), word=word)


def _outputs_of(run: Path, stem: str) -> Sequence[Path]:
    """Names of a run's labels and probabilities, as it lists them, else as it might have called them."""
    try:
        names = json.loads((run / PROVENANCE).read_text())["outputs"]
        return [run.parent / Path(str(name)).name for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        return [export_path(run.parent, each, form) for each in (stem, stem + OF_LABELS) for form in FORMATS]


def identity_of(uri: str, reader: VolumeReader) -> dict[str, object]:
    """The result key of what a run made, which another run may make again; of other volumes what the file says."""
    key = _stamp(uri).get("result_key")
    return reader.identity if key is None else {"result_key": key}


def identity_at(uri: str) -> dict[str, object]:
    """The same, of a volume that is not open."""
    reader = open_volume(uri)
    try:
        return identity_of(uri, reader)
    finally:
        reader.close()


def _stamp(uri: str) -> Mapping[str, object]:
    """The stamp of a result of this program, or nothing."""
    found = stamp_of(Path(uri))
    return {} if found is None else found[0]


def units_of_classes(uri: str, info: VolumeInfo, certain: float | None) -> Units:
    """Return the units of a volume whose values are held for the probability of each voxel's own label.

    Parameters
    ----------
    uri, info
        The volume.
    certain
        The stored value of probability 1, where it is known otherwise.

    Raises
    ------
    VolumeError
        If it says that it holds something else.
    """
    kept = stored_probabilities(uri)
    if kept is None:
        return probability_units(info, certain)
    problem = ""
    if kept.activation == "none":
        problem = "holds logits; save them again without inference.test_time_augmentation.act=none"
    elif len(kept.channels) > 1 and not kept.of_all_labels:
        held = "regions, which are no labels" if kept.activation == "sigmoid" else f"classes {list(kept.channels)}"
        problem = (
            f"holds {held}; save all labels (inference.test_time_augmentation.select_channel=null), or one channel"
        )
    if problem:
        raise VolumeError(f"{uri}: {problem}, or leave probabilities out")
    return probability_units(info, kept.scale)


def units_of_volume(uri: str, info: VolumeInfo) -> Units:
    """Return the units of the volume that is decoded, in case a threshold makes foreground of it."""
    kept = stored_probabilities(uri)
    if kept is not None and kept.activation == "none":
        return NOT_PROBABILITIES
    return (
        probability_units(info, None if kept is None else kept.scale) if info.dtype.kind in "iuf" else NOT_PROBABILITIES
    )


def check_stored(step: DecodingStep, uri: str) -> None:
    """Refuse a first step that would misread probabilities which say what they are.

    Raises
    ------
    VolumeError
        If it takes them for labels, or its threshold is a share of 1 where they are stored in another unit.
    """
    kept = stored_probabilities(uri)
    if kept is None or kept.activation == "none" or step.name not in FOREGROUND_STEPS + LABEL_STEPS:
        return
    stated = dataclasses.asdict(step)  # type: ignore[call-overload]
    threshold = None if step.name in LABEL_STEPS else stated["threshold"]
    half = f"{kept.scale / 2:g}"
    if threshold is None:
        raise VolumeError(
            f"{uri}: holds probabilities (stored as {kept.scale:g} where they are 1), not labels; state which are "
            f"foreground: decoding=[{{name: connected_components, threshold: {half}}}]"
        )
    if 0 < threshold < 1 < kept.scale:
        raise VolumeError(
            f"{uri}: probability 1 is stored as {kept.scale:g} here, so that threshold {threshold:g} means a "
            f"probability of {threshold / kept.scale:.2g}; state it in this unit: {threshold * kept.scale:g}"
        )
