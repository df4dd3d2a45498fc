"""Trains inside the test, stops, resumes, and compares to the last bit."""

import shutil
from pathlib import Path

import torch
from phi3_plugin.recipes.lora_finetune import Finetune

from phi3_plugin.checkpoint.peft import load_adapter
from phi3_plugin.train import checkpoints as run
from phi3_plugin.train.monitor import MEASURED, History
from tests.own import CONFIG, TINY, started

RUN = (
    *TINY,
    "output_dir=out",
    "model.lora_dropout=0.1",
    "dataset.packed=True",
    "batch_size=1",
    "gradient_accumulation_steps=2",
    "epochs=3",
    "val_fraction=0.2",
    "run_val_every_n_steps=2",
    "save_every_n_steps=1",
    "report=False",
)
"""All that draws random numbers or keeps a place: dropout, shuffling, packs, accumulation, warm-up
and decay of the rate, validation with its best loss. With 40 rows 3 epochs of 3 steps, the last
of which has one micro-batch instead of two."""


def train(cwd: Path, *settings: str, config: Path = CONFIG) -> Finetune:
    """Train to the end, or until a signal, in ``cwd``."""
    with started(*RUN, *settings, cwd=cwd, config=config) as recipe:
        recipe.train()
        recipe.finish()
    return recipe


def leave_until(step: int, out: Path, copy: Path) -> None:
    """Copy a run as a kill after a step leaves it; its metrics were written further on."""
    shutil.copytree(out, copy, ignore=shutil.ignore_patterns("final", "logs"))
    for folder in (*copy.glob("step_*"), copy / "best"):
        if folder.is_dir() and run.load_state(folder)["step"] > step:
            shutil.rmtree(folder)


def lines(out: Path) -> list[dict]:
    """Return what a run measured, without its events and without what depends on the hour."""
    written = [line for line in History.read(out / "metrics.jsonl") if "event" not in line]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in written]


def same(one: object, other: object) -> bool:
    """Whether two states are equal to the last bit."""
    if hasattr(one, "__tensor_flatten__"):  # made of others, and unknown to torch.equal
        parts, rest = one.__tensor_flatten__()
        return (parts, rest) == other.__tensor_flatten__() and all(
            same(getattr(one, part), getattr(other, part)) for part in parts
        )
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def state(folder: Path) -> dict:
    """Return what a run goes on from; its settings differ in ``resume``."""
    return {key: v for key, v in run.load_state(folder).items() if key != "settings"}


def assert_same_end(out: Path, expected: Path) -> None:
    """Check weights, training state and metrics of two runs, to the last bit."""
    names = ("final", "best") if (expected / "best").exists() else ("final",)
    for name in names:
        # Not the files: safetensors writes its metadata in an order that changes.
        assert same(*(load_adapter(folder / name) for folder in (out, expected)))
        assert same(*(state(folder / name) for folder in (out, expected)))
    assert lines(out) == lines(expected)
