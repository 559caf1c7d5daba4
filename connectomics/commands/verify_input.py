"""What ``verify`` is given: one volume, however its files are named, and labels of it, perhaps of ``from-nnunet``.

Called by ``verify``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from connectomics.assembly.volumes import named_sources
from connectomics.commands.from_nnunet import OWN_FOLDER, kind_of, resampled_at, spacing_of
from connectomics.config.inference_keys import InferenceConfig
from connectomics.config.load import read_file_list
from connectomics.core.errors import ConfigError
from connectomics.core.geometry import AxisOrder
from connectomics.models.locate import training_folder
from connectomics.models.spec import SINGLE_IMAGES, ModelSpec
from connectomics.volumes.listing import CHANNEL, VolumeSource, expand, stem_of


@dataclass(frozen=True, slots=True)
class GivenToVerify:
    """What is compared.

    Parameters
    ----------
    source
        The volume.
    inference
        The settings of ours, a case being what nnU-Net takes.
    output
        Labels that a run wrote, or None.
    case_note
        What a case is, where that is not the model's own choice; else empty.
    """

    source: VolumeSource
    inference: InferenceConfig
    output: str | None
    case_note: str = ""


def given_to_verify(
    inference: InferenceConfig, spec: ModelSpec, model: Path, volume: str | Sequence[str], output: Path | None
) -> GivenToVerify:
    """Find the one volume that is meant, and how the labels of it were made.

    Raises
    ------
    ConfigError
        If the words name several volumes, or none.
    """
    source = _one_volume([volume] if isinstance(volume, str) else volume, spec)
    note = ""
    if inference.case == "auto" and spec.slice_case and spec.image_reader != SINGLE_IMAGES:
        inference = dataclasses.replace(inference, case="volume")
        note = "case: the whole volume (as nnU-Net takes a file)"
    if output is None or not _by_from_nnunet(output, source):
        return GivenToVerify(source, inference, None if output is None else str(output), note)
    kind = kind_of(training_folder(model))
    uris = tuple(uri if "::" in uri else uri + kind.inner for uri in source.uris)
    source = dataclasses.replace(source, uris=uris)
    inference = dataclasses.replace(inference, axes=kind.axes)
    if inference.case != "slice" and not spec.slice_case:
        inference = resampled_at(inference, spec, spacing_of(source, kind), [AxisOrder(spec.axis_order)])
    return GivenToVerify(source, inference, str(output) + kind.inner, note)


def files_of_one(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are files of the first one's volume, as a shell gives them for a pattern, and the others."""
    place = _channel_of(words[0])
    own = [word for word in words[1:] if place is not None and _channel_of(word) == place]
    return [words[0], *own], [word for word in words[1:] if word not in own]


def _channel_of(word: str) -> tuple[str, str] | None:
    match = CHANNEL.match(stem_of(word))
    return (str(Path(word).parent), match["stem"]) if match else None


def _one_volume(words: Sequence[str], spec: ModelSpec) -> VolumeSource:
    sources = named_sources([uri for word in words for uri in _named(word)], spec.channels)
    if len(sources) != 1:
        names = ", ".join(source.name for source in sources[:4])
        raise ConfigError(
            f"verify compares one volume, but {' '.join(words)} names {len(sources)} ({names}); name one of them"
        )
    return sources[0]


def _named(word: str) -> list[str]:
    """The paths that a word means, as ``file_pattern`` and ``file_list`` of infer-volume take it."""
    if word.startswith("[") and word.endswith("]"):
        return [part.strip().strip("'\"") for part in word[1:-1].split(",") if part.strip()]
    return read_file_list(word) if word.endswith(".txt") else expand(word)


def _by_from_nnunet(output: Path, source: VolumeSource) -> bool:
    """Whether ``from-nnunet`` wrote these labels: its own folder lies beside them, with a run of this case."""
    return (output.parent / OWN_FOLDER / f"{source.stem}_labels.run").is_dir() and stem_of(str(output)) == source.stem
