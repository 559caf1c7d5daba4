"""A segmenter: models that give the labels and probabilities of boxes of a volume; the predict task asks it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from connectomics.core.geometry import AxisOrder, Box, Vec3, pieces, vec3
from connectomics.execution.stage import LABELS, PROBABILITIES, Workspace
from connectomics.inference.cascade import PreviousLabels, StackedInput
from connectomics.inference.case import Case, CaseInput, ReadBox
from connectomics.inference.head import LabelRule, ProbabilityRule
from connectomics.inference.predictor import FINISHED_VALUES, Logits, Predictor
from connectomics.inference.resample import ImageSource, ResampledPredictor, Resampling
from connectomics.inference.transfer import on_host
from connectomics.models.backends.contract import torch_threads
from connectomics.models.spec import ChannelNormalisation
from connectomics.stages.survey.bands import STAGE, bands_of
from connectomics.stages.survey.mask import make_mask
from connectomics.stages.survey.region import RegionOfInterest
from connectomics.stages.survey.section_reader import SlabReader
from connectomics.stages.survey.survey import keeps_mask, survey
from connectomics.stages.survey.tiles import survey_pass
from connectomics.volumes.volume import Array, VolumeReader

Surveyed = Sequence[Sequence[Case]]  # the cases of each member


@dataclass(frozen=True, slots=True)
class EnsembleMember:
    """One model of a segmenter: gives the logits of boxes of a volume.

    Parameters
    ----------
    predictor, schemes
        The networks' logits, and how their input is normalised.
    order
        The model's order of axes: volumes and cases come in the volume's, the predictor and what it reads work in the
        model's.
    resampling
        How cases are brought to the plan's spacing, or None.
    weight
        Share in the mean of several members.
    previous_values
        Of the second stage of a cascade: the labels of the first stage that have an input channel.
    previous
        Gives these labels (1, z, y, x), checked, of any box of the volume; set where the volume is known.
    section_axis
        The volume's axis (0 = z, 1 = y, 2 = x) across which each section is a case of its own; None: the volume is one.
    """

    predictor: Predictor
    schemes: tuple[ChannelNormalisation, ...]
    order: AxisOrder = field(default_factory=AxisOrder)
    resampling: Resampling | None = None
    weight: float = 1.0
    previous_values: tuple[int, ...] = ()
    previous: ReadBox | None = None
    section_axis: int | None = None

    @property
    def by_slice(self) -> bool:
        """Whether each section is a case of its own."""
        return self.section_axis is not None

    @property
    def sees(self) -> tuple[object, ...]:
        """What decides its cases; members that see a volume alike share them."""
        return (self.schemes, self.section_axis, self.plane_axis, self.keeps_mask, self.previous_values)

    @property
    def keeps_mask(self) -> bool:
        """Whether its case carries the mask of a volume."""
        return keeps_mask(self.schemes, by_slice=self.by_slice) or self.resamples_labels

    @property
    def labels_in_mask(self) -> ReadBox | None:
        """The labels of a previous stage, where nnU-Net counts them as within the mask."""
        return self.previous if any(scheme.masked for scheme in self.schemes) else None

    @property
    def resamples_labels(self) -> bool:
        """Whether labels of a previous stage are resampled, which nnU-Net does within the mask."""
        return bool(self.previous_values) and self.resampling is not None

    @property
    def plane_axis(self) -> int | None:
        """The volume's axis (0 = z, 1 = y, 2 = x) along which cases must know the range of each plane, or None."""
        axis = None if self.resampling is None else self.resampling.data_axis
        return None if axis is None else self.order.axes[axis]

    def view(self, array: Array) -> Array:
        """An array (c, z, y, x) of the volume's axes, seen in the model's."""
        return array.transpose(self.order.of_array)

    def logits(self, read: ReadBox, cases: Sequence[Case], core: Box) -> Iterator[tuple[Box, Logits]]:
        """Finished logits f32 [k, z, y, x] of the cases' part of ``core``, in disjoint boxes relative to it.

        Each is in the host's memory, and valid until the next is taken.
        ``core`` is a box of the volume; the boxes that come out are of the model's axes.
        """
        turned, across = self.order.turn_box(core), self.order.axes[0]
        if across != 0:
            read = SlabReader(read, across, core.stop[across])
        for box, logits in on_host(self._engine().predict(self._parts(read, cases, core))):
            yield box.relative_to(turned), logits

    def outside(self, cases: Sequence[Case], core: Box) -> Iterator[Box]:
        """Where ``logits`` gives nothing: disjoint boxes of the volume's axes, relative to ``core``."""
        for case in cases_in(cases, core, self.section_axis):
            for box in core.intersect(case.region).without(case.box):
                yield box.relative_to(core)

    def windows(self, read: ReadBox, cases: Sequence[Case], core: Box) -> int:
        """Number of windows that ``logits`` computes."""
        return sum(self._engine().windows(source, part) for source, part in self._parts(read, cases, core))

    def try_memory(self, block: Vec3) -> None:
        """Take for once the device's memory that a block (z, y, x) of the volume takes; see ``Predictor``."""
        channels = len(self.schemes) + len(self.previous_values)
        self._engine().try_memory(self.order.turn(block), channels)

    def _engine(self) -> Predictor | ResampledPredictor:
        return self.predictor if self.resampling is None else ResampledPredictor(self.predictor, self.resampling)

    def _parts(self, read: ReadBox, cases: Sequence[Case], core: Box) -> Iterator[tuple[ImageSource, Box]]:
        """Each case that touches ``core``, and the part that it shares; both in the model's axes."""
        for case in cases_in(cases, core, self.section_axis):
            region, box = self.order.turn_box(case.region), self.order.turn_box(case.box)
            part = self.order.turn_box(core).intersect(box)
            if part.voxels:
                mask = None if case.mask is None else self._turned(case.mask)
                yield self._source(Case(region, box, case.channels, case.plane_ranges, mask=mask), read), part

    def _source(self, case: Case, read: ReadBox) -> ImageSource:
        image = CaseInput(case, self.schemes, self._turned(read))
        if not self.previous_values:
            return image
        assert self.previous is not None, "the labels of the previous stage are set with the volume"
        return StackedInput(image, PreviousLabels(case, self.previous_values, self._turned(self.previous)))

    def _turned(self, read: ReadBox) -> ReadBox:
        if self.order.identity:
            return read
        back = self.order.inverse
        return lambda box: np.ascontiguousarray(read(back.turn_box(box)).transpose(self.order.of_array))


