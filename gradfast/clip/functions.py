"""Norm and clipping of gradients with the signatures of `torch.nn.utils`.

What differs from torch: the norm is summed in double precision and returned as float32 (float64 for float64), so that
float16 gradients do not overflow it; and gradients below the limit are not rewritten on the CPU. `foreach` is accepted
and ignored: there is one implementation, and it takes all tensors at once.

DTensors (FSDP2, tensor parallel) count as the whole tensors that they are parts of: the norm is the whole model's, a
plain tensor, the same on every rank, joined with one small all-reduce (see `gradfast.clip.reduction`); all ranks of the
mesh must call. `process_group=` joins ranks that hold different tensors, such as the stages of a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradfast._load import native as _native  # noqa: F401  registers torch.ops.gradfast
from gradfast.clip.reduction import (
    Reduction,
    finish,
    is_dtensor,
    is_partial,
    local_tensor,
    reduce_partial,
    spans_ranks,
    whole_tensor,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Tensors = Tensor | Iterable[Tensor]


def get_total_norm(
    tensors: Tensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Return the p-norm of all elements of all tensors taken as one vector, `(sum |x|^p)^(1/p)`, or `max |x|`.

    Args:
        tensors: one or more dense tensors of any shapes, of dtype float64, float32, float16 or bfloat16 (complex ones
            with `norm_type=2`), on one or several devices; or DTensors, whose partial placements are reduced first.
        norm_type: p, at least 1; `inf` for the largest magnitude.
        error_if_nonfinite: raise if the norm is NaN or infinite. Waits for the device.
        process_group: ranks that hold other tensors of the same model; each of them must call.

    Returns:
        A plain 0-d tensor on the first tensor's device; float64 if a tensor is float64, else float32.

    Raises:
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set.
        ValueError: `norm_type` is below 1.
    """
    listed = _as_list(tensors)
    if process_group is not None or spans_ranks(listed):
        norm = _joined_norm(listed, float(norm_type), process_group)
    elif not listed:
        return torch.tensor(0.0)
    else:
        norm = torch.ops.gradfast.total_norm(listed, float(norm_type))
    if error_if_nonfinite:
        _refuse_nonfinite(norm, norm_type)
    return norm


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Tensors, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Multiply every gradient by `min(1, max_norm / (total_norm + 1e-6))`, in place.

    Args:
        parameters: parameters whose `.grad` is scaled; those without one are left out.
        max_norm: the largest norm that is let through.
        total_norm: 0-d tensor, as from `get_total_norm`.
    """
    gradients = [local_tensor(gradient) for gradient in _gradients(parameters)]
    if is_dtensor(total_norm):  # torch's own get_total_norm leaves it partial
        total_norm = whole_tensor(total_norm)
    if gradients:
        torch.ops.gradfast.clip_grads_with_norm_(gradients, float(max_norm), torch.as_tensor(total_norm))


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm`, and return the norm before that.

    The factor is `min(1, max_norm / (norm + 1e-6))` (Pascanu, Mikolov, Bengio 2013). As in torch, a NaN norm makes
    every gradient NaN; the optimisers of gradfast skip such a step instead.

    Args:
        parameters: parameters whose `.grad` is clipped; those without one are left out.
        max_norm: the largest norm that is let through.
        norm_type: p of the norm, at least 1; `inf` for the largest magnitude.
        error_if_nonfinite: raise before anything is changed if the norm is NaN or infinite. Waits for the device.
        process_group: ranks that hold other parameters of the same model; each of them must call.

    Returns:
        The norm before clipping: a plain 0-d tensor, float64 if a gradient is float64, else float32.

    Raises:
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set.
        ValueError: `norm_type` is below 1.
    """
    gradients = _gradients(parameters)
    joined = process_group is not None or spans_ranks(gradients)
    if not gradients and not joined:
        return torch.tensor(0.0)
    if not error_if_nonfinite and not joined:
        return torch.ops.gradfast.clip_grad_norm_(gradients, float(max_norm), float(norm_type))
    norm = get_total_norm(gradients, norm_type, error_if_nonfinite, process_group=process_group)
    if gradients:
        local = [local_tensor(gradient) for gradient in gradients]
        torch.ops.gradfast.clip_grads_with_norm_(local, float(max_norm), norm)
    return norm


@torch.no_grad()
def clip_grad_value_(parameters: Tensors, clip_value: float, foreach: bool | None = None) -> None:
    """Clamp every element of every gradient to `[-clip_value, clip_value]`, in place; NaN stays NaN.

    Args:
        parameters: parameters whose `.grad` is clamped; those without one are left out.
        clip_value: the largest magnitude that is let through.
    """
    gradients = _gradients(parameters)
    for index, gradient in enumerate(gradients):
        if is_partial(gradient):
            raise ValueError(
                f"gradfast: gradient {index} has a partial placement: its values are not known until it is reduced; "
                "redistribute it to Shard or Replicate first"
            )
    if gradients:
        local = [local_tensor(gradient) for gradient in gradients]
        torch.ops.gradfast.clip_grad_value_(local, float(clip_value))


def _as_list(tensors: Tensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _gradients(parameters: Tensors) -> list[Tensor]:
    return [parameter.grad for parameter in _as_list(parameters) if parameter.grad is not None]


def _joined_norm(tensors: list[Tensor], norm_type: float, process_group: ProcessGroup | None) -> Tensor:
    """The norm over the tensors of all ranks; see `gradfast.clip.reduction`."""
    whole = reduce_partial(tensors)
    reduction = Reduction(whole, [f"tensors[{index}]" for index in range(len(whole))], process_group)
    if whole:
        sums = torch.ops.gradfast.power_sums([local_tensor(tensor) for tensor in whole], norm_type)
    else:
        sums = torch.zeros(0, dtype=torch.float64, device=reduction.device_type)
    total = reduction.join(sums, infinity=norm_type == float("inf"))
    is_double = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    return finish(total, norm_type).to(torch.float64 if is_double else torch.float32)


def _refuse_nonfinite(norm: Tensor, norm_type: float) -> None:
    if not bool(torch.isfinite(norm)):
        raise RuntimeError(
            f"The total norm of order {norm_type} of the gradients is {norm.item()}, so it cannot be clipped. To go on "
            "all the same, set error_if_nonfinite=False"
        )
