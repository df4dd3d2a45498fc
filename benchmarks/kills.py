"""Kill a run at random moments, resume it each time, and compare with a run left in peace.

    python benchmarks/kills.py [--kills 20] [--seed 0] [--folder DIR]

Half of the kills (SIGKILL) come at a random moment of training, half while a checkpoint is being
written or replaced. After every fourth kill a file of the newest checkpoint is cut short as well,
as a power cut may leave it. Every start is the same command with resume=auto. Prints one row a
start, and at the end whether adapter, training state and metrics are the same to the last bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from phi3_plugin.recipes import phi3_demo as task
from phi3_plugin.recipes.phi3_demo_checkpoint import build_checkpoint
from safetensors.torch import load_file

from phi3_plugin.checkpoint.peft import WEIGHTS
from phi3_plugin.train import checkpoints as run
from phi3_plugin.train.monitor import MEASURED, History

COMMAND = (
    *(Path(sys.executable).with_name("tune"), "run", "phi3_lora_finetune"),
    *("--config", "phi3_demo", "checkpoint_dir=base", "dataset.source=rows.jsonl"),
    *("device=cpu", "resume=auto", "model.lora_dropout=0.1", "dataset.packed=True"),
    *("batch_size=2", "gradient_accumulation_steps=2", "lr_scheduler.num_warmup_steps=2"),
    *("val_fraction=0.1", "run_val_every_n_steps=3", "save_every_n_steps=2"),
    *("save_total_limit=3", "report=False"),
)
WINDOW = 2.5
"""Seconds of training within which a kill comes; shorter than a run, so that many fit."""


class Row(NamedTuple):
    """What one start did."""

    alive: float
    """Seconds from its first step, or first save, to the kill; NaN for the start that finished."""
    moment: str
    found: str
    skipped: str
    step: int
    """Last step in the metrics when it was killed."""


def main() -> None:
    """Run both, print the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="at least so many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to work, instead of a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        prepare(folder, rows=400)
        epochs = max(3, options.kills // 2)
        print("  #  alive  killed during  step  went on from  skipped")
        kills = kill_and_resume(folder, options.kills, random.Random(options.seed), epochs)
        for number, row in enumerate(kills, 1):
            print(
                f"{number:3}  {row.alive:5.2f}  {row.moment:13}  {row.step:4}  "
                f"{row.found:12}  {row.skipped}",
                flush=True,
            )
        undisturbed(folder, epochs)
        for what, equal in compare(folder / "killed", folder / "whole").items():
            print(f"identical {what}: {'yes' if equal else 'NO'}")


def prepare(folder: Path, rows: int) -> None:
    """Write a tiny checkpoint and chats."""
    folder.mkdir(parents=True, exist_ok=True)
    build_checkpoint(folder / "base", words=task.WORDS)
    chats, _ = task.make_chats()
    text = "".join(json.dumps(chat) + "\n" for chat in chats[:rows])
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")


def undisturbed(folder: Path, epochs: int) -> None:
    """Train to the end in one go."""
    process = start(folder, "whole", epochs)
    _, said = process.communicate()
    assert process.returncode == 0, said


def kill_and_resume(folder: Path, kills: int, rng: random.Random, epochs: int) -> Iterator[Row]:
    """Kill so often, resume each time, and then let it finish; yield a row for each start."""
    out = folder / "killed"
    for number in range(kills):
        saving = number % 2 == 1
        process = start(folder, "killed", epochs)
        wait_for_sign(process, out, saving)
        alive = rng.uniform(0, 0.02 if saving else WINDOW)
        time.sleep(alive)
        saving = saving and any(out.glob(".partial-*"))
        process.kill()
        _, said = process.communicate()
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"It ended by itself before kill {number + 1}: {said[-2000:]}")
        yield Row(alive, "a save" if saving else "training", *told(said), last_step(out))
        if number % 4 == 3:
            cut_short(out, rng)
    process = start(folder, "killed", epochs)
    _, said = process.communicate()
    assert process.returncode == 0, said
    yield Row(float("nan"), "not killed", *told(said), last_step(out))


def start(folder: Path, output_dir: str, epochs: int) -> subprocess.Popen[str]:
    """Start the command."""
    return subprocess.Popen(
        [*COMMAND, f"epochs={epochs}", f"output_dir={output_dir}"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_sign(process: subprocess.Popen[str], out: Path, saving: bool) -> None:
    """Wait until this start has made a step, or is writing a checkpoint."""
    metrics = out / "metrics.jsonl"
    before = stamp(metrics)
    while process.poll() is None:
        if stamp(metrics) != before and (not saving or any(out.glob(".partial-*"))):
            return
        time.sleep(0.001)


def stamp(file: Path) -> int:
    """Return when a file was last written; 0 if never."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def cut_short(out: Path, rng: random.Random) -> None:
    """Take the end off a file of the newest checkpoint."""
    folder = run.find(out, "auto").folder
    if folder is not None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        file = rng.choice(files)
        os.truncate(file, file.stat().st_size // 2)


def told(said: str) -> tuple[str, str]:
    """Return which folder a start said it goes on from, and which it skipped for which reason."""
    lines = [line for line in said.splitlines() if line.startswith("resume: ")]
    found = [line.split(" from ")[1].split(",")[0] for line in lines if "going on from" in line]
    skipped = [line.partition("skipped ")[2] for line in lines if "skipped" in line]
    name = Path(found[0]).name if found else "the start"
    return name, "; ".join(reason.removeprefix("killed/") for reason in skipped)


def last_step(out: Path) -> int:
    """Return the last step that the metrics know of."""
    return max((line["step"] for line in History.read(out / "metrics.jsonl")), default=0)


def compare(one: Path, other: Path) -> dict[str, bool]:
    """Say what of two runs is the same to the last bit."""
    adapters = [load_file(folder / run.FINAL / WEIGHTS) for folder in (one, other)]
    states = [run.load_state(folder / run.FINAL, run.RUN_STATE) for folder in (one, other)]
    for state in states:
        del state["settings"]  # they differ in `resume`
    return {
        "final adapter": same(*adapters),
        "optimizer, schedule, random numbers": same(*states),
        "metrics": measured(one) == measured(other),
    }


def same(one: object, other: object) -> bool:
    """Whether two nested states are equal to the last bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def measured(out: Path) -> list[dict[str, object]]:
    """Return the metrics without events, and without what depends on the hour."""
    lines = [line for line in History.read(out / "metrics.jsonl") if "event" not in line]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


if __name__ == "__main__":
    main()
