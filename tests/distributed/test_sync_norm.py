"""Batch normalisation over all processes' images, against torch's over the whole batch, in float64."""

from __future__ import annotations

import pytest
import torch
from distributed.alone import assert_same_on_all_ranks
from distributed.ranks import on_ranks
from torch import Tensor, distributed, nn

from gradfast.nn.sync_norm import SyncBatchNorm, synchronise_batch_norms

#: How many images each of four ranks has.
PARTS = {"equal": (3, 3, 3, 3), "uneven": (1, 4, 2, 3), "empty": (0, 5, 0, 1)}


def images(shape: tuple[int, ...], count: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 3.0, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    return shift + scale * torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def part_of(whole: Tensor, parts: tuple[int, ...]) -> Tensor:
    return whole.split(parts)[distributed.get_rank()]


def trained(norm: nn.Module) -> nn.Module:
    """With weights that are not ones and zeros."""
    with torch.no_grad():
        for number, parameter in enumerate(norm.parameters()):
            parameter.copy_(torch.linspace(-1.0, 2.0 + number, parameter.numel()))
    return norm


@on_ranks(4)
@pytest.mark.parametrize("shape", [(5,), (5, 4, 3)], ids=["features", "images"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("parts", PARTS)
def test_as_one_process(shape: tuple[int, ...], momentum: float | None, parts: str) -> None:
    kind = nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d
    whole_norm = trained(kind(5, momentum=momentum, dtype=torch.float64))
    norm = synchronise_batch_norms(nn.Sequential(trained(kind(5, momentum=momentum, dtype=torch.float64))))[0]
    assert isinstance(norm, SyncBatchNorm)
    for step in range(3):
        whole = images(shape, sum(PARTS[parts]), seed=step, shift=step).requires_grad_()
        part = part_of(whole.detach(), PARTS[parts]).requires_grad_()
        weights = images(shape, sum(PARTS[parts]), seed=100 + step)
        expected = whole_norm(whole)
        (expected * weights).sum().backward()
        found = norm(part)
        (found * part_of(weights, PARTS[parts])).sum().backward()
        torch.testing.assert_close(found, part_of(expected, PARTS[parts]), rtol=1e-12, atol=1e-13)
        assert whole.grad is not None and part.grad is not None
        torch.testing.assert_close(part.grad, part_of(whole.grad, PARTS[parts]), rtol=1e-11, atol=1e-13)
    for mine, theirs in zip(norm.parameters(), whole_norm.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        distributed.all_reduce(mine.grad)  # each process has its images' share, as of any other layer
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-11, atol=1e-12)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(buffer, dict(whole_norm.named_buffers())[name], rtol=1e-12, atol=1e-13)
        assert_same_on_all_ranks(buffer)
    norm.eval()
    whole_norm.eval()
    whole = images(shape, 4)
    torch.testing.assert_close(norm(whole), whole_norm(whole), rtol=1e-12, atol=1e-13)


@on_ranks(2)
def test_a_large_mean_costs_no_digits() -> None:
    whole = images((5, 4, 3), 6).float() + 1e4
    norm, whole_norm = SyncBatchNorm(5), nn.BatchNorm2d(5, dtype=torch.float64)
    found = norm(part_of(whole, (2, 4)))
    # an ulp of 1e4 is 1e-3, and the deviations are 0.5 and more: what is left of float32 is 2e-3
    torch.testing.assert_close(found.double(), part_of(whole_norm(whole.double()), (2, 4)), rtol=0, atol=4e-3)


@on_ranks(2)
def test_without_weights_and_statistics_and_in_bfloat16() -> None:
    whole = images((5, 4, 3), 6).bfloat16()
    norm = SyncBatchNorm(5, affine=False, track_running_stats=False)
    expected = nn.BatchNorm2d(5, affine=False, track_running_stats=False)(whole.float())
    part = part_of(whole, (2, 4)).requires_grad_()
    found = norm(part)
    found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16 and part.grad is not None and part.grad.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), part_of(expected, (2, 4)), rtol=2**-8, atol=1e-6)


def test_alone_it_is_a_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    names = list(model.state_dict())
    expected = model(torch.ones(2, 3, 2, 2))
    model[1].reset_running_stats()
    assert synchronise_batch_norms(model) is model
    torch.testing.assert_close(model(torch.ones(2, 3, 2, 2)), expected)
    assert list(model.state_dict()) == names
    with pytest.raises(ValueError, match="1 dimensions"):
        SyncBatchNorm(4)._check_input_dim(torch.ones(3))
