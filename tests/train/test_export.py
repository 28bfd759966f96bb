"""`gradfast export`: files that other programs run, with the answers of the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import torch
from torch import Tensor, nn
from train.trained_runs import train_variant

import gradfast.train
from gradfast.cli import main
from gradfast.errors import UserError
from gradfast.train.trained import export
from gradfast.train.trained.export_modules import PixelClassifier
from gradfast.train.trained.load import read_trained

FORMATS = ["torchscript", "onnx", "torch-export", "safetensors"]
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_variant("crop", photos, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def pixels(run: Path, photos: Path) -> Tensor:
    """[3, 3, 32, 32] uint8: squares of three photographs, cut as evaluation does."""
    transform = read_trained(run / "best.pt").transform
    paths = sorted((photos / "dots").glob("*.png"))[:3]
    return torch.stack([transform.pixels(gradfast.train.data.preprocess.load_rgb(path)) for path in paths])


def answers(run: Path, photos: Path) -> Tensor:
    """What load_model's model says of the three photographs, from their files."""
    model, _, transform = gradfast.train.load_model(run)
    with torch.inference_mode():
        return model(torch.stack([transform(path) for path in sorted((photos / "dots").glob("*.png"))[:3]]))


def need(kind: str) -> None:
    for package in PACKAGES.get(kind, ()):
        pytest.importorskip(package)


def exported(run: Path, kind: str, output: Path, *flags: str) -> Path:
    need(kind)
    assert main(["export", str(run), "--format", kind, "--output", str(output), *flags]) == 0
    return output


def run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def test_torchscript(run: Path, photos: Path, pixels: Tensor, tmp_path: Path) -> None:
    extra = {"gradfast.json": ""}
    model = torch.jit.load(exported(run, "torchscript", tmp_path / "m.ts"), _extra_files=extra)
    with torch.inference_mode():
        assert torch.allclose(model(pixels), answers(run, photos), rtol=1e-5, atol=1e-6)
        assert torch.equal(model(pixels.float()), model(pixels))  # floats from 0 to 255 will do
    check_metadata(json.loads(extra["gradfast.json"]))


def test_torch_export(run: Path, photos: Path, pixels: Tensor, tmp_path: Path) -> None:
    extra = {"gradfast.json": ""}
    path = exported(run, "torch-export", tmp_path / "m.pt2", "--dynamic-batch")
    model = torch.export.load(path, extra_files=extra).module()
    with torch.inference_mode():
        assert torch.allclose(model(pixels), answers(run, photos), rtol=1e-5, atol=1e-6)
        assert model(pixels[:1]).shape == (1, 2)
    check_metadata(json.loads(extra["gradfast.json"]))


def test_onnx(run: Path, photos: Path, pixels: Tensor, tmp_path: Path) -> None:
    path = exported(run, "onnx", tmp_path / "m.onnx", "--dynamic-batch")
    assert torch.allclose(run_onnx(path, pixels), answers(run, photos), rtol=1e-5, atol=1e-5)
    assert run_onnx(path, pixels[:1]).shape == (1, 2)
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model)
    values = {entry.key: entry.value for entry in model.metadata_props}
    texts = ("task", "model", "normalisation", "input", "output", "preprocessing", "gradfast")
    check_metadata({name: value if name in texts else json.loads(value) for name, value in values.items()})


def test_safetensors(run: Path, tmp_path: Path) -> None:
    path = exported(run, "safetensors", tmp_path / "m.safetensors")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        metadata = file.metadata()
    model = gradfast.train.load_model(run).model.state_dict()
    assert weights.keys() == model.keys() and all(torch.equal(weights[name], model[name]) for name in model)
    assert json.loads(metadata["classes"]) == ["dots", "stripes"] and metadata["normalisation"].startswith("outside")


def check_metadata(metadata: dict[str, Any]) -> None:
    assert metadata["classes"] == ["dots", "stripes"] and metadata["img_size"] == 32 and metadata["task"] == "classify"
    assert metadata["margin"] == 0.0625 and metadata["mean"] == [0.485, 0.456, 0.406]
    assert metadata["normalisation"].startswith("inside") and metadata["model"] == "resnet18"


