"""--compile and --deterministic: what they change, and what they must not."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import torch
from torch import nn
from train.cases import arguments, read_rows, untimed

from gradfast.cli import main
from gradfast.errors import UserError
from gradfast.train.machine.determinism import deterministic
from gradfast.train.model.compiling import compile_model
from gradfast.train.results.checkpoint import load_checkpoint
from gradfast.train.settings import read_yaml


def losses(folder: str) -> list[float]:
    return [float(row["loss"]) for row in read_rows(Path(folder) / "steps.csv")]


# ---------------------------------------------------------------- torch.compile


def test_a_compiled_run_and_a_plain_one_continue_each_other(photos: Path, in_tmp: Path) -> None:
    settings = ["--model", "resnet18", "--model-ema", "--sched", "constant", "--lr", 0.01]
    compiled = ["--compile", "aot_eager"]
    assert main(arguments(photos, *settings, "--output", "plain")) == 0
    assert main(arguments(photos, *settings, *compiled, "--output", "compiled")) == 0
    # The backend runs the same operations in the same order.
    assert losses("compiled") == pytest.approx(losses("plain"), rel=1e-6)
    plain, other = (load_checkpoint(Path(name) / "last.pt") for name in ("plain", "compiled"))
    assert list(plain["model"]) == list(other["model"])
    assert list(plain["average"]["module"]) == list(other["average"]["module"])
    assert not any("_orig_mod" in name for name in other["model"])

    # What a compiled run left goes on uncompiled.
    assert main(arguments(photos, *settings, *compiled, "--epochs", 1, "--output", "half")) == 0
    assert read_yaml(Path("half/config.yaml"))["compile"] == "aot_eager"
    assert main(["train", "--resume", "half", "--epochs", "2", "--compile", "off"]) == 0
    assert losses("half") == pytest.approx(losses("plain"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_the_model_in_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    plain, names = copy.deepcopy(model), list(model.state_dict())
    compile_model(model, "inductor", torch.device("cpu"))
    images = torch.randn(4, 3, 8, 8)
    for each in (model, plain):
        each(images).square().sum().backward()
    assert list(model.state_dict()) == names
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)  # fp32 sums in another order


def test_no_compiler_is_told_before_anything_is_written(
    photos: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[[list[str], str], str]
) -> None:
    from torch._inductor import cpp_builder

    def missing(*_: object) -> str:
        raise cpp_builder.exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    torch._dynamo.reset()
    with torch._inductor.utils.fresh_cache():
        refused(
            arguments(photos, "--compile"),
            r"--compile inductor does not work here \(InvalidCxxCompiler.*install a C\+\+ compiler",
        )
    assert list(in_tmp.iterdir()) == []
    with pytest.raises(UserError, match="--compile no-such does not work here"):
        compile_model(torch.nn.Linear(1, 1), "no-such", torch.device("cpu"))


# ---------------------------------------------------------------- determinism


def test_a_deterministic_run_is_recorded_and_leaves_torch_as_it_was(
    photos: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []
    step = torch.optim.Optimizer.zero_grad

    def zero_grad(self: torch.optim.Optimizer, set_to_none: bool = True) -> None:
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        step(self, set_to_none)

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", zero_grad)
    for name in ("one", "two"):
        assert main(arguments(photos, "--deterministic", "--epochs", 1, "--output", name)) == 0
    assert read_yaml(Path("one/config.yaml"))["deterministic"] is True
    assert untimed(Path("one/steps.csv")) == untimed(Path("two/steps.csv"))
    assert seen and set(seen) == {(True, ":4096:8")}
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_an_operation_without_a_deterministic_algorithm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cudnn.benchmark
    message = r"--deterministic: some_kernel does not have a deterministic implementation"
    with pytest.raises(UserError, match=message), deterministic(True):
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        raise RuntimeError("some_kernel does not have a deterministic implementation, but you set ...")
    assert torch.backends.cudnn.benchmark == before and not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="other"), deterministic(True):
        raise RuntimeError("other")
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
