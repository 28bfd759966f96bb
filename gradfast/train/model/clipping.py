"""The clip policy of ``--clip-policy`` and ``--clip-grad``, as the optimiser takes it."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradfast import clip
from gradfast.train.config import TrainConfig


def clip_arguments(config: TrainConfig, model: nn.Module) -> dict[str, Any]:
    """``max_norm=`` or ``clip=`` of the optimiser: the policy, then the global norm's limit where there is one."""
    limit = config.clip_grad
    if config.clip_policy == "norm":
        return {"max_norm": limit}
    if config.clip_policy == "value":
        assert limit is not None  # TrainConfig.check_together
        return {"clip": clip.Value(limit)}
    if config.clip_policy == "adagc":  # has a limit of its own, for its first steps, and stands last in any chain
        return {"clip": clip.AdaGC(max_norm=limit or 1.0)}
    if config.clip_policy == "agc":
        policy: clip.Policy = clip.AGC(exclude=classifier_names(model))
    else:
        policy = {"autoclip": clip.AutoClip, "zclip": clip.ZClip, "skip-spikes": clip.SkipSpikes}[config.clip_policy]()
    return {"clip": policy if limit is None else clip.Chain(policy, clip.GlobalNorm(limit))}


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the parameters of the last linear layer, which AGC leaves alone (Brock et al. 2021)."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name, _ in model.named_parameters() if linear and name.startswith(linear[-1] + ".")]


def describe_clipping(config: TrainConfig) -> str:
    """Such as "clipped at norm 1", "zclip, then at norm 1", "no clipping"."""
    limit = "" if config.clip_grad is None else f"{config.clip_grad:g}"
    if config.clip_policy == "norm":
        return f"clipped at norm {limit}" if limit else "no clipping"
    if config.clip_policy == "value":
        return f"clipped at magnitude {limit}"
    last = f", then at norm {limit}" if limit and config.clip_policy != "adagc" else ""
    return f"clipped by {config.clip_policy}{last}"
