"""``connectomics verify``: nnunetv2 itself beside this program on the user's own data, and a certificate of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.assembly.engine.cascade import check_previous_stage, open_labels, open_previous
from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engine.identity import case_note, versions
from connectomics.assembly.engine.models import load
from connectomics.assembly.settings import InferenceSettings, RegionSettings, resolve
from connectomics.assembly.volumes import open_source, segmenter_of
from connectomics.commands.nnunet_predictor import Reference
from connectomics.commands.verify_input import given_to_verify
from connectomics.config.schema import Config
from connectomics.core.errors import ConfigError, VolumeError
from connectomics.core.files import write_text
from connectomics.core.geometry import Box, vec3
from connectomics.lightning.inference import InferenceManager
from connectomics.stages.survey.tallies import nonzero_box
from connectomics.volumes.listing import VolumeSource
from connectomics.volumes.volume import Array, VolumeReader


@dataclass(frozen=True, slots=True)
class SampleComparison:
    """Labels of one sample held against nnU-Net's.

    Parameters
    ----------
    scope
        ``case``: a whole case of the volume; ``crop``: a part taken as a case of its own, with its own
        statistics and grid.
    box
        Where it lies in the volume.
    voxels, differ
        All voxels, and those whose labels differ.
    edge_voxels, edge_differ
        The same for voxels at an edge of nnU-Net's labels (a neighbour along an axis has another label).
    where
        The smallest box around the differences, in the volume, or None.
    float32
        The same comparison with nnU-Net adding up in float32, which is made where stock nnU-Net differs, else None.
    """

    scope: str
    box: Box
    voxels: int
    differ: int
    edge_voxels: int
    edge_differ: int
    where: Box | None
    float32: SampleComparison | None = None

    def within(self, threshold: float) -> bool:
        """Whether at most this share of the labels differs, from stock nnU-Net or from it with float32 sums."""
        fewest = self.differ if self.float32 is None else min(self.differ, self.float32.differ)
        return fewest <= threshold * self.voxels


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was found, and whether the share of differing labels stays within the threshold in every sample."""

    path: Path
    agreements: tuple[SampleComparison, ...]
    threshold: float
    case_note: str

    @property
    def passed(self) -> bool:
        """Whether every sample agrees."""
        return all(a.within(self.threshold) for a in self.agreements)

    @property
    def verdict(self) -> str:
        """Whether the labels agree, and what part of the differences is rounding in nnU-Net's half-precision sums."""
        stock = sum(a.differ for a in self.agreements)
        exact = sum(a.float32.differ for a in self.agreements if a.float32 is not None)
        verdict = "agrees with nnU-Net" if self.passed else "DOES NOT AGREE with nnU-Net"
        if stock == 0:
            return f"{verdict}: no label differs"
        told = f"{stock} labels differ from nnU-Net as it ships, {exact} from nnU-Net with float32 sums"
        if exact == 0:
            return f"{verdict}: {told}, so all of them are rounding in its half-precision sums"
        return f"{verdict}: {told}"


