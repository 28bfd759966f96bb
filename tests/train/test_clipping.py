"""--clip-policy and --clip-grad as the optimiser gets them."""

from __future__ import annotations

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

from torch import nn

from gradfast import clip
from gradfast.train.config import TrainConfig
from gradfast.train.model.clipping import clip_arguments, describe_clipping


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def arguments_of(**settings: object) -> tuple[dict[str, object], str]:
    config = TrainConfig(**settings).resolve()  # type: ignore[arg-type]
    return clip_arguments(config, model()), describe_clipping(config)


def test_the_norm_alone_is_the_optimisers_own_setting() -> None:
    assert arguments_of() == ({"max_norm": 1.0}, "clipped at norm 1")
    assert arguments_of(clip_grad=None) == ({"max_norm": None}, "no clipping")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("zclip", clip.ZClip), ("autoclip", clip.AutoClip), ("skip-spikes", clip.SkipSpikes), ("agc", clip.AGC)],
)
def test_a_policy_stands_before_the_limit_of_the_norm(name: str, kind: type) -> None:
    arguments, description = arguments_of(clip_policy=name, clip_grad=2.0)
    assert isinstance(arguments["clip"], clip.Chain) and description == f"clipped by {name}, then at norm 2"
    assert kind.__name__ in repr(arguments["clip"]) and "GlobalNorm(max_norm=2.0" in repr(arguments["clip"])
    alone, description = arguments_of(clip_policy=name, clip_grad=None)
    assert isinstance(alone["clip"], kind) and description == f"clipped by {name}"


def test_limits_of_their_own() -> None:
    value, _ = arguments_of(clip_policy="value", clip_grad=0.5)
    ada_gc, description = arguments_of(clip_policy="adagc", clip_grad=3.0)
    assert isinstance(value["clip"], clip.Value) and value["clip"].limit == 0.5
    assert isinstance(ada_gc["clip"], clip.AdaGC) and ada_gc["clip"].max_norm == 3.0
    assert description == "clipped by adagc"


def test_agc_leaves_the_classifier_alone() -> None:
    agc, _ = arguments_of(clip_policy="agc", clip_grad=None)
    assert isinstance(agc["clip"], clip.AGC) and set(agc["clip"].exclude) == {"2.weight", "2.bias"}
