"""Clipping as functions on gradients with torch.nn.utils' signatures, and clip policies for optimisers."""

from gradfast.clip.functions import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from gradfast.clip.policies import (
    AGC,
    AdaGC,
    AutoClip,
    Chain,
    GlobalNorm,
    PerParameterNorm,
    Policy,
    SkipSpikes,
    Value,
    ZClip,
)

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "Chain",
    "GlobalNorm",
    "PerParameterNorm",
    "Policy",
    "SkipSpikes",
    "Value",
    "ZClip",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
]
