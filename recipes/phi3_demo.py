"""Fine-tune a tiny Phi-3 from the command line and prove the adapter in transformers and PEFT.

    python -m phi3_plugin.recipes.phi3_demo [--output DIR] [--processes N]

Five steps: build a checkpoint folder that knows nothing, train it with ``tune run``, load the
adapter as any user of PEFT would, ask both models questions that were not in the training file,
and evaluate both with ``tune run``. Needs no download and no GPU. Exits with 1 if it learned
nothing.
"""

import argparse
import json
import logging
import os
import random
import re
import shlex
import shutil
import string
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from phi3_plugin.errors import CheckpointError, MissingFileError, OutputError, Phi3Error
from phi3_plugin.lock import FolderLock

from .phi3_demo_checkpoint import build_checkpoint

# The task: reversing five letters. There are almost eight million questions; a model that answers
# ones it never saw has learned to reverse, not to remember.

COMMAND, LETTERS, LENGTH = "Reverse:", string.ascii_lowercase, 5
TRAIN_CHATS, HELDOUT_CHATS = 2048, 200

WORDS = [COMMAND, *LETTERS]
"""What the task is made of, for a tokenizer that knows each as one token."""

ASKED = "Reverse: t o r c h"
"""The report shows how the model answers this before, while and after it is trained."""

KNEW_NOTHING, LEARNED = 0.05, 0.95
"""Exact match, at most before training and at least after it."""


def make_chats() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the training chats and the held-out ones, rows of a chat file that share no question.

    They are the same on every machine: what the demo learns is known for these.
    """
    rng = random.Random(0)
    # A dict keeps the order of the draws and drops repetitions
    chosen: dict[str, None] = {}
    while len(chosen) < TRAIN_CHATS + HELDOUT_CHATS:
        chosen["".join(rng.sample(LETTERS, LENGTH))] = None
    chats = []
    for letters in chosen:
        question, answer = f"{COMMAND} {' '.join(letters)}", " ".join(reversed(letters))
        roles = {"user": question, "assistant": answer}
        messages = [{"role": role, "content": content} for role, content in roles.items()]
        chats.append({"messages": messages})
    return chats[HELDOUT_CHATS:], chats[:HELDOUT_CHATS]


# What a run leaves in its folder

CONTENT = ("checkpoint", "finetuned", "evaluation", "train.jsonl", "heldout.jsonl", "tune.log")
CHECKPOINT, RESULT, EVALUATION, TRAINING, HELDOUT, LOG = CONTENT

MADE_BY_DEMO = "made_by_phi3_demo"
"""A folder with this file is an earlier run, which may be replaced."""


def main(arguments: list[str] | None = None) -> int:
    """Run the demo and return its exit code.

    Args:
        arguments: The command line without the program's name; by default that of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m phi3_plugin.recipes.phi3_demo",
        description="Fine-tune a tiny Phi-3, prove the adapter in transformers and PEFT.",
    )
    add = parser.add_argument
    place = "where everything goes; an earlier demo run there is replaced (default: ./demo_run)"
    add("--output", type=Path, default=Path("demo_run"), metavar="DIR", help=place)
    add("--processes", type=int, default=1, choices=(1, 2, 4), help="processes that train (1)")
    options = parser.parse_args(arguments)

    hush()
    try:
        with prepare_output(options.output):
            return demo(options.output, options.processes)
    except Phi3Error as error:
        print(f"\nphi3_demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nphi3_demo: stopped.", file=sys.stderr)
        return 130


