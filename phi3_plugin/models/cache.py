"""Generation: keys and values of rows that are being generated, and layers laid out for few rows.

Rows are not padded. New prompts are read as documents side by side, and a row that ends makes room
for another, whose length has nothing to do with its neighbours'. Where the model has a sliding
window, a row is a ring of as many places: what falls out of the window is written over.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TiedLinear

from phi3_plugin.device import sent
from phi3_plugin.models.attention import Documents, attend_causally, borders_of
from phi3_plugin.models.lora import (
    DoRALinear,
    Linear,
    LoRALinear,
    MergedLoRALinear,
    linear,
)
from phi3_plugin.models.nf4 import is_nf4
from phi3_plugin.models.rope import RotaryEmbedding

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
        self.window = window
        self.lengths = [0] * rows
        self.written = [0] * rows  # tokens of each row, those of a step that was given up included
        self.places = 0  # C, tokens of a row that there is memory for
        empty = torch.empty(rows, heads, 0, head_dim, dtype=dtype, device=device)
        self.keys = [empty] * layers  # each [N, K, C, F]
        self.values = [empty] * layers

    def held(self, length: int) -> int:
        """Return how many of a row's tokens are kept."""
        return min(length, self.window) if self.window else length

    def move(self, row: int, to: int) -> None:
        """Put what a row holds in another's place, and leave it empty."""
        held = self.held(self.lengths[row])
        for kept in (*self.keys, *self.values):
            kept[to, :, :held] = kept[row, :, :held]
        self.written[to] = self.written[row]
        self.lengths[to] = self.lengths[row]
        self.lengths[row] = 0

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
        keys, values, length = self.keys[layer], self.values[layer], self.lengths[row]
        held = self.held(length)
        places: slice | Tensor = slice(held)
        if length > held:
            places = torch.arange(length - held, length, device=keys.device) % held
        return keys[row, None, :, places], values[row, None, :, places]

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


class Step:
    """New tokens of some rows, one row's after the other's, that go on from what is cached."""

    def __init__(
        self, cache: Cache, rows: Sequence[int], lengths: Sequence[int], rope: RotaryEmbedding
    ) -> None:
        """Make room for the tokens, and work out what every layer needs to know of them.

        Args:
            cache: Of the rows.
            rows: Their numbers; one token for each of the first rows is the fast case.
            lengths: New tokens of each, T in all.
            rope: Of the model.
        """
        self.cache = cache
        self.rows = rows
        self.lengths = lengths
        self.layer = 0  # the one that is being computed
        self.starts = [cache.lengths[row] for row in rows]
        ends = [start + count for start, count in zip(self.starts, lengths, strict=True)]
        cache.reserve(max(ends))
        for row, end in zip(rows, ends, strict=True):
            cache.written[row] = max(cache.written[row], end)
        spans = zip(self.starts, ends, strict=True)
        device = cache.keys[0].device
        positions = sent(torch.cat([torch.arange(*span) for span in spans]), device)
        self.cos, self.sin = rope.turns_by_row(positions, ends, lengths, cache.keys[0].dtype)
        self.single = max(lengths) == 1 and list(rows) == [*range(len(rows))]
        if self.single:
            starts = sent(torch.tensor(self.starts), device)
            self.at = starts % cache.window if cache.window else starts
            self.numbers = torch.arange(len(rows), device=device)
            held = [cache.held(end) for end in ends]
            self.longest = max(held)
            self.seen: Tensor | None = None
            if min(held) < self.longest:
                seen = torch.arange(self.longest) < torch.tensor(held)[:, None]
                self.seen = sent(seen[:, None, None], device)

    def done(self) -> None:
        """Note that all layers have seen the tokens."""
        for row, start, count in zip(self.rows, self.starts, self.lengths, strict=True):
            self.cache.lengths[row] = start + count

    def last(self) -> Tensor | None:
        """Return the number of each row's last token, or None where there are no others."""
        if self.single:
            return None
        return (borders_of(tuple(self.lengths), self.cos.device)[1:] - 1).long()

    def attend(self, qkv: Tensor, heads: list[int], window: int | None) -> Tensor:
        """Attend to what each row has seen, and keep what is new; see `Attends.attend`."""
        if self.single:
            return self._one_each(qkv, heads)
        out = None
        if not any(self.starts):
            new = Documents(tuple(self.lengths), self.cos, self.sin)
            out = new.attend(qkv, heads, window)
        found = []
        for part, row, start in zip(
            qkv.split(list(self.lengths), dim=1), self.rows, self.starts, strict=True
        ):
            q, k, v = part.transpose(1, 2).split(heads, dim=1)
            if out is None:
                keys, values = self.cache.past(self.layer, row)
                both = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
                found.append(attend_causally(q, *both, window).transpose(1, 2).flatten(2))
            self.cache.write(self.layer, row, start, k[0], v[0])
        return torch.cat(found, dim=1) if out is None else out

    def _one_each(self, qkv: Tensor, heads: list[int]) -> Tensor:
        q, k, v = qkv[0].split(heads, dim=1)
        keys, values = self.cache.keys[self.layer], self.cache.values[self.layer]
        keys[self.numbers, :, self.at] = k
        values[self.numbers, :, self.at] = v
        seen = slice(len(k)), slice(None), slice(self.longest)
        # Heads that share keys are rows of one question. Two rows take a CPU half as long as one
        # in bf16, so a single one is asked twice.
        q = q.unflatten(1, (k.shape[1], -1))
        twice = q.shape[2] == 1 and q.dtype == torch.bfloat16 and q.device.type == "cpu"
        asked = q.expand(-1, -1, 2, -1) if twice else q
        out = F.scaled_dot_product_attention(asked, keys[seen], values[seen], attn_mask=self.seen)
        return out[:, :, : q.shape[2]].flatten(1)[None]


