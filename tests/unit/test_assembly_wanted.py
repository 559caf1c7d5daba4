"""``inference.roi`` and ``inference.mask`` at the command and in Python: files, work, refusals, scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from connectomics.cli import main
from connectomics.commands.verify import verify
from connectomics.config.load import load_config
from connectomics.core.errors import ConfigError, VolumeError
from connectomics.lightning.inference import InferenceManager
from connectomics.stages.output.export import export_path
from connectomics.stages.survey.placement import placed
from connectomics.volumes.opening import open_volume

from nnunet_models import make_model
from small_jobs import em_like, final_names, infer_words, ledger_lines, quick_folder, read_h5, write_h5

EXTENT = (3, 48, 64)
CUT = "inference.block_shape=[1,24,32]"
SAVE = "inference.output.save_probabilities=true"
ROI = "inference.roi=[[1,5,7],[3,30,40]]"
WORDS = ["system.device=cpu", "system.num_cpus=1"]


def small_mask() -> Any:
    """At a half of y and a third of x, rounded up: one corner of section 0, a spot of section 2."""
    mask = np.zeros((3, 24, 22), np.uint8)
    mask[0, :5, :4] = 255
    mask[2, 20, 21] = 1
    return mask


def seen(mask: Any) -> Any:
    """A mask at the volume's resolution, by numpy's own repetition where the factor divides the extent."""
    index = np.meshgrid(*(np.arange(n) * m // n for n, m in zip(EXTENT, mask.shape, strict=True)), indexing="ij")
    return mask[tuple(index)] != 0


@dataclass(frozen=True)
class Bench:
    """A model, a volume, and what it gives where nothing restricts it."""

    folder: Path
    model: Path
    volume: Path
    labels: Any
    probabilities: Any

    def run(self, name: str, *more: str) -> tuple[int, Path]:
        output = self.folder / name
        return main(infer_words(self.model, output, self.volume, CUT, *more)), output

    def mask(self, values: Any) -> str:
        return f"inference.mask='{write_h5(self.folder / 'mask.h5', values)}'"


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with quick_folder() as folder:
        model = make_model(folder / "model", dimensions=2, patch=(16, 16), features=(4, 8), mirror_axes=())
        volume = write_h5(folder / "v.h5", em_like(EXTENT))
        bench = Bench(folder, model, volume, None, None)
        code, output = bench.run("full", SAVE)
        assert code == 0
        full, probabilities = read(output, "v_labels"), read(output, "v_labels_probabilities")
        assert 0.1 < (full > 0).mean() < 0.9
        yield Bench(folder, model, volume, full, probabilities)


ODD, SIZED = (3, 45, 58), "inference.voxel_size_nm=[30,8,8]"


@pytest.fixture(scope="module")
def odd(bench: Bench) -> Path:
    """A folder with labels of a volume whose extents are no multiple, and their pyramids in all chunked formats."""
    output = bench.folder / "odd"
    volume = write_h5(output / "odd.h5", em_like(ODD))
    formats = "inference.output.formats=[h5,zarr,zarr2,n5,precomputed]"
    assert main(infer_words(bench.model, output, volume, "inference.block_shape=[1,12,16]", SIZED, formats)) == 0
    return output


def read(output: Path, stem: str) -> Any:
    return read_h5(output / f"{stem}.h5")


def report(output: Path, name: str = "report") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "v_labels.run" / f"{name}.json").read_text())
    return content


def test_every_format_holds_the_labels_inside_and_background_outside(bench: Bench) -> None:
    mask = small_mask()
    group = zarr.open_group(bench.folder / "mask.zarr", mode="w", zarr_format=2)
    group.create_array("raw", data=mask, chunks=(1, 10, 10))
    formats = "inference.output.formats=[h5,tiff,png,zarr]"
    code, output = bench.run("formats", f"inference.mask='{bench.folder}/mask.zarr::raw'", formats)
    assert code == 0
    pages = [np.asarray(Image.open(path)) for path in sorted((output / "v_labels_png").glob("*.png"))]
    found = {
        "h5": read(output, "v_labels"),
        "tiff": tifffile.imread(output / "v_labels.tif"),
        "png": np.stack(pages),
        "zarr": zarr.open_group(output / "v_labels.zarr", mode="r")["0"][:],
    }
    expected = np.where(seen(mask), bench.labels, 0)
    assert expected.any()
    for form, labels in found.items():
        assert np.array_equal(labels, expected), form
    blocks = {line["block"] for line in ledger_lines(output / "v_labels.run")}
    assert blocks == {"0-0-0", "2-1-1"}, "blocks without wanted voxels are not computed"


@pytest.mark.parametrize("formats", ["h5", "zarr"])
def test_probabilities_outside_are_the_backgrounds(bench: Bench, formats: str) -> None:
    code, output = bench.run(f"p_{formats}", ROI, SAVE, f"inference.output.formats=[{formats}]")
    assert code == 0
    inside = np.zeros(EXTENT, bool)
    inside[1:3, 5:30, 7:40] = True
    if formats == "h5":
        labels, probabilities = read(output, "v_labels"), read(output, "v_labels_probabilities")
    else:
        stems = ("v_labels", "v_labels_probabilities")
        labels, probabilities = (zarr.open_group(output / f"{stem}.zarr", mode="r")["0"][:] for stem in stems)
    outside = np.array([1, 0], np.float32).reshape(2, 1, 1, 1)
    assert np.array_equal(labels, np.where(inside, bench.labels, 0))
    assert probabilities.tobytes() == np.where(inside, bench.probabilities, outside).tobytes()


def test_less_is_computed_and_recorded(bench: Bench) -> None:
    full, (code, output) = report(bench.folder / "full"), bench.run("less", ROI)
    assert code == 0
    found, lines = report(output), ledger_lines(output / "v_labels.run")
    assert (full["planned"], found["planned"], found["done"]) == (12, 8, 8)
    assert 0 < found["windows"] == sum(line["windows"] for line in lines) < full["windows"] / 2
    assert {line["block"] for line in lines} == {f"{z}-{y}-{x}" for z in (1, 2) for y in (0, 1) for x in (0, 1)}
    provenance = report(output, "provenance")
    assert provenance["nnunet"] == "not nnU-Net: background outside inference.roi"
    assert provenance["wanted"] == {"roi": [[1, 5, 7], [3, 30, 40]]}
    assert provenance["statistics"] == report(bench.folder / "full", "provenance")["statistics"]


def test_masks_and_boxes_make_other_results(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    word = bench.mask(small_mask())
    assert bench.run("keys", word) == (0, bench.folder / "keys")
    assert bench.run("keys", word)[0] == 0
    assert "Skipped 1/1" in capsys.readouterr().err
    bench.mask(1 - small_mask().clip(0, 1))
    for more in ([word], [ROI], []):
        assert bench.run("keys", *more)[0] == 3
        assert "overwrite=true" in capsys.readouterr().out


def test_a_mask_of_nothing_gives_background_and_says_so(bench: Bench) -> None:
    code, output = bench.run("nothing", bench.mask(np.zeros(EXTENT, np.uint8)))
    assert code == 0
    assert not read(output, "v_labels").any()
    assert "inference.mask is zero everywhere" in (output / "v_labels.run" / "run.log").read_text()
    assert (report(output)["planned"], report(output)["windows"]) == (0, 0)


@pytest.mark.parametrize("form", ["zarr", "zarr2", "n5", "precomputed"])
def test_a_level_of_its_own_pyramid_is_placed_by_its_metadata(odd: Path, form: str) -> None:
    """Extents are no multiple; each format's level k is compared with plain division by its factor."""
    volume = open_volume(str(odd / "odd_labels.h5"))
    for level in (1, 2):
        inner = f"s{level}" if form == "n5" else str(level)
        mask = open_volume(f"{export_path(odd, 'odd_labels', form)}::{inner}")
        assert mask.info.extent == (3, *(-(-n // 2**level) for n in ODD[1:]))
        for axis, length in zip(placed(volume.info, mask.info, form), ODD, strict=True):
            factor = 1 if length == 3 else 2**level
            assert np.array_equal(axis.seen(np.arange(length)), np.arange(length) // factor)
        mask.close()
    volume.close()


def test_a_run_within_a_coarser_level_keeps_the_tissue_at_its_end(bench: Bench, odd: Path) -> None:
    words = infer_words(bench.model, bench.folder / "tissue", odd / "odd.h5", CUT, SIZED)
    assert main([*words, f"inference.mask='{odd}/odd_labels.zarr::2'"]) == 0
    full = read_h5(odd / "odd_labels.h5")
    coarse = zarr.open_group(odd / "odd_labels.zarr", mode="r")["2"][:]
    seen = coarse.repeat(4, 1).repeat(4, 2)[:, : ODD[1], : ODD[2]] != 0
    assert (full > 0)[:, :, -2:].any()
    assert np.array_equal(read_h5(bench.folder / "tissue" / "odd_labels.h5"), np.where(seen, full, 0))
    provenance = json.loads((bench.folder / "tissue" / "odd_labels.run" / "provenance.json").read_text())
    assert provenance["wanted"]["mask_placement"] == [[0, 1], [0, 4], [0, 4]]
    assert main([*words, "inference.mask=null", f"inference.mask='{odd}/odd_labels.zarr::2'"]) == 0, "finished"


def undefined() -> Any:
    values = np.ones(EXTENT, np.float32)
    values[1, 2, 3] = np.nan
    return values


@pytest.mark.parametrize(
    ("name", "values", "finding"),
    [
        ("extent", np.ones((3, 48, 63), np.uint8), "(3, 48, 63) voxels, expected the volume's (3, 48, 64)"),
        ("larger", np.ones((6, 96, 128), np.uint8), "expected the volume's (3, 48, 64)"),
        ("channels", np.ones((2, *EXTENT), np.uint8), "2 channels, expected one"),
        ("undefined", undefined(), "NaN or infinite values"),
        ("complex", np.ones(EXTENT, np.complex64), "complex64"),
    ],
)
def test_a_bad_mask_fails_its_volume(
    bench: Bench, capsys: pytest.CaptureFixture[str], name: str, values: Any, finding: str
) -> None:
    code, output = bench.run(name, bench.mask(values))
    printed = capsys.readouterr()
    assert code == 3
    assert finding in printed.err + printed.out
    assert "mask.h5" in printed.err + printed.out
    assert not final_names(output)


@pytest.mark.parametrize(
    ("word", "finding"),
    [
        ("inference.mask=absent.h5", "absent.h5"),
        ("inference.mask=s3://bucket/mask.zarr", "only local paths"),
        ("inference.roi=[[0,0,0],[3,48,65]]", "the volume ends at (3, 48, 64)"),
    ],
)
def test_what_is_absent_or_outside_fails_its_volume(
    bench: Bench, capsys: pytest.CaptureFixture[str], word: str, finding: str
) -> None:
    code, output = bench.run("absent", word)
    printed = capsys.readouterr()
    assert code == (2 if "://" in word else 3)  # what the words alone tell is said before anything is read
    assert finding in printed.err + printed.out
    assert not final_names(output)


def test_an_array_in_memory_is_restricted_too(bench: Bench) -> None:
    image = em_like(EXTENT)
    words = [*WORDS, SAVE, ROI, bench.mask(small_mask())]
    prediction = InferenceManager.from_checkpoint(bench.model, words).predict(image)
    inside = np.zeros(EXTENT, bool)
    inside[1:3, 5:30, 7:40] = True
    inside &= seen(small_mask())
    assert np.array_equal(prediction.labels, np.where(inside, bench.labels, 0))
    assert prediction.probabilities is not None
    assert np.array_equal(prediction.probabilities[:, inside], bench.probabilities[:, inside])
    assert (prediction.probabilities[0][~inside] == 1).all()
    with pytest.raises(VolumeError, match=r"the image: inference\.roi is"):
        InferenceManager.from_checkpoint(bench.model, words).predict(image[:1])


def test_monais_windows_are_restricted_too(bench: Bench) -> None:
    words = [*WORDS, "inference.sliding_window.engine=monai"]
    whole = InferenceManager.from_checkpoint(bench.model, words).predict(em_like(EXTENT)).labels
    part = InferenceManager.from_checkpoint(bench.model, [*words, ROI]).predict(em_like(EXTENT)).labels
    assert np.array_equal(part[1:3, 5:30, 7:40], whole[1:3, 5:30, 7:40])
    assert part.sum() == whole[1:3, 5:30, 7:40].sum()


def test_only_wanted_voxels_are_scored(bench: Bench) -> None:
    truth = write_h5(bench.folder / "truth.h5", np.where(seen(small_mask()), bench.labels, 1 - bench.labels))
    output = bench.folder / "scored"
    words = ["test", *infer_words(bench.model, output, "", bench.mask(small_mask()))[1:]]
    words = [w for w in words if "file_pattern" not in w]
    assert main([*words, f"test.data.test_image='{bench.volume}'", f"test.data.test_label='{truth}'"]) == 0
    pooled = json.loads((output / "scores.json").read_text())["pooled"]
    assert pooled["voxels"] == seen(small_mask()).sum()
    assert pooled["labels"]["label_1"]["dice"] == 1.0


def test_verify_wants_whole_samples(bench: Bench) -> None:
    config = load_config(None, [*WORDS, ROI])
    with pytest.raises(ConfigError, match="verify compares whole samples"):
        verify(config, bench.model, str(bench.volume), certificate=bench.folder / "certificate.json")