def hush() -> None:
    """Hide what the libraries say about themselves, and share the machine; training inherits it."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # all files are local, so nothing may wait for a network
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # Matrices this small gain little from threads, which on a busy machine wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def prepare_output(folder: Path) -> FolderLock:
    """Take a folder, emptied of what an earlier run wrote.

    Raises:
        OutputError: The folder holds something else, another demo runs in it, or it cannot be
            written.
    """
    if folder.exists() and not (folder / MADE_BY_DEMO).is_file():
        raise OutputError(
            f"--output: {folder} exists and is not an earlier demo run. Choose a new folder."
        )
    lock = FolderLock(folder, "--output")
    try:
        (folder / MADE_BY_DEMO).write_text(
            "The next run of the demo replaces what this one wrote here.\n"
        )
        for path in (folder / name for name in CONTENT):  # and nothing a user may have added
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"--output: {folder} cannot be written: {error.strerror}.") from error
    return lock


def demo(folder: Path, processes: int) -> int:
    """Build, train with so many processes, load and compare, telling what happens."""
    # Brings libraries, which have just been told to be quiet
    from transformers import AutoTokenizer

    from phi3_plugin.proof import load_base_with_hf, load_with_peft

    started = time.monotonic()
    base, result, log = folder / CHECKPOINT, folder / RESULT, folder / LOG

    print(f"\n[1/5] Build a tiny Phi-3 checkpoint with random weights in {base}", flush=True)
    build_checkpoint(base, words=WORDS)
    training, held_out = make_chats()
    for name, chats in ((TRAINING, training), (HELDOUT, held_out)):
        (folder / name).write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")

    print(f"\n[2/5] Fine-tune it with LoRA on {len(training)} chats", flush=True)
    shared = ["--nproc_per_node", str(processes)] if processes > 1 else []
    command = ["run", *shared, "phi3_lora_finetune", "--config", "phi3_demo"]
    settings = {
        "checkpoint_dir": base,
        "output_dir": result,
        "dataset.source": folder / TRAINING,
        "batch_size": 32 // processes,
        "val_fraction": 0.05,
        "run_val_every_n_steps": 64,
        "sample_prompts": f'["{ASKED}"]',
    }
    run_tune(command, settings, log, show_progress)
    adapter = result / "final"
    text = (result / "metrics.jsonl").read_text("utf-8")
    losses = [line["loss"] for line in map(json.loads, text.splitlines()) if "loss" in line]

    print("\n[3/5] Load the adapter in transformers + PEFT", flush=True)
    models = load_base_with_hf(base), load_with_peft(base, adapter)

    print(f"\n[4/5] Ask both {len(held_out)} questions that were not in the training file")
    turns = [[turn["content"] for turn in chat["messages"]] for chat in held_out]
    questions, expected = zip(*turns, strict=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    before, after = (ask(model, tokenizer, questions) for model in models)
    show_answers(questions, before, after)
    in_peft = [exact_match(answers, expected) for answers in (before, after)]

    print("\n[5/5] Evaluate base and adapter on them", flush=True)
    settings = {
        "checkpoint_dir": base,
        "output_dir": folder / EVALUATION,
        "dataset.source": folder / HELDOUT,
        "adapter": adapter,
        "generation.max_new_tokens": 2 * LENGTH,
    }
    run_tune(["run", "phi3_evaluate", "--config", "phi3_demo"], settings, log, show_table)
    numbers = json.loads((folder / EVALUATION / "results.json").read_text("utf-8"))
    match = numbers["measures"]["exact"]
    code = judge(in_peft, [match[name]["value"] / 100 for name in ("base", "adapter")], losses)

    print(f"\n  adapter     {adapter}\n  report      {result / 'report.html'}")
    print(f"  losses      {result / 'metrics.jsonl'}")
    print(f"  evaluation  {folder / EVALUATION / 'evaluation.html'}")
    print(f"  tune log    {log}\n  time        {time.monotonic() - started:.0f} s")
    return code


def judge(in_peft: Sequence[float], here: Sequence[float], losses: Sequence[float]) -> int:
    """Print the result and return the exit code: 0 if the model learned the task, else 1.

    Args:
        in_peft: Exact match of base and adapter as transformers and PEFT answer, from 0 to 1.
        here: The same as the evaluation found it.
        losses: Of all steps.
    """
    before, after = here
    print(f"\n  exact match  {before:6.1%}  ->  {after:6.1%}")
    print(f"  loss         {losses[0]:6.3f}  ->  {losses[-1]:6.3f}\n")
    if list(here) != list(in_peft):
        start, end = in_peft
        print(f"  FAILED: in PEFT exact match is {start:.1%} before and {end:.1%} after.")
    elif before <= KNEW_NOTHING and after >= LEARNED:
        print("  It learned to reverse. PEFT runs what torchtune trained, and answers alike.")
        return 0
    else:
        print(
            f"  FAILED: expected exact match of at most {KNEW_NOTHING:.0%} before and at least "
            f"{LEARNED:.0%} after."
        )
    return 1


def ask(model: Any, tokenizer: Any, questions: Sequence[str]) -> list[str]:
    """Return the model's greedy answers, generated as one left-padded batch.

    Args:
        model: As transformers or PEFT loads it.
        tokenizer: As transformers loads it; Phi-3's pads on the left.
        questions: One user turn each.
    """
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**batch, do_sample=False, max_new_tokens=2 * LENGTH)
    answers = output[:, batch["input_ids"].shape[1] :]
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Return the share of answers that are right to the letter."""
    return sum(a == b for a, b in zip(answers, expected, strict=True)) / len(expected)


