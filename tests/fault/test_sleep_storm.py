"""A process that sleeps for longer than the limit and wakes up: another has finished, and nothing is lost or left.

The long form tries many more moments, see ``sleep_moments``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from fork_server import ForkServer
from scipy import ndimage
from sleep_storm import Job, Moment, side_by_side, sleeping

from nnunet_models import make_model
from small_jobs import em_like, infer_words, quick_folder, write_h5

RENAME = "connectomics.execution.publishing:rename"
LEVEL = "connectomics.stages.output.formats.level_array:LevelArray.write"
DISCARD = "connectomics.core.files:discard"
FEW = (
    Moment("between the check and the rename of a file", RENAME, text="labels.final.h5"),
    Moment("in a block of a level", LEVEL, number=2),
    Moment("before the working store is removed", DISCARD, text="labels.zarr'"),
)


@pytest.fixture(scope="module")
def labelling() -> Iterator[Job]:
    """Labels by a model, in one format of each kind."""
    with quick_folder() as folder, ForkServer(folder) as server:
        model = make_model(folder / "model", dimensions=2, patch=(16, 16), features=(4, 8))
        volume = write_h5(folder / "v.h5", em_like((2, 48, 64)))
        more = ("inference.block_shape=[1,48,64]", "inference.output.formats=[n5,h5]")
        job = Job(server, folder, lambda output: infer_words(model, output, volume, *more), prepared=SMALL)
        with job.ending():
            job.run_undisturbed()
            yield job


@pytest.fixture(scope="module")
def decoding() -> Iterator[Job]:
    """Objects of probabilities, with their table."""
    with quick_folder() as folder, ForkServer(folder) as server:
        likely = ndimage.gaussian_filter(np.random.default_rng(0).random((8, 32, 48)), 0.8).astype(np.float32)
        volume = write_h5(folder / "v.h5", likely)
        words = ["decode", str(volume), "decoding=[{name: connected_components, threshold: 0.5}]"]
        more = ("inference.output.formats=[h5]", "inference.block_shape=[8,16,48]")
        job = Job(server, folder, lambda output: [*words, f"inference.data.output_path='{output}'", *more])
        with job.ending():
            job.run_undisturbed()
            yield job


SMALL = {"unit_bytes": 2048}


def test_a_process_that_sleeps_and_wakes_harms_nothing(labelling: Job, decoding: Job) -> None:
    trials = [(moment.name, sleeping(labelling, moment)) for moment in FEW]
    export = Moment("objects between the check and the rename", RENAME, text="objects.final.h5")
    assert side_by_side([*trials, (export.name, sleeping(decoding, export))]) == []
