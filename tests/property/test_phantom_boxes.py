"""A box of the phantom holds the same bytes whatever else is read with it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from connectomics.core.geometry import Box, Vec3, vec3
from connectomics.volumes.phantom import volume as phantom

SEED = st.sampled_from([0, 7, 101, phantom.LARGEST_SEED])
WHAT = st.sampled_from(["image", "label", "instances"])
CORNER = st.tuples(st.integers(0, 10**6 - 3), st.integers(0, 10**6 - 90), st.integers(0, 10**6 - 90))


@st.composite
def nested(draw: st.DrawFn) -> tuple[Box, Box]:
    """A box anywhere in the largest volume, and one inside it."""
    start = draw(CORNER | st.just((0, 0, 0)))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 90), st.integers(1, 90)))
    low = vec3([draw(st.integers(0, n - 1)) for n in shape])
    high = vec3([draw(st.integers(a + 1, n)) for a, n in zip(low, shape, strict=True)])
    return Box.of_shape(shape).shift(start), Box(low, high).shift(start)


@settings(max_examples=60, deadline=None)
@given(seed=SEED, what=WHAT, boxes=nested())
def test_a_box_is_a_slice_of_any_larger_box(seed: int, what: str, boxes: tuple[Box, Box]) -> None:
    outer, inner = boxes
    reader = phantom.open_phantom(f"phantom:1000000x1000000x1000000?seed={seed}&what={what}")
    whole = reader.read(outer)
    part = reader.read(inner)
    assert whole.dtype == reader.info.dtype
    z, y, x = inner.relative_to(outer).slices
    np.testing.assert_array_equal(part, whole[:, z, y, x])


@settings(max_examples=12, deadline=None)
@given(seed=SEED, what=WHAT, start=CORNER, cut=st.integers(1, 255))
def test_tiles_leave_no_seam(seed: int, what: str, start: Vec3, cut: int) -> None:
    """Boxes longer than the reader's own tiles equal the two parts they are cut into."""
    reader = phantom.open_phantom(f"phantom:1000000x1000000x1000000?seed={seed}&what={what}")
    z, y, x = start[0], start[1], min(start[2], 10**6 - 600)
    whole = reader.read(Box((z, y, x), (z + 1, y + 40, x + 600)))
    parts = [reader.read(Box((z, y, a), (z + 1, y + 40, b))) for a, b in ((x, x + cut), (x + cut, x + 600))]
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), whole)
