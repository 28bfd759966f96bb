"""The monitor's numbers against hand-computed ones, its events, and what it leaves alone."""

from __future__ import annotations

import csv
import json
import logging
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradfast
from gradfast import clip
from gradfast.monitor import CSV, JSONL, Event, Monitor, Sink, TensorBoard, WandB
from gradfast.monitor.events import SpikeRule, worst
from gradfast.monitor.explain import explain_by_norms
from gradfast.monitor.grouping import group_by_module


class Memory(Sink):
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.steps: dict[int, tuple[float, float]] = {}
        self.events: list[Event] = []
        self.closed = False

    def write(self, step: int, metrics: Any) -> None:
        self.rows.append((step, dict(metrics)))

    def history(self, first_step: int, norms: Any, coefficients: Any) -> None:
        self.steps |= {first_step + i: pair for i, pair in enumerate(zip(norms, coefficients))}

    def event(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed = True


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def set_gradients(model: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn_like(parameter)
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}


def joined(values: dict[str, Tensor], prefix: str) -> float:
    return math.sqrt(sum(v.square().sum().item() for name, v in values.items() if name.startswith(prefix)))


@pytest.mark.parametrize("kind", [gradfast.SGD, torch.optim.SGD])
def test_metrics_by_hand(kind: Any) -> None:
    model, sink = net(), Memory()
    options = {"max_norm": 0.5} if kind is gradfast.SGD else {}
    optimizer = kind(model.named_parameters(), lr=0.1, **options)
    with Monitor(optimizer, model, every=1, sinks=[sink]) as monitor:
        before = {name: p.detach().double() for name, p in model.named_parameters()}
        before = {name: p.clone() for name, p in before.items()}
        gradients = set_gradients(model)
        monitor.log(loss=torch.tensor(2.5), epoch=3)
        optimizer.step()
        after = {name: p.detach().double() for name, p in model.named_parameters()}
    ((step, metrics),) = sink.rows
    total = joined(gradients, "")
    # float32 inputs, sums in double, and differences of float32 weights: about 1e-6.
    near = lambda value: pytest.approx(value, rel=1e-4)  # noqa: E731
    assert step == 1 and sink.closed
    assert metrics["grad_norm"] == near(total)
    for group in ("0", "2"):
        assert metrics[f"l2_norm/grad/{group}"] == near(joined(gradients, group))
        assert metrics[f"l2_norm/param/{group}"] == near(joined(after, group))
        change = {name: after[name] - before[name] for name in after}
        assert metrics[f"update_ratio/{group}"] == near(joined(change, group) / joined(after, group))
        assert metrics[f"nonfinite/{group}"] == 0
    assert metrics["loss"] == 2.5 and metrics["epoch"] == 3 and metrics["lr"] == 0.1
    if options:
        assert metrics["grad_norm_clipped"] == near(0.5) and metrics["clip_coef"] == near(0.5 / total)
        assert metrics["clip_fraction"] == 1.0
    else:
        assert math.isnan(metrics["clip_coef"])
    assert monitor.top(1)[0] == (max(gradients, key=lambda n: gradients[n].norm()), near(metrics_max(gradients)))
    assert monitor.norm("2") == near(joined(gradients, "2.")) and monitor.norm("2.bias", "param") > 0
    assert monitor.top(4, "ratio")[0][1] == near(max((change[n].norm() / after[n].norm()).item() for n in after))


def metrics_max(values: dict[str, Tensor]) -> float:
    return max(value.norm().item() for value in values.values())


def test_every_step_is_in_the_history_and_only_samples_are_rows() -> None:
    model, sink = net(), Memory()
    optimizer = gradfast.AdamW(model.named_parameters(), max_norm=1.0)
    monitor = Monitor(optimizer, model, every=4, sinks=[sink], start_step=100)
    norms = {}
    for step in range(101, 112):
        norms[step] = joined(set_gradients(model, scale=step / 100), "")
        optimizer.step()
    assert [step for step, _ in sink.rows] == [101, 104, 108]
    assert sink.rows[2][1]["grad_norm_max"] == pytest.approx(max(norms[s] for s in range(105, 109)), rel=1e-6)
    monitor.close()  # sends 109 to 111
    assert {s: pair[0] for s, pair in sink.steps.items()} == pytest.approx(norms, rel=1e-6)
    set_gradients(model)
    optimizer.step()
    monitor.close()
    assert len(sink.steps) == 11  # closed: sees no more
    assert not model._forward_pre_hooks


def test_the_monitor_changes_nothing() -> None:
    """The same run with and without it, to the bit, batch norm and dropout included."""
    states = []
    for watched in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        optimizer = gradfast.SGD(model.named_parameters(), lr=0.1, momentum=0.9, max_norm=1.0)
        monitor = Monitor(optimizer, model, every=2) if watched else None
        for step in range(7):
            optimizer.zero_grad()
            inputs = torch.randn(16, 4)
            if step == 3:
                inputs[0, 0] = math.nan  # a bad step, which the monitor runs once more
            model(inputs).square().mean().backward()
            optimizer.step()
        states.append({**model.state_dict(), "random": torch.random.get_rng_state()})
        assert monitor is None or len(monitor.events) == 1
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_under_a_loss_scale_norms_are_those_of_the_true_gradients(norm_type: float) -> None:
    model, sink = net(), Memory()
    optimizer = gradfast.SGD(model.named_parameters(), lr=0.1, norm_type=norm_type)
    optimizer.grad_scale = 1024.0
    Monitor(optimizer, model, every=1, sinks=[sink])
    gradients = set_gradients(model, scale=1024.0)
    optimizer.step()
    expected = torch.linalg.vector_norm(gradients["2.bias"], norm_type).item() / 1024
    assert sink.rows[0][1]["l2_norm/grad/2"] >= expected * (1 - 1e-6)
    watched = Monitor(optimizer, model, every=1)
    optimizer.step()
    assert watched.norm("2.bias") == pytest.approx(expected, rel=1e-6)


def test_parameters_without_gradients_and_several_groups() -> None:
    model, sink = net(), Memory()
    groups = [{"params": list(model[0].named_parameters())}, {"params": list(model[2].named_parameters())}]
    optimizer = gradfast.SGD(groups, lr=0.1)
    Monitor(optimizer, every=1, sinks=[sink])
    gradients = set_gradients(model)
    model[0].weight.grad = None
    optimizer.step()
    metrics = sink.rows[0][1]
    assert metrics["l2_norm/grad/bias"] > 0  # the names that the optimiser knows, without the model's
    model_sink = Memory()
    Monitor(optimizer, model, every=1, sinks=[model_sink])
    optimizer.step()
    assert model_sink.rows[0][1]["l2_norm/grad/0"] == pytest.approx(gradients["0.bias"].norm().item(), rel=1e-6)


# ---------------------------------------------------------------- what clipping does to each parameter


CLIPS = {
    "max_norm": {"max_norm": 0.7},
    "parameter": {"clip": clip.PerParameterNorm(0.4)},
    "parameter, p = 1": {"clip": clip.PerParameterNorm(2.0, norm_type=1.0)},
    "ada_gc": {"clip": clip.AdaGC(warmup=3, beta=0.5)},
    "chain": {"clip": clip.Chain(clip.GlobalNorm(3.0), clip.PerParameterNorm(0.9))},
    "agc": {"clip": clip.AGC(clipping=0.3, exclude=["2.bias"])},
    "value": {"clip": clip.Chain(clip.Value(0.3), clip.GlobalNorm(0.8))},
}


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_norms_after_clipping_are_those_of_the_step_taken(name: str, scale: float) -> None:
    """With a rate of 1 and nothing else, what a step changes is the gradient as it was clipped."""
    model, sink = net().double(), Memory()
    optimizer = gradfast.SGD(model.named_parameters(), lr=1.0, **CLIPS[name])
    optimizer.grad_scale = torch.tensor(scale)
    one_norm = optimizer.norm_type == 1.0
    clipped = 0
    with Monitor(optimizer, model, every=1, sinks=[sink]) as monitor:
        for step in range(8):
            before = {key: p.detach().clone() for key, p in model.named_parameters()}
            gradients = set_gradients(model, scale * (1 + step % 3))
            raw = {key: gradient.clone() / scale for key, gradient in gradients.items()}
            optimizer.step()
            after = dict(model.named_parameters())
            steps = {key: (before[key] - after[key]).detach() for key in before}
            for key, change in steps.items():
                power = 1 if one_norm else 2
                assert monitor.norm(key, "clipped") == pytest.approx(change.norm(power).item(), rel=1e-9)
                assert monitor.norm(key) == pytest.approx(raw[key].norm(power).item(), rel=1e-9)
                clipped += bool(change.norm() < raw[key].norm() * 0.999)
            metrics = sink.rows[-1][1]
            whole = lambda values: torch.cat([v.flatten() for v in values.values()]).norm(power).item()  # noqa: E731,B023
            assert metrics["grad_norm"] == pytest.approx(whole(raw), rel=1e-9)
            assert metrics["grad_norm_clipped"] == pytest.approx(whole(steps), rel=1e-9)
            assert metrics["l2_norm/grad_clipped/2"] == pytest.approx(monitor.norm("2", "clipped"), rel=1e-12)
            assert name == "max_norm" or "clip_fraction/2" in metrics
    assert clipped > 8


def test_how_often_each_parameter_was_clipped_by_hand() -> None:
    """The sample of step 5 tells of steps 2 to 5, of which the one with NaN counts for nothing."""
    model, sink = net(), Memory()
    optimizer = gradfast.SGD(model.named_parameters(), lr=0.1, clip=clip.PerParameterNorm(1.0))
    Monitor(optimizer, model, every=5, sinks=[sink])
    for step in range(1, 6):
        for name, parameter in model.named_parameters():
            large = name == "0.weight" or (name == "2.bias" and step in (3, 4))
            parameter.grad = torch.full_like(parameter, 2.0 if large else 0.01)
        if step == 2:
            model[0].bias.grad[0] = math.nan
        optimizer.step()
    metrics = sink.rows[-1][1]
    assert metrics["clip_fraction/0"] == 3 / 6 and metrics["clip_fraction/2"] == 2 / 6
    assert metrics["clip_fraction"] == 1.0 and metrics["nonfinite_steps"] == 1


@pytest.mark.parametrize("policy, share", [(clip.AGC(0.1, vectors=False), 3 / 9), (clip.Value(0.5), 12 / 40)])
def test_policies_before_the_norm_count_units_of_the_sampled_step(policy: Any, share: float) -> None:
    model, sink = net(), Memory()
    optimizer = gradfast.SGD(model.named_parameters(), lr=0.1, clip=policy)
    Monitor(optimizer, model, every=1, sinks=[sink])
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.full_like(parameter, 0.01)
    model[0].weight.grad[:3] = 5.0  # three of eight units, of four elements each; the bias is one of eight
    optimizer.step()
    metrics = sink.rows[0][1]
    assert metrics["clip_fraction/0"] == share and metrics["clip_fraction/2"] == 0
    assert metrics["l2_norm/grad_clipped/0"] < 2 and metrics["l2_norm/grad/0"] > 10


def test_limits_of_groups_are_seen() -> None:
    model, sink = net().double(), Memory()
    groups = [
        {"params": list(model[0].named_parameters(prefix="0")), "max_norm": 0.25},
        {"params": list(model[2].named_parameters(prefix="2"))},
    ]
    optimizer = gradfast.SGD(groups, lr=1.0, max_norm=2.0)
    with Monitor(optimizer, model, every=1, sinks=[sink]) as monitor:
        gradients = set_gradients(model)
        before = model[0].weight.detach().clone()
        optimizer.step()
    metrics = sink.rows[0][1]
    assert metrics["clip_fraction/0"] == 1.0 and metrics["clip_fraction/2"] == 0.0
    assert metrics["l2_norm/grad_clipped/0"] == pytest.approx(0.25, rel=1e-5)
    assert monitor.norm("0.weight", "clipped") == pytest.approx((before - model[0].weight).norm().item(), rel=1e-9)
    assert metrics["grad_norm"] == pytest.approx(joined(gradients, ""), rel=1e-9)


def test_norms_of_half_precision_weights_are_summed_in_float32() -> None:
    model, sink = nn.Linear(64, 64, bias=False).half(), Memory()
    model.weight.data.fill_(3000.0)  # a norm of 192,000: beyond float16
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer = gradfast.SGD(model.named_parameters(), lr=0.1)
    Monitor(optimizer, model, every=1, sinks=[sink])
    optimizer.step()
    assert sink.rows[0][1]["l2_norm/param/weight"] == pytest.approx(192_000, rel=1e-5)


# ---------------------------------------------------------------- events and explanations


class Exploding(nn.Module):
    def __init__(self, forward_bad: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.forward_bad = forward_bad

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x) * (1e30 if self.forward_bad else 1.0))
        if self.forward_bad:
            x = self.third(x * 1e30)
        else:
            x = self.third(torch.sqrt(x - x.detach()))  # sqrt(0): finite forward, infinite slope
        return x


