"""Every figure of one big GPU in ten minutes, as a Markdown file that grows part by part.

    pip install -r benchmarks/requirements-gpu.txt
    python -m benchmarks.gpu TOKENIZER ROWS.jsonl [--out gpu.md] [--seconds 570] [--part TITLE]...

In the root of a clone with the packages of the `hf` and `dev` extras. TOKENIZER is a folder with
the tokenizer files of Phi-3, ROWS.jsonl chat data such as GSM8K's rows of question and answer.
Nothing else is read: weights are random, of Phi-3-mini's full size, and made on the GPU.

Each part is another script of this folder, or the tests that need a GPU, in a process of its own
with so many seconds; at its limit it is killed, with what it started. What a part printed is in the
file before the next one begins, so a run that is cut off leaves what it had. A part that fails ends
no other; its last words are in the file, and the exit code is 1 in the end.

With --tiny the same parts run on the CPU at a tiny size: a test of the scripts, not of the speed.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.environments import setting

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent
PACKAGES = "torchao", "triton", "transformers", "peft", "liger-kernel", "bitsandbytes"
DEVICE = """
import torch
gpu = torch.cuda.get_device_properties(0)
print(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
"""
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "4090": 165}
"""Dense TFLOP/s in bf16 with sums in fp32, by a part of the name. Source: NVIDIA's data sheets."""
MFU = "MFU counts 4 FLOP a parameter and useful token, 6 where layers are recomputed."
LAST_WORDS = 2000
"""Characters of the errors of a part that failed."""


class Part(NamedTuple):
    """A script with its arguments."""

    title: str
    seconds: float
    """After which it is killed."""
    command: list[str]


def main() -> None:
    """Look for the GPU, run part after part."""
    args = arguments().parse_args()
    if missing := [p for p in (args.tokenizer, args.rows, args.out.parent) if not p.exists()]:
        raise SystemExit(f"There is no {missing[0]}. Give TOKENIZER, a folder, and ROWS, a file.")
    device = "the CPU, at a tiny size" if args.tiny else gpu()
    chosen = parts(args, device)
    if unknown := set(args.part or ()) - {part.title for part in chosen}:
        known = ", ".join(repr(part.title) for part in chosen)
        raise SystemExit(f"--part: there is no {sorted(unknown)}. There are {known}.")
    chosen = [part for part in chosen if not args.part or part.title in args.part]
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    args.out.write_text(f"# {device}\n\n{setting(*PACKAGES)}\n\n{MFU}\n", "utf-8")
    if failed := conduct(chosen, args.out, args.seconds):
        raise SystemExit(f"{args.out}: {len(failed)} of {len(chosen)} parts failed: {failed}")


def arguments() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="the file; replaced")
    parser.add_argument("--seconds", type=float, default=570, help="of all parts")
    parser.add_argument("--part", action="append", metavar="TITLE", help="only this one")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, to test the scripts")
    return parser


def gpu() -> str:
    """Name the GPU that torch sees.

    Raises:
        SystemExit: There is none.
    """
    look = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True)
    if look.returncode:
        reason = look.stderr.strip().splitlines()[-1]
        raise SystemExit(f"torch sees no CUDA device: {reason}. --tiny runs the parts on the CPU.")
    return look.stdout.strip()


