"""Parameters, gradients and states that lie differently in memory: the right elements meet, nothing else is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gradfast


def oracle_step(parameter: Tensor, gradient: Tensor, max_norm: float) -> Tensor:
    """One SGD step at lr 0.1 after clipping, in float64, by the formula."""
    gradient = gradient.double()
    scale = min(1.0, max_norm / (gradient.norm().item() + 1e-6))
    return parameter.double() - 0.1 * scale * gradient


def layouts() -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of parameter and gradient, float64, of the same shape and different strides."""
    image = torch.randn(4, 3, 6, 5, dtype=torch.float64)
    wide = torch.randn(8, 20, dtype=torch.float64)
    return {
        "transposed gradient": (torch.randn(9, 7, dtype=torch.float64), torch.randn(7, 9, dtype=torch.float64).t()),
        "channels-last gradient": (image, torch.randn_like(image).to(memory_format=torch.channels_last)),
        "channels-last both": tuple(t.to(memory_format=torch.channels_last) for t in (image, torch.randn_like(image))),
        "expanded gradient": (
            torch.randn(6, 5, dtype=torch.float64),
            torch.randn(6, 1, dtype=torch.float64).expand(6, 5),
        ),
        "scalar expanded to all": (torch.randn(1000, dtype=torch.float64), torch.tensor(2.0).double().expand(1000)),
        "gapped parameter": (wide[:, ::2], torch.randn(8, 10, dtype=torch.float64)),
        "gapped gradient": (torch.randn(8, 10, dtype=torch.float64), torch.randn(8, 20, dtype=torch.float64)[:, ::2]),
        "offset by one element": (torch.randn(1001, dtype=torch.float64)[1:], torch.randn(1000, dtype=torch.float64)),
        "flipped strides, more than a chunk": (
            torch.randn(300, 301, dtype=torch.float64),
            torch.randn(301, 300, dtype=torch.float64).t(),
        ),
    }


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_right_elements_meet(name: str, optimizer: str) -> None:
    parameter, gradient = layouts()[name]
    parameter = parameter.detach()
    twin = parameter.clone(memory_format=torch.contiguous_format)
    options = {"lr": 0.1, **({"momentum": 0.9} if optimizer == "SGD" else {})}
    fast = getattr(gradfast, optimizer)([parameter], max_norm=1.0, **options)
    oracle = getattr(torch.optim, optimizer)([twin], foreach=False, **options)
    for _ in range(3):
        parameter.grad = gradient
        twin.grad = gradient.contiguous().clone()
        torch.nn.utils.clip_grad_norm_([twin], 1.0)
        fast.step()
        oracle.step()
    torch.testing.assert_close(parameter, twin, rtol=1e-12, atol=1e-13)


def test_nothing_is_written_outside_a_gapped_view() -> None:
    storage = torch.zeros(8, 20, dtype=torch.float64)
    parameter = storage[:, ::2]
    parameter.grad = torch.ones(8, 10, dtype=torch.float64)
    gradfast.SGD([parameter], lr=1.0).step()
    assert torch.equal(storage[:, 1::2], torch.zeros(8, 10, dtype=torch.float64))
    assert torch.equal(parameter, -torch.ones(8, 10, dtype=torch.float64))


def test_expanded_parameter_is_refused_by_name() -> None:
    parameter = torch.randn(5, 1).expand(5, 3)
    parameter.grad = torch.ones(5, 3)
    with pytest.raises(RuntimeError, match=r"'shared'.*clone"):
        gradfast.SGD([("shared", parameter)], lr=0.1).step()


def test_state_in_another_layout() -> None:
    parameter = torch.randn(6, 4, dtype=torch.float64)
    optimizer = gradfast.SGD([parameter], lr=0.1, momentum=0.5)
    parameter.grad = torch.randn(6, 4, dtype=torch.float64)
    optimizer.step()
    momentum = optimizer.state[parameter]["momentum_buffer"]
    optimizer.state[parameter]["momentum_buffer"] = momentum.t().contiguous().t()
    expected = parameter - 0.1 * (0.5 * momentum + parameter.grad)
    optimizer.step()
    torch.testing.assert_close(parameter, expected, rtol=1e-14, atol=1e-14)


