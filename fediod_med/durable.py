"""Files that are whole, and where it matters verified, before they have their name."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fediod_med.errors import InputError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)`, sync it and move it to `path`; a reader never sees a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_verified(
    path: Path, write: Callable[[BinaryIO], object], verify: Callable[[Path], None], *, ending: str
) -> None:
    """Write under a hidden name, sync, verify, and only then rename; `path` holds the old content or the new, whole.

    Args:
        path: destination; missing parent folders are made.
        write: receives the open file.
        verify: receives the hidden file and raises when it is not what was meant; it is deleted then.
        ending: of the hidden name, for readers that look at it.

    Raises:
        InputError: the file could not be written.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}{ending}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        verify(temporary)
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: could not be written ({error}); check the folder, its rights and free space"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
