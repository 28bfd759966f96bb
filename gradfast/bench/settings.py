"""What is to be measured, as flags give it and as it travels to each process."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """All of `gradfast bench` but where the results go."""

    device: str
    workloads: tuple[str, ...]
    dtypes: tuple[str, ...]
    optimizers: tuple[str, ...]
    peers: tuple[str, ...]
    pairs: int  # of steps a comparison and process, at most
    seconds: float  # a comparison and process, about
    processes: int
    limit: float | None  # seconds a process: what is not begun by then is left out
    flush: bool
    threads: int | None  # None: torch's default

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Settings:
        tuples: dict[str, Any] = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **tuples})
