"""Clip policies: rules that decide from the gradient norm, and what they remember, what to do with a step."""

from gradfast.clip.policies.ada_gc import AdaGC
from gradfast.clip.policies.agc import AGC
from gradfast.clip.policies.auto_clip import AutoClip
from gradfast.clip.policies.base import ClipResult, Policy
from gradfast.clip.policies.chain import Chain
from gradfast.clip.policies.global_norm import GlobalNorm
from gradfast.clip.policies.per_parameter_norm import PerParameterNorm
from gradfast.clip.policies.skip_spikes import SkipSpikes
from gradfast.clip.policies.value import Value
from gradfast.clip.policies.zclip import ZClip

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "Chain",
    "ClipResult",
    "GlobalNorm",
    "PerParameterNorm",
    "Policy",
    "SkipSpikes",
    "Value",
    "ZClip",
]
