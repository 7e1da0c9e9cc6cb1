"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile


def write(path: str | os.PathLike, data: bytes) -> None:
    """Write a file by a neighbour and a rename: what was there stays until the new one is complete."""
    folder = os.path.dirname(os.path.abspath(os.fspath(path)))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".nnsight_fx-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
