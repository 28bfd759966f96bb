"""Steps of one model by several processes: which sums are joined between measuring and updating, and what is reported.

DTensor parameters (FSDP2, HSDP, tensor parallel) need no setting: the engine steps the elements that this rank holds,
and the norm is joined over their meshes. `process_group=` joins ranks that hold different parameters. What is joined,
and what counts how often, stands in `gradfast.clip.reduction`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradfast.clip.reduction import Reduction, finish, is_dtensor
from gradfast.optim.callers import callers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Sharding:
    """The other processes, as one optimiser on this rank sees them.

    Args:
        parameters: those of the optimiser, DTensors or plain.
        names: what messages call them.
        replicated: of each, its group's option "replicated": see `gradfast.clip.reduction.Reduction`.
        process_group: ranks that hold other parameters of the same model, or `None`.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        replicated: Sequence[bool | None],
        process_group: ProcessGroup | None,
    ) -> None:
        self.names = names
        self.reduction = Reduction(parameters, names, process_group, replicated)
        self._sharded: list[tuple[Any, str]] = [(p, name) for p, name in zip(parameters, names) if is_dtensor(p)]
        self._stepped: list[int] = []  # indices of the parameters that had a gradient in the last step
        self._places: tuple[list[int], Tensor] | None = None
        self._total: Tensor | None = None
        # Of whole parameters. What each rank has of its own, under one name, is no part of anything.
        self._elements = torch.tensor(
            [p.numel() * (2 if p.is_complex() else 1) for p in parameters], dtype=torch.float64
        )
        own = [not is_dtensor(p) and copied is False for p, copied in zip(parameters, replicated)]
        self._own = torch.tensor(own) if any(own) else None

    def place_gradients(self) -> None:
        """Give every gradient the placements of its parameter, where backward left it partial or in other pieces."""
        for parameter, name in self._sharded:
            gradient = parameter.grad
            if gradient is None:
                continue
            # FSDP2 gives the gradient the parameter's own description; others an equal one, compared piece by piece
            # because that takes a tenth of the time of comparing DTensors' properties.
            wanted, found = parameter._spec, getattr(gradient, "_spec", None)
            if found is wanted:
                continue
            if found is None or (found.mesh is not wanted.mesh and found.mesh != wanted.mesh):
                raise ValueError(
                    f"gradfast: {name!r} is on {parameter.device_mesh}, and its gradient is not on that mesh"
                )
            if found.placements != wanted.placements:
                parameter.grad = gradient.redistribute(placements=wanted.placements)

    def join(self, engine: Any, norm_type: float, with_updates: bool = False) -> Tensor:
        """Return the sum of powers over the gradients of all ranks, from what `engine` measured of this one's.

        Args:
            engine: has measured.
            norm_type: of the sum.
            with_updates: join the squared updates that it measured beside them, for `update_means`.
        """
        updates = self._all_sums(engine.update_sums()) if with_updates and self.reduction.spans else None
        sums = self._all_sums(engine.member_sums())
        self._total = self.reduction.join(sums, norm_type == float("inf"), updates)
        return self._total

    def join_updates(self, engine: Any) -> None:
        """Join the squared updates that `engine` measured by themselves, for `update_means`."""
        if self.reduction.spans:
            self.reduction.join_added(self._all_sums(engine.update_sums()))

    def update_means(self, engine: Any) -> Tensor | None:
        """Return the mean squared update of each whole parameter; `None` where this rank holds whole ones alone."""
        joined = self.reduction.added
        if joined is None:
            return None
        if self._own is not None:
            self._own = self._own.to(joined.device)
            joined = torch.where(self._own, self._all_sums(engine.update_sums()), joined)
        self._elements = self._elements.to(joined.device)
        return joined / self._elements

    def _all_sums(self, measured: Sequence[tuple[list[int], Tensor]]) -> Tensor:
        """Put the sums of the devices' parameters in the parameters' places, zero for those without a gradient."""
        count = len(self.names)
        self._stepped = sorted(index for indices, _ in measured for index in indices)
        if len(measured) == 1 and len(self._stepped) == count:
            return measured[0][1]
        device = measured[0][1].device if count and measured else torch.device(self.reduction.device_type)
        sums = torch.zeros(count, dtype=torch.float64, device=device)
        for indices, values in measured:
            sums.index_copy_(0, self._index(indices, device), values.to(device))
        return sums

    def _index(self, indices: list[int], device: torch.device) -> Tensor:
        """Return `indices` on the device: the same tensor as last time if they are the same, so that nothing waits."""
        if self._places is None or self._places[0] != indices or self._places[1].device != device:
            self._places = (indices, torch.tensor(indices, device=device))
        return self._places[1]

    def grad_norms(self, norm_type: float, dtype: torch.dtype, loss_scale: Tensor | None) -> dict[str, Tensor]:
        """Return the norms of the whole parameters' gradients by name, of those that had one in the last step."""
        if self.reduction.sums is None:
            return {}
        norms = finish(self.reduction.sums, norm_type)
        if loss_scale is not None:
            norms = norms / loss_scale.to(norms.device, non_blocking=True)
        each = norms.to(dtype).unbind()
        return {self.names[index]: each[index] for index in self._stepped}

    def found_infinite(self) -> Tensor | None:
        """Return 1 where the last step's norm over all ranks was not finite, else 0: 0-d float32, nothing waits."""
        return None if self._total is None else (~torch.isfinite(self._total)).float()

    def first_nonfinite(self) -> str:
        """Name the first parameter whose gradient was not finite on any rank, "" if none. Waits for the device."""
        return self.reduction.first_nonfinite(self.names)


def sharding_of(
    parameters: Sequence[Tensor],
    names: Sequence[str],
    replicated: Sequence[bool | None],
    process_group: ProcessGroup | None,
) -> Sharding | None:
    """Return the other processes of an optimiser, or `None` where this one holds all of the model."""
    if process_group is None and not any(is_dtensor(parameter) for parameter in parameters):
        return None
    return Sharding(parameters, names, replicated, process_group)


def surrounding_group() -> ProcessGroup | None:
    """Return the process group of the `ZeroRedundancyOptimizer` that is constructing an optimiser now, if one is.

    It hands each rank's optimiser a part of the parameters and no word about the others. A norm over a part would clip
    each rank by another factor, silently; so its constructor is looked for among the callers.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return None
    for frame in callers():
        caller = frame.f_locals.get("self")
        if isinstance(caller, module.ZeroRedundancyOptimizer):
            return caller.process_group
    return None


def group_name(process_group: ProcessGroup | None) -> str | None:
    """Return what a process group is called in a pickle, which cannot hold it."""
    return None if process_group is None else process_group.group_name


def group_named(name: str | None) -> ProcessGroup | None:
    """Return the process group that a pickle meant."""
    if name is None:
        return None
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
