"""Mirroring at test time: the mean of the network over all combinations of flipped axes, in nnU-Net's order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from connectomics.models.backends.contract import Backend

FIRST_SPATIAL = 2  # a batch is (n, c, z, y, x)


def mirror_combinations(axes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """All non-empty combinations of mirror axes (0 = z, 1 = y, 2 = x), shorter ones first.

    Examples
    --------
    >>> mirror_combinations((1, 2))
    ((1,), (2,), (1, 2))
    """
    return tuple(c for n in range(len(axes)) for c in itertools.combinations(axes, n + 1))


def forward_mirrored(backend: Backend, batch: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """Mean logits over the batch and its mirror images, which go through the network as many at a time as it takes.

    Parameters
    ----------
    backend
        The network.
    batch
        float32 [n, c, z, y, x] on the backend's device, n at most its ``numeric_class.batch``.
    axes
        Mirror axes (0 = z, 1 = y, 2 = x); none means one plain forward pass.

    Returns
    -------
    tensor
        float32 [n, k, z, y, x]; summed in the order of nnunetv2's ``_internal_maybe_mirror_and_predict``.
    """
    if not axes:
        return backend.forward(batch)
    flips = [[a + FIRST_SPATIAL for a in c] for c in ((), *mirror_combinations(axes))]
    total: torch.Tensor | None = None
    for cuts in _passes(len(flips), len(batch), backend.numeric_class.batch):
        logits = backend.forward(_together([_flipped(batch[rows], flips[image]) for image, rows in cuts]))
        sizes = [rows.stop - rows.start for _, rows in cuts]
        for (image, rows), found in zip(cuts, logits.split_with_sizes(sizes), strict=True):
            if total is None:
                total = found  # the batch as it is, which the first pass holds whole
            else:
                total[rows].add_(_flipped(found, flips[image]))
        del logits, found  # the next pass is not computed beside them
    assert total is not None
    total /= len(flips)
    return total


def _passes(images: int, count: int, most: int) -> Iterator[list[tuple[int, slice]]]:
    """Which rows of which image of a batch of ``count`` rows each pass of at most ``most`` rows takes, in order.

    Examples
    --------
    >>> [[(image, rows.start, rows.stop) for image, rows in cuts] for cuts in _passes(4, 2, 5)]
    [[(0, 0, 2), (1, 0, 2), (2, 0, 1)], [(2, 1, 2), (3, 0, 2)]]
    """
    for first in range(0, images * count, most):
        last = min(first + most, images * count)
        yield [
            (image, slice(max(0, first - image * count), min(count, last - image * count)))
            for image in range(first // count, -(-last // count))
        ]


def _flipped(batch: torch.Tensor, dims: list[int]) -> torch.Tensor:
    return torch.flip(batch, dims) if dims else batch


def _together(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
