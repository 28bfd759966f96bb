"""Killed at any instant, a run goes on as if nothing had been: no damage, and the same losses to the bit."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

from train.cases import arguments
from train.test_resume import assert_same_run

from gradfast.cli import main
from gradfast.train.results.checkpoint import load_checkpoint
from gradfast.train.results.claim import Claims

Refused = Callable[[list[str], str], str]

#: What a run does to the file system on the way to a whole file, as Python's audit events call it.
FILE_CALLS = ("link", "remove", "rename", "mkdir", "open", "truncate")


def command(photos: Path, output: str) -> list[str]:
    """Three epochs of five steps, saved after every second one."""
    flags = ("--epochs", 3, "--save-every-steps", 2, "--keep", 2, "--output", output)
    return arguments(photos, *flags)


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(command(photos, str(output))) == 0
    return output


def in_a_child(call: Callable[[], int]) -> int:
    """The exit code of a fork of this process that ends with what `call` returns; minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = call()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(number: int, folder: str) -> list[str]:
    """From now on, kill this process before its call `number` (from 0) that concerns `folder`; lists the calls made."""
    calls: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        name = event.removeprefix("os.")
        if name not in FILE_CALLS or not any(folder in str(argument) for argument in arguments):
            return
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(name)

    sys.addaudithook(watch)
    return calls


def count_calls(photos: Path, path: Path) -> int:
    """How many times an undisturbed run touches the files of its folder."""

    def call() -> int:
        calls = die_at(-1, "counted")
        code = main(command(photos, "counted"))
        path.write_text(str(len(calls)))
        return code

    assert in_a_child(call) == 0
    return int(path.read_text())


def test_killed_at_any_call_to_the_file_system(undisturbed: Path, photos: Path, in_tmp: Path) -> None:
    total = count_calls(photos, in_tmp / "count")
    assert total > 50
    seed = random.randrange(10**6)
    generator = random.Random(seed)
    for share in range(6):  # one instant out of each sixth of the run
        number = generator.randrange(total * share // 6, total * (share + 1) // 6)
        output = f"killed-{share}"

        def call(number: int = number, output: str = output) -> int:
            die_at(number, output)
            return main(command(photos, output))

        assert in_a_child(call) == -signal.SIGKILL, (seed, number)
        resume = ["train", "--resume", "auto", "--output", output]
        started = Path(output).is_dir() and any(Path(output).iterdir())
        if started and not (Path(output) / "last.pt").is_file():
            continue  # killed before the first checkpoint was whole: no step had been made, so nothing was lost
        assert main(resume if started else command(photos, output)) == 0, (seed, number)
        assert_same_run(Path(output), undisturbed)
        left = {path.name for path in Path(output).iterdir()}
        assert left == {path.name for path in undisturbed.iterdir()}, (seed, number)


@pytest.mark.parametrize("written", ["best", "step"])
def test_killed_between_the_names_of_the_last_checkpoint(
    undisturbed: Path, photos: Path, in_tmp: Path, written: str
) -> None:
    shutil.copytree(undisturbed, "run")
    folder = Path("run")
    whole, earlier = folder / "step-00000015.pt", folder / "step-00000014.pt"
    whole.rename(folder / ("best.pt" if written == "best" else whole.name))
    shutil.copy(earlier, folder / "last.pt")
    os.utime(folder / "last.pt", ns=(0, 0))
    assert main(["train", "--resume", "auto", "--output", "run"]) == 0
    for name in ("last.pt", whole.name):
        assert load_checkpoint(folder / name)["position"]["epoch"] == 3, name
    assert {path.name for path in folder.iterdir()} == {path.name for path in undisturbed.iterdir()}


@pytest.mark.slow
def test_killed_at_random_times(undisturbed: Path, photos: Path, in_tmp: Path) -> None:
    seed = random.randrange(10**6)
    generator = random.Random(seed)
    first, again = command(photos, "run"), ["train", "--resume", "auto", "--output", "run"]
    for _ in range(40):
        started = Path("run/last.pt").is_file()
        words = [sys.executable, "-m", "gradfast", *(again if started else first)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:  # from the first step on: what comes before it has nothing to lose
                if line.startswith("results"):
                    time.sleep(generator.uniform(0.0, 1.5))
                    process.kill()
                    break
            process.stdout.read()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, seed
    else:
        assert main(again) == 0
    assert_same_run(Path("run"), undisturbed)


def test_saved_between_epochs_and_within_them(undisturbed: Path) -> None:
    # 15 steps: after each second one, and after the epochs' last (5, 10, 15); --keep 2 leaves the last two of them
    assert {path.name for path in undisturbed.glob("step-*")} == {"step-00000014.pt", "step-00000015.pt"}
    within = load_checkpoint(undisturbed / "step-00000014.pt")["position"]
    assert (within["epoch"], within["batch"], len(within["tally"]["columns"]["loss"])) == (2, 4, 4)


def test_a_damaged_last_checkpoint_costs_no_run(
    undisturbed: Path, photos: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(photos, "run")) == 0
    Path("run/last.pt").unlink()
    Path("run/last.pt").write_bytes(b"damaged")
    Path("run/step-00000015.pt").unlink()
    assert main(["train", "--resume", "auto", "--output", "run"]) == 0
    out = capsys.readouterr().out
    assert "passed over: run/last.pt is damaged" in out and "resumed    run/step-00000014.pt after 2 epochs" in out
    assert_same_run(Path("run"), undisturbed)


def test_a_checkpoint_that_the_system_cuts_short_leaves_the_one_before(
    undisturbed: Path, photos: Path, in_tmp: Path
) -> None:
    shutil.copytree(undisturbed, "run")
    more = ["train", "--resume", "run", "--epochs", "4"]

    def call() -> int:
        half = Path("run/last.pt").stat().st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))
        with Path("said").open("w") as sys.stderr:
            return main(more)

    assert in_a_child(call) == 2
    assert Path("said").read_text() == "gradfast: error: cannot write run/last.pt: File too large\n"
    assert load_checkpoint(Path("run"))["position"]["epoch"] == 3
    assert not list(Path("run").glob(".*"))
    assert main(more) == 0
    assert load_checkpoint(Path("run"))["position"]["epoch"] == 4


