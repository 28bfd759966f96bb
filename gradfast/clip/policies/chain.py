"""Policies one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gradfast.clip.policies.base import MAX_POLICIES, Policy, PolicySettings

_ELEMENTS, _UNITS, _NORM = range(3)  # what policies act on, in their order


class Chain(Policy):
    """Applies policies in turn, up to four beside `Value` and `AGC`: each sees the norm that those before let through.

        Chain(SkipSpikes(), ZClip(), GlobalNorm(1.0))

    A step that one of them skips is over: the policies behind it never hear of it. All share one `norm_type`, that of
    the `GlobalNorm` among them, if there is one.
    """

    def __init__(self, *policies: Policy) -> None:
        super().__init__()
        self.policies: tuple[Policy, ...]
        flat: list[Policy] = []
        for policy in policies:
            if not isinstance(policy, Policy):
                raise TypeError(f"Chain takes clip policies such as GlobalNorm(1.0), got {policy!r}")
            flat.extend(policy.policies if isinstance(policy, Chain) else [policy])
        self._first = tuple(policy for policy in flat if policy.clips_before_norm)
        self._deciding = tuple(policy for policy in flat if not policy.clips_before_norm)
        if not flat or len(self._deciding) > MAX_POLICIES:
            raise ValueError(f"Chain takes 1 to {MAX_POLICIES} policies beside Value and AGC, got {len(flat)} in all")
        places = [_place_of(policy) for policy in flat]
        if places != sorted(places) or places.count(_ELEMENTS) > 1 or places.count(_UNITS) > 1:
            raise ValueError(
                "a Chain takes at most one Value, which clamps elements, then at most one AGC, which clips the units "
                f"of what that leaves, then the policies that decide by the norm; got {flat}"
            )
        for policy in flat[:-1]:
            if policy.clips_each_parameter:
                raise ValueError(f"{policy!r} clips each parameter by itself and must stand last in a Chain")
        norm_types = {policy.norm_type for policy in flat if "norm_type" in policy.settings()}
        if len(norm_types) > 1:
            raise ValueError(f"one norm is measured a step, but the policies ask for norm_type {sorted(norm_types)}")
        self.policies = tuple(flat)
        self.clips_each_parameter = flat[-1].clips_each_parameter
        self.clips_before_norm = bool(self._first)
        self.element_limit = min(policy.element_limit for policy in flat)
        self.unit_clipping = min(policy.unit_clipping for policy in flat)  # where there is none the ratio is infinite
        self.norm_type = norm_types.pop() if norm_types else 2.0
        if _UNITS in places and self.norm_type != 2.0:
            raise ValueError(f"AGC measures 2-norms, and so does the step then; got norm_type={self.norm_type}")

    def settings(self) -> dict[str, Any]:
        return {"policies": self.policies}

    def program(self, parameters: int) -> list[PolicySettings]:
        return [settings for policy in self.policies for settings in policy.program(parameters)]

    def by_units(self, names: Sequence[str], parameters: Sequence[Tensor]) -> list[bool]:
        return [any(taken) for taken in zip(*(policy.by_units(names, parameters) for policy in self.policies))]

    def count_clipped(self, name: str, weight: Tensor, gradient: Tensor, loss_scale: Tensor | float) -> Tensor:
        """Of the first policy that clips before the norm; what it leaves to the next is not known before."""
        return self._first[0].count_clipped(name, weight, gradient, loss_scale)

    def units(self, weight: Tensor) -> int:
        return self._first[0].units(weight)

    def decider(self, number: int) -> Policy:
        return self._deciding[number]

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.policies))})"


def _place_of(policy: Policy) -> int:
    if policy.unit_clipping[0] < math.inf:
        return _UNITS
    return _ELEMENTS if policy.clips_before_norm else _NORM
