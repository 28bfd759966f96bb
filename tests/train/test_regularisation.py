"""Mixtures, erasing, balanced epochs, averages and decay, each against numbers worked out by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import torch
from torch import nn
from train.cases import arguments, untimed

from gradfast.cli import main
from gradfast.errors import UserError
from gradfast.train.config import TrainConfig
from gradfast.train.data.augment import AUTOMATIC, build_augmentation, drawing_from
from gradfast.train.data.batches import EpochBatches
from gradfast.train.data.mixing import build_mixing
from gradfast.train.model.averaging import MovingAverage, kept_share
from gradfast.train.model.build import build_model
from gradfast.train.model.criterion import ClassificationLoss
from gradfast.train.model.optimizers import OPTIMISERS, build_optimizer, restore_optimizer
from gradfast.train.run import build_learner  # noqa: F401  (all parts import together)

# ---------------------------------------------------------------- mixed images


def constant_images(values: list[float]) -> torch.Tensor:
    """Images [n, 3, 8, 8] of one value each."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()


def test_mixup_mixes_images_and_labels_in_the_same_proportion() -> None:
    mixing = build_mixing(3, mixup=0.4, cutmix=0.0, seed=1)
    assert mixing is not None
    images, shares = mixing(constant_images([0.0, 1.0, 2.0]), torch.tensor([0, 1, 2]), (4, 7))
    own = shares.diagonal()  # each image is mixed with the one before it, all by the same share
    assert torch.allclose(shares.sum(1), torch.ones(3)) and own.unique().numel() == 1 and 0 < own[0] < 1
    expected = own[0] * torch.tensor([0.0, 1.0, 2.0]) + (1 - own[0]) * torch.tensor([2.0, 0.0, 1.0])
    torch.testing.assert_close(images[:, 0, 0, 0], expected)


def test_cutmix_labels_by_area() -> None:
    mixing = build_mixing(2, mixup=0.0, cutmix=1.0, seed=0)
    assert mixing is not None
    for number in range(20):
        images, shares = mixing(constant_images([0.0, 1.0]), torch.tensor([0, 1]), (0, number))
        torch.testing.assert_close(images[0].mean(), shares[0, 1], rtol=1e-6, atol=1e-6)


def test_a_mixture_depends_on_its_batch_alone() -> None:
    mixing = build_mixing(2, mixup=0.2, cutmix=1.0, seed=3)
    assert mixing is not None
    images, targets = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    before = torch.get_rng_state()
    first = mixing(images, targets, (2, 5))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, mixing(images, targets, (2, 5))))
    others = [mixing(images, targets, (2, number))[0] for number in range(6, 12)]
    assert not any(torch.equal(first[0], other) for other in others)
    assert build_mixing(2, 0.0, 0.0, 0) is None


def test_the_loss_of_shares_is_the_share_of_losses() -> None:
    torch.manual_seed(0)
    logits, weights = torch.randn(2, 3, dtype=torch.float64).float(), torch.tensor([0.5, 1.0, 2.0])
    shares = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.2, 0.8]])
    logs = logits.double().log_softmax(1)
    expected = -(shares.double() * weights.double() * logs).sum() / 2
    torch.testing.assert_close(ClassificationLoss(weights, 0.0)(logits, shares).double(), expected, rtol=1e-6, atol=0.0)


# ---------------------------------------------------------------- changed images


def test_erasing_blackens_a_rectangle_of_some_images() -> None:
    erase = build_augmentation("none", 32, erase=0.5)
    image = torch.full((3, 32, 32), 200, dtype=torch.uint8)
    changed = 0
    for number in range(60):
        with drawing_from(0, 0, number):
            out = erase(image)
        hole = (out == 0).all(0)
        if hole.any():
            changed += 1
            rows, columns = hole.any(1).nonzero(), hole.any(0).nonzero()
            area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert hole.sum() == area and 0.015 * 1024 < area < 0.36 * 1024
    assert 15 <= changed <= 45  # 30 are expected; outside once in ten thousand runs, and these seeds are fixed
    assert (image == 200).all()


