"""Short real runs that the tests of eval, predict, export and load_model share."""

from __future__ import annotations

from pathlib import Path

from train.cases import arguments

from gradfast.cli import main

# What changes how a model is built, fed or measured.
VARIANTS = {
    "plain": (),
    "average": ("--model-ema", "--model-ema-decay", "0.5"),
    "crop": ("--augment", "crop", "--workers", "0"),
    "bf16": ("--amp", "bf16", "--channels-last"),
    "changed": ("--activation", "silu", "--norm", "none", "--init", "fixup", "--dropout", "0.2", "--drop-path", "0.1"),
}


def train_variant(name: str, photos: Path, folder: Path) -> Path:
    """A run of three epochs that has learnt something: its answers are not all the same."""
    settings = ("--model", "resnet18", "--epochs", "3", "--lr", "0.02", "--seed", "3", *VARIANTS[name])
    output = folder / name
    assert main(arguments(photos, *settings, "--output", output)) == 0
    return output
