"""Parameters and optimiser states in 16 bits: what is kept in fp32, what is rounded by chance, and how it is saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gradfast.optim.distributed_checkpoint import called_by_helpers
from gradfast.optim.rule_settings import RuleSettings

MASTER = "master_param"  # key of a parameter's fp32 master in its state

_NARROW = (torch.float16, torch.bfloat16)
_STATE_DTYPES = (None, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Precision:
    """How 16-bit parameters and the optimiser's state are kept. Every optimiser of gradfast takes these by keyword.

    Parameters of 32 bits and more need neither masters nor rounding by chance, and get none: a model may mix them.

    Attributes:
        master_weights: keep an fp32 master of every 16-bit parameter in the state, as `"master_param"`. The rule works
            on the master; the parameter is the master rounded to nearest, written in the same pass. States are fp32
            unless `state_dtype` says otherwise.
        stochastic_rounding: no masters: a 16-bit parameter is rounded up or down by chance, so that its expectation is
            the exact result and updates below half a unit of the last place are not lost (Gupta et al. 2015). States
            are fp32 unless `state_dtype` says otherwise.
        state_dtype: `torch.float32` or `torch.bfloat16`, of all states of parameters of 32 bits and less; `None`: fp32
            with one of the two options above, else the parameter's own dtype, as in torch. bf16 states are rounded by
            chance: to nearest, a second moment with beta2 = 0.999 could rise but never fall.
        rounding_seed: of the random bits. They are a function of this seed, the parameter's number in the optimiser,
            its number of updates and the element, so that a run is reproducible and data-parallel replicas agree.

    Raises:
        ValueError: both `master_weights` and `stochastic_rounding`, another `state_dtype`, or a seed out of range.
    """

    master_weights: bool = False
    stochastic_rounding: bool = False
    state_dtype: torch.dtype | None = None
    rounding_seed: int = 0

    def __post_init__(self) -> None:
        if self.master_weights and self.stochastic_rounding:
            raise ValueError(
                "master_weights and stochastic_rounding exclude each other: with fp32 masters nothing is lost in "
                "rounding; choose one"
            )
        if self.state_dtype not in _STATE_DTYPES:
            raise ValueError(
                f"Invalid state_dtype value: {self.state_dtype}; use torch.float32, torch.bfloat16 or None"
            )
        if not 0 <= self.rounding_seed < 2**63:
            raise ValueError(f"Invalid rounding_seed value: {self.rounding_seed}; it must be in [0, 2**63)")

    @property
    def is_default(self) -> bool:
        """True if everything is as in torch.optim."""
        return not (self.master_weights or self.stochastic_rounding or self.state_dtype)

    def apply(self, settings: Any) -> None:
        """Write what the engine must know into its `StepSettings`."""
        settings.parameters_by_chance = self.stochastic_rounding
        settings.states_by_chance = self.state_dtype is torch.bfloat16
        settings.rounding_seed = self.rounding_seed

    def keeps_master(self, parameter: Tensor) -> bool:
        return self.master_weights and parameter.dtype in _NARROW

    def dtype_of_states(self, parameter: Tensor) -> torch.dtype:
        if self.is_default or parameter.dtype not in (torch.float32, *_NARROW):
            return parameter.dtype
        return self.state_dtype or torch.float32

    def settings_of(self, group: RuleSettings) -> RuleSettings:
        """Tell the engine of masters, by one more name of a state, and that random bits need a count of updates."""
        if self.master_weights:
            group = group._replace(states=[*group.states, MASTER])
        return group._replace(counted=True) if self._counts_updates else group

    # ---------------------------------------------------------------- states

    def fresh_state(self, parameter: Tensor, fresh: dict[str, Any]) -> dict[str, Any]:
        """Return `fresh`, a parameter's state as the optimiser would make it, in these dtypes and with a master."""
        if self.is_default:
            return fresh
        dtype = self.dtype_of_states(parameter)
        state = {key: value if key == "step" else value.to(dtype) for key, value in fresh.items()}
        if self._counts_updates:
            state.setdefault("step", torch.zeros((), dtype=torch.float32, device=parameter.device))
        if self.keeps_master(parameter):
            state[MASTER] = parameter.detach().float()
        return state

    @property
    def _counts_updates(self) -> bool:
        """The random bits depend on the number of updates, which must then be in every checkpoint."""
        return self.stochastic_rounding or self.state_dtype is torch.bfloat16

    # ---------------------------------------------------------------- checkpoints

    def save(self, packed: dict[str, Any]) -> dict[str, Any]:
        """Return a `state_dict()` with states of fp32, and without momentum that no step has filled yet."""
        if self.is_default:
            return packed
        state = {index: _saved(entries) for index, entries in packed["state"].items()}
        return {**packed, "state": state}

    def load(self, optimizer: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
        """Put states back as they were saved, where torch's `load_state_dict` cast them to the parameter's dtype."""
        saved = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        for index, parameter in zip(saved, parameters):
            entries = loaded["state"].get(index)
            if entries:
                self._load_entries(optimizer.state[parameter], entries, parameter)

    def adopt(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Bring states that another optimiser made into these dtypes, in place."""
        if self.is_default:
            return
        for parameter, entries in state.items():
            if entries:
                self._load_entries(entries, dict(entries), parameter)

    def _load_entries(self, state: dict[str, Any], saved: dict[str, Any], parameter: Tensor) -> None:
        keeps_master = self.keeps_master(parameter)
        if not keeps_master:
            state.pop(MASTER, None)
        if self.is_default:
            return
        dtype = self.dtype_of_states(parameter)
        for key, value in saved.items():
            if key == "step" or not (torch.is_tensor(value) and value.is_floating_point()):
                continue
            if key != MASTER:
                state[key] = value.to(device=parameter.device, dtype=dtype)
            elif keeps_master:
                state[key] = value.to(device=parameter.device, dtype=torch.float32)
        if self._counts_updates and any(torch.is_tensor(value) for value in state.values()):
            # A checkpoint of torch.optim.SGD counts no updates; a buffer that is there has had one at least.
            state.setdefault("step", torch.ones((), dtype=torch.float32, device=parameter.device))

    def __repr__(self) -> str:
        changed = {key: value for key, value in asdict(self).items() if value != getattr(Precision, key)}
        return ", ".join(f"{key}={value!r}" for key, value in changed.items())


def _saved(entries: Any) -> Any:
    if not isinstance(entries, dict):
        return entries
    saved = {
        key: value.float() if torch.is_tensor(value) and value.dtype in _NARROW else value
        for key, value in entries.items()
    }
    momentum, step = saved.get("momentum_buffer"), saved.get("step")
    if torch.is_tensor(momentum) and torch.is_tensor(step) and step == 0 and not called_by_helpers():
        saved["momentum_buffer"] = None  # so that torch's dampening, too, starts with the first update
    return saved
