"""What a run would take, before anything is loaded: memory part by part, and time.

    tune run phi3_lora_finetune --config phi3_mini_lora_1gpu plan=true ...
    tune run phi3_lora_finetune --config phi3_mini_lora_8gpu plan=8 ...

Only config.json is read. The model is built on the meta device, where tensors have sizes and no
memory, and one forward and backward pass is run there: every operation is called as in training and
tells the size of its result, so nothing here has to know which layers there are and what they keep.
"""

import ctypes
import os
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torchtune.training import set_default_dtype

from phi3_plugin.errors import ConfigError
from phi3_plugin.models.attention import has_flash
from phi3_plugin.models.phi3 import PRECISIONS, phi3
from phi3_plugin.settings import (
    PREFERENCE_DATASETS,
    Settings,
    is_quantized,
    read,
    without_weights,
)
from phi3_plugin.train.data import instantiate, loss_of
from phi3_plugin.train.losses import SFT, Distill
from phi3_plugin.train.model import model_of, prepare
from phi3_plugin.train.world import World, pick_device

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
    """Multiplications and additions of a micro-batch, recomputed ones included."""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


# What a run asks for.


def print_plan(cfg: DictConfig) -> None:
    """Print what a run would take; with several processes the first one does.

    Args:
        cfg: As for the recipe.

    Raises:
        ConfigError: Something is wrong; all problems, one line each.
    """
    s = read(without_weights(cfg))
    if int(os.environ.get("RANK", 0)) == 0:
        devices = int(os.environ.get("WORLD_SIZE", 1)) if s.plan is True else s.plan
        print("\n".join(planned_lines(s, devices, pick_device(s.device, 0))))


def recomputed_for(s: Settings, world: World) -> int:
    """Return how many layers, the first ones, recompute for ``memory_budget``, and say so.

    Args:
        s: Of the run; without a budget none recompute for it.
        world: Its processes.

    Raises:
        ConfigError: The budget is too little with all layers recomputed.
    """
    if s.memory_budget is None:
        return 0
    layers = len(on_meta(s).layers)
    best = fewest(partial(estimated, s, world.device, world.shards), layers, s.memory_budget)
    if world.is_main:
        print(
            f"memory_budget: {best.recomputed} of {layers} layers recompute; "
            f"predicted peak {in_gib(best.total)} of {in_gib(s.memory_budget)} GiB"
        )
    return best.recomputed


def give_memory_back() -> None:
    """Let the memory of a tensor on the CPU go back to the system with the tensor.

    The C library keeps what blocks of up to 32 MiB took, in pieces that the next step's do not
    fit: a step of Phi-3-mini's width takes a sixth more memory, and is one hundredth faster.

    Source: glibc's ``mallopt(3)``, M_MMAP_THRESHOLD; other C libraries have no such choice.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)


def estimated(s: Settings, device: torch.device, shards: int, recomputed: int) -> Estimate:
    """Return what a run takes whose first layers recompute.

    Args:
        s: Of the run.
        device: Where it runs.
        shards: Processes that share the model.
        recomputed: Number of these layers.
    """
    model = on_meta(s, recomputed)
    longest = _longest(model, s)
    documents = _documents(s)
    work = Work(
        (longest,) * documents,
        (longest - 1) * documents,  # at the most: every answer is as long as that
        shards,
        reshard=s.fsdp_reshard_after_forward,
        cpu_weights=s.fsdp_cpu_offload,
        cpu_activations=s.enable_activation_offloading,
        joined=has_flash(device) and s.dtype != "fp32",
    )
    teacher = teacher_of(s, shards)
    return estimate(model, work, partial(instantiate, s.optimizer), recomputed, teacher)


class PlannedTeacher(NamedTuple):
    """Whom a loss learns from, without memory."""

    loss: Distill
    model: Any
    """None is the student's base."""
    weights: int
    """Bytes that are not the student's."""


def teacher_of(s: Settings, shards: int) -> PlannedTeacher | None:
    """Return the teacher of a run, if its loss learns from one.

    Args:
        s: Of the run.
        shards: Processes that share the model.
    """
    loss = loss_of(s)
    if not isinstance(loss, Distill):
        return None
    adapter = 0
    if s.teacher_adapter is not None:
        files = s.teacher_adapter.rglob("*.safetensors")
        adapter = sum(file.stat().st_size for file in files) or s.teacher_adapter.stat().st_size
    if s.teacher_dir is None and (adapter == 0 or shards == 1):
        return PlannedTeacher(loss, None, adapter)
    quantize = is_quantized(s.model) if s.teacher_dir is None else s.teacher_quantized
    with set_default_dtype(PRECISIONS[s.dtype]), torch.device("meta"):
        model = phi3(s.teacher_dir or s.checkpoint_dir, quantize_base=quantize)
    return PlannedTeacher(loss, model.eval(), adapter + size_of(model.parameters()))


