"""MONAI's sliding window behind our Predictor contract: an independent check, for cases that fit in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from connectomics.core.errors import ConfigError
from connectomics.core.geometry import Box, Vec3
from connectomics.core.installation import install_command
from connectomics.inference.case import WindowSource
from connectomics.inference.predictor import Logits, Part, SlidingWindow
from connectomics.inference.tta import forward_mirrored
from connectomics.models.backends.contract import Backend
from connectomics.models.backends.probe import naming_what_ran_out

try:
    from monai.inferers.inferer import SlidingWindowInferer
except ImportError as error:
    raise ConfigError(
        f"inference.sliding_window.engine=monai needs MONAI, which does not load here ({error}); "
        f"{install_command('monai')}, or use engine=nnunet"
    ) from error


class MonaiPredictor:
    """Runs ``monai.inferers.SlidingWindowInferer`` over whole cases (whole sections where the patch is flat).

    Its windows lie at multiples of a fixed step with the last one shifted back, nnU-Net's are spread evenly, so labels
    differ where the two grids do.

    Parameters
    ----------
    folds
        One backend per fold; their logits are averaged.
    setting
        Windows and blending.
    padding_mode
        How cases smaller than the window are padded: constant, reflect, replicate or circular.
    """

    def __init__(self, folds: tuple[Backend, ...], setting: SlidingWindow, padding_mode: str) -> None:
        self._folds = folds
        self._setting = setting
        self._inferer = SlidingWindowInferer(
            roi_size=setting.patch,
            sw_batch_size=setting.batch,
            overlap=1.0 - setting.step,
            mode=setting.blending,
            padding_mode=padding_mode,
        )

    def windows(self, source: WindowSource, core: Box) -> int:
        """Number of windows MONAI lays over the sections or the case that ``core`` touches."""
        counts = []
        for extent, patch in zip(source.box.shape, self._setting.patch, strict=True):
            step = max(1, int(patch * self._setting.step))
            counts.append(1 + max(0, math.ceil((extent - patch) / step)))
        if self._setting.patch[0] == 1:
            counts[0] = core.shape[0]
        return math.prod(counts)

    @torch.inference_mode()
    def try_memory(self, shape: Vec3, channels: int) -> None:
        """One full batch of empty windows; what MONAI takes for a case is counted by the planner alone."""
        device, batch = self._folds[0].device, self._setting.batch
        with naming_what_ran_out(
            f"{batch} windows do not fit the device's memory",
            "end what else runs there, set a smaller sw_batch_size, or use system.device=cpu",
        ):
            windows = torch.zeros((batch, channels, *self._setting.patch), device=device)
            for backend in self._folds:
                self._network(backend)(windows).amax().item()

    @torch.inference_mode()
    def predict(self, parts: Iterable[Part]) -> Iterator[tuple[Box, Logits]]:
        """Logits of each part, cut out of those of the whole section or case."""
        for source, core in parts:
            if self._setting.patch[0] > 1:
                yield core, self._cut(source, source.box, core)
                continue
            for part in core.sections():
                plane = source.box.with_span(0, part.start[0], part.stop[0])
                yield part, self._cut(source, plane, part)

    def _cut(self, source: WindowSource, whole: Box, part: Box) -> Logits:
        image = torch.from_numpy(source.get(whole))[None].to(self._folds[0].device)
        total: torch.Tensor | None = None
        for backend in self._folds:
            logits = self._inferer(image, self._network(backend))[0]
            total = logits if total is None else total + logits
        assert total is not None
        index = (slice(None), *part.relative_to(whole).slices)
        return total[index] / len(self._folds)

    def _network(self, backend: Backend) -> _Mirrored:
        return _Mirrored(backend, self._setting.mirror_axes)


class _Mirrored:
    """What MONAI calls for each batch of windows."""

    def __init__(self, backend: Backend, axes: tuple[int, ...]) -> None:
        self._backend, self._axes = backend, axes

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        return forward_mirrored(self._backend, batch, self._axes)
