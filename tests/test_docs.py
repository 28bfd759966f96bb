"""The documents say what is so: what they name exists, examples run, and commands are understood."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gradfast
from gradfast.cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("README.md")])
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the documents are not beside these tests")
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@each_document
def test_named_tests_exist(document: Path) -> None:
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", document.read_text()):
        assert (ROOT / path).is_file(), f"{document.name} names {path}"
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path} has no {name}"


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", FENCE.sub("", document.read_text())):
        if not re.match(r"https?:|mailto:", target):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_parity_lists_tests_in_every_row() -> None:
    rows = [line for line in (ROOT / "docs/parity.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith(("| promise", "| fault"))]
    assert len(rows) > 40
    assert all("::test_" in row for row in rows)


# ---------------------------------------------------------------- examples


def examples(language: str) -> list[Any]:
    found = []
    for document in DOCUMENTS:
        blocks = [text for name, text in FENCE.findall(document.read_text()) if name == language]
        name = document.relative_to(ROOT)
        found += [pytest.param(text, id=f"{name}-{number}") for number, text in enumerate(blocks, start=1)]
    return found


def is_whole(example: str) -> bool:
    """Whether an example imports what it uses; others are extracts."""
    return {"import torch", "import gradfast"} <= set(example.splitlines())


@pytest.mark.parametrize("example", examples("python"))
def test_examples_run(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile(example, "example", "exec")
    if is_whole(example):
        monkeypatch.chdir(tmp_path)
        exec(code, {"__name__": "__main__"})


def shown() -> list[Any]:
    """Whole examples that a block without a language follows: what the document says that they print."""
    found = []
    for document in DOCUMENTS:
        blocks = FENCE.findall(document.read_text())
        for (language, example), (after, output) in pairwise(blocks):
            if language == "python" and is_whole(example) and after == "":
                found.append(pytest.param(example, output, id=str(document.relative_to(ROOT))))
    return found


@pytest.mark.parametrize(("example", "output"), shown())
def test_examples_print_what_is_shown(example: str, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Word by word, but for spaces, and for the last digits of numbers, which are another processor's."""
    if ".show()" in example:
        pytest.importorskip("rich")
    exec(compile(example, "example", "exec"), {"__name__": "__main__"})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    left_out = False
    for line in map(str.split, output.splitlines()):
        if line == ["..."]:
            left_out = True
            continue
        while left_out and printed and not alike(printed[0], line):
            printed.pop(0)
        left_out = False
        assert printed and alike(printed[0], line), f"shown: {' '.join(line)}; printed: {printed[:1]}"
        printed.pop(0)
    assert left_out or not any(printed)


def alike(printed: list[str], shown: list[str]) -> bool:
    def number(word: str) -> float | None:
        try:
            return float(word.strip(",;:()"))
        except ValueError:
            return None

    def same(one: str, other: str) -> bool:
        a, b = number(one), number(other)
        return one == other if a is None or b is None else a == pytest.approx(b, rel=0.05)

    return len(printed) == len(shown) and all(map(same, printed, shown))


def test_some_output_is_shown() -> None:
    assert len(shown()) >= 1


def test_some_examples_are_whole() -> None:
    assert sum(is_whole(one.values[0]) for one in examples("python")) >= 3


# ---------------------------------------------------------------- commands


def command_lines(text: str) -> Iterator[list[str]]:
    """The arguments of every `gradfast` command in the blocks of shell commands, and in indented lines of them."""
    blocks = [block for name, block in FENCE.findall(text) if name in ("sh", "bash")]
    blocks += re.findall(r"^ {4}(?:\$ )?(gradfast .*)$", FENCE.sub("", text), re.MULTILINE)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:2] == ["make", "train"]:
                arguments = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
                yield ["train", *shlex.split(" ".join(arguments))]
            elif "gradfast" in words:
                yield words[words.index("gradfast") + 1 :]


def commands() -> list[Any]:
    found = []
    for document in DOCUMENTS:
        for arguments in command_lines(document.read_text()):
            found.append(pytest.param(arguments, id=f"{document.relative_to(ROOT)}: {' '.join(arguments)}"))
    return found


class UnderstoodError(Exception):
    """Raised in place of carrying a command out."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands stop as soon as their parser has taken the arguments."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *rest: Any, **named: Any) -> None:
        parse(self, *rest, **named)
        raise UnderstoodError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)


@pytest.mark.parametrize("arguments", commands())
def test_commands_are_understood(arguments: list[str], parse_only: None) -> None:
    if not arguments or arguments[0].startswith("--"):
        return
    name, *rest = arguments
    assert name in COMMANDS
    module = importlib.import_module(COMMANDS[name][0])
    if "--help" in rest:
        return
    if name == "train":
        from gradfast.train.cli import read_settings

        for flag in ("-c", "--config"):  # a file of the reader's
            if flag in rest:
                del rest[rest.index(flag) : rest.index(flag) + 2]
        read_settings(rest)
        return
    with pytest.raises(UnderstoodError):
        module.main(rest)


def test_the_documents_show_commands() -> None:
    assert len(commands()) > 20


def test_a_wrong_command_would_be_found(parse_only: None) -> None:
    from gradfast.errors import UserError

    (arguments,) = command_lines("```sh\ngradfast train --no-such-flag 1   # a comment\n```\n")
    with pytest.raises(UserError, match="--no-such-flag"):
        test_commands_are_understood(arguments, parse_only)


# ---------------------------------------------------------------- the reference and the drawings


@pytest.mark.parametrize(
    "module", [gradfast.clip, gradfast.guard, gradfast.monitor, gradfast.nn, gradfast.amp, gradfast]
)
def test_the_reference_has_every_public_symbol(module: ModuleType) -> None:
    pages = "\n".join(path.read_text() for path in (ROOT / "docs/reference").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    symbols = set()
    for path in shown:
        home, _, name = path.rpartition(".")
        if not home.startswith("gradfast.integrations."):  # each needs its framework
            symbols.add(id(getattr(importlib.import_module(home), name)))
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert id(value) in symbols, f"{module.__name__}.{name} is on no page of docs/reference"


def load_script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, ROOT / "docs/site" / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def test_drawings_are_those_of_the_script() -> None:
    script = load_script("draw_how")
    for name, draw in script.DRAWINGS.items():
        assert (ROOT / "docs/images" / name).read_text() == str(draw())


def test_the_guides_pictures_are_those_of_its_commands() -> None:
    figures = load_script("draw_guide").FIGURES
    text = (ROOT / "docs/training.md").read_text()
    shown = [tuple(arguments) for arguments in command_lines(text)]
    for name, figure in figures.items():
        picture = ROOT / f"docs/images/guide-{name}.png"
        assert f"images/{picture.name}" in text and picture.stat().st_size < 80_000
        for run in figure.runs:
            assert tuple(shlex.split(run.command)[1:]) in shown, run.command
