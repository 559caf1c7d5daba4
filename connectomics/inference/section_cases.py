"""Many sections that are cases of their own, as one table: 32 bytes a section and 32 a channel, whatever their number.

The survey fills it; stages read it as a sequence of ``Case``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from connectomics.core.geometry import AxisOrder, Box
from connectomics.inference.case import Case
from connectomics.inference.normalise import ChannelSummary


class SectionCases(Sequence[Case]):
    """Cases of one section each, in order, kept as arrays; each is made when it is asked for.

    Parameters
    ----------
    first
        Where the first section stands along ``axis``.
    plane
        Extent of each section along the other two axes, here called rows and columns: of sections across z, y and x.
    boxes
        int64 [n, 4]: row and column where the nonzero box starts, row and column where it stops.
    channels
        float64 [n, c, 4]: mean, standard deviation, minimum and maximum.
    axis
        The axis across which sections lie (0 = z, 1 = y, 2 = x).
    """

    def __init__(
        self,
        first: int,
        plane: tuple[int, int],
        boxes: npt.NDArray[np.int64],
        channels: npt.NDArray[np.float64],
        axis: int = 0,
    ) -> None:
        self._first, self._plane, self._boxes, self._channels, self._axis = first, plane, boxes, channels, axis

    @classmethod
    def of(cls, cases: Iterable[Case], sections: int, channels: int, axis: int = 0) -> SectionCases:
        """The table of ``sections`` cases that come one after the other along ``axis``, at least one."""
        order = AxisOrder.across(axis)
        boxes = np.empty((sections, 4), np.int64)
        values = np.empty((sections, channels, 4), np.float64)
        region, count = Box.of_shape((1, 1, 1)), 0
        for i, case in enumerate(cases):
            region = order.turn_box(case.region) if i == 0 else region
            box = order.turn_box(case.box)
            boxes[i] = (*box.start[1:], *box.stop[1:])
            values[i] = [(c.mean, c.std, c.minimum, c.maximum) for c in case.channels]
            count = i + 1
        if count != sections:
            raise ValueError(f"expected {sections} sections, got {count}")
        return cls(region.start[0], region.stop[1:], boxes, values, axis=axis)

    @property
    def axis(self) -> int:
        """The axis across which sections lie (0 = z, 1 = y, 2 = x)."""
        return self._axis

    @property
    def nbytes(self) -> int:
        """Memory of the table."""
        return self._boxes.nbytes + self._channels.nbytes

    def __len__(self) -> int:
        return len(self._boxes)

    @overload
    def __getitem__(self, index: int) -> Case: ...
    @overload
    def __getitem__(self, index: slice) -> SectionCases: ...
    def __getitem__(self, index: int | slice) -> Case | SectionCases:
        if isinstance(index, slice):
            start, _, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"sections are taken one after the other, not every {step}")
            return SectionCases(
                self._first + start, self._plane, self._boxes[index], self._channels[index], axis=self._axis
            )
        at = self._first + range(len(self))[index]
        (top, left, bottom, right), (height, width) = self._boxes[index].tolist(), self._plane
        back = AxisOrder.across(self._axis).inverse
        region = back.turn_box(Box((at, 0, 0), (at + 1, height, width)))
        channels = tuple(ChannelSummary(*values) for values in self._channels[index].tolist())
        return Case(region, back.turn_box(Box((at, top, left), (at + 1, bottom, right))), channels)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SectionCases):
            return NotImplemented
        return (
            (self._first, self._plane, self._axis) == (other._first, other._plane, other._axis)
            and np.array_equal(self._boxes, other._boxes)
            and np.array_equal(self._channels, other._channels)
        )

    __hash__ = None  # type: ignore[assignment]  # a table compares by its values
