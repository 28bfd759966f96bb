"""Checkpoints: what goes in comes out, damage is found, nothing in them is run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from train.test_files import fill_disk

from gradfast.errors import UserError
from gradfast.train.machine.drawing import random_state
from gradfast.train.results.checkpoint import (
    BEST,
    LAST,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    step_name,
)
from gradfast.train.results.claim import Claims


def state_of(value: float) -> dict[str, Any]:
    return {
        "version": "0",
        "config": {"model": "m", "lr": 0.1},
        "classes": ["a", "b"],
        "fingerprint": "f",
        "model": {"weight": torch.full((1000,), value)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(1000)}}, "param_groups": [{"lr": 0.1}]},
        "scaler": {},
        "position": {"epoch": 1, "batch": 0, "tally": {}},
        "best": {"epoch": 1, "balanced_accuracy": 0.5},
        "random": random_state(torch.device("cpu")),
    }


def value_in(path: Path) -> float:
    return float(load_checkpoint(path)["model"]["weight"][0])


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(3.0), is_best=False)
    loaded = load_checkpoint(tmp_path)
    assert torch.equal(loaded["model"]["weight"], torch.full((1000,), 3.0))
    assert loaded["config"] == {"model": "m", "lr": 0.1} and loaded["classes"] == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == [LAST]


def test_best_stays_when_last_moves_on(tmp_path: Path) -> None:
    for value, is_best in ((1.0, True), (2.0, True), (3.0, False)):
        save_checkpoint(tmp_path, state_of(value), is_best)
    assert value_in(tmp_path / LAST) == 3.0 and value_in(tmp_path / BEST) == 2.0
    assert {path.name for path in tmp_path.iterdir()} == {LAST, BEST}


def test_best_is_copied_where_links_are_not_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    save_checkpoint(tmp_path, state_of(1.0), is_best=True)
    save_checkpoint(tmp_path, state_of(2.0), is_best=False)
    assert value_in(tmp_path / BEST) == 1.0 and value_in(tmp_path / LAST) == 2.0


@pytest.mark.parametrize("room", [0, 100, 5000, 9000])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    save_checkpoint(tmp_path, state_of(1.0), is_best=True)
    with monkeypatch.context() as full:
        fill_disk(full, room, only=LAST)
        with pytest.raises(UserError, match=r"cannot write .*last\.pt: No space left on device"):
            save_checkpoint(tmp_path, state_of(2.0), is_best=True)
    assert value_in(tmp_path / LAST) == value_in(tmp_path / BEST) == 1.0
    assert {path.name for path in tmp_path.iterdir()} == {LAST, BEST}


def test_every_cut_and_every_flipped_bit_of_the_weights_is_found(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(1.0), is_best=False)
    whole = (tmp_path / LAST).read_bytes()
    damaged = tmp_path / "damaged.pt"
    for length in range(0, len(whole), 997):
        damaged.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"damaged\.pt is damaged"):
            load_checkpoint(damaged)
    start = whole.index(torch.full((1000,), 1.0).numpy().tobytes())
    for offset in range(start, start + 4000, 499):
        spoiled = bytearray(whole)
        spoiled[offset] ^= 4
        damaged.write_bytes(spoiled)
        with pytest.raises(UserError, match=r"damaged\.pt is damaged \(checksum of"):
            load_checkpoint(damaged)


class Trap:
    """An object whose unpickling leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path, sprung = tmp_path / "trap.pt", tmp_path / "sprung"
    torch.save({**state_of(1.0), "format": 1, "model": Trap(sprung)}, path)
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(path)
    assert not sprung.exists()
    path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(path)
    assert not sprung.exists()


def test_foreign_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"other\.pt is not a checkpoint of gradfast train"):
        load_checkpoint(path)
    torch.save({**state_of(1.0), "format": 99, "version": "7.0"}, path)
    with pytest.raises(UserError, match=r"format 99, and this gradfast reads format 1; .*gradfast 7\.0"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none")


def test_the_newest_sound_checkpoint_is_found(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c", "empty")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        if folder.name != "empty":
            save_checkpoint(folder, state_of(float(number)), is_best=False)
            os.utime(folder / LAST, (1000 + number, 1000 + number))
    (folders[2] / LAST).write_bytes(b"damaged")
    os.utime(folders[2] / LAST, (2000, 2000))
    said: list[str] = []
    found = newest_checkpoint(folders, lambda folder: None, said.append)
    assert found is not None and found[0] == folders[1] / LAST and float(found[1]["model"]["weight"][0]) == 1.0
    assert len(said) == 1 and str(folders[2]) in said[0]
    assert newest_checkpoint([folders[3]], lambda folder: None, said.append) is None


def test_folders_that_others_write_to_are_passed_over(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        save_checkpoint(tmp_path / name, state_of(float(number)), is_best=True)
        os.utime(tmp_path / name / LAST, (1000 + number, 1000 + number))
    said: list[str] = []
    with Claims() as own, Claims() as others:
        others.take(tmp_path / "b")
        found = newest_checkpoint([tmp_path / "a", tmp_path / "b"], own.take, said.append)
    assert found is not None and found[0] == tmp_path / "a" / LAST
    assert len(said) == 1 and "another gradfast train is writing to" in said[0]


def test_older_checkpoints_are_kept_and_fallen_back_on(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save_checkpoint(tmp_path, state_of(float(step)), is_best=step == 5, step=step, keep=2)
        os.utime(tmp_path / LAST, (1000 + step, 1000 + step))
    assert {path.name for path in tmp_path.iterdir()} == {LAST, BEST, step_name(15), step_name(20)}
    assert value_in(tmp_path / step_name(15)) == 15.0 and value_in(tmp_path / step_name(20)) == 20.0
    said: list[str] = []
    for damaged, expected in ((LAST, step_name(20)), (step_name(20), step_name(15)), (step_name(15), BEST)):
        (tmp_path / damaged).unlink()
        (tmp_path / damaged).write_bytes(b"damaged")  # a new file: the links to the old one stay whole
        found = newest_checkpoint([tmp_path], lambda folder: None, said.append)
        assert found is not None and found[0].name == expected
    # A run that went back does again what led to the files ahead of it, and leaves them until then.
    save_checkpoint(tmp_path, state_of(8.0), is_best=False, step=8, keep=1)
    assert {path.name for path in tmp_path.glob("step-*")} == {step_name(number) for number in (8, 15, 20)}