@pytest.mark.parametrize("forward_bad", [True, False])
def test_message_names_the_first_bad_layer(forward_bad: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, sink = Exploding(forward_bad), Memory()
    optimizer = gradfast.SGD(model.named_parameters(), lr=0.1)
    Monitor(optimizer, model, every=1, sinks=[sink])
    with caplog.at_level(logging.WARNING, logger="gradfast"):
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    (event,) = sink.events
    assert event.rule == "nonfinite" and event.action == "skipped" and not math.isfinite(event.worst[0][1])
    if forward_bad:
        assert "forward, third is the first to put out NaN or infinity" in event.message
        assert "at first" in event.message and "at second" in event.message  # the numbers that led to it
    else:
        assert "backward, the gradient of second is the first with NaN or infinity" in event.message
        assert "at third; forward all is finite" in event.message
    assert event.message in caplog.text


def test_bad_batch_and_bad_loss_are_told_apart() -> None:
    model, sink = net(), Memory()
    optimizer = gradfast.SGD(model.named_parameters(), lr=0.1)
    monitor = Monitor(optimizer, model, every=1, sinks=[sink])
    inputs = torch.randn(8, 4)
    (model(inputs).sum() * math.inf).backward()
    optimizer.step()
    assert "from the last layer, 2, on: look at the loss" in sink.events[0].message
    inputs[0, 0] = math.nan
    optimizer.zero_grad()
    model(inputs).sum().backward()
    optimizer.step()
    assert "the batch itself holds NaN" in sink.events[1].message
    assert "the batch itself holds NaN" in monitor.examine(inputs)
    assert sink.rows[1][1]["nonfinite/0"] > 0


def test_spike_is_an_event() -> None:
    model, sink = net(), Memory()
    optimizer = gradfast.SGD(model.named_parameters(), lr=1e-4, max_norm=5.0)
    Monitor(optimizer, model, every=5, sinks=[sink])
    for step in range(1, 31):
        set_gradients(model, 100.0 if step == 28 else 0.1)
        optimizer.step()
    (event,) = sink.events
    assert (event.step, event.rule, event.action) == (28, "spike", "clipped")
    assert event.norm > event.threshold and event.worst[0][1] > 100
    json.dumps(event.to_dict())


def test_a_spike_names_the_layer_where_it_began_on_the_way_back() -> None:
    model, sink = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)), Memory()
    optimizer = gradfast.SGD(model.named_parameters(), lr=1e-4)
    Monitor(optimizer, model, every=5, sinks=[sink])
    for step in range(1, 26):
        set_gradients(model, 0.1)
        if step == 23:
            model[0].weight.grad *= 3000
            model[1].weight.grad *= 5000
        if step == 24:
            model[2].bias.grad[0] = math.inf
        optimizer.step()
    spike, bad = sink.events
    assert "backward, the gradient of 1 is the first that is 10 times what it was: " in spike.message
    assert " at 1 (" in spike.message and "; nearer to the loss " in spike.message and " at 2 (" in spike.message
    assert bad.rule == "nonfinite" and "at 2 (" in bad.message  # no batch was seen, so that the norms alone tell


