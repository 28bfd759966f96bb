"""`gradfast bench` from the command line to the files, on a workload of a moment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gradfast.bench import cli, measure
from gradfast.bench.contenders import PEERS
from gradfast.cli import main
from gradfast.errors import UserError

FLAGS = ["--device", "cpu", "--workload", "small", "--pairs", "3", "--seconds", "0.1", "--threads", "1"]

FIGURES = {"seconds", "host_seconds", "launches", "peak_extra_bytes"}
RESULT = {"workload", "dtype", "optimizer", "peer", "tensors", "elements", "clips", "floor_bytes", "ratio"}
RESULT |= {"floor_bytes_per_second", "memory_bytes_per_second", "fraction_of_memory", "norm_error", "host_hidden"}
RESULT |= {"gradfast", "other"}
RATIO = {"median", "low", "high", "process_low", "process_high", "processes", "pairs"}


@pytest.mark.slow
def test_from_flags_to_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FLAGS, "--processes", "2", "--peer", "torch-fused", "torch-unclipped", "--optimizer", "SGD", "Lion"]
    document = tmp_path / "page.md"
    document.write_text(f"# Speed\n\n{cli.BEGIN}\nan old table\n{cli.END}\n\nThe end.\n")
    assert main(["bench", *flags, "--output", str(tmp_path / "new"), "--into", str(document)]) == 0
    report = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert set(report) == {"schema", "environment", "settings", "copy_bytes_per_second", "results", "left_out"}
    assert report["schema"] == 2
    assert report["copy_bytes_per_second"] > 1e8
    assert report["environment"]["device_name"]
    assert report["settings"]["pairs"] == 3
    assert [result["peer"] for result in report["results"]] == ["torch-fused", "torch-unclipped"]
    for result in report["results"]:
        assert set(result) == RESULT
        assert set(result["ratio"]) == RATIO
        assert set(result["gradfast"]) == set(result["other"]) == FIGURES
        assert result["ratio"]["processes"] == 2
        assert result["memory_bytes_per_second"] > 1e8
        assert result["ratio"]["process_low"] <= result["ratio"]["median"] <= result["ratio"]["process_high"]
        assert result["floor_bytes"] == 64_000 * 24
        assert result["gradfast"]["peak_extra_bytes"] < 4_000  # nothing that grows with the 256,000 bytes of gradients
    # torch's fused optimisers do not know Lion: told, once for both processes, and no failure.
    assert [(case["optimizer"], case["kind"]) for case in report["left_out"]] == [("Lion", "unavailable")] * 2
    table = capsys.readouterr().out
    assert ", 1 thread, " in table
    assert table.count("| small | fp32 | SGD |") == 2
    assert "Lion torch-fused: left out: has no Lion" in table
    assert table.strip() == (tmp_path / "new" / "bench.md").read_text().strip()
    page = document.read_text()
    assert page == f"# Speed\n\n{cli.BEGIN}\n{table.strip()}\n{cli.END}\n\nThe end.\n"
    assert (tmp_path / "new" / "bench.png").stat().st_size > 5_000


def test_a_wrong_contender_is_reported_and_nothing_of_it_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = cli.read_settings(cli.build_parser().parse_args([*FLAGS, "--peer", "torch-fused", "--optimizer", "SGD"]))
    wrong = PEERS["torch-unclipped"].build

    def clips_nothing(parameters, name, max_norm):
        contender = wrong(parameters, name, max_norm)
        contender.clips = True
        return contender

    monkeypatch.setitem(measure.PEERS, "torch-fused", measure.Peer("torch-fused", "", clips_nothing))
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(measure, "interleave", lambda *_: pytest.fail("timed before the check"))
    measure.Process(settings, tmp_path / "results.json").run()
    outcome = json.loads((tmp_path / "results.json").read_text())
    assert outcome["results"] == []
    assert [case["kind"] for case in outcome["left_out"]] == ["wrong"]


DIES = """
import json, os, sys
from pathlib import Path
from gradfast.bench import measure
from gradfast.bench.settings import Settings
process = measure.Process(Settings.from_json(json.load(sys.stdin)), Path(sys.argv[1]))
process._free = lambda: process.results and os.abort()
process.run()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hangs", "why"),
    [
        (False, "the process ended with code -6; its message is above"),
        (True, "the process did not end in 330 s; its message is above"),
    ],
)
def test_what_a_process_measured_before_it_died_is_kept(
    hangs: bool, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As it does where a peer's kernel takes the whole CUDA context along, or a driver hangs."""

    def run(command: list[str], timeout: float, **options) -> subprocess.CompletedProcess:
        finished = real([sys.executable, "-c", DIES, command[-1]], **options)
        if hangs:
            raise subprocess.TimeoutExpired(command, timeout)
        return finished

    real = subprocess.run
    monkeypatch.setattr(cli.subprocess, "run", run)
    flags = [*FLAGS, "--processes", "1", "--optimizer", "SGD", "--limit", "300"]
    assert main(["bench", *flags, "--peer", "torch-fused", "torch-unclipped", "--output", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [result["peer"] for result in report["results"]] == ["torch-fused"]
    assert report["left_out"][-1]["why"] == why
    assert f"all all all all: FAILED: {why}." in (tmp_path / "bench.md").read_text()


def test_a_process_that_leaves_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    died = subprocess.CompletedProcess([], returncode=-11)
    monkeypatch.setattr(cli.subprocess, "run", lambda *_, **__: died)
    with pytest.raises(UserError, match="ended with code -11; its message is above"):
        cli.main([*FLAGS, "--processes", "1", "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workload", "resnet"], r"--workload: expected some of resnet50, .*, got 'resnet'"),
        (["--dtype", "int8"], r"--dtype: expected some of fp32, bf16, fp16, fp64, got 'int8'"),
        (["--optimizer", "Adagrad"], r"--optimizer: expected some of SGD, Adam, AdamW, Lion, got 'Adagrad'"),
        (["--peer", "jax"], r"--peer: expected some of torch-default"),
        (["--device", "tpu"], r"--device: expected cpu or cuda, got 'tpu'"),
        (["--pairs", "many"], r"--pairs: expected a whole number of at least 1, got 'many'"),
        (["--pairs", "0"], r"--pairs: expected a whole number of at least 1, got '0'"),
        (["--seconds", "-1"], r"--seconds: expected a number above 0, got '-1'"),
        (["--seconds", "nan"], r"--seconds: expected a number above 0, got 'nan'"),
        (["--device", "cpu", "--workload", "llama-1b"], r"llama-1b.*needs --device cuda"),
        (["--frobnicate"], r"unrecognized arguments: --frobnicate; gradfast bench --help lists the flags"),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        cli.main(flags)
    assert "\n" not in str(error.value)


def test_output_that_cannot_be_made_is_told_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        cli.main(["--quick", "--output", str(tmp_path / "file" / "folder")])


@pytest.mark.parametrize("text", ["no marks", f"{cli.END} {cli.BEGIN}", None])
def test_a_document_without_a_place_is_told_before_measuring(text: str | None, tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    if text is not None:
        document.write_text(text)
    with pytest.raises(UserError, match=r"--into .*page\.md: "):
        cli.main(["--quick", "--into", str(document), "--output", str(tmp_path)])


def test_help_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for word in (*cli.WORKLOADS, *PEERS, *cli.DTYPES, *cli.OPTIMIZERS, *cli.COLUMNS, "--quick", "--no-flush"):
        assert word in text


def test_neither_matplotlib_nor_rich_is_imported() -> None:
    code = "import sys, gradfast.bench.cli; sys.exit(bool({'matplotlib', 'rich', 'torchvision'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
