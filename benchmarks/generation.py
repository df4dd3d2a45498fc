"""How fast answers come, beside transformers' ``generate`` and PEFT, in one process, interleaved.

    python benchmarks/generation.py [--preset full] [--layers 4] [--device cpu] [--only prefill]

Random weights of Phi-3-mini's width, which is what the speed depends on, or of another preset's of
training_cases.py. Each row is a question of its own; a round asks every contestant once, and the
median over rounds counts. Prints tokens a second and ratios; asserts nothing.

Needs the packages of the `hf` extra and 2 GB a contestant.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from environments import setting
from safetensors.torch import save_file
from torch import Tensor
from training_cases import PRESETS, sized
from training_limit import machine

from phi3_plugin.checkpoint.base import expected_shapes
from phi3_plugin.config import parse_config
from phi3_plugin.generate import Generator
from phi3_plugin.load import load_model
from phi3_plugin.models.cache import serve
from phi3_plugin.options import Sampling

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RANK, ALPHA, STD = 16, 32, 0.02
TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
HAZARD = 64
"""Of so many tokens one ends an answer, where answers end by themselves."""

Tokens = list[list[int]]


class Question(NamedTuple):
    """What is asked of every contestant."""

    name: str
    prompts: Tokens
    new: int
    """Tokens of each answer, at most."""
    adapted: bool = False
    ends: bool = False
    """Whether answers end by themselves; they are drawn then."""


class NoText:
    """The part of a tokenizer that an answer needs; here nobody reads it."""

    special_tokens: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, stops: Sequence[int]) -> None:
        self.stop_tokens = list(stops)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return no text."""
        return ""


def stops(question: Question) -> list[int]:
    """Return the tokens that end an answer."""
    return list(range(0, 32000, HAZARD)) if question.ends else []


def ours(model: Any, question: Question, batch: int) -> int:
    """Answer, and return how many tokens that gave."""
    sampling = Sampling(max_new_tokens=question.new, temperature=1.0 if question.ends else 0.0)
    generator = Generator(model, NoText(stops(question)), sampling, batch_size=batch)
    return sum(len(answer.tokens) for answer in generator.answers(question.prompts))


@torch.inference_mode()
def theirs(model: Any, question: Question, batch: int) -> int:
    """Answer in batches padded on the left, and return how many tokens that gave."""
    ends, count = stops(question), 0
    drawn = {"do_sample": True, "top_k": 0} if question.ends else {"do_sample": False}
    how = {**drawn, "eos_token_id": ends or None, "pad_token_id": 0}
    for first in range(0, len(question.prompts), batch):
        prompts = question.prompts[first : first + batch]
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        given = {"attention_mask": mask.to(model.device), "max_new_tokens": question.new}
        out = model.generate(tokens.to(model.device), **given, **how)[:, longest:].tolist()
        count += sum(useful(row, ends) for row in out)
    return count


def useful(row: list[int], ends: Sequence[int]) -> int:
    """Return the tokens of an answer up to the one that ends it."""
    found = [i for i, token in enumerate(row) if ends and token % HAZARD == 0]
    return found[0] + 1 if found else len(row)


def questions(new: int) -> Iterator[Question]:
    """Yield what is measured, with so many tokens an answer."""
    random = torch.Generator().manual_seed(0)

    def prompts(*lengths: int) -> Tokens:
        return [torch.randint(1, 32000, (n,), generator=random).tolist() for n in lengths]

    mixed = [40, 200, 75, 130, 310, 60, 95, 160]
    yield Question("prefill, 1,024 tokens", prompts(1024), 1)
    yield Question("prefill, 8 of 40 to 310", prompts(*mixed), 1)
    yield Question("decode after 64", prompts(64), new)
    yield Question("decode after 1,024", prompts(1024), new)
    yield Question("batch of 8 after 16", prompts(*[16] * 8), new)
    yield Question("batch of 8 after 128", prompts(*[128] * 8), new)
    yield Question("batch of 8, mixed lengths", prompts(*mixed), new)
    yield Question("32 prompts, answers that end", prompts(*mixed * 4), 256, ends=True)
    yield Question("decode after 64, adapter", prompts(64), new, adapted=True)
    yield Question("batch of 8 after 16, adapter", prompts(*[16] * 8), new, adapted=True)


