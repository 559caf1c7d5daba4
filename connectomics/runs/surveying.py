"""The survey of a volume within its run: read by all processes together, merged and kept by the first of them.

``runs.volume`` calls this before the first block; so does ``runs.one_block``, for a block of the survey or a later one.
"""

from __future__ import annotations

import logging

from connectomics.execution.run_folder import SURVEY
from connectomics.execution.stage import Workspace
from connectomics.runs.job import VolumeJob
from connectomics.stages.predict.segmenter import Surveyed
from connectomics.stages.survey.survey import load_survey, save_survey
from connectomics.volumes.volume import VolumeReader

log = logging.getLogger(__name__)


def survey_together(job: VolumeJob, reader: VolumeReader, workspace: Workspace) -> Surveyed | None:
    """What is kept of the survey; where it is not, the volume is read here with all processes that do the same."""
    kept = load_survey(workspace.work / SURVEY)
    if kept is None:
        job.labeller.segmenter.share_survey(reader, job.name, job.limits.readers, workspace)
    return kept


def surveyed_before(
    job: VolumeJob, reader: VolumeReader, workspace: Workspace, kept: Surveyed | None = None
) -> Surveyed:
    """What is known of the volume before its first block: what is kept in the work folder, or surveyed and kept now."""
    path = workspace.work / SURVEY
    kept = kept or load_survey(path)
    if kept is not None:
        return job.labeller.segmenter.masked(kept, reader, workspace)
    surveyed = job.labeller.segmenter.survey(reader, job.name, job.limits.readers, workspace)
    save_survey(surveyed, path)
    log.info("surveyed %s cases", " + ".join(str(len(cases)) for cases in surveyed))
    return surveyed
