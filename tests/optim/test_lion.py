"""Lion against the paper's algorithm in float64, and its sign by hand."""

import pytest
import torch
from optim.pairs import gradients, parameters

import gradfast


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2.0**-21)])
@pytest.mark.parametrize("maximize", [False, True])
def test_lion_follows_algorithm_2(dtype: torch.dtype, rtol: float, maximize: bool) -> None:
    ours = parameters(dtype)
    theirs = [(p.detach().double(), torch.zeros(p.shape, dtype=torch.float64)) for p in ours]
    optimizer = gradfast.Lion(ours, lr=0.01, betas=(0.8, 0.95), weight_decay=0.3, maximize=maximize, max_norm=1.0)
    for each in gradients(ours, steps=5):
        for mine, gradient in zip(ours, each):
            mine.grad = gradient.to(dtype)
        norm = torch.cat([mine.grad.flatten().double() for mine in ours]).norm()
        optimizer.step()
        for mine, (p, m) in zip(ours, theirs):
            g = mine.grad.double() * (-1 if maximize else 1) / (norm + 1e-6)
            p.mul_(1 - 0.01 * 0.3).sub_(0.01 * torch.sign(0.8 * m + 0.2 * g))
            m.mul_(0.95).add_(0.05 * g)
            torch.testing.assert_close(mine.detach().double(), p, rtol=rtol, atol=4 * rtol)
            torch.testing.assert_close(optimizer.state[mine]["exp_avg"].double(), m, rtol=rtol, atol=rtol)


def test_signs_by_hand() -> None:
    p = torch.ones(4, dtype=torch.float64)
    p.grad = torch.tensor([3.0, -1e-300, 0.0, float("nan")], dtype=torch.float64)
    gradfast.Lion([p], lr=0.5, nonfinite="propagate").step()
    assert p[:3].tolist() == [0.5, 1.5, 1.0]
    assert p[3].isnan()
