"""`from_torch`: an optimiser of torch's, with its groups, state and hooks, becomes one of gradfast's."""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from gradfast.optim.adam import Adam, AdamW
from gradfast.optim.base import ClippedOptimizer
from gradfast.optim.sgd import SGD

# Exactly these classes: a subclass may step in a way of its own.
_KINDS: dict[type[Optimizer], type[SGD] | type[Adam] | type[AdamW]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
}

# Hooks that travel along. Those of the step come with what a scheduler or a profiler registered.
_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def from_torch(
    optimizer: Optimizer,
    max_norm: float | None = None,
    *,
    schedulers: LRScheduler | ReduceLROnPlateau | list[LRScheduler | ReduceLROnPlateau] | None = None,
    **clipping: Any,
) -> ClippedOptimizer:
    """Turn a `torch.optim.SGD`, `Adam` or `AdamW` into gradfast's, which goes on exactly where it stood.

    The new optimiser has the same parameters, the very same state tensors and group dictionaries, and the same hooks
    (which from now on are called with the new optimiser). Step only one of the two from now on.

    A learning rate scheduler holds on to the optimiser it was made for. Since both have the same group dictionaries, an
    old scheduler's new rates arrive all the same; but it watches the old one for the call of `step()`, and its warning
    of a wrong order would be wrong itself. Hand it over as `schedulers=`, or make it after the conversion.

    Args:
        optimizer: what to convert.
        max_norm: largest global gradient norm that is let through; `None` measures but never clips.
        schedulers: one or more schedulers of the old optimiser, nested ones included by their outermost: they drive the
            new one from now on.
        clipping: other settings of `gradfast.SGD` and so on: `norm_type`, `l1`, `nonfinite` and the like.

    Returns:
        `gradfast.SGD`, `gradfast.Adam` or `gradfast.AdamW`.

    Raises:
        TypeError: another kind of optimiser, or an unknown setting.
        ValueError: an option that gradfast has not (`differentiable=True`), or a scheduler of another optimiser.
    """
    kind = _kind_of(optimizer)
    for number, group in enumerate(optimizer.param_groups):
        if group.get("differentiable"):
            raise ValueError(f"param_groups[{number}] has differentiable=True, which gradfast does not support")
    listed = [schedulers] if not isinstance(schedulers, list) else schedulers
    listed = [scheduler for scheduler in listed if scheduler is not None]
    for scheduler in listed:
        if scheduler.optimizer is not optimizer:
            raise ValueError(f"{type(scheduler).__name__} belongs to another optimizer than the one to convert")

    # Made of copies of the groups, so that a refusal on the way leaves the old optimiser as it was.
    copied = [{**group, "params": list(_named(group))} for group in optimizer.param_groups]
    converted = kind(copied, **_defaults_of(optimizer, kind), max_norm=max_norm, **clipping)
    for group, fresh in zip(optimizer.param_groups, converted.param_groups, strict=True):
        for key in fresh.keys() - group.keys():
            group[key] = fresh[key]
    converted.param_groups = optimizer.param_groups
    converted.state = optimizer.state
    for name in _HOOKS:
        getattr(converted, name).update(getattr(optimizer, name))
    for scheduler in listed:
        _hand_over(scheduler, optimizer, converted)
    return converted


def _kind_of(optimizer: Optimizer) -> type[SGD] | type[Adam] | type[AdamW]:
    if isinstance(optimizer, ClippedOptimizer):
        raise TypeError(f"this is a gradfast.{type(optimizer).__name__} already; set its max_norm instead")
    kind = _KINDS.get(type(optimizer))
    if kind is None:
        known = ", ".join(f"torch.optim.{known.__name__}" for known in _KINDS)
        name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        raise TypeError(
            f"{name} cannot be converted, only {known} can; clip for other optimizers with gradfast.clip_grad_norm_"
        )
    return kind


def _defaults_of(optimizer: Optimizer, kind: type[ClippedOptimizer]) -> dict[str, Any]:
    """Return the options that the old optimiser was made with, as far as they are arguments of the new one's class."""
    arguments = inspect.signature(kind.__init__).parameters
    return {key: value for key, value in optimizer.defaults.items() if key in arguments}


def _named(group: dict[str, Any]) -> Any:
    names = group.get("param_names")
    return zip(names, group["params"], strict=True) if names else group["params"]


def _hand_over(scheduler: Any, old: Optimizer, new: Optimizer) -> None:
    """Let a scheduler, and those inside it, drive another optimiser; `step()` of that one counts as it did before."""
    for inner in getattr(scheduler, "_schedulers", ()):
        _hand_over(inner, old, new)
    scheduler.optimizer = new
    if hasattr(old.step, "_wrapped_by_lr_sched") and not hasattr(new.step, "_wrapped_by_lr_sched"):
        _watch_step(new)
        new._opt_called = getattr(old, "_opt_called", False)  # type: ignore[attr-defined]


def _watch_step(optimizer: Optimizer) -> None:
    """Note the calls of `step()` where torch's schedulers look for them, as each does at first."""
    reference, step = weakref.ref(optimizer), optimizer.step.__func__  # type: ignore[attr-defined]

    @functools.wraps(step)
    def watched(*arguments: Any, **keywords: Any) -> Any:
        stepped = reference()
        stepped._opt_called = True  # type: ignore[union-attr]
        return step(stepped, *arguments, **keywords)

    watched._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = watched  # type: ignore[method-assign]
