"""The peak that the planner predicts for a training step, against the measured one.

    python benchmarks/planned_memory.py [--width 1024] [--layers 4] [--device cuda] [--case NAME]...

Random weights, Phi-3-mini's vocabulary, bf16, adapters in fp32 on all four layers, four documents.
Each case takes three steps in a process of its own. Measured is what the process had resident at
most (VmHWM), or allocated on the GPU, less what it had after a step of a tiny model, which loads
the libraries. Prints one row a case; asserts nothing. Linux only.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from environments import setting, table
from training_limit import machine

from phi3_plugin.data.collate import concatenate
from phi3_plugin.models.lora_settings import TARGETS, LoRASettings
from phi3_plugin.models.phi3 import MINI, adapted
from phi3_plugin.train.losses import SFT
from phi3_plugin.train.model import prepare
from phi3_plugin.train.plan import Work, estimate, give_memory_back
from phi3_plugin.train.step import train_step
from phi3_plugin.train.world import World

BASE = {
    "lora_attn_modules": list(TARGETS),
    "apply_lora_to_mlp": True,
    "lora_rank": 16,
    "lora_alpha": 32,
}
KINDS = {
    "LoRA": {},
    "LoRA, dropout": {"lora_dropout": 0.05},
    "DoRA": {"use_dora": True},
    "QLoRA": {"quantize_base": True},
}
SHARES = {"": 0.0, ", half recomputed": 0.5, ", all recomputed": 1.0}
CASES = {kind + words: (kind, share) for kind in KINDS for words, share in SHARES.items()}
DOCUMENTS = 4
MB = 1e6

adamw = partial(torch.optim.AdamW, fused=True)


def main() -> None:
    """Measure every case, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--labelled", type=float, default=0.66, help="share of them")
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--alone", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(both(args)))
        return
    rows = []
    for case in args.case or CASES:
        command = [sys.executable, *sys.argv, "--alone", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        predicted, measured = json.loads(done.stdout.splitlines()[-1])
        print(case, predicted, measured, file=sys.stderr)
        apart = f"{predicted / measured - 1:+.1%}"
        rows.append([case, f"{predicted / MB:.0f}", f"{measured / MB:.0f}", apart])
    print(f"{setting()}; {machine()}")
    print(f"width {args.width}, {args.layers} layers, {args.tokens} tokens\n")
    print(table(["case", "predicted, MB", "measured, MB", "apart"], rows))


def both(args: argparse.Namespace) -> tuple[int, int]:
    """Return the predicted and the measured peak of one case, in bytes."""
    kind, share = CASES[args.alone]
    config = sized(args.width, args.layers)
    length, again = args.tokens // DOCUMENTS, round(share * args.layers)
    labelled = round(length * args.labelled)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = built(config, kind, again)
    world = World(args.device)
    joined = world.device.type == "cuda"
    work = Work((length,) * DOCUMENTS, labelled * DOCUMENTS, joined=joined)
    predicted = estimate(model, work, adamw, again).total
    give_memory_back()
    steps(world, partial(built, replace(sized(256, 1), vocab_size=256), kind, 1), 64, 32)
    before = restart(args.device)
    steps(world, partial(built, config, kind, again), length, labelled)
    return predicted, highest(args.device) - before


def sized(width: int, layers: int) -> Any:
    """Return Phi-3-mini at another width."""
    head = 96 if width % 96 == 0 else 64
    return replace(
        MINI,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // head,
        num_key_value_heads=width // head,
        rope=replace(MINI.rope, rotary_dim=head),
    )


def built(config: Any, kind: str, recomputed: int) -> Any:
    """Return a model as the recipe prepares it, its weights zero."""
    model = adapted(config, LoRASettings(**{**BASE, **KINDS[kind]}))
    model = prepare(model, adapter_dtype="fp32", recompute_first=recomputed).train()
    for name, parameter in model.named_parameters():
        if name.endswith("magnitude"):
            torch.nn.init.ones_(parameter)
    return model


def steps(world: World, make: Callable[[], Any], length: int, labelled: int) -> None:
    """Build a model and train it three steps on random documents whose ends are labelled."""
    model = world.build(make, torch.bfloat16)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    vocabulary = model.tok_embeddings.num_embeddings
    for _ in range(3):
        tokens = torch.randint(0, vocabulary, (DOCUMENTS, length))
        labels = tokens.clone()
        labels[:, : length - labelled] = -100
        samples = [
            {"tokens": row.tolist(), "labels": targets.tolist()}
            for row, targets in zip(tokens, labels, strict=True)
        ]
        train_step(world, model, optimizer, SFT(), [concatenate(samples)], 1.0)


def restart(device: str) -> int:
    """Let the peak count from here, and return what is taken now, in bytes."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def highest(device: str) -> int:
    """Return the peak, in bytes."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def resident(kind: str) -> int:
    """Return what this process has resident, or had at most, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024


if __name__ == "__main__":
    main()