def on_meta(s: Settings, recomputed: int = 0) -> Any:
    """Return the model of a run, prepared, without memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(PRECISIONS[s.dtype])
    try:
        with torch.device("meta"):
            # Which ids they have is in the tokenizer; so many rows take the same memory
            model = model_of(s, range(len(s.tokenizer.get("add_tokens") or ())))
    finally:
        torch.set_default_dtype(before)
    return prepare(
        model,
        adapter_dtype=s.adapter_dtype,
        recompute_every=int(s.enable_activation_checkpointing),
        recompute_first=recomputed,
    ).train()


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
        parts = ", ".join(f"{name} {in_gib(size)}" for name, size in best.parts.items() if size)
        raise ConfigError(
            f"memory_budget: {in_gib(budget)} GiB is too little: with all {layers} layers "
            f"recomputed a step takes {in_gib(best.total)} GiB ({parts}). Lower batch_size or "
            "tokenizer.max_seq_len, quantize the base with "
            "model._component_=phi3_plugin.models.qlora_phi3, share it among more processes, or "
            "raise the budget."
        )
    low, high = 0, layers  # too few, enough
    while high - low > 1:
        middle = at((low + high) // 2)
        if middle.total <= budget:
            best, high = middle, middle.recomputed
        else:
            low = middle.recomputed
    return best


# What a step takes, part by part.


def estimate(
    model: Any,
    work: Work,
    make_optimizer: MakeOptimizer,
    recomputed: int = 0,
    teacher: PlannedTeacher | None = None,
) -> Estimate:
    """Return what training takes.

    Args:
        model: On the meta device, prepared, in training mode; of no use afterwards.
        work: Of one process.
        make_optimizer: Makes the optimizer of given parameters.
        recomputed: How many of its first layers recompute.
        teacher: Whom the loss learns from.
    """
    parts = weights(model, work, make_optimizer)
    if teacher is not None:
        parts["teacher"] = 0 if work.cpu_weights else -(-teacher.weights // work.shards)
        if teacher.model is not None and work.shards > 1:
            parts["gathered layers"] += _gathered(teacher.model, reshard=work.reshard)
    activations, loss, buffers, flops = footprint(model, work, teacher)
    parts["activations"] = 0 if work.cpu_activations else activations
    parts["loss"] = loss
    parts["buffers"] = buffers + size_of(model.buffers())
    return Estimate(parts, recomputed, flops)


def weights(model: Any, work: Work, make_optimizer: MakeOptimizer) -> dict[str, int]:
    """Return what is there in every step, in bytes: weights, gradients, optimizer.

    Args:
        model: On the meta device, prepared.
        work: Of one process.
        make_optimizer: Makes the optimizer of given parameters.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    state = {dtype: state_per_value(make_optimizer, dtype) for dtype in {p.dtype for p in trained}}
    shared = {
        "base weights": size_of(p for p in model.parameters() if not p.requires_grad),
        "trained weights": size_of(trained),
        "gradients": size_of(trained),
        "optimizer": ceil(sum(p.numel() * state[p.dtype] for p in trained)),
    }
    # A process has its share of each
    parts = {
        name: 0 if work.cpu_weights else -(-size // work.shards) for name, size in shared.items()
    }
    gathered = _gathered(model, reshard=work.reshard) if work.shards > 1 else 0
    return {**parts, "gathered layers": gathered}


def _gathered(model: Any, *, reshard: bool) -> int:
    layers = [size_of(layer.parameters()) for layer in model.layers]
    others = size_of(model.parameters()) - sum(layers)
    # Two layers, since the next one travels meanwhile, and what belongs to no layer
    return others + (2 * max(layers) if reshard else sum(layers))


LOW_BITS = {"8bit": 2 * (1 + 4 / 256), "fp8": 2 * (1 + 4 / 256), "4bit": 2 * (0.5 + 4 / 128)}
"""Bytes a value of both of Adam's states, scales included, by a word of the optimizer's name.

Source: torchao 0.18 ``optim/adam.py``; bitsandbytes 0.50 ``optim/optimizer.py``.
"""


def state_per_value(make_optimizer: MakeOptimizer, dtype: torch.dtype) -> float:
    """Return the bytes that an optimizer keeps for each value it trains, found by a step of it."""
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
    states = [part for part in optimizer.state[value].values() if isinstance(part, Tensor)]
    return size_of(part for part in states if part.numel() > 1) / value.numel()


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, with all that a quantized one consists of."""
    return sum(part.nbytes for tensor in tensors for part in plain_parts(tensor))


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that hold the values of a tensor, as NF4 has several."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in plain_parts(getattr(tensor, name))]
    return [tensor.detach()]


# What forward and backward pass take, found by running them where tensors have no memory.


# Shapes: T tokens of all documents, N labelled tokens
def footprint(
    model: Any, work: Work, teacher: PlannedTeacher | None = None
) -> tuple[int, int, int, int]:
    """Return what one micro-batch takes beside weights, their gradients and the optimizer.

    Args:
        model: On the meta device, ready to be trained, in training mode; of no use afterwards.
        work: Its documents.
        teacher: Whom the loss learns from.

    Returns:
        Bytes that the forward pass keeps for the backward pass, when the loss begins; bytes more,
        while the loss is worked out; bytes more, which the backward pass needs for a moment or
        which are kept to be used again; multiplications and additions of all matrix products.
    """
    models = [model, *([teacher.model] if teacher and teacher.model else [])]
    live, total = _Live(*models), sum(work.lengths)
    at_loss: list[int] = []
    model.norm.register_forward_hook(lambda *_: at_loss.append(live.bytes))
    for parameter in model.parameters():
        if parameter.requires_grad:  # gradients are counted apart, with those of other batches
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    kernel = _Attention(work.joined)
    # Not around everything: within a backward pass a mode is off
    for layer in [layer for each in models for layer in each.layers]:
        layer.attn.register_forward_pre_hook(kernel.begin)
        layer.attn.register_forward_hook(kernel.end, always_call=True)
        if work.joined:
            layer.attn.sliding_window = None  # the kernel needs no mask for it
    whole = partial(torch.empty, dtype=torch.int64, device="meta")
    batch = {
        "tokens": whole(1, total),
        "input_pos": whole(1, total),
        "targets": whole(work.labelled),
        "rows": whole(work.labelled),
        "lengths": (total,) if work.joined else work.lengths,
    }
    with live:
        if teacher is None:
            loss = SFT()(model(**batch), batch)
        else:
            learn = teacher.loss
            ask = learn.taught_by_base if teacher.model is None else learn.taught_by
            loss = learn(model(**batch, teaching=ask(models[-1], batch)), batch)
        highest = live.peak
        loss.backward()
        del loss
    kept = live.bytes  # nothing but what every step uses again is left
    buffers = kept + live.peak - highest
    return at_loss[-1] - kept, highest - at_loss[-1], buffers, live.flops  # the base has one too


class _Live(TorchDispatchMode):
    """Adds up the memory of tensors that operations make, until each is let go."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = self.flops = 0
        tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
        parts = [part for t in tensors for part in plain_parts(t)]
        self.known: dict[int, Any] = {part.untyped_storage()._cdata: None for part in parts}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
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


FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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


def _flops(operation: Any, args: Any, out: Any) -> int:
    if operation in (FLASH, FLASH_BACKWARD):
        q, k = args[:2] if operation is FLASH else args[1:3]
        products = 2 if operation is FLASH else 5
        causal = any(arg is True for arg in args)
        return int(2 * products * q.numel() * k.shape[2] // (2 if causal else 1))
    operation = torch.ops.aten.addmm if operation is torch.ops.aten.addmm_ else operation
    count = flop_registry.get(operation, lambda *_, **__: 0)
    return int(count(*args, out_val=out))


# What `plan` prints.

MEASURED_SECONDS = 1.0
"""For which matrix products are measured."""


def planned_lines(s: Settings, devices: int, device: torch.device) -> list[str]:
    """Return what a run would take, in lines for a terminal.

    Args:
        s: Of the run.
        devices: It would have so many.
        device: One of them.

    Raises:
        ConfigError: The devices cannot hold so many copies of the model.
    """
    shards, left = divmod(devices, s.fsdp_replicas)
    if left or not shards:
        raise ConfigError(
            f"fsdp_replicas: {s.fsdp_replicas} copies cannot be shared out evenly over {devices} "
            "devices. Use a divisor of their number."
        )
    model = on_meta(s)
    layers, at = len(model.layers), partial(estimated, s, device, shards)
    limit, limit_name = s.memory_budget, "memory_budget"
    try:
        best = at(0) if limit is None else fewest(at, layers, limit)
    except ConfigError:
        best = at(layers)  # the table shows what is missing
    if limit is None:
        limit, limit_name = memory_free_on(device, devices), "free now"

    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(count for count, learns in sizes if learns)
    share = f"{shards} share a copy of the model" if shards > 1 else "each with the whole model"
    every = int(s.enable_activation_checkpointing)
    again = -(-layers // every) if every else best.recomputed
    longest, times, documents = _longest(model, s), s.gradient_accumulation_steps, _documents(s)
    lines = [
        "Planned only: nothing is loaded, nothing is written.",
        "",
        f"model      {sum(count for count, _ in sizes) / 1e9:.3g} B parameters in {s.dtype}, "
        f"{trained / 1e6:.3g} M trained",
        f"devices    {devices} ({device.type})" + (f", {share}" if devices > 1 else ""),
        f"step       {documents} x {longest} tokens at once at most, {times} times a device",
        f"recompute  {again or 'none'} of {layers} layers",
        "",
        f"  {'memory of a device':<18}{'GiB':>8}",
        *(f"  {part:<18}{in_gib(size):>8}" for part, size in best.parts.items() if size),
        "  " + "-" * 26,
        f"  {'total':<18}{in_gib(best.total):>8}",
    ]
    if limit is not None:
        fits = best.total <= limit
        verdict = "it fits" if fits else "IT DOES NOT FIT"
        lines.append(f"  {limit_name:<18}{in_gib(limit):>8}   {verdict}")
        lines += [] if fits else _advice(at, layers, limit)

    rate = _rate(model, device, PRECISIONS[s.dtype], documents * longest)
    flops = best.flops * times
    seconds, tokens = flops / rate, documents * longest * times * devices
    return [
        *lines,
        "",
        f"time       {_duration(seconds)} a step, {_duration(seconds / tokens * 1e6)} a million "
        "tokens at the least",
        f"           {flops / 1e12:.3g} TFLOP a device and step, at the {rate / 1e12:.3g} TFLOP/s "
        "that its matrix products reach now;",
        "           the rest of a step and the traffic between devices come on top",
    ]


def _advice(at: Callable[[int], Estimate], layers: int, limit: int) -> list[str]:
    """Say what would fit."""
    try:
        enough = fewest(at, layers, limit)
    except ConfigError as error:
        words = str(error).removeprefix("memory_budget: ")  # which may be what is free
        return ["", *wrap(words, 96, initial_indent="  ", subsequent_indent="  ")]
    return [
        "",
        f"  With {enough.recomputed} layers recomputed it would: add "
        f"memory_budget={limit >> 20}MiB enable_activation_checkpointing=False",
    ]


def _documents(s: Settings) -> int:
    """Return how many documents of that length a device sees at once: of a pair both answers."""
    return s.batch_size * (2 if s.dataset["_component_"] in PREFERENCE_DATASETS else 1)


def _longest(model: Any, s: Settings) -> int:
    return int(s.tokenizer.get("max_seq_len") or model.max_seq_len)


MEMINFO = Path("/proc/meminfo")


def memory_free() -> int | None:
    """Return how many bytes can be taken, where the system says so."""
    if not MEMINFO.is_file():
        return None
    for line in MEMINFO.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def memory_free_on(device: torch.device, processes: int) -> int | None:
    """Return the bytes that one of so many processes can take, where the system says so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = memory_free()
    return None if free is None else free // processes  # the CPU's memory is shared


def _rate(model: Any, device: torch.device, dtype: torch.dtype, tokens: int) -> float:
    """Return the FLOP a second of products of the layers' shapes, measured now."""
    shapes = {tuple(p.shape) for p in model.layers[0].parameters() if p.ndim == 2}
    shapes = {shape for shape in shapes if min(shape) >= max(map(min, shapes)) // 2}
    flops, seconds = 0, 0.0
    for shape in shapes:
        weight = torch.rand(shape, dtype=dtype, device=device)
        x = torch.rand(min(tokens, 4096), shape[1], dtype=dtype, device=device)
        F.linear(x, weight)  # the first one sets up
        begin, spent = time.perf_counter(), 0.0
        while spent < MEASURED_SECONDS / len(shapes):
            F.linear(x, weight)
            if device.type != "cpu":
                torch.accelerator.synchronize()
            flops += 2 * x.shape[0] * weight.numel()
            spent = time.perf_counter() - begin
        seconds += spent
    return flops / seconds


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"


def in_gib(size: float) -> str:
    """Return bytes in GiB, as ``14.2``; small amounts keep a digit that says something."""
    gib = size / 2**30
    return f"{gib:.1f}" if gib >= 10 else f"{gib:.2f}" if gib >= 0.1 else f"{gib:.3f}"
