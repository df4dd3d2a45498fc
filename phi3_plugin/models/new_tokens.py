"""Rows of embedding and head for tokens that were added to the vocabulary, trained alone.

    tok_embeddings.weight    [V, D]  frozen     tok_embeddings.new_rows  [N, D]  trained
    output.weight            [V, D]  frozen     output.new_rows          [N, D]  trained

It is PEFT's ``trainable_token_indices``: a new row stands in the place of the base's. Most
checkpoints of the family have spare rows for some tokens; for more the vocabulary grows. A tied
head has the embedding's rows, and what is trained whole has the new ones in its weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TiedLinear
from torchtune.modules.peft import get_adapter_params

from phi3_plugin.errors import ConfigError
from phi3_plugin.models.lora import Embedding, Linear, WholeEmbedding, WholeLinear
from phi3_plugin.models.nf4 import Rows


# Shapes: V vocabulary, N new tokens, D model, B batch, S sequence
class NewRowsEmbedding(Embedding):
    """A frozen embedding with trained rows for new tokens."""

    def __init__(self, vocabulary: int, dim: int, first: int, count: int) -> None:
        """Allocate the weight ``[V, D]`` and the rows ``[N, D]``, of the tokens from a first on."""
        super().__init__(vocabulary, dim)
        self.first = first
        self.disabled = False  # then the weight has the rows that the new ones start from
        self.new_rows = nn.Parameter(torch.zeros(count, dim))

    def adapter_params(self) -> list[str]:
        """Name the parameters that are trained."""
        return ["new_rows"]

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``tokens [B, S]`` to ``[B, S, D]``, in the dtype of the weight."""
        known = super().forward(tokens)
        if self.disabled:
            return known
        place = tokens - self.first
        is_new = (place >= 0) & (place < len(self.new_rows))
        # Rounded after they are taken, so that the gradients of a row are summed in its own dtype
        new = F.embedding(place.where(is_new, 0), self.new_rows).to(known.dtype)
        return torch.where(is_new[..., None], new, known)


class NewRowsLinear(Linear):
    """A frozen head with trained rows for new tokens."""

    def __init__(self, in_dim: int, out_dim: int, first: int, count: int) -> None:
        """Allocate the weight ``[V, D]`` and the rows ``[N, D]``, of the tokens from a first on."""
        super().__init__(in_dim, out_dim)
        self.first = first
        self.disabled = False
        self.new_rows = nn.Parameter(torch.zeros(count, in_dim))

    def adapter_params(self) -> list[str]:
        """Name the parameters that are trained."""
        return ["new_rows"]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., D]`` to ``[..., V]``."""
        return _logits(x, self)


class NewRowsTiedLinear(TiedLinear):  # type: ignore[misc]
    """The head of an embedding that has trained rows for new tokens: they are its own as well."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``x [..., D]`` to ``[..., V]``."""
        return _logits(x, self.tied_module)


def _logits(x: Tensor, owner: NewRowsEmbedding | NewRowsLinear) -> Tensor:
    """Map ``x [..., D]`` to ``[..., V]``; no weight with the rows in it is made for that."""
    if owner.disabled:
        return F.linear(x, owner.weight)
    last = owner.first + len(owner.new_rows)
    parts = owner.weight[: owner.first], owner.new_rows.to(x.dtype), owner.weight[last:]
    return torch.cat([F.linear(x, part) for part in parts], dim=-1)


def add_new_tokens(model: Any, ids: Sequence[int]) -> None:
    """Give a model rows for new tokens, in place, before it has values.

    Beside adapters the rows alone are trained; a model without any is trained whole.

    Args:
        model: torchtune's decoder as this package builds it; may be on the meta device.
        ids: Of the new tokens, one after the other.

    Raises:
        ConfigError: An adapter is on embedding or head, or they are not of this package.
    """
    widen(model, ids[-1] + 1)
    for module in (model.tok_embeddings, model.output):
        if type(module) not in (Embedding, WholeEmbedding, Linear, WholeLinear, TiedLinear):
            raise ConfigError(
                f"tokenizer.add_tokens: {type(module).__name__} takes no rows for new tokens. Use "
                "a model of phi3_plugin.models, without apply_lora_to_embedding and "
                "apply_lora_to_output."
            )
    if not get_adapter_params(model):
        return
    vocabulary, dim = model.tok_embeddings.weight.shape
    if type(model.tok_embeddings) is Embedding:
        model.tok_embeddings = NewRowsEmbedding(vocabulary, dim, ids[0], len(ids))
    if isinstance(model.output, TiedLinear):
        model.output = NewRowsTiedLinear(model.tok_embeddings)
    elif type(model.output) is Linear:
        model.output = NewRowsLinear(dim, vocabulary, ids[0], len(ids))


def widen(model: Any, vocabulary: int) -> None:
    """Give embedding and head so many rows at least, in place, before they have values."""
    embedding, head = model.tok_embeddings, model.output
    rows, dim = embedding.weight.shape
    if vocabulary <= rows:
        return
    if isinstance(embedding, Embedding):
        model.tok_embeddings = type(embedding)(vocabulary, dim)
    if isinstance(head, TiedLinear):
        model.output = TiedLinear(model.tok_embeddings)
    elif isinstance(head, Linear):
        model.output = type(head)(dim, vocabulary)


@dataclass(frozen=True)
class WithRows:
    """A weight ``[V, D]`` with other values in some rows; more rows follow where they need them."""

    weight: Rows
    rows: Mapping[int, Tensor]
    """By number, each ``[D]``."""

    @property
    def dtype(self) -> torch.dtype:
        """In which the rows are given: one that holds both, weight and rows, exactly."""
        dtypes = {row.dtype for row in self.rows.values()}
        dtype = self.weight.dtype
        for other in dtypes:
            dtype = torch.promote_types(dtype, other)
        return dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return max(self.weight.shape[0], max(self.rows) + 1), self.weight.shape[1]

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Return consecutive rows; those that nobody has given are zero."""
        start, stop, _ = rows.indices(self.shape[0])
        out = torch.zeros(max(stop - start, 0), self.shape[1], dtype=self.dtype)
        known = self.weight[start : min(stop, self.weight.shape[0])]
        out[: len(known)] = known
        for number, row in self.rows.items():
            if start <= number < stop:
                out[number - start] = row
        return out


def with_rows(
    weights: Mapping[str, Rows], rows: Mapping[str, Mapping[int, Tensor]]
) -> dict[str, Rows]:
    """Return the weights that have other rows, with these.

    Args:
        weights: By parameter name.
        rows: By module and number, each ``[D]``.
    """
    return {f"{m}.weight": WithRows(weights[f"{m}.weight"], own) for m, own in rows.items() if own}


def starting_rows(
    weights: Mapping[str, Rows], pieces: Mapping[int, Sequence[int]]
) -> dict[str, dict[int, Tensor]]:
    """Return where the rows of new tokens start: at the mean of what they were written in before.

    So a model reads a new token as it read its text, more or less, before the first step.

    Args:
        weights: Of the base, by parameter name. A tied head has none, nor rows.
        pieces: By id of each new token, the tokens that its text was.

    Returns:
        By module and id, each ``[D]`` in fp32.
    """
    return {
        module: {number: _mean(weights[f"{module}.weight"], ids) for number, ids in pieces.items()}
        for module in ("tok_embeddings", "output")
        if pieces and f"{module}.weight" in weights
    }


def _mean(weight: Rows, ids: Sequence[int]) -> Tensor:
    return torch.cat([weight[i : i + 1] for i in ids]).float().mean(dim=0)
