"""What an optimiser's clip policies remember: one small tensor, kept where the parameters are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradfast._load import native
from gradfast.clip.policies import Policy

_log = logging.getLogger("gradfast")


class PolicyState:
    """The state of one optimiser's policies, all zero at first.

    The kernels write it, on the device and in the launch of the step: here it is only kept, moved and saved.
    """

    def __init__(self, policy: Policy, parameters: int) -> None:
        self.policy, self.parameters = policy, parameters
        self.chain: Any = native.PolicyChain(policy.program(parameters))
        self.values = torch.zeros(self.chain.state_size, dtype=torch.float64)

    def grow_to(self, parameters: int) -> None:
        """Make room for the parameters of a group added later; what is remembered of each stands last."""
        if parameters == self.parameters:
            return
        self.parameters = parameters
        self.chain = native.PolicyChain(self.policy.program(parameters))
        values = torch.zeros(self.chain.state_size, dtype=torch.float64, device=self.values.device)
        kept = min(len(values), len(self.values))
        values[:kept] = self.values[:kept]
        self.values = values

    def check_devices(self, parameters: Sequence[Tensor]) -> None:
        """Raise where single parameters are remembered on a device that cannot see them: there is one memory."""
        devices = sorted({str(parameter.device) for parameter in parameters})
        if len(devices) > 1 and len(self.split(self.values)[1]):
            raise NotImplementedError(
                f"gradfast: {self.policy!r} remembers every parameter, and takes parameters on one device alone, but "
                f"they are on {', '.join(devices)}; make an optimiser for each device, or take another policy"
            )

    def give_to(self, settings: Any, device: torch.device) -> None:
        """Hand chain and state to the engine's settings of a step; the state moves with the parameters."""
        if self.values.device != device:
            self.values = self.values.to(device)
        settings.policies, settings.policy_state = self.chain, self.values
        settings.element_limit = self.policy.element_limit
        settings.unit_clipping, settings.unit_eps = self.policy.unit_clipping

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Split a state into what is remembered of the whole, and the values of single parameters, in their order."""
        shared = native.PolicyChain(self.policy.program(0)).state_size
        return values[:shared], values[shared:]

    def state_dict(self) -> dict[str, Any]:
        return {"policy": repr(self.policy), "values": self.values.clone()}

    def load_state_dict(self, saved: dict[str, Any] | None) -> None:
        """Take over what was saved; begin anew where nothing was, or by another policy."""
        self.values = torch.zeros_like(self.values)
        if saved is None:
            if len(self.values):
                _log.warning(
                    "%r begins anew: what is loaded says nothing of clip policies. torch.distributed.checkpoint's "
                    "helpers leave their state out; gradfast.optim.OptimizerState saves and loads it, too",
                    self.policy,
                )
            return
        if saved["policy"] != repr(self.policy):
            _log.warning("%r begins anew: the checkpoint holds the state of %s", self.policy, saved["policy"])
            return
        if saved["values"].numel() != self.values.numel():
            _log.warning(
                "%r begins anew: the checkpoint holds its state for another number of parameters than %d",
                self.policy,
                self.parameters,
            )
            return
        self.values.copy_(saved["values"])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "chain"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.chain = native.PolicyChain(self.policy.program(self.parameters))
