"""Who steps: gradfast, and each way to clip and step without it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import gradfast
from gradfast.bench.reference_lion import ReferenceLion
from gradfast.extras import first_line

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    "Adam": {"lr": 1e-3, "weight_decay": 1e-4},
    "AdamW": {"lr": 1e-3, "weight_decay": 1e-2},
    "Lion": {"lr": 1e-4, "weight_decay": 1e-1},
}


class Unavailable(Exception):  # noqa: N818  nothing went wrong
    """A peer that cannot take part here; the message says why."""


class Contender:
    """One way to do a step on parameters of its own. `step` is what is timed."""

    clips = True
    exact_settings = True  # false: beta, lr and the rest are rounded to float32 before anything is computed with them

    def __init__(self, parameters: Sequence[Tensor], optimizer: Optimizer, max_norm: float) -> None:
        self.parameters, self.optimizer, self.max_norm = parameters, optimizer, max_norm
        self.total_norm: Tensor | None = None

    def step(self) -> None:
        raise NotImplementedError

    def norm(self) -> Tensor | None:
        """The gradient norm that the last step clipped by; None for one that does not clip."""
        return self.total_norm


class Gradfast(Contender):
    """One call; the optimiser clips."""

    def step(self) -> None:
        self.optimizer.step()

    def norm(self) -> Tensor | None:
        return self.optimizer.grad_norm  # type: ignore[attr-defined]


class ClipThenStep(Contender):
    """What everybody writes."""

    def step(self) -> None:
        self.total_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()


class NormThenScaledStep(Contender):
    """The least that torch can be brought to do: its fused step divides by `grad_scale` as it reads the gradients."""

    def step(self) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.total_norm = torch.nn.utils.get_total_norm(gradients)
        scale = (self.total_norm + 1e-6).float() / self.max_norm
        self.optimizer.grad_scale = scale.clamp(min=1.0)  # type: ignore[attr-defined]
        self.optimizer.step()
        del self.optimizer.grad_scale  # type: ignore[attr-defined]


class StepAlone(Contender):
    """Does less than gradfast: measures nothing, clips nothing."""

    clips = False

    def step(self) -> None:
        self.optimizer.step()


class ApexClipThenStep(Contender):
    """apex's own clipping before its own step."""

    def step(self) -> None:
        clip = importlib.import_module("apex.contrib.clip_grad").clip_grad_norm_
        self.total_norm = clip(self.parameters, self.max_norm)
        self.optimizer.step()


Build = Callable[[list[Tensor], str, float], Contender]


@dataclass(frozen=True)
class Peer:
    """A contender by the name that `--peer` takes."""

    name: str
    about: str
    build: Build
    optimizers: tuple[str, ...] = ("SGD", "Adam", "AdamW")
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("fp64", "fp32", "bf16", "fp16")


def build_gradfast(parameters: list[Tensor], name: str, max_norm: float) -> Contender:
    optimizer = getattr(gradfast, name)(parameters, max_norm=max_norm, **OPTIMIZERS[name])
    return Gradfast(parameters, optimizer, max_norm)


def torch_optimizer(parameters: list[Tensor], name: str, fused: bool | None) -> Optimizer:
    if name == "Lion":
        return ReferenceLion(parameters, **OPTIMIZERS[name])
    return getattr(torch.optim, name)(parameters, fused=fused, **OPTIMIZERS[name])


def round_settings(optimizer: Optimizer) -> None:
    """Round every hyper-parameter to float32, as the kernels of apex, TransformerEngine and DeepSpeed take them.

    It shows in Adam's `1 - beta2`, of which float32 leaves 0.00099998713 for 0.001.
    """
    for group in optimizer.param_groups:
        for key, value in group.items():
            if isinstance(value, float):
                group[key] = _in_float32(value)
            elif isinstance(value, tuple):
                group[key] = tuple(_in_float32(entry) for entry in value)


def _in_float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def with_torch(kind: type[Contender], fused: bool | None) -> Build:
    def build(parameters: list[Tensor], name: str, max_norm: float) -> Contender:
        return kind(parameters, torch_optimizer(parameters, name, fused), max_norm)

    return build


def from_package(kind: type[Contender], module: str, classes: dict[str, str], also: dict[str, dict[str, Any]]) -> Build:
    """A contender whose optimiser is another package's: `classes[name]` of `module`, with arguments `also[name]`."""

    def build(parameters: list[Tensor], name: str, max_norm: float) -> Contender:
        try:
            optimizer = getattr(importlib.import_module(module), classes[name])
            made = optimizer(parameters, **OPTIMIZERS[name], **also.get(name, {}))
        except Exception as error:  # a package compiled for another torch may raise anything
            raise Unavailable(f"{module.partition('.')[0]}: {first_line(error)}") from error
        contender = kind(parameters, made, max_norm)
        contender.exact_settings = False
        return contender

    return build


_ADAM_MODES = {"Adam": {"adam_w_mode": False}, "AdamW": {"adam_w_mode": True}}
_FUSED_CLASSES = {"SGD": "FusedSGD", "Adam": "FusedAdam", "AdamW": "FusedAdam"}

PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "torch-default",
            "clip_grad_norm_, then torch.optim as it comes (foreach on CUDA, a loop on the CPU)",
            with_torch(ClipThenStep, None),
            optimizers=("SGD", "Adam", "AdamW", "Lion"),
        ),
        Peer(
            "torch-fused",
            "clip_grad_norm_, then torch.optim with fused=True: the usual best",
            with_torch(ClipThenStep, True),
        ),
        Peer(
            "torch-scaled",
            "get_total_norm, then the fused step with optimizer.grad_scale: torch's least",
            with_torch(NormThenScaledStep, True),
        ),
        Peer(
            "torch-unclipped",
            "the fused step alone: does less than gradfast does",
            with_torch(StepAlone, True),
        ),
        Peer(
            "apex",
            "apex's clip_grad_norm_ and FusedSGD or FusedAdam, where apex is installed",
            from_package(ApexClipThenStep, "apex.optimizers", _FUSED_CLASSES, _ADAM_MODES),
            devices=("cuda",),
            dtypes=("fp32", "bf16", "fp16"),
        ),
        Peer(
            "transformer-engine",
            "clip_grad_norm_, then TransformerEngine's FusedSGD or FusedAdam, where it is installed",
            from_package(ClipThenStep, "transformer_engine.pytorch.optimizers", _FUSED_CLASSES, _ADAM_MODES),
            devices=("cuda",),
            dtypes=("fp32", "bf16", "fp16"),
        ),
        Peer(
            "deepspeed-cpu",
            "clip_grad_norm_, then DeepSpeedCPUAdam, where DeepSpeed is installed",
            from_package(
                ClipThenStep,
                "deepspeed.ops.adam",
                {"Adam": "DeepSpeedCPUAdam", "AdamW": "DeepSpeedCPUAdam"},
                {
                    "Adam": {"adamw_mode": False, "fp32_optimizer_states": False},
                    "AdamW": {"adamw_mode": True, "fp32_optimizer_states": False},
                },
            ),
            optimizers=("Adam", "AdamW"),
            devices=("cpu",),
            dtypes=("fp32", "bf16", "fp16"),
        ),
    )
}
