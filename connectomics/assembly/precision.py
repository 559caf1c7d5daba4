"""What a fast run of a volume is held to."""

from __future__ import annotations

import functools

from connectomics.assembly.engine.engine import Engine
from connectomics.core.geometry import Vec3
from connectomics.models.backends.cached import sampled
from connectomics.stages.predict.precision_check import FastContract, piece_shape
from connectomics.stages.predict.segmenter import Segmenter


def fast_contract(engine: Engine, exact: Segmenter, block: Vec3) -> FastContract | None:
    """The contract of one volume, or None where the precision is exact.

    Parameters
    ----------
    exact
        The segmenter of this volume in float32.
    block
        Shape (z, y, x) in the volume's axes that memory was planned for; no piece of the sample is larger.
    """
    if engine.reference is None:
        return None
    member, (z, y, x) = exact.members[0], engine.models[0].window.patch
    size = (float(z), float(y), float(x))
    if member.resampling is not None:
        own, network = member.resampling.spacing, member.resampling.target
        size = (z * network[0] / own[0], y * network[1] / own[1], x * network[2] / own[2])
    return FastContract(
        exact,
        engine.inference.networks.max_disagreement,
        piece_shape(member.order.inverse.turn(size), block),
        sampled=functools.partial(sampled, engine.reference.cached_backends),
    )
