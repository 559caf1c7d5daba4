"""The phantom: its URIs, what it says of itself, its ground truth and its damaged sections."""

from __future__ import annotations

import cc3d
import numpy as np
import pytest

from connectomics.core.errors import VolumeError
from connectomics.core.fingerprint import sha256_of_bytes
from connectomics.core.geometry import Box
from connectomics.volumes.phantom.volume import LARGEST_SEED, VERSION, PhantomReader, open_phantom, section_damage
from connectomics.volumes.volume import Array


def read_all(uri: str) -> Array:
    reader = open_phantom(uri)
    return reader.read(Box.of_shape(reader.info.extent))[0]


def read_section(what: str, seed: int, z: int, side: int = 300) -> Array:
    reader = open_phantom(f"phantom:{z + 1}x{side}x{side}?seed={seed}&what={what}")
    return reader.read(Box((z, 0, 0), (z + 1, side, side)))[0, 0]


@pytest.fixture(scope="module")
def instances() -> Array:
    return read_all("phantom:80x480x500?seed=7&what=instances")


def test_info_states_shape_type_and_voxel_size() -> None:
    info = open_phantom("phantom:64x1024x200").info
    assert info.shape == (1, 64, 1024, 200)
    assert info.dtype == np.uint8
    assert info.voxel_size_nm == (30.0, 8.0, 8.0)
    assert info.chunk_shape == (1, 256, 200)


@pytest.mark.parametrize(
    ("uri", "normal"),
    [
        ("phantom:4x5x6", "phantom:4x5x6?seed=0&what=image"),
        ("phantom:04x5x6?what=label&seed=007", "phantom:4x5x6?seed=7&what=label"),
        ("phantom:4x5x6?what=instances", "phantom:4x5x6?seed=0&what=instances"),
    ],
)
def test_identity_is_the_normalised_uri(uri: str, normal: str) -> None:
    reader = open_phantom(uri)
    assert reader.identity == {"phantom": normal, "version": 1}
    assert open_phantom(normal).identity == reader.identity
    reader.close()


@pytest.mark.parametrize(
    ("uri", "finding"),
    [
        ("phantom:", "not a phantom"),
        ("phantom:4x5", "not a phantom"),
        ("phantom:4x5x-6", "not a phantom"),
        ("phantom:4x5x6x7", "not a phantom"),
        ("volume.h5", "not a phantom"),
        ("phantom:0x5x6", r"\(0, 5, 6\)"),
        ("phantom:4x5x1000001", "1000001"),
        ("phantom:4x5x6?seed=-1", "'-1'"),
        ("phantom:4x5x6?seed=", "seed ''"),
        (f"phantom:4x5x6?seed={LARGEST_SEED + 1}", "expected 0 to"),
        ("phantom:4x5x6?what=raw", "'raw'"),
        ("phantom:4x5x6?sed=3", "'sed'"),
        ("phantom:4x5x6?seed=1&seed=2", "repeated option 'seed'"),
    ],
)
def test_bad_uri_shows_the_finding_and_the_grammar(uri: str, finding: str) -> None:
    with pytest.raises(VolumeError, match=finding) as caught:
        open_phantom(uri)
    assert "phantom:ZxYxX[?seed=N][&what=image|label|instances]" in str(caught.value)


@pytest.mark.parametrize("box", [Box((0, 0, 0), (5, 1, 1)), Box((0, -1, 0), (1, 1, 1))])
def test_box_outside_the_volume_is_refused(box: Box) -> None:
    with pytest.raises(VolumeError, match=r"inside \(4, 5, 6\)"):
        open_phantom("phantom:4x5x6").read(box)


def test_empty_box_gives_an_empty_array() -> None:
    assert open_phantom("phantom:4x5x6").read(Box((1, 2, 3), (1, 4, 5))).shape == (1, 0, 2, 2)


@pytest.mark.parametrize("sections", [24, pytest.param(80, marks=pytest.mark.long)])
def test_label_is_where_instances_are(instances: Array, sections: int) -> None:
    label = read_all(f"phantom:{sections}x480x500?seed=7&what=label")
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, (instances[:sections] > 0).astype(np.uint8))
    assert 0.02 < label.mean() < 0.12


def test_each_instance_is_one_piece_and_touches_no_other(instances: Array) -> None:
    """Judged by cc3d; objects that leave the volume may be seen as two pieces, so only whole ones count."""
    pieces, count = cc3d.connected_components((instances > 0).astype(np.uint8), connectivity=26, return_N=True)
    at_the_border = set()
    for axis in range(3):
        for end in (0, -1):
            at_the_border |= set(np.unique(np.take(instances, end, axis=axis)).tolist())
    owner = {int(p): np.unique(instances[pieces == p]).tolist() for p in range(1, count + 1)}
    assert all(len(ids) == 1 for ids in owner.values())
    whole = [ids[0] for ids in owner.values() if ids[0] not in at_the_border]
    assert len(whole) > 5
    assert len(whole) == len(set(whole))


