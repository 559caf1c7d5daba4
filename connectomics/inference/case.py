"""A case: the unit nnU-Net preprocesses, with its nonzero box and the exact statistics of its channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from connectomics.core.geometry import Box
from connectomics.inference.normalise import ChannelSummary, normalise
from connectomics.models.spec import ChannelNormalisation
from connectomics.volumes.volume import Array

ReadBox = Callable[[Box], Array]
Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Case:
    """One case of a volume.

    Parameters
    ----------
    region
        The part of the volume that is the case: all of it, or one section.
    box
        Its nonzero box, which nnU-Net crops to; the whole region where everything is zero.
    channels
        Statistics of each channel inside ``box``, of a masked channel inside the mask.
    plane_ranges
        Minimum and maximum of each section and channel inside ``box``, along the axis the survey was asked for; where a
        mask leaves voxels out, which become 0, it includes the mean, which does too.
    mask
        Of a volume with masked channels: gives bool (1, z, y, x) of any box inside ``box``; the mask of a section is
        what is not zero.
    """

    region: Box
    box: Box
    channels: tuple[ChannelSummary, ...]
    plane_ranges: tuple[tuple[Range, ...], ...] = ()
    mask: ReadBox | None = None


class WindowSource(Protocol):
    """What windows are laid over and read from."""

    @property
    def box(self) -> Box:
        """The extent of the window grid."""
        ...

    @property
    def channels(self) -> int:
        """Number of input channels."""
        ...

    def get(self, box: Box) -> Array:
        """A new float32 array (c, z, y, x) of any box, zeros outside ``self.box``."""
        ...


@dataclass(frozen=True, slots=True)
class CaseInput:
    """Normalised access to one case: what the network sees at any box, inside the case or in its padding.

    Parameters
    ----------
    case
        The case.
    schemes
        How each channel is normalised.
    read
        Gives raw voxels (c, z, y, x) of a box inside the volume.
    """

    case: Case
    schemes: tuple[ChannelNormalisation, ...]
    read: ReadBox

    @property
    def box(self) -> Box:
        """The grid windows are laid over: the case's nonzero box."""
        return self.case.box

    @property
    def channels(self) -> int:
        """Number of input channels."""
        return len(self.schemes)

    def get(self, box: Box) -> Array:
        """Normalised voxels of ``box`` as float32 (c, z, y, x); outside the nonzero box zeros (nnU-Net's padding)."""
        inner = box.intersect(self.case.box)
        if inner == box:
            return self._normalised(inner)
        result: Array = np.zeros((len(self.schemes), *box.shape), np.float32)
        if inner.voxels:
            result[(slice(None), *inner.relative_to(box).slices)] = self._normalised(inner)
        return result

    def _normalised(self, box: Box) -> Array:
        raw = self.read(box)
        mask = self._mask(raw, box) if any(scheme.masked for scheme in self.schemes) else None
        wanted = zip(raw, self.schemes, self.case.channels, strict=True)
        channels = [
            normalise(values, scheme, summary, mask if scheme.masked else None) for values, scheme, summary in wanted
        ]
        return channels[0][None] if len(channels) == 1 else np.stack(channels)

    def _mask(self, raw: Array, box: Box) -> Array:
        mask: Array = (raw != 0).any(axis=0) if self.case.mask is None else self.case.mask(box)[0]
        return mask
