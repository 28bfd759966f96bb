"""One run to a folder: a second one that would write there is refused."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

from gradfast.errors import UserError

_LOOKS = 5  # at a lock that another process holds, 10 ms apart
_held: set[int] = set()  # open folders of this process, each with its lock


class Claims(contextlib.ExitStack):
    """The run folders that this process alone writes to, until the block ends or the process does, however it ends.

    The lock is flock(2) on the folder itself, so that it leaves no file behind and goes with the process, even by
    ``kill -9``. Where the file system cannot lock (some network ones), folders are not guarded.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folders: set[Path] = set()

    def take(self, folder: Path) -> None:
        """Claim a folder that exists; to claim it again changes nothing.

        Raises:
            UserError: another run has claimed it.
        """
        folder = folder.resolve()
        if folder in self._folders:
            return
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise UserError(f"cannot open the folder {folder}: {error.strerror}") from None
        try:
            _lock(handle)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"another gradfast train is writing to {folder}; wait for it, stop it, or choose another --output"
                ) from None
            return
        self._folders.add(folder)
        _held.add(handle)
        self.callback(_release, handle)


def is_claimed(folder: Path) -> bool:
    """Whether a run, of this process or another of this machine, has claimed a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(handle)
    return False


def _lock(handle: int) -> None:
    """Take the lock; one that is gone after a moment was `is_claimed`, looking."""
    for _ in range(_LOOKS):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            time.sleep(0.01)
        else:
            return
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _release(handle: int) -> None:
    if handle in _held:  # not in a forked child, which let go of it at once
        _held.remove(handle)
        os.close(handle)


def _forget() -> None:
    """Let go of inherited handles: a worker that outlives its run for a moment must not hold the run's folder."""
    for handle in list(_held):
        _release(handle)


os.register_at_fork(after_in_child=_forget)
