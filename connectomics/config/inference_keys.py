"""``inference``: the keys of how volumes become labels."""

from __future__ import annotations

from dataclasses import dataclass, field

from connectomics.config import key_rules as rule
from connectomics.config.key_rules import KeyRule, key
from connectomics.core.features import OUTPUT_FORMATS, PRECISIONS

FORMATS = OUTPUT_FORMATS.names()
PLANES = ("xy", "xz", "yz")


@dataclass(frozen=True, slots=True)
class InferenceDataConfig:
    """``inference.data``: where results go."""

    output_path: str = key(
        "outputs",
        "folder of results: NAME_SUFFIX.h5 and NAME_SUFFIX.run/ for each volume",
        rule.not_empty("must name a folder"),
    )


@dataclass(frozen=True, slots=True)
class VolumeModeConfig:
    """``inference.volume_mode``: the list of volumes and this process's share of it."""

    enabled: bool = key(True, "false: infer-volume is refused")
    start_index: int = key(0, "the first volume this process takes …", rule.at_least(0))
    step: int = key(
        1, "… and then every step-th; N processes share a list by start_index 0 to N-1 and step N", rule.at_least(1)
    )
    stop_on_error: bool = key(False, "true: stop at the first volume that fails")
    file_list: list[str] | None = key(
        None, "volumes, such as [a.h5, b.tif], or a text file with one a line", rule.NAMES, rule.DISTINCT
    )
    file_pattern: str | None = key(
        None,
        "a path or a pattern such as data/*.h5; each match is a volume, a folder is a stack",
        rule.not_empty("must be a path or pattern, or null"),
    )
    output_suffix: str = key(
        "labels",
        "results are called NAME_SUFFIX",
        rule.matching("[A-Za-z0-9._-]+", "must be letters, digits, '.', '_' or '-', for it becomes part of file names"),
    )


@dataclass(frozen=True, slots=True)
class SlidingWindowConfig:
    """``inference.sliding_window``: windows; values other than nnU-Net's are recorded and marked "not nnU-Net"."""

    window_size: list[int] | None = key(
        None, "[y, x] or [z, y, x] in voxels; null: the plans' patch", rule.extents(2, 3, largest=rule.LARGEST_WINDOW)
    )
    overlap: float | None = key(
        None,
        "1 − tile_step_size, from 0 to below 1; null: nnU-Net's 0.5",
        KeyRule(lambda overlap: 0 <= overlap < 1, "must be at least 0 and below 1 (overlap = 1 - tile_step_size)"),
    )
    sw_batch_size: int | None = key(
        None,
        "windows, or mirror images of them, per forward pass; null: 1, or with `auto` or `fast` what `tune` measured "
        "to be [faster](#faster) and suits the volume",
        rule.at_least(1),
    )
    blending: str = key(
        "gaussian",
        "weights of overlapping windows: gaussian (nnU-Net's) or constant",
        rule.one_of("gaussian", "constant"),
    )
    padding_mode: str = key(
        "constant",
        "around volumes smaller than a window: constant; the engine monai also has reflect, replicate, circular",
        rule.one_of("constant", "reflect", "replicate", "circular"),
    )
    engine: str = key(
        "nnunet",
        "nnunet, or monai for volumes that fit in memory (another grid of windows, so other labels)",
        rule.one_of("nnunet", "monai"),
    )


@dataclass(frozen=True, slots=True)
class AugmentationConfig:
    """``inference.test_time_augmentation``: mirroring and activation."""

    enabled: bool = key(True, "average over mirrored passes")
    flip_axes: list[int] | None = key(
        None,
        '0 = z, 1 = y, 2 = x; null: the checkpoint\'s; a subset of these is marked "not nnU-Net"',
        KeyRule(lambda axes: set(axes) <= {0, 1, 2}, "must name axes by 0 = z, 1 = y, 2 = x"),
        rule.DISTINCT,
    )
    ensemble_mode: str = key(
        "mean",
        "mean of the logits, as nnU-Net; nothing else",
        KeyRule(lambda mode: mode == "mean", "must be mean, for nnU-Net averages the logits of its mirrored passes"),
    )
    act: str | None = key(
        None,
        "what is saved as probabilities: softmax (labels), sigmoid (regions), or none for logits; null: the model's "
        "own, another one is refused",
        rule.one_of("softmax", "sigmoid", "none", otherwise=", or null for the model's own"),
    )
    select_channel: list[int] | None = key(
        None,
        "classes (or regions) whose probabilities are saved or make the foreground; null: all",
        KeyRule(
            lambda channels: len(channels) > 0 and min(channels) >= 0,
            "must name channels from 0 on, or be null for all",
        ),
        rule.DISTINCT,
    )


@dataclass(frozen=True, slots=True)
class BinaryConfig:
    """``inference.postprocessing.binary``: foreground probability above ``threshold``, then cleaned up."""

    enabled: bool = key(False, "labels become foreground probability > threshold; that of regions is the largest one's")
    threshold: float = key(0.5, "between 0 and 1", KeyRule(lambda share: 0 <= share <= 1, "must lie between 0 and 1"))
    remove_small_objects: int = key(
        0, "components of fewer voxels are removed (26-connected, in the whole volume)", rule.at_least(0)
    )
    fill_holes: bool = key(False, "fill what foreground encloses, in the whole volume")


