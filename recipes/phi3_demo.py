"""Fine-tune a tiny Phi-3 from the command line and prove the adapter in transformers and PEFT.

    python -m phi3_plugin.recipes.phi3_demo [--output DIR] [--keep] [--processes N]

Five steps: build a checkpoint folder that knows nothing, train it with ``tune run``, load the
adapter as any user of PEFT would, ask both models questions that were not in the training file,
and evaluate both with ``tune run``. Needs no download and no GPU. Exits with 1 if it learned
nothing.
"""

import argparse
import itertools
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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from phi3_plugin.recipes.phi3_demo_checkpoint import build_checkpoint

from phi3_plugin.checkpoint.check import hf_tokenizer, load_base_with_hf, load_with_peft
from phi3_plugin.errors import CheckpointError, MissingFileError, OutputError, Phi3Error

# The demo's task, reversing five letters: its chats, and the exam on them.
#
# There are almost eight million questions; a model that answers ones it never saw has learned
# to reverse, not to remember.

LETTERS = string.ascii_lowercase
LENGTH = 5
COMMAND = "Reverse:"
TRAIN_CHATS, HELDOUT_CHATS = 2048, 200

Chat = dict[str, Any]


def words() -> list[str]:
    """Return the words that the task is made of, for a tokenizer that knows each as one token."""
    return [COMMAND, *LETTERS]


def chat(letters: str) -> Chat:
    """Return one question with its answer, as a row of a chat file.

    Args:
        letters: The letters to reverse, without spaces.
    """
    question, answer = f"{COMMAND} {' '.join(letters)}", " ".join(reversed(letters))
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def make_chats(seed: int = 0) -> tuple[list[Chat], list[Chat]]:
    """Return the training chats and the held-out chats, which share no question.

    Args:
        seed: Seed of the choice.
    """
    rng = random.Random(seed)
    # A dict keeps the order of the draws and drops repetitions.
    chosen: dict[str, None] = {}
    while len(chosen) < TRAIN_CHATS + HELDOUT_CHATS:
        chosen["".join(rng.sample(LETTERS, LENGTH))] = None
    chats = [chat(letters) for letters in chosen]
    return chats[HELDOUT_CHATS:], chats[:HELDOUT_CHATS]


def to_jsonl(chats: Iterable[Chat]) -> str:
    """Return chats as the text of a file, one on a line."""
    return "".join(json.dumps(chat) + "\n" for chat in chats)


def read_questions(file: Path) -> tuple[list[str], list[str]]:
    """Return the questions of a chat file and the answers expected to them.

    Args:
        file: Chats of one question and one answer each.
    """
    rows = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    return [question["content"] for question, _ in rows], [answer["content"] for _, answer in rows]


def ask(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
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


def score(answers: list[str], expected: list[str]) -> float:
    """Return the share of answers that are right to the letter."""
    return sum(a == b for a, b in zip(answers, expected, strict=True)) / len(expected)


def show_answers(questions: list[str], before: list[str], after: list[str], rows: int = 5) -> None:
    """Print the first questions with the answers of both models, side by side."""
    print(f"  {'question':<22}{'before':<26}after")
    for row in list(zip(questions, before, after, strict=True))[:rows]:
        # An untrained model says anything, half letters and control characters too.
        question, *answers = ("".join(c if " " <= c <= "~" else "?" for c in t) for t in row)
        print(f"  {question:<22}{answers[0][:23]:<26}{answers[1][:23]}")


# The commands that the demo runs, as a user would type them, and what they left behind.
#
# `phi3_plugin.recipes.phi3_demo` builds the checkpoint before them and judges the result after them.

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
    overrides += [f"adapter={adapter}", f"generation.max_new_tokens={2 * LENGTH}"]
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
    from phi3_plugin.train.monitor import History  # after prepare_process() has hushed libraries

    return [line["loss"] for line in History.read(folder / "metrics.jsonl") if "loss" in line]


MARK = "made_by_phi3_demo"
"""A folder with this file is an earlier run, which may be replaced."""

KNEW_NOTHING, LEARNED = 0.05, 0.95
"""Exact match, at most before training and at least after it."""


def main(arguments: list[str] | None = None) -> int:
    """Run the demo and return its exit code.

    Args:
        arguments: The command line without the program's name; by default that of the process.
    """
    options = parse(arguments)
    prepare_process()
    try:
        return demo(prepare_output(options.output, options.keep), options.processes)
    except Phi3Error as error:
        print(f"\nphi3_demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nphi3_demo: stopped.", file=sys.stderr)
        return 130


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m phi3_plugin.recipes.phi3_demo",
        description="Fine-tune a tiny Phi-3, prove the adapter in transformers and PEFT.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo_run"),
        metavar="DIR",
        help="where everything goes; an earlier demo run there is replaced (default: ./demo_run)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep an earlier demo run and write to DIR-2, DIR-3, ... instead",
    )
    parser.add_argument(
        "--processes", type=int, default=1, choices=(1, 2, 4), help="processes that train (1)"
    )
    return parser.parse_args(arguments)