def write_base(folder: Path, keys: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Write a checkpoint with random weights, drawn on a device: a GPU takes no time for it."""
    (folder / "config.json").write_text(json.dumps(keys))
    torch.manual_seed(0)
    shapes = expected_shapes(parse_config(keys))
    values = {name: random(shape, dtype, device).cpu() for name, shape in shapes.items()}
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def random(shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    """Return weights of the size that a model has."""
    if len(shape) == 1:
        return torch.ones(*shape, dtype=dtype)
    return (STD * torch.randn(*shape, device=device)).to(dtype)


def write_adapter(base: Path, folder: Path, dtype: torch.dtype, device: str) -> Any:
    """Write an adapter with random weights, and return transformers' model and PEFT's."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    given = AutoModelForCausalLM.from_pretrained
    plain, other = (given(base, dtype=dtype).to(device).eval() for _ in range(2))
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(other, config).eval()
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=STD)
    adapted.save_pretrained(folder)
    return plain, adapted


def race(asked: list[Question], models: dict[str, Any], args: argparse.Namespace) -> None:
    """Ask, and print a row for each question."""
    print(f"| question | {' | '.join(['transformers', 'ours', 'ratio'])} |\n|---|---|---|---|")
    for question in asked:
        kind = " + adapter" if question.adapted else ""
        calls: dict[str, Callable[[], int]] = {
            "transformers": partial(theirs, models[f"theirs{kind}"], question, args.batch),
            "ours": partial(ours, models[f"ours{kind}"], question, args.batch),
        }
        speeds = measured(calls, question, args.rounds)
        ratio = statistics.median(b / a for a, b in zip(*speeds.values(), strict=True))
        cells = [f"{statistics.median(speed):,.1f}" for speed in speeds.values()]
        print(f"| {question.name} | {' | '.join(cells)} | {ratio:.2f} x |", flush=True)


def measured(
    calls: dict[str, Callable[[], int]], question: Question, rounds: int
) -> dict[str, list[float]]:
    """Return tokens a second of each round: those read where one answers with a single token."""
    read = sum(map(len, question.prompts)) if question.new == 1 else 0
    speeds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            count = call()
            if turn:  # the first one sets up
                speeds[name].append((read or count) / (time.perf_counter() - start))
    return speeds


def main() -> None:
    """Write a base, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="full", help="size of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--only", default="", help="part of a question's name; several by commas")
    args = parser.parse_args()
    only = args.only.split(",")
    asked = [q for q in questions(args.new) if any(part in q.name for part in only)]
    with tempfile.TemporaryDirectory() as name:
        base, adapter = Path(name) / "base", Path(name) / "adapter"
        base.mkdir()
        write_base(base, sized(args.preset, args.layers), DTYPES[args.dtype], args.device)
        plain, adapted = write_adapter(base, adapter, DTYPES[args.dtype], args.device)
        new = partial(load_model, base, dtype=args.dtype, device=args.device)
        pair = new(), new(adapter)
        serve(*pair)
        models = {"theirs": plain, "theirs + adapter": adapted}
        models |= dict(zip(("ours", "ours + adapter"), pair, strict=True))
        print(f"{setting('transformers', 'peft')}; {machine()}")
        print(f"{args.preset}, {args.layers} layers, {args.dtype}\n", flush=True)
        race(asked, models, args)
        quantized = new(quantize=True)
        serve(quantized)
        for question in (q for q in asked if not q.adapted and q.new == args.new):
            speeds = measured({"NF4": partial(ours, quantized, question, args.batch)}, question, 2)
            print(f"| {question.name}, NF4 | | {statistics.median(speeds['NF4']):,.1f} | |")


if __name__ == "__main__":
    main()
