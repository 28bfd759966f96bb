"""Files that are either whole or not there: written beside their name, forced to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gradfast.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_failure(path: Path, error: OSError) -> UserError:
    """The one-line error for a file that could not be written."""
    remedy = "; free some space" if error.errno in _FULL else ""
    return UserError(f"cannot write {path}: {error.strerror or error}{remedy}")


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        UserError: it cannot be made, or is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(path, error) from error


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
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file that takes its place when the block ends, and leaves no trace when it fails.

    Raises:
        UserError: the system would not write, for want of space or otherwise; `path` is as it was before.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path`, forced to disk, when the block ends; raises as `replacing`."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes its name when the block ends, and leaves no trace when it fails.

    What a process that was killed had half-written stays behind under a hidden name, and is removed by the next one
    that writes to `path`. While it is written it is locked, by flock(2), which goes with the process.

    Yields:
        The folder to write to, on the same file system.

    Raises:
        UserError: `path` exists, or the system would not write.
    """
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists, and nothing is overwritten; choose another name, or remove it")
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        temporary.mkdir()
        handle = os.open(temporary, os.O_RDONLY)
    except OSError as error:
        raise write_failure(path, error) from error
    try:
        with contextlib.suppress(OSError):  # a file system that cannot lock: nobody removes what may be in use
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield temporary
        for folder, _, _ in os.walk(temporary):
            sync_folder(Path(folder))
        temporary.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


def remove_abandoned(path: Path) -> None:
    """Remove what killed processes left of writing the folder `path`: unlocked, and of a process that is no more."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = folder.suffixes[-2].removeprefix(".")
        if not number.isdigit() or not folder.is_dir() or is_running(int(number)):
            continue
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # locked by a process of another machine or container
            pass
        finally:
            os.close(handle)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


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
