"""Which formats are read: how the files of each are known, and where the function is that opens them.

``opening`` and ``listing`` ask; nothing of a format is imported before a volume of it is opened.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

from connectomics.core.registry import Registry
from connectomics.volumes.source import Source
from connectomics.volumes.volume import VolumeReader


@dataclass(frozen=True, slots=True)
class InputFormat:
    """A format of volumes, for the group ``connectomics.readers`` of entry points.

    Parameters
    ----------
    suffixes
        Of its files or folders, in small letters, each with its dot.
    opener
        ``module:function``; the function takes a ``Source`` and returns a ``VolumeReader``, or raises VolumeError.
    markers
        Where a volume is a folder: files that tell it whatever its suffix, when one of them is inside. None where a
        volume is a file.

    Examples
    --------
    >>> InputFormat((".zarr",), "connectomics.volumes.formats.zarr:open_zarr", ("zarr.json",)).is_folder
    True
    """

    suffixes: tuple[str, ...]
    opener: str
    markers: tuple[str, ...] | None = None

    @property
    def is_folder(self) -> bool:
        """Whether a volume is a folder."""
        return self.markers is not None

    def open(self, source: Source) -> VolumeReader:
        """Open a volume of this format; see ``open_volume``."""
        module, _, name = self.opener.partition(":")
        reader: VolumeReader = vars(importlib.import_module(module))[name](source)
        return reader


_HERE = "connectomics.volumes.formats"
MRC_SUFFIXES = (".mrc", ".mrcs", ".rec", ".map", ".st", ".ali", ".preali", ".ccp4", ".bl", ".flip", ".join")
"""Of MRC, of RELION's stacks, and what IMOD's programs call their files."""
READERS: Registry[InputFormat] = Registry(
    "reader",
    "connectomics.readers",
    {
        "hdf5": InputFormat((".h5", ".hdf5", ".hdf", ".he5"), f"{_HERE}.hdf5:open_hdf5"),
        "tiff": InputFormat(
            (".tif", ".tiff", ".btf", ".tf8", ".ome.tif", ".ome.tiff"), f"{_HERE}.tiff:open_tiff_as_stated"
        ),
        "image": InputFormat((".png", ".jpg", ".jpeg", ".bmp"), f"{_HERE}.images:open_image"),
        "nifti": InputFormat((".nii", ".nii.gz"), f"{_HERE}.nifti:open_nifti"),
        "mrc": InputFormat(MRC_SUFFIXES, f"{_HERE}.mrc:open_mrc"),
        "nrrd": InputFormat((".nrrd", ".nhdr"), f"{_HERE}.medical.nrrd:open_nrrd"),
        "metaimage": InputFormat((".mha", ".mhd"), f"{_HERE}.medical.itk:open_metaimage"),
        "gipl": InputFormat((".gipl", ".gipl.gz"), f"{_HERE}.medical.itk:open_gipl"),
        "dm": InputFormat((".dm3", ".dm4"), f"{_HERE}.programs.digital_micrograph:open_dm"),
        "imaris": InputFormat((".ims",), f"{_HERE}.programs.imaris:open_imaris"),
        "zarr.zip": InputFormat((".zarr.zip", ".ome.zarr.zip", ".zip", ".ozx"), f"{_HERE}.zarr_zip:open_zarr_zip"),
        "npy": InputFormat((".npy",), f"{_HERE}.npy:open_npy"),
        "zarr": InputFormat((".zarr", ".ome.zarr"), f"{_HERE}.zarr:open_zarr", ("zarr.json", ".zarray", ".zgroup")),
        "n5": InputFormat((".n5",), f"{_HERE}.n5:open_n5", ("attributes.json",)),
        "wkw": InputFormat((".wkw",), f"{_HERE}.programs.webknossos:open_wkw", ("header.wkw",)),
        "precomputed": InputFormat((".precomputed",), f"{_HERE}.precomputed:open_precomputed", ("info",)),
    },
)
STACK = InputFormat((), f"{_HERE}.images:open_stack", ())
"""What any other folder is taken for: sections, each an image."""


def input_formats() -> Iterator[InputFormat]:
    """Every format, those of this package first; of two that fit a volume the first opens it."""
    return map(READERS.load, READERS.names())


def name_of(form: InputFormat) -> str:
    """What a format is called."""
    return next((name for name in READERS.names() if READERS.load(name) is form), "images")


def suffixes(*, folders: bool) -> tuple[str, ...]:
    """The suffixes of all formats whose volumes are folders, or of those whose volumes are files."""
    return tuple(suffix for form in input_formats() if form.is_folder == folders for suffix in form.suffixes)


def long_suffixes() -> tuple[str, ...]:
    """Suffixes of several parts, the longest first."""
    every = suffixes(folders=False) + suffixes(folders=True)
    return tuple(sorted((s for s in every if s.count(".") > 1), key=len, reverse=True))
