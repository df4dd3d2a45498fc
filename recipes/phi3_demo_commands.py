"""The commands that the demo runs, as a user would type them, and what they left behind.

`phi3_plugin.recipes.phi3_demo` builds the checkpoint before them and judges the result after them.
"""

import json
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from phi3_plugin.recipes import phi3_demo_task as task

from phi3_plugin.errors import CheckpointError, MissingFileError

CONTENT = ("checkpoint", "finetuned", "evaluation", "train.jsonl", "heldout.jsonl", "tune.log")
CHECKPOINT, RESULT, EVALUATION, TRAIN, HELDOUT, LOG = CONTENT
"""What a demo run consists of."""

BATCH = 32
"""Samples a step, shared by the processes."""

PROGRESS = re.compile(r"step +(\d+)/(\d+) +\d+%  loss (\S+)")
"""A line of the recipe: step  32/384    8%  loss 1.2345  lr ..."""

TABLE = re.compile(r" {12,}base|(Loss|Token accuracy|ROUGE-L |Exact match)")
"""Lines of the evaluation that the demo shows."""

ASKED = "Reverse: t o r c h"
"""The report shows how the model answers this before, while and after it is trained."""


def train(folder: Path, processes: int) -> Path:
    """Train from the command line, and return the folder of the final adapter.

    Args:
        folder: Holds the checkpoint and the training file.
        processes: How many share the work.

    Raises:
        CheckpointError: Training failed; the end of what it printed is part of the message.
        MissingFileError: There is no ``tune`` in this environment.
    """
    shared = ["--nproc_per_node", str(processes)] if processes > 1 else []
    arguments = ["run", *shared, "phi3_lora_finetune", "--config", "phi3_demo"]
    keys = {"checkpoint_dir": CHECKPOINT, "output_dir": RESULT, "dataset.source": TRAIN}
    overrides = [f"{key}={folder / name}" for key, name in keys.items()]
    overrides += [f"batch_size={BATCH // processes}", "val_fraction=0.05"]
    overrides += ["run_val_every_n_steps=64", f'sample_prompts=["{ASKED}"]']
    tune("training", arguments, overrides, folder / LOG, progress)
    return folder / RESULT / "final"


def evaluate(folder: Path, adapter: Path) -> tuple[float, float]:
    """Evaluate from the command line; return exact match of base and adapter, from 0 to 1.

    Args:
        folder: Holds the checkpoint and the held-out file.
        adapter: Folder of the adapter.

    Raises:
        CheckpointError: It failed; the end of what it printed is part of the message.
    """
    keys = {"checkpoint_dir": CHECKPOINT, "output_dir": EVALUATION, "dataset.source": HELDOUT}
    overrides = [f"{key}={folder / name}" for key, name in keys.items()]
    overrides += [f"adapter={adapter}", f"generation.max_new_tokens={2 * task.LENGTH}"]
    arguments = ["run", "phi3_evaluate", "--config", "phi3_demo"]
    tune("the evaluation", arguments, overrides, folder / LOG, table)
    text = (folder / EVALUATION / "results.json").read_text(encoding="utf-8")
    match = json.loads(text)["measures"]["exact"]
    return match["base"]["value"] / 100, match["adapter"]["value"] / 100


def tune(
    what: str,
    arguments: Sequence[str],
    overrides: Sequence[str],
    log: Path,
    show: Callable[[str], None],
) -> None:
    """Run ``tune`` and show the command before it.

    Args:
        what: For the message if it fails.
        arguments: The command line up to the settings.
        overrides: The settings, which go on lines of their own.
        log: Takes what it prints, after what is there.
        show: Called with each line.

    Raises:
        CheckpointError: It failed; the end of what it printed is part of the message.
        MissingFileError: There is no ``tune`` in this environment.
    """
    program = Path(sysconfig.get_path("scripts")) / "tune"
    if not program.is_file():
        raise MissingFileError(f"{program} is missing. Install the package with its dependencies.")
    lines = [f"tune {shlex.join(arguments)}", *map(shlex.quote, overrides)]
    print("  $ " + " \\\n      ".join(lines) + "\n", flush=True)
    with log.open("a", encoding="utf-8") as file:
        code = run([str(program), *arguments, *overrides], file, show)
    if code:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise CheckpointError(f"{what} ended with exit code {code}. The end of its log:\n{end}")


def run(command: list[str], log: TextIO, show: Callable[[str], None]) -> int:
    """Run a command and return its exit code.

    Args:
        command: Program and arguments.
        log: Open file that takes the output.
        show: Called with each line of it.
    """
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        for line in process.stdout or ():
            log.write(line)
            show(line)
    return process.returncode


def progress(line: str) -> None:
    """Draw a bar if a line tells of a step, on a terminal over the one before it."""
    if not (found := PROGRESS.match(line)):
        return
    step, total = int(found[1]), int(found[2])
    bar = f"  [{'#' * (24 * step // total):<24}] step {step:3}/{total}  loss {float(found[3]):.3f}"
    if sys.stdout.isatty():
        print(f"\r{bar}", end="\n" if step == total else "", flush=True)
    elif step % 32 < 4 or step == total:  # the recipe writes about a hundred lines
        print(bar, flush=True)


def table(line: str) -> None:
    """Print a line of the table of an evaluation, and no others."""
    if TABLE.match(line):
        print(f"  {line.rstrip()}", flush=True)


def losses(folder: Path) -> list[float]:
    """Return the loss of every step of the run in this folder."""
    from phi3_plugin.train.history import History  # after prepare_process() has hushed libraries

    return [line["loss"] for line in History.read(folder / "metrics.jsonl") if "loss" in line]
