"""What inference needs to know of a checkpoint: ModelSpec, plain values without torch.

``checkpoint`` makes it; inference, pipeline, ``inspect`` and ``doctor`` read it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from connectomics.core.geometry import Vec3

PlanSpacing = tuple[float | None, float, float]
DEFAULT_RESAMPLING = "resample_data_or_seg_to_shape"  # nnU-Net's names of its resampling functions
TORCH_RESAMPLING = "resample_torch_fornnunet"
NO_RESAMPLING = "no_resampling_hack"
SINGLE_IMAGES = "NaturalImage2DIO"  # nnU-Net's reader of images that are one section each


@dataclass(frozen=True, slots=True)
class ChannelNormalisation:
    """nnU-Net's normalisation of one input channel.

    Parameters
    ----------
    scheme
        nnU-Net's class name: ZScoreNormalization, CTNormalization, NoNormalization, RescaleTo01Normalization
        or RGBTo01Normalization.
    mean, std, lower, upper
        Foreground intensities of the training data (``lower`` and ``upper`` are the 0.5 and 99.5
        percentiles), in the unit of the images; None where the plans do not state them. Only CTNormalization
        uses them.
    masked
        Whether only voxels within the case's mask (nonzero in some channel, holes filled) are normalised, with
        statistics of these; the others stay 0. True for ZScoreNormalization alone.
    """

    scheme: str
    mean: float | None = None
    std: float | None = None
    lower: float | None = None
    upper: float | None = None
    masked: bool = False


@dataclass(frozen=True, slots=True)
class ResamplingRule:
    """One of the plan's resampling functions with its arguments.

    Parameters
    ----------
    function
        nnU-Net's name of the function.
    order, order_z
        Spline order within sections (or in 3D), and across them where sections are resampled each by itself; 0 is the
        nearest voxel, 1 linear.
    force_separate_z
        True or False where the plans decide whether sections are separate, None where the spacings do.
    anisotropy_threshold
        How many times longer than the shortest the longest edge of a voxel is for sections to be separate.
    problem
        Which of its arguments this program does not know; empty: none.
    """

    function: str
    order: int
    order_z: int
    force_separate_z: bool | None
    anisotropy_threshold: float = 3.0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything about a model but its weights; spatial axes are (z, y, x), a 2D model has patch depth 1.

    Where ``axis_order`` transposes, patch, mirror axes and spacing are those of the transposed axes.

    Parameters
    ----------
    configuration
        nnU-Net configuration, for example ``2d`` or ``3d_fullres``.
    dimensions
        2 or 3: the dimensions the network was built with.
    patch_shape
        Network input (z, y, x) in voxels.
    label_names
        (name, value) as dataset.json states them, ``ignore`` included; of a region the label painted for it.
    class_values
        The label written for each output channel: for plain labels, where nnU-Net writes the index of the channel
        that wins, 0, 1, …; for regions ``regions_class_order``, painted in this order.
    mirror_axes
        Axes (0 = z, 1 = y, 2 = x) for test time mirroring in the checkpoint's order; empty: no mirroring.
    spacing
        Voxel spacing (z, y, x) the model was trained at, in the unit of its plans; z is None for 2D models.
    resampling_data, resampling_probabilities
        How nnU-Net brings images to that spacing and logits back.
    slice_case
        Whether each z slice is preprocessed alone, because the model was trained on single sections.
    folds
        Names of the ensemble's members in the order of their mean.
    files
        (relative name, sha256) of each file that was used.
    weights_sha256
        sha256 of the checkpoint file; for several folds that of the sorted lines ``name sha256``. This is
        what a user states in ``model.sha256``.
    sha256
        Identity of the model in result keys: ``weights_sha256``, plans, dataset description and architecture.
    parameters
        Number of trainable values of one network, shared ones counted once.
    regions
        (name, label values) of the region that each output channel stands for; empty for plain labels.
    axis_order
        nnU-Net's ``transpose_forward``: which axis of the volume (0 = z, 1 = y, 2 = x) each axis of the model is.
    previous_stage
        For the second stage of a cascade the configuration of the first, else None. Its network sees a channel for each
        of ``foreground_labels`` after those of the image: where the first stage found that label.
    resampling_labels
        For a second stage, how nnU-Net brings those labels to the network's spacing.
    """

    configuration: str
    dimensions: int
    trainer_name: str
    plans_name: str
    dataset_name: str
    patch_shape: Vec3
    channel_names: tuple[str, ...]
    label_names: tuple[tuple[str, int], ...]
    class_values: tuple[int, ...]
    normalisations: tuple[ChannelNormalisation, ...]
    mirror_axes: tuple[int, ...]
    spacing: PlanSpacing
    resampling_data: ResamplingRule
    resampling_probabilities: ResamplingRule
    image_reader: str
    slice_case: bool
    folds: tuple[str, ...]
    checkpoint_name: str
    files: tuple[tuple[str, str], ...]
    weights_sha256: str
    sha256: str
    parameters: int
    regions: tuple[tuple[str, tuple[int, ...]], ...] = ()
    axis_order: Vec3 = (0, 1, 2)
    previous_stage: str | None = None
    resampling_labels: ResamplingRule | None = None

    @property
    def channels(self) -> int:
        """Number of the image's channels."""
        return len(self.channel_names)

    @property
    def input_channels(self) -> int:
        """Number of the network's input channels."""
        return self.channels + (0 if self.previous_stage is None else len(self.foreground_labels))

    @property
    def foreground_labels(self) -> tuple[int, ...]:
        """Distinct values of the labels, of regions those they are made of, without background and ignore."""
        stated = [value for _, values in self.regions for value in values]
        values = stated or [value for name, value in self.label_names if name != "ignore"]
        return tuple(sorted(set(values) - {0}))

    @property
    def classes(self) -> int:
        """Number of output channels."""
        return len(self.class_values)

    @property
    def label_dtype(self) -> np.dtype[Any]:
        """uint8, or uint16 from 255 foreground labels on, as nnU-Net writes."""
        foreground = {v for _, values in self.regions for v in values if v != 0} or range(1, self.classes)
        return np.dtype(np.uint8 if len(foreground) < 255 else np.uint16)

    @property
    def ignored_label(self) -> int | None:
        """The value that marks unlabelled voxels in a truth, or None; it is never predicted."""
        return dict(self.label_names).get("ignore")

    @property
    def class_labels(self) -> dict[str, tuple[int, ...]]:
        """Name and label values of each class, the background first: what scores are measured for."""
        if self.regions:
            return {"background": (0,)} | dict(self.regions)
        by_value: dict[int, str] = {}
        for name, value in self.label_names:
            if name != "ignore":
                by_value.setdefault(value, name)
        return {by_value[value]: (index,) for index, value in enumerate(sorted(by_value))}

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self)
