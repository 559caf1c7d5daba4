"""The jobs whose processes are stopped: small enough for hundreds of trials, with every format and stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from fork_server import ForkServer
from scipy import ndimage
from sleep_storm import Job

from nnunet_models import make_model
from small_jobs import em_like, infer_words, quick_folder, write_h5

UNIT_BYTES = 4096
EVERYTHING = (
    "inference.block_shape=[1,24,32]",
    "inference.output.formats=[h5,zarr,tiff,png,zarr2,n5,precomputed]",
    "inference.voxel_size_nm=[40,4,4]",
    "inference.output.save_probabilities=true",
    "inference.test_time_augmentation.select_channel=[1]",
    "inference.test_time_augmentation.flip_axes=[1]",
    "inference.postprocessing.intensity_scale=255",
    "inference.postprocessing.intensity_dtype=uint8",
    "inference.postprocessing.binary.enabled=true",
    "inference.postprocessing.binary.remove_small_objects=6",
    "decoding=[{name: connected_components, connectivity: 26}, {name: watershed, seed_distance_nm: 5}, "
    "{name: slice_linking, max_gap: 1}]",
)
"""Settings of a run that goes through every stage, and writes labels, probabilities and objects in every format."""
STEPS = "[{name: connected_components, threshold: 0.5}, {name: filters, min_voxels: 3}]"


@contextlib.contextmanager
def labelling(settings: Sequence[str], *, masked: bool = False, preloaded: Path | None = None) -> Iterator[Job]:
    """Labels of a volume by a model, in blocks as the settings say; with a hole where the model is ``masked``."""
    with quick_folder() as folder, ForkServer(folder, preloaded) as server:
        more = {"reader": "SimpleITKIO", "masked": (True,)} if masked else {}
        model = make_model(folder / "model", dimensions=2, patch=(16, 16), features=(4, 8), **more)
        image = em_like((2, 48, 64))
        image[1, 20:26, 30:38] = 0
        volume = write_h5(folder / "v.h5", image)
        yield from _ready(Job(server, folder, lambda output: infer_words(model, output, volume, *settings)))


@contextlib.contextmanager
def decoding(formats: str, *, steps: str = STEPS, preloaded: Path | None = None) -> Iterator[Job]:
    """Objects of probabilities, with their table, in four blocks."""
    with quick_folder() as folder, ForkServer(folder, preloaded) as server:
        likely = ndimage.gaussian_filter(np.random.default_rng(0).random((8, 32, 48)), 0.8).astype(np.float32)
        volume = write_h5(folder / "v.h5", likely)
        more = (f"inference.output.formats=[{formats}]", "inference.block_shape=[8,16,24]")
        words = ["decode", str(volume), f"decoding={steps}", "inference.voxel_size_nm=[40,4,4]", *more]
        yield from _ready(Job(server, folder, lambda output: [*words, f"inference.data.output_path='{output}'"]))


def _ready(job: Job) -> Iterator[Job]:
    """Give a job with its undisturbed result; none of its processes outlives this."""
    job.prepared["unit_bytes"] = UNIT_BYTES
    with job.ending():
        job.run_undisturbed()
        yield job
