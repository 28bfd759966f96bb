"""Detection, trained for real on a handful of small scenes: what it writes, how it starts, and what stops it."""

from __future__ import annotations

import json
import math
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision", exc_type=Exception)
pytest.importorskip("pycocotools")

import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from train.cases import read_rows, untimed
from train.detection import detect_arguments, slim_down, write_scenes
from train.test_resume import assert_same_run, stop_after
from train.test_survival import die_at, in_a_child

from gradfast.cli import main
from gradfast.errors import UserError
from gradfast.train.config import TrainConfig, make_config
from gradfast.train.machine.place import Place
from gradfast.train.results.checkpoint import load_checkpoint
from gradfast.train.results.history import summary_columns
from gradfast.train.tasks.detect import NOTHING, BoxObjective, Detect
from gradfast.train.tasks.detectors import DETECTORS, FASTER_RCNN, RETINANET, build_detector

Refused = Callable[[list[str], str], str]
TWO_STAGES = ("--proposals", "--proposal-batch", "--box-batch")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 scenes, of which 10 are learnt from, one of them empty: read only."""
    return write_scenes(tmp_path_factory.mktemp("data") / "shapes", 13)


@pytest.fixture
def slim(monkeypatch: pytest.MonkeyPatch) -> None:
    slim_down(monkeypatch.setattr)


def one_stage(command: list[str]) -> list[str]:
    """The command without the settings that RetinaNet does not have, and with RetinaNet."""
    kept = [word for number, word in enumerate(command) if not {word, command[number - 1]} & set(TWO_STAGES)]
    return [*kept, "--model", "retinanet_resnet50_fpn"]


def test_a_process_without_an_image_takes_part_with_zeros(slim: None) -> None:
    for name in ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"):
        model = build_detector(config_of(model=name), 2)
        nobody: Any = None  # is held out
        objective = BoxObjective(DETECTORS[name], nobody, Place(torch.device("cpu")))
        total, parts = objective.losses(model, NOTHING.emptied())
        total.backward()
        assert total.item() == 0.0 and set(parts) == set(objective.components)
        for parameter in model.parameters():
            assert not parameter.requires_grad or (parameter.grad is not None and not parameter.grad.any())


# ---------------------------------------------------------------- what a run writes


@pytest.mark.parametrize("model", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_the_run_folder_of_the_real_models(scenes: Path, in_tmp: Path, model: str) -> None:
    command = detect_arguments(scenes, "--epochs", 1, "--output", "run")
    assert main(one_stage(command) if model.startswith("retina") else command) == 0
    names = {path.name for path in Path("run").iterdir()}
    expected = {"summary.csv", "steps.csv", "config.yaml", "curves.png", "predictions.png", "last.pt", "best.pt"}
    assert names - {"events.jsonl"} == expected  # the record of what the guard saw, where it saw anything
    parts = RETINANET if model.startswith("retina") else FASTER_RCNN
    steps = read_rows(Path("run/steps.csv"))
    assert len(steps) == 5 and list(steps[0])[-len(parts) :] == list(parts)
    for step in steps:  # the loss is the sum of its parts, each rounded to float32
        assert float(step["loss"]) == pytest.approx(sum(float(step[part]) for part in parts), rel=1e-6)
    (row,) = read_rows(Path("run/summary.csv"))
    assert list(row) == list(summary_columns(Detect()))
    assert 0 <= float(row["eval_AP"]) <= float(row["eval_AP50"]) <= 1
    assert load_checkpoint(Path("run/best.pt"))["best"] == {"epoch": 1, "AP": float(row["eval_AP"])}
    with Image.open("run/predictions.png") as picture:
        assert picture.width >= 400 and len(set(picture.convert("L").tobytes())) > 20


def test_it_learns(scenes: Path, in_tmp: Path, slim: None) -> None:
    assert main(detect_arguments(scenes, "--epochs", 3, "--norm", "group", "--output", "run")) == 0
    row = read_rows(Path("run/summary.csv"))[-1]
    assert float(row["eval_AP50"]) > 0.3, row  # a detector that learnt nothing has less than 0.03


@pytest.mark.parametrize(
    "flags",
    [
        ("--model-ema", "--opt", "adamw", "--lr", 1e-4, "--grad-accum", 2),
        ("--amp", "bf16", "--channels-last", "--augment", "none", "--sched", "plateau", "--patience", 0),
        ("--clip-policy", "zclip", "--workers", 1, "--cache", "off", "--norm", "group", "--monitor-every", 2),
        ("--model", "fasterrcnn_resnet50_fpn_v2", "--epochs", 1, "--no-zero-init-residual"),
    ],
)
def test_flags_in_company(scenes: Path, in_tmp: Path, slim: None, flags: tuple[object, ...]) -> None:
    assert main(detect_arguments(scenes, *flags, "--output", "run")) == 0
    rows = read_rows(Path("run/summary.csv"))
    steps = read_rows(Path("run/steps.csv"))
    assert len(steps) == len(rows) * (3 if "--grad-accum" in flags else 5)
    assert all(math.isfinite(float(value)) for step in steps for value in step.values())


def test_images_without_boxes_are_learnt_from(tmp_path: Path, in_tmp: Path, slim: None) -> None:
    data = tmp_path / "shapes"
    write_scenes(data / "train", 4, seed=1, empty=3)
    write_scenes(data / "val", 3, seed=2)
    for number, more in enumerate(([], ["--model", "retinanet_resnet50_fpn"])):
        command = detect_arguments(data, "--epochs", 1, "--output", f"run{number}")
        assert main(one_stage(command) if more else command) == 0
        steps = read_rows(Path(f"run{number}/steps.csv"))
        assert len(steps) == 2 and all(math.isfinite(float(step["loss"])) for step in steps)


# ---------------------------------------------------------------- the model


def config_of(**settings: Any) -> TrainConfig:
    return make_config({"task": "detect", "img_size": 64, **settings})


def saved_classifier(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint as `gradfast train` writes it, of a ResNet50 for five classes with statistics of its own."""
    torch.manual_seed(5)
    state = torchvision.models.resnet50(num_classes=5).state_dict()
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.normal_()
    torch.save({"format": 1, "model": state, "optimizer": {"state": {}}}, path)
    return state


