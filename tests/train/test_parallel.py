"""N processes do what one does: losses, weights, results, resumption; and they end together."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import torch
import torchvision
from torch import Tensor, distributed, nn
from torchvision.models import get_model
from train.cases import untimed, write_images
from train.detection import slim_down, write_scenes
from train.processes import Ended, Ranks
from train.test_files import fill_disk

from gradfast.errors import UserError
from gradfast.train.data import build as data_module
from gradfast.train.machine.processes import read_timeout
from gradfast.train.results.checkpoint import load_checkpoint
from gradfast.train.results.progress import Progress
from gradfast.train.step import Learner
from gradfast.train.tasks.classify import ClassObjective

if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("this torch was built without gloo", allow_module_level=True)

Refused = Callable[[list[str], str], str]

#: Relative to a tensor's largest element: sums in float64 in another order, some 1e-16 each, over six steps. A part
#: that weighs too much or too little shows at 1e-2.
ROUNDING = 1e-11


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.conv(x)).relu()


class SmallNet(nn.Module):
    """Two residual blocks; the number of its channels is divided by no number of ranks that is tested."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 5, stride=4)
        self.layers = nn.Sequential(Block(10), Block(10))
        self.dropout = nn.Dropout(0.0)
        self.fc = nn.Linear(10, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.layers(self.stem(x)).mean((2, 3))))


class Dropping(SmallNet):
    """Each process draws for itself."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.dropout = nn.Dropout(0.3)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(in_tmp: Path) -> None:
    pass


def command(photos: Path, *more: object) -> list[str]:
    """Two epochs of three steps, 7 images a batch: two or three processes get unequal parts of it."""
    words = ["train", "--data", photos, "--model", "resnet18", "--no-zero-init-residual", "--img-size", 32]
    words += ["--batch-size", 7, "--epochs", 2, "--augment", "dihedral", "--val-split", 0.25, "--device", "cpu"]
    return [str(word) for word in (*words, *more)]


@dataclass
class Before:
    """What is done to a process before its run: a small model, float64, and what a test wants of one rank, or all."""

    model: type[SmallNet] = SmallNet
    check_limit: int = data_module.CHECK_LIMIT
    rank: int | None = -1
    then: Callable[[], None] | None = None

    def __call__(self, rank: int) -> None:
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float64)
        torchvision.models.get_model = lambda name, num_classes, **_: self.model(num_classes)
        data_module.CHECK_LIMIT = self.check_limit
        if self.rank in (rank, None) and self.then is not None:
            self.then()


def on_ranks(size: int, words: list[str], **before: Any) -> Ended:
    return Ranks(size, words, Path.cwd().parent, Before(**before)).wait()


def alone(words: list[str], output: str, **before: Any) -> Path:
    """The same run on one process."""
    must_end_well(on_ranks(1, [*words, "--output", output], **before))
    return Path(output)


def must_end_well(ended: Ended) -> None:
    assert set(ended.codes) == {0}, ended.out + ended.err
    assert ended.err == ""


def assert_same(one: Path, other: Path, tolerance: float = ROUNDING) -> None:
    """The tables to what single precision shows of them, what is counted exactly, and the states to `tolerance`."""
    for table in ("summary.csv", "steps.csv"):
        rows, others = untimed(one / table), untimed(other / table)
        assert len(rows) == len(others) > 0
        for row, found in zip(rows, others):
            for name, value in row.items():
                exact = name in ("epoch", "step", "images", "eval_acc1", "eval_balanced_acc", "skipped_steps")
                assert float(found[name]) == pytest.approx(float(value), rel=0 if exact else 2e-6, abs=0), (table, name)
    a, b = load_checkpoint(one / "last.pt"), load_checkpoint(other / "last.pt")
    assert a["position"]["epoch"] == b["position"]["epoch"] and a["position"]["batch"] == b["position"]["batch"]
    assert a.get("average", {}).get("updates") == b.get("average", {}).get("updates")
    for part in ("model", "optimizer", "average"):
        mine, theirs = tensors(a.get(part)), tensors(b.get(part))
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            bound = tolerance * float(value.abs().max())
            torch.testing.assert_close(
                theirs[name], value, rtol=0, atol=bound, msg=lambda m, n=f"{part} {name}": f"{n}: {m}"
            )


def tensors(state: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors of a nested state by their path."""
    if isinstance(state, Tensor):
        return {name: state}
    pairs = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {path: tensor for key, value in pairs for path, tensor in tensors(value, f"{name}/{key}").items()}