@pytest.mark.parametrize("name", AUTOMATIC)
def test_automatic_augmentation_depends_on_its_numbers_only(name: str) -> None:
    augment = build_augmentation("dihedral", 32, automatic=name)
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    kept = image.clone()
    seen = []
    for number in (*range(8), 0):
        with drawing_from(5, 1, number):
            seen.append(augment(image))
    assert torch.equal(seen[0], seen[-1]) and torch.equal(image, kept)
    assert len({out.numpy().tobytes() for out in seen}) >= 6
    assert all(out.shape == image.shape and out.dtype == torch.uint8 for out in seen)


# ---------------------------------------------------------------- balanced epochs


def test_balanced_epochs_draw_every_class_equally_often() -> None:
    targets = [0] * 900 + [1] * 100
    batches = EpochBatches(1000, 10, seed=0, training=True, balance=targets)
    first = [index for batch in batches for _, index in batch]
    counts = Counter(targets[index] for index in first)
    assert 420 <= counts[1] <= 580  # 500 +- 5 standard deviations of 16
    batches.start = 60
    assert [index for batch in batches for _, index in batch] == first[600:]
    batches.epoch, batches.start = 1, 0
    assert [index for batch in batches for _, index in batch] != first


def test_balancing_once_is_enough() -> None:
    assert TrainConfig().resolve().class_weights == "balanced"
    assert TrainConfig(sampler="balanced").resolve().class_weights == "none"
    assert TrainConfig(sampler="balanced", class_weights="balanced").resolve().class_weights == "balanced"


# ---------------------------------------------------------------- averages


def test_average_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    with torch.no_grad():
        model[0].weight.fill_(3.0)
        model[1].running_mean.fill_(3.0)
    average = MovingAverage(model, decay=0.9)
    expected = 3.0
    for update in range(5):
        with torch.no_grad():
            model[0].weight.fill_(float(update))
            model[1].running_mean.fill_(float(update))
            model[1].num_batches_tracked.fill_(update)
        average.update(model)
        keep = kept_share(0.9, update)
        expected = keep * expected + (1 - keep) * update
    assert [kept_share(0.9, n) for n in (0, 1, 80, 1000)] == [0.1, 2 / 11, 0.9, 0.9]
    for value in (average.module[0].weight[0, 0], average.module[1].running_mean[0]):
        assert float(value) == pytest.approx(expected, rel=1e-6)
    assert int(average.module[1].num_batches_tracked) == 4


# ---------------------------------------------------------------- decay


def norm_and_layer() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize("opt", OPTIMISERS)
def test_norms_and_biases_need_not_decay(opt: str) -> None:
    model = norm_and_layer()
    optimizer = build_optimizer(TrainConfig(opt=opt, lr=1e-4, weight_decay=0.1, norm_bias_decay=False).resolve(), model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weight, bias, scale, shift = model.parameters()
    assert (weight.abs() < before[0].abs()).all()
    assert torch.equal(bias, before[1]) and torch.equal(scale, before[2]) and torch.equal(shift, before[3])


def test_l1_by_hand() -> None:
    model = norm_and_layer()
    config = TrainConfig(lr=0.5, momentum=0.0, weight_decay=0.0, l1=0.01, clip_grad=None).resolve()
    optimizer = build_optimizer(config, model)
    before = model[0].weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before - 0.5 * 0.01 * before.sign())


