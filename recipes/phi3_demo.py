"""Fine-tune a tiny Phi-3 from the command line and prove the adapter in transformers and PEFT.

    python -m phi3_plugin.recipes.phi3_demo [--output DIR] [--keep] [--processes N]

Five steps: build a checkpoint folder that knows nothing, train it with ``tune run``, load the
adapter as any user of PEFT would, ask both models questions that were not in the training file,
and evaluate both with ``tune run``. Needs no download and no GPU. Exits with 1 if it learned
nothing.
"""

import argparse
import itertools
import logging
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

from phi3_plugin.recipes import phi3_demo_task as task
from phi3_plugin.recipes.phi3_demo_checkpoint import build_checkpoint
from phi3_plugin.recipes.phi3_demo_commands import (
    CHECKPOINT,
    CONTENT,
    EVALUATION,
    HELDOUT,
    LOG,
    RESULT,
    TRAIN,
    evaluate,
    losses,
    train,
)

from phi3_plugin.checkpoint.check import hf_tokenizer, load_base_with_hf, load_with_peft
from phi3_plugin.errors import OutputError, Phi3Error

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
    build_checkpoint(folder / CHECKPOINT, words=task.words())
    for name, chats in zip((TRAIN, HELDOUT), task.make_chats(), strict=True):
        (folder / name).write_text(task.to_jsonl(chats), encoding="utf-8")
    heading(2, f"Fine-tune it with LoRA on {task.TRAIN_CHATS} chats")
    adapter = train(folder, processes)
    heading(3, "Load the adapter in transformers + PEFT")
    models = load_base_with_hf(folder / CHECKPOINT), load_with_peft(folder / CHECKPOINT, adapter)
    heading(4, f"Ask both {task.HELDOUT_CHATS} questions that were not in the training file")
    tokenizer = hf_tokenizer(folder / CHECKPOINT)
    questions, expected = task.read_questions(folder / HELDOUT)
    before, after = (task.ask(model, tokenizer, questions) for model in models)
    task.show_answers(questions, before, after)
    in_peft = task.score(before, expected), task.score(after, expected)
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