def test_explanation_by_norms_alone() -> None:
    """As on CUDA, where the batch of a bad step is gone when its numbers arrive."""
    before = {"a.weight": 3.0, "a.bias": 4.0, "b.weight": 1.0, "c.weight": 2.0, "d.weight": 0.5}
    bad = before | {"a.weight": math.nan, "b.weight": math.inf}
    assert explain_by_norms(bad, before, 10.0) == (
        "backward, the gradient of b is the first that is NaN or infinite: nan at b (1 before); nearer to the loss "
        "0.5 at d (0.5 before), 2 at c (2 before)"
    )
    assert "from the last layer on, nan at d (0.5 before)" in explain_by_norms(
        before | {"d.weight": math.nan}, before, 2
    )
    assert "is 10 times what it was: 51 at b (1 before)" in explain_by_norms(before | {"b.weight": 51.0}, before, 10.0)
    assert explain_by_norms(before, before, 10.0) == explain_by_norms(before, {}, 10.0) == ""
    assert "nan at b; nearer" in explain_by_norms(bad, {}, 10.0)


def test_spike_rule_by_hand() -> None:
    rule = SpikeRule(factor=3.0, window=16)
    assert all(rule.threshold(norm) is None for norm in [1.0] * 15 + [1000.0])  # the first sixteen never are
    assert rule.threshold(2.9) is None
    assert rule.threshold(3.1) == 3.0
    assert rule.threshold(math.nan) is None and math.nan not in rule.recent


