"""What a run would take, before anything is loaded."""

import ctypes
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import ceil
from textwrap import wrap
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from phi3_plugin import settings as strict
from phi3_plugin.checkpoint.check import memory_free
from phi3_plugin.errors import ConfigError
from phi3_plugin.settings import Settings
from phi3_plugin.train.feed import build
from phi3_plugin.train.losses import sft
from phi3_plugin.train.prepare import DTYPES, prepare, recompute
from phi3_plugin.train.world import World, pick_device

# What a training step keeps in memory, found by running it where tensors have no memory.
#
# On the meta device every operation of the model is called as in training and tells the sizes of
# its results, so nothing here has to know which layers there are and what they keep. One run of a
# model of 32 layers takes a second or two.

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# Shapes: T tokens of all documents, N labelled tokens
@dataclass(frozen=True)
class Footprint:
    """What one micro-batch takes beside weights, their gradients and the optimizer."""

    activations: int
    """Bytes that the forward pass keeps for the backward pass, when the loss begins."""
    loss: int
    """Bytes more, while the loss is worked out."""
    buffers: int
    """Bytes more: what the backward pass needs for a moment, and what is kept to be used again."""
    flops: int
    """Multiplications and additions of all matrix products, recomputed ones included."""

    @property
    def peak(self) -> int:
        """Bytes at the moment that needs the most."""
        return self.activations + self.loss + self.buffers


def footprint(
    model: nn.Module,
    lengths: Sequence[int],
    labelled: int,
    *,
    recomputed: int = 0,
    joined: bool = False,
) -> Footprint:
    """Return what forward and backward pass of one micro-batch take.

    Args:
        model: On the meta device, ready to be trained, in training mode.
        lengths: Tokens of each document, T in all.
        labelled: N.
        recomputed: Layers that recompute, the first ones, beside those that do anyway.
        joined: Attention takes all documents at once, as on a GPU.
    """
    live, begun = _Live(model), list[int]()
    batch = _batch((sum(lengths),) if joined else tuple(lengths), labelled)
    final: Any = model.norm
    with _changed(model, recomputed, joined) as undo:
        undo.callback(final.register_forward_hook(lambda *_: begun.append(live.bytes)).remove)
        with live:
            summed = sft(model(**batch), batch)
            highest = live.peak
            summed.backward()
            del summed
    kept, loss = live.bytes, highest - begun[0]  # nothing but what every step uses again is left
    buffers = kept + live.peak - highest
    return Footprint(begun[0] - kept, loss, buffers, live.flops)


def _batch(lengths: tuple[int, ...], labelled: int) -> dict[str, Any]:
    whole = partial(torch.empty, dtype=torch.int64, device="meta")
    row = {"tokens": whole(1, sum(lengths)), "input_pos": whole(1, sum(lengths))}
    return {**row, "targets": whole(labelled), "rows": whole(labelled), "lengths": lengths}


@contextmanager
def _changed(model: Any, recomputed: int, joined: bool) -> Iterator[ExitStack]:
    """Let a model recompute, attend and let its gradients go as it must here; then undo it."""
    layers, attention = list(model.layers), _Attention(joined)
    hooks = [p.register_post_accumulate_grad_hook(_drop) for p in _trained(model)]
    for layer in layers:  # not around everything: within a backward pass a mode is off
        hooks.append(layer.attn.register_forward_pre_hook(attention.begin))
        hooks.append(layer.attn.register_forward_hook(attention.end, always_call=True))
    with ExitStack() as undo:
        for hook in hooks:
            undo.callback(hook.remove)
        for layer in layers[:recomputed]:
            if "forward" in vars(layer):
                continue  # it recomputes anyway
            recompute(layer)
            undo.callback(delattr, layer, "forward")  # that of its class again
        for layer in layers if joined else ():
            undo.callback(setattr, layer.attn, "sliding_window", layer.attn.sliding_window)
            layer.attn.sliding_window = None  # the kernel needs no mask for it
        yield undo


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _drop(parameter: Tensor) -> None:
    parameter.grad = None  # counted apart, with those of other micro-batches


