"""What an optimiser's step leaves behind, as tensors on the device: gradient norms a step, the rest at samples.

Of sharded parameters everything is of the whole, the same on all ranks: the gradients' norms come out of the step so,
and a sample's sums are joined by one small all-reduce for each process group.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gradfast.clip.policies import Policy
from gradfast.clip.reduction import Reduction, spans_ranks
from gradfast.monitor.window import StepNorms
from gradfast.optim.clipping import group_limits
from gradfast.optim.report import StepReport


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: of a DTensor its local part, of others all."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local.detach()


class Source:
    """Reads an optimiser, ours or torch's.

    gradfast's own leaves norm, clip coefficient and per-parameter sums behind in every step, before clipping. Of
    another the gradients are measured after the step, and only at samples; clipped ones are what it then sees.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module | None) -> None:
        self.optimizer = optimizer
        self.native = isinstance(optimizer, StepReport)
        known = {id(parameter): name for name, parameter in model.named_parameters()} if model is not None else {}
        self.parameters: list[Tensor] = []
        self.names: list[str] = []
        self.group_indices: list[range] = []
        for number, group in enumerate(optimizer.param_groups):
            given = group.get("param_names")
            for position, parameter in enumerate(group["params"]):
                fallback = given[position] if given else f"param_groups[{number}]['params'][{position}]"
                self.parameters.append(parameter)
                self.names.append(known.get(id(parameter), fallback))
            self.group_indices.append(range(len(self.names) - len(group["params"]), len(self.names)))
        if not self.parameters:
            raise ValueError("the optimiser has no parameters to monitor")
        self.device = self.parameters[0].device
        self.power = float(getattr(optimizer, "norm_type", 2.0))
        clip = getattr(optimizer, "clip", None) if self.native else None
        self.by_parameter: Policy | None = clip if clip is not None and clip.clips_each_parameter else None
        self.before_norm: Policy | None = clip if clip is not None and clip.clips_before_norm else None
        self.limited = self.native and any(group.get("max_norm") is not None for group in optimizer.param_groups)
        self.replicated = [group.get("replicated") for group in optimizer.param_groups for _ in group["params"]]
        self._reductions: dict[int, Reduction] = {}

    @property
    def chain(self) -> Any:
        """The native chain of the optimiser's policies."""
        return self.optimizer._policy_state.chain  # type: ignore[attr-defined]

    # ---------------------------------------------------------------- at every step

    def memory(self) -> Tensor:
        """What a policy that clips each parameter remembers now, before the step; empty where there is none."""
        state = self.optimizer._policy_state if self.by_parameter is not None else None  # type: ignore[attr-defined]
        if state is None:
            return torch.zeros(0, dtype=torch.float64, device=self.device)
        values: Tensor = state.values.to(self.device, copy=True)
        return values

    def every_step(self, memory: Tensor) -> StepNorms | None:
        """Norms of the step just done, copies on the device; None where measuring them would cost a pass."""
        if not self.native:
            return None
        optimizer: Any = self.optimizer
        engine = optimizer._engine
        limits = group_limits(optimizer.param_groups, optimizer.max_norm) if optimizer._has_group_limits else ()
        sums = self._sums(optimizer, engine)
        return StepNorms(engine.grad_norm().double(), engine.coefficient().double(), sums, memory, limits)

    def _sums(self, optimizer: Any, engine: Any) -> Tensor:
        if optimizer._sharding is not None:  # of whole parameters, the same on all ranks
            joined: Tensor = optimizer._sharding.reduction.sums
            return joined.clone()
        parts = engine.member_sums()
        if len(parts) == 1 and len(parts[0][0]) == len(self.parameters):
            every: Tensor = parts[0][1]  # each parameter has a gradient, on one device: nothing to sort
            return every
        sums = torch.zeros(len(self.parameters), dtype=torch.float64, device=self.device)
        for indices, values in parts:
            places = torch.tensor(indices).to(self.device, non_blocking=True)  # torch.tensor(device=) would wait
            sums[places] = values.to(self.device, non_blocking=True)
        return sums

    # ---------------------------------------------------------------- at samples

    @torch.no_grad()
    def measured(self, memory: Tensor) -> StepNorms:
        """As `every_step`, by a pass over the gradients."""
        gradients = [own_part(p if p.grad is None else p.grad) for p in self.parameters]
        there = torch.tensor([p.grad is not None for p in self.parameters]).to(self.device, non_blocking=True)
        sums = self._joined(self._squares(gradients) * there)
        return StepNorms(sums.sum().sqrt(), torch.full_like(sums[0], math.nan), sums, memory)

    @torch.no_grad()
    def copies(self) -> list[Tensor]:
        return [own_part(parameter).clone() for parameter in self.parameters]

    @torch.no_grad()
    def unclipped(self) -> list[Tensor]:
        """Two [n] tensors, for a policy that clips before the norm: sums of squares before it, and units it clips.

        It is a pass over weights and gradients of its own. Empty where no policy does.
        """
        if self.before_norm is None:
            return []
        scale = getattr(self.optimizer, "grad_scale", None)
        squares, counts = [], []
        for name, parameter in zip(self.names, self.parameters):
            gradient = torch.zeros(()) if parameter.grad is None else own_part(parameter.grad)
            s = 1.0 if scale is None else torch.as_tensor(scale, device=gradient.device)
            square = torch.linalg.vector_norm(gradient, dtype=torch.float64).square() / s**2
            count = (
                square * 0
                if parameter.grad is None
                else self.before_norm.count_clipped(name, own_part(parameter), gradient, s)
            )
            squares.append(square.to(self.device))
            counts.append(count.to(self.device, torch.float64))
        return [torch.stack(squares), torch.stack(counts)]

    @torch.no_grad()
    def sample(self, before: list[Tensor], grad_norm: Tensor, unclipped: list[Tensor]) -> Tensor:
        """Rows of [n], one behind the other, in one tensor.

        They are sums of squares of the parameters and of their change, how many elements of each gradient are not
        finite, and what `unclipped` returned.

        The gradients are read for that unless `grad_norm`, of all of them, is known on the host to be finite.

        Args:
            before: copies of the parameters from before the step; overwritten.
        """
        parameters = [own_part(parameter) for parameter in self.parameters]
        squares = self._squares(parameters)
        torch._foreach_sub_(before, parameters)
        changes, bad = self._squares(before), torch.zeros_like(squares)
        if grad_norm.device.type != "cpu" or not math.isfinite(grad_norm.item()):
            nothing = torch.zeros((), device=self.device)
            gradients = [nothing if p.grad is None else own_part(p.grad) for p in self.parameters]
            bad = torch.stack([(~torch.isfinite(g)).sum().to(self.device, torch.float64) for g in gradients])
        return self._joined(torch.cat([squares, changes, bad, *unclipped]))

    def _joined(self, sums: Tensor) -> Tensor:
        """Sums over whole parameters from those over this rank's parts, in rows of one a parameter."""
        if not spans_ranks(self.parameters):
            return sums
        rows = len(sums) // len(self.parameters)
        if rows not in self._reductions:
            given = self.parameters * rows, self.names * rows, None, self.replicated * rows
            self._reductions[rows] = Reduction(*given)
        reduction = self._reductions[rows]
        reduction.join(sums, infinity=False)
        assert reduction.sums is not None
        return reduction.sums

    def _squares(self, tensors: list[Tensor]) -> Tensor:
        short = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
        norms = torch._foreach_norm(tensors, 2, dtype=torch.float32 if short else None)
        return torch.stack([norm.to(self.device, torch.float64) for norm in norms]).square()
