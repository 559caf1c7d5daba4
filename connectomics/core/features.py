"""The built-in features of each kind, and the entry points by which other packages add theirs."""

from __future__ import annotations

from typing import Any

from connectomics.core.registry import Registry

_FORMATS = "connectomics.stages.output.formats"
OUTPUT_FORMATS: Registry[Any] = Registry(
    "output format",
    "connectomics.output_formats",
    {
        "h5": f"{_FORMATS}.hdf5:HDF5",
        "zarr": f"{_FORMATS}.zarr:ZARR",
        "tiff": f"{_FORMATS}.tiff:TIFF",
        "png": f"{_FORMATS}.png:PNG",
        "zarr2": f"{_FORMATS}.zarr2:ZARR2",
        "n5": f"{_FORMATS}.n5:N5",
        "precomputed": f"{_FORMATS}.precomputed:PRECOMPUTED",
    },
)
DECODING_STEPS: Registry[Any] = Registry(
    "step of decoding",
    "connectomics.decoding_steps",
    {
        "connected_components": "connectomics.stages.decode.connected_components:ConnectedComponents",
        "filters": "connectomics.stages.decode.object_filters:Filters",
        "slice_linking": "connectomics.stages.decode.slice_linking:SliceLinking",
        "watershed": "connectomics.stages.decode.watershed.seeded_watershed:Watershed",
    },
)
BACKENDS: Registry[Any] = Registry(
    "backend",
    "connectomics.backends",
    {
        "torch": "connectomics.models.backends.torch_eager:TorchBackend",
        "compile": "connectomics.models.backends.torch_compile:CompiledBackend",
        "openvino": "connectomics.models.backends.openvino:OpenVinoBackend",
    },
)
PRECISIONS: Registry[Any] = Registry(
    "precision",
    "connectomics.precisions",
    {"exact": "connectomics.models.backends.precisions:EXACT", "fast": "connectomics.models.backends.precisions:FAST"},
)
ARCHITECTURES: Registry[Any] = Registry(
    "architecture", "connectomics.architectures", {"nnunet": "connectomics.models.arch.nnunet_models:build_nnunet"}
)