def parts(args: argparse.Namespace, device: str) -> list[Part]:
    """Return all parts in their order: what matters most comes first."""
    tests = [str(file) for file in tests_of_gpus()]
    where = ["--device", "cpu" if args.tiny else "cuda"]
    sizes = ["--preset", "tiny", "--dtype", "fp32"] if args.tiny else ["--preset", "full"]
    rounds = ["--rounds", "1" if args.tiny else "6"]
    few = ["--rounds", "1" if args.tiny else "3"]  # an answer takes as long as several steps
    long = [] if args.tiny else ["--new", "128"]  # or the graph of our first token weighs too much
    layers = ["--layers", "2" if args.tiny else "32"]
    width = ["--width", "256", "--tokens", "256"]
    width = width if args.tiny else ["--width", "3072", "--tokens", "4096"]
    tokens = ["--tokens", "256" if args.tiny else "4096"]
    asked = "batch of 8 after 16" if args.tiny else "decode after 64,batch of 8 after 16,mixed"

    compiled, quantized, again = "--compile", "--quantize", "--recompute"

    def training(title: str, seconds: float, *more: str) -> Part:
        cases = ["ours", "PEFT, packed", "torchtune, packed"]
        if not {compiled, quantized} & {*more}:  # how much of that Liger's kernels would be
            cases.insert(1, "ours, Liger")
        how = [*sizes, *rounds, "--packed", tokens[1], "--no-footer", *peak(device), *more]
        how += [word for case in cases for word in ("--case", case)]
        return script(title, seconds, "training", str(args.tokenizer), str(args.rows), *how)

    def planned(case: str) -> Part:
        how = [*where, *width, *layers, "--case", case]
        return script(f"Memory, planned and measured: {case}", 40, "planned_memory", *how)

    return [
        Part("Tests", 90, [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *tests]),
        training("LoRA, recomputed", 60, again),
        training("LoRA", 50),
        training("LoRA, compiled, recomputed", 110, compiled, again),
        training("LoRA, compiled", 80, compiled),
        training("LoRA, compiled, recomputed, PEFT with Liger", 70, compiled, again, "--liger"),
        training("QLoRA, recomputed", 60, quantized, again),
        script("Answers", 110, "generation", *where, *sizes, *layers, *few, *long, "--only", asked),
        *map(planned, ["LoRA, all recomputed", "LoRA", "QLoRA, all recomputed"]),
        script("Attention", 60, "attention", *where, *tokens, *rounds),
    ]


def script(title: str, seconds: float, name: str, *arguments: str) -> Part:
    """Return a script of this folder as a part."""
    return Part(title, seconds, [sys.executable, str(FOLDER / f"{name}.py"), *arguments])


def tests_of_gpus() -> list[Path]:
    """Return the files with a test that needs a GPU: to collect all others takes a minute."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file for file in files if "mark.gpu" in file.read_text("utf-8")]


def peak(device: str) -> list[str]:
    """Return what MFU is measured by, if the device is known."""
    return next((["--peak", str(rate)] for name, rate in PEAKS.items() if name in device), [])


def conduct(parts: Sequence[Part], file: Path, seconds: float) -> list[str]:
    """Run one part after the other and add to the file what each printed.

    Args:
        parts: In their order.
        file: In Markdown.
        seconds: Of all; what is left of them limits a part too.

    Returns:
        The titles of those that failed, were killed, or did not begin.
    """
    ends, failed = time.monotonic() + seconds, []
    for part in parts:
        start = time.monotonic()
        limit = min(part.seconds, ends - start)
        text, problem = printed(part.command, limit) if limit > 0 else ("", "no time was left")
        took = f"{time.monotonic() - start:.0f} s of {part.seconds:.0f}"
        if problem:
            failed.append(part.title)
        with file.open("a", encoding="utf-8") as report:
            report.write(f"\n## {part.title} ({took})\n\n{text}{problem}\n")
        print(f"{part.title}: {took}{', failed' if problem else ''}", file=sys.stderr)
    return failed


def printed(command: list[str], seconds: float) -> tuple[str, str]:
    """Run a command, and return what it printed and what went wrong, both in Markdown.

    It is killed at its limit, and in any case what it leaves behind.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": errors}
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **streams)
        try:
            code = process.wait(seconds)
            problem = f"Ended with {code}." if code else ""
        except subprocess.TimeoutExpired:
            problem = f"Killed after {seconds:.0f} s."
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0), errors.seek(0)
        text, words = out.read(), errors.read()[-LAST_WORDS:]
    if problem:
        problem = f"\n**{problem}**\n\n{fenced(words)}"
    return (text if "\n|" in text else fenced(text)), problem


def fenced(text: str) -> str:
    """Return a text as it is for Markdown."""
    return f"```\n{text.strip()}\n```\n" if text.strip() else ""


if __name__ == "__main__":
    main()
