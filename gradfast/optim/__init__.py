"""Drop-in optimisers: torch.optim's signatures, state and results, with clipping inside the step."""

from gradfast.optim.adam import Adam, AdamW
from gradfast.optim.convert import from_torch
from gradfast.optim.distributed_checkpoint import OptimizerState
from gradfast.optim.lion import Lion
from gradfast.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Lion", "OptimizerState", "from_torch"]
