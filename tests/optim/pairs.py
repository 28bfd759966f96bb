"""Two copies of a small set of parameters: one for gradfast, one for torch with clip_grad_norm_."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

import gradfast

SHAPES = [(), (1,), (7,), (16, 3), (5, 4, 3, 3), (70_001,), (0,)]  # 0-d, empty, tails, more than one chunk

SMALL_SHAPES = [shape for shape in SHAPES if shape != (70_001,)]


def parameters(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def gradients(like: list[Tensor], steps: int, scale: float = 1.0) -> Iterator[list[Tensor]]:
    """Yield one list of random float64 gradients a step, `scale` times a standard normal."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield [scale * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in like]


def run_pair(
    name: str,
    options: dict,
    dtype: torch.dtype = torch.float64,
    max_norm: float | None = 1.0,
    steps: int = 7,
    norm_type: float = 2.0,
    each_step: Callable[[int, torch.optim.Optimizer], None] = lambda step, optimizer: None,
) -> tuple[list[Tensor], list[Tensor], torch.optim.Optimizer, torch.optim.Optimizer]:
    """Train the same parameters with gradfast in `dtype` and with torch in float64; return both and the optimisers."""
    ours = parameters(dtype)
    theirs = [p.detach().double().clone().requires_grad_() for p in ours]
    fast = getattr(gradfast, name)(ours, max_norm=max_norm, norm_type=norm_type, **options)
    oracle = getattr(torch.optim, name)(theirs, foreach=False, **options)
    for step, step_gradients in enumerate(gradients(ours, steps)):
        for mine, other, gradient in zip(ours, theirs, step_gradients, strict=True):
            mine.grad = gradient.to(dtype)
            other.grad = mine.grad.double().clone()
        if max_norm is not None:  # torch refuses the infinity norm of an empty tensor
            torch.nn.utils.clip_grad_norm_([p for p in theirs if p.numel()], max_norm, norm_type=norm_type)
        for optimizer in (fast, oracle):
            each_step(step, optimizer)
            optimizer.step()
    return ours, theirs, fast, oracle


class Twins:
    """The same float64 parameters under gradfast and under torch, stepped with the same gradients.

    `groups` are lists of shapes with options of their own; torch runs its plain single-tensor code, the reference.
    """

    def __init__(self, name: str, groups: list[tuple[list[tuple[int, ...]], dict]] | None = None, **options: object):
        groups = groups or [(SMALL_SHAPES, {})]
        self.ours = [parameters(torch.float64, shapes, seed=i) for i, (shapes, _) in enumerate(groups)]
        self.theirs = [[p.detach().clone().requires_grad_() for p in group] for group in self.ours]
        self.fast = self.make(gradfast, name, self.ours, groups, options)
        self.oracle = self.make(torch.optim, name, self.theirs, groups, {"foreach": False, **options})
        self.generator = torch.Generator().manual_seed(1)

    @staticmethod
    def make(
        module: object, name: str, lists: list[list[Tensor]], groups: list, options: dict
    ) -> torch.optim.Optimizer:
        listed = [{"params": list(p), **own} for p, (_, own) in zip(lists, groups, strict=True)]
        return getattr(module, name)(listed, **copy.deepcopy(options))

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        return self.fast, self.oracle

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Every parameter that gradfast holds now, with torch's."""
        both = zip(self.fast.param_groups, self.oracle.param_groups, strict=True)
        return [pair for mine, other in both for pair in zip(mine["params"], other["params"], strict=True)]

    def differentiate(self, without: Iterable[int] = ()) -> None:
        """Give every pair a random gradient, or None to those whose positions are listed."""
        for position, (mine, other) in enumerate(self.pairs()):
            gradient = torch.randn(mine.shape, generator=self.generator, dtype=torch.float64)
            mine.grad = None if position in without else gradient
            other.grad = None if position in without else gradient.clone()

    def step(self, steps: int = 1, without: Iterable[int] = ()) -> None:
        for _ in range(steps):
            self.differentiate(without)
            for optimizer in self.optimizers:
                optimizer.step()

    def check(self, tolerance: float = 1e-12) -> None:
        """Parameters and states agree to `tolerance`, relative and absolute, and no state is missing."""
        for mine, other in self.pairs():
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
            theirs = {key: value for key, value in self.oracle.state.get(other, {}).items() if value is not None}
            assert self.fast.state.get(mine, {}).keys() >= theirs.keys()
            for key, value in theirs.items():
                found = self.fast.state[mine][key]
                torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance, check_dtype=False)