def test_complex_counts_as_pairs() -> None:
    parameter = torch.randn(50, dtype=torch.complex128)
    gradient = torch.randn(50, dtype=torch.complex128)
    expected = torch.view_as_complex(oracle_step(torch.view_as_real(parameter), torch.view_as_real(gradient), 1.0))
    parameter.grad = gradient.conj().clone().conj()  # lazily conjugated twice over a copy: the same values
    gradfast.SGD([parameter], lr=0.1, max_norm=1.0).step()
    torch.testing.assert_close(parameter, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("threads", [1, 2])
def test_result_does_not_depend_on_threads(threads: int) -> None:
    def norms(count: int) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            generator = torch.Generator().manual_seed(3)
            tensors = [torch.randn(n, generator=generator) for n in (300_000, 5, 70_000, 1)]
            return gradfast.get_total_norm(tensors)
        finally:
            torch.set_num_threads(before)

    assert norms(threads).item() == norms(3).item()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_complex_parameters_equal_torchs_over_many_steps(name: str) -> None:
    options = {"lr": 0.05, "weight_decay": 0.1, **({"momentum": 0.9} if name == "SGD" else {"amsgrad": True})}
    ours = torch.randn(4, 5, dtype=torch.complex128)
    theirs = ours.clone()
    fast = getattr(gradfast, name)([ours], max_norm=1.0, **options)
    oracle = getattr(torch.optim, name)([theirs], foreach=False, **options)
    for _ in range(10):
        ours.grad = torch.randn(5, 4, dtype=torch.complex128).mT
        theirs.grad = ours.grad.clone()
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        fast.step()
        oracle.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for key, value in oracle.state[theirs].items():
        torch.testing.assert_close(fast.state[ours][key], value, rtol=1e-12, atol=1e-12, check_dtype=False)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_parameters_of_every_dtype_in_one_optimiser_share_one_norm(name: str) -> None:
    parameters = [torch.full((n + 1,), 2.0, dtype=dtype) for n, dtype in enumerate(DTYPES)]
    optimizer = getattr(gradfast, name)(parameters, lr=0.5, max_norm=1.0)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    norm = 3 * (1 + 2 + 3 + 4) ** 0.5
    assert optimizer.grad_norm.dtype == torch.float64
    assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-15)
    # SGD moves by lr times the clipped gradient; AdamW's first step is lr whatever its size, after decay by lr * 0.01.
    expected = 2.0 - 0.5 * 3 / (norm + 1e-6) if name == "SGD" else 2.0 * (1 - 0.5 * 0.01) - 0.5
    for parameter in parameters:
        relative = torch.finfo(parameter.dtype).eps if parameter.dtype != torch.float64 else 1e-7  # Adam's eps of 1e-8
        assert parameter.double().tolist() == pytest.approx([expected] * len(parameter), rel=relative)


@pytest.mark.cuda
def test_parameters_on_two_devices_share_one_norm() -> None:
    host, device = torch.zeros(1), torch.zeros(1, device="cuda")
    optimizer = gradfast.SGD([host, device], lr=1.0, max_norm=5.0)
    host.grad, device.grad = torch.tensor([6.0]), torch.tensor([8.0], device="cuda")
    optimizer.step()
    assert (host.item(), device.item()) == pytest.approx((-3.0, -4.0), rel=1e-6)


class Wrapped(Tensor):
    """A tensor subclass without storage of its own: all that is known of it is what `__torch_dispatch__` does."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def open_up(x: object) -> object:
            return x.inner if isinstance(x, Wrapped) else x

        return cls(function(*map(open_up, args), **(kwargs or {})))


def test_tensor_subclass_is_refused_by_name() -> None:
    parameter = Wrapped(torch.ones(3))
    parameter.grad = Wrapped(torch.ones(3))
    with pytest.raises(NotImplementedError, match=r"'layer\.weight' is a tensor subclass"):
        gradfast.SGD([("layer.weight", parameter)], lr=0.1).step()
    assert parameter.inner.tolist() == [1.0] * 3


def test_other_dtypes_are_refused_by_name() -> None:
    parameter = torch.ones(3).to(torch.float8_e4m3fn)
    parameter.grad = torch.ones(3).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"'w' has dtype Float8_e4m3fn.*float64, float32, float16, bfloat16"):
        gradfast.SGD([("w", parameter)], lr=0.1).step()


def test_other_devices_are_refused_by_name_of_the_device() -> None:
    parameter = torch.ones(3, device="meta")
    parameter.grad = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match="'meta' are not supported; CPU and CUDA are"):
        gradfast.SGD([parameter], lr=0.1).step()
