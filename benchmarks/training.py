"""How fast LoRA trains, ours and what a user could pick instead; all in one process.

    python benchmarks/training.py TOKENIZER ROWS.jsonl [--preset mini2] [--rounds 5] [--recompute]

TOKENIZER is a folder with the tokenizer files of Phi-3, ROWS.jsonl chat data such as GSM8K's
rows of question and answer. The model has random weights, the same for all, and needs no file.

Each round trains every contestant for one step on the same samples, in an order that rotates,
and measures the matrix product in between. What is printed of a case: the median of its useful
tokens a second (padding does not count), that over the limit of training_limit.py, that over
the simple count of 4 FLOP x all parameters x useful tokens (6 with --recompute), the median of
its lead over PEFT and torchtune in the same round, and the loss and the seconds of its first step,
which is not timed otherwise. Losses of the first step are of equal weights, and must be equal to
2 %. A case that cannot be built or fails in training is named and left out; after the latter the
exit code is 1.

    ours                 the steps of our recipe
    ours, Liger          the same with Liger's norm and SwiGLU, on a GPU
    torchtune            torchtune's own model, its recipe's step, its configs' loss; padded right
    torchtune, packed    the same samples in one row, with torchtune's mask
    PEFT                 transformers + PEFT, sdpa, padded right
    PEFT, packed         the same samples in one row, told apart by their positions
    TRL                  SFTTrainer's step over the same, if TRL is there; padded right

Asserts nothing of the speed.
"""

import argparse
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from environments import setting, table
from training_cases import PRESETS, Case, Samples, Setup, Skipped, ours, ours_liger, torchtune
from training_footer import footer
from training_limit import Roofline, Work, least, machine, simple, skippable, synchronize, work_of
from training_peft import peft, trl

from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.data.packing import Packs

CASES: dict[str, Callable[[Setup], Case]] = {
    "ours": ours,
    "ours, Liger": ours_liger,
    "torchtune": torchtune,
    "torchtune, packed": partial(torchtune, packed=True),
    "PEFT": peft,
    "PEFT, packed": partial(peft, packed=True),
    "TRL": trl,
}
PEERS = "PEFT", "PEFT, packed", "torchtune", "torchtune, packed"
TOLERANCE = 0.02


class Step(NamedTuple):
    """What one step took."""

    seconds: float
    loss: float
    peak: int | None
    """Bytes of a GPU beyond what was allocated before: weights, adapters, optimizer states."""


def main() -> None:
    """Build everybody, train in turn, print the table."""
    args = arguments().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = phi3_tokenizer(args.tokenizer, max_seq_len=args.packed)
    names = "preset", "layers", "dtype", "adapter_dtype", "recompute", "quantize", "liger"
    where: dict[str, Any] = {"folder": args.tokenizer, "device": device, "pad": tokenizer.pad_id}
    where |= {name: getattr(args, name) for name in names}
    setup = Setup(**where, compiled=args.compile, size=args.packed)
    steps = batches(tokenizer, args)
    cases = built(args.case or list(CASES), setup)
    found, roofline = race(cases, steps, setup)
    report(args, setup, [work_of(samples) for samples in steps[1:]], roofline, found)
    if args.footer:
        footer(setup, cases)
    if failed := [name for name in cases if name not in found]:
        raise SystemExit(f"Failed: {failed}; see above.")


def built(names: list[str], setup: Setup) -> dict[str, Case]:
    """Return the cases that can run here, and say why others cannot."""
    cases = {}
    for name in names:
        try:
            cases[name] = CASES[name](setup)
        except Skipped as reason:
            print(f"Left out: {name}, since {reason}.\n")
        except Exception as error:  # of somebody else's code, on a machine that we do not know
            print(f"Failed: {name}, {told(error)}\n")
    return cases


