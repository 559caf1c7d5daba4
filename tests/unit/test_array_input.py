"""What people have in Python: arrays of other libraries, volumes, paths, dictionaries; and what is none of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array
import h5py
import numpy as np
import numpy.typing as npt
import pytest
import tensorstore
import torch
import zarr
from PIL import Image

import connectomics
from connectomics import Box, InferenceManager, VolumeProcessor, build_engine, list_sources, load_config, open_volume
from connectomics.core.errors import ConfigError, ConnectomicsError, VolumeError
from connectomics.lightning.array_input import image_of
from connectomics.stages.survey import tiles

from nnunet_models import make_model
from small_jobs import em_like, write_h5

CPU = {"system": {"device": "cpu", "num_cpus": 1}}
SHAPE = (3, 24, 40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), dimensions=2, patch=(16, 24), classes=2, seed=2)


@pytest.fixture(scope="module")
def manager(model: Path) -> InferenceManager:
    return InferenceManager(CPU, str(model))


@pytest.fixture(scope="module")
def image() -> npt.NDArray[np.uint8]:
    return em_like(SHAPE)


@pytest.fixture(scope="module")
def labels(manager: InferenceManager, image: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    found = manager.predict(image).labels
    assert 0 < found.mean() < 1
    return found


class Counted:
    """A lazy array that knows how much of it was read at once."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array, self.shape, self.dtype, self.largest = array, array.shape, array.dtype, 0

    def __getitem__(self, index: Any) -> npt.NDArray[Any]:
        found = self.array[index]
        self.largest = max(self.largest, found.size)
        return found


class Named(Counted):
    """An array with names of axes, as of xarray."""

    dims: tuple[str, ...] = ("x", "y", "z")


def stored(path: Path, image: npt.NDArray[Any]) -> Any:
    made = zarr.create_array(str(path / "z.zarr"), shape=image.shape, chunks=(1, 16, 16), dtype=image.dtype)
    made[:] = image
    return made


