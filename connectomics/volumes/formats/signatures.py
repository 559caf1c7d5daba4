"""What a file is by its first bytes, and what is done with formats that are not read; ``opening`` asks."""

from __future__ import annotations

from pathlib import Path

LOOKED_AT = 2048
"""Bytes at the start of a file that tell its format."""
HDF5 = b"\x89HDF\r\n\x1a\n"
STARTS: tuple[tuple[int, bytes, str], ...] = (
    *((at, HDF5, ".h5") for at in (0, 512, 1024)),
    *((0, start, ".tif") for start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    (0, b"\x89PNG\r\n\x1a\n", ".png"),
    (0, b"\xff\xd8\xff", ".jpg"),
    (0, b"\x93NUMPY", ".npy"),
    (0, b"NRRD000", ".nrrd"),
    *((344, magic, ".nii") for magic in (b"n+1\0",)),
    (4, b"n+2\0", ".nii"),
    (208, b"MAP ", ".mrc"),
    (0, b"ObjectType", ".mha"),
    (0, b"NDims", ".mha"),
    (252, b"\xef\xff\xe9\xb0", ".gipl"),
    (252, b"\x2a\xe3\x89\xb8", ".gipl"),
    (0, b"\0\0\0\x03\0", ".dm3"),
    (0, b"\0\0\0\x04\0\0\0\0", ".dm4"),
    (0, b"PK\x03\x04", ".zarr.zip"),
    (0, b"BM", ".bmp"),
)
"""Where which bytes stand, and the suffix that such files have."""

_FIJI = "open it in Fiji and save it as TIFF"
_BIOFORMATS = "convert it: bioformats2raw {name} {stem}.zarr"
CONVERTERS: dict[str, tuple[str, str]] = {
    ".czi": ("Zeiss' CZI", _BIOFORMATS),
    ".nd2": ("Nikon's ND2 (.nd2)", _BIOFORMATS),
    ".lif": ("Leica's LIF", _BIOFORMATS),
    ".lof": ("Leica's LOF", _BIOFORMATS),
    ".oib": ("Olympus' OIB", _BIOFORMATS),
    ".oif": ("Olympus' OIF", _BIOFORMATS),
    ".oir": ("Olympus' OIR", _BIOFORMATS),
    ".vsi": ("Olympus' VSI", _BIOFORMATS),
    ".mrxs": ("3DHISTECH's MRXS", _BIOFORMATS),
    ".ndpi": ("Hamamatsu's NDPI", _BIOFORMATS),
    ".svs": ("Aperio's SVS", _BIOFORMATS),
    ".lsm": ("Zeiss' LSM", _BIOFORMATS),
    ".dcm": ("DICOM", _BIOFORMATS),
    ".ser": ("FEI's SER", "convert it with HyperSpy: hyperspy.api.load('{name}').save('{stem}.tif')"),
    ".emd": ("EMD", "convert it with HyperSpy: hyperspy.api.load('{name}').save('{stem}.tif')"),
    ".emi": ("FEI's EMI", "convert it with HyperSpy: hyperspy.api.load('{name}').save('{stem}.tif')"),
    ".jp2": ("JPEG 2000", "convert it: opj_decompress -i {name} -o {stem}.tif"),
    ".j2k": ("JPEG 2000", "convert it: opj_decompress -i {name} -o {stem}.tif"),
    ".jpx": ("JPEG 2000", "convert it: opj_decompress -i {name} -o {stem}.tif"),
    ".webp": ("WebP", "convert it: dwebp {name} -o {stem}.png"),
    ".gif": ("GIF", _FIJI),
    ".pgm": ("PGM", _FIJI),
    ".avi": ("AVI", _FIJI),
    ".mp4": ("MP4", "convert it: ffmpeg -i {name} {stem}_%04d.png"),
    ".am": ("Amira's mesh format", "open it in Fiji or Amira and save it as TIFF"),
    ".vol": ("a volume without a header", "import it in Fiji (File, Import, Raw…) and save it as TIFF"),
    ".raw": ("voxels without a header", "import it in Fiji (File, Import, Raw…) and save it as TIFF"),
    ".dat": ("voxels of a format of its own", "convert it to TIFF or Zarr with the program that wrote it"),
    ".img": (
        "Analyze or another pair of files",
        "join it and its .hdr: nibabel.save(nibabel.load('{name}'), '{stem}.nii')",
    ),
    ".hdr": (
        "Analyze or another pair of files",
        "join it and its .img: nibabel.save(nibabel.load('{name}'), '{stem}.nii')",
    ),
    ".mat": ("MATLAB's format", "save the array in MATLAB as HDF5 with h5create and h5write"),
    ".npz": ("an archive of arrays", "save the array alone with numpy.save"),
    ".knossos.zip": ("KNOSSOS", "convert its folder: webknossos convert-knossos SOURCE {stem}_wkw"),
    ".7z": ("an archive", "unpack it and name the volume that is in it"),
    ".tar": ("an archive", "unpack it and name the volume that is in it"),
    ".gz": ("a packed file", "unpack it: gunzip {name}"),
}
"""By suffix: what a format that is not read is called, and the command or the step that makes it one that is."""
KNOSSOS_MARKERS = ("knossos.conf", "mag1/knossos.conf", "Knossos.conf")
MAGICS = (
    (0, b"ZISRAWFILE", ".czi"),
    (0, b"\0\0\0\x0cjP  ", ".jp2"),
    (0, b"\xda\xce\xbe\x0a", ".nd2"),
    (0, b"\xff\x4f\xff\x51", ".j2k"),
)
"""Of formats that are not read."""


def suffix_by_content(path: Path) -> str:
    """The suffix of the format that a file's first bytes tell; empty where they tell none.

    Raises OSError if it cannot be read.
    """
    with path.open("rb") as stream:
        block = stream.read(LOOKED_AT)
    for at, magic, suffix in (*MAGICS, *STARTS):
        if block.startswith(magic, at):
            return suffix
    return ""


def converter(name: str, suffix: str) -> str:
    """What a format that is not read is, and what to do; empty where nothing is known of it.

    Examples
    --------
    >>> converter("em.jp2", ".jp2")
    'JPEG 2000 is not read; convert it: opj_decompress -i em.jp2 -o em.tif'
    """
    if suffix not in CONVERTERS:
        return ""
    what, remedy = CONVERTERS[suffix]
    stem = name[: -len(suffix)] if name.lower().endswith(suffix) else name
    return f"{what} is not read; {remedy.format(name=name, stem=stem)}"
