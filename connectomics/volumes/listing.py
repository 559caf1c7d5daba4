"""Which volumes a list of paths or a pattern means, and what their results are called."""

from __future__ import annotations

import glob
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from natsort import natsorted

from connectomics.core.errors import ConfigError
from connectomics.core.files import tells_apart
from connectomics.core.places import refusal
from connectomics.volumes.input_formats import long_suffixes, suffixes
from connectomics.volumes.source import path_and_inner, without_prefix

CHANNEL = re.compile(r"^(?P<stem>.+)_(?P<channel>\d{4})$")


@dataclass(frozen=True, slots=True)
class VolumeSource:
    """One volume to be.

    Parameters
    ----------
    name
        In messages.
    stem
        Of its results.
    uris
        One for each file of its channels.
    problem
        Why it cannot be opened, if the list shows that already; empty otherwise.
    """

    name: str
    stem: str
    uris: tuple[str, ...]
    problem: str = ""


def expand(pattern: str, stated: str = "") -> list[str]:
    """Paths that match a glob pattern, in natural order; ``::dataset`` behind it and ``phantom:`` URIs are kept.

    ``stated`` is how the pattern was stated, for messages; empty: as ``inference.volume_mode.file_pattern``.

    Raises
    ------
    ConfigError
        If nothing matches.
    """
    if pattern.startswith("phantom:"):
        return [pattern]
    stated = stated or f"inference.volume_mode.file_pattern='{pattern}'"
    prefix, local = without_prefix(pattern)
    if why := refusal(local):
        raise ConfigError(f"{stated}: {why}")
    path, inner = path_and_inner(local)
    mark = "::" if inner else ""
    try:
        if Path(path).exists():
            return [pattern]
        found = [p for p in glob.glob(path, recursive=True) if Path(p).suffix != ".run"]
    except PermissionError:  # opening it will say so
        return [pattern]
    except OSError as error:
        raise ConfigError(f"{stated}: {error.strerror}; name an existing file or folder") from error
    if not found:
        raise ConfigError(
            f"{stated} matches no file or folder under {Path.cwd()}; "
            "check the path and quote the pattern so that the shell does not expand it"
        )
    return [prefix + p + mark + inner for p in natsorted(found)]


def stem_of(uri: str) -> str:
    """Name of a volume's results: the file's name without its suffix.

    Examples
    --------
    >>> stem_of("data/cell1.ome.tif"), stem_of("raw.h5::volumes/raw"), stem_of("phantom:4x64x64?seed=1")
    ('cell1', 'raw', 'phantom_4x64x64_seed_1')
    """
    if uri.startswith("phantom:"):
        return re.sub(r"[^A-Za-z0-9]+", "_", uri).strip("_")
    path = _local(uri)
    for suffix in long_suffixes():
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name if path.suffix not in suffixes(folders=True) and _is_folder(path) else path.stem


def _local(uri: str) -> Path:
    """The path in a URI."""
    return Path(path_and_inner(without_prefix(uri)[1])[0])


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # opening it will say why
        return False


def _place(uri: str) -> tuple[str, str]:
    """Folder and stem of a volume."""
    return str(_local(uri).parent), stem_of(uri)


def _channel(uri: str, stem: str) -> re.Match[str] | None:
    return None if uri.startswith("phantom:") else CHANNEL.match(stem)


def group(uris: Sequence[str], channels: int) -> list[VolumeSource]:
    """Volumes of a list of URIs; files ``NAME_0000.*``, ``NAME_0001.*`` … are the channels of one volume.

    Parameters
    ----------
    uris
        Files, folders, stores.
    channels
        Input channels of the model. Names are taken for channels where a group counts exactly 0 to ``channels`` - 1;
        with one channel, other numbered files are volumes of their own. A lone file 0000 may hold all channels, as
        colours. A group that lacks a channel says so in ``problem``.

    Raises
    ------
    ConfigError
        If two files are the same channel.
    """
    places = [_place(uri) for uri in uris]
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for uri, (folder, stem) in zip(uris, places, strict=True):
        match = _channel(uri, stem)
        if match:
            members = groups.setdefault((folder, match["stem"]), {})
            other = members.setdefault(int(match["channel"]), uri)
            if other != uri:
                raise ConfigError(
                    f"{other} and {uri} are both channel {match['channel']} of '{match['stem']}'; leave one out"
                )
    sources, seen = [], set()
    for uri, (folder, stem) in zip(uris, places, strict=True):
        match = _channel(uri, stem)
        key = (folder, match["stem"]) if match else ("", "")
        members = groups.get(key, {})
        if not match or (channels == 1 and set(members) != {0}):
            sources.append(VolumeSource(uri, stem, (uri,), _unwritable(uri)))
            continue
        if key in seen:
            continue
        seen.add(key)
        ordered = tuple(members[c] for c in sorted(members))
        problem = _unwritable(ordered[0]) or _problem(key, members, channels)
        sources.append(VolumeSource(ordered[0], match["stem"], ordered, problem))
    return sources


