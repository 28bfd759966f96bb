"""What the monitor costs: the time spent in its hooks, as a share of ResNet50's training steps.

    python benchmarks/monitor.py --steps 10 --every 50

Every second step is a sample, so that few steps show what both kinds cost; the share is worked out for one sample in
`--every` steps. All times are taken in the same steps, so that a busy machine slows them alike. On a GPU the hooks'
time is the host's, which hides behind the device's.
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
    monitor = gradfast.Monitor(optimizer, model, every=2)
    spent: list[float] = []
    optimizer._optimizer_step_pre_hooks.clear()
    optimizer._optimizer_step_post_hooks.clear()
    optimizer.register_step_pre_hook(timed(monitor._before_step, spent))
    optimizer.register_step_post_hook(timed(monitor._after_step, spent))
    step(), step()  # its first sample, and its first as it will be
    spent.clear()
    wait()
    start = time.perf_counter()
    for _ in range(options.steps):
        step()
    wait()
    own = [before + after for before, after in zip(spent[::2], spent[1::2])]
    bare = (time.perf_counter() - start - sum(own)) / options.steps
    plain, sample = statistics.median(own[0::2]), statistics.median(own[1::2])  # steps 3, 5, ... and 4, 6, ...
    share = (sample + (options.every - 1) * plain) / options.every / bare
    print(f"{device}: a step without the monitor {1e3 * bare:.1f} ms; its hooks: {1e3 * plain:.3f} ms, at a sample")
    print(f"{1e3 * sample:.1f} ms; with a sample every {options.every} steps {100 * share:.2f} % of the time")


if __name__ == "__main__":
    main()
