"""Generation: keys and values of rows that are being generated, and layers laid out for few rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TiedLinear

from phi3_plugin.models.lora import (
    Adapter,
    DoRALinear,
    Linear,
    LoRALinear,
    MergedLoRALinear,
    row_norms,
)
from phi3_plugin.models.masks import BLOCK, Documents, attend_within, borders_of, causal_band
from phi3_plugin.models.nf4 import is_nf4, nf4_linear
from phi3_plugin.models.rope import RotaryEmbedding

# Keys and values of rows that are being generated, each row as long as it is.
#
# Rows are not padded. New prompts are read as documents side by side, and a row that ends makes room
# for another, whose length has nothing to do with its neighbours'. Where the model has a sliding
# window, a row is a ring of as many places: what falls out of the window is written over.

ROOM = 256
"""Places that a cache grows by, so that it does not grow with every token."""


# Shapes: N rows, T new tokens of all rows, H query heads, K key/value heads, F head dim, C places
class Cache:
    """What the tokens of each row have left behind in each layer."""

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        head_dim: int,
        *,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Start with empty rows; memory is taken as they grow.

        Args:
            layers: Of the model.
            rows: N.
            heads: K.
            head_dim: F.
            window: Keys a query sees, itself included; None sees all before it.
            dtype: Of keys and values.
            device: Of the model.
        """
        self.window, self.lengths = window, [0] * rows
        self.written = [0] * rows  # tokens of each row, those of a step that was given up included
        self.places = 0  # C, tokens of a row that there is memory for
        shape = rows, heads, 0, head_dim
        kept = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2 * layers)]
        self.keys, self.values = kept[:layers], kept[layers:]

    def place(self, position: int) -> int:
        """Return where in its row a token lies."""
        return position % self.window if self.window else position

    def held(self, length: int) -> int:
        """Return how many of a row's tokens are kept."""
        return min(length, self.window) if self.window else length

    def move(self, row: int, to: int) -> None:
        """Put what a row holds in another's place, and leave it empty."""
        held = self.held(self.lengths[row])
        for kept in (*self.keys, *self.values):
            kept[to, :, :held] = kept[row, :, :held]
        self.written[to] = self.written[row]
        self.lengths[to], self.lengths[row] = self.lengths[row], 0

    def keep(self, row: int, length: int) -> None:
        """Forget all but the first tokens of a row.

        All are forgotten where a ring has written over some that the next token sees.
        """
        length = min(length, self.lengths[row])
        is_whole = self.held(self.written[row]) == self.written[row]
        self.lengths[row] = length if is_whole or length + 1 >= self.written[row] else 0
        if is_whole or not self.lengths[row]:
            self.written[row] = self.lengths[row]

    def reserve(self, length: int) -> None:
        """Take memory for rows of this length."""
        needed = self.held(-(-length // ROOM) * ROOM)
        if needed <= self.places:
            return
        for tensors in (self.keys, self.values):
            for layer, kept in enumerate(tensors):  # each makes way for its larger copy
                tensors[layer] = F.pad(kept, (0, 0, 0, needed - kept.shape[2]))
        self.places = needed

    def past(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Return the kept keys and values of a row in their order, each ``[1, K, held, F]``."""
        length = self.lengths[row]
        held = self.held(length)
        places = slice(held)
        if length > held:
            places = torch.arange(length - held, length, device=self.keys[0].device) % held  # type: ignore[assignment]
        return self.keys[layer][row, None, :, places], self.values[layer][row, None, :, places]

    def write(self, layer: int, row: int, start: int, k: Tensor, v: Tensor) -> None:
        """Keep new tokens of a row.

        Args:
            layer: Number of the layer.
            row: Of the cache.
            start: Position of the first of them.
            k: ``[K, tokens, F]``; only the last that fit a ring are kept.
            v: As ``k``.
        """
        count = k.shape[1]
        first = start + count - self.held(count)
        at = torch.arange(first, start + count, device=k.device)
        at = at % self.window if self.window else at
        self.keys[layer][row].index_copy_(1, at, k[:, first - start :])
        self.values[layer][row].index_copy_(1, at, v[:, first - start :])


@dataclass
class Step:
    """New tokens of some rows, one row's after the other's, that go on from what is cached."""

    cache: Cache
    rows: Sequence[int]
    """Of the cache; one token for each of the first rows is the fast case."""
    lengths: Sequence[int]
    """New tokens of each."""
    rope: RotaryEmbedding
    layer: int = 0
    """The one that is being computed."""
    cos: Tensor = field(init=False)
    """By which the heads turn, ``[1, T, 1, R / 2]``."""
    sin: Tensor = field(init=False)

    def __post_init__(self) -> None:
        cache, device, dtype = self.cache, self.cache.keys[0].device, self.cache.keys[0].dtype
        self.starts = [cache.lengths[row] for row in self.rows]
        ends = [start + n for start, n in zip(self.starts, self.lengths, strict=True)]
        cache.reserve(max(ends))
        for row, end in zip(self.rows, ends, strict=True):
            cache.written[row] = max(cache.written[row], end)
        spans = zip(self.starts, ends, strict=True)
        positions = torch.cat([torch.arange(*span) for span in spans]).to(device)
        self.cos, self.sin = self.rope.turns_of(positions, ends, self.lengths, dtype)
        self.single = max(self.lengths) == 1 and list(self.rows) == [*range(len(self.rows))]
        if self.single:
            self._look_ahead(ends, device)

    def _look_ahead(self, ends: Sequence[int], device: torch.device) -> None:
        """Work out once what every layer needs: where tokens go, and what each row sees."""
        self.at = torch.tensor([self.cache.place(start) for start in self.starts], device=device)
        self.numbers = torch.arange(len(ends), device=device)
        held = [self.cache.held(end) for end in ends]
        self.longest, self.seen = max(held), None
        if min(held) < self.longest:
            seen = torch.arange(self.longest) < torch.tensor(held)[:, None]
            self.seen = seen[:, None, None].to(device)

    def done(self) -> None:
        """Note that all layers have seen the tokens."""
        for row, start, count in zip(self.rows, self.starts, self.lengths, strict=True):
            self.cache.lengths[row] = start + count

    def last(self, device: torch.device) -> Tensor | None:
        """Return the number of each row's last token, or None where there are no others."""
        return None if self.single else (borders_of(tuple(self.lengths), device)[1:] - 1).long()

    def attend(self, qkv: Tensor, heads: list[int]) -> Tensor:
        """Attend to what each row has seen, and keep what is new.

        Args:
            qkv: Queries, keys and values, rotated, ``[1, T, H + 2 K, F]``.
            heads: H, K and K.

        Returns:
            ``[1, T, H F]``.
        """
        if self.single:
            return self._one_each(qkv, heads)
        out = self._together(qkv, heads) if not any(self.starts) else None
        found = []
        for part, row, start in zip(
            qkv.split(list(self.lengths), dim=1), self.rows, self.starts, strict=True
        ):
            q, k, v = part.transpose(1, 2).split(heads, dim=1)
            if out is None:
                found.append(self._onward(q, k, v, row))
            self.cache.write(self.layer, row, start, k[0], v[0])
        return torch.cat(found, dim=1) if out is None else out

    def _together(self, qkv: Tensor, heads: list[int]) -> Tensor:
        lengths = tuple(self.lengths)
        borders = borders_of(lengths, qkv.device)
        return attend_within(
            qkv, heads, Documents(lengths, borders, self.cos, self.sin), self.cache.window
        )

    def _one_each(self, qkv: Tensor, heads: list[int]) -> Tensor:
        q, k, v = qkv[0].split(heads, dim=1)
        keys, values = self.cache.keys[self.layer], self.cache.values[self.layer]
        keys[self.numbers, :, self.at], values[self.numbers, :, self.at] = k, v
        seen = slice(len(k)), slice(None), slice(self.longest)
        # Heads that share keys are rows of one question. Two rows take a CPU half as long as one
        # in bf16, so a single one is asked twice.
        q = q.unflatten(1, (k.shape[1], -1))
        twice = q.shape[2] == 1 and q.dtype == torch.bfloat16 and q.device.type == "cpu"
        asked = q.expand(-1, -1, 2, -1) if twice else q
        out = F.scaled_dot_product_attention(asked, keys[seen], values[seen], attn_mask=self.seen)
        return out[:, :, : q.shape[2]].flatten(1)[None]

    def _onward(self, q: Tensor, k: Tensor, v: Tensor, row: int) -> Tensor:
        """Attend from several new tokens of a row that has some already, a block at a time."""
        past = self.cache.past(self.layer, row)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True))
        count, total, gqa = q.shape[2], keys.shape[2], q.shape[1] != k.shape[1]
        before, window = total - count, self.cache.window or total
        found = []
        for first in range(0, count, BLOCK):
            last = min(first + BLOCK, count)
            mask = causal_band(last - first, before + last, before + first, window, q.device)
            kept = keys[:, :, : before + last], values[:, :, : before + last]
            part = q[:, :, first:last]
            out = F.scaled_dot_product_attention(part, *kept, attn_mask=mask, enable_gqa=gqa)
            found.append(out)
        return torch.cat(found, dim=2).transpose(1, 2).flatten(2)


# Linear layers of a model that only answers: laid out for few rows at a time.
#
# On a CPU a token costs as much time as reading every weight once takes, and that takes longest from
# plain rows. oneDNN's own layout of them gives the same products, bit for bit.


# Shapes: N tokens, I input, O output, R rank
class ServedLinear(nn.Module):
    """What a linear layer with or without adapters computes, without a way back.

    The adapters stay beside the weight: they are not merged.
    """

    def __init__(
        self, weight: Tensor, is_laid_out: bool, adapters: list[Adapter], stretch: Tensor | None
    ) -> None:
        """Take a weight and what is added to its products.

        Args:
            weight: ``[O, I]``, plain or NF4, or as :func:`laid_out` returns it.
            is_laid_out: Which of them.
            adapters: For rows of it that do not overlap.
            stretch: What each row is multiplied with in the end, ``[O]``.
        """
        super().__init__()
        self.weight, self.is_laid_out = weight, is_laid_out
        self.starts = [adapter.start for adapter in adapters]
        dtype = weight.dtype
        self.a = [adapter.a.detach().to(dtype) for adapter in adapters]
        self.b = [(adapter.b.detach() * adapter.scaling).to(dtype) for adapter in adapters]
        self.stretch = stretch

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., I]`` to ``[..., O]``."""
        flat = x.flatten(0, -2)
        out = self._base(flat)
        for start, a, b in zip(self.starts, self.a, self.b, strict=True):
            out[:, start : start + len(b)].addmm_(flat @ a.t(), b.t())
        if self.stretch is not None:
            out = (self.stretch * out).to(out.dtype)
        return out.view(*x.shape[:-1], -1)

    def _base(self, x: Tensor) -> Tensor:
        if not self.is_laid_out:
            return nf4_linear(x, self.weight) if is_nf4(self.weight) else F.linear(x, self.weight)
        plain: Any = x, self.weight, None, "none", [], ""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(*plain)
        return out


def laid_out(weight: Tensor) -> tuple[Tensor, bool]:
    """Return a weight as the CPU reads it fastest, and whether that is another layout."""
    weight = weight.detach()
    plain = weight.device.type == "cpu" and not is_nf4(weight) and not hasattr(weight, "placements")
    if not plain or not _has_layout(weight.dtype):
        return weight, False
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1), True


def _has_layout(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_reorder_linear_weight"
    ):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def serve(*models: nn.Module) -> None:
    """Make loaded models ready to answer, in place; they can be neither trained nor saved then.

    Args:
        *models: torchtune's decoders as this package builds them, with their weights. Those that
            share weights, such as a base and the same with an adapter, still share them then.
    """
    for path, name in dict.fromkeys(place for model in models for place in _places(model)):
        parents = [model.get_submodule(path) for model in models]
        found = [(parent, _linear(getattr(parent, name))) for parent in parents]
        layers = [(parent, layer) for parent, layer in found if layer is not None]
        laid = dict[int, tuple[Tensor, bool]]()  # by weight, while the layers hold it
        for _, layer in layers:
            if id(layer.weight) not in laid:
                laid[id(layer.weight)] = laid_out(layer.weight)
        for parent, layer in layers:
            setattr(parent, name, served(layer, laid[id(layer.weight)]))
    for model in models:
        model.eval().requires_grad_(False)


@torch.no_grad()
def served(layer: Any, laid: tuple[Tensor, bool] | None = None) -> ServedLinear:
    """Return what stands for a linear layer.

    Args:
        layer: With or without adapters, or a head that is tied to the embedding.
        laid: Its weight as :func:`laid_out` returns it.
    """
    weight, stretch, adapters = layer.weight, None, list[Adapter]()
    if isinstance(layer, MergedLoRALinear):
        adapters = layer.active()
    elif isinstance(layer, LoRALinear) and not layer.disabled:
        adapters = [layer.adapter()]
        if isinstance(layer, DoRALinear):
            factors = layer.lora_a.weight, layer.lora_b.weight
            stretch = layer.magnitude / row_norms(weight, *factors, layer.scaling)
    return ServedLinear(*(laid or laid_out(weight)), adapters, stretch)


def _places(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the paths of the modules that have a linear layer, and its name there."""
    for path, parent in model.named_modules():
        yield from ((path, name) for name, child in parent.named_children() if _linear(child))
    yield "", "output"  # which is no module where it is tied


def _linear(layer: Any) -> Any:
    """Return what is to be served of a layer; None where that is nothing, or is done."""
    if isinstance(layer, TiedLinear):
        return layer.tied_module
    return layer if isinstance(layer, Linear | LoRALinear) else None
