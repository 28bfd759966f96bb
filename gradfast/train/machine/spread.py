"""How a model lies on the processes of a run: whole in one, a copy on each (DDP), or a shard on each (FSDP2).

Whichever it is, a step of N processes is the step that one process would take on the whole batch: each weighs its
part's mean loss by the part's share, and gradients are averaged. Checkpoints hold whole tensors, so that a run goes on
in another way and on another number of processes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradfast.clip.reduction import is_dtensor, whole_tensor
from gradfast.errors import UserError
from gradfast.nn.sync_norm import SyncBatchNorm
from gradfast.train.machine.processes import World
from gradfast.train.tasks.task import AnyBatch, Objective


class Spread:
    """A model on one process, and what the others add.

    Attributes:
        model: names the parameters, and is measured.
        module: what a training step calls.
        kind: what ``--parallel`` calls it.
        sharded: whether every call of `model` needs all processes.
    """

    kind = "none"
    sharded = False

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model = self.module = model
        self.world = world
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.separate_norms = [norm for norm in norms if not isinstance(norm, (SyncBatchNorm, nn.SyncBatchNorm))]

    def fewest(self, objective: Objective) -> int:
        """How many images this process needs of a batch."""
        return objective.fewest if self.separate_norms else 1

    def weigh(self, batches: Sequence[AnyBatch], objective: Objective) -> tuple[list[tuple[AnyBatch, float]], int]:
        """The batches to learn from, each with a factor on its loss, and how many images all processes have of them.

        The factor makes the mean of the processes' gradients the gradient of the whole batch's mean loss: for N
        processes, whose parts' losses are means over weights w_r, it is w_r N / sum_r w_r.
        """
        usable = [batch for batch in batches if batch.size >= self.fewest(objective)]
        return [(batch, 1.0) for batch in usable], sum(batch.size for batch in usable)

    def synchronising(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around the forward and backward pass of a batch: only the last of a step sends gradients."""
        return contextlib.nullcontext()

    def join(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """The losses (0-d) of the whole batches, from those of the parts, already weighted; after the last backward."""
        return list(losses)

    def see_what_learns(self) -> None:
        """Take note that parameters may have begun or ceased to require gradients."""

    def add(self, model: nn.Module) -> None:
        """Let another model, such as a moving average, lie as this one does."""

    def whole(self, state: Any) -> Any:
        """A state with whole tensors in the place of shards; on the main process, and of use only there."""
        return state

    def like(self, state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
        """The state of a model, of whole tensors, as this process's copy or shard of it takes it."""
        return state

    def like_optimizer(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The same of an optimiser's state."""
        return state


class _Several(Spread):
    """What copies and shards have in common."""

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__(model, world)
        pairs = [(norm.running_mean, norm.running_var) for norm in self.separate_norms if norm.track_running_stats]
        self.statistics = [statistic for pair in pairs for statistic in pair if statistic is not None]

    def weigh(self, batches: Sequence[AnyBatch], objective: Objective) -> tuple[list[tuple[AnyBatch, float]], int]:
        """Besides: all processes come to the same batches, so that their exchanges match, and agree whether to stop.

        A process that has nothing to learn from of a batch gets it emptied, with a factor of 0.
        """
        batches = [batch if batch.size >= self.fewest(objective) else batch.emptied() for batch in batches]
        weights = [objective.weight(batch) for batch in batches]
        totals = self.world.total([*weights, *(batch.size for batch in batches)])
        images = totals[len(batches) :]
        learnt = [
            (batch, weight * self.world.size / total if total else 0.0)
            for batch, weight, total, count in zip(batches, weights, totals, images)
            if count
        ]
        return learnt, round(sum(images))

    @torch.no_grad()
    def join(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """Besides, average the running statistics of norms that see their own part alone.

        They are linear in what each step measured, so that all processes have the same at every step, and a checkpoint
        of the main process is one of all.
        """
        tensors = [*self.statistics, *losses]
        joined = self.world.add_up(torch.cat([tensor.reshape(-1) for tensor in tensors])) / self.world.size
        pieces = joined.split([tensor.numel() for tensor in tensors])
        for statistic, piece in zip(self.statistics, pieces):
            statistic.copy_(piece)
        return [piece[0].to(loss.dtype) for piece, loss in zip(pieces[len(self.statistics) :], losses)]


class Replicated(_Several):
    """A copy on each process: DistributedDataParallel."""

    kind = "ddp"

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__(model, world)
        self.learning: list[bool] = []
        self.see_what_learns()

    def see_what_learns(self) -> None:
        """DistributedDataParallel awaits the gradients that were required when it was made: make it anew."""
        learning = [parameter.requires_grad for parameter in self.model.parameters()]
        if learning == self.learning:
            return
        self.learning = learning
        self.module = self.model  # lets go of the one before, and of its hooks
        device = next(self.model.parameters()).device
        wrapper: Any = nn.parallel.DistributedDataParallel
        newer = "forward_sync_buffers" in inspect.signature(wrapper).parameters  # torch 2.14
        self.module = wrapper(
            self.model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **{"forward_sync_buffers" if newer else "broadcast_buffers": False},  # `join` keeps buffers equal
        )

    def synchronising(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self.module.no_sync()  # type: ignore[operator]


class Sharded(_Several):
    """A shard on each process, a residual block or the like at a time: FSDP2.

    Parameters that are single numbers, such as Fixup's, cannot be cut: each process has all of them, and `join`
    averages their gradients.
    """

    kind = "fsdp"
    sharded = True

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__(model, world)
        self.numbers = [parameter for parameter in model.parameters() if parameter.dim() == 0]
        self.add(model)

    def add(self, model: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        for tensor in (*model.parameters(), *model.buffers()):
            distributed.broadcast(tensor.detach(), src=0)
        mesh = init_device_mesh(next(model.parameters()).device.type, (self.world.size,))
        numbers = {parameter for parameter in model.parameters() if parameter.dim() == 0}
        # Shards after the forward pass, too: what is measured or saved between steps is then always sharded.
        for block in (*blocks_of(model), model):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=numbers)

    def synchronising(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext()

    @torch.no_grad()
    def join(self, losses: Sequence[Tensor]) -> list[Tensor]:
        gradients = [parameter.grad for parameter in self.numbers if parameter.grad is not None]
        if gradients:
            means = self.world.add_up(torch.stack(gradients)) / self.world.size
            for gradient, mean in zip(gradients, means):
                gradient.copy_(mean)
        return super().join(losses)

    def whole(self, state: Any) -> Any:
        if isinstance(state, Mapping):
            return {name: self.whole(value) for name, value in state.items()}
        if isinstance(state, (list, tuple)):
            return type(state)(self.whole(value) for value in state)
        if not is_dtensor(state):
            return state
        gathered = whole_tensor(state)  # every process takes part in it, one tensor after the other
        return gathered.cpu() if self.world.is_main else None

    def like(self, state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
        own = model.state_dict()
        return {name: shard(value, own.get(name)) for name, value in state.items()}

    def like_optimizer(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = {
            index: {name: shard(value, parameters[index]) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        return {**state, "state": states}


def shard(value: Any, like: Any) -> Any:
    """Of a whole tensor, what `like`, a DTensor of its shape, holds of it here; anything else as it is."""
    if not (is_dtensor(like) and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The parts that are gathered and freed one after the other: the outermost blocks that stand in a row.

    These are the members of a Sequential or ModuleList that have layers of their own, such as ResNet's residual blocks
    and a transformer's encoder blocks.
    """
    blocks: list[nn.Module] = []
    for child in model.children():
        if isinstance(model, (nn.Sequential, nn.ModuleList)) and is_block(child):
            blocks.append(child)
        else:
            blocks += blocks_of(child)
    return blocks


def is_block(module: nn.Module) -> bool:
    in_a_row = isinstance(module, nn.Sequential) and any(is_block(child) for child in module.children())
    return not in_a_row and any(True for _ in module.children()) and any(True for _ in module.parameters())


def choose_kind(wanted: str, world: World, was_given: bool = True) -> str:
    """What ``--parallel`` comes to.

    Args:
        was_given: whether it was asked for now, not by the run that is resumed.

    Raises:
        UserError: it needs several processes and there is one, or the reverse.
    """
    if world.size == 1:
        if wanted in ("ddp", "fsdp") and was_given:
            raise UserError(
                f"--parallel {wanted} needs several processes: torchrun --nproc_per_node=2 -m gradfast train ..."
            )
        return "none"
    if wanted == "none":
        raise UserError(
            f"--parallel none with {world.size} processes would train {world.size} times the same; leave it out"
        )
    return "ddp" if wanted == "auto" else wanted


def spread(kind: str, model: nn.Module, world: World) -> Spread:
    """Lay a model out over the processes as "none", "ddp" or "fsdp" says."""
    return next(way for way in (Spread, Replicated, Sharded) if way.kind == kind)(model, world)
