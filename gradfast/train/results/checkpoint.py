"""Checkpoints: written whole or not at all, and read without running anything that they contain."""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from gradfast.errors import UserError
from gradfast.files import atomic_write, replacing, temporary_name

LAST = "last.pt"
BEST = "best.pt"
FORMAT = 1
_KEYS = {
    *("format", "version", "config", "classes", "fingerprint"),
    *("model", "optimizer", "scaler", "position", "best", "random"),
}


class _Remember:
    """A file that remembers why a write failed: torch.save reports only that one did."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def step_name(step: int) -> str:
    """The file of the checkpoint after so many optimiser steps, where ``--keep`` keeps it: step-00000120.pt."""
    return f"step-{step:08}.pt"


def save_checkpoint(folder: Path, state: dict[str, Any], is_best: bool, step: int = 0, keep: int = 0) -> None:
    """Write ``last.pt``, and make ``best.pt`` and ``step-N.pt`` the same file by links (or copies where links fail).

    The others go first: if the machine stops in between, the resumed run repeats what led to them and writes all again.

    Args:
        is_best: whether this is the best checkpoint so far.
        step: optimiser steps done, the N of ``step-N.pt``.
        keep: how many of ``step-N.pt`` stay, the newest up to this one; 0 writes none and removes none.

    Raises:
        UserError: the system would not write; the files from before are as they were.
    """
    path = folder / LAST
    with atomic_write(path) as file:
        remember = _Remember(file)
        try:
            torch.save({"format": FORMAT, **state}, remember)  # type: ignore[arg-type]
        except Exception:
            if remember.error is not None:
                raise remember.error from None
            raise
        file.flush()
        names = [BEST] * is_best + [step_name(step)] * (keep > 0)
        if names:
            os.fsync(file.fileno())
        for name in names:
            duplicate(temporary_name(path), folder / name)
    remove_older_steps(folder, step, keep)


def remove_older_steps(folder: Path, step: int, keep: int) -> None:
    """Of ``step-N.pt`` up to N = `step`, remove all but the newest `keep`; none where `keep` is 0."""
    if keep > 0:
        done = [path for path in sorted(folder.glob("step-*.pt")) if path.name <= step_name(step)]
        for path in done[:-keep]:
            path.unlink(missing_ok=True)


def finish_checkpoint(path: Path, step: int, keep: int) -> None:
    """Do what a run killed while it saved `path` had left to do: the file's other names, and the older ones."""
    if path.name != LAST:  # which gets its name after the others
        for name in [step_name(step)] * (keep > 0) + [LAST]:
            if name != path.name:
                duplicate(path, path.with_name(name))
    remove_older_steps(path.parent, step, keep)


def duplicate(source: Path, target: Path) -> None:
    """Make `target` hold what `source` holds, at once."""
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, with ``weights_only=True``.

    Raises:
        UserError: there is none at `path`, it is damaged (checksums are compared), or another program's.
    """
    if path.is_dir():
        path = path / LAST
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"the checkpoint {path} is damaged (checksum of {damaged}); use another one")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except Exception as error:  # whatever damage or foreign content makes zipfile and torch say
        raise UserError(
            f"{path} is damaged, cut short or not a checkpoint ({type(error).__name__}); use another one"
        ) from error
    if not isinstance(state, dict) or not state.keys() >= _KEYS:
        raise UserError(f"{path} is not a checkpoint of gradfast train, and only those can be read")
    if state["format"] != FORMAT:
        raise UserError(
            f"{path} is in format {state['format']}, and this gradfast reads format {FORMAT}; it was written by "
            f"gradfast {state['version']}"
        )
    return state


def newest_checkpoint(
    folders: list[Path], claim: Callable[[Path], None], report: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The newest sound checkpoint of any name in some folders, with its content.

    Args:
        claim: raises UserError for a folder that another run is writing to.
        report: told of each file and folder that was passed over, and why.
    """
    candidates = []
    for folder in folders:
        # In this order where they are links to one file.
        for path in (folder / LAST, *sorted(folder.glob("step-*.pt"), reverse=True), folder / BEST):
            with contextlib.suppress(OSError):
                candidates.append((path.stat().st_mtime_ns, path))
    refused: set[Path] = set()
    for _, path in sorted(candidates, key=lambda candidate: -candidate[0]):
        if path.parent in refused:
            continue
        try:
            claim(path.parent)
        except UserError as error:
            refused.add(path.parent)
            report(f"passed over: {error}")
            continue
        try:
            return path, load_checkpoint(path)
        except UserError as error:
            report(f"passed over: {error}")
    return None
