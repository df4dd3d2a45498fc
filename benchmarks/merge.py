"""How much memory and time it takes to merge an adapter, beside copying the files.

    python benchmarks/merge.py FOLDER [--layers 32] [--rounds 2] [--rank 16] [--case NAME]...

FOLDER gets a random bf16 checkpoint of Phi-3-mini's width, 7.6 GB with all 32 layers, unless it
has one. Each case reads it and writes another beside it, which is then removed, in a process of
its own; the cases take turns. The adapter is on the four fused layers. Files for llama.cpp have the
demo's small tokenizer.

The peak is what the process had resident at most (VmHWM), less what it had after its imports.
Copying is `cp` and, as merging does, fsync. Prints one row a case; asserts nothing. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from environments import setting, table
from load_memory import MB, TARGETS, peak, random_checkpoint
from phi3_plugin.recipes.phi3_demo_checkpoint import build_checkpoint

OUT = "merged"


def main() -> None:
    """Make the folder, run every case in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--case", action="append", choices=CASES, help="only this one")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.rank)))
        return
    if not (options.folder / "config.json").exists():
        random_checkpoint(options.folder, options.layers)
        add_tokenizer(options.folder)
    names = dict.fromkeys(["copy", *(options.case or CASES)])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, results in found.items():
            results.append(in_own_process(name, options.folder, options.rank))
            print(name, results[-1], file=sys.stderr)
    size = sum(file.stat().st_size for file in options.folder.glob("*.safetensors"))
    print(f"{setting()}, {size / 1e9:.2f} GB\n")
    copied = min(result["seconds"] for result in found["copy"])
    rows = [row(name, results, copied) for name, results in found.items()]
    print(table(["case", "peak, MB", "seconds", "times copying"], rows))


def row(name: str, results: list[dict[str, float]], copied: float) -> list[str]:
    """Return the cells of a case: its highest peak and its quickest time."""
    seconds = min(result["seconds"] for result in results)
    highest = max(result["peak"] for result in results)
    return [name, f"{highest / MB:.0f}", f"{seconds:.1f}", f"{seconds / copied:.2f}"]


def in_own_process(name: str, folder: Path, rank: int) -> dict[str, float]:
    """Measure one case in a new process; what it writes is removed again."""
    command = [sys.executable, __file__, str(folder), "--measure", name, "--rank", str(rank)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    for written in folder.parent.glob(f"{OUT}*"):
        shutil.rmtree(written) if written.is_dir() else written.unlink()
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def add_tokenizer(folder: Path) -> None:
    """Put the demo's tokenizer into a folder."""
    with TemporaryDirectory() as place:
        build_checkpoint(Path(place), words=["one"])
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copyfile(Path(place) / name, folder / name)


def measure(name: str, folder: Path, rank: int) -> dict[str, float]:
    """Run a case here and return the peak in bytes and the seconds it took."""
    run = CASES[name](folder, rank)
    before, started = peak(), time.monotonic()
    run(folder.parent / OUT)
    return {"peak": peak() - before, "seconds": time.monotonic() - started}


# A case does its imports, makes its adapter and returns what writes a folder.


def copy(folder: Path, rank: int) -> Callable[[Path], None]:
    """What reading and writing the files takes."""

    def run(out: Path) -> None:
        subprocess.run(["cp", "-r", str(folder), str(out)], check=True)
        for file in out.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())

    return run


def merging(
    dora: bool = False, nf4: bool = False, gguf: str | None = None
) -> Callable[[Path, int], Callable]:
    """Merge an adapter of LoRA or DoRA, onto the original weights or those of NF4."""

    def prepare(folder: Path, rank: int) -> Callable[[Path], None]:
        from phi3_plugin.checkpoint.merge import merge_into

        adapter = random_adapter(folder, rank, dora)
        onto = "nf4" if nf4 else "original"

        def run(out: Path) -> None:
            file = out.with_suffix(".gguf") if gguf else out
            report = merge_into(file, folder, adapter, onto=onto, gguf=gguf)
            print(report.difference, file=sys.stderr)

        return run

    return prepare


def random_adapter(folder: Path, rank: int, dora: bool) -> object:
    """Return an adapter on the four fused layers."""
    from phi3_plugin.checkpoint.adapter import Adapter
    from phi3_plugin.checkpoint.base import open_weights

    torch.manual_seed(0)
    tensors = {}
    for name, weight in open_weights(folder).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in TARGETS:
            out, inner = weight.shape
            tensors[f"{module}.lora_a.weight"] = torch.randn(rank, inner) * 0.02
            tensors[f"{module}.lora_b.weight"] = torch.randn(out, rank) * 0.02
            if dora:
                tensors[f"{module}.magnitude"] = torch.rand(out) + 0.5
    return Adapter.of(tensors, 2.0)


CASES: dict[str, Callable[[Path, int], Callable]] = {
    "copy": copy,
    "LoRA": merging(),
    "DoRA": merging(dora=True),
    "LoRA onto NF4": merging(nf4=True),
    "LoRA to f16": merging(gguf="f16"),
    "LoRA to q8_0": merging(gguf="q8_0"),
    "LoRA to q4_0": merging(gguf="q4_0"),
}


if __name__ == "__main__":
    main()
