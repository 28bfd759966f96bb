"""States of parameters that the engine met for the first time, or whose loaded state it cannot use as it is."""

from __future__ import annotations

from typing import Any

import torch


def complete(entries: dict[str, Any], fresh: dict[str, Any]) -> bool:
    """Fill a parameter's `entries` up with a fresh state, keeping what is there. True if there was nothing."""
    was_empty = not any(torch.is_tensor(entries.get(key)) for key in fresh)
    for key, value in fresh.items():
        entries[key] = _usable(entries.get(key), value, key)
    return was_empty


def _usable(found: Any, fresh: Any, key: str) -> Any:
    """Return a state that the engine can step: the one found, on the fresh one's device, or the fresh one."""
    if not torch.is_tensor(found):
        return torch.full_like(fresh, float(found)) if isinstance(found, (int, float)) else fresh
    dtype = torch.float32 if key == "step" else found.dtype
    return found.to(device=fresh.device, dtype=dtype)