def test_a_resumed_optimiser_takes_the_new_decay_and_keeps_its_momentum() -> None:
    model = norm_and_layer()
    first = build_optimizer(TrainConfig(norm_bias_decay=False, l1=0.1).resolve(), model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.step()
    second = build_optimizer(TrainConfig(norm_bias_decay=False, weight_decay=0.3, momentum=0.5).resolve(), model)
    restore_optimizer(second, first.state_dict())
    weights, others = second.param_groups
    assert (weights["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert (weights["l1"], weights["momentum"]) == (0.0, 0.5)
    assert all("momentum_buffer" in second.state[parameter] for parameter in model.parameters())


# ---------------------------------------------------------------- the model


def config_of(**settings: object) -> TrainConfig:
    return TrainConfig(**{"model": "resnet18", "img_size": 32, **settings}).resolve()  # type: ignore[arg-type]


def test_residual_blocks_start_as_the_identity_unless_another_start_is_asked_for() -> None:
    last = "layer1.0.bn2.weight"
    assert (build_model(config_of(), 2).get_parameter(last) == 0).all()
    assert (build_model(config_of(zero_init_residual=False), 2).get_parameter(last) == 1).all()
    assert (build_model(config_of(init="kaiming"), 2).get_parameter(last) == 1).all()
    assert not TrainConfig(model="alexnet").resolve().zero_init_residual


def test_changes_of_the_model() -> None:
    model = build_model(config_of(activation="gelu", dropout=0.3, drop_path=0.2), 5)
    kinds = Counter(type(module).__name__ for module in model.modules())
    assert kinds["GELU"] == 9 and kinds["ReLU"] == 0 and kinds["Dropout"] == 1 and kinds["StochasticDepth"] == 8
    bare = build_model(config_of(norm="none", init="fixup"), 5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in bare.modules())
    assert (bare.fc.weight == 0).all()


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = build_model(config_of(), 7)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    model = build_model(config_of(weights=str(tmp_path / "weights.pt")), 2)
    assert torch.equal(model.conv1.weight, source.conv1.weight) and model.fc.out_features == 2


def test_weights_come_from_torchvision_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    source = torchvision.models.resnet18()
    asked: list[str] = []

    def fetch(self: torchvision.models.ResNet18_Weights, **_: object) -> dict[str, torch.Tensor]:
        asked.append(self.name)
        return source.state_dict()

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fetch)
    for name in ("DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"):
        model = build_model(config_of(weights=name), 2)
        assert torch.equal(model.conv1.weight, source.conv1.weight) and model.fc.out_features == 2
    assert asked == ["IMAGENET1K_V1"] * 3

    def unreachable(self: torchvision.models.ResNet18_Weights, **_: object) -> dict[str, torch.Tensor]:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", unreachable)
    with pytest.raises(
        UserError, match=r"--weights DEFAULT: could not be fetched from https://.* \(no route to host\)"
    ):
        build_model(config_of(weights="DEFAULT"), 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"weights": "IMAGENET1K_V9"},
            r"--weights IMAGENET1K_V9: there is no such file, and .* \(for resnet18: IMAGENET1K_V1, DEFAULT\)",
        ),
        ({"activation": "rulu"}, r"--activation rulu: there is no activation 'rulu' here; did you mean 'relu'"),
        ({"model": "alexnet", "drop_path": 0.1, "img_size": 64}, r"--drop-path 0\.1: .*no residual branch"),
        ({"model": "alexnet", "init": "fixup", "img_size": 64}, r"--init fixup: .*no residual branch"),
        ({"weights": "none.pt"}, r"none\.pt"),
    ],
)
def test_what_a_model_has_not_cannot_be_changed(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(config_of(**settings), 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_policy": "value", "clip_grad": None}, "--clip-policy value takes its limit from --clip-grad"),
        ({"nesterov": True, "opt": "adam"}, "--nesterov is a kind of momentum of --opt sgd"),
        ({"nesterov": True, "momentum": 0.0}, "--nesterov is a kind of momentum"),
        ({"zero_init_residual": True, "init": "kaiming"}, "--zero-init-residual sets a norm's weight"),
        ({"zero_init_residual": True, "model": "alexnet"}, "alexnet has no residual blocks"),
        ({"norm": "none"}, "--norm none: without norms, residual blocks add up"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(**settings)


def test_group_norm_in_the_place_of_batch_norm() -> None:
    model = build_model(config_of(norm="group"), 5)
    kinds = Counter(type(module).__name__ for module in model.modules())
    assert kinds["GroupNorm"] == 20 and kinds["BatchNorm2d"] == 0
    assert (model.get_parameter("layer1.0.bn2.weight") == 0).all()  # blocks still begin as the identity
    with pytest.raises(UserError, match=r"--norm group: alexnet has no batch normalisation"):
        build_model(config_of(norm="group", model="alexnet", img_size=64), 5)


def test_a_run_with_group_norm(photos: Path, in_tmp: Path) -> None:
    for name, more in (("whole", ["--epochs", 2]), ("half", ["--epochs", 1])):
        assert main(arguments(photos, "--norm", "group", "--sched", "constant", "--output", name, *more)) == 0
    assert main(["train", "--resume", "half", "--epochs", "2"]) == 0
    assert untimed(Path("half/steps.csv")) == untimed(Path("whole/steps.csv"))
