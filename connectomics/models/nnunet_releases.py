"""What differs between nnunetv2's releases 2.5 to 2.8, or is not part of its interface; the one place for it."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch

NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet")
LOWEST, BEYOND = (2, 5, 1), (2, 9)
"""The releases of nnunetv2 that ``scripts/check_versions.py`` looks at: from, and up to but not with."""


def known_bad(installed: Mapping[str, str]) -> list[tuple[str, str]]:
    """What is known not to work together, of installed releases by package: what is wrong, and what to install.

    Examples
    --------
    >>> known_bad({"nnunetv2": "2.6.4", "torch": "2.9.1", "dynamic_network_architectures": "0.4.4"})
    [('torch 2.9.1 is excluded by nnunetv2 for its slow 3D convolutions', 'torch!=2.9.*')]
    """
    found = {name: _numbers(version) for name, version in installed.items()}
    nnunet, torch_, networks = (found.get(name, ()) for name in ("nnunetv2", "torch", "dynamic_network_architectures"))
    old = nnunet[:2] < (2, 6)
    tests = (
        (not LOWEST <= nnunet < BEYOND, "nnunetv2 {nnunetv2} is not tested here", "nnunetv2>=2.5.1,<2.9"),
        (
            torch_[:2] == (2, 9),
            "torch {torch} is excluded by nnunetv2 for its slow 3D convolutions",
            "torch!=2.9.*",
        ),
        (
            bool(networks) and old and networks >= (0, 4),
            "nnunetv2 {nnunetv2} needs dynamic-network-architectures before 0.4, found {dynamic_network_architectures}",
            "dynamic-network-architectures<0.4",
        ),
        (
            bool(networks) and not old and networks < (0, 4, 1),
            "nnunetv2 {nnunetv2} needs dynamic-network-architectures from 0.4.1 on, found "
            "{dynamic_network_architectures}",
            "dynamic-network-architectures>=0.4.1,<0.5",
        ),
    )
    return [(finding.format(**installed), words) for holds, finding, words in tests if holds]


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def current_class(name: str) -> str:
    """Where a network's class is today, of the dotted name that plans give it.

    Plans before nnunetv2 2.3 and those it converts name modules that have moved; nnU-Net then imports every module of
    dynamic_network_architectures, of which some need timm and torchvision.

    Examples
    --------
    >>> current_class("dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet")
    'dynamic_network_architectures.architectures.unet.ResidualEncoderUNet'
    """
    match = re.fullmatch(r"(dynamic_network_architectures\.architectures)\.\w+\.(\w+)", name)
    return f"{match[1]}.unet.{match[2]}" if match and match[2] in NETWORKS else name


@contextlib.contextmanager
def float32_sums() -> Iterator[None]:
    """While open, nnU-Net's predictor adds windows up in float32 with a float32 Gaussian.

    In all releases so far the type is the constant ``torch.half`` and the default of ``compute_gaussian``. Only the
    names that ``predict_from_raw_data`` sees are replaced.
    """
    from nnunetv2.inference import predict_from_raw_data
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian

    gaussian: Any = functools.partial(compute_gaussian, dtype=torch.float32)
    gaussian.cache_clear = compute_gaussian.cache_clear
    with (
        mock.patch.object(predict_from_raw_data, "torch", _Float32Torch(torch)),
        mock.patch.object(predict_from_raw_data, "compute_gaussian", gaussian),
    ):
        yield


class _Float32Torch:
    """The module ``torch``, whose ``half`` is float32."""

    half = torch.float32

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
