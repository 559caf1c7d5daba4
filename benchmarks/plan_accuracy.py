"""What ``connectomics plan`` says against what then happens: small jobs of 2D and 3D models, one after the other.

    python benchmarks/plan_accuracy.py            # eight jobs of about half a minute
    python benchmarks/plan_accuracy.py --quick    # six of some seconds

Each job is planned and then run; the ratio is actual time / predicted. Exit code 1 if the median error, |ratio - 1|, is
larger than ``--at-most``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import h5py

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from connectomics.assembly.engine.make_engine import build_engine  # noqa: E402
from connectomics.assembly.volumes import named_sources  # noqa: E402
from connectomics.config.load import load_config  # noqa: E402
from connectomics.forecast.volumes import plan_volumes  # noqa: E402
from connectomics.lightning.inference import VolumeProcessor  # noqa: E402

from nnunet_models import make_model  # noqa: E402
from small_jobs import em_like  # noqa: E402

MIRRORED = "inference.test_time_augmentation.enabled={}"


@dataclass(frozen=True, slots=True)
class Job:
    """A model (2 or 3 dimensions), a volume's extent, and more words."""

    dimensions: int
    extent: tuple[int, int, int]
    mirror: bool
    words: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        mirror = "mirrored" if self.mirror else "plain"
        return f"{self.dimensions}D {'x'.join(map(str, self.extent))} {mirror} {' '.join(self.words)}".strip()


def jobs(scale: int) -> list[Job]:
    """Small jobs whose extents along z grow with ``scale``."""
    formats = "inference.output.formats={}"
    return [
        Job(2, (3 * scale, 512, 512), False),
        Job(2, (scale, 512, 512), True, (formats.format("[tiff,png]"),)),
        Job(2, (scale, 1000, 700), False, (formats.format("[zarr,n5]"), "inference.block_shape=[1,512,512]")),
        Job(2, (scale, 512, 512), False, ("inference.output.save_probabilities=true",)),
        Job(3, (16 * scale, 160, 160), False, (formats.format("[zarr]"),)),
        Job(3, (8 * scale, 128, 160), True),
        Job(3, (16 * scale, 128, 128), False, ("inference.block_shape=[32,64,128]",)),
        Job(2, (2 * scale, 640, 640), False, ("system.backend=auto", "inference.sliding_window.sw_batch_size=2")),
    ]


def measure(job: Job, folder: Path, models: dict[int, Path], threads: int) -> dict[str, object]:
    """Plan it, run it."""
    volume = folder / "volume.h5"
    with h5py.File(volume, "w") as file:
        file.create_dataset("main", data=em_like(job.extent), chunks=(1, 256, 256) if job.extent[1] > 256 else True)
    words = [MIRRORED.format(str(job.mirror).lower()), f"inference.data.output_path='{folder}/out'", *job.words]
    config = load_config(None, ["system.device=cpu", f"system.num_cpus={threads}", *words])
    engine = build_engine(config, models[job.dimensions])
    sources = named_sources([str(volume)], 1)
    (told,) = plan_volumes(engine, sources).forecasts
    (outcome,) = VolumeProcessor(config, engine).run(sources)
    assert outcome.report is not None, outcome.reason
    assert (told.work.blocks, told.work.windows) == (outcome.report.planned, outcome.report.windows)
    predicted, actual = told.as_dict(), outcome.report.seconds
    return {
        "job": job.title,
        "predicted_s": predicted["predicted_s"],
        "low_s": predicted["low_s"],
        "high_s": predicted["high_s"],
        "seconds": actual,
        "ratio": round(actual / float(str(predicted["predicted_s"])), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short form for CI")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--at-most", type=float, default=0.2, help="largest median error that passes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    words = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {words.threads} thread(s)")
    print(f"{'predicted s':>11} {'range s':>15} {'actual s':>9} {'ratio':>6}  job")
    results = []
    with tempfile.TemporaryDirectory() as place:
        folder, plain = Path(place), {"mirror_axes": (0, 1), "features": (16, 32, 64)}
        models = {
            2: make_model(folder / "2d", dimensions=2, patch=(128, 128), **plain),
            3: make_model(folder / "3d", dimensions=3, patch=(32, 64, 64), reader="Tiff3DIO", **plain),
        }
        for i, job in enumerate(jobs(2 if words.quick else 12)[: 6 if words.quick else None]):
            own = folder / str(i)
            own.mkdir()
            results.append(found := measure(job, own, models, words.threads))
            spread = f"{found['low_s']:.1f} to {found['high_s']:.1f}"
            times = f"{found['predicted_s']:11.1f} {spread:>15} {found['seconds']:9.1f}"
            print(f"{times} {found['ratio']:6.2f}  {found['job']}", flush=True)
    errors = [abs(float(str(found["ratio"])) - 1) for found in results]
    median = statistics.median(errors)
    print(
        f"median error {median:.1%}, largest {max(errors):.1%}; at most {words.at_most:.0%} in the median is tolerated"
    )
    if words.json:
        ratios = {str(found["job"]): found["ratio"] for found in results}
        words.json.write_text(
            json.dumps({"results": results, "ratio": ratios, "median_error": median}, indent=1) + "\n"
        )
    return 1 if median > words.at_most else 0


if __name__ == "__main__":
    sys.exit(main())
