"""Our own architecture runs through the suite that is shipped for others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from connectomics.models.arch.nnunet_models import NetworkPlan
from connectomics.testing.architecture import ArchitectureContract


def plan(dimensions: int, network: str, **arguments: Any) -> NetworkPlan:
    """A U-Net of two stages."""
    known = {
        "n_stages": 2,
        "features_per_stage": [4, 8],
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": [[3] * dimensions] * 2,
        "strides": [[1] * dimensions, [2] * dimensions],
        "n_conv_per_stage_decoder": [1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return NetworkPlan(
        trainer_name="nnUNetTrainer",
        dimensions=dimensions,
        channels=2,
        classes=3,
        network_class=f"dynamic_network_architectures.architectures.unet.{network}",
        arguments=known | arguments,
        imports=("conv_op", "norm_op", "dropout_op", "nonlin"),
        patch_shape=(1 if dimensions == 2 else 8, 8, 16),
        plans={},
        configuration={},
        where="plans.json",
        checkpoint="checkpoint_final.pth",
        trust_code=False,
    )


PLAIN = plan(2, "PlainConvUNet", n_conv_per_stage=[1, 2])


class TestNnunet(ArchitectureContract):
    name = "nnunet"
    plans: ClassVar = (
        PLAIN,
        plan(3, "PlainConvUNet", n_conv_per_stage=[1, 2]),
        plan(2, "ResidualEncoderUNet", n_blocks_per_stage=[1, 2]),
        plan(3, "ResidualEncoderUNet", n_blocks_per_stage=[1, 2]),
    )
    impossible: ClassVar = (
        replace(PLAIN, network_class="os.system"),
        replace(PLAIN, patch_shape=(1, 8, 15)),
        replace(PLAIN, arguments={**PLAIN.arguments, "n_stages": 10**6}),
        replace(PLAIN, arguments={**PLAIN.arguments, "no_such": 1}),
    )
