"""Time clip and step on the CPU: gradfast against torch's best, as the median ratio of interleaved pairs.

    python benchmarks/step.py [--model resnet50 gpt2 small] [--pairs 60]

Machines are noisy and caches shared, so absolute times mean little; a pair is one step of each contender, right after
each other in alternating order, and the table gives the median of the pairs' ratios (below 1: gradfast is faster) with
the middle half of them. The peers:

    clip + fused      clip_grad_norm_, then torch's fused step
    norm + scale      get_total_norm, then torch's fused step with `grad_scale`: no separate pass to clip
    fused, no clip    torch's fused step alone, which does less than gradfast does
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import gradfast


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The 161 parameters of ResNet50 (25.6 million elements)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, channels, 1, 1))
            for convolution in convolutions:
                shapes += [convolution, convolution[:1], convolution[:1]]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2_shapes() -> list[tuple[int, ...]]:
    """The 148 parameters of GPT-2 small (124 million elements)."""
    block = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)]
    block += [(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
    return [(50257, 768), (1024, 768), *(12 * block), (768,), (768,)]


MODELS = {"resnet50": resnet50_shapes, "gpt2": gpt2_shapes, "small": lambda: [(64,)] * 1000}
OPTIMIZERS = {"SGD": {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}, "AdamW": {"lr": 1e-5}}


def make(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    parameters = [torch.randn(shape, dtype=torch.float32).to(dtype).requires_grad_() for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape).to(dtype)
    return parameters


def contenders(name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return gradfast's step, under "gradfast", and its peers', each on parameters of its own."""
    options = OPTIMIZERS[name]
    ours = make(shapes, dtype)
    fast = getattr(gradfast, name)(ours, max_norm=1.0, **options)
    theirs = make(shapes, dtype)
    fused = getattr(torch.optim, name)(theirs, fused=True, **options)
    gradients = [p.grad for p in theirs]

    def clip_and_fused() -> None:
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        fused.step()

    def norm_and_scale() -> None:
        # The fused step divides by grad_scale and writes the gradients back: 1 / coefficient clips them.
        norm = torch.nn.utils.get_total_norm(gradients)
        fused.grad_scale = torch.clamp((norm + 1e-6).float(), min=1.0)
        fused.step()
        del fused.grad_scale

    steps = {"gradfast": fast.step, "clip + fused": clip_and_fused, "norm + scale": norm_and_scale}
    return {**steps, "fused, no clip": fused.step}


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def ratios(ours: Callable[[], object], peer: Callable[[], object], pairs: int) -> list[float]:
    """Return time of `ours` over time of `peer`, for each of the interleaved pairs."""
    for warm_up in (ours, peer, ours, peer):
        warm_up()
    found = []
    for pair in range(pairs):
        if pair % 2:
            peer_time, our_time = seconds(peer), seconds(ours)
        else:
            our_time, peer_time = seconds(ours), seconds(peer)
        found.append(our_time / peer_time)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="shapes to step")
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--pairs", type=int, default=60, help="interleaved pairs a peer (default: 60)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {arguments.dtype}\n")
    print("| model | optimiser | peer | median ratio | middle half |")
    print("|---|---|---|---|---|")
    for model in arguments.model:
        for name in arguments.optimizer:
            steps = contenders(name, MODELS[model](), getattr(torch, arguments.dtype))
            ours = steps.pop("gradfast")
            for peer, step in steps.items():
                found = ratios(ours, step, arguments.pairs)
                low, median, high = statistics.quantiles(found, n=4)
                print(f"| {model} | {name} | {peer} | {median:.2f} | {low:.2f} to {high:.2f} |", flush=True)


if __name__ == "__main__":
    main()
