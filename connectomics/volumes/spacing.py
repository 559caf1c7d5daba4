"""``NAME.json`` beside a TIFF volume, where nnU-Net's Tiff3DIO keeps the spacing; called by ``formats.tiff``."""

from __future__ import annotations

import json
import re
from pathlib import Path

from connectomics.core.errors import VolumeError
from connectomics.volumes.source import Source, reason, three_positive
from connectomics.volumes.volume import Spacing

CHANNEL_SUFFIX = re.compile(r"_\d{4}$")
LARGEST_BYTES = 1 << 20


def stated_spacing(source: Source) -> Spacing | None:
    """The spacing (z, y, x), without a unit, that the JSON file beside a TIFF states, or None where there is none.

    As in nnU-Net the files ``NAME_0000.tif``, ``NAME_0001.tif`` … share ``NAME.json``. A JSON object without the
    key ``spacing`` is somebody else's and says nothing.

    Raises
    ------
    VolumeError
        If the JSON file cannot be read, or its spacing is not three positive numbers.
    """
    path = _beside(source.path)
    if path is None:
        return None
    try:
        with path.open("rb") as stream:
            text = stream.read(LARGEST_BYTES + 1)
        if len(text) > LARGEST_BYTES:
            return None
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise VolumeError(
            f"{source.uri}: cannot read {path.name} beside it, which may state its spacing: {reason(error)}. "
            "Mend the file, or rename it if it is of another kind."
        ) from error
    if not isinstance(content, dict) or "spacing" not in content:
        return None
    found = content["spacing"]
    spacing = three_positive(found) if isinstance(found, list) and _numbers(found) else None
    if spacing is None:
        shown = repr(found) if len(repr(found)) <= 80 else f"{repr(found)[:80]} …"
        raise VolumeError(
            f'{source.uri}: {path.name} beside it states spacing {shown}; expected {{"spacing": [z, y, x]}} with '
            "three positive numbers in the unit of the model's plan."
        )
    return spacing


def _beside(path: Path) -> Path | None:
    """The JSON file of a TIFF: by its name without channel number, else by its name."""
    candidates = [path.with_name(f"{CHANNEL_SUFFIX.sub('', path.stem)}.json"), path.with_name(f"{path.stem}.json")]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _numbers(values: list[object]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
