"""Weights taken from checkpoints, and models left as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nn.models import mlp
from torch import nn

from gradfast.errors import UserError
from gradfast.nn import load_pretrained, preserved


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_backbone_loads_and_the_head_stays(prefix: str, tmp_path: Path) -> None:
    source, model = mlp(4, 8, outputs=10), mlp(4, 8, outputs=3)
    head = model[6].weight.detach().clone()
    path = tmp_path / "weights.pt"
    torch.save({"epoch": 3, "model": {prefix + name: value for name, value in source.state_dict().items()}}, path)
    loaded = load_pretrained(model, path)
    assert torch.equal(model[4].weight, source[4].weight) and torch.equal(model[6].weight, head)
    assert loaded.reshaped == ["6.weight", "6.bias"] and not loaded.missing and not loaded.unused
    assert str(loaded) == "6 tensors loaded; 2 reshaped (6.weight, 6.bias)"


def test_another_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"only 0 of the 4 parameters of Sequential.*encoder\.weight"):
        load_pretrained(mlp(2, 4), {"encoder.weight": torch.zeros(3)})


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    for name in ("bad.pt", "absent.pt"):
        with pytest.raises(UserError, match=f"cannot read weights from .*{name}"):
            load_pretrained(mlp(2, 4), tmp_path / name)


def test_preserved_restores_to_the_bit() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[1].eval()
    gradient = torch.randn(4, 4)
    model[0].weight.grad = gradient
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    with pytest.raises(KeyError), preserved(model, parameters=True):
        assert model[0].weight.grad is None
        model.train()
        model(torch.randn(8, 4)).sum().backward()
        model[0].weight.data.add_(1.0)
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].weight.grad is gradient and model[0].bias.grad is None
    assert torch.equal(torch.random.get_rng_state(), random)
    assert model[0].training and not model[1].training
