from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from connectomics.core.fingerprint import canonical_json, key_of, sha256_of_bytes, sha256_of_file


def test_keys_depend_on_values_not_on_order() -> None:
    assert key_of({"a": [1, 2.5], "b": {"x": None, "y": True}}) == key_of({"b": {"y": True, "x": None}, "a": [1, 2.5]})
    assert key_of({"a": 1}) != key_of({"a": 2})
    assert key_of({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()


def test_what_json_cannot_carry_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))
    with pytest.raises(TypeError):
        canonical_json({"a": object()})


def test_files_and_bytes_have_the_same_digest(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"voxels")
    assert sha256_of_file(tmp_path / "f") == sha256_of_bytes(b"voxels") == hashlib.sha256(b"voxels").hexdigest()
