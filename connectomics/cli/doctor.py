"""Is this machine ready? Versions, torchvision, device, memory, disk, model and volumes, each with its mend."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
from pathlib import Path

import psutil
import torch

import connectomics
from connectomics.assembly.engine.cascade import check_previous_stage
from connectomics.assembly.engine.make_engine import build_engine
from connectomics.assembly.settings import memory_budget_bytes, network_settings
from connectomics.assembly.volumes import list_sources, open_source, share_of
from connectomics.cli.diagnosis import LOW_DISK_BYTES, Diagnosis
from connectomics.config.schema import Config
from connectomics.core.errors import ConnectomicsError
from connectomics.core.installation import DISTRIBUTION, VERSION, install_command
from connectomics.models.backends.device import select_device
from connectomics.models.nnunet_releases import known_bad

PACKAGE = "connectomics"
RELEASES = ("nnunetv2", "torch", "dynamic_network_architectures")
LOW_MEMORY_BYTES = 4 << 30
VOLUMES_OPENED = 20


def examine(config: Config, checkpoint: Path | None) -> list[Diagnosis]:
    """Look at everything a run would need; model and volumes are left out where no checkpoint is named."""
    findings = [_python(), _installation(), _nnunet(), _torchvision(), _device(config), _memory(config), _disk(config)]
    if checkpoint is not None or config.model.nnunet_checkpoint is not None:
        findings += _model_and_volumes(config, checkpoint)
    return findings


def _python() -> Diagnosis:
    return Diagnosis("python", f"{platform.python_version()}, torch {torch.__version__}")


def _installation(package: Path = Path(connectomics.__file__).parent) -> Diagnosis:
    """Another distribution may own the name ``connectomics``: one of that name on the package index does."""
    owners = set(importlib.metadata.packages_distributions().get(PACKAGE, ())) - {DISTRIBUTION}
    others = sorted(owner for owner in owners if not _is_ours(owner))
    if others:
        return Diagnosis(
            "connectomics",
            f"{', '.join(others)} also installs a package {PACKAGE}, which may be imported instead of this one",
            f"pip uninstall --yes {' '.join([*others, DISTRIBUTION])} && {install_command()}",
        )
    return Diagnosis("connectomics", f"{VERSION}, from {package}")


def _is_ours(owner: str) -> bool:
    """Whether a distribution that is not called as ours is an older installation of this one."""
    points = importlib.metadata.distribution(owner).entry_points
    return any(point.value.startswith("connectomics.cli") for point in points)


def _nnunet() -> Diagnosis:
    """The releases that nnU-Net's networks are built and run with, and which of them are known not to fit."""
    installed = {name: importlib.metadata.version(name) for name in RELEASES}
    text = ", ".join(f"{name} {version}" for name, version in installed.items() if name != "nnunetv2")
    bad = known_bad(installed)
    if bad:
        words = " ".join(f"'{requirement}'" for _, requirement in bad)
        return Diagnosis("nnunetv2", "; ".join(finding for finding, _ in bad), f"install {words} with pip")
    return Diagnosis("nnunetv2", f"{installed['nnunetv2']} (tested: 2.5.1 up to, not with, 2.9), {text}")


def _torchvision() -> Diagnosis:
    """A torchvision built for another torch breaks timm, hence parts of nnunetv2, and lightning."""
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return Diagnosis("torchvision", "absent; nothing here needs it")
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        return Diagnosis(
            "torchvision",
            f"{version} does not load with torch {torch.__version__} ({' '.join(str(error).split())[:80]})",
            "install the torchvision that matches this torch, or pip uninstall torchvision",
        )
    return Diagnosis("torchvision", f"{version} matches torch {torch.__version__}")


def _device(config: Config) -> Diagnosis:
    try:
        device = select_device(network_settings(config).device)
    except ConnectomicsError as error:
        return Diagnosis("device", str(error), "set system.device to cpu, or mend the driver")
    return Diagnosis("device", str(device))


def _memory(config: Config) -> Diagnosis:
    memory = psutil.virtual_memory()
    budget = memory_budget_bytes(config.system.memory_budget_gb)
    text = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free, budget {budget / 2**30:.1f} GiB"
    short = budget > memory.total or memory.available < LOW_MEMORY_BYTES
    return Diagnosis("memory", text, "lower system.memory_budget_gb, or free memory" if short else "")


def _disk(config: Config) -> Diagnosis:
    folder = Path(config.inference.data.output_path).absolute()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / 2**30:.1f} GiB free at {folder}"
    if free < LOW_DISK_BYTES:
        return Diagnosis("disk", text, "free the disk, or set inference.data.output_path to another one")
    return Diagnosis("disk", text)


def _model_and_volumes(config: Config, checkpoint: Path | None) -> list[Diagnosis]:
    try:
        engine = build_engine(config, checkpoint)
    except ConnectomicsError as error:
        return [Diagnosis("model", str(error), "see connectomics inspect MODEL")]
    spec = engine.spec
    size = f"{len(spec.folds)} folds of {spec.parameters / 1e6:.2f} M parameters"
    text = f"{spec.configuration}, patch {spec.patch_shape}, {size}"
    findings = [Diagnosis("model", text)]
    mode = config.inference.volume_mode
    if mode.file_list is None and mode.file_pattern is None:
        return findings
    try:
        sources = share_of(mode, list_sources(config, spec.channels))
        check_previous_stage(config.model.previous_stage, engine.specs, sources)
    except ConnectomicsError as error:
        return [*findings, Diagnosis("volumes", str(error), "mend inference.volume_mode")]
    for source in sources[:VOLUMES_OPENED]:
        try:
            open_source(engine, source).close()
        except ConnectomicsError as error:
            findings.append(Diagnosis("volume", str(error), "mend or leave out this volume"))
    count = f"{len(sources)} volumes, the first {min(len(sources), VOLUMES_OPENED)} opened"
    return [*findings, Diagnosis("volumes", count)]
