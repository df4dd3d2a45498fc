"""What a run of `phi3_plugin.recipes.lora_finetune` would take, before anything is loaded.

    tune run phi3_lora_finetune --config phi3_mini_lora_1gpu plan=true ...
    tune run phi3_lora_finetune --config phi3_mini_lora_8gpu plan=8 ...

Only config.json is read: the model is built on the meta device, and its weights have no memory.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from textwrap import wrap
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from phi3_plugin.recipes.lora_finetune_verdict import memory_free

from phi3_plugin.errors import ConfigError
from phi3_plugin.train import settings as strict
from phi3_plugin.train.device import pick_device
from phi3_plugin.train.estimate import Estimate, Work, estimate, fewest
from phi3_plugin.train.feed import build
from phi3_plugin.train.memory import bytes_of, give_memory_back, in_gib
from phi3_plugin.train.prepare import DTYPES, prepare
from phi3_plugin.train.settings import Settings
from phi3_plugin.train.world import World

SECONDS = 1.0
"""For which matrix products are measured."""


def memory_choices(s: Settings, world: World) -> dict[str, Any]:
    """Return how a model is prepared for the memory there is, and say what a budget chose.

    Args:
        s: Of the run.
        world: Its processes.

    Raises:
        ConfigError: ``memory_budget`` is too little with all layers recomputed.
    """
    give_memory_back()
    every, offload = int(s.enable_activation_checkpointing), s.enable_activation_offloading
    choices = {"recompute_every": every, "recompute_first": 0, "offload": offload}
    budget = bytes_of(s.memory_budget)
    if budget is None:
        return choices
    model = _on_meta(s)
    chosen = fewest(_estimates(model, s, world.device, world.shards), len(model.layers), budget)
    if world.is_main:
        print(
            f"memory_budget: {chosen.recomputed} of {len(model.layers)} layers recompute; "
            f"predicted peak {in_gib(chosen.total)} of {in_gib(budget)} GiB"
        )
    return choices | {"recompute_first": chosen.recomputed}


def plan(cfg: DictConfig) -> None:
    """Print what a run would take; with several processes the first one does.

    Args:
        cfg: As for the recipe.

    Raises:
        ConfigError: Something is wrong; all problems, one line each.
    """
    s = strict.read(cfg)
    if int(os.environ.get("RANK", 0)) == 0:
        devices = int(os.environ.get("WORLD_SIZE", 1)) if s.plan is True else s.plan
        print("\n".join(_lines(s, devices, pick_device(s.device, 0))))


def _lines(s: Settings, devices: int, device: torch.device) -> list[str]:
    model, shards = _on_meta(s), _shards(devices, s.fsdp_replicas)
    layers, at = len(model.layers), _estimates(model, s, device, shards)
    budget, free = bytes_of(s.memory_budget), _free(device, devices)
    try:
        found = at(0) if budget is None else fewest(at, layers, budget)
    except ConfigError:
        found = at(layers)  # the table shows what is missing
    every = int(s.enable_activation_checkpointing)
    again = -(-layers // every) if every else found.recomputed
    limit, name = (free, "free now") if budget is None else (budget, "memory_budget")
    return [
        "Planned only: nothing is loaded, nothing is written.",
        "",
        *_what(model, s, devices, device, shards),
        f"recompute  {again or 'none'} of {layers} layers",
        "",
        *_table(found, limit, name),
        *_advice(found, at, layers, limit),
        "",
        *_time(model, s, devices, device, found),
    ]


def _what(model: Any, s: Settings, devices: int, device: torch.device, shards: int) -> list[str]:
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    every, trained = sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
    share = f"{shards} share a copy of the model" if shards > 1 else "each with the whole model"
    longest, repeats = _longest(model, s), s.gradient_accumulation_steps
    return [
        f"model      {every / 1e9:.3g} B parameters in {s.dtype}, {trained / 1e6:.3g} M trained",
        f"devices    {devices} ({device.type})" + (f", {share}" if devices > 1 else ""),
        f"step       {s.batch_size} x {longest} tokens at once at most, {repeats} times a device",
    ]


def _table(found: Estimate, limit: int | None, name: str) -> list[str]:
    rows = [(part, in_gib(size)) for part, size in found.parts.items() if size]
    lines = [f"  {part:<18}{size:>8}" for part, size in [("memory of a device", "GiB"), *rows]]
    lines += ["  " + "-" * 26, f"  {'total':<18}{in_gib(found.total):>8}"]
    if limit is None:
        return lines
    verdict = "it fits" if found.total <= limit else "IT DOES NOT FIT"
    return [*lines, f"  {name:<18}{in_gib(limit):>8}   {verdict}"]


def _advice(
    found: Estimate, at: Callable[[int], Estimate], layers: int, limit: int | None
) -> list[str]:
    if limit is None or found.total <= limit:
        return []
    try:
        enough = fewest(at, layers, limit)
    except ConfigError as error:
        words = str(error).removeprefix("memory_budget: ")  # which may be what is free
        return ["", *wrap(words, 96, initial_indent="  ", subsequent_indent="  ")]
    more = f"  With {enough.recomputed} layers recomputed it would: add "
    budget = f"memory_budget={limit >> 20}MiB enable_activation_checkpointing=False"
    return ["", more + budget]


def _time(
    model: Any, s: Settings, devices: int, device: torch.device, found: Estimate
) -> list[str]:
    rate = _rate(model, device, DTYPES[s.dtype], s.batch_size * _longest(model, s))
    flops = found.flops * s.gradient_accumulation_steps
    tokens = s.batch_size * _longest(model, s) * s.gradient_accumulation_steps * devices
    seconds = flops / rate
    return [
        f"time       {_duration(seconds)} a step, {_duration(seconds / tokens * 1e6)} a million "
        "tokens at the least",
        f"           {flops / 1e12:.3g} TFLOP a device and step, at the {rate / 1e12:.3g} TFLOP/s "
        "that its matrix products reach now;",
        "           the rest of a step and the traffic between devices come on top",
    ]


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"


def _on_meta(s: Settings) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[s.dtype])
    try:
        with torch.device("meta"):
            model = build(s.model)
    finally:
        torch.set_default_dtype(before)
    every = int(s.enable_activation_checkpointing)
    how: Any = {"adapter_dtype": s.adapter_dtype, "recompute_every": every, "compiled": False}
    return prepare(model, **how).train()


def _estimates(
    model: Any, s: Settings, device: torch.device, shards: int
) -> Callable[[int], Estimate]:
    longest = _longest(model, s)
    work = Work(
        (longest,) * s.batch_size,
        (longest - 1) * s.batch_size,  # at the most: every answer is as long as that
        shards,
        reshard=s.fsdp_reshard_after_forward,
        cpu_weights=s.fsdp_cpu_offload,
        cpu_activations=s.enable_activation_offloading,
        joined=device.type == "cuda",
    )
    return lambda count: estimate(model, work, partial(build, s.optimizer), count)


def _longest(model: Any, s: Settings) -> int:
    return int(s.tokenizer.get("max_seq_len") or model.max_seq_len)


def _shards(devices: int, replicas: int) -> int:
    shards, left = divmod(devices, replicas)
    if left or not shards:
        raise ConfigError(
            f"fsdp_replicas: {replicas} copies cannot be shared out evenly over {devices} "
            "devices. Use a divisor of their number."
        )
    return shards


def _free(device: torch.device, processes: int) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = memory_free()
    return None if free is None else free // processes  # the CPU's memory is shared


def _rate(model: Any, device: torch.device, dtype: torch.dtype, tokens: int) -> float:
    """Return the FLOP a second of products of the layers' shapes, measured now."""
    shapes = {tuple(p.shape) for p in model.layers[0].parameters() if p.ndim == 2}
    shapes = {shape for shape in shapes if min(shape) >= max(map(min, shapes)) // 2}
    new, rows = partial(torch.rand, dtype=dtype, device=device), min(tokens, 4096)
    weights = [new(shape) for shape in shapes]
    inputs = [new(rows, weight.shape[1]) for weight in weights]
    flops, seconds = 0, 0.0
    for x, w in zip(inputs, weights, strict=True):
        count, spent = _repeated(partial(F.linear, x, w), device, SECONDS / len(weights))
        flops, seconds = flops + 2 * count * x.shape[0] * w.numel(), seconds + spent
    return flops / seconds


def _repeated(call: Callable[[], Any], device: torch.device, limit: float) -> tuple[int, float]:
    call()  # the first one sets up
    _wait(device)
    count, begin = 0, time.perf_counter()
    while not count or time.perf_counter() - begin < limit:
        call()
        count += 1
        _wait(device)
    return count, time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
