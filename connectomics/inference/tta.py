"""Mirroring at test time: the mean of the network over all combinations of flipped axes, in nnU-Net's order."""

from __future__ import annotations

import itertools

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
    """Mean logits over the batch and its mirror images.

    Parameters
    ----------
    backend
        The network.
    batch
        float32 [n, c, z, y, x] on the backend's device.
    axes
        Mirror axes (0 = z, 1 = y, 2 = x); none means one plain forward pass.

    Returns
    -------
    tensor
        float32 [n, k, z, y, x]; summed in the order of nnunetv2's ``_internal_maybe_mirror_and_predict``.
    """
    total = backend.forward(batch)
    if not axes:
        return total
    combinations = mirror_combinations(axes)
    for combination in combinations:
        dims = [a + FIRST_SPATIAL for a in combination]
        total += torch.flip(backend.forward(torch.flip(batch, dims)), dims)
    total /= len(combinations) + 1
    return total
