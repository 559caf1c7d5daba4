"""One PNG of a section: raw, raw with prediction, raw with truth; a run with known answers writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from connectomics.core.errors import OutputError
from connectomics.core.files import replacing
from connectomics.volumes.volume import Array

Bytes = npt.NDArray[np.uint8]

# Okabe and Ito (2008), distinct for colour-blind readers; label 1 comes first, labels beyond repeat.
_COLOURS = np.array(
    [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)],
    np.float32,
)
_OPACITY = 0.4
_SMALLEST_PANEL = 256  # pixels; smaller sections are enlarged by a whole factor
_CAPTION = 24  # pixels
_GAP = 8  # pixels
_PAPER = 255


def montage(raw: Array, prediction: Array, truth: Array, path: Path) -> None:
    """Write one PNG with three panels side by side: raw, prediction over raw, truth over raw.

    Parameters
    ----------
    raw
        (y, x), any number type; shown between its 0.5 and 99.5 percentiles.
    prediction, truth
        (y, x) labels, integers from 0; 0 is not coloured.
    path
        The PNG; it appears whole or not at all.

    Raises
    ------
    ValueError
        If the arrays are not of one shape (y, x).
    OutputError
        If the file cannot be written.
    """
    if raw.ndim != 2 or raw.shape != prediction.shape or raw.shape != truth.shape:
        raise ValueError(f"expected one (y, x), got {raw.shape}, {prediction.shape}, {truth.shape}")
    factor = max(1, -(-_SMALLEST_PANEL // min(raw.shape)))
    grey, given, true = (np.repeat(np.repeat(a, factor, 0), factor, 1) for a in (_to_grey(raw), prediction, truth))
    panels = [
        ("raw", np.repeat(grey[..., None], 3, axis=2)),
        ("prediction", _overlay(grey, given)),
        ("truth", _overlay(grey, true)),
    ]
    image = _side_by_side(panels)
    try:
        with replacing(path) as temporary:
            image.save(temporary, format="PNG")
    except OSError as error:
        raise OutputError(f"cannot write the montage {path}: {error.strerror}; check folder and space") from error


def _to_grey(raw: Array) -> Bytes:
    low, high = np.percentile(raw, (0.5, 99.5))
    scaled = (raw.astype(np.float32) - low) * (255 / max(high - low, 1e-6))
    grey: Bytes = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return grey


def _overlay(grey: Bytes, labels: Array) -> Bytes:
    """``grey`` with a tint on each label above 0 and an opaque line along its inner edge."""
    colours = _COLOURS[(labels.astype(np.int64) - 1) % len(_COLOURS)]
    padded = np.pad(labels, 1, mode="edge")
    edge = np.zeros(labels.shape, bool)
    for neighbour in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        edge |= neighbour != labels
    opacity = np.where(labels > 0, np.where(edge, 1.0, _OPACITY), 0.0)[..., None]
    mixed: Bytes = np.rint(grey[..., None] * (1 - opacity) + colours * opacity).astype(np.uint8)
    return mixed


def _side_by_side(panels: list[tuple[str, Bytes]]) -> Image.Image:
    height, width = panels[0][1].shape[:2]
    size = (len(panels) * (width + _GAP) + _GAP, _CAPTION + height + _GAP)
    image = Image.new("RGB", size, (_PAPER, _PAPER, _PAPER))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    for i, (caption, pixels) in enumerate(panels):
        left = _GAP + i * (width + _GAP)
        draw.text((left + width // 2, _CAPTION // 2), caption, fill=(0, 0, 0), font=font, anchor="mm")
        image.paste(Image.fromarray(pixels), (left, _CAPTION))
    return image