@pytest.mark.parametrize("model", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn_v2"])
def test_a_classifiers_checkpoint_fills_the_resnet(tmp_path: Path, model: str) -> None:
    state = saved_classifier(tmp_path / "best.pt")
    detector = build_detector(config_of(model=model, weights=str(tmp_path / "best.pt")), 2)
    body: Any = detector.backbone.body
    for name, tensor in body.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    norms = [module for module in body.modules() if "BatchNorm" in type(module).__name__]
    assert len(norms) == 53 and all(isinstance(norm, FrozenBatchNorm2d) for norm in norms)
    learning = {name.partition(".")[0] for name, parameter in body.named_parameters() if parameter.requires_grad}
    assert learning == {"layer2", "layer3", "layer4"}


def test_norms_that_learn_can_be_asked_for(tmp_path: Path) -> None:
    saved_classifier(tmp_path / "best.pt")
    settings = {"weights": str(tmp_path / "best.pt"), "frozen_norm": False, "trainable_backbone_layers": 5}
    body: Any = build_detector(config_of(**settings), 2).backbone.body
    assert all(parameter.requires_grad for parameter in body.parameters())
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in body.modules())


def test_frozen_norms_compute_what_the_norms_did_in_evaluation(tmp_path: Path) -> None:
    state = saved_classifier(tmp_path / "best.pt")
    body: Any = build_detector(config_of(weights=str(tmp_path / "best.pt")), 2).backbone.body
    whole = torchvision.models.resnet50(num_classes=5)
    whole.load_state_dict(state)
    whole.eval()
    body.train()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.layer1(whole.maxpool(whole.relu(whole.bn1(whole.conv1(image)))))
        torch.testing.assert_close(body(image)["0"], expected, rtol=1e-4, atol=1e-4)  # sums in another order


def test_from_random_weights_all_learns_and_blocks_begin_as_the_identity(slim: None) -> None:
    body: Any = build_detector(config_of(), 2).backbone.body
    assert all(parameter.requires_grad for parameter in body.parameters())
    assert not body.layer3[0].bn2.weight.any() and body.layer3[0].bn1.weight.all()


