"""What the numbers were measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gradfast.bench.timing import cpu_cache_bytes
from gradfast.info import collect

# Of `gradfast info`, what a number may depend on; not where things lie on this machine.
KEPT = ("gradfast", "python", "platform", "torch", "torch_cuda", "cpu_capability", "threads", "cuda_toolkit", "gpus")


def describe(device: str) -> dict[str, Any]:
    """Return the machine, the versions, and the name of the device that was measured."""
    info = collect()
    cpu = {"name": cpu_name(), "cache_bytes": cpu_cache_bytes()}
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu["name"]
    return {"device": device, "device_name": name, "cpu": cpu, **{key: info[key] for key in KEPT}}


def cpu_name(text: str | None = None) -> str:
    """The processor's name from the text of `/proc/cpuinfo` (the default), or the machine's architecture."""
    path = Path("/proc/cpuinfo")
    if text is None:
        text = path.read_text() if path.exists() else ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model"):
            return value.strip()
    import platform

    return platform.machine()
