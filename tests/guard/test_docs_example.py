"""The example of docs/clipping.md, run as it stands there."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_the_guards_example_runs_and_tells_of_the_bad_batch(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "clipping.md").read_text()
    code = text.split("## Guards")[1].split("```python\n")[1].split("```")[0]
    exec(compile(code, "docs/clipping.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["step 151 skipped by nonfinite: gradient norm nan; worst: weight nan, bias nan"]
