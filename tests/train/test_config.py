"""Settings: flags over YAML over defaults, every value checked, and what is saved reads back."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from gradfast.errors import UserError
from gradfast.train.cli import build_parser, read_settings
from gradfast.train.config import FIELDS, TrainConfig, flag
from gradfast.train.options.field import GROUPS
from gradfast.train.settings import check_value, read_yaml, to_yaml

pytest.importorskip("yaml")


def write(folder: Path, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text)
    return str(path)


def test_flags_override_yaml_and_yaml_overrides_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "lr: 0.5\nbatch-size: 16\nweight_decay: 1e-3\n")
    settings = read_settings(["-c", path, "--batch-size", "8"])
    config = TrainConfig(**settings)
    assert (config.lr, config.batch_size, config.weight_decay) == (0.5, 8, 0.001)
    assert config.momentum == TrainConfig().momentum


def test_yaml_after_flags_still_gives_way_to_them(tmp_path: Path) -> None:
    path = write(tmp_path, "epochs: 3")
    assert read_settings(["--epochs", "5", "-c", path])["epochs"] == 5


def test_yaml_booleans_mean_the_words_off_and_on(tmp_path: Path) -> None:
    path = write(tmp_path, "amp: off\ncache: off\nclip_grad: off\nstrict: true\n")
    assert read_yaml(Path(path)) == {"amp": "off", "cache": "off", "clip_grad": None, "strict": True}


def test_amp_alone_means_bf16(tmp_path: Path) -> None:
    assert read_settings(["--amp"])["amp"] == "bf16"
    assert read_settings(["--amp", "fp16"])["amp"] == "fp16"
    assert read_yaml(Path(write(tmp_path, "amp: true")))["amp"] == "bf16"


@pytest.mark.parametrize("text", ["0", "off", "none", "0.0"])
def test_clip_grad_can_be_turned_off(text: str) -> None:
    assert read_settings(["--clip-grad", text]) == {"clip_grad": None}


def test_what_is_saved_reads_back(tmp_path: Path) -> None:
    config = TrainConfig(opt="adamw", clip_grad=None, channels_last=True, weight_decay=1e-5, seed=7).resolve()
    path = write(tmp_path, to_yaml(config, "two\nlines"))
    assert Path(path).read_text().startswith("# two\n# lines\n")
    assert TrainConfig(**read_yaml(Path(path))).resolve() == config


@pytest.mark.parametrize(
    ("optimiser", "lr", "decay"), [("sgd", 0.05, 1e-4), ("adam", 1e-3, 0.0), ("adamw", 1e-3, 0.05), ("lion", 1e-4, 0.5)]
)
def test_rate_and_decay_suit_the_optimiser(optimiser: str, lr: float, decay: float) -> None:
    config = TrainConfig(opt=optimiser).resolve()
    assert (config.lr, config.weight_decay) == (lr, decay)
    kept = TrainConfig(opt=optimiser, lr=0.0, weight_decay=0.3).resolve()
    assert (kept.lr, kept.weight_decay) == (0.0, 0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: fast", r"settings.yaml: lr: expected a number of at least 0, got 'fast'"),
        ("lerning_rate: 1", r"settings.yaml: unknown setting 'lerning_rate'"),
        ("batchsize: 1", r"did you mean batch_size\?"),
        ("strict: 3", r"strict: expected true or false, got 3"),
        ("epochs: [1, 2]", r"epochs: expected one value"),
        ("epochs: null", r"epochs: expected a whole number of at least 1, got 'None'"),
        ("opt: lamb", r"opt: expected one of sgd, adam, adamw, lion, got 'lamb'"),
        ("decay_milestones: 9,3", r"decay_milestones: expected rising whole numbers such as 30,60,80, got '9,3'"),
        ("- 1\n- 2", r"expected lines of 'name: value'"),
        ("a: [", r"is not YAML"),
    ],
)
def test_bad_yaml_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_yaml(Path(write(tmp_path, text)))


def test_missing_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the configuration .*none\.yaml: No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_empty_yaml_sets_nothing(tmp_path: Path) -> None:
    assert read_yaml(Path(write(tmp_path, "# nothing\n"))) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", "0"), ("epochs", "1.5"), ("img_size", "-8"), ("lr", "-0.1"), ("lr", "nan"), ("lr", "inf"),
        ("momentum", "1"), ("val_split", "0"), ("val_split", "1"), ("seed", "-1"), ("seed", str(2**63)),
        ("workers", "-1"), ("decay_rate", "0"), ("data", " "), ("sched", "Cosine"), ("clip_grad", "-1"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"^{flag(name)}: expected"):
        check_value(name, value, flag(name))


def test_fp16_without_skipping_is_a_contradiction() -> None:
    with pytest.raises(UserError, match="--amp fp16 needs --nonfinite skip"):
        TrainConfig(amp="fp16", nonfinite="raise").resolve()


def test_help_groups_and_explains_every_flag() -> None:
    parser = build_parser()
    text = parser.format_help()
    for purpose in GROUPS.values():
        assert purpose in text
    for name in FIELDS:
        assert flag(name) in text
    described = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    assert all(action.help and len(action.help) > 15 for action in described)
