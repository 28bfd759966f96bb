"""Files that are either whole or not there: written beside their name, forced to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gradfast.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_failure(path: Path, error: OSError) -> UserError:
    """The one-line error for a file that could not be written."""
    remedy = "; free some space" if error.errno in _FULL else ""
    return UserError(f"cannot write {path}: {error.strerror or error}{remedy}")


def temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_temporaries(folder: Path) -> None:
    """Remove what processes that were killed left of their writing in a folder that nobody else is writing to."""
    for path in folder.glob(".*.*.tmp"):
        if path.suffixes[-2].removeprefix(".").isdigit():
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Force a rename in a folder to disk, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends, and leaves no trace when it fails.

    Raises:
        UserError: the system would not write, for want of space or otherwise; `path` is as it was before.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def append_whole(path: Path, text: str) -> None:
    """Append to a text file all of `text` or nothing of it.

    Raises:
        UserError: the system would not write; the file is as it was before.
    """
    try:
        # Unbuffered: what a buffer could not write it would try again on closing, after the file was cut back.
        with path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                rest = memoryview(text.encode())
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise
    except OSError as error:
        raise write_failure(path, error) from error
