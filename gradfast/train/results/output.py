"""The run folder: found or chosen before anything is computed, made when there is something to put into it."""

from __future__ import annotations

import re
from pathlib import Path

from gradfast.errors import UserError
from gradfast.files import write_failure

RUNS = Path("runs")
RANGE_TEST = ("lr_find.csv", "lr_find.png")  # of --lr-find, whose folder the run that follows may take


def check_output(folder: Path) -> None:
    """Raises:
    UserError: results would overwrite something, or cannot be written there.
    """
    if folder.is_dir():
        if any(path.name not in RANGE_TEST for path in folder.iterdir()):
            raise UserError(
                f"--output {folder} is not empty, and nothing is overwritten; choose another folder, or continue "
                f"that run with --resume {folder}"
            )
    elif folder.exists() or folder.is_symlink():
        raise UserError(f"--output {folder} is a file; give a folder")


def make_output(folder: Path | None, name: str) -> tuple[Path, bool]:
    """Make the run folder.

    Args:
        folder: where results go; None makes the next new one of runs/NAME-1, runs/NAME-2 ...

    Returns:
        (the folder, whether this call made it)
    """
    try:
        if folder is not None:
            made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            return folder, made
        RUNS.mkdir(exist_ok=True)
        while True:
            folder = RUNS / f"{name}-{next_number(RUNS, name)}"
            try:
                folder.mkdir()
            except FileExistsError:  # another run was quicker
                continue
            return folder, True
    except OSError as error:
        raise write_failure(folder or RUNS, error) from error


def next_number(runs: Path, name: str) -> int:
    pattern = re.compile(re.escape(name) + r"-(\d+)$")
    taken = [int(match[1]) for path in runs.iterdir() if (match := pattern.match(path.name))]
    return max(taken, default=0) + 1


def find_run(name: str) -> Path:
    """A folder or file by its path, or a run by its name in ``runs/``."""
    path = Path(name)
    return RUNS / name if not path.exists() and (RUNS / name).is_dir() else path


def run_name(model: str, data: str) -> str:
    """MODEL-DATA, with nothing in it that a file name should not have."""
    return re.sub(r"[^\w.-]+", "_", f"{model}-{Path(data).name}")
