"""Mixed precision: a GradScaler that leaves the search for infinities to the step."""

from gradfast.amp.grad_scaler import GradScaler

__all__ = ["GradScaler"]
