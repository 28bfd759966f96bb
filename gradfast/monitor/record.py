"""Read back what a run left in its folder."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradfast.errors import UserError
from gradfast.monitor.sinks import RECORD

STEPS = "steps.csv"  # of `gradfast train`


@dataclass
class RunRecord:
    """What is known of a run.

    Attributes:
        norms: step -> global gradient norm before clipping.
        coefficients: step -> clip coefficient; missing or NaN where it is not known.
        samples: step -> metrics, as the monitor wrote them.
        events: as `Event.to_dict` gives them.
    """

    name: str
    norms: dict[int, float] = field(default_factory=dict)
    coefficients: dict[int, float] = field(default_factory=dict)
    samples: dict[int, dict[str, float]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)

    def layers(self, prefix: str = "l2_norm/grad/") -> dict[str, dict[int, float]]:
        """Group of parameters -> step -> value."""
        found: dict[str, dict[int, float]] = {}
        for step, metrics in sorted(self.samples.items()):
            for key, value in metrics.items():
                if key.startswith(prefix):
                    found.setdefault(key.removeprefix(prefix), {})[step] = value
        return found


def read_run(path: Path) -> RunRecord:
    """Read a run's folder, or a monitor's file.

    Steps that were done twice, as after a resume, count as they were the last time.

    Raises:
        UserError: there is no such run, or nothing was recorded in it, or the file is damaged.
    """
    if not path.exists():
        raise UserError(f"there is no run {path}; give a folder with {RECORD} or {STEPS} in it, or such a file")
    files = [path] if path.is_file() else [path / RECORD, path / STEPS]
    files = [file for file in files if file.is_file()]
    if not files:
        raise UserError(
            f"{path} holds neither {RECORD} nor {STEPS}; record a run with "
            f"gradfast.Monitor(optimizer, sinks=[JSONL({str(path)!r})]) or gradfast train"
        )
    run = RunRecord(path.stem if path.is_file() else path.resolve().name)
    for file in reversed(files):
        (_read_csv if file.suffix == ".csv" else _read_lines)(file, run)
    if not run.norms and not run.samples:
        raise UserError(f"{' and '.join(map(str, files))} is empty: no step was recorded yet")
    return run


def _read_lines(path: Path, run: RunRecord) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            content = _numbers(json.loads(line))
            _take(content, run)
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # a run that was killed, or is writing: its last line may be half there
                return
            raise UserError(f"{path}, line {number}, is damaged ({error}); cut it out, or plot another run") from error


def _take(content: dict[str, Any], run: RunRecord) -> None:
    if "history" in content:
        for offset, norm in enumerate(content["grad_norm"]):
            run.norms[content["history"] + offset] = norm
            run.coefficients[content["history"] + offset] = content["clip_coef"][offset]
    elif "event" in content:
        run.events.append(content["event"])
    else:
        step = content.pop("step")
        run.samples[step] = content


def _numbers(value: Any) -> Any:
    """Undo what a JSONL sink did to NaN and infinity."""
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, Mapping):
        return {key: _numbers(item) for key, item in value.items()}
    return [_numbers(item) for item in value] if isinstance(value, list) else value


def _read_csv(path: Path, run: RunRecord) -> None:
    """`gradfast train`'s steps, or a CSV sink's samples."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        for row in rows:
            values = {key: float(value) for key, value in row.items() if key != "step"}
            step = int(row["step"])
            run.norms[step], run.coefficients[step] = values["grad_norm"], values["clip_coef"]
            if any(key.startswith("l2_norm/") for key in values):
                run.samples[step] = values
            if not math.isfinite(values["grad_norm"]):
                event = {"step": step, "rule": "nonfinite", "norm": values["grad_norm"], "action": "skipped"}
                run.events.append({**event, "threshold": None, "worst": [], "message": f"step {step}: not finite"})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a table with step, grad_norm and clip_coef ({error!r})") from error
