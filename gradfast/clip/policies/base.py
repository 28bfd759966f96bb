"""What all clip policies share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfast._load import native

MAX_POLICIES = 4  # of a chain: kMaxPolicies in csrc/rules/policy.h
PolicySettings = tuple[str, int, list[float]]  # a policy as csrc/binding/policy_chain.h takes it


class ClipResult(NamedTuple):
    """What `Policy.apply_` did, as 0-d tensors on the gradients' device."""

    norm: Tensor  # the global norm before clipping, float64
    coefficient: Tensor  # the factor that all gradients were multiplied with, float64
    skipped: Tensor  # bool: the gradients were set to zero


class Policy:
    """A rule that decides, from the global gradient norm and what it remembers, what to do with a step.

    Given to an optimiser as `clip=`, it is decided on the device in the launch of the step itself and costs no pass
    over the gradients. What it remembers belongs to the optimiser: a small float64 tensor, saved under `"clip_state"`
    of `state_dict()`. The norm that it sees is that of the true gradients: unscaled under mixed precision, and joined
    over all ranks, which therefore decide alike. A norm that is NaN or infinite never enters its memory.

    As a function, `apply_` clips gradients for any other optimiser; then the policy object remembers by itself.
    """

    norm_type: float = 2.0
    clips_each_parameter: bool = False  # by a norm of its own, on top of what holds for all
    clips_before_norm: bool = False  # single elements or units: see count_clipped
    element_limit: float = math.inf  # of Value
    unit_clipping: tuple[float, float] = (math.inf, 0.0)  # ratio and eps of AGC

    def __init__(self) -> None:
        self._memory: Tensor | None = None  # of apply_

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        raise NotImplementedError

    def program(self, parameters: int) -> list[PolicySettings]:
        """Return the policies to run in turn, for an optimiser of that many parameters."""
        raise NotImplementedError

    def by_units(self, names: Sequence[str], parameters: Sequence[Tensor]) -> list[bool]:
        """Say of each parameter whether `unit_clipping` is for its units.

        Raises:
            ValueError: it is, and the parameter is a DTensor of which a rank holds parts of units.
        """
        return [False] * len(parameters)

    def count_clipped(self, name: str, weight: Tensor, gradient: Tensor, loss_scale: Tensor | float) -> Tensor:
        """How many units of a gradient a policy that `clips_before_norm` will change: 0-d, nothing waits."""
        raise NotImplementedError

    def units(self, weight: Tensor) -> int:
        """How many units a parameter has to a policy that `clips_before_norm`."""
        raise NotImplementedError

    def decider(self, number: int) -> Policy:
        """The policy that the engine's report calls by that number."""
        return self

    @torch.no_grad()
    def apply_(self, parameters: Tensor | Iterable[Tensor | tuple[str, Tensor]]) -> ClipResult:
        """Clip the gradients of `parameters` in place. If the step is to be skipped, they become zero.

        Unlike `clip=` of an optimiser this reads the gradients twice and writes them once. Nothing waits for a GPU.

        Args:
            parameters: the same parameters, or `(name, parameter)` pairs, in the same order at every call; those
                without a gradient are left out. All gradients must be on one device.
        """
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        listed = [each if isinstance(each, Tensor) else each[1] for each in given]
        names = ["" if isinstance(each, Tensor) else each[0] for each in given]
        numbers = [number for number, parameter in enumerate(listed) if parameter.grad is not None]
        gradients = [listed[number].grad for number in numbers]
        if not gradients:
            raise ValueError("gradfast: there is no gradient to clip: call backward() before apply_()")
        by_units = self.by_units(names, listed)
        weights = [listed[number].detach() if by_units[number] else None for number in numbers]
        chain = native.PolicyChain(self.program(len(listed)))
        device = gradients[0].device  # type: ignore[union-attr]
        if self._memory is None or self._memory.numel() != chain.state_size:
            self._memory = torch.zeros(chain.state_size, dtype=torch.float64)
        self._memory = self._memory.to(device)
        settings = native.StepSettings()
        settings.norm_type, settings.policies, settings.policy_state = self.norm_type, chain, self._memory
        settings.element_limit = self.element_limit
        settings.unit_clipping, settings.unit_eps = self.unit_clipping
        return ClipResult(*native.clip_by_policies_(gradients, weights, numbers, settings))

    def state_dict(self) -> dict[str, Any]:
        """Return what `apply_` remembers."""
        return {"policy": repr(self), "memory": None if self._memory is None else self._memory.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what another policy of the same settings remembered."""
        if state["policy"] != repr(self):
            raise ValueError(f"gradfast: this state belongs to {state['policy']}, not to {self!r}")
        self._memory = None if state["memory"] is None else state["memory"].clone()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.settings() == other.settings()

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.settings().items())})"


def check_positive(policy: str, **values: float) -> None:
    """Raise ValueError unless every value is a positive, finite number."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"Invalid {name} of {policy}: {value}; it must be positive and finite")


def check_window(policy: str, name: str, window: int) -> None:
    """Raise ValueError for a window that holds no statistic, or does not fit."""
    if not (isinstance(window, int) and 2 <= window <= 1_000_000):
        raise ValueError(f"Invalid {name} of {policy}: {window!r}; it must be a whole number from 2 to 1000000")
