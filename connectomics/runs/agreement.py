"""How much a fast run changes in a sample of its volume: measured once a run, and refused where it is too much."""

from __future__ import annotations

from pathlib import Path

from connectomics.core.geometry import Box
from connectomics.execution.run_folder import AGREEMENT
from connectomics.runs.job import VolumeJob
from connectomics.stages.predict import precision_check as agreements
from connectomics.stages.predict.precision_check import SAMPLED_VOXELS, Agreement
from connectomics.stages.predict.segmenter import Surveyed
from connectomics.volumes.volume import VolumeReader


def measure_agreement(
    job: VolumeJob, reader: VolumeReader, surveyed: Surveyed, voxels: int = SAMPLED_VOXELS
) -> Agreement:
    """What a fast run changes in a sample of this volume of at least so many voxels, if it has them."""
    assert job.labeller.contract is not None
    roi = Box.of_shape(reader.info.extent) if job.labeller.roi is None else job.labeller.roi.box
    seed = int(job.outputs[0].result_key[:16], 16)
    return job.labeller.contract.measure(
        job.labeller.segmenter, reader.read, surveyed, roi, seed=seed, name=Path(job.name).name, voxels=voxels
    )


def agreement_of(work: Path, job: VolumeJob, reader: VolumeReader, surveyed: Surveyed) -> Agreement | None:
    """What fast changes in this volume's sample, measured once a run, or None; an AgreementError if it is too much."""
    if job.labeller.contract is None:
        return None
    found = agreements.load(work / AGREEMENT)
    if found is None:
        shared = job.labeller.contract.shared
        found = measure_agreement(job, reader, surveyed) if shared is None else shared()
        agreements.save(found, work / AGREEMENT)
    job.labeller.contract.require(found, job.name)
    return found
