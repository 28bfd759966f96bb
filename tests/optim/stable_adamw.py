"""StableAdamW in float64, and gradients that it has something to do about."""

from __future__ import annotations

import numpy as np
import torch


class StableAdamW:
    """Wortsman et al. 2023, algorithm 2, with beta debiased as theirs; one parameter, float64."""

    def __init__(self, weights: np.ndarray, lr: float, betas: tuple[float, float], eps: float, decay: float) -> None:
        self.p, self.lr, self.betas, self.eps, self.decay = weights, lr, betas, eps, decay
        self.m, self.v, self.t = np.zeros_like(weights), np.zeros_like(weights), 0

    def step(self, g: np.ndarray) -> float:
        self.t += 1
        beta1, beta2 = (beta * (1 - beta ** (self.t - 1)) / (1 - beta**self.t) for beta in self.betas)
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        rms = np.sqrt(np.mean(g**2 / np.maximum(self.v, self.eps**2))) if g.size else 0.0
        rate = self.lr / max(1.0, rms)
        self.p = self.p - rate * self.decay * self.p - rate * self.m / (np.sqrt(self.v) + self.eps)
        return rms


def give_gradients(parameters: list[torch.Tensor], step: int) -> None:
    """Gradients that grow a hundredfold now and then, which is when the denominator lags behind."""
    generator = torch.Generator().manual_seed(step)
    for number, parameter in enumerate(parameters):
        size = 100.0 if (step + number) % 9 == 8 else 1.0
        gradient = size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.to(parameter.device, parameter.dtype)
