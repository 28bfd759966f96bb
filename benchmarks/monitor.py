"""What the monitor costs, as a share of ResNet50's training steps, measured in two ways.

    python benchmarks/monitor.py --steps 10 --every 50

Its hooks are timed inside steps, so that a busy machine slows both alike. And steps are taken in turns without the
monitor, with it, and with a sample: the median of the ratios is what a user sees, its noise included. The share is
worked out for one sample in `--every` steps. On a GPU the hooks' time is the host's, which hides behind the device's:
there the turns tell.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision

import gradfast


def timed(function: Callable[[], Any], times: list[float]) -> Callable[..., Any]:
    def run(*_: Any) -> None:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    device = torch.device(options.device)
    model = torchvision.models.resnet50().to(device)
    optimizer = gradfast.SGD(model.named_parameters(), lr=1e-3, momentum=0.9, max_norm=1.0)
    images = torch.randn(options.batch_size, 3, options.img_size, options.img_size, device=device)
    labels = torch.randint(1000, (options.batch_size,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    bare, hooks, turns = [], {"plain": [], "sample": []}, {"plain": [], "sample": []}
    monitor = gradfast.Monitor(optimizer, model, every=1)
    before, after = monitor._before_step, monitor._after_step
    step()  # its first sample

    def take(kind: str | None) -> tuple[float, float]:
        """Seconds of a step, and of the monitor's hooks in it; without the monitor, with it, or with a sample."""
        spent: list[float] = []
        optimizer._optimizer_step_pre_hooks.clear()
        optimizer._optimizer_step_post_hooks.clear()
        if kind is not None:
            monitor.every = 1 if kind == "sample" else 10**9
            optimizer.register_step_pre_hook(timed(before, spent))
            optimizer.register_step_post_hook(timed(after, spent))
        wait()
        start = time.perf_counter()
        step()
        wait()
        return time.perf_counter() - start, sum(spent)

    for kind in (None, "plain", "sample"):
        take(kind)
    for number in range(options.steps):
        order = [None, "plain", "sample"] if number % 2 else ["sample", "plain", None]
        taken = {kind: take(kind) for kind in order}
        bare.append(taken[None][0])
        for kind in ("plain", "sample"):
            hooks[kind].append(taken[kind][1])
            turns[kind].append(taken[kind][0] / taken[None][0] - 1)

    def share(plain: float, sample: float) -> float:
        return 100 * (sample + (options.every - 1) * plain) / options.every

    plain, sample, alone = (statistics.median(times) for times in (hooks["plain"], hooks["sample"], bare))
    percent = share(plain, sample) / alone
    print(f"{device}: a step without the monitor {1e3 * alone:.1f} ms; its hooks: {1e3 * plain:.3f} ms, at a sample")
    print(f"{1e3 * sample:.1f} ms; with a sample every {options.every} steps {percent:.2f} % of the time")
    plain, sample = (statistics.median(turns[kind]) for kind in ("plain", "sample"))
    together = f"{share(plain, sample):+.2f} % together"
    print(f"in turns: a step {100 * plain:+.2f} %, with a sample {100 * sample:+.2f} %; {together}")


if __name__ == "__main__":
    main()