def test_worst_puts_nonfinite_first() -> None:
    assert [name for name, _ in worst("abcd", [1.0, math.nan, 5.0, math.inf], 3)] == ["b", "d", "c"]


# ---------------------------------------------------------------- groups, sinks, mistakes


def test_resnet50_makes_a_board_that_can_be_read() -> None:
    torchvision = pytest.importorskip("torchvision")
    names = [name for name, _ in torchvision.models.resnet50().named_parameters()]
    groups = group_by_module(names)
    assert len(names) == 161 and len(groups) == 19 and "layer3.5" in groups
    assert list(group_by_module(names, most=7)) == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert sorted(index for group in groups.values() for index in group) == list(range(161))


def test_watch_adds_lines() -> None:
    model, sink = net(), Memory()
    optimizer = gradfast.SGD(model.named_parameters(), lr=0.1)
    Monitor(optimizer, model, every=1, sinks=[sink], watch=["2.bias"])
    gradients = set_gradients(model)
    optimizer.step()
    assert sink.rows[0][1]["l2_norm/grad/2.bias"] == pytest.approx(gradients["2.bias"].norm().item(), rel=1e-6)


def test_mistakes_are_named() -> None:
    model = net()
    optimizer = gradfast.SGD(model.named_parameters(), lr=0.1)
    with pytest.raises(ValueError, match="every must be"):
        Monitor(optimizer, every=0)
    with pytest.raises(ValueError, match=r"'7'; the first is '0\.weight'"):
        Monitor(optimizer, model, watch=["7"])
    monitor = Monitor(optimizer, model)
    with pytest.raises(ValueError, match="no sample yet"):
        monitor.top()


