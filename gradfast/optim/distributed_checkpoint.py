"""An optimiser in `torch.distributed.checkpoint`: what its helpers ask of it, and what they leave out."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradfast.optim.callers import callers

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    from gradfast.optim.base import ClippedOptimizer

_HELPERS = "torch.distributed.checkpoint.state_dict"


def wants_states_alone(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that an optimiser without any state is asked for is torch's way to get its states made.

    `get_optimizer_state_dict` and `set_optimizer_state_dict` let an optimiser without any state do a step with
    gradients of zero at a learning rate of zero. To torch's optimisers that is a first step: it counts, and decay
    enters the momentum. To a clip policy it is a sample.
    """
    rates = [group.get("lr") for group in optimizer.param_groups]
    if not all(isinstance(rate, Tensor) or rate == 0 for rate in rates):  # a tensor's value would be waited for
        return False
    return called_by_helpers()


def called_by_helpers() -> bool:
    """Whether torch's state-dict helpers are among the callers; wrappers of a step or a `state_dict` may be between."""
    if _HELPERS not in sys.modules:
        return False
    return any(frame.f_globals.get("__name__") == _HELPERS for frame in callers())


class OptimizerState:
    """All that a checkpoint needs of a gradfast optimiser, as `torch.distributed.checkpoint` saves and loads it.

        state = {"model": get_model_state_dict(model), "optimizer": gradfast.optim.OptimizerState(model, optimizer)}
        dcp.save(state, checkpoint_id=path)

        dcp.load(state, checkpoint_id=path)                  # of the new model and optimiser: the latter is done
        set_model_state_dict(model, state["model"])

    It is what torch's `get_optimizer_state_dict` returns, which knows the keys of torch's optimisers alone, and under
    "clip_state" what the clip policies remember. So torch's helpers and optimisers read such a checkpoint, too; and one
    without "clip_state" is read by `set_optimizer_state_dict`, from which policies begin anew. What policies remember
    of single parameters (`AdaGC`) is saved by the parameters' names: the ranks of a pipeline each save their own.

    Args:
        model: whose parameters the optimiser has.
        optimizer: one of gradfast's.
        options: for torch's helpers, such as `StateDictOptions(flatten_optimizer_state_dict=True)` for pipelines.

    Raises:
        TypeError: the optimiser is not one of gradfast's.
        ValueError: `options` ask for whole tensors on one rank, which this class is not for.
    """

    def __init__(self, model: nn.Module, optimizer: ClippedOptimizer, options: StateDictOptions | None = None) -> None:
        if not hasattr(optimizer, "grad_norms"):
            raise TypeError(
                f"OptimizerState needs an optimiser of gradfast, got {type(optimizer).__name__}: for torch's there is "
                "get_optimizer_state_dict"
            )
        if options is not None and (options.full_state_dict or options.broadcast_from_rank0):
            raise ValueError(
                "OptimizerState saves what each rank holds: leave out full_state_dict and broadcast_from_rank0"
            )
        self.model, self.optimizer, self.options = model, optimizer, options

    def state_dict(self) -> dict[str, Any]:
        """Return what torch's `get_optimizer_state_dict` does, and under "clip_state" the policies' memory."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        states: dict[str, Any] = get_optimizer_state_dict(self.model, self.optimizer, options=self.options)
        policies = self.optimizer._policy_state
        if policies is not None:
            saved = policies.state_dict()
            shared, each = policies.split(saved["values"])
            names = self._names(states) if len(each) else []
            states["clip_state"] = {
                "policy": saved["policy"],
                "shared": shared,
                "parameters": dict(zip(names, each.unbind(), strict=True)),
            }
        return states

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the optimiser what was saved; policies begin anew where `state_dict` has no "clip_state"."""
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        states = {key: value for key, value in state_dict.items() if key != "clip_state"}
        given = state_dict.get("clip_state")
        if given is None or self.optimizer._policy_state is None:
            set_optimizer_state_dict(self.model, self.optimizer, states, options=self.options)
            return
        values = torch.cat([given["shared"], *(value.reshape(1) for value in given["parameters"].values())])
        clip_state = {"policy": given["policy"], "values": values}
        # The helpers hand the optimiser nothing but torch's keys.
        hook = self.optimizer.register_load_state_dict_pre_hook(lambda _, loaded: {**loaded, "clip_state": clip_state})
        try:
            set_optimizer_state_dict(self.model, self.optimizer, states, options=self.options)
        finally:
            hook.remove()

    def _names(self, states: dict[str, Any]) -> list[str]:
        """The parameters' names in the order of the optimiser."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        groups: Any = states.get("param_groups")
        if groups is None:  # they are flattened
            groups = get_optimizer_state_dict(self.model, self.optimizer)["param_groups"]
        return [name for group in groups for name in group["params"]]
