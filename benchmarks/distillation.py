"""A step of distillation: its time and memory beside cross entropy, and beside torchtune's recipe.

    python benchmarks/distillation.py [--layers 2] [--rounds 3]

Student and teacher have Phi-3-mini's width and random weights, in fp32. The same documents are read
in turns: ours packs them into one row; torchtune's ``knowledge_distillation_single_device`` pads
them, and has the logits of both models whole, in eight pieces. Memory is the most that one step
allocates beyond what is there before it.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from environments import table
from torch.profiler import ProfilerActivity, profile
from torchtune.data import padded_collate_sft
from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss

from phi3_plugin.data.collate import IGNORED, concatenate
from phi3_plugin.models.lora import Linear
from phi3_plugin.models.lora_settings import TARGETS, LoRASettings
from phi3_plugin.models.phi3 import MINI, Phi3Decoder, adapted, decoder
from phi3_plugin.train.losses import SFT, Distill
from phi3_plugin.train.model import prepare
from phi3_plugin.train.step import train_step
from phi3_plugin.train.world import World

LENGTHS = (61, 214, 38, 120, 77, 29, 163, 92)
"""Tokens of the documents; the last half of each is labelled."""


def samples() -> list[dict[str, list[int]]]:
    """Return documents of random tokens."""
    found = []
    for length in LENGTHS:
        tokens = torch.randint(0, MINI.vocab_size, (length,)).tolist()
        labels = [IGNORED] * (length // 2) + tokens[length // 2 :]
        found.append({"tokens": tokens, "labels": labels})
    return found


def models(layers: int) -> tuple[Phi3Decoder, Phi3Decoder]:
    """Return a student with adapters, and a teacher."""
    config = replace(MINI, num_hidden_layers=layers)
    settings = LoRASettings(TARGETS, apply_lora_to_mlp=True, lora_rank=16, lora_alpha=32)
    student = prepare(adapted(config, settings)).train()
    teacher = decoder(config, lambda _, i, o: Linear(i, o)).eval().requires_grad_(False)
    with torch.no_grad():
        for model in (student, teacher):
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.02)
    return student, teacher


def of_torchtune(
    student: Phi3Decoder, teacher: Phi3Decoder, optimizer: torch.optim.Optimizer
) -> None:
    """Make a step as torchtune's recipe does, without what it logs."""
    batch = padded_collate_sft(samples(), padding_idx=0)
    tokens, labels = batch["tokens"], batch["labels"]
    for model in (student, teacher):
        model.set_num_output_chunks(8)
    logits = student(tokens)
    with torch.no_grad():
        taught = teacher(tokens)
    labels = torch.hstack((labels[..., 1:], labels.new_full((len(labels), 1), IGNORED)))
    distance = ForwardKLWithChunkedOutputLoss()(logits, taught, labels)
    loss = 0.5 * CEWithChunkedOutputLoss()(logits, labels) + 0.5 * distance
    del logits, taught
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for model in (student, teacher):
        model.set_num_output_chunks(0)


def peak_of(step: Callable[[], object]) -> int:
    """Return the most bytes that a step allocates beyond what is there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    student, teacher = models(options.layers)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    world, loss = World("cpu"), Distill()

    def ours(learn: SFT | Distill, ask: object = None) -> float:
        return train_step(
            world, student, optimizer, learn, [concatenate(samples())], None, teacher=ask
        ).loss

    steps = {
        "cross entropy": partial(ours, SFT()),
        "distill, the base": partial(ours, loss, partial(loss.taught_by_base, student)),
        "distill, another": partial(ours, loss, partial(loss.taught_by, teacher)),
        "torchtune": partial(of_torchtune, student, teacher, optimizer),
    }
    peaks = {name: peak_of(step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    tokens, least = sum(LENGTHS), peaks["cross entropy"]
    rows = [
        [
            name,
            f"{median(took):.2f}",
            f"{tokens / median(took):.1f}",
            f"{peaks[name] / 2**20:,.0f}",
            f"{(peaks[name] - least) / 2**20:+,.0f}",
        ]
        for name, took in seconds.items()
    ]
    head = ["step", "s", "useful tokens/s", "most allocated, MiB", "beside cross entropy"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