def verify(
    config: Config,
    checkpoint: Path,
    volume: str | Sequence[str],
    *,
    output: Path | None = None,
    samples: int = 3,
    largest: int = 1 << 24,
    threshold: float = 1e-4,
    certificate: Path,
) -> Certificate:
    """Let nnunetv2 label samples of a volume and hold ours, or an existing output, against them.

    Parameters
    ----------
    config
        The settings that ours uses; nnU-Net uses its own, and mirrors where mirroring is on.
    checkpoint
        The model.
    volume
        The volume: its path, a pattern, a list of its channels' files, or a text file with one of them a line.
    output
        Labels of the whole volume that some run or ``from-nnunet`` wrote; without it ours are computed for the samples.
    samples
        Sections to compare, where each section is a case.
    largest
        Voxels of a volume that nnU-Net is given at once; of a larger one the middle is taken, as a case of its own.
    threshold
        Largest share of differing labels that passes.
    certificate
        Where the JSON certificate is written.

    Raises
    ------
    ConfigError
        If the configuration names an ensemble or other planes, or restricts the volume.
    VolumeError
        If the volume or the output cannot be read or compared.
    """
    _require_comparable(resolve(config, checkpoint))
    manager = InferenceManager(config, checkpoint)
    given = given_to_verify(config.inference, manager.engine.spec, checkpoint, volume, output=output)
    if given.inference != config.inference:
        manager = InferenceManager(replace(config, inference=given.inference), checkpoint)
    engine = manager.engine
    reference = _reference(engine)
    check_previous_stage(engine.inference.models.previous_stage, engine.specs, [given.source])
    source = given.source
    with contextlib.ExitStack() as opened:
        reader = opened.enter_context(contextlib.closing(open_source(engine, source)))
        first = _FirstStage(engine, source, reader)
        boxes = _samples(reader, engine, samples, largest)
        existing = _labels(given.output, reader, opened)
        _require_no_crop(boxes, source.name, output, largest)
        compared = partial(_compared, reference, manager, first=first, reader=reader, existing=existing)
        found = tuple(compared(scope, box) for scope, box in boxes)
        result = Certificate(certificate, found, threshold, given.case_note or case_note(engine))
        write_text(certificate, json.dumps(_content(engine, result, source, output, reader=reader), indent=1) + "\n")
    return result


def _labels(output: str | None, reader: VolumeReader, opened: contextlib.ExitStack) -> VolumeReader | None:
    return None if output is None else opened.enter_context(contextlib.closing(open_labels(output, reader, "labels")))


def _compared(
    reference: Reference,
    manager: InferenceManager,
    scope: str,
    box: Box,
    *,
    first: _FirstStage,
    reader: VolumeReader,
    existing: VolumeReader | None,
) -> SampleComparison:
    """Hold one sample against nnU-Net, and where it differs against nnU-Net with float32 sums."""
    image, spacing = reader.read(box), _spacing(manager.engine, reader)
    ours = existing.read(box)[0] if existing else manager.predict(image, reader.info.spacing, first.given(box)).labels

    def agreement(*, float32: bool) -> SampleComparison:
        previous = first.theirs(image, box, float32=float32)
        return _agreement(scope, box, ours, reference.predict(image, spacing, previous, float32=float32))

    stock = agreement(float32=False)
    return replace(stock, float32=agreement(float32=True)) if stock.differ else stock


def _reference(engine: Engine) -> Reference:
    stated = engine.inference
    return Reference(load(stated.models), mirror=stated.windows.mirroring, threads=stated.networks.threads)


def _require_comparable(stated: InferenceSettings) -> None:
    if stated.region != RegionSettings():
        raise ConfigError("inference.roi and inference.mask: verify compares whole samples; leave both null")
    if stated.volumes.plane_names != ["xy"]:
        raise ConfigError("inference.planes: nnU-Net runs a 2D model along xy only; verify with inference.planes=[xy]")
    if len(stated.models.requests) > 1:
        raise ConfigError("model.ensemble: an ensemble is the mean of its models, so verify them one by one")


def _require_no_crop(boxes: Sequence[tuple[str, Box]], volume: str, output: Path | None, largest: int) -> None:
    if output is not None and any(scope == "crop" for scope, _ in boxes):
        raise VolumeError(
            f"{volume}: is larger than {largest} voxels, so only a crop could be compared, whose "
            f"statistics are not those of {output}; raise --max-voxels, or verify without an output"
        )


class _FirstStage:
    """What nnU-Net's second stage of a cascade is given: its own first stage's labels, or those of the given volume."""

    def __init__(self, engine: Engine, source: VolumeSource, reader: VolumeReader) -> None:
        self._labels: VolumeReader | None = None
        self._reference: Reference | None = None
        if engine.previous is not None:
            self._reference = _reference(engine.previous)
            self._spacing = _spacing(engine.previous, reader)
        elif engine.spec.previous_stage is not None:
            self._labels = open_previous(engine.inference.models.previous_stage, source, reader)

    def given(self, box: Box) -> Array | None:
        """Labels (z, y, x) of the given volume, where one is."""
        return None if self._labels is None else self._labels.read(box)[0]

    def theirs(self, image: Array, box: Box, *, float32: bool = False) -> Array | None:
        """Labels (z, y, x) for nnU-Net's second stage; None for models that are none."""
        if self._reference is None:
            return self.given(box)
        return self._reference.predict(image, self._spacing, float32=float32)