def send_after(step: int, number: signal.Signals) -> None:
    """Send this process a signal after a step (from 1)."""
    real, calls = Progress.due, []

    def due(self: Progress) -> bool:
        calls.append(None)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return real(self)

    Progress.due = due  # type: ignore[method-assign]


def signal_after(step: int, number: signal.Signals, rank: int) -> dict[str, Any]:
    return {"rank": rank, "then": functools.partial(send_after, step, number)}


# ---------------------------------------------------------------- the same as one process

CASES = {
    "weights": ["--norm", "group", "--label-smoothing", 0.1, "--grad-accum", 2, "--opt", "adamw", "--model-ema"],
    "mixtures": ["--norm", "group", "--mixup", 0.4, "--cutmix", 1, "--sampler", "balanced", "--clip-policy", "zclip"],
    "frozen": ["--norm", "group", "--freeze-backbone", 1, "--model-ema"],
    "shared": [
        "--sync-bn",
        "--model-ema",
        "--class-weights",
        "balanced",
        "--monitor-every",
        2,
        "--on-spike",
        "backoff",
    ],
    "numbers": ["--norm", "none", "--init", "fixup", "--opt", "adamw", "--model-ema", "--grad-accum", 2],
    "compiled": ["--sync-bn", "--compile", "eager"],
}
WAYS = {
    "weights": [("ddp", 2), ("fsdp", 2), ("ddp", 3)],
    "mixtures": [("ddp", 2), ("fsdp", 3)],
    "frozen": [("ddp", 2), ("fsdp", 2)],
    "shared": [("ddp", 2), ("fsdp", 3)],
    "numbers": [("ddp", 2), ("fsdp", 3)],
    "compiled": [("ddp", 2), ("fsdp", 2)],
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case == "compiled")) for case in CASES]
)
def test_same_as_one_process(photos: Path, case: str) -> None:
    words = command(photos, *CASES[case])
    one = alone(words, "one")
    for kind, size in WAYS[case]:
        output = f"{kind}-{size}"
        ended = on_ranks(size, [*words, "--parallel", kind, "--output", output])
        must_end_well(ended)
        assert f"in {size} processes ({kind})" in ended.out and ended.out.count("epoch 2/2  loss") == 1
        assert_same(one, Path(output))


def take_a_slim_detector() -> None:
    torch.set_default_dtype(torch.float32)  # a detector's input is float32 whatever the default
    torchvision.models.get_model = get_model
    slim_down()


