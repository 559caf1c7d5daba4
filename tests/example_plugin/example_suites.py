"""What the tests of a package that adds features look like; tests/unit/test_plugins.py runs them in a process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from connectomics_example.double import DoubleBackend

from connectomics import ConnectomicsError, load_config, open_volume
from connectomics.cli import main
from connectomics.core.geometry import Box
from connectomics.models.arch.nnunet_models import NetworkPlan
from connectomics.testing.architecture import ArchitectureContract
from connectomics.testing.backend import BackendContract
from connectomics.testing.output_format import OutputFormatContract, OutputSample
from connectomics.testing.volume_reader import VolumeReaderContract, WrittenVolume

RANDOM = np.random.default_rng(2)
SIZE = (40.0, 4.0, 5.0)
QUICK = ["inference.sliding_window.window_size=[64,64]", "inference.test_time_augmentation.enabled=false"]
MODEL = Path(__file__).parents[2] / "connectomics" / "example" / "phantom_mito_2d"


def write_voxels(path: Path, voxels: np.ndarray) -> Path:
    """A volume by numpy alone."""
    header = {"dtype": voxels.dtype.str, "shape": voxels.shape, "voxel_size_nm": SIZE}
    path.write_bytes(json.dumps(header).encode() + b"\n" + voxels.tobytes())
    return path


class TestReader(VolumeReaderContract):
    @pytest.fixture(params=["uint8", ">u2", "float32"])
    def written(self, request: pytest.FixtureRequest, tmp_path: Path) -> WrittenVolume:
        voxels = RANDOM.integers(0, 200, (2, 5, 37, 29)).astype(request.param)
        return WrittenVolume(str(write_voxels(tmp_path / "a.voxels", voxels)), voxels, {}, SIZE)


class TestOutput(OutputFormatContract):
    form: ClassVar = "voxels"
    samples: ClassVar = (
        OutputSample(RANDOM.integers(0, 3, (1, 5, 34, 17), np.uint8)),
        OutputSample(RANDOM.random((3, 5, 20, 17), np.float32), labels=False),
    )


class TestBackend(BackendContract):
    name = "double"
    kind = DoubleBackend
    tolerance = 5e-6


def plan(dimensions: int) -> NetworkPlan:
    return NetworkPlan(
        trainer_name="nnUNetTrainer",
        dimensions=dimensions,
        channels=2,
        classes=3,
        network_class="",
        arguments={},
        imports=(),
        patch_shape=(1 if dimensions == 2 else 4, 8, 8),
        plans={},
        configuration={},
        where="plans.json",
        checkpoint="c.pth",
        trust_code=False,
    )


class TestArchitecture(ArchitectureContract):
    name = "linear"
    plans: ClassVar = (plan(2), plan(3))
    impossible: ClassVar = (plan(4),)


def test_a_run_computes_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_voxels(tmp_path / "cell.voxels", RANDOM.integers(0, 256, (1, 2, 64, 64), np.uint8))
    words = ["infer-volume", "--checkpoint", str(MODEL), "system.device=cpu", "system.num_cpus=1", *QUICK]
    words += [f"inference.volume_mode.file_pattern={tmp_path}/*.voxels"]
    labels = []
    for backend in ("torch", "double"):
        out = tmp_path / backend
        assert main([*words, f"inference.data.output_path={out}", f"system.backend={backend}"]) == 0
        volume = open_volume(str(out / "cell_labels.h5"))
        labels.append(volume.read(Box.of_shape(volume.info.extent)))
        volume.close()
        assert f'"backend": "{backend}' in (out / "cell_labels.run" / "provenance.json").read_text()
    assert (labels[0] != labels[1]).mean() < 1e-3
    with pytest.raises(ConnectomicsError, match="must be one of auto, torch, compile, openvino, double"):
        load_config(None, ["system.backend=tensorrt"])
    capsys.readouterr()


def test_a_run_reads_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = RANDOM.integers(0, 256, (1, 2, 64, 64), np.uint8)
    write_voxels(tmp_path / "cell.voxels", image)
    words = ["infer-volume", "--checkpoint", str(MODEL), f"inference.data.output_path={tmp_path / 'out'}"]
    words += [f"inference.volume_mode.file_pattern={tmp_path}/*.voxels", "inference.output.formats=[h5,voxels]"]
    words += ["system.device=cpu", "system.num_cpus=1", *QUICK]
    assert main(words) == 0
    read = []
    for name in ("cell_labels.h5", "cell_labels.voxels"):
        volume = open_volume(str(tmp_path / "out" / name))
        assert volume.info.voxel_size_nm == SIZE
        read.append(volume.read(Box.of_shape(volume.info.extent)))
        volume.close()
    np.testing.assert_array_equal(*read)
    before = (tmp_path / "out" / "cell_labels.voxels").stat()
    assert main(words) == 0, "finished, so skipped"
    assert (tmp_path / "out" / "cell_labels.voxels").stat() == before
    capsys.readouterr()


def test_messages_name_it(tmp_path: Path) -> None:
    (tmp_path / "a.unknown").write_text("?")
    with pytest.raises(ConnectomicsError, match=r"known are .*\.voxels"):
        open_volume(str(tmp_path / "a.unknown"))
    with pytest.raises(ConnectomicsError, match="precomputed, voxels"):
        load_config(None, ["inference.output.formats=[nifti]"])
