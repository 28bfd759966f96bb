"""The doctor both ways: silent on healthy models, and right about models broken on purpose."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monitor.patients import BROKEN, HEALTHY, Case, dead, labelled, words
from nn.models import TinyGPT, mlp
from torch import Tensor, nn

import gradfast
from gradfast.cli import main
from gradfast.monitor.doctor import Diagnosis
from gradfast.monitor.doctor.finding import trend
from gradfast.monitor.doctor.rate import check_rate

# ---------------------------------------------------------------- healthy models


@pytest.mark.parametrize(
    ("name", "lr"),
    [
        ("resnet18", 0.1),
        ("resnet50", 0.05),
        ("mobilenet_v3_small", 0.05),
        ("densenet121", 0.01),
        ("vit_b_16", 0.01),
        ("efficientnet_b0", 0.01),
        ("regnet_y_400mf", 0.05),
        ("shufflenet_v2_x1_0", 0.05),
        ("squeezenet1_0", 0.01),
        ("convnext_tiny", 0.01),
        ("swin_t", 0.01),
    ],
)
def test_no_false_alarm_on_torchvision(name: str, lr: float) -> None:
    torchvision = pytest.importorskip("torchvision")
    options = {"image_size": 32, "num_layers": 4} if name == "vit_b_16" else {}
    if options:
        options |= {"patch_size": 16, "num_heads": 4, "hidden_dim": 128, "mlp_dim": 256}
        model = torchvision.models.VisionTransformer(**options)
    else:
        model = torchvision.models.get_model(name)
    batch = torch.randn(16, 3, 32, 32), torch.randint(1000, (16,))
    assert_healthy(gradfast.diagnose(model, batch, F.cross_entropy, lr=lr))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batch", [8, 32])
def test_a_rate_that_trains_resnet18_is_let_pass_on_any_draw(seed: int, batch: int) -> None:
    """Behind batch norms the first step at 0.1 may raise the loss, far beyond the limit of its curvature."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(seed)
    model = torchvision.models.resnet18(num_classes=10)
    data = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    optimizer = gradfast.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert_healthy(gradfast.diagnose(model, data, F.cross_entropy, optimizer=optimizer))


def assert_healthy(diagnosis: Diagnosis) -> None:
    assert diagnosis.ok, str(diagnosis)


def test_no_false_alarm_on_a_resnet_that_starts_as_the_identity() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(zero_init_residual=True)
    assert_healthy(gradfast.diagnose(model, (torch.randn(8, 3, 32, 32), torch.randint(1000, (8,))), F.cross_entropy))


@pytest.mark.parametrize(("width", "depth"), [(64, 4), (128, 8)])
def test_no_false_alarm_on_gpt2(width: int, depth: int) -> None:
    model, batch, loss_fn = words(TinyGPT(width=width, depth=depth))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    assert_healthy(gradfast.diagnose(model, batch, loss_fn, optimizer=optimizer))


@pytest.mark.parametrize("name", HEALTHY)
def test_no_false_alarm(name: str) -> None:
    assert_healthy(gradfast.diagnose(*HEALTHY[name]()))


# ---------------------------------------------------------------- models broken on purpose


@pytest.mark.parametrize("name", BROKEN)
def test_finds_what_is_broken(name: str) -> None:
    make, kinds, layer, mend = BROKEN[name]
    diagnosis = gradfast.diagnose(*make())
    assert set(kinds.split()) <= diagnosis.kinds(), str(diagnosis)
    finding = next(finding for finding in diagnosis.findings if finding.kind == kinds.split()[0])
    assert layer is None or layer in finding.layers, str(diagnosis)
    assert mend in finding.mend, str(diagnosis)
    assert any(character.isdigit() for character in finding.evidence)


class Clamped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).clamp(min=1e-12).sqrt()


