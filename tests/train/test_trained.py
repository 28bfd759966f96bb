"""`load_model`: the model that the run measured, from its folder alone."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import torch
from PIL import Image
from train.cases import read_rows
from train.trained_runs import VARIANTS, train_variant

import gradfast.train
from gradfast.errors import UserError
from gradfast.train.config import TrainConfig
from gradfast.train.data.build import build_data
from gradfast.train.trained.load import find_checkpoint, read_trained


@pytest.fixture(scope="module", params=["plain", "average", "crop", "changed"])
def run(request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_variant(request.param, photos, tmp_path_factory.mktemp("runs"))


def test_answers_by_hand_give_the_accuracy_of_the_run(run: Path) -> None:
    """Every held-out image through transform and model, without any of gradfast's own evaluation."""
    model, classes, transform = gradfast.train.load_model(run)
    assert not model.training and classes == ("dots", "stripes")
    trained = read_trained(run / "best.pt")
    held_out = build_data(TrainConfig(**vars(trained.config)), lambda text: None).evaluation.listing
    with torch.inference_mode():
        answers = [int(model(transform(path)[None]).argmax()) for path in held_out.paths]
    right = [answer == target for answer, target in zip(answers, held_out.targets)]
    assert sum(right) / len(right) == float(read_rows(run / "summary.csv")[trained.epoch - 1]["eval_acc1"])


def test_a_path_and_a_picture_are_the_same(run: Path, photos: Path) -> None:
    transform = gradfast.train.load_model(run).transform
    path = photos / "dots" / "000.png"
    with Image.open(path) as image:
        assert torch.equal(transform(path), transform(image))
    assert torch.equal(transform(str(path)), transform(path)) and transform(path).shape == (3, 32, 32)
    assert transform(path).dtype == torch.float32
    with pytest.raises(UserError, match=r"cannot use none\.png: No such file or directory"):
        transform("none.png")


def test_the_average_is_taken_where_there_is_one(photos: Path, tmp_path: Path) -> None:
    run = train_variant("average", photos, tmp_path)
    state = torch.load(run / "best.pt", weights_only=True)
    averaged, last = (gradfast.train.load_model(run, average=average).model.state_dict() for average in (True, False))
    assert all(torch.equal(averaged[name], value) for name, value in state["average"]["module"].items())
    assert all(torch.equal(last[name], value) for name, value in state["model"].items())
    assert not torch.equal(averaged["fc.weight"], last["fc.weight"])


def test_loading_draws_nothing_from_the_generator(run: Path) -> None:
    before = torch.get_rng_state()
    gradfast.train.load_model(run)
    assert torch.equal(torch.get_rng_state(), before)


def test_which_file_of_a_run(photos: Path, in_tmp: Path) -> None:
    run = train_variant("plain", photos, Path("runs"))
    assert find_checkpoint("plain") == find_checkpoint("runs/plain") == run / "best.pt"
    assert find_checkpoint("runs/plain/last.pt") == run / "last.pt"
    (run / "best.pt").unlink()
    assert find_checkpoint("plain") == run / "last.pt"
    (run / "last.pt").unlink()
    with pytest.raises(UserError, match=r"runs/plain holds neither best\.pt nor last\.pt"):
        find_checkpoint("plain")
    with pytest.raises(UserError, match="there is no checkpoint none"):
        find_checkpoint("none")


def test_checkpoints_that_cannot_be_used_are_named(photos: Path, tmp_path: Path) -> None:
    run = train_variant("plain", photos, tmp_path)
    state = torch.load(run / "last.pt", weights_only=True)

    def refusal(**changes: object) -> str:
        torch.save(state | changes, tmp_path / "changed.pt")
        with pytest.raises(UserError) as caught:
            gradfast.train.load_model(tmp_path / "changed.pt")
        return str(caught.value)

    assert "format 99" in refusal(format=99) and "written by gradfast 9.9" in refusal(format=99, version="9.9")
    later = refusal(version="9.9", config=state["config"] | {"task": "segment"})
    assert "cannot build the model of" in later and "of version 9.9" in later
    assert "no classification model 'resnet17'" in refusal(config=state["config"] | {"model": "resnet17"})
    assert "Error(s) in loading state_dict" in refusal(config=state["config"] | {"model": "resnet34"})
    (tmp_path / "cut.pt").write_bytes((run / "last.pt").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cut\.pt is damaged, cut short or not a checkpoint"):
        gradfast.train.load_model(tmp_path / "cut.pt")


def test_variants_are_built_anew(run: Path) -> None:
    """The settings that add or change modules are followed: the names of the weights say so."""
    names = set(read_trained(find_checkpoint(str(run))).model.state_dict())
    assert ("bn1.running_mean" in names) == (run.name != "changed") and run.name in VARIANTS
