"""What takes long is kept in a folder, under a key of all that made it, and appears there when it is complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Columns = dict[str, NDArray[Any]]


def key_of(*parts: Any) -> str:
    """What something is kept under: a hash of all that made it, each part of which has a form in JSON."""
    return sha256(json.dumps(parts).encode()).hexdigest()[:16]


def kept(path: Path, compute: Callable[[], Columns]) -> Columns:
    """The arrays in this safetensors file, computed and written if there is none."""
    if not path.exists():
        with published(path) as unfinished:
            save_file(compute(), unfinished)
    return load_file(path)


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Where to write a file or folder that gets its name when it is complete: an interruption leaves nothing behind."""
    with TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder, path.name)
        yield unfinished
        if path.is_dir():
            shutil.rmtree(path)
        unfinished.replace(path)