KINDS = {
    "list": lambda image, path: image.tolist(),
    "tuple of arrays": lambda image, path: tuple(image),
    "list of tensors": lambda image, path: [torch.from_numpy(section) for section in image],
    "tensor": lambda image, path: torch.from_numpy(image),
    "tensor with a gradient": lambda image, path: torch.from_numpy(image.astype(np.float32)).requires_grad_(),
    "bfloat16": lambda image, path: torch.from_numpy(image).to(torch.bfloat16),
    "big-endian": lambda image, path: image.astype(">u2"),
    "flipped twice": lambda image, path: image[::-1].copy()[::-1],
    "dask": lambda image, path: dask.array.from_array(image, chunks=(2, 16, 40)),
    "zarr": lambda image, path: stored(path, image),
    "h5py": lambda image, path: h5py.File(write_h5(path / "h.h5", image))["main"],
    "tensorstore": lambda image, path: tensorstore.array(image),
    "volume": lambda image, path: open_volume(write_h5(path / "v.h5", image)),
    "str": lambda image, path: str(write_h5(path / "s.h5", image)),
    "path": lambda image, path: write_h5(path / "p.h5", image),
    "list of paths": lambda image, path: [str(write_h5(path / "l.h5", image))],
    "lazy": lambda image, path: Counted(image),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_image_has_the_labels_of_the_array(
    kind: str, manager: InferenceManager, image: npt.NDArray[np.uint8], labels: npt.NDArray[Any], tmp_path: Path
) -> None:
    given = KINDS[kind](image, tmp_path)
    np.testing.assert_array_equal(manager.predict(given).labels, labels)


def test_a_lazy_array_is_read_piece_by_piece(manager: InferenceManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_VOXELS", 32 * 32)
    large = em_like((3, 32, 32))
    given = Counted(large)
    found = image_of(given)
    assert given.largest == 0
    assert found.volume.info.chunk_shape == (1, 32, 32)
    np.testing.assert_array_equal(manager.predict(given).labels, manager.predict(large).labels)
    assert given.largest <= 32 * 32


def test_what_the_configuration_says_of_files_holds_for_a_path(
    model: Path, image: npt.NDArray[np.uint8], labels: npt.NDArray[Any], tmp_path: Path
) -> None:
    turned = write_h5(tmp_path / "xyz.h5", image.transpose(2, 1, 0))
    assert np.array_equal(InferenceManager(CPU | {"inference.axes": "xyz"}, model).predict(turned).labels, labels)


def test_equal_colours_stay_channels_where_the_model_expects_them(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dimensions=2, patch=(16, 24), channels=3, classes=2, seed=2)
    colours = em_like((24, 40))[..., None].repeat(3, axis=-1)
    Image.fromarray(colours).save(tmp_path / "rgb.png")
    manager = InferenceManager(CPU, model)
    expected = manager.predict(np.moveaxis(colours, -1, 0)[:, None]).labels
    assert np.array_equal(manager.predict(tmp_path / "rgb.png").labels, expected)


def test_chunks_of_lazy_arrays_are_known(image: npt.NDArray[np.uint8], tmp_path: Path) -> None:
    assert image_of(stored(tmp_path, image)).volume.info.chunk_shape == (1, 16, 16)
    assert image_of(dask.array.from_array(image, chunks=(2, 16, 40))).volume.info.chunk_shape == (2, 16, 40)


class Broken(Counted):
    """A lazy array whose storage is gone."""

    def __getitem__(self, index: Any) -> npt.NDArray[Any]:
        raise OSError("the disk is gone")


BAD: dict[str, Any] = {
    "ragged": [[1, 2], [3]],
    "text": "nowhere.h5",
    "letters": [["a", "b"]],
    "nothing": None,
    "number": 5,
    "empty": [],
    "object": object(),
    "mapping": {"a": 1},
    "objects": np.array([[None, 1]]),
    "complex": np.zeros((4, 4), complex),
    "five axes": torch.zeros(1, 1, 1, 4, 4),
    "masked": np.ma.masked_less(np.arange(16).reshape(4, 4), 3),
    "sparse": torch.eye(4).to_sparse(),
    "meta": torch.zeros(4, 4, device="meta"),
    "unknown sizes": dask.array.from_array(np.arange(64).reshape(8, 8), chunks=4)[np.array([True, False] * 4)][
        dask.array.from_array(np.array([True, False, True, False]), chunks=2)
    ],
    "lazy and broken": Broken(np.zeros((2, 16, 24), np.uint8)),
    "axes in another order": Named(np.zeros((24, 16, 2), np.uint8)),
    "longdouble": np.zeros((4, 4), np.longdouble),
    "nan": np.full((16, 24), np.nan),
    "channels": np.zeros((2, 1, 16, 24), np.uint8),
    "string dtype": np.array([["a"]]),
    "bytes": b"abc",
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_image_is_an_error_of_ours(kind: str, manager: InferenceManager) -> None:
    with pytest.raises(VolumeError):
        manager.predict(BAD[kind])


def test_the_remedies_of_refused_images_work(manager: InferenceManager) -> None:
    masked = np.ma.masked_less(em_like((16, 24)), 90)
    with pytest.raises(VolumeError, match=r"image.filled\(0\)"):
        manager.predict(masked)
    manager.predict(masked.filled(0))
    turned = Named(np.zeros((24, 16, 2), np.uint8))
    with pytest.raises(VolumeError, match=r"image.transpose\('z', 'y', 'x'\)"):
        manager.predict(turned)
    turned.array, turned.shape, turned.dims = turned.array.transpose(2, 1, 0), (2, 16, 24), ("z", "y", "x")
    manager.predict(turned)


@pytest.mark.parametrize("spacing", [(1, 2), "abc", (0, 1, 1), (1, 1, float("nan")), 5, {"z": 1}])
def test_a_spacing_that_is_none_is_refused(spacing: Any, manager: InferenceManager) -> None:
    with pytest.raises(VolumeError, match="expected three positive numbers"):
        manager.predict(np.zeros((16, 24), np.uint8), spacing=spacing)


def test_models_and_configurations_may_be_words_mappings_and_paths(model: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("system: {device: cpu, num_cpus: 1}\n")
    for made in (
        InferenceManager.from_checkpoint(str(model), device="cpu"),
        InferenceManager.from_checkpoint(model, {"system.num_cpus": np.int64(1)}, device=torch.device("cpu")),
        InferenceManager.from_checkpoint(model, "system.device=cpu"),
        InferenceManager(str(tmp_path / "c.yaml"), str(model)),
        InferenceManager({**CPU, "model": {"nnunet_checkpoint": model}}),
        InferenceManager(load_config(CPU), model),
    ):
        assert made.engine.spec.channels == 1
    assert connectomics.read_spec(str(model)) == connectomics.read_spec(model)


@pytest.mark.parametrize(
    "wrong",
    [
        {"system.devise": "cpu"},
        {"system": {"device": object}},
        {"system": 5},
        {5: 6},
        {"inference.roi": "abc"},
        {"system.num_cpus": {"a": 1}},
        {"system.device": torch.zeros(3)},
        5,
        [5],
        {"system.num_cpus": 1 + 2j},
    ],
    ids=range(10),
)
def test_configuration_that_is_wrong_is_refused(wrong: Any, model: Path) -> None:
    with pytest.raises(ConfigError):
        load_config(None, wrong)
    with pytest.raises(ConfigError):
        InferenceManager.from_checkpoint(model, wrong)


def test_values_of_numpy_and_tuples_are_taken() -> None:
    roi = np.array([[0, 0, 0], [1, 2, 3]])
    config = load_config({"inference": {"roi": roi, "voxel_size_nm": (30.0, np.float32(8), 8)}})
    assert config.inference.roi == [[0, 0, 0], [1, 2, 3]]
    assert config.inference.voxel_size_nm == [30.0, 8.0, 8.0]
    assert load_config({"inference.data.output_path": Path("a b")}).inference.data.output_path == "a b"
    assert load_config(None, ["system.seed=1", {"system.seed": 2}]).system.seed == 2


def test_volumes_of_a_call_may_be_paths(
    model: Path, image: npt.NDArray[np.uint8], labels: npt.NDArray[Any], tmp_path: Path
) -> None:
    volume = write_h5(tmp_path / "v.h5", image)
    config = {**CPU, "inference": {"data": {"output_path": tmp_path / "out"}}}
    engine = build_engine(config, str(model))
    (outcome,) = VolumeProcessor(config, engine).run([str(volume)])
    assert outcome.state == "done"
    np.testing.assert_array_equal(np.asarray(open_volume(outcome.paths[0]))[0], labels)
    (again,) = VolumeProcessor(config, engine).run(volume)  # type: ignore[arg-type]
    assert again.state == "skipped"
    with pytest.raises(ConfigError, match="expected what list_sources gives"):
        VolumeProcessor(config, engine).run([5])  # type: ignore[list-item]
    (listed,) = list_sources({"inference.volume_mode.file_pattern": volume}, 1)
    assert listed.uris == (str(volume),)


def test_an_opened_volume_is_an_array(image: npt.NDArray[np.uint8], tmp_path: Path) -> None:
    with open_volume(write_h5(tmp_path / "v.h5", image), voxel_size_nm=[30, 8, 8]) as volume:
        whole = image[None]
        np.testing.assert_array_equal(np.asarray(volume), whole)
        np.testing.assert_array_equal(np.asarray(volume, np.float32), whole.astype(np.float32))
        assert (volume.shape, volume.ndim, volume.dtype, len(volume)) == ((1, *SHAPE), 4, np.dtype("u1"), 1)
        assert volume.info.voxel_size_nm == (30.0, 8.0, 8.0)
        for index in (
            np.s_[0],
            np.s_[..., 5],
            np.s_[0, -1, 3:9, ::7],
            np.s_[:, ::-1],
            np.s_[0, 1:1],
            np.s_[0, ..., ::-3],
            np.s_[:, 5:2:-1, 20:2:-4],
            np.s_[np.int64(0), 1, 2, 3],
        ):
            np.testing.assert_array_equal(volume[index], whole[index])
        np.testing.assert_array_equal(dask.array.from_array(volume, chunks=(1, 1, 16, 16)).compute(), whole)
        for wrong in (np.s_[2], np.s_[0, 0, 0, 0, 0], np.s_[[0]], np.s_["a"], np.s_[0, 1.5], np.s_[..., 0, ...]):
            with pytest.raises(VolumeError, match="is no index"):
                volume[wrong]
        with pytest.raises(VolumeError, match="is no box"):
            volume.read((0, 0, 0))  # type: ignore[arg-type]
    with pytest.raises(VolumeError, match="was closed"):
        np.asarray(volume)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Box((0, 0), (1, 1)),  # type: ignore[arg-type]
        lambda: Box((1, 1, 1), (0, 0, 0)),
        lambda: open_volume("phantom:1x8x8").read(Box("abc", "def")),  # type: ignore[arg-type]
        lambda: open_volume("phantom:1x8x8").read(Box((0, 0, 0), (1, 2.5, 3))),  # type: ignore[arg-type]
        lambda: Box(None, (1, 2, 3)),  # type: ignore[arg-type]
        lambda: Box.of_shape((1, 2)),  # type: ignore[arg-type]
        lambda: open_volume("phantom:1x8x8", axes=5),  # type: ignore[arg-type]
        lambda: open_volume("phantom:1x8x8", voxel_size_nm=(1, 2)),
        lambda: open_volume("phantom:1x8x8", voxel_size_nm=5),  # type: ignore[arg-type]
        lambda: build_engine(CPU, 5),  # type: ignore[arg-type]
        lambda: build_engine(5, "m"),  # type: ignore[arg-type]
        lambda: load_config(5),  # type: ignore[arg-type]
        lambda: list_sources({}, 1),
    ],
)
def test_wrong_calls_are_errors_of_ours(call: Any) -> None:
    with pytest.raises(ConnectomicsError):
        call()
