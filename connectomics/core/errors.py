"""The one error tree of the package; every message says what, where, found against expected, and what to do.

ConnectomicsError
├── ConfigError        the command line or configuration is wrong (exit code 2)
├── ModelError         a checkpoint, plans.json or dataset.json cannot be used
│   └── UnsafeModelError   ... because it brings code that was not asked for
├── VolumeError        an input volume cannot be read or does not fit the model
│   └── MissingShardError  ... or the working store lacks what was written to it
├── BoxError           a box of voxels is none (also a ValueError)
├── OutputError        a result cannot be written, or its name is taken
│   └── StorageError       ... because the disk is full, read-only, forbidden or gone: no block can be written
├── QuarantineError    blocks failed again and again and were set aside, all others are done
├── LedgerError        the record of a run is damaged or belongs to something else
├── AgreementError     precision=fast changes more labels of this volume than are allowed
├── DeviceError        the requested device or backend is not available here
└── ResourceError      the memory budget or the disk is too small
    └── DeviceMemoryError  ... or the memory of the GPU: no block can be computed
"""

from __future__ import annotations


class ConnectomicsError(Exception):
    """Base of all errors this package raises on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 3


NO_MODEL = (
    "no model is named; write connectomics infer-volume MODEL VOLUME… -o OUT, give --checkpoint MODEL, or set "
    "model.nnunet_checkpoint"
)


class ConfigError(ConnectomicsError):
    """The command line or the configuration is wrong."""

    exit_code = 2


class ModelError(ConnectomicsError):
    """A checkpoint, plans.json or dataset.json cannot be used."""


class UnsafeModelError(ModelError):
    """A checkpoint or plans file brings code that the user did not allow to run."""


class VolumeError(ConnectomicsError):
    """An input volume cannot be read or does not fit the model."""


class MissingShardError(VolumeError):
    """A working store lacks what the ledger says was written: others removed it, or the disk lost it."""


class BoxError(ConnectomicsError, ValueError):
    """What was given for a box of voxels is none."""


class OutputError(ConnectomicsError):
    """A result cannot be written, or its name is already taken by something else."""


class StorageError(OutputError):
    """The disk of the results is full, read-only, forbidden or gone, so that nothing more can be written."""


class QuarantineError(ConnectomicsError):
    """Blocks failed again and again and were set aside; all others are done."""


class LedgerError(ConnectomicsError):
    """The record of a run is damaged or belongs to other settings."""


class AgreementError(ConnectomicsError):
    """On this volume ``precision=fast`` changes more labels than are allowed."""


class DeviceError(ConnectomicsError):
    """The requested device or backend is not available on this machine."""


class ResourceError(ConnectomicsError):
    """The memory budget or the disk is too small for what was asked."""


class DeviceMemoryError(ResourceError):
    """The memory of the device that computes is too small, or others have taken it."""
