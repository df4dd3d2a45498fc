"""What a training step keeps in memory, found by running it where tensors have no memory.

On the meta device every operation of the model is called as in training and tells the sizes of
its results, so nothing here has to know which layers there are and what they keep. One run of a
model of 32 layers takes a second or two.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from phi3_plugin.train.prepare import recompute

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
            summed = model(**batch)
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
