"""Which run to continue, and whether it can be continued with the settings and data at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradfast.errors import UserError
from gradfast.train.config import TrainConfig, flag, from_dict, make_config
from gradfast.train.results.checkpoint import BEST, LAST, duplicate, load_checkpoint, newest_checkpoint
from gradfast.train.results.output import RUNS, find_run
from gradfast.train.tasks.task import TaskData

# What the saved weights, optimiser state or order of the data would not fit, or would not mean the same with.
_FIXED = (
    "task",
    "model",
    "activation",
    "norm",
    "freeze_backbone",
    "frozen_norm",
    "anchor_size",
    "opt",
    "norm_bias_decay",
    "clip_policy",
    "sampler",
    "seed",
)
# What decides how many batches an epoch has; may change between two epochs but not within one.
_FIXED_WITHIN_EPOCH = ("batch_size", "grad_accum")


@dataclass
class Resumed:
    """A run to continue.

    Attributes:
        path: its checkpoint.
        state: the checkpoint's content.
        settings: its configuration, as far as this gradfast knows it.
        output: where the continued run writes; None for a new folder.
        changed: settings given now that differ from the saved ones, as text.
    """

    path: Path
    state: dict[str, Any]
    settings: dict[str, Any]
    output: Path | None
    changed: list[str]

    @property
    def folder(self) -> Path:
        return self.path.parent

    def complete(self, epochs: int) -> bool:
        return self.state["position"]["epoch"] >= epochs

    def copy_best(self, folder: Path) -> None:
        """Take the best checkpoint along to another run folder, if it is of an epoch done before this one."""
        best = self.folder / BEST
        if best.is_file() and 0 < self.state["best"]["epoch"] <= self.state["position"]["epoch"]:
            duplicate(best, folder / BEST)


def find_resumed(
    settings: dict[str, Any], claim: Callable[[Path], None], report: Callable[[str], None]
) -> Resumed | None:
    """The run that ``--resume`` means, or None where there is none to continue.

    Args:
        claim: called with the folder of a run that will be continued in place, before its checkpoint is read.

    Raises:
        UserError: there is no sound checkpoint there, another run is writing to its folder, or a setting given now
            does not go with it.
    """
    wanted = settings.get("resume")
    if wanted is None:
        return None
    given_output = Path(settings["output"]) if settings.get("output") else None
    if wanted == "auto":
        folders = [given_output] if given_output else (list(RUNS.iterdir()) if RUNS.is_dir() else [])
        found = newest_checkpoint(folders, claim, report)
        if found is None:
            report(f"--resume auto: no checkpoint in {given_output or RUNS}; starting a new run")
            return None
        path, state = found
        output: Path | None = path.parent
    else:
        path = find_run(wanted)
        path = path / LAST if path.is_dir() else path
        # Another checkpoint than the last stands before results that its folder already has: it gets a new folder.
        output = given_output or (path.parent if path.name == LAST else None)
        if output is not None and output.is_dir() and output.samefile(path.parent):
            output = path.parent
            claim(output)
        state = load_checkpoint(path)
    saved = from_dict(state["config"])
    return Resumed(path, state, saved, output, find_changes(path, state, saved, settings))


def find_changes(path: Path, state: dict[str, Any], saved: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    before, after = make_config(saved), make_config(saved | settings)
    changed = [name for name in saved if getattr(before, name) != getattr(after, name)]
    for name in changed:
        old, new = getattr(before, name), getattr(after, name)
        if name == "model":
            raise UserError(f"--resume: {path} is a checkpoint of {old}, and --model asks for {new}")
        if name in _FIXED or (name in _FIXED_WITHIN_EPOCH and state["position"]["batch"] > 0):
            raise UserError(f"{flag(name)} {new}: {path} was written with {old}, which cannot change on --resume")
    return [f"{flag(name)} {getattr(before, name)} -> {getattr(after, name)}" for name in changed]


def check_same_run(resumed: Resumed, config: TrainConfig, data: TaskData) -> None:
    """Raises:
    UserError: the images are not those that the checkpoint was trained on.
    """
    state = resumed.state
    if list(data.classes) != state["classes"]:
        raise UserError(
            f"--resume: {resumed.path} was trained on the classes {', '.join(state['classes'])}, and {config.data} "
            f"has {', '.join(data.classes)}"
        )
    if data.fingerprint() != state["fingerprint"]:
        raise UserError(
            f"--resume: the images in {config.data}, or their split, are not those that {resumed.path} was trained on; "
            "restore them, or start a new run"
        )