def run(sinks: list[Sink], steps: int = 3) -> None:
    model = net()
    optimizer = gradfast.SGD(model.named_parameters(), lr=0.1, max_norm=1.0)
    with Monitor(optimizer, model, every=2, sinks=sinks):
        for step in range(steps):
            set_gradients(model)
            if step == 1:
                model[0].bias.grad[0] = math.inf
            optimizer.step()


def test_csv_and_jsonl(tmp_path: Path) -> None:
    run([CSV(tmp_path / "a" / "m.csv"), JSONL(tmp_path)])
    with (tmp_path / "a" / "m.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"] and float(rows[0]["l2_norm/grad/0"]) > 0
    lines = [json.loads(line) for line in (tmp_path / "monitor.jsonl").read_text().splitlines()]
    assert [line["history"] for line in lines if "history" in line] == [1, 2, 3]
    event = next(line["event"] for line in lines if "event" in line)
    assert event["norm"] == "inf" and event["worst"][0] == ["0.bias", "inf"]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run([TensorBoard(tmp_path)])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [point.step for point in board.Scalars("l2_norm/grad/0")] == [1, 2]


def test_wandb_gets_metrics_alerts_and_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which the tests do not install: what it is called with."""
    calls: list[tuple[str, Any]] = []
    fake = types.ModuleType("wandb")
    fake.run = None
    fake.init = lambda **options: calls.append(("init", options))
    fake.log = lambda metrics, step: calls.append(("log", (step, metrics["grad_norm"])))
    fake.alert = lambda title, text: calls.append(("alert", title))
    fake.finish = lambda: calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run([WandB(project="p")])
    assert [name for name, _ in calls] == ["init", "log", "alert", "log", "finish"]
    assert calls[0][1] == {"project": "p"} and calls[1][1][0] == 1


def test_missing_wandb_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradfast.errors import UserError

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'gradfast\[wandb\]'"):
        WandB()