@dataclass(frozen=True, slots=True)
class PostprocessingConfig:
    """``inference.postprocessing``: after the network; ``intensity_*`` say how probabilities are saved."""

    binary: BinaryConfig = field(default_factory=BinaryConfig)
    intensity_scale: float | None = key(
        None,
        "saved probabilities are multiplied by this, such as 255 with uint8",
        rule.positive("must be a positive number, or null"),
    )
    intensity_dtype: str | None = key(
        None,
        "type of saved probabilities: uint8, uint16, float16 or float32 (null)",
        rule.one_of("uint8", "uint16", "float16", "float32"),
    )


@dataclass(frozen=True, slots=True)
class OutputConfig:
    """``inference.output``: which files are left."""

    formats: list[str] = key(
        ["h5"],
        f"any of {', '.join(FORMATS)}; zarr2 is OME-Zarr 0.4, precomputed is Neuroglancer's",
        *rule.some_of(*FORMATS),
    )
    pyramid: bool = key(
        True,
        "chunked formats carry coarser levels; false: the full resolution only. Results that are there stay as they "
        "are",
    )
    table: str = key(
        "parquet",
        "table of objects, where `decoding` makes some: parquet, csv or none",
        rule.one_of("parquet", "csv", "none"),
    )
    save_probabilities: bool = key(False, "also save probabilities, beside the labels")
    overwrite: bool = key(False, "true: replace a result that other settings left under the same name")


@dataclass(frozen=True, slots=True)
class InferenceConfig:
    """``inference``: how volumes become labels."""

    case: str = key(
        "auto",
        "what nnU-Net normalises as one image: slice, volume, or auto (as the model was trained)",
        rule.one_of("auto", "slice", "volume"),
    )
    planes: list[str] = key(
        ["xy"],
        "planes along which a 2D model runs, of xy, xz and yz; of several the mean, see [planes](#planes)",
        *rule.some_of(*PLANES),
    )
    allow_anisotropic_planes: bool = key(
        False, "true: run along xz or yz although voxels are over 1.5 times longer along one axis"
    )
    precision: str | None = key(
        None,
        "exact (float32) or fast (bfloat16 on the CPU); null: exact on the CPU, fast on CUDA, as nnU-Net is; see "
        "[faster](#faster)",
        rule.one_of(*PRECISIONS.names()),
    )
    max_disagreement: float = key(
        0.0001,
        "fast is measured on a sample of each volume and refused where a larger share of its labels differs from exact",
        KeyRule(lambda share: 0 <= share <= 1, "must be a share from 0 to 1"),
    )
    voxel_size_nm: list[float] | None = key(
        None, "[z, y, x] in nanometres; null: from the metadata", rule.edges("nanometres")
    )
    axes: str | None = key(
        None,
        "order of the file's axes, such as xyz or czyx; null: from the metadata",
        KeyRule(
            lambda axes: {*"yx"} <= {*axes} <= {*"tczyx"} and all(axes.count(letter) < 2 for letter in "czyx"),
            "must name the axes in the file's order by c, z, y, x, each at most once and y, x always; t for any of "
            "length 1 that is dropped",
        ),
    )
    block_shape: list[int] | None = key(
        None, "[z, y, x] of a unit of work and recovery; null: planned; never changes the labels", rule.extents(3)
    )
    roi: list[list[int]] | None = key(
        None,
        "[[z, y, x], [z, y, x]]: the first voxel that is wanted and the one after the last, outside is background; "
        "null: all, see [a part of a volume](#a-part-of-a-volume)",
        KeyRule(
            lambda roi: list(map(len, roi)) == [3, 3] and all(0 <= a < b for a, b in zip(*roi, strict=True)),
            "must be [[z, y, x], [z, y, x]]: the first voxel and the one after the last, which lies beyond it on each "
            "axis",
        ),
    )
    mask: str | None = key(
        None,
        "a volume that is not zero where labels are wanted, of this resolution or a lower one; null: everywhere",
        rule.not_empty("must name a volume, or be null"),
    )
    resample: str = key(
        "off",
        "plan: bring volumes to the plan's spacing and the result back, as nnU-Net does; off for models of 2D images",
        rule.one_of("off", "plan"),
    )
    spacing: list[float] | None = key(
        None,
        "[z, y, x] of the volumes in the unit of the plan's spacing, which `connectomics inspect` prints; needed by "
        "resample=plan",
        rule.edges("the unit of the plans"),
    )
    allow_large_resampling: bool = key(False, "true: confirm a spacing more than 4 times off the plan's")
    data: InferenceDataConfig = field(default_factory=InferenceDataConfig)
    volume_mode: VolumeModeConfig = field(default_factory=VolumeModeConfig)
    sliding_window: SlidingWindowConfig = field(default_factory=SlidingWindowConfig)
    test_time_augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    postprocessing: PostprocessingConfig = field(default_factory=PostprocessingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