@dataclass(frozen=True, slots=True)
class Segmenter:
    """A model, or an ensemble of several, ready to label boxes of a volume.

    Parameters
    ----------
    members
        The models; of several the probabilities are averaged, as nnU-Net's ensembling does.
    classes
        Output channels of each member, k.
    labels, probabilities
        Rules for what is kept.
    """

    members: tuple[EnsembleMember, ...]
    classes: int
    labels: LabelRule
    probabilities: ProbabilityRule | None

    def outputs(self) -> tuple[str, ...]:
        """Names of what ``segment`` returns."""
        return (LABELS,) if self.probabilities is None else (LABELS, PROBABILITIES)

    def survey(self, reader: VolumeReader, name: str, workers: int = 1, workspace: Workspace | None = None) -> Surveyed:
        """The cases of a volume for each member; the volume is read once for members that see it alike.

        What was read already is kept in the work folder of ``workspace``, as masks are; without one all is in memory.
        """
        found = {
            m.sees: survey(
                reader,
                name,
                m.schemes,
                by_slice=m.by_slice,
                section_axis=m.section_axis or 0,
                workers=workers,
                plane_axis=m.plane_axis,
                with_mask=m.keeps_mask,
                previous=m.labels_in_mask,
                workspace=workspace,
                stage=stage,
            )
            for stage, m in self._passes()
        }
        return tuple(found[m.sees] for m in self.members)

    def share_survey(self, reader: VolumeReader, name: str, workers: int, workspace: Workspace) -> None:
        """Read a volume for ``survey``, together with all processes that do so in the same workspace.

        A volume that is not worth it is left to ``survey``. Raises what that does.
        """
        for stage, m in self._passes():
            across, along = m.section_axis, m.plane_axis
            look = survey_pass(reader, name, m.schemes, section_axis=across, plane_axis=along, workers=workers)
            bands = bands_of(look, workspace, stage)
            if bands is not None:
                bands.do()

    def _passes(self) -> Iterator[tuple[str, EnsembleMember]]:
        """A member for each pass over a volume, and the name of its stage."""
        first: dict[object, EnsembleMember] = {}
        for m in self.members:
            first.setdefault(m.sees, m)
        for number, m in enumerate(first.values(), start=1):
            yield STAGE if number == 1 else f"{STAGE}_{number}", m

    def masked(self, surveyed: Surveyed, reader: VolumeReader, workspace: Workspace) -> Surveyed:
        """Cases that were kept without their masks, with them."""
        return tuple(
            tuple(replace(c, mask=make_mask(reader, c.box, m.labels_in_mask, workspace)) for c in cases)
            if m.keeps_mask
            else cases
            for m, cases in zip(self.members, surveyed, strict=True)
        )

    def segment(self, read: ReadBox, surveyed: Surveyed, core: Box) -> dict[str, Array]:
        """Label a box of a volume.

        Parameters
        ----------
        read
            Raw voxels (c, z, y, x) of any box of the volume.
        surveyed
            The cases of each member, in order along its ``section_axis``.
        core
            The box.

        Returns
        -------
        arrays
            Each (c, z, y, x) of the box's extent; ``labels`` has one channel.
        """
        with torch_threads(1):  # beside the network, which pins its own
            if len(self.members) > 1:
                return self._kept(self._mean(read, surveyed, core))
            return self._kept_at_once(read, surveyed, core)

    def _kept_at_once(self, read: ReadBox, surveyed: Surveyed, core: Box) -> dict[str, Array]:
        """What is kept of one member, as its logits are finished."""
        (member,), (cases,) = self.members, surveyed
        result = self.outside(core.shape)
        for box, logits in member.logits(read, cases, core):
            index = (slice(None), *box.slices)
            member.view(result[LABELS])[index] = self.labels.apply(logits)
            if self.probabilities is not None:
                member.view(result[PROBABILITIES])[index] = self.probabilities.apply(logits)
        return result

    def outside(self, shape: Vec3) -> dict[str, Array]:
        """What stands where nothing is computed, as ``segment`` returns it: label 0, the background's probabilities."""
        result: dict[str, Array] = {LABELS: np.zeros((1, *shape), self.labels.dtype)}
        if self.probabilities is not None:
            values = self.probabilities.background().reshape(-1, 1, 1, 1)
            result[PROBABILITIES] = np.broadcast_to(values, (len(values), *shape)).copy()
        return result

    def segment_roi(
        self, read: ReadBox, surveyed: Surveyed, core: Box, roi: RegionOfInterest | None
    ) -> tuple[dict[str, Array], int]:
        """Label as ``segment`` does where voxels are wanted, with background elsewhere; count the windows.

        Only windows that touch the smallest box around the wanted voxels are computed; None wants every voxel.
        """
        part, flags = (core, None) if roi is None else roi.within(core)
        if part == core and flags is None:
            return self.segment(read, surveyed, core), self.windows(read, surveyed, core)
        result = self.outside(core.shape)
        if not part.voxels:
            return result, 0
        index = (slice(None), *part.relative_to(core).slices)
        for name, array in self.segment(read, surveyed, part).items():
            np.copyto(result[name][index], array, where=True if flags is None else flags)
        return result, self.windows(read, surveyed, part)

    def try_memory(self, block: Vec3) -> None:
        """Take for once the device's memory that a block (z, y, x) takes, or raise DeviceMemoryError."""
        for member in self.members:
            member.try_memory(block)

    def windows(self, read: ReadBox, surveyed: Surveyed, core: Box) -> int:
        """Number of windows that ``segment`` computes."""
        return sum(m.windows(read, cases, core) for m, cases in zip(self.members, surveyed, strict=True))

    def _mean(self, read: ReadBox, surveyed: Surveyed, core: Box) -> Array:
        """Weighted mean of the members' probabilities, float32 (k, z, y, x), added in their order."""
        mean: Array = np.zeros((self.classes, *core.shape), np.float32)
        for member, cases in zip(self.members, surveyed, strict=True):
            weight = np.float32(member.weight)
            for box in member.outside(cases, core) if not self.labels.painted else ():
                mean[(0, *box.slices)] += weight  # all is background there
            for box, logits in member.logits(read, cases, core):
                member.view(mean)[(slice(None), *box.slices)] += self.labels.activate(logits) * weight
        mean /= np.float32(sum(m.weight for m in self.members))
        return mean

    def _kept(self, mean: Array) -> dict[str, Array]:
        core = Box.of_shape(vec3(mean.shape[1:]))
        result = self.outside(core.shape)
        for part in pieces(core, (1, 1, 1), max(1, FINISHED_VALUES // len(mean))):
            index = (slice(None), *part.slices)
            result[LABELS][index] = self.labels.of_probabilities(mean[index])
            if self.probabilities is not None:
                result[PROBABILITIES][index] = self.probabilities.of_probabilities(mean[index])
        return result


def cases_in(cases: Sequence[Case], box: Box, axis: int | None) -> Sequence[Case]:
    """The cases (in order along ``axis``, or one) that share sections with ``box``."""
    if axis is None:
        return cases
    first = bisect_right(cases, box.start[axis], key=lambda case: case.region.stop[axis])
    last = first
    while last < len(cases) and cases[last].region.start[axis] < box.stop[axis]:
        last += 1
    return cases[first:last]
