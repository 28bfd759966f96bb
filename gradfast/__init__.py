"""Gradient clipping that costs nothing, and training that does not blow up.

`gradfast.SGD`, `Adam` and `AdamW` stand in for their torch.optim namesakes and take `max_norm=`: one native call
measures the global gradient norm, decides the clip factor and applies clip, decay and update together. Around them:
`gradfast.clip` (clip policies), `gradfast.guard` (what to do when a step is bad), `gradfast.monitor` (which layer it
was) and `gradfast.nn` (models whose gradients stay in range).
"""

from gradfast import clip, guard, monitor, nn, optim
from gradfast.amp import GradScaler
from gradfast.clip import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from gradfast.monitor import Monitor, diagnose
from gradfast.optim import SGD, Adam, AdamW, Lion, from_torch
from gradfast.version import __version__

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "GradScaler",
    "Lion",
    "Monitor",
    "__version__",
    "clip",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "diagnose",
    "from_torch",
    "get_total_norm",
    "guard",
    "monitor",
    "nn",
    "optim",
]