def told(error: Exception) -> str:
    """Return what an error says first; the rest goes to the terminal."""
    traceback.print_exception(error, limit=-5)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def race(
    cases: dict[str, Case], steps: list[Samples], setup: Setup
) -> tuple[dict[str, list[Step]], Roofline]:
    """Train everybody on every step in turn."""
    timed_work = [work_of(samples) for samples in steps[1:]]
    mean = Work(*(sum(column) // len(timed_work) for column in zip(*timed_work, strict=True)))
    roofline = Roofline(setup.keys, setup.base, mean)
    found: dict[str, list[Step]] = {name: [] for name in cases}
    order = list(cases)
    for number, samples in enumerate(steps):
        roofline.measure()
        for name in order[number % len(order) :] + order[: number % len(order)]:
            if name not in found:
                continue
            try:
                found[name].append(one_step(cases[name], samples, setup.device))
            except Exception as error:  # such as too little memory, which others may not need
                print(f"Failed: {name}, {told(error)}\n")
                del found[name]
            else:
                print(number, name, found[name][-1], file=sys.stderr)
        if number == 0:
            check_equal({name: results[0].loss for name, results in found.items()})
    return found, roofline


def one_step(case: Case, samples: Samples, device: torch.device) -> Step:
    """Train once and measure it."""
    gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    synchronize(device)
    start = time.perf_counter()
    loss = case.step(samples)
    synchronize(device)
    seconds = time.perf_counter() - start
    return Step(seconds, loss, torch.cuda.max_memory_allocated() - before if gpu else None)


def check_equal(losses: dict[str, float]) -> None:
    """Refuse to compare what does not compute the same."""
    low, high = min(losses.values()), max(losses.values())
    if not high - low <= TOLERANCE * low:
        raise SystemExit(f"The losses of equal weights differ by more than 2 %: {losses}")


def arguments() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="mini2", help="size of the model")
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each that are timed")
    parser.add_argument("--samples", type=int, default=4, help="of a step")
    parser.add_argument("--packed", type=int, metavar="SIZE", help="a step is one pack instead")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one")
    parser.add_argument("--recompute", action="store_true", help="activations, in every layer")
    parser.add_argument("--quantize", action="store_true", help="the base is in NF4")
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="fp32 where bf16 has no instructions",
    )
    parser.add_argument("--adapter-dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--liger", action="store_true", help="PEFT computes with Liger's kernels")
    parser.add_argument(
        "--footer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="what starting and saving take, too",
    )
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, for a column of MFU")
    return parser


def batches(tokenizer: Any, args: argparse.Namespace) -> list[Samples]:
    """Return the samples of each step; the first is the one that is not timed."""
    steps = args.rounds + 1
    rows = steps * (args.packed // 64 if args.packed else args.samples)  # shorter ones are rare
    with tempfile.TemporaryDirectory() as cache:
        data = chat_dataset(tokenizer, str(args.rows), max_samples=rows, cache_dir=cache)
        if args.packed:
            packs = Packs(data, args.packed)
            chosen = [[d for d, *_ in packs.documents(n)] for n in range(len(packs))]
        else:
            numbers = range(0, len(data), args.samples)
            chosen = [list(range(len(data)))[n : n + args.samples] for n in numbers]
        if len(chosen) < steps:
            raise SystemExit(f"{args.rows}: {len(chosen)} steps of samples, {steps} are needed.")
        return [[data[i] for i in numbers] for numbers in chosen[:steps]]


def report(
    args: argparse.Namespace,
    setup: Setup,
    work: list[Work],
    roofline: Roofline,
    found: dict[str, list[Step]],
) -> None:
    """Print the table, and what it is to be read with."""
    total = Work(*(sum(column) for column in zip(*work, strict=True)))
    flop, plain, spare = (
        count(setup.keys, total, args.recompute) for count in (least, simple, skippable)
    )
    limits = [total.tokens * roofline.rate / count for count in (flop, plain)]
    peak = args.peak and args.peak * 1e12 / plain * total.tokens
    extras = [name for name in ("trl", "liger_kernel", "bitsandbytes") if find_spec(name)]
    print(setting("torchao", "transformers", "peft", *extras) + f"; {machine()}\n")
    print(" ".join(["python benchmarks/training.py", *sys.argv[1:]]) + "\n")
    rows = [cells(name, work, found, limits, peak) for name in found]
    print(table(["case", *rows[0]], [[n, *c.values()] for n, c in zip(found, rows, strict=True)]))
    print(
        f"\n{len(work)} steps of {total.tokens / len(work):.0f} tokens, of which "
        f"{total.labelled / total.tokens:.0%} have a label. Matrix products: "
        f"{roofline.rate / 1e9:,.0f} GFLOP/s; limit {limits[0]:,.1f} tokens/s, simple "
        f"{limits[1]:,.1f}. {spare / flop:.1%} of the limit's FLOP are the last block's on tokens "
        "without label, which a program may leave out."
    )


def cells(
    name: str,
    work: list[Work],
    found: dict[str, list[Step]],
    limits: list[float],
    peak: float | None,
) -> dict[str, str]:
    """Return what is said of a case, by column."""
    first, *steps = found[name]
    pairs = zip(work, steps, strict=True)
    speed = statistics.median(tokens / step.seconds for (tokens, _), step in pairs)
    shown = {"useful tokens/s": f"{speed:,.1f}"}
    shown |= {
        f"of {n}": f"{speed / limit:.2f}"
        for n, limit in zip(("limit", "simple"), limits, strict=True)
    }
    for other in [peer for peer in PEERS if peer in found]:
        both = zip(steps, found[other][1:], strict=True)
        lead = statistics.median(theirs.seconds / own.seconds for own, theirs in both)
        shown[f"x {other}"] = f"{lead:.2f}"
    shown |= {"loss": f"{first.loss:.4f}", "first step, s": f"{first.seconds:.1f}"}
    if first.peak is not None:
        shown["peak above the weights, MB"] = f"{max(s.peak or 0 for s in steps) / 1e6:,.0f}"
    return shown | ({"MFU": f"{speed / peak:.1%}"} if peak else {})


if __name__ == "__main__":
    main()
