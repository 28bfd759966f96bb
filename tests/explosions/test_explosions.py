"""The evidence: scenarios break, their twins are sound, and a stated cure helps; a taste of the whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
FOLDER = Path(__file__).parents[2] / "benchmarks" / "explosions"
if not FOLDER.is_dir():
    pytest.skip("the benchmarks are not beside the tests", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

from cures import CURES  # noqa: E402
from scenarios import SCENARIOS  # noqa: E402
from table import cell, text  # noqa: E402
from trial import Result, run  # noqa: E402

sys.path.remove(str(FOLDER))
QUICK = ("fp16_overflow", "loss_scale_error", "nan_batch", "sigmoid_stack", "lost_scheduler", "wild_targets")


@pytest.mark.parametrize("name", QUICK)
def test_broken_fails_in_torch_and_is_rescued_while_the_sound_twin_learns(name: str) -> None:
    assert run(name, True, "torch", 0).outcome != "learnt"
    assert run(name, True, "all", 0).outcome == "learnt"
    assert run(name, False, "torch", 0).outcome == run(name, False, "all", 0).outcome == "learnt"


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("broken", [True, False])
def test_every_scenario_can_be_made_mended_and_stepped(name: str, broken: bool) -> None:
    task = SCENARIOS[name](0, broken)
    assert 0 < task.good < task.chance
    stepper = CURES["all"].prepare(task)
    for step in range(2):
        inputs, targets = task.batch(step)
        loss = task.loss(task.model(inputs), targets)
        loss.backward()
        stepper.step(loss)
    again = SCENARIOS[name](0, broken).batch(1)
    assert all((a == b).all() for a, b in zip(again, task.batch(1)))  # the same seed, the same data


def test_cells_say_what_happened() -> None:
    def made(*outcomes: str) -> list[Result]:
        return [Result("gan", True, "torch", seed, outcome, 0.5 + seed, 1.0) for seed, outcome in enumerate(outcomes)]

    assert cell(made("learnt", "stuck", "diverged")) == "1/3 1.5"
    assert cell(made("diverged", "diverged", "stuck")) == "2/3 div. 1.5"
    assert cell(made("diverged")) == "diverged 0.5" and cell(made("stuck")) == "stuck 0.5" and cell([]) == ""
    assert "gan" in text(made("learnt"))


def test_docs_have_every_scenario_and_cure() -> None:
    docs = FOLDER.parents[1] / "docs" / "explosions.md"
    content = docs.read_text()
    assert not [name for name in SCENARIOS if name.replace("_", " ") not in content]
    assert not [cure.label for cure in CURES.values() if cure.label not in content]
