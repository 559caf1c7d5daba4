"""nnU-Net's own predictor, given a model that was read here. Called by ``verify``."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from connectomics.core.errors import ModelError
from connectomics.models.backends.contract import torch_threads
from connectomics.models.checkpoint import LoadedModel
from connectomics.models.nnunet_releases import current_class, float32_sums
from connectomics.volumes.volume import Array


class Reference:
    """nnU-Net's own predictor on the CPU, as it ships or with float32 sums, given the same model.

    The weights come from our restricted reading of the checkpoint; the network, the preprocessing, the windows and the
    export are nnunetv2's.

    Parameters
    ----------
    model
        The loaded model.
    mirror
        Whether nnU-Net mirrors.
    threads
        CPU threads of its operations; with as many as ours its network gives the same bits.

    Raises
    ------
    ModelError
        If nnunetv2 cannot build the network the plans describe.
    """

    def __init__(self, model: LoadedModel, *, mirror: bool, threads: int) -> None:
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        self._threads = threads
        plans = PlansManager(dict(model.plans))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about plans of an old format, which nnU-Net converts
            configuration = plans.get_configuration(model.spec.configuration)
        labels = plans.get_label_manager(dict(model.dataset))
        network = get_network_from_plans(
            current_class(configuration.network_arch_class_name),
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            model.spec.input_channels,
            labels.num_segmentation_heads,
            allow_init=False,
            deep_supervision=False,
        )
        states = [n.get_submodule("network").state_dict() for n in model.networks]
        try:
            network.load_state_dict(states[0])
        except RuntimeError as error:
            raise ModelError(
                f"nnunetv2 builds another network from the plans of {model.spec.plans_name} than trainer "
                f"{model.spec.trainer_name} did, so it cannot check this model; compare with nnUNetv2_predict yourself"
            ) from error
        with contextlib.redirect_stdout(io.StringIO()):
            self._predictor = nnUNetPredictor(use_mirroring=mirror, device=torch.device("cpu"), allow_tqdm=False)
        axes = tuple(a - 3 + model.spec.dimensions for a in model.spec.mirror_axes) or None
        self._predictor.manual_initialization(
            network, plans, configuration, states, dict(model.dataset), model.spec.trainer_name, axes
        )

    def predict(
        self, image: Array, spacing: Sequence[float], previous: Array | None = None, *, float32: bool = False
    ) -> Array:
        """nnU-Net's labels (z, y, x) of one case (c, z, y, x) of raw intensities.

        ``previous`` are the labels (z, y, x) of the previous stage of a cascade. ``float32`` lets nnU-Net add its
        windows up in float32, where it ships with half precision.
        """
        sums = float32_sums() if float32 else contextlib.nullcontext()
        stage = None if previous is None else previous[None].astype(np.float32)  # the type its readers give
        with sums, torch_threads(self._threads), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            labels: Array = self._predictor.predict_single_npy_array(
                image, {"spacing": list(spacing)}, stage, None, False
            )
        return labels