# Shapes: I input, O output
class ServedLinear(nn.Module):
    """What a linear layer with or without adapters computes, without a way back.

    On a CPU a token costs as much time as reading every weight once takes, and that takes longest
    from plain rows. oneDNN's own layout of them gives the same products, bit for bit. The adapters
    stay beside the weight: they are not merged.
    """

    @torch.no_grad()
    def __init__(self, layer: Any, laid: tuple[Tensor, bool] | None = None) -> None:
        """Take the place of a linear layer.

        Args:
            layer: With or without adapters, or an embedding that a head is tied to.
            laid: Its weight ``[O, I]`` as :func:`laid_out` returns it.
        """
        super().__init__()
        weight, self.is_laid_out = laid or laid_out(layer.weight)
        self.weight = weight
        updates = layer.updates() if isinstance(layer, LoRALinear | MergedLoRALinear) else []
        self.stretch = layer.stretch() if isinstance(layer, DoRALinear) and updates else None
        self.starts = [update.start for update in updates]
        self.a = [update.a.detach().to(weight.dtype) for update in updates]
        self.b = [(update.b.detach() * update.scaling).to(weight.dtype) for update in updates]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., I]`` to ``[..., O]``."""
        flat = x.flatten(0, -2)
        out: Tensor
        if self.is_laid_out:
            plain: Any = flat, self.weight, None, "none", [], ""
            out = torch.ops.mkldnn._linear_pointwise(*plain)
        else:
            out = linear(flat, self.weight)
        for start, a, b in zip(self.starts, self.a, self.b, strict=True):
            out[:, start : start + len(b)].addmm_(flat @ a.t(), b.t())
        if self.stretch is not None:
            out = (self.stretch * out).to(out.dtype)
        return out.view(*x.shape[:-1], -1)


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
            setattr(parent, name, ServedLinear(layer, laid[id(layer.weight)]))
    for model in models:
        model.eval().requires_grad_(False)


def is_served(model: nn.Module) -> bool:
    """Whether a model has been made ready to answer."""
    return any(isinstance(module, ServedLinear) for module in model.modules())


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
