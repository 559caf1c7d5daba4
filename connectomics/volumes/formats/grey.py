"""Grey that was saved as colour is read as one channel, where all colours are equal; for ``images`` and ``tiff``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from connectomics.volumes.source import Source
from connectomics.volumes.volume import Array

COLOURS = 3
SAMPLES = (2, 3, 4)
"""How many samples a pixel of grey and transparency, of colour, and of both has."""
LOOKED_AT = 8
"""Sections, spread over the volume, that tell whether all are grey; the others are held against that when read."""
Fetch = Callable[[tuple[slice, ...]], Array]


def may_be_one_channel(source: Source, samples: int) -> bool:
    """Whether equal colours would be read as one channel: not where the request wants them or names a c axis."""
    return samples in SAMPLES and source.channels != samples and "c" not in (source.axes or "")


def is_grey(pixels: Array, axis: int = 0) -> bool:
    """Whether all colours along an axis are equal, and nothing is transparent."""
    samples = np.moveaxis(pixels, axis, 0)
    colours = samples[:COLOURS] if len(samples) >= COLOURS else samples[:1]
    opaque = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "iu" else 1
    return bool((colours[1:] == colours[:1]).all() and (samples[len(colours) :] == opaque).all())


def one_channel(pixels: Array, axis: int, name: str) -> Array:
    """The first colour of pixels that are grey; a ValueError if they are not."""
    if not is_grey(pixels, axis):
        raise ValueError(
            f"{name} is in colour, while what was looked at first is grey saved as colour; state inference.axes with c "
            "to read the colours as channels, or save all as grey"
        )
    return pixels.take([0], axis)


def grey_fetch(fetch: Fetch, axis: int, samples: int, name: str) -> Fetch:
    """What fetches an index of the first colour, of an array whose colours stand along an axis."""

    def first(index: tuple[slice, ...]) -> Array:
        whole = list(index)
        whole[axis] = slice(0, samples)
        return one_channel(fetch(tuple(whole)), axis, name)

    return first
