"""``connectomics verify``: nnunetv2 itself beside this program on the user's own data, and a certificate of it."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from connectomics.assembly.engine.cascade import check_previous_stage, open_labels, open_previous
from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engine.identity import versions
from connectomics.assembly.engine.models import load
from connectomics.assembly.settings import InferenceSettings, RegionSettings, resolve
from connectomics.assembly.volumes import named_sources, open_source, segmenter_of
from connectomics.config.schema import Config
from connectomics.core.errors import ConfigError, ModelError, VolumeError
from connectomics.core.files import write_text
from connectomics.core.geometry import Box, vec3
from connectomics.lightning.inference import InferenceManager
from connectomics.models.backends.contract import torch_threads
from connectomics.models.checkpoint import LoadedModel
from connectomics.stages.survey.survey import nonzero_box
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
    """

    scope: str
    box: Box
    voxels: int
    differ: int
    edge_voxels: int
    edge_differ: int
    where: Box | None


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was found, and whether the share of differing labels stays within the threshold in every sample."""

    path: Path
    agreements: tuple[SampleComparison, ...]
    threshold: float

    @property
    def passed(self) -> bool:
        """Whether every sample agrees."""
        return all(a.differ <= self.threshold * a.voxels for a in self.agreements)


class Reference:
    """nnU-Net's own predictor on the CPU, as it ships, given the same model.

    The weights come from our restricted reading of the checkpoint; the network, the preprocessing, the windows and the
    export are nnunetv2's. With as many threads as ours its network gives the same bits.

    Raises
    ------
    ModelError
        If nnunetv2 cannot build the network the plans describe.
    """

    def __init__(self, model: LoadedModel, *, mirror: bool, threads: int) -> None:
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        self._threads = threads
        plans = PlansManager(dict(model.plans))
        configuration = plans.get_configuration(model.spec.configuration)
        labels = plans.get_label_manager(dict(model.dataset))
        network = get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            model.spec.input_channels,
            labels.num_segmentation_heads,
            allow_init=False,
            deep_supervision=False,
        )
        states = [n.get_submodule("network").state_dict() for n in model.networks]
        try:
            network.load_state_dict(states[0])
        except RuntimeError as error:
            raise ModelError(
                f"nnunetv2 builds another network from the plans of {model.spec.plans_name} than trainer "
                f"{model.spec.trainer_name} did, so it cannot check this model; compare with nnUNetv2_predict yourself"
            ) from error
        with contextlib.redirect_stdout(io.StringIO()):
            self._predictor = nnUNetPredictor(use_mirroring=mirror, device=torch.device("cpu"), allow_tqdm=False)
        axes = tuple(a - 3 + model.spec.dimensions for a in model.spec.mirror_axes) or None
        self._predictor.manual_initialization(
            network, plans, configuration, states, dict(model.dataset), model.spec.trainer_name, axes
        )

    def predict(self, image: Array, spacing: Sequence[float], previous: Array | None = None) -> Array:
        """nnU-Net's labels (z, y, x) of one case (c, z, y, x) of raw intensities.

        ``previous`` are the labels (z, y, x) of the previous stage of a cascade.
        """
        stage = None if previous is None else previous[None].astype(np.float32)  # the type its readers give
        with torch_threads(self._threads), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            labels: Array = self._predictor.predict_single_npy_array(
                image, {"spacing": list(spacing)}, stage, None, False
            )
        return labels


def verify(
    config: Config,
    checkpoint: Path,
    volume: str,
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
    checkpoint, volume
        The model and the volume.
    output
        Labels of the whole volume that some run wrote; without it ours are computed for the samples.
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
    engine = manager.engine
    reference = _reference(engine)
    (source,) = named_sources([volume], engine.spec.channels)
    check_previous_stage(engine.inference.models.previous_stage, engine.specs, [source])
    reader = open_source(engine, source)
    first = _FirstStage(engine, source, reader)
    boxes = _samples(reader, engine, samples, largest)
    existing = None if output is None else open_labels(str(output), reader, "labels")
    _require_no_crop(boxes, volume, output, largest)
    found = []
    for scope, box in boxes:
        image = reader.read(box)
        theirs = reference.predict(image, _spacing(engine, reader), first.theirs(image, box))
        ours = (
            existing.read(box)[0] if existing else manager.predict(image, reader.info.spacing, first.given(box)).labels
        )
        found.append(_agreement(scope, box, ours, theirs))
    result = Certificate(certificate, tuple(found), threshold)
    write_text(certificate, json.dumps(_content(engine, result, volume, output, reader=reader), indent=1) + "\n")
    reader.close()
    return result


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

    def theirs(self, image: Array, box: Box) -> Array | None:
        """Labels (z, y, x) for nnU-Net's second stage; None for models that are none."""
        return self.given(box) if self._reference is None else self._reference.predict(image, self._spacing)


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
    engine: Engine, result: Certificate, volume: str, output: Path | None, reader: VolumeReader
) -> dict[str, Any]:
    return {
        "passed": result.passed,
        "threshold": result.threshold,
        "compared": "labels computed here" if output is None else str(output),
        "with": "nnUNetPredictor as nnunetv2 ships it (half precision accumulators), CPU",
        "volume": volume,
        "input": reader.identity,
        "model": {"weights_sha256": engine.spec.weights_sha256, "sha256": engine.spec.sha256},
        "settings": dict(engine.identity.facts),
        "deviations": list(engine.identity.deviations),
        "numeric_class": dict(engine.settings.numeric_class),
        "versions": versions(),
        "samples": [asdict(a) for a in result.agreements],
    }


def report(result: Certificate) -> list[str]:
    """The certificate in words, a line a sample, the verdict last."""
    lines = []
    for a in result.agreements:
        edge = f"{a.edge_differ}/{a.edge_voxels} at edges"
        lines.append(
            f"{a.scope} {_span(a.box)}: {a.differ} of {a.voxels} labels differ ({a.differ / a.voxels:.1e}), {edge}"
        )
        if a.where is not None:
            lines.append(f"  differences lie in {_span(a.where)}")
    verdict = "agrees with nnU-Net" if result.passed else "DOES NOT AGREE with nnU-Net"
    return [*lines, f"{verdict} (threshold {result.threshold:g}); certificate: {result.path}"]


def _span(box: Box) -> str:
    return " ".join(f"{n} {a}-{b - 1}" for n, a, b in zip("zyx", box.start, box.stop, strict=True))