def test_ids_do_not_depend_on_the_size_of_the_volume(instances: Array) -> None:
    assert instances.dtype == np.uint32
    np.testing.assert_array_equal(read_all("phantom:3x200x310?seed=7&what=instances"), instances[:3, :200, :310])


def test_ids_are_wide_enough_in_the_largest_volume() -> None:
    side = 10**6
    reader = open_phantom(f"phantom:{side}x{side}x{side}?what=instances")
    assert reader.info.dtype == np.uint64
    far = Box((side - 1, side - 300, side - 300), (side, side, side))
    ids = np.unique(reader.read(far))
    near = np.unique(reader.read(Box((0, 0, 0), (1, 300, 300))))
    assert len(ids) > 2
    assert int(ids[-1]) > 2**32
    assert set(ids.tolist()) & set(near.tolist()) == {0}


def test_ids_need_no_more_than_32_bits_in_a_large_volume() -> None:
    reader = open_phantom("phantom:30000x60000x60000?what=instances")
    assert reader.info.dtype == np.uint32
    ids = reader.read(Box((29999, 59700, 59700), (30000, 60000, 60000)))
    assert np.array_equal(
        ids.astype(np.uint64),
        open_phantom("phantom:900000x60000x60000?what=instances").read(
            Box((29999, 59700, 59700), (30000, 60000, 60000))
        ),
    )


@pytest.mark.parametrize(
    ("what", "digest"),
    [
        ("image", "a302834272bd1ac494bf1c85affe4126b09caca69b87c6a1153ee34733b063b4"),
        ("instances", "ced57c73a755b3bcd55caad0d3e94d33d9301a0fa2ab8f98e1455ca6660a14ef"),
    ],
)
def test_values_are_those_of_version_1_on_any_machine(what: str, digest: str) -> None:
    """A change of the recipe needs a new VERSION (part of result keys), new digests and a new model."""
    box = Box((5, 50, 60), (9, 200, 250))
    array = open_phantom(f"phantom:20x400x400?seed=7&what={what}").read(box)
    assert VERSION == 1
    assert sha256_of_bytes(array.astype(array.dtype.newbyteorder("<")).tobytes()) == digest


def test_seeds_differ() -> None:
    images = [read_section("image", seed, 3).astype(float) for seed in (7, 8, LARGEST_SEED)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(images[a].ravel(), images[b].ravel())[0, 1]) < 0.2
    assert not np.array_equal(read_section("label", 7, 3), read_section("label", 8, 3))


def test_neighbouring_sections_are_alike_and_distant_ones_are_not() -> None:
    first, second, later = (read_section("image", 7, z).astype(float).ravel() for z in (3, 4, 200))
    assert np.corrcoef(first, second)[0, 1] > 0.5
    assert abs(np.corrcoef(first, later)[0, 1]) < 0.2


def test_two_percent_of_the_sections_are_damaged() -> None:
    damage = [section_damage(seed, z) for seed in range(20) for z in range(1000)]
    assert 0.015 < np.mean([kind != "" for kind in damage]) < 0.025
    assert set(damage) == {"", "black", "fold", "faint"}


def test_the_demonstration_has_each_damage_once_in_its_first_64_sections() -> None:
    damage = [section_damage(7, z) for z in range(64)]
    assert sorted(kind for kind in damage if kind) == ["black", "faint", "fold"]


def test_black_sections_are_zero_and_only_they_are() -> None:
    z = next(z for z in range(1000) if section_damage(7, z) == "black")
    black = read_section("image", 7, z)
    assert not black.any()
    assert read_section("label", 7, z).any()  # the tissue was there
    assert read_section("image", 7, z - 1).min() > 0


def test_faint_sections_have_little_contrast() -> None:
    z = next(z for z in range(1000) if section_damage(7, z) == "faint")
    faint, fine = read_section("image", 7, z).astype(float), read_section("image", 7, z + 1).astype(float)
    means = [image.reshape(60, 5, 60, 5).mean(axis=(1, 3)) for image in (faint, fine)]  # without the noise
    assert means[0].std() < 0.6 * means[1].std()


def test_folds_are_long_dark_bands() -> None:
    z = next(z for z in range(1000) if section_damage(7, z) == "fold")
    longest = []
    for section in (z, z + 1):
        coarse = read_section("image", 7, section, 2000).reshape(200, 10, 200, 10).mean(axis=(1, 3))
        dark = cc3d.connected_components((coarse < 85).astype(np.uint8), connectivity=8)
        longest.append(max(np.ptp(np.nonzero(dark == n), axis=1).max() for n in range(1, dark.max() + 1)))
    assert longest[0] > 60 > 3 * longest[1]


def test_mitochondria_are_darker_than_the_cytoplasm_around_them() -> None:
    image, label = read_section("image", 7, 3), read_section("label", 7, 3) > 0
    assert image[label].mean() < image[~label].mean() - 30


def test_reader_is_a_value() -> None:
    assert open_phantom("phantom:4x5x6?seed=3") == PhantomReader((4, 5, 6), 3, "image")