def test_a_detector_learns_and_is_measured_as_on_one_process(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    scenes = write_scenes(tmp_path / "shapes", 13)
    words = ["train", "--task", "detect", "--data", str(scenes), "--model", "retinanet_resnet50_fpn", "--epochs", "1"]
    words += ["--img-size", "64", "--batch-size", "3", "--norm", "group", "--boxes-per-image", "20", "--device", "cpu"]
    tables = []
    for size in (1, 2):
        must_end_well(on_ranks(size, [*words, "--output", f"{size}"], rank=None, then=take_a_slim_detector))
        tables.append([row for name in ("steps.csv", "summary.csv") for row in untimed(Path(f"{size}") / name)])
    one, two = tables
    assert len(one) == len(two) > 1
    for row, found in zip(one, two):  # RetinaNet draws nothing at random
        assert row.keys() == found.keys()
        for name, value in row.items():  # float32, through a few steps
            assert float(found[name]) == pytest.approx(float(value), rel=2e-3, abs=2e-3, nan_ok=True), name


def test_images_that_cannot_be_read_count_where_they_are_missing(
    tmp_path: Path,
) -> None:
    folder = write_images(tmp_path / "photos", {"dots": 12, "stripes": 16})
    for number in (0, 3, 5, 8):
        (folder / "dots" / f"{number:03}.png").write_bytes(b"spoiled")
    words = command(folder, "--norm", "group", "--cache", "off", "--workers", 0)
    one = alone(words, "one", check_limit=0)
    ended = on_ranks(3, [*words, "--output", "three"], check_limit=0)
    must_end_well(ended)
    assert_same(one, Path("three"))
    assert ended.out.count("not an image") == 4  # named by the main process, whichever found them
    assert "unreadable files 4" in ended.out


def test_separate_norms_have_one_set_of_running_statistics(photos: Path) -> None:
    # 6 images, 3 each: the mean of the parts' means is the mean of the batch
    words = command(photos, "--batch-size", 6, "--lr", 0, "--weight-decay", 0, "--epochs", 1)
    alone(words, "one")
    must_end_well(on_ranks(2, [*words, "--output", "two"]))
    one, two = (load_checkpoint(Path(name))["model"]["layers.0.bn.running_mean"] for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------- stopping and resuming


@pytest.mark.parametrize(
    ("first", "then"), [((1, "none"), (2, "fsdp")), ((2, "fsdp"), (3, "ddp")), ((2, "ddp"), (1, "none"))]
)
def test_resumed_on_another_number_of_processes(photos: Path, first: tuple[int, str], then: tuple[int, str]) -> None:
    words = command(photos, "--norm", "group", "--opt", "adamw", "--model-ema", "--mixup", 0.3)
    undisturbed = alone(words, "undisturbed")
    for number, (size, kind) in enumerate((first, then)):
        given = words if number == 0 else ["train", "--resume", "auto"]
        given = [*given, "--output", "run", *(["--parallel", kind] if size > 1 else [])]
        ended = on_ranks(size, given, **(signal_after(2, signal.SIGTERM, rank=size - 1) if number == 0 else {}))
        if number == 0:
            assert set(ended.codes) == {143} and ended.out.count("stopped by SIGTERM in epoch 1") == 1, ended
        else:
            must_end_well(ended)
    assert_same(undisturbed, Path("run"))


def test_resumed_on_as_many_processes_to_the_bit(photos: Path) -> None:
    words = command(photos, "--sync-bn")
    must_end_well(on_ranks(2, [*words, "--output", "undisturbed"], model=Dropping))
    stopped = on_ranks(2, [*words, "--output", "run"], model=Dropping, **signal_after(2, signal.SIGINT, rank=0))
    assert stopped.codes == [130, 130]
    must_end_well(on_ranks(2, ["train", "--resume", "run"], model=Dropping))
    assert untimed(Path("run/steps.csv")) == untimed(Path("undisturbed/steps.csv"))
    assert_same(Path("undisturbed"), Path("run"), tolerance=0)


# ---------------------------------------------------------------- ending together


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_with_how_to_go_on(photos: Path, victim: int) -> None:
    words = command(photos, "--norm", "group", "--save-every-steps", 1)
    undisturbed = alone(words, "undisturbed")
    ended = on_ranks(2, [*words, "--output", "run"], **signal_after(2, signal.SIGKILL, victim))
    assert (ended.codes[victim], ended.codes[1 - victim]) == (-signal.SIGKILL, 2)
    assert ended.err.count("gradfast: error: ") == 1 and ended.err.count("\n") == 1, ended.err
    assert "a process of this run has ended or does not answer (" in ended.err and "by peer" in ended.err
    assert "after 0 epochs and 1 batches; gradfast train --resume run goes on from there" in ended.err
    must_end_well(on_ranks(2, ["train", "--resume", "run"]))
    assert_same(undisturbed, Path("run"))


def test_a_process_that_hangs_ends_the_run(photos: Path) -> None:
    before = Before(**signal_after(2, signal.SIGSTOP, rank=1))
    ranks = Ranks(2, command(photos, "--output", "run"), Path.cwd().parent, before, GRADFAST_TIMEOUT="5")
    ranks.processes[0].join(60)
    ranks.processes[1].kill()
    ended = ranks.wait()
    assert ended.codes == [2, -signal.SIGKILL]
    assert "does not answer (Timed out" in ended.err and "gradfast train --resume run" in ended.err


def test_an_image_refused_by_one_process_ends_all_with_its_name(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", {"dots": 12, "stripes": 16})
    (folder / "dots" / "003.png").write_bytes(b"spoiled")
    words = command(folder, "--strict", "--cache", "off", "--workers", 1, "--output", "run")
    ended = on_ranks(3, words, check_limit=0)
    assert ended.codes == [2, 2, 2]
    assert ended.err.count("\n") == 1 and ended.err.startswith("gradfast: error: --strict: "), ended.err
    assert "dots/003.png cannot be used (not an image)" in ended.err


def fill(name: str, room: int) -> None:
    fill_disk(pytest.MonkeyPatch(), room, only=name, modes="a" if name == "steps.csv" else "w")


@pytest.mark.parametrize(("full", "room"), [("config.yaml", 10), ("last.pt", 900), ("steps.csv", 100)])
def test_a_disk_that_fills_ends_all_with_the_files_name(photos: Path, full: str, room: int) -> None:
    ended = on_ranks(2, command(photos, "--output", "run"), rank=0, then=functools.partial(fill, full, room))
    assert ended.codes == [2, 2]
    assert ended.err == f"gradfast: error: cannot write run/{full}: No space left on device; free some space\n"
    assert Path("run").exists() == (full == "steps.csv")


def break_step() -> None:
    Learner.step = lambda *_: 1 / 0  # type: ignore[method-assign, assignment, return-value]


def test_a_fault_of_the_program_shows_its_traceback_once(photos: Path) -> None:
    ended = on_ranks(2, command(photos, "--output", "run"), rank=1, then=break_step)
    assert ended.codes == [2, 1]
    assert ended.err.count("ZeroDivisionError") == 1 and "gradfast: error" not in ended.err, ended.err


def spoil() -> None:
    """NaN losses of this process, from the third step of the run to the twenty-second."""
    losses = ClassObjective.losses

    def spoilt(self: ClassObjective, model: nn.Module, batch: Any) -> Any:
        loss, parts = losses(self, model, batch)
        return (loss * math.nan if 2 <= 3 * batch.number[0] + batch.number[1] < 22 else loss), parts

    ClassObjective.losses = spoilt  # type: ignore[method-assign]


def test_what_one_process_sees_rolls_all_of_them_back(photos: Path) -> None:
    words = command(photos, "--norm", "group", "--on-spike", "rollback", "--epochs", 8)
    ended = on_ranks(2, [*words, "--output", "two"], rank=1, then=spoil)
    assert ended.codes == [0, 0], ended.err
    events = [json.loads(line) for line in Path("two/events.jsonl").read_text().splitlines()]
    assert [event["action"] for event in events] == ["skipped"] * 20 + ["rolled back"]
    assert events[-1]["step"] == 22 and "rolled back to step 0" in events[-1]["message"]
    assert on_ranks(1, [*words, "--output", "one"], rank=0, then=spoil).codes == [0]
    two, other = load_checkpoint(Path("two/last.pt")), load_checkpoint(Path("one/last.pt"))
    assert two["guard"]["rollbacks"] == other["guard"]["rollbacks"] == 1
    for name, value in other["model"].items():
        bound = ROUNDING * float(value.abs().max())
        torch.testing.assert_close(two["model"][name], value, rtol=0, atol=bound)


def test_snapshots_of_a_sharded_model_are_refused(photos: Path) -> None:
    ended = on_ranks(2, command(photos, "--parallel", "fsdp", "--on-spike", "rollback", "--output", "run"))
    assert ended.codes == [2, 2] and "--on-spike rollback keeps whole copies of the model" in ended.err
    assert not Path("run").exists()


def test_what_all_processes_find_wrong_is_said_once(photos: Path) -> None:
    for flags, message in (
        (["--opt", "lamb"], "--opt: expected one of"),
        (["--data", "nowhere"], "nowhere: there is no such folder"),
        (["--parallel", "none"], "--parallel none with 2 processes would train 2 times the same"),
        (["--batch-size", 3], "--batch-size 3 is split over 2 processes: give 4 or more, as batch norms need two"),
        (["--batch-size", 1, "--sync-bn"], "--batch-size 1 is split over 2 processes: give 2 or more"),
    ):
        ended = on_ranks(2, command(photos, *flags))
        assert ended.codes == [2, 2]
        assert message in ended.err and ended.err.count("\n") == 1, ended.err
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_time_to_wait_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADFAST_TIMEOUT", text)
    with pytest.raises(UserError, match=f"GRADFAST_TIMEOUT, the seconds .*: expected a number above 0, got '{text}'"):
        read_timeout()


def test_several_processes_are_torchruns_to_start(photos: Path, refused: Refused) -> None:
    refused(
        command(photos, "--parallel", "ddp"), r"--parallel ddp needs several processes: torchrun --nproc_per_node=2"
    )


# ---------------------------------------------------------------- torchrun itself


def test_torchrun_told_to_end_saves_and_ends(photos: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "gradfast"]
    words = [*command(photos, "--model", "mobilenet_v3_small", "--epochs", 500), "--output", "run"]
    with subprocess.Popen([*launch, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch   1/500  loss"):
                process.terminate()
                break
        output, _ = process.communicate(timeout=120)
    assert process.returncode != 0  # torchrun's own, which is not the processes'
    assert output.count("stopped by SIGTERM in epoch") == 1, output
    assert load_checkpoint(Path("run"))["position"]["epoch"] >= 1