def test_a_detectors_own_checkpoint_is_taken_whole(scenes: Path, in_tmp: Path, slim: None) -> None:
    assert main(detect_arguments(scenes, "--epochs", 1, "--output", "run")) == 0
    state = load_checkpoint(Path("run"))["model"]
    detector = build_detector(config_of(weights="run/last.pt", frozen_norm=False), 2)
    for name, tensor in detector.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_weights_of_something_else_are_refused(tmp_path: Path, slim: None) -> None:
    torch.save({"model": {"encoder.weight": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="it is of another model"):
        build_detector(config_of(weights=str(tmp_path / "other.pt")), 2)


def test_anchors_begin_at_the_size_asked_for(slim: None) -> None:
    two: Any = build_detector(config_of(anchor_size=16), 2)
    assert two.rpn.anchor_generator.sizes == ((16,), (32,), (64,), (128,), (256,))
    one: Any = build_detector(config_of(model="retinanet_resnet50_fpn", anchor_size=32), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        original = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    assert one.anchor_generator.sizes == original.anchor_generator.sizes


# ---------------------------------------------------------------- bad settings and bad losses


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mixup", "0.2"], r"--mixup is a setting of --task classify, and this is --task detect"),
        (["--task", "classify"], r"--proposals is a setting of --task detect, and this is --task classify"),
        (["--model", "resnet50"], r"there is no detector 'resnet50'; there are fasterrcnn_resnet50_fpn, "),
        (["--model", "retinanet_resnet50_fpn"], r"--proposals: retinanet_resnet50_fpn has no second stage"),
        (["--augment", "crop"], r"--augment crop does not move boxes; --task detect takes none, flip or dihedral"),
        (["--frozen-norm"], r"--frozen-norm keeps the batch norms of --weights; give those"),
        (["--img-size", "32"], r"--img-size 32 is too small for fasterrcnn_resnet50_fpn; take 64 or more"),
        (["--trainable-backbone-layers", "6"], r"a ResNet has 5 stages; give 0 to 5"),
        (["--norm", "none"], r"--norm none: a detector's ResNet needs norms; take batch or group"),
        (["--data", "scenes"], r"there is no such folder; gradfast data make-scenes scenes writes the built-in scenes"),
        (["--device", "gpu"], r"--device gpu does not work here"),
    ],
)
def test_settings_that_do_not_go_together(
    scenes: Path, in_tmp: Path, refused: Refused, flags: list, message: str
) -> None:
    refused(detect_arguments(scenes, *flags), message)
    assert list(in_tmp.iterdir()) == []


def test_no_box_at_all(tmp_path: Path, in_tmp: Path, refused: Refused) -> None:
    data = tmp_path / "shapes"
    write_scenes(data / "train", 3, seed=1, empty=0)
    write_scenes(data / "val", 3, seed=2, empty=3)
    refused(detect_arguments(data), r"none of the 3 held-out images has a box; add some")


def test_bad_boxes_and_images_are_named_and_skipped(
    tmp_path: Path, in_tmp: Path, slim: None, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    data = write_scenes(tmp_path / "shapes", 10)
    (data / "003.png").write_bytes(b"spoiled")
    content = json.loads((data / "annotations.json").read_text())
    content["annotations"][0]["bbox"][2] = 0
    (data / "annotations.json").write_text(json.dumps(content))
    command = detect_arguments(data, "--epochs", 1, "--output", "run")
    refused([*command, "--strict"], r"--strict: .*annotations\.json.* cannot be used")
    assert not Path("run").exists()
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"skipped {data / '003.png'}: not an image" in out and "; 2 files skipped" in out
    assert "7 training + 2 held-out images" in out
    assert len(Path("run/skipped_images.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize("how", ["raise", "skip"])
def test_a_loss_that_is_nan_is_named(
    scenes: Path,
    in_tmp: Path,
    slim: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refused: Refused,
    how: str,
) -> None:
    from gradfast.train.tasks import detect

    real, calls = detect.BoxObjective.losses, []

    def losses(self: Any, model: nn.Module, batch: Any) -> Any:
        total, parts = real(self, model, batch)
        calls.append(None)
        if len(calls) == 3:
            parts = {**parts, "loss_box_reg": parts["loss_box_reg"] * math.nan}
            total = torch.stack(list(parts.values())).sum()
        return total, parts

    monkeypatch.setattr(detect.BoxObjective, "losses", losses)
    command = detect_arguments(scenes, "--epochs", 1, "--nonfinite", how, "--output", "run")
    if how == "raise":
        refused(command, r"epoch 1, batch 3: loss_box_reg is nan; the last checkpoint is run/last\.pt, after 0 epochs")
        return
    assert main(command) == 0
    assert "skipped steps 1 (loss_box_reg)" in capsys.readouterr().out
    (row,) = read_rows(Path("run/summary.csv"))
    assert row["skipped_steps"] == "1"
    assert all(torch.isfinite(tensor).all() for tensor in load_checkpoint(Path("run"))["model"].values())


# ---------------------------------------------------------------- stopped and resumed


def test_stopped_killed_and_resumed_it_is_the_same_run(
    scenes: Path, in_tmp: Path, slim: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(output: str) -> list[str]:
        return detect_arguments(scenes, "--augment", "dihedral", "--output", output)

    def undisturbed() -> int:
        calls = die_at(-1, "undisturbed")
        code = main(command("undisturbed"))
        Path("count").write_text(str(len(calls)))
        return code

    assert in_a_child(undisturbed) == 0
    with monkeypatch.context() as stopped:
        stop_after(stopped, 7, signal.SIGTERM)
        assert main(command("stopped")) == 143
    assert load_checkpoint(Path("stopped"))["position"]["batch"] == 2
    assert main(["train", "--resume", "stopped", "--workers", "1", "--cache", "off"]) == 0
    assert_same_run(Path("stopped"), Path("undisturbed"))

    def killed() -> int:
        die_at(int(Path("count").read_text()) * 3 // 4, "killed")  # while the second epoch's files are written
        return main(command("killed"))

    assert in_a_child(killed) == -signal.SIGKILL
    assert main(["train", "--resume", "auto", "--output", "killed"]) == 0
    assert_same_run(Path("killed"), Path("undisturbed"))
    assert {path.name for path in Path("killed").iterdir()} == {path.name for path in Path("undisturbed").iterdir()}
    assert untimed(Path("killed/steps.csv")) == untimed(Path("undisturbed/steps.csv"))
