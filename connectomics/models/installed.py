"""Finds a trained model by nnU-Net's own names, under the folder that ``nnUNet_results`` names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from connectomics.core.errors import ConfigError
from connectomics.core.places import local_path

RESULTS = "nnUNet_results"
_PLACES = ("nnUNet_preprocessed", "nnUNet_raw", RESULTS)


def installed_model(dataset: str, configuration: str, plans: str, trainer: str, environment: Mapping[str, str]) -> Path:
    """The training folder that ``nnUNetv2_predict -d -c -p -tr`` means; whether it is there is not looked at.

    Parameters
    ----------
    dataset
        Name (``Dataset004_Hippocampus``) or number (``4``).
    environment
        Environment variables; ``nnUNet_results`` must be set. A number is looked up in the folders of
        ``nnUNet_raw`` and ``nnUNet_preprocessed`` too, as nnU-Net does.

    Raises
    ------
    ConfigError
        If ``nnUNet_results`` is not set, or no dataset or several have the number.
    """
    if not environment.get(RESULTS):
        raise ConfigError(
            f"-d {dataset}: the environment variable {RESULTS} is not set, so trained models cannot be found by name; "
            "set it, or give the training folder with -m"
        )
    name = dataset if dataset.startswith("Dataset") else _name_of(dataset, environment)
    return (
        local_path(environment[RESULTS], f"the environment variable {RESULTS}")
        / name
        / f"{trainer}__{plans}__{configuration}"
    )


def _name_of(number: str, environment: Mapping[str, str]) -> str:
    if not number.isdecimal():
        raise ConfigError(f"-d {number}: expected the number of a dataset, such as 4, or its name, Dataset004_NAME")
    prefix = f"Dataset{int(number):03d}"
    folders = [Path(environment[place]) for place in _PLACES if environment.get(place)]
    names = sorted({f.name for folder in folders if folder.is_dir() for f in folder.glob(f"{prefix}*") if f.is_dir()})
    if len(names) != 1:
        raise ConfigError(
            f"-d {number}: found {', '.join(names) or 'no folder'} for {prefix} in "
            f"{', '.join(map(str, folders))}, expected one; give the full name, or the training folder with -m"
        )
    return names[0]
