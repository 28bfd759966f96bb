"""Batch normalisation over the images of all processes, on any device."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

Model = TypeVar("Model", bound=nn.Module)


class SyncBatchNorm(_BatchNorm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, mean and variance over the images of all processes.

    What `torch.nn.SyncBatchNorm` is on GPUs, for the CPU and gloo: N processes with a part of a batch each compute what
    one process computes of the whole batch. A process may hold no image at all. Parameters, buffers and names are
    those of `torch.nn.BatchNorm2d`. In evaluation, and without a process group, it is just that.

    Shapes: [n, C, ...] to the same; statistics are taken in fp32, or in fp64 for fp64.

    One gather of 2 C + 1 numbers forward, and one sum of 2 C backward.

    Ioffe and Szegedy 2015; Peng et al. 2018 ("MegDet", whose batch normalisation is across devices).
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm takes [n, C, ...], not a tensor of {input.dim()} dimensions")

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        alone = not distributed.is_initialized() or distributed.get_world_size() == 1
        if not self.training or alone:
            return super().forward(input)
        self._check_input_dim(input)
        output, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._follow(mean, variance, count)
        return output

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = self.momentum if self.momentum is not None else 1.0 / self.num_batches_tracked.double()
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_mean += share * (mean - self.running_mean).to(self.running_mean.dtype)
        self.running_var += share * (unbiased - self.running_var).to(self.running_var.dtype)


def over_images(values: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [0, *range(2, values.dim())]


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """[C] in a shape that goes with [n, C, ...]."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        mean, variance, count = statistics_of_all(x)
        deviation = torch.rsqrt(variance + epsilon)
        normal = (x - per_channel(mean, x)) * per_channel(deviation, x)
        context.save_for_backward(normal, deviation, weight, count)
        context.has_bias = bias is not None
        output = normal if weight is None else normal * per_channel(weight, x)
        output = output if bias is None else output + per_channel(bias, x)
        context.mark_non_differentiable(mean, variance, count)
        return output.to(input.dtype), mean, variance, count

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        normal, deviation, weight, count = context.saved_tensors
        gradient = gradients[0].to(normal.dtype)
        own = torch.stack([gradient.sum(over_images(gradient)), (gradient * normal).sum(over_images(gradient))])
        of_bias, of_weight = own
        everyone = own.clone()
        distributed.all_reduce(everyone)
        mean_gradient, mean_product = everyone / count.clamp(min=1)
        scale = deviation if weight is None else deviation * weight
        along = gradient - per_channel(mean_gradient, normal) - normal * per_channel(mean_product, normal)
        return (
            (along * per_channel(scale, normal)).to(gradients[0].dtype),
            None if weight is None else of_weight.to(weight.dtype),
            of_bias.to(normal.dtype) if context.has_bias else None,
            None,
        )


def statistics_of_all(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C] and (biased) variance [C] over all processes' x [n, C, ...], and how many values a channel has (0-d).

    Each process's mean and variance are joined by Chan et al.'s rule (1979), which loses no digits where means are
    large.
    """
    channels = x.shape[1]
    own = x.numel() // channels
    if own:
        variance, mean = torch.var_mean(x, over_images(x), correction=0)
    else:
        variance, mean = x.new_zeros(channels), x.new_zeros(channels)
    row = torch.cat([mean, variance, mean.new_tensor([own])])
    rows = [torch.empty_like(row) for _ in range(distributed.get_world_size())]
    distributed.all_gather(rows, row)
    means, variances, counts = torch.stack(rows).split([channels, channels, 1], dim=1)
    count = counts.sum()
    shares = counts / count.clamp(min=1)
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean) ** 2)).sum(0), count


def synchronise_batch_norms(model: Model) -> Model:
    """Let every batch normalisation of `model` see the images of all processes; returns the model.

    Torch's own does it on GPUs, `SyncBatchNorm` of this module elsewhere. Weights, buffers and names stay.
    """
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
                setattr(module, name, _converted(child))
    return model


def _converted(norm: _BatchNorm) -> SyncBatchNorm:
    made = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made._parameters, made._buffers, made.training = norm._parameters, norm._buffers, norm.training
    return made
