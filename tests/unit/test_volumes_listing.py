"""Which volumes a pattern or list means: order, datasets, channels, results beside inputs, colliding names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from connectomics.core.errors import ConfigError
from connectomics.volumes.listing import VolumeSource, expand, group, refuse_collisions, stem_of, without_results


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("s10.h5", "s9.h5", "s1.h5", "a.tif", "sub/deep.h5"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in ("stack", "cells.v2", "s1_labels.run", "vol.zarr"):
        (tmp_path / "data" / name).mkdir()
    return tmp_path


def test_matches_come_in_natural_order(data: Path) -> None:
    assert expand("data/s*.h5") == ["data/s1.h5", "data/s9.h5", "data/s10.h5"]


def test_a_dataset_behind_a_pattern_belongs_to_every_match(data: Path) -> None:
    assert expand("data/s[19].h5::raw") == ["data/s1.h5::raw", "data/s9.h5::raw"]


@pytest.mark.parametrize("uri", ["data/s1.h5", "data/s1.h5::volumes/raw", "data/stack", "phantom:4x64x64?seed=1"])
def test_one_path_is_one_volume(data: Path, uri: str) -> None:
    assert expand(uri) == [uri]


def test_a_path_with_the_signs_of_a_pattern_is_taken_as_it_stands(data: Path) -> None:
    Path("data/s[1].h5").touch()
    assert expand("data/s[1].h5") == ["data/s[1].h5"]


def test_two_stars_go_down(data: Path) -> None:
    assert "data/sub/deep.h5" in expand("data/**/*.h5")


@pytest.mark.parametrize("pattern", ["data/*", "data/*/"])
def test_run_folders_are_no_volumes(data: Path, pattern: str) -> None:
    found = {Path(uri).name for uri in expand(pattern)}
    assert {"stack", "vol.zarr"} <= found
    assert "s1_labels.run" not in found


@pytest.mark.parametrize(("pattern", "finding"), [("data/*.png", "matches no file"), ("x" * 300, "too long")])
def test_nothing_found_is_an_error(data: Path, pattern: str, finding: str) -> None:
    with pytest.raises(ConfigError, match=finding) as caught:
        expand(pattern)
    assert pattern in str(caught.value)


def test_a_folder_that_may_not_be_entered_is_left_to_the_reader(data: Path) -> None:
    Path("data").chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        assert expand("data/s1.h5") == ["data/s1.h5"]
        assert stem_of("data/s1.h5") == "s1"
    finally:
        if is_root:
            os.seteuid(0)
        Path("data").chmod(0o755)


@pytest.mark.parametrize(
    ("uri", "stem"),
    [
        ("data/s1.h5", "s1"),
        ("data/s1.h5::volumes/raw", "s1"),
        ("data/cell.ome.tif", "cell"),
        ("data/CELL.OME.TIFF", "CELL"),
        ("data/a.b.png", "a.b"),
        ("data/vol.zarr", "vol"),
        ("data/vol.zarr/", "vol"),
        ("data/x.ome.zarr::0", "x"),
        ("data/cells.v2", "cells.v2"),  # a folder: nothing of its name is a suffix
        ("data/cells.v3", "cells"),
        ("phantom:4x64x64?seed=1", "phantom_4x64x64_seed_1"),
    ],
)
def test_stems(data: Path, uri: str, stem: str) -> None:
    assert stem_of(uri) == stem


def stems(sources: list[VolumeSource]) -> list[str]:
    return [source.stem for source in sources]


def test_files_of_one_channel_are_volumes_of_their_own() -> None:
    sources = group(["a.png", "s_0000.png", "s_0001.png"], channels=1)
    assert stems(sources) == ["a", "s_0000", "s_0001"]
    assert all(source.uris == (source.name,) for source in sources)


def test_a_single_channel_in_nnunets_name_loses_its_number() -> None:
    assert group(["d/s_0000.png"], channels=1) == [VolumeSource("d/s_0000.png", "s", ("d/s_0000.png",))]


def test_channels_are_grouped_in_order_and_by_folder() -> None:
    uris = ["d/a_0001.png", "e/a_0000.png", "d/a_0000.png", "d/b.h5", "e/a_0001.png"]
    assert group(uris, channels=2) == [
        VolumeSource("d/a_0000.png", "a", ("d/a_0000.png", "d/a_0001.png")),
        VolumeSource("e/a_0000.png", "a", ("e/a_0000.png", "e/a_0001.png")),
        VolumeSource("d/b.h5", "b", ("d/b.h5",)),
    ]


def test_datasets_are_channels_too() -> None:
    (source,) = group(["a_0000.h5::raw", "a_0001.h5::raw"], channels=2)
    assert source.uris == ("a_0000.h5::raw", "a_0001.h5::raw")


@pytest.mark.parametrize(
    ("numbers", "found"),
    [(["0001"], "0001"), (["0000", "0002"], "0000, 0002"), (["0000", "0001", "0002"], "0000, 0001, 0002")],
)
def test_a_group_with_other_channels_says_so_and_leaves_the_others_alone(numbers: list[str], found: str) -> None:
    broken, whole = group([*(f"d/a_{n}.png" for n in numbers), "d/b_0000.png", "d/b_0001.png"], channels=2)
    assert "d/a_*" in broken.problem
    assert f"(0000 to 0001), found files for {found};" in broken.problem
    assert (whole.stem, whole.problem) == ("b", "")


def test_a_lone_file_may_hold_all_channels() -> None:
    assert group(["d/a_0000.png"], channels=3) == [VolumeSource("d/a_0000.png", "a", ("d/a_0000.png",))]


def test_two_files_of_one_channel_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a_0000\.png and a_0000\.tif are both channel 0000"):
        group(["a_0000.png", "a_0000.tif"], channels=1)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_phantom_has_no_channels_in_its_name(channels: int) -> None:
    (source,) = group(["phantom:4x64x64?seed=1234"], channels)
    assert source.uris == ("phantom:4x64x64?seed=1234",)


def test_colliding_names_are_refused_by_both_paths() -> None:
    with pytest.raises(ConfigError, match=r"a/v\.h5 and b/v\.tif would both write results named 'v_…'"):
        refuse_collisions(group(["a/v.h5", "x.h5", "b/v.tif"], channels=1))


def test_the_same_volume_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"v\.h5 is listed twice"):
        refuse_collisions(group(["v.h5", "v.h5"], channels=1))


def test_different_names_do_not_collide() -> None:
    refuse_collisions(group(["a/v.h5", "b/w.h5"], channels=1))


def test_results_beside_their_volumes_are_no_volumes() -> None:
    results = [
        "d/v_mito.h5",
        "d/v_mito.zarr",
        "d/v_mito.tif",
        "d/v_mito_png",
        "d/v_mito_probabilities.h5",
        "d/v_mito_probabilities_png",
    ]
    assert without_results(["d/v.h5", *results], "mito") == ["d/v.h5"]


def test_results_of_channels_are_no_volumes() -> None:
    uris = ["d/v_0000.png", "d/v_0001.png", "d/v_mito.h5"]
    assert without_results(uris, "mito") == uris[:2]


def test_what_only_looks_like_a_result_stays() -> None:
    uris = ["d/v.h5", "e/v_mito.h5", "d/w_mito.h5", "d/v_other.h5"]
    assert without_results(uris, "mito") == uris


def test_precomputed_and_n5_names(data: Path) -> None:
    for name in ("em.v1", "em.n5", "em.precomputed"):
        (data / "data" / name).mkdir()
    assert expand("precomputed://data/em.*1::1") == ["precomputed://data/em.v1::1"]
    assert expand("precomputed://data/em.v1") == ["precomputed://data/em.v1"]
    assert stem_of("precomputed://data/em.v1::8_8_30") == "em.v1"
    assert stem_of("data/em.n5::raw") == stem_of("data/em.precomputed") == "em"
    assert stem_of("data/Brain_0000.nii.gz") == "Brain_0000"
    assert without_results(["precomputed://data/em.v1", "data/em.v1_labels.h5"], "labels") == [
        "precomputed://data/em.v1"
    ]
