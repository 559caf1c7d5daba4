"""The restricted reader of checkpoints: what nnU-Net writes passes, with its values."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.core.errors import ModelError, UnsafeModelError
from connectomics.models.unpickle import _plain_scalar, _PlainDtype, read_checkpoint


def saved(tmp_path: Path, content: object, *, protocol: int = 2) -> Path:
    torch.save(content, tmp_path / "c.pth", pickle_protocol=protocol)
    return tmp_path / "c.pth"


@pytest.mark.parametrize(
    "value",
    [
        np.float64(0.25),
        np.float32(-1.5),
        np.int64(7),
        np.bool_(True),
        np.dtype(">f8").type(3.0),
        np.uint8(200),
    ],
)
def test_numpy_scalars_come_back_as_numbers(tmp_path: Path, value: np.generic) -> None:
    assert read_checkpoint(saved(tmp_path, {"v": value}))["v"] == value.item()


def test_values_of_big_endian_machines_are_read_in_their_order() -> None:
    dtype = _PlainDtype("i4", False, True)
    dtype.__setstate__((3, ">", None, None, None, -1, -1, 0))
    assert _plain_scalar(dtype, np.array([258], ">i4").tobytes()) == 258


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """The checkpoint with its pickle changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return path


def test_tensors_keep_values_types_and_sharing(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    content = OrderedDict(a=tensor, b=tensor.t(), c=tensor.half(), d=torch.tensor(3), e=tensor.bfloat16())
    found = read_checkpoint(saved(tmp_path, content))
    for name, expected in content.items():
        assert torch.equal(found[name], expected)
        assert found[name].dtype == expected.dtype
    assert found["a"].data_ptr() == found["b"].data_ptr()


def test_parameters_devices_and_arrays_pass(tmp_path: Path) -> None:
    content = {
        "p": torch.nn.Parameter(torch.ones(2)),
        "device": torch.device("cuda", 1),
        "shape": torch.Size([1, 2]),
        "log": np.arange(3.0),
        "plain": [1, "a", None, True, 2.5, (1,), {"x": b"y"}],
    }
    found = read_checkpoint(saved(tmp_path, content))
    assert torch.equal(found["p"], torch.ones(2))
    assert found["device"] == torch.device("cuda", 1)
    assert (found["shape"], found["plain"]) == (content["shape"], content["plain"])


def test_numpy_1_names_pass(tmp_path: Path) -> None:
    """Before numpy 2 the scalar factory lived in numpy.core; such checkpoints are common."""
    path = saved(tmp_path, {"v": np.float64(0.5)})
    rewritten(path, lambda data: data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core.multiarray" in path.read_bytes()
    assert read_checkpoint(path)["v"] == 0.5


def test_newer_pickle_protocols_are_read_without_looking_names_up(tmp_path: Path) -> None:
    path = saved(tmp_path, {"when": timedelta(1)}, protocol=4)
    with pytest.raises(UnsafeModelError, match=r"datetime\.timedelta"):
        read_checkpoint(path)


def test_extension_codes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.pth").write_bytes(b"\x80\x02\x82\x01.")
    with pytest.raises(UnsafeModelError, match="extension 1"):
        read_checkpoint(tmp_path / "c.pth")


def test_what_our_list_allows_pytorch_may_still_refuse(tmp_path: Path) -> None:
    """Names alone do not make a pickle harmless: the second lock checks what is done with them."""
    path = saved(tmp_path, {"v": torch.ones(1)})
    rewritten(path, lambda data: b"\x80\x02X\x01\x00\x00\x00a)R.")  # calls a plain string as a function
    with pytest.raises(UnsafeModelError, match="unrecognized function"):
        read_checkpoint(path)


def test_trusted_files_are_read_whole(tmp_path: Path) -> None:
    path = saved(tmp_path, {"when": timedelta(1)})
    assert read_checkpoint(path, trust_code=True)["when"].days == 1


def test_a_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_checkpoint(tmp_path)


def legacy(tmp_path: Path, content: object) -> Path:
    """A checkpoint as torch before 1.6 wrote it, which today's torch still can."""
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    return tmp_path / "old.pth"


def test_the_format_before_torch_1_6_keeps_values_types_and_sharing(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    content = OrderedDict(a=tensor, b=tensor.t(), c=tensor.half(), d=torch.tensor(3), e=tensor.bfloat16())
    content |= {"f": torch.empty(0), "g": torch.nn.Parameter(torch.ones(2)), "h": torch.tensor([True, False])}
    path = legacy(tmp_path, {"network_weights": content, "log": np.arange(3.0), "best": np.float64(0.5)})
    found = read_checkpoint(path)
    theirs = torch.load(path, weights_only=False)["network_weights"]
    for name, expected in theirs.items():
        assert torch.equal(found["network_weights"][name], expected)
        assert found["network_weights"][name].dtype == expected.dtype
    assert found["network_weights"]["a"].data_ptr() == found["network_weights"]["b"].data_ptr()
    assert found["best"] == 0.5


class Runs:
    """What a hostile pickle brings."""

    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("import builtins; builtins.ran = True",))


@pytest.mark.parametrize("content", [Runs(), {"network_weights": {"a": Runs()}}, {"a": timedelta(1)}])
def test_the_format_before_torch_1_6_brings_no_code(tmp_path: Path, content: object) -> None:
    import builtins

    with pytest.raises(UnsafeModelError, match="it asks for"):
        read_checkpoint(legacy(tmp_path, content))
    assert not hasattr(builtins, "ran")


def test_an_old_checkpoint_that_is_damaged_or_states_too_much(tmp_path: Path) -> None:
    path = legacy(tmp_path, {"network_weights": {"a": torch.ones(300), "b": torch.zeros(2)}})
    whole = path.read_bytes()
    for cut in (*range(20, 700, 31), len(whole) - 5):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelError, match="damaged"):
            read_checkpoint(path)
    stated = b"M" + (300).to_bytes(2, "little")  # BININT2
    assert whole.count(stated) >= 2
    for many in (b"J" + (2**31 - 1).to_bytes(4, "little"), b"J" + (-1).to_bytes(4, "little", signed=True)):
        path.write_bytes(whole.replace(stated, many))
        with pytest.raises(ModelError, match="damaged"):
            read_checkpoint(path)