def demo(folder: Path, processes: int) -> int:
    """Build, train with so many processes, load and compare, telling what happens."""
    started = time.monotonic()
    heading(1, f"Build a tiny Phi-3 checkpoint with random weights in {folder / CHECKPOINT}")
    build_checkpoint(folder / CHECKPOINT, words=words())
    for name, chats in zip((TRAIN, HELDOUT), make_chats(), strict=True):
        (folder / name).write_text(to_jsonl(chats), encoding="utf-8")
    heading(2, f"Fine-tune it with LoRA on {TRAIN_CHATS} chats")
    adapter = train(folder, processes)
    heading(3, "Load the adapter in transformers + PEFT")
    models = load_base_with_hf(folder / CHECKPOINT), load_with_peft(folder / CHECKPOINT, adapter)
    heading(4, f"Ask both {HELDOUT_CHATS} questions that were not in the training file")
    tokenizer = hf_tokenizer(folder / CHECKPOINT)
    questions, expected = read_questions(folder / HELDOUT)
    before, after = (ask(model, tokenizer, questions) for model in models)
    show_answers(questions, before, after)
    in_peft = score(before, expected), score(after, expected)
    heading(5, "Evaluate base and adapter on them")
    code = judge(in_peft, evaluate(folder, adapter), losses(folder / RESULT))
    print(f"\n  adapter     {adapter}\n  report      {folder / RESULT / 'report.html'}")
    print(f"  losses      {folder / RESULT / 'metrics.jsonl'}")
    print(f"  evaluation  {folder / EVALUATION / 'evaluation.html'}")
    print(f"  tune log    {folder / LOG}\n  time        {time.monotonic() - started:.0f} s")
    return code


def prepare_output(folder: Path, keep: bool) -> Path:
    """Return a folder ready to write to, emptied if an earlier run filled it.

    Args:
        folder: The folder the user asked for.
        keep: Leave an earlier run alone and take the next free name.

    Raises:
        OutputError: The folder holds something else, or cannot be written.
    """
    if folder.exists() and not (folder / MARK).is_file():
        raise OutputError(
            f"--output: {folder} exists and is not an earlier demo run. Choose a new folder."
        )
    if keep and folder.exists():
        names = (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(2))
        folder = next(name for name in names if not name.exists())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text("The next run of the demo replaces what this one wrote here.\n")
        clear(folder)
    except OSError as error:
        raise OutputError(f"--output: {folder} cannot be written: {error.strerror}.") from error
    return folder


def clear(folder: Path) -> None:
    """Remove what an earlier run wrote, and nothing a user may have added."""
    for path in (folder / name for name in CONTENT):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def judge(in_peft: tuple[float, float], here: tuple[float, float], losses: list[float]) -> int:
    """Print the result and return the exit code: 0 if the model learned the task, else 1.

    Args:
        in_peft: Exact match of base and adapter as transformers and PEFT answer.
        here: The same as the evaluation found it.
        losses: Of all steps.
    """
    before, after = here
    print(f"\n  exact match  {before:6.1%}  ->  {after:6.1%}")
    print(f"  loss         {losses[0]:6.3f}  ->  {losses[-1]:6.3f}\n")
    if here != in_peft:
        print(
            f"  FAILED: in PEFT exact match is {in_peft[0]:.1%} before and {in_peft[1]:.1%} after."
        )
        return 1
    if before <= KNEW_NOTHING and after >= LEARNED:
        print("  It learned to reverse. PEFT runs what torchtune trained, and answers alike.")
        return 0
    print(
        f"  FAILED: expected exact match of at most {KNEW_NOTHING:.0%} before and at least "
        f"{LEARNED:.0%} after."
    )
    return 1


def heading(number: int, text: str) -> None:
    """Announce a step."""
    print(f"\n[{number}/5] {text}", flush=True)


def prepare_process() -> None:
    """Hide what the libraries say about themselves, and share the machine; training inherits it."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # all files are local, so nothing may wait for a network
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # Matrices this small gain little from threads, which on a busy machine wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