# ---------------------------------------------------------------- two runs, one folder


@pytest.fixture
def busy() -> Iterator[Path]:
    """A folder that another run is writing to."""
    Path("run").mkdir()
    with Claims() as others:
        others.take(Path("run"))
        yield Path("run")


def test_a_folder_in_use_is_refused(photos: Path, in_tmp: Path, busy: Path, refused: Refused) -> None:
    refused(arguments(photos, "--output", "run"), r"another gradfast train is writing to .*run; wait for it, stop it")
    assert list(busy.iterdir()) == []
    (busy / "last.pt").write_bytes(b"being written")
    refused(["train", "--resume", "run"], r"another gradfast train is writing to .*run")


def test_auto_passes_over_a_folder_in_use(
    photos: Path, in_tmp: Path, busy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (busy / "last.pt").write_bytes(b"being written")
    assert main(arguments(photos, "--resume", "auto", "--output", "run")) == 2
    output = capsys.readouterr()
    assert "passed over: another gradfast train is writing to" in output.out and "is not empty" in output.err


def test_a_claim_ends_with_its_run(tmp_path: Path) -> None:
    with Claims() as first:
        first.take(tmp_path)
        first.take(tmp_path)  # once more changes nothing
    with Claims() as second:
        second.take(tmp_path)


def test_a_claim_ends_with_its_process_and_not_with_its_workers(tmp_path: Path) -> None:
    claims = Claims()
    claims.take(tmp_path)
    ready, hold = os.pipe(), os.pipe()

    worker = os.fork()
    if worker == 0:  # inherits the handle, and outlives the run
        os.write(ready[1], b".")
        os.close(hold[1])
        os.read(hold[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    claims.close()
    with Claims() as others:
        others.take(tmp_path)
    os.close(hold[1])
    os.waitpid(worker, 0)


# ---------------------------------------------------------------- a worker that dies


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Kill the worker that reads a certain image, once the run is under way: the first so many times."""
    from torch.utils.data import dataloader

    from gradfast.train.data import batches

    iterator = dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(iterator._try_get_data, "__defaults__", (0.2,))  # else five seconds pass before torch looks

    def die(times: int) -> None:
        real, main_process = batches.ImageDataset.load, os.getpid()

        def load(self: Any, index: int) -> Any:
            if os.getpid() != main_process and index == 3 and Path("run/last.pt").is_file():
                died = len(list(Path().glob("died-*")))
                if died < times:
                    Path(f"died-{died}").touch()
                    os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory runs out
            return real(self, index)

        monkeypatch.setattr(batches.ImageDataset, "load", load)

    return die


def test_a_dead_worker_is_replaced_and_nothing_is_lost(
    undisturbed: Path, photos: Path, in_tmp: Path, dying: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGCHLD)
    dying(3)
    assert main([*command(photos, "run"), "--workers", "2", "--cache", "off"]) == 0
    assert len(list(in_tmp.glob("died-*"))) == 3
    out = capsys.readouterr().out
    assert out.count("a process that reads images died (DataLoader worker") == 3
    assert "with new ones (3 of 3)" in out
    assert_same_run(Path("run"), undisturbed)
    assert signal.getsignal(signal.SIGCHLD) is before


def test_a_worker_that_always_dies_ends_the_run_with_what_to_do(
    undisturbed: Path, photos: Path, in_tmp: Path, dying: Callable[[int], None], refused: Refused
) -> None:
    dying(4)
    refused(
        [*command(photos, "run"), "--workers", "1", "--cache", "off"],
        r"a process that reads images died \(.*\); the last checkpoint is run/last\.pt, after 0 epochs.*"
        r"--resume run --workers 0 goes on",
    )
    assert main(["train", "--resume", "run", "--workers", "0"]) == 0
    assert_same_run(Path("run"), undisturbed)
