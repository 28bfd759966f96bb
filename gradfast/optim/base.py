"""What all optimisers of gradfast share: the engine, clipping, skipped steps and their report."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from gradfast._load import native

_log = logging.getLogger("gradfast")

NONFINITE = ("skip", "propagate", "raise")
_CLIP_SETTINGS = ("max_norm", "norm_type", "nonfinite")


class RuleSettings(NamedTuple):
    """One parameter group as the engine takes it."""

    rule: str  # name of a rule in csrc/rules
    values: list[float]  # its hyper-parameters, in the order of the rule's struct
    states: list[str]  # keys of its states in `state[parameter]`, in the rule's order
    lr: Tensor | None  # the learning rate where it lives on the device, instead of values[0]


class ClippedOptimizer(Optimizer):
    """Mixed into a torch optimiser, replaces its step by one native call that also clips.

    The torch class keeps what it is good at: checking hyper-parameters, parameter groups, hooks, `state_dict`. A
    subclass says how a group maps to a rule (`_rule_settings`) and what a parameter's fresh state is (`_fresh_state`).

    Every such optimiser takes, by keyword only:

    Args:
        max_norm: largest global gradient norm that is let through; `None` measures but never clips. The gradients are
            multiplied by `min(1, max_norm / (norm + 1e-6))` as they are read; `p.grad` itself stays as it is.
        norm_type: p of the global norm, at least 1; `inf` for the largest magnitude.
        l1: L1 decay, beside the L2 of `weight_decay`; may differ between groups.
        nonfinite: what to do when the norm is NaN or infinite. "skip": change no parameter, no state and no step count,
            count the step in `skipped_steps` and log the parameter's name. "propagate": go on, as torch does.
            "raise": change nothing and raise, which waits for the device at every step.
    """

    max_norm: float | None
    norm_type: float
    nonfinite: str

    def _rule_settings(self, group: dict[str, Any]) -> RuleSettings:
        raise NotImplementedError

    def _fresh_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _init_clipping(
        self,
        max_norm: float | None,
        norm_type: float,
        l1: float,
        nonfinite: str,
        foreach: bool | None,
        fused: bool | None,
        differentiable: bool,
    ) -> None:
        """Check and store what gradfast adds; called after the torch class's own `__init__`."""
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"Invalid max_norm value: {max_norm}; it must be positive, or None for no clipping")
        if not norm_type >= 1:
            raise ValueError(f"Invalid norm_type value: {norm_type}; it must be at least 1, or inf")
        if nonfinite not in NONFINITE:
            raise ValueError(f"Invalid nonfinite value: {nonfinite!r}; it must be one of {', '.join(NONFINITE)}")
        if differentiable:
            raise RuntimeError(
                f"gradfast.{type(self).__name__} does not support differentiable=True; use torch.optim's"
            )
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        self.max_norm, self.norm_type, self.nonfinite = max_norm, float(norm_type), nonfinite
        # Kept for whoever reads them; there is one implementation, and it is fused.
        self.defaults.update(l1=l1, fused=fused)
        for group in self.param_groups:
            group.setdefault("l1", l1)
            group["fused"] = fused
            _check_l1(group)
        self._engine: Any = None

    # ---------------------------------------------------------------- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one step: measure the global norm, decide the clip factor, update, in one native call.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled.

        Raises:
            RuntimeError: `nonfinite="raise"` and a gradient is NaN or infinite.
            NotImplementedError: a gradient is sparse or of a tensor subclass.
            TypeError, ValueError: dtype, shape or device of a gradient or state does not fit its parameter.
        """
        arguments: tuple[Any, ...] = (self, closure) if closure is not None else (self,)
        keywords: dict[str, Any] = {}
        before = (*torch_optimizer._global_optimizer_pre_hooks.values(), *self._optimizer_step_pre_hooks.values())
        for hook in before:
            changed = hook(self, arguments, keywords)
            if changed is not None:
                arguments, keywords = changed
                closure = keywords.get("closure", arguments[1] if len(arguments) > 1 else None)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._native_step()
        for hook in chain(
            self._optimizer_step_post_hooks.values(), torch_optimizer._global_optimizer_post_hooks.values()
        ):
            hook(self, arguments, keywords)
        return loss

    # torch wraps a step that lacks this mark into record_function and its hooks: microseconds at each step. The hooks
    # are called above, and the engine records its range in C++, where it costs nothing unless a profiler listens.
    step.hooked = True  # type: ignore[attr-defined]

    def _native_step(self) -> None:
        engine = self._engine
        if engine is None or self._engine_size != sum(len(group["params"]) for group in self.param_groups):
            engine = self._make_engine()
        settings = [self._rule_settings(group) for group in self.param_groups]
        max_norm = math.inf if self.max_norm is None else self.max_norm
        propagate = self.nonfinite == "propagate"
        missing = engine.step(self.state, settings, max_norm, self.norm_type, propagate)
        if missing:
            self._make_states(missing)
            missing = engine.step(self.state, settings, max_norm, self.norm_type, propagate)
            if missing:
                raise RuntimeError(f"gradfast: no usable state for parameter {self._engine_names[missing[0]]!r}")
        if self.nonfinite == "raise":
            if engine.last_skipped():
                raise RuntimeError(f"gradfast: {self._explain_skip()}; nothing was changed")
        elif engine.skipped_on_host():
            _log.warning("step skipped: %s", self._explain_skip())

    def _make_engine(self) -> Any:
        parameters, group_of, names = [], [], []
        for number, group in enumerate(self.param_groups):
            known = group.get("param_names")
            for position, parameter in enumerate(group["params"]):
                parameters.append(parameter)
                group_of.append(number)
                names.append(known[position] if known else f"param_groups[{number}]['params'][{position}]")
        skipped = self.skipped_steps if self._engine is not None else 0
        self._skipped_before = getattr(self, "_skipped_before", 0) if self._engine is None else skipped
        self._engine = native.Engine(parameters, group_of, names)
        self._engine_parameters, self._engine_groups, self._engine_names = parameters, group_of, names
        self._engine_size = len(parameters)
        return self._engine

    def _make_states(self, missing: list[int]) -> None:
        fresh = []
        for index in missing:
            parameter = self._engine_parameters[index]
            group = self.param_groups[self._engine_groups[index]]
            entries = self.state[parameter]
            made = self._fresh_state(parameter, group)
            if not any(torch.is_tensor(entries.get(key)) for key in made):
                fresh.append(index)
            for key, value in made.items():
                entries[key] = _usable(entries.get(key), value, key)
        self._engine.mark_fresh(fresh)

    def _explain_skip(self) -> str:
        name = self._engine.nonfinite_parameter()
        norm = self._engine.grad_norm().item()
        return f"the gradient norm is {norm}, first non-finite gradient in {name!r}"

    # ---------------------------------------------------------------- what a step leaves behind

    @property
    def grad_norm(self) -> Tensor:
        """Global gradient norm of the last step, before clipping: a 0-d tensor on the device; nothing waits for it."""
        return self._stepped_engine().grad_norm()

    @property
    def clip_coef(self) -> Tensor:
        """Clip coefficient of the last step, `min(1, max_norm / (norm + 1e-6))`: a 0-d tensor on the device."""
        return self._stepped_engine().coefficient()

    @property
    def skipped_steps(self) -> int:
        """How many steps of this object were skipped for a non-finite norm. On CUDA, reading it waits."""
        before = getattr(self, "_skipped_before", 0)
        return before + (0 if self._engine is None else self._engine.skipped_steps())

    @property
    def nonfinite_parameter(self) -> str | None:
        """Name of the first parameter whose gradient was not finite in the last step, or `None`. On CUDA, waits."""
        return self._stepped_engine().nonfinite_parameter() or None

    def grad_norms(self) -> dict[str, Tensor]:
        """Return each parameter's gradient norm in the last step, before clipping, by name: 0-d tensors.

        They come from the same pass as the global norm. Parameters without a gradient are left out. Names are those
        that the optimiser was given as `(name, parameter)` pairs, else `param_groups[i]['params'][j]`.
        """
        return dict(self._stepped_engine().grad_norms())

    def _stepped_engine(self) -> Any:
        if self._engine is None:
            raise RuntimeError("there is no gradient norm before the first step()")
        return self._engine

    # ---------------------------------------------------------------- groups, copies, checkpoints

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check_l1(self.param_groups[-1])
        if getattr(self, "_engine", None) is not None:
            self._skipped_before = self.skipped_steps
            self._engine = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: getattr(self, key) for key in _CLIP_SETTINGS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.setdefault("l1", 0.0)
        for group in self.param_groups:
            group.setdefault("l1", self.defaults["l1"])
        self.__dict__.setdefault("_engine", None)

    def __repr__(self) -> str:
        clipping = ", ".join(f"{key}={getattr(self, key)!r}" for key in _CLIP_SETTINGS)
        return f"{super().__repr__()[:-1]}    clipping: {clipping}\n)"


def scalar(value: float | Tensor) -> float:
    """Return a hyper-parameter as a float; a tensor's value is fetched from its device."""
    return value.item() if isinstance(value, Tensor) else float(value)


def learning_rate(group: dict[str, Any]) -> tuple[float, Tensor | None]:
    """Split a group's learning rate into a float, and a tensor where it lives on a device and must stay there."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return 0.0, lr.detach() if lr.dtype in (torch.float32, torch.float64) else lr.detach().float()
    return scalar(lr), None


def _usable(found: Any, fresh: Any, key: str) -> Any:
    """Return a state that the engine can step: the one found, on the fresh one's device, or the fresh one."""
    if not torch.is_tensor(found):
        return torch.full_like(fresh, float(found)) if isinstance(found, (int, float)) else fresh
    dtype = torch.float32 if key == "step" else found.dtype
    return found.to(device=fresh.device, dtype=dtype)


def _check_l1(group: dict[str, Any]) -> None:
    if not group.get("l1", 0.0) >= 0.0:
        raise ValueError(f"Invalid l1 value: {group['l1']}")