def show_answers(questions: Sequence[str], before: Sequence[str], after: Sequence[str]) -> None:
    """Print the first questions with the answers of both models, side by side."""
    print(f"  {'question':<22}{'before':<26}after")
    for row in list(zip(questions, before, after, strict=True))[:5]:
        # An untrained model says anything, half letters and control characters too
        question, *answers = ("".join(c if " " <= c <= "~" else "?" for c in t) for t in row)
        print(f"  {question:<22}{answers[0][:23]:<26}{answers[1][:23]}")


# The commands, as a user would type them

PROGRESS = re.compile(r"step +(\d+)/(\d+) +\d+%  loss (\S+)")
"""A line of the recipe: step  32/384    8%  loss 1.2345  lr ..."""

TABLE = re.compile(r" {12,}base|(Loss|Token accuracy|ROUGE-L |Exact match)")
"""Lines of the evaluation that the demo shows."""


def run_tune(
    command: Sequence[str], settings: dict[str, Any], log: Path, show: Callable[[str], None]
) -> None:
    """Run ``tune``, and show the command before it.

    Args:
        command: The command line up to the settings.
        settings: By key; they go on lines of their own.
        log: Takes what it prints, after what is there.
        show: Called with each line.

    Raises:
        CheckpointError: It failed; the end of what it printed is part of the message.
        MissingFileError: There is no ``tune`` in this environment.
    """
    program = Path(sysconfig.get_path("scripts")) / "tune"
    if not program.is_file():
        raise MissingFileError(f"{program} is missing. Install the package with its dependencies.")
    overrides = [f"{key}={value}" for key, value in settings.items()]
    lines = [f"tune {shlex.join(command)}", *map(shlex.quote, overrides)]
    print("  $ " + " \\\n      ".join(lines) + "\n", flush=True)
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            [str(program), *command, *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        for line in process.stdout or ():
            file.write(line)
            show(line)
    if process.returncode:
        end = "\n".join(log.read_text("utf-8").splitlines()[-15:])
        raise CheckpointError(
            f"tune {' '.join(command)} ended with exit code {process.returncode}. The end of its "
            f"log:\n{end}"
        )


def show_progress(line: str) -> None:
    """Draw a bar if a line tells of a step, on a terminal over the one before it."""
    if not (match := PROGRESS.match(line)):
        return
    step, total, loss = int(match[1]), int(match[2]), float(match[3])
    bar = f"  [{'#' * (24 * step // total):<24}] step {step:3}/{total}  loss {loss:.3f}"
    if sys.stdout.isatty():
        print(f"\r{bar}", end="\n" if step == total else "", flush=True)
    elif step % 32 < 4 or step == total:  # the recipe writes about a hundred lines
        print(bar, flush=True)


def show_table(line: str) -> None:
    """Print a line of the table of an evaluation, and no others."""
    if TABLE.match(line):
        print(f"  {line.rstrip()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