def _unwritable(uri: str) -> str:
    """Why results cannot carry the name of a volume: bytes that are no UTF-8, which stores and records cannot write."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        shown = uri.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return f"{shown}: its name has bytes that are no UTF-8, so no result can carry it; rename it"
    return ""


def other_channels(uri: str, channels: int) -> tuple[str, ...]:
    """The files ``NAME_0000``, ``NAME_0001``, … of a volume of ``channels`` channels, of which ``uri`` is the first.

    Empty where it is not, or one of them is missing.
    """
    stem = stem_of(uri)
    match = _channel(uri, stem)
    if match is None or int(match["channel"]) != 0:
        return ()
    start = uri.rfind(stem) + len(stem) - 4
    uris = tuple(f"{uri[:start]}{number:04d}{uri[start + 4 :]}" for number in range(channels))
    return uris if all(_local(each).exists() for each in uris) else ()


def _problem(key: tuple[str, str], members: Mapping[int, str], channels: int) -> str:
    if set(members) in ({0}, set(range(channels))):
        return ""
    found = ", ".join(f"{c:04d}" for c in sorted(members))
    return (
        f"{Path(*key)}_*: the model has {channels} input channels (0000 to {channels - 1:04d}), found files for "
        f"{found}; add or rename the files"
    )


def refuse_collisions(sources: Sequence[VolumeSource], folder: Path | None = None) -> None:
    """Refuse two volumes whose results would have the same name, by a ConfigError that names both.

    With the ``folder`` of the results, also names that its file system takes for one, such as ``A`` and ``a`` on many
    disks of Windows and macOS.
    """
    if folder is not None:
        _refuse_folded(sources, folder)
    names: dict[str, str] = {}
    for source in sources:
        first = names.get(source.stem)
        names[source.stem] = source.name
        if first == source.name:
            raise ConfigError(f"{source.name} is listed twice; list each volume once")
        if first is not None:
            raise ConfigError(
                f"{first} and {source.name} would both write results named '{source.stem}_…'; rename one, or run them "
                "with different inference.data.output_path or output_suffix"
            )


def _refuse_folded(sources: Sequence[VolumeSource], folder: Path) -> None:
    alike: dict[str, VolumeSource] = {}
    for source in sources:
        name = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", source.stem).casefold())
        first = alike.setdefault(name, source)
        if first.stem != source.stem and not tells_apart(folder, first.stem, source.stem):
            raise ConfigError(
                f"{first.name} and {source.name} would both write results that are one file on the disk of {folder}, "
                f"which does not tell '{first.stem}' from '{source.stem}'; rename one, or run them with different "
                "inference.data.output_path or output_suffix"
            )


def without_results(uris: Sequence[str], suffix: str) -> list[str]:
    """Leave out what an earlier run wrote into the same folder: ``STEM_<suffix>`` beside ``STEM``."""
    stems = {_place(u) for u in uris}
    stems |= {(folder, match["stem"]) for folder, stem in stems if (match := CHANNEL.match(stem))}
    names = (f"_{suffix}", f"_{suffix}_probabilities", f"_{suffix}_instances")
    endings = (*names, *(f"{name}_png" for name in names))

    def is_result(uri: str) -> bool:
        folder, stem = _place(uri)
        return any(stem.endswith(e) and (folder, stem.removesuffix(e)) in stems for e in endings)

    return [u for u in uris if not is_result(u)]