class Autocast(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def in_the_model(name: str, model: Any) -> nn.Module:
    """What a line says that belongs into the model's own code."""
    if name == "beyond float16":
        return Autocast(*model)
    model[{"sqrt of 0": 2, "detached": 1}[name]] = Clamped() if name == "sqrt of 0" else nn.Identity()
    return model


@pytest.mark.parametrize("name", BROKEN)
def test_the_line_that_mends_does_mend(name: str) -> None:
    """The first finding's line is run where it belongs, on model, batch or loss. Then the doctor is silent."""
    model, (inputs, targets), loss_fn = BROKEN[name][0]()
    line = gradfast.diagnose(model, (inputs, targets), loss_fn).findings[0].mend
    if "loss = " in line:
        code, old = compile(line, "mend", "exec"), loss_fn

        def mended_loss(output: Tensor, targets: Tensor) -> Tensor:
            names = {"F": F, "output": output, "targets": targets, "loss": old(output, targets)}
            exec(code, names)
            return names["loss"]

        loss_fn = mended_loss
    elif line.startswith(("gradfast.", "inputs = ", "targets = ", "keep = ")):
        names = {"gradfast": gradfast, "torch": torch, "model": model, "inputs": inputs, "targets": targets}
        exec(line, names)
        inputs, targets = names["inputs"], names["targets"]
    else:
        model = in_the_model(name, model)
    assert_healthy(gradfast.diagnose(model, (inputs, targets), loss_fn))


@pytest.mark.parametrize("curvature", [0.5, 100.0])
def test_the_rate_that_is_proposed_descends(curvature: float) -> None:
    model, batch, loss_fn = quadratic(curvature)
    line = gradfast.diagnose(model, batch, loss_fn, lr=10 / curvature).findings[0].mend
    names: dict[str, Any] = {}
    exec(line, names)
    found = gradfast.diagnose(model, batch, loss_fn, lr=names["lr"])
    assert found.ok and found.rate is not None and found.rate.loss_after < found.rate.loss


# ---------------------------------------------------------------- the learning rate


def quadratic(curvature: float) -> Case:
    """loss = curvature / 2 * w^2 for one weight w = 1: g = c, H = c, so gradient descent descends below lr = 2 / c."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    x = torch.ones(1, 1)
    return model, (x, torch.zeros(1, 1)), lambda out, target: curvature / 2 * (out - target).square().mean()


@pytest.mark.parametrize("curvature", [0.5, 4.0, 100.0])
def test_limit_of_a_quadratic_is_two_over_its_curvature(curvature: float) -> None:
    model, batch, loss_fn = quadratic(curvature)
    check = check_rate(model, batch, loss_fn, lr=6 / curvature, optimizer=None)
    assert check.limit == pytest.approx(2 / curvature, rel=1e-3)  # a difference over a thousandth, in float32
    assert check.curvature == pytest.approx(curvature, rel=1e-3)
    assert check.loss_after == pytest.approx(curvature / 2 * 25, rel=1e-5)  # w = 1 - 6 = -5
    assert gradfast.diagnose(model, batch, loss_fn, lr=6 / curvature).kinds() == {"learning-rate"}
    assert gradfast.diagnose(model, batch, loss_fn, lr=1.9 / curvature).ok


def test_clipping_in_the_optimiser_counts() -> None:
    """The step of lr 6 / c is clipped to norm 0.1, and descends."""
    model, batch, loss_fn = quadratic(4.0)
    free = gradfast.SGD(model.parameters(), lr=1.5)
    clipped = gradfast.SGD(model.parameters(), lr=1.5, max_norm=0.1)
    assert "learning-rate" in gradfast.diagnose(model, batch, loss_fn, optimizer=free).kinds()
    assert gradfast.diagnose(model, batch, loss_fn, optimizer=clipped).ok


def test_adam_steps_by_the_sign() -> None:
    """One weight at 1: Adam with lr 5 goes to -4 whatever the gradient's size."""
    model, batch, loss_fn = quadratic(2.0)
    diagnosis = gradfast.diagnose(model, batch, loss_fn, optimizer=torch.optim.Adam(model.parameters(), lr=5.0))
    assert diagnosis.rate.loss_after == pytest.approx(16.0, rel=1e-5)
    assert diagnosis.kinds() == {"learning-rate"}


# ---------------------------------------------------------------- leaves no trace; report; command


def test_leaves_everything_as_it_was() -> None:
    model = nn.Sequential(
        nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(16, 3)
    )
    gradient = torch.randn(16, 16)
    model[0].weight.grad = gradient
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    gradfast.diagnose(model, (torch.randn(32, 16), torch.randint(3, (32,))), F.cross_entropy, lr=0.1)
    random_after = torch.random.get_rng_state()
    torch.random.set_rng_state(random)
    torch.randn(32, 16), torch.randint(3, (32,))  # the test's own draws
    assert torch.equal(random_after, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].weight.grad is gradient and model[4].weight.grad is None
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    assert not any(hooks)


def test_a_model_that_returns_its_loss() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 2)

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(self.layer(inputs), labels)}

    assert gradfast.diagnose(Own(), {"inputs": torch.randn(4, 8), "labels": torch.randint(2, (4,))}).ok
    with pytest.raises(ValueError, match="loss_fn"):
        gradfast.diagnose(nn.Linear(2, 2), (torch.randn(2, 2), None))


def test_a_batch_of_inputs_alone() -> None:
    """An autoencoder, whose loss takes both, and a loss of the output alone, with and without targets."""
    model, x = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8)), torch.randn(32, 8)
    for batch, loss_fn in (
        (x, F.mse_loss),
        (x, lambda output: output.square().mean()),
        ((x, torch.zeros(32)), lambda output: output.square().mean()),
    ):
        diagnosis = gradfast.diagnose(model, batch, loss_fn)
        assert_healthy(diagnosis)
        assert math.isfinite(diagnosis.measurement.loss) and diagnosis.rate is not None


