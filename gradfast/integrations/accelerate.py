"""HF Accelerate: `accelerator.clip_grad_norm_` done inside gradfast's step, once, and without an unscaling pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gradfast.integrations.limit import lower_limit, unwrapped
from gradfast.optim.base import ClippedOptimizer


def clip_in_step(accelerator: Accelerator, optimizer: Any) -> Callable[[], None]:
    """Let `accelerator.clip_grad_norm_(parameters, max_norm)` set the limit of the next `optimizer.step()`.

        model, optimizer = accelerator.prepare(model, gradfast.AdamW(model.parameters()))
        clip_in_step(accelerator, optimizer)

    The call then reads no gradient. It returns a 0-d tensor that holds NaN until that step has written the norm before
    clipping into it, with no wait for the device: read it after the step, as for logging. Where the optimiser has a
    `max_norm` of its own the smaller limit holds. A call with other parameters than the optimiser's is done by
    Accelerate as before. Where only the optimiser's `max_norm` is used and nobody calls `clip_grad_norm_`, none of this
    is needed.

    Args:
        accelerator: whose method is replaced, on this one object.
        optimizer: one of gradfast's, prepared or not.

    Returns:
        A function that puts everything back.

    Raises:
        TypeError: the optimiser is not gradfast's.
    """
    inner = unwrapped(optimizer)
    if not isinstance(inner, ClippedOptimizer):
        raise TypeError(f"clip_in_step needs one of gradfast's optimizers, got {type(inner).__name__}: see from_torch")
    original = accelerator.clip_grad_norm_
    own = inner.max_norm
    awaited: list[Tensor] = []
    reference = weakref.ref(inner)

    def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Tensor | None:
        listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        stepped = reference()
        with_gradient = {id(p) for p in listed if p.grad is not None}
        if stepped is None or with_gradient != _with_gradient(stepped):
            return original(listed, max_norm, norm_type=norm_type)
        lower_limit(stepped, own, float(max_norm), float(norm_type))
        norm = torch.full((), float("nan"), device=listed[0].device)
        awaited.append(norm)
        return norm

    def hand_out(stepped: Any, *_: Any) -> None:
        for norm in awaited:
            norm.copy_(stepped.grad_norm)
        awaited.clear()

    handle = inner.register_step_post_hook(hand_out)
    accelerator.clip_grad_norm_ = clip_grad_norm_

    def undo() -> None:
        handle.remove()
        inner.max_norm = own
        if accelerator.__dict__.get("clip_grad_norm_") is clip_grad_norm_:
            del accelerator.clip_grad_norm_

    return undo


def _with_gradient(optimizer: ClippedOptimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
