"""The list ``decoding``: typed steps, each refusal a sentence that says where and what would be right."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from connectomics import load_config
from connectomics.config.load import written
from connectomics.core.errors import ConfigError
from connectomics.stages.decode.connected_components import ConnectedComponents
from connectomics.stages.decode.object_filters import Filters
from connectomics.stages.decode.slice_linking import SliceLinking

REFUSED = {
    "decoding=connected_components": ("expected a list of steps",),
    "decoding=[connected_components]": ("expected a list of steps",),
    "decoding=[{name: conected_components}]": ("decoding[0].name", "did you mean connected_components?"),
    "decoding=[{connectivity: 6}]": (
        "decoding[0].name is null",
        "connected_components, filters, slice_linking, watershed",
    ),
    "decoding=[{name: filters}, {name: filters, min_voxel: 3}]": ("decoding[1]", "did you mean min_voxels?"),
    "decoding=[{name: filters, xyz: 3}]": ("unknown key 'xyz' of filters, which has name, min_voxels",),
    "decoding=[{name: connected_components, connectivity: 7}]": ("connectivity is 7", "4, 8, 6, 18, 26"),
    "decoding=[{name: connected_components, connectivity: six}]": ("'six', expected a whole number",),
    "decoding=[{name: connected_components, connectivity: true}]": ("expected a whole number",),
    "decoding=[{name: connected_components, threshold: high}]": ("expected a number, or null",),
    "decoding=[{name: connected_components, threshold: 0.5, probabilities: p.h5}]": ("probabilities is 'p.h5'",),
    "decoding=[{name: filters, min_voxels: null}]": ("min_voxels is null, expected a whole number",),
    "decoding=[{name: filters, min_voxels: 5, max_voxels: 4}]": ("max_voxels is 4, but must be min_voxels or more",),
    "decoding=[{name: filters, min_volume_nm3: 5, max_volume_nm3: 4}]": ("must be min_volume_nm3 or more",),
    "decoding=[{name: filters, keep_largest: 0}]": ("keep_largest is 0, but must be 1 or more",),
    "decoding=[{name: slice_linking, measure: dice}]": ("measure is 'dice', but must be one of iou, overlap",),
    "decoding=[{name: slice_linking, threshold: 1.5}]": ("threshold is 1.5, but must be 0 to 1",),
    "decoding=[{name: slice_linking, max_gap: -1}]": ("max_gap is -1, but must be 0 or more",),
    "decoding=[{name: slice_linking, gap: 1}]": ("unknown key 'gap' of slice_linking", "did you mean max_gap?"),
    "decoding=[{name: slice_linking, one_to_one: 1}]": ("one_to_one is 1, expected true or false",),
    "decoding=[{name: watershed}]": ("seed_threshold is null", "exactly one of seed_threshold and seed_distance_nm"),
    "decoding=[{name: watershed, seed_threshold: 0.9, seed_distance_nm: 9}]": ("exactly one of",),
    "decoding=[{name: watershed, threshold: 0.5, seed_threshold: 0.4}]": ("seed_threshold is 0.4", "threshold or more"),
    "decoding=[{name: watershed, seed_distance_nm: 0}]": ("seed_distance_nm is 0.0, but must be positive",),
    "decoding=[{name: watershed, seed_distance_nm: 9, connectivity: 5}]": ("connectivity is 5",),
    "decoding=[{name: watershed, seed_distance_nm: 9, channel: -1}]": ("channel is -1, but must be 0 or more",),
    "decoding=[{name: watershed, seed_distance_nm: 9, max_component_voxels: 100}]": ("must be 4096 to 134217728",),
    "decoding=[{name: filters, fill_holes: 4d}]": ("fill_holes is '4d', but must be one of off, 2d, 3d",),
}


@pytest.mark.parametrize("word", REFUSED)
def test_refusals(word: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [word])
    assert "\n" not in str(refused.value)
    for part in REFUSED[word]:
        assert part in str(refused.value)


def test_steps_in_a_file_and_on_the_command_line_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "decoding:\n  - {name: connected_components, threshold: 1}\n  - name: filters\n    keep_largest: 2\n"
    )
    steps = [ConnectedComponents(threshold=1.0), Filters(keep_largest=2)]
    assert load_config(file).decoding == steps
    word = "decoding=[{name: connected_components, threshold: 1}, {name: filters, keep_largest: 2}]"
    assert load_config(None, [word]).decoding == steps


def test_what_is_written_is_read_again() -> None:
    steps = [
        ConnectedComponents(probabilities="a b/p,q.h5"),
        Filters(min_volume_nm3=2.5e6, drop_border=True),
        SliceLinking(measure="overlap", threshold=0.1, max_gap=2),
    ]
    text = written([dataclasses.asdict(step) for step in steps])
    assert load_config(None, [f"decoding={text}"]).decoding == steps