def test_a_loss_that_cannot_be_called_or_is_none_is_named() -> None:
    model, x = nn.Linear(8, 4), torch.randn(32, 8)
    with pytest.raises(ValueError, match=r"loss_fn has to take \(output, targets\).*'three' takes \(a, b, c\)"):

        def three(a, b, c): ...  # type: ignore[no-untyped-def]

        gradfast.diagnose(model, x, three)
    with pytest.raises(ValueError, match=r"returned a tensor of shape \(32, 4\)"):
        gradfast.diagnose(model, (x, torch.zeros(32, 4)), nn.MSELoss(reduction="none"))
    with pytest.raises(ValueError, match="returned a float"):
        gradfast.diagnose(model, x, lambda output: output.sum().item())


def test_a_later_batch_can_be_the_bad_one() -> None:
    model, good, loss_fn = labelled(mlp(3, 128, outputs=10))
    bad = 1e3 * good[0], good[1]
    assert gradfast.diagnose(model, good, loss_fn, more=[good]).ok
    diagnosis = gradfast.diagnose(model, good, loss_fn, more=[good, bad])
    assert "inputs" in diagnosis.kinds() and "(in batch 3)" in diagnosis.findings[0].evidence


def test_trend_by_hand() -> None:
    assert trend([2.0**n for n in range(11)]).total == pytest.approx(1024)
    assert trend([2.0**n for n in range(11)]).fit == pytest.approx(1)
    assert trend([1.0, 5.0, 1.0, 5.0, 1.0, 5.0, 1.0]).total == pytest.approx(1)
    assert trend([1.0] * 5) is None and trend([1.0, 0.0, 1.0, 1.0, 1.0, 1.0]) is None


def test_report_in_text_table_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich"), pytest.importorskip("matplotlib")
    diagnosis = gradfast.diagnose(*dead())
    text = str(diagnosis)
    assert "error: most relu units never fire" in text and "evidence: 100.0%" in text
    diagnosis.show()
    shown = capsys.readouterr().out
    assert "100% dead" in shown and "mend" in shown
    diagnosis.save_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "most relu units never fire" in page and "data:image/png;base64," in page and 'src="http' not in page


def test_command_on_the_users_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich"), pytest.importorskip("matplotlib")
    (tmp_path / "their_code.py").write_text(
        "import torch\n"
        "def good():\n"
        "    return torch.nn.Linear(4, 2), (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()\n"
        "def bad():\n"
        "    model, (inputs, targets), loss_fn = good()\n"
        "    return model, (1e3 * inputs, targets), loss_fn\n"
        "def ugly():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["doctor", "their_code:good", "--lr", "0.1"]) == 0
    assert "Nothing found" in capsys.readouterr().out
    assert main(["doctor", "their_code:bad", "--html", str(tmp_path / "out.html")]) == 1
    assert "inputs are not normalised" in capsys.readouterr().out and (tmp_path / "out.html").is_file()
    for arguments, word in (
        (["their_code:ugly"], "int"),
        (["their_code:absent"], "absent"),
        (["no_such_module:x"], "no_such_module"),
        ([], "--model"),
        (["--model", "resnet5000"], "resnet5000"),
        (
            ["--model", "vit_b_16"],
            "does not run on 16 images of 64 pixels: Wrong image height! Expected 224 but got 64",
        ),
        (["--model", "googlenet"], "returns a GoogLeNetOutputs in training"),
    ):
        assert main(["doctor", *arguments]) == 2
        assert word in capsys.readouterr().err


def test_command_on_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision"), pytest.importorskip("rich")
    from PIL import Image

    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            noise = torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy()
            Image.fromarray(noise).save(tmp_path / "photos" / name / f"{number}.png")
    options = ["--img-size", "32", "--batch-size", "4", "--batches", "2"]
    assert main(["doctor", "--model", "resnet18", "--data", str(tmp_path / "photos"), *options]) == 0
    assert "Nothing found" in capsys.readouterr().out
    assert main(["doctor", "--model", "resnet18", "--data", str(tmp_path / "absent")]) == 2


def test_command_on_a_torchvision_model(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision"), pytest.importorskip("rich")
    assert main(["doctor", "--model", "resnet18", "--img-size", "32", "--batch-size", "8", "--all"]) == 0
    assert "layer4.1.conv2" in capsys.readouterr().out


def test_every_kind_is_explained_in_the_docs() -> None:
    docs = Path(__file__).parents[2] / "docs" / "doctor.md"
    if not docs.is_file():
        pytest.skip("the docs are not beside the tests")
    text = docs.read_text()
    kinds = {kind for _, kinds, *_ in BROKEN.values() for kind in kinds.split()} | {"learning-rate", "forward-vanishes"}
    assert not [kind for kind in sorted(kinds) if json.dumps(kind).strip('"') not in text]
