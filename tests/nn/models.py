"""Small models that the tests of gradfast.nn and of the doctor share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(depth: int, width: int, activation: type[nn.Module] = nn.ReLU, outputs: int | None = None) -> nn.Sequential:
    """`depth` layers of `width`, an activation after each but the last."""
    layers: list[nn.Module] = []
    for number in range(depth):
        last = number == depth - 1
        layers.append(nn.Linear(width, outputs if last and outputs else width))
        if not last:
            layers.append(activation())
    return nn.Sequential(*layers)


class Attention(nn.Module):
    """Causal self-attention as GPT-2 writes it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.size()
        q, k, v = (
            part.view(n, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.c_attn(x).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.c_fc = nn.Linear(width, 4 * width)
        self.mlp_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class TinyGPT(nn.Module):
    """A GPT-2 in small: tied head, learnt positions, GPT-2's initialisation. torch.fx cannot trace it."""

    def __init__(
        self, vocabulary: int = 101, width: int = 64, depth: int = 4, heads: int = 4, length: int = 32
    ) -> None:
        super().__init__()
        self.length = length
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(length, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("attn.c_proj.weight", "mlp_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / ((2 * depth) ** 0.5 if residual else 1.0))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.length:  # a decision on a value: torch.fx gives up here
            raise ValueError("the sequence is too long")
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class ResidualBlock(nn.Module):
    """Two layers beside a shortcut, without norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


def residual_mlp(depth: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(width) for _ in range(depth)), nn.Linear(width, outputs))
