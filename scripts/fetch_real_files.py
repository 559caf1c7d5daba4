"""Fetch the files of ``tests/real_files.tsv`` with git: ``python scripts/fetch_real_files.py FOLDER``.

Of each repository just the listed commit and paths are fetched, into FOLDER/OWNER/REPOSITORY, about 60 MB together.
The files stay under the licence of their repository, which the list names.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from real_file_list import LIST, Origin, digest, paths, rows

URL = "https://github.com/{repository}.git"


def fetch(folder: Path, url: str, repository: str, origins: Iterable[Origin]) -> None:
    """Check the paths of one repository out; its origins share a commit.

    Raises
    ------
    subprocess.CalledProcessError
        If git cannot.
    """
    target, listed = folder / repository, list(origins)
    wanted = sorted({path for origin in listed for path in paths(origin)})
    target.mkdir(parents=True, exist_ok=True)
    for words in (
        ["init", "--quiet"],
        ["config", "remote.origin.url", url.format(repository=repository)],
        ["config", "remote.origin.promisor", "true"],
        ["config", "remote.origin.partialclonefilter", "blob:none"],
        ["fetch", "--quiet", "--depth=1", "--filter=blob:none", "origin", listed[0].commit],
        ["checkout", "--quiet", listed[0].commit, "--", *wanted],
    ):
        subprocess.run(["git", "-C", str(target), *words], check=True)


def main(words: Sequence[str] | None = None) -> int:
    """Fetch every repository; 1 if one failed or a file is not as listed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--list", type=Path, default=LIST, help="instead of tests/real_files.tsv")
    parser.add_argument("--url", default=URL, help=f"where repositories are, {URL} by default")
    arguments = parser.parse_args(words)
    failed = 0
    origins = [row.origin for row in rows(arguments.list)]
    for repository in sorted({origin.repository for origin in origins}):
        of_this = [origin for origin in origins if origin.repository == repository]
        try:
            fetch(arguments.folder, arguments.url, repository, of_this)
        except subprocess.CalledProcessError as error:
            print(f"{repository}: git failed with exit code {error.returncode}")
            failed += 1
            continue
        wrong = [origin.path for origin in of_this if digest(arguments.folder, origin)[0] != origin.sha256]
        failed += bool(wrong)
        print(
            f"{repository}: {len({o.path for o in of_this})} files" + "".join(f"\n  differs: {path}" for path in wrong)
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
