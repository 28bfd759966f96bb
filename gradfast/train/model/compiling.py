"""torch.compile of a model, in place, with an early word where it cannot work."""

from __future__ import annotations

import torch
from torch import nn

from gradfast.errors import UserError
from gradfast.extras import first_line

REMEDIES = {
    "cpu": "install a C++ compiler (g++ or clang++, or name one in CXX) and Python's headers",
    "cuda": "install triton and a C compiler (gcc, or name one in CC)",
}


def compile_model(model: nn.Module, backend: str, device: torch.device) -> None:
    """Let the model's forward pass be compiled when it is first run; its parameters keep their names.

    ``model.compile()`` changes how the module is called and nothing else: state dicts, hooks and copies are as before,
    so a checkpoint of a compiled run goes on uncompiled and the other way round.

    Raises:
        UserError: the backend cannot compile even an addition here.
    """
    try:
        probe = torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(64, device=device))
        assert float(probe[0]) == 1.0
    except Exception as error:  # each backend has its own kinds, and a missing compiler is an OSError in some
        remedy = REMEDIES.get(device.type, "choose another backend")
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"--compile {backend} does not work here ({first_line(RuntimeError(reason))}); {remedy}, or leave it out"
        ) from error
    model.compile(backend=backend)
