"""What nvcc tells about registers, read and reckoned by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import kernel_resources
from kernel_resources import Function, parse, resident_blocks, table

OUTPUT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8gradfast4cuda4kernA' for 'sm_90'
ptxas info    : Function properties for _ZN8gradfast4cuda4kernA
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _ZN8gradfast4cuda6calledE
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers
ptxas info    : Compile time = 704.187 ms
ptxas info    : Compiling entry function '_ZN8gradfast4cuda4kernB' for 'sm_120'
ptxas info    : Function properties for _ZN8gradfast4cuda4kernB
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers
"""


def test_parse() -> None:
    assert parse(OUTPUT) == [
        Function("_ZN8gradfast4cuda4kernA", "9.0", True, 0, 0, 80),
        Function("_ZN8gradfast4cuda6calledE", "9.0", False, 8, 16, 0),
        Function("_ZN8gradfast4cuda4kernB", "12.0", True, 16, 0, 32),
    ]


@pytest.mark.parametrize(
    ("registers", "architecture", "blocks"),
    [
        (80, "9.0", 3),  # 80 * 32 = 2560 a warp, 25 warps, 3 blocks of 8
        (81, "9.0", 2),  # rounded up to 2816 a warp: 23 warps
        (128, "8.0", 2),
        (32, "9.0", 8),  # 64 warps are all there are
        (32, "8.6", 6),  # 48 warps
        (16, "12.0", 6),
    ],
)
def test_resident_blocks_of_256_threads(registers: int, architecture: str, blocks: int) -> None:
    assert resident_blocks(registers, architecture, 256) == blocks


def test_table_shows_kernels_alone() -> None:
    lines = table(parse(OUTPUT), 256).splitlines()
    assert len(lines) == 4
    assert lines[2].endswith("| 9.0 | 80 | 0 | 3 | 38% |")


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the compiler say something about the one kernel there is."""
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "table.h").write_text("inline constexpr int kThreads = 256;  // of every block\n")
    (tmp_path / "csrc" / "cuda" / "kernel.cu").touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    toolkit = kernel_resources.cuda_toolkit.Toolkit(tmp_path, "13.0", tmp_path)
    monkeypatch.setattr(kernel_resources, "ROOT", tmp_path)
    monkeypatch.setattr(kernel_resources.cuda_toolkit, "find", lambda major: (toolkit, "found"))
    monkeypatch.setattr(kernel_resources.cuda_toolkit, "known_architectures", lambda toolkit: ["9.0"])

    def write(text: str) -> None:
        nvcc.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{text}END\n")
        nvcc.chmod(0o755)

    return write


SOUND = OUTPUT.replace("4 bytes spill stores, 12", "0 bytes spill stores, 0")


@pytest.mark.parametrize(("text", "code"), [(OUTPUT, 1), (SOUND, 0)])
def test_a_spill_fails(text: str, code: int, say: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    say(text)
    assert kernel_resources.main([]) == code
    printed = capsys.readouterr().out
    assert ("SPILLS 16 bytes" in printed) == (code == 1)
    assert "| 9.0 | 80 | 0 | 3 | 38% |" in printed


def test_output_of_another_form_is_not_taken_for_no_spill(say: Callable) -> None:
    say("nothing to see\n")
    with pytest.raises(SystemExit, match="no kernel"):
        kernel_resources.main([])


def test_without_a_toolkit_it_says_so_and_fails_only_where_one_is_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_resources.cuda_toolkit, "find", lambda major: (None, "no nvcc"))
    monkeypatch.setenv("GRADFAST_CUDA", "auto")
    assert kernel_resources.main([]) == 0
    monkeypatch.setenv("GRADFAST_CUDA", "1")
    assert kernel_resources.main([]) == 1
