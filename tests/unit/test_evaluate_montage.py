"""The montage is one PNG of three captioned panels, with tinted labels and opaque outlines."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from connectomics.core.errors import OutputError
from connectomics.evaluate.montage import montage

ORANGE, BLUE = (230, 159, 0), (86, 180, 233)  # labels 1 and 2
TOP, GAP = 24, 8


def panels(path: Path, size: int) -> list[np.ndarray]:
    image = iio.imread(path)
    assert image.shape == (TOP + size + GAP, 3 * (size + GAP) + GAP, 3)
    starts = [GAP + i * (size + GAP) for i in range(3)]
    for start in starts:  # a caption stands above each panel
        assert (image[:TOP, start : start + size] < 128).any()
    return [image[TOP : TOP + size, start : start + size] for start in starts]


def test_labels_are_tinted_and_outlined_over_the_raw_section(tmp_path: Path) -> None:
    raw = np.tile(np.linspace(0, 4000, 256).astype(np.uint16), (256, 1))
    prediction, truth = np.zeros((2, 256, 256), np.uint8)
    prediction[50:101, 60:111] = 1
    truth[100:201, 20:71] = 2
    path = tmp_path / "montage.png"
    montage(raw, prediction, truth, path)
    plain, given, true = panels(path, 256)
    assert (plain[..., 0] == plain[..., 2]).all()
    assert plain[0, 0, 0] == 0 and plain[0, -1, 0] == 255, "the contrast is stretched"
    assert (np.diff(plain[9, :, 0].astype(int)) >= 0).all()
    for shown, labels, colour in ((given, prediction, ORANGE), (true, truth, BLUE)):
        np.testing.assert_array_equal(shown[labels == 0], plain[labels == 0])
        y, x = np.argwhere(labels)[0]
        assert tuple(shown[y, x]) == colour, "the outline is opaque"
        expected = 0.6 * plain[y + 20, x + 20] + 0.4 * np.array(colour)
        np.testing.assert_allclose(shown[y + 20, x + 20], expected, atol=1)


def test_a_small_section_is_enlarged_and_a_flat_one_is_shown(tmp_path: Path) -> None:
    raw = np.full((64, 64), 7, np.float32)
    labels = np.zeros((64, 64), np.int64)
    labels[3, 4] = 9  # beyond the palette: colours repeat
    montage(raw, labels, labels, tmp_path / "m.png")
    plain, given, true = panels(tmp_path / "m.png", 256)
    assert len(np.unique(plain)) == 1
    assert (given[12:16, 16:20] != plain[12:16, 16:20]).any()
    assert (given != plain).any(axis=2).sum() == 16, "each pixel became 4 x 4"
    np.testing.assert_array_equal(given, true)


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    flat = np.zeros((4, 4), np.uint8)
    with pytest.raises(OutputError, match="absent"):
        montage(flat, flat, flat, tmp_path / "absent" / "m.png")
    montage(flat, flat, flat, tmp_path / "m.png")
    assert [p.name for p in tmp_path.iterdir()] == ["m.png"]


@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 4)])
def test_shapes_must_agree(shape: tuple[int, ...], tmp_path: Path) -> None:
    flat = np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match="one \\(y, x\\)"):
        montage(flat, flat, np.zeros(shape, np.uint8), tmp_path / "m.png")