class _Attention(TorchFunctionMode):
    """Lets the kernel attend that a real device takes: on the meta device torch keeps scores."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined = joined

    def begin(self, *_: Any) -> None:
        """Act from here on; a hook."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self, *_: Any) -> None:
        """Act no more; a hook."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            causal, mask = kwargs.get("is_causal", False), kwargs.get("attn_mask")
            mask = None if mask is None else mask.to(args[0].dtype)  # as it is kept
            return FLASH(*args, 0.0, causal, attn_mask=mask)[0]
        if func is torch.cat and self.joined and len(args[0]) == 1:
            return args[0][0]  # a kernel for all documents writes one output
        return func(*args, **kwargs)


class _Live(TorchDispatchMode):
    """Adds up the memory of tensors that operations make, until each is let go."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = self.flops = 0
        parts = [part for t in (*model.parameters(), *model.buffers()) for part in parts_of(t)]
        self.known: dict[int, Any] = {part.untyped_storage()._cdata: None for part in parts}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for value in tree_leaves(out):
            if type(value) is Tensor:
                self._add(value.untyped_storage())
        self.flops += _flops(func.overloadpacket, args, out)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def gone(_: object) -> None:
            self.bytes -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def parts_of(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that hold the values of a tensor, as NF4 has several."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in parts_of(getattr(tensor, name))]
    return [tensor.detach()]


def _flops(operation: Any, args: Any, out: Any) -> int:
    if operation in (FLASH, FLASH_BACKWARD):
        q, k = args[:2] if operation is FLASH else args[1:3]
        products = 2 if operation is FLASH else 5
        causal = any(arg is True for arg in args)
        return int(2 * products * q.numel() * k.shape[2] // (2 if causal else 1))
    operation = torch.ops.aten.addmm if operation is torch.ops.aten.addmm_ else operation
    count = flop_registry.get(operation, lambda *_, **__: 0)
    return int(count(*args, out_val=out))


# How much memory a training step takes, part by part, before any weight is there.

LOW_BITS = {"8bit": 2 * (1 + 4 / 256), "fp8": 2 * (1 + 4 / 256), "4bit": 2 * (0.5 + 4 / 128)}
"""Bytes a value of both of Adam's states, scales included, by a word of the optimizer's name.

Source: torchao 0.18 ``optim/adam.py``; bitsandbytes 0.50 ``optim/optimizer.py``.
"""

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Work:
    """What one process does at a time."""

    lengths: tuple[int, ...]
    """Tokens of each document of a micro-batch."""
    labelled: int
    """How many of them are predicted."""
    shards: int = 1
    """Processes that share the model."""
    reshard: bool = True
    """Whether a layer's gathered weights are let go between forward and backward pass."""
    cpu_weights: bool = False
    """Whether the shares are in the CPU's memory."""
    cpu_activations: bool = False
    """Whether what recomputed layers keep is in the CPU's memory."""
    joined: bool = False
    """Whether attention takes all documents at once, as on a GPU."""


@dataclass(frozen=True)
class Estimate:
    """What one process takes at the moment that needs the most."""

    parts: dict[str, int]
    """Bytes, by what they are for."""
    recomputed: int
    """Layers that recompute, the first ones."""
    flops: int
    """Multiplications and additions of a micro-batch."""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def estimate(
    model: nn.Module, work: Work, make_optimizer: MakeOptimizer, recomputed: int = 0
) -> Estimate:
    """Return what training takes.

    Args:
        model: On the meta device, prepared, in training mode.
        work: Of one process.
        make_optimizer: Makes the optimizer of given parameters.
        recomputed: Layers that recompute, the first ones, beside those that the model recomputes.
    """
    how: Any = {"recomputed": recomputed, "joined": work.joined}
    found = footprint(model, work.lengths, work.labelled, **how)
    parts = {**weights(model, work, make_optimizer), **_activations(model, work, found)}
    return Estimate(parts, recomputed, found.flops)


def fewest(at: Callable[[int], Estimate], layers: int, budget: int) -> Estimate:
    """Return the estimate of the fewest layers that must recompute for a budget.

    The first ones do. The backward pass comes to them last, when what the others kept is gone,
    so that what a layer computes again fits where theirs was.

    Args:
        at: Estimates for a number of layers that recompute.
        layers: Of the model.
        budget: Bytes.

    Raises:
        ConfigError: All of them are not enough; what takes how much.
    """
    if (best := at(0)).total <= budget:
        return best
    if (best := at(layers)).total > budget:
        raise ConfigError(_too_much(best, layers, budget))
    low, high = 0, layers  # too few, enough
    while high - low > 1:
        middle = at((low + high) // 2)
        if middle.total <= budget:
            best, high = middle, middle.recomputed
        else:
            low = middle.recomputed
    return best


def _too_much(least: Estimate, layers: int, budget: int) -> str:
    parts = ", ".join(f"{name} {in_gib(size)}" for name, size in least.parts.items() if size)
    return (
        f"memory_budget: {in_gib(budget)} GiB is too little: with all {layers} layers recomputed "
        f"a step takes {in_gib(least.total)} GiB ({parts}). Lower batch_size or "
        "tokenizer.max_seq_len, quantize the base with "
        "model._component_=phi3_plugin.models.qlora_phi3, share it among more processes, or "
        "raise the budget."
    )


def weights(model: nn.Module, work: Work, make_optimizer: MakeOptimizer) -> dict[str, int]:
    """Return what is there in every step, in bytes: weights, gradients, optimizer.

    Args:
        model: On the meta device, prepared.
        work: Of one process.
        make_optimizer: Makes the optimizer of given parameters.
    """
    own, trained = partial(_share, work=work), [p for p in model.parameters() if p.requires_grad]
    per_value = {dtype: _state(make_optimizer, dtype) for dtype in {p.dtype for p in trained}}
    return {
        "base weights": own(size_of(p for p in model.parameters() if not p.requires_grad)),
        "trained weights": own(size_of(trained)),
        "gradients": own(size_of(trained)),
        "optimizer": own(ceil(sum(p.numel() * per_value[p.dtype] for p in trained))),
        "gathered layers": _gathered(model, work),
    }


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, with all that a quantized one consists of."""
    return sum(part.nbytes for tensor in tensors for part in parts_of(tensor))


def _share(size: int, work: Work) -> int:
    return 0 if work.cpu_weights else -(-size // work.shards)


def _gathered(model: Any, work: Work) -> int:
    """Two layers, since the next one travels meanwhile, and what belongs to no layer."""
    if work.shards == 1:
        return 0
    layers = [size_of(layer.parameters()) for layer in model.layers]
    others = size_of(model.parameters()) - sum(layers)
    return others + (2 * max(layers) if work.reshard else sum(layers))


def _state(make_optimizer: MakeOptimizer, dtype: torch.dtype) -> float:
    """Return the bytes of the optimizer's state for each value that is trained."""
    value = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    optimizer = make_optimizer([value])
    name = type(optimizer).__name__.lower()
    if low := [size for word, size in LOW_BITS.items() if word in name]:
        return low[0]  # their first step is compiled, or needs a GPU
    value.grad = torch.zeros_like(value)
    try:
        optimizer.step()
    except Exception:  # of somebody's optimizer, which may want more than a step
        return 2.0 * dtype.itemsize
    kept = [part for part in optimizer.state[value].values() if isinstance(part, Tensor)]
    return size_of(part for part in kept if part.numel() > 1) / value.numel()


def _activations(model: nn.Module, work: Work, found: Footprint) -> dict[str, int]:
    return {
        "activations": 0 if work.cpu_activations else found.activations,
        "loss": found.loss,
        "buffers": found.buffers + size_of(model.buffers()),
    }


# What a run of `phi3_plugin.recipes.lora_finetune` would take, before anything is loaded.
#
#     tune run phi3_lora_finetune --config phi3_mini_lora_1gpu plan=true ...
#     tune run phi3_lora_finetune --config phi3_mini_lora_8gpu plan=8 ...
#
# Only config.json is read: the model is built on the meta device, and its weights have no memory.


def in_gib(size: float) -> str:
    """Return bytes in GiB, as ``14.2``; small amounts keep a digit that says something."""
    gib = size / 2**30
    return f"{gib:.1f}" if gib >= 10 else f"{gib:.2f}" if gib >= 0.1 else f"{gib:.3f}"


def give_memory_back() -> None:
    """Let the memory of a tensor on the CPU go back to the system with the tensor.

    The C library keeps what blocks of up to 32 MiB took, in pieces that the next step's do not
    fit: a step of Phi-3-mini's width takes a sixth more memory, and is one hundredth faster.

    Source: glibc's ``mallopt(3)``, M_MMAP_THRESHOLD; other C libraries have no such choice.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)


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
    budget = s.memory_budget
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
    budget, free = s.memory_budget, _free(device, devices)
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
