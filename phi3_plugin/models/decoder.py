"""torchtune's decoder shell, taught to train on rows of documents and to return the loss."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchtune.modules import TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer

from phi3_plugin.errors import ConfigError
from phi3_plugin.models.cache import Cache, Step
from phi3_plugin.models.documents import Documents, borders_of, take
from phi3_plugin.models.head_loss import summed_loss
from phi3_plugin.models.rope import RotaryEmbedding


# Shapes: B batch, S sequence, D model
class Phi3Layer(TransformerSelfAttentionLayer):  # type: ignore[misc]
    """A decoder layer that can leave out tokens whose result nobody needs."""

    def forward(self, x: Tensor, *, rows: Tensor | None = None, **seen: Any) -> Tensor:
        """Map ``x [B, S, D]`` to the same shape.

        Args:
            x: Hidden states.
            rows: Numbers of the tokens whose result is wanted, counted over all of B and S; None
                is all. The result is then ``[1, rows, D]``.
            **seen: ``mask`` and ``input_pos``, see :class:`Phi3Attention`.
        """
        normed = self.sa_norm(x)
        seen = {key: seen.get(key) for key in ("mask", "input_pos")}
        h = take(x, rows) + self.attn(normed, rows=rows, **seen)
        return h + self.mlp(self.mlp_norm(h))  # type: ignore[no-any-return]


class Phi3Decoder(TransformerDecoder):  # type: ignore[misc]
    """torchtune's decoder, with a second way to call it: for the loss of labelled tokens.

    The loss is worked out inside, so that what shards or wraps the model sees one call, and the
    head and the last layer's feed-forward run for labelled tokens alone.
    """

    def __init__(self, rope: RotaryEmbedding, **parts: Any) -> None:
        """Assemble.

        Args:
            rope: Shared by all layers.
            **parts: See torchtune's.
        """
        super().__init__(**parts)
        object.__setattr__(self, "rope", rope)  # a part of the layers, not one more

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        rows: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        input_pos: Tensor | None = None,
        step: Step | None = None,
        **rest: Any,
    ) -> Any:
        """Return logits as torchtune's decoder does, or with ``targets`` the summed loss.

        Or with ``step`` the logits after the last token of each of its rows, ``[rows, V]``.

        Args:
            tokens: ``[B, S]``; with ``lengths`` a single row.
            targets: The tokens that are predicted, ``[N]``.
            rows: Numbers of the tokens that predict them, counted over all of B and S, ``[N]``.
            lengths: Tokens of each document, which attend within themselves alone.
            input_pos: Position of each token ``[B, S]``; None counts from 0.
            step: Which cached rows the tokens ``[1, T]`` go on with; they are cached too.
            **rest: See torchtune's: ``mask``.

        Raises:
            ConfigError: A document is longer than the model has positions.
        """
        if step is not None:
            return self._go_on(tokens, step)
        if targets is None:
            return super().forward(tokens, input_pos=input_pos, **rest)
        if not tokens.is_meta:  # which has sizes alone, for a plan
            self._check_length(tokens.shape[1] if lengths is None else max(lengths))
        seen = {"input_pos": input_pos, **rest}
        h = self.tok_embeddings(tokens)
        if lengths is not None:
            turns = self.rope.turns(tokens.shape[1], input_pos, h.dtype)
            where = tuple(lengths)
            seen = {"mask": Documents(where, borders_of(where, tokens.device), *turns)}
        for layer in self.layers[:-1]:
            h = layer(h, **seen)
        h = self.norm(self.layers[-1](h, rows=rows, **seen))[0]
        vocabulary = self.tok_embeddings.num_embeddings
        return summed_loss(self.output, h, targets, vocabulary, _trained(self.output))

    def cache(self, rows: int) -> Cache:
        """Return an empty cache for so many rows."""
        attention, scale = self.layers[0].attn, self.norm.scale
        sizes = len(self.layers), rows, attention.num_kv_heads, attention.head_dim
        window = attention.sliding_window
        return Cache(*sizes, window=window, dtype=scale.dtype, device=scale.device)

    def step(self, cache: Cache, rows: Sequence[int], lengths: Sequence[int]) -> Step:
        """Return what ``forward`` needs to know of new tokens, so many for each of these rows."""
        return Step(cache, rows, lengths, self.rope)

    def turns_alike(self, length: int, other: int) -> bool:
        """Whether rows of these lengths turn by the same LongRoPE factors.

        What is cached of a row that grows past the switch is of no use, as for transformers.
        """
        switch = self.rope.switch
        return switch is None or (length > switch) == (other > switch)

    def _go_on(self, tokens: Tensor, step: Step) -> Tensor:
        h = self.tok_embeddings(tokens)
        last, end = step.last(h.device), len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            step.layer = number
            h = layer(h, mask=step, rows=last if number == end else None)
        step.done()
        logits: Tensor = self.output(self.norm(h))
        return logits[0]

    def _check_length(self, longest: int) -> None:
        if longest > self.max_seq_len:
            raise ConfigError(
                f"tokenizer.max_seq_len: a document has {longest} tokens, but the model has "
                f"{self.max_seq_len} positions. Set it to {self.max_seq_len} or less."
            )


def _trained(head: nn.Module | TiedLinear) -> list[Tensor]:
    if isinstance(head, TiedLinear):
        head = head.tied_module
        return [head.weight] if head.weight.requires_grad else []
    return [parameter for parameter in head.parameters() if parameter.requires_grad]
