"""What the monitor costs: the time spent in its hooks, as a share of ResNet50's training steps.

    python benchmarks/monitor.py --steps 50 --every 50

Both times are taken in the same steps, so that a busy machine slows both. On a GPU the share is of the time that the
host spends, which hides behind the device's; the device's own share is in the difference of the two step times.
"""

from __future__ import annotations

import argparse
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
    parser.add_argument("--steps", type=int, default=50)
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
    monitor = gradfast.Monitor(optimizer, model, every=options.every)
    spent: list[float] = []
    optimizer._optimizer_step_pre_hooks.clear()
    optimizer._optimizer_step_post_hooks.clear()
    optimizer.register_step_pre_hook(timed(monitor._before_step, spent))
    optimizer.register_step_post_hook(timed(monitor._after_step, spent))
    step()  # its first sample
    spent.clear()
    wait()
    start = time.perf_counter()
    for _ in range(options.steps):
        step()
    wait()
    total = time.perf_counter() - start
    samples = sum(1 for number in range(2, options.steps + 2) if number % options.every == 0)
    print(f"{device}: {options.steps} steps of {1e3 * total / options.steps:.1f} ms, {samples} samples")
    print(f"monitor: {1e3 * sum(spent) / options.steps:.3f} ms a step, {100 * sum(spent) / total:.3f} % of the time")


if __name__ == "__main__":
    main()