@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
def test_without_dynamic_batch_a_graph_takes_one_image(kind: str, run: Path, pixels: Tensor, tmp_path: Path) -> None:
    path = exported(run, kind, tmp_path / "m")
    runs: Callable[[Tensor], Any] = (
        torch.export.load(path).module() if kind == "torch-export" else lambda images: run_onnx(path, images)
    )
    assert runs(pixels[:1]).shape == (1, 2)
    with pytest.raises(Exception, match=r"[Gg]uard|expected|Expected|INVALID|shape"):
        runs(pixels)


def test_what_is_said_and_the_names_of_files(
    run: Path, photos: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["export", str(run), "--format", "torchscript", "--images", str(photos)]) == 0
    assert (in_tmp / "crop.ts").is_file() and list(in_tmp.iterdir()) == [in_tmp / "crop.ts"]
    out, err = capsys.readouterr()
    assert out.startswith("crop.ts: 44.") and "on 16 images it differs from the model by " in out and err == ""
    assert "(0.0001 is allowed)" in out and out.count("\n") == 1


def test_another_size(run: Path, tmp_path: Path) -> None:
    model = torch.jit.load(exported(run, "torchscript", tmp_path / "m.ts", "--img-size", "48"))
    assert model(torch.zeros(2, 3, 48, 48, dtype=torch.uint8)).shape == (2, 2)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_wrong_model_gets_no_name(
    kind: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is exported answers a little otherwise than the model: the check, which runs it, finds out."""
    need(kind)

    class Wrong(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, images: Tensor) -> Tensor:
            return self.module(images) * 1.001

    real = export.FORMATS[kind][1]

    def spoil(job: export.Job) -> export.Exported:
        if kind == "safetensors":
            bare = nn.Module()
            weights = {name: value * 1.01 for name, value in job.bare.state_dict().items()}
            monkeypatch.setattr(bare, "state_dict", lambda: weights)
            return real(dataclasses.replace(job, bare=bare))
        return real(dataclasses.replace(job, module=Wrong(job.module)))

    monkeypatch.setitem(export.FORMATS, kind, (export.FORMATS[kind][0], spoil))
    output = tmp_path / "wrong"
    assert main(["export", str(run), "--format", kind, "--output", str(output)]) == 2
    assert "the exported model differs from the model by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_torch_cannot_export(run: Path, tmp_path: Path) -> None:
    class Fickle(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images if float(images.sum()) > 0 else -images

    trained = read_trained(run / "best.pt")
    trained.model = Fickle()
    images = export.random_images(32)
    with pytest.raises(UserError, match=r"--format torch-export: torch cannot export resnet18 \("):
        export.export(trained, "torch-export", images, 32, dynamic=False)


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (["--format", "tflite"], "--format: expected one of torchscript, onnx, torch-export, safetensors"),
        ([], "arguments are required: --format"),
        (["--format", "torchscript", "--img-size", "x"], "--img-size: expected a whole number"),
        (["--format", "torchscript", "--images", "none.png"], r"cannot use none\.png"),
        (["--format", "torchscript", "--output", "none/m.ts"], r"cannot write none/m\.ts"),
    ],
)
def test_flags_that_cannot_be(
    flags: list[str], pattern: str, run: Path, in_tmp: Path, refused: Callable[[list[str], str], str]
) -> None:
    refused(["export", str(run), *flags], pattern)
    assert list(in_tmp.iterdir()) == []


def test_normalisation_is_that_of_evaluation(pixels: Tensor) -> None:
    from gradfast.train.machine.place import normaliser

    assert torch.equal(PixelClassifier(nn.Identity())(pixels), normaliser(torch.device("cpu"))(pixels))


def test_random_images_are_the_same_every_time_and_like_pictures() -> None:
    images = torch.stack(export.random_images(32))
    assert torch.equal(images, torch.stack(export.random_images(32)))
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8 and images.float().std() > 40
