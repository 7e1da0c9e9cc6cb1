"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets


def write(path: str | os.PathLike, data: bytes) -> None:
    """Write a file by a neighbour and a rename: what was there stays until the new one is complete.

    Who may read it is what the process's umask says.
    """
    folder = os.path.dirname(os.path.abspath(os.fspath(path)))
    temporary = os.path.join(folder, f".nnsight_fx-{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