def _spacing(engine: Engine, reader: VolumeReader) -> list[float]:
    """What nnU-Net is told: the stated spacing, or the plan's, so that nothing is resampled."""
    (member,) = segmenter_of(engine, reader.info.spacing).members
    resampling, back = member.resampling, member.order.inverse
    if resampling is not None:
        return list(back.turn(resampling.spacing))
    z, y, x = engine.spec.spacing
    return list(back.turn((999.0 if z is None else z, y, x)))


def _samples(reader: VolumeReader, engine: Engine, count: int, largest: int) -> list[tuple[str, Box]]:
    depth, height, width = reader.info.extent
    if engine.segmenter.members[0].by_slice:
        sections = sorted({round(i * (depth - 1) / max(1, count - 1)) for i in range(count)})
        return [("case", Box((z, 0, 0), (z + 1, height, width))) for z in sections]
    shape = [depth, height, width]
    while shape[0] * shape[1] * shape[2] > largest:
        axis = int(np.argmax(shape))
        shape[axis] = max(1, shape[axis] // 2)
    whole = tuple(shape) == reader.info.extent
    start = vec3([(n - m) // 2 for n, m in zip(reader.info.extent, shape, strict=True)])
    return [("case" if whole else "crop", Box.of_shape(vec3(shape)).shift(start))]


def _agreement(scope: str, box: Box, ours: Array, theirs: Array) -> SampleComparison:
    differ = ours != theirs
    edge = np.zeros(theirs.shape, bool)
    for axis in range(3):
        step = np.diff(theirs.astype(np.int32), axis=axis) != 0
        edge[tuple(slice(1, None) if a == axis else slice(None) for a in range(3))] |= step
        edge[tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))] |= step
    where = nonzero_box(differ[None])
    return SampleComparison(
        scope,
        box,
        differ.size,
        int(differ.sum()),
        edge_voxels=int(edge.sum()),
        edge_differ=int((differ & edge).sum()),
        where=None if where is None else where.shift(box.start),
    )


def _content(
    engine: Engine, result: Certificate, source: VolumeSource, output: Path | None, reader: VolumeReader
) -> dict[str, Any]:
    return {
        "passed": result.passed,
        "verdict": result.verdict,
        "threshold": result.threshold,
        "compared": "labels computed here" if output is None else str(output),
        "with": "nnUNetPredictor as nnunetv2 ships it (half precision accumulators), CPU; where labels differ, again "
        "with float32 accumulators (float32)",
        "volume": source.name,
        "case": result.case_note,
        "input": reader.identity,
        "model": {"weights_sha256": engine.spec.weights_sha256, "sha256": engine.spec.sha256},
        "settings": dict(engine.identity.facts),
        "deviations": list(engine.identity.deviations),
        "numeric_class": dict(engine.settings.numeric_class),
        "versions": versions(),
        "samples": [asdict(a) for a in result.agreements],
    }


def report(result: Certificate) -> list[str]:
    """The certificate in words: what a case is, a line a sample, the verdict last."""
    lines = [result.case_note]
    for a in result.agreements:
        lines.append(f"{a.scope} {_span(a.box)}: {_counted(a)}")
        if a.float32 is not None:
            lines.append(f"  with float32 sums in nnU-Net {_counted(a.float32)}")
        left = a if a.float32 is None or a.float32.where is None else a.float32
        if left.where is not None:
            lines.append(f"  differences lie in {_span(left.where)}")
    return [*lines, f"{result.verdict} (threshold {result.threshold:g}); certificate: {result.path}"]


def _counted(a: SampleComparison) -> str:
    edge = f"{a.edge_differ}/{a.edge_voxels} at edges"
    return f"{a.differ} of {a.voxels} labels differ ({a.differ / a.voxels:.1e}), {edge}"


def _span(box: Box) -> str:
    return " ".join(f"{n} {a}-{b - 1}" for n, a, b in zip("zyx", box.start, box.stop, strict=True))
