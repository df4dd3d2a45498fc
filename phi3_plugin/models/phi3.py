"""Phi-3 inside torchtune's decoder shell, sized by the checkpoint's config.json."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer

from phi3_plugin.config import Phi3Config, Rope, read_config
from phi3_plugin.errors import AdapterError, ConfigError
from phi3_plugin.models.attention import Attends, Documents, Mask, Phi3Attention, take
from phi3_plugin.models.cache import Cache, Step
from phi3_plugin.models.distillation import Teaching, token_distances
from phi3_plugin.models.logps import token_logps
from phi3_plugin.models.lora import Embedding, Linear
from phi3_plugin.models.lora_settings import HEAD, LoRASettings, misfits, under_torchtune
from phi3_plugin.models.neftune import noisy
from phi3_plugin.models.nf4 import dequantize_in_state_dicts
from phi3_plugin.models.rope import RotaryEmbedding
from phi3_plugin.options import OnResume, takes

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""What a model may be computed in, by the name that settings have for it."""

RopeFactors = Annotated[str, OnResume.REFUSED]
"""auto, short or long, see :func:`phi3`; no tensor would tell."""


# Shapes: B batch, S sequence, T tokens of all rows, D model, I intermediate, V vocabulary,
# N labelled tokens
class RMSNorm(nn.Module):
    """Root mean square norm: computed in fp32, cast back, then multiplied by the scale.

    torchtune's own RMSNorm multiplies before it casts, which differs in bf16.

    Source: transformers 5.23 ``Phi3RMSNorm``.
    """

    def __init__(self, dim: int, eps: float) -> None:
        """Start as the identity scale ``[D]``; eps is added to the mean square."""
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis of ``x [..., D]``."""
        if torch.compiler.is_compiling():  # which fuses this into one pass by itself
            wide = x.float()
            return self.scale * (wide * _inverse(wide, self.eps)).to(x.dtype)
        out: Tensor = _RMSNorm.apply(x, self.scale, self.eps)  # type: ignore[no-untyped-call]
        return out


def _inverse(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input as it is, where autograd keeps it twice more in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = _inverse(wide, eps)
        ctx.save_for_backward(x, inverse, scale)
        return scale * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, scale = ctx.saved_tensors
        normed, g = x * inverse, grads[0].float()  # fp32: the inverse is
        gx = gscale = None
        if ctx.needs_input_grad[1]:
            gscale = (g * normed).flatten(0, -2).sum(0).to(scale.dtype)
        if ctx.needs_input_grad[0]:
            g = g * scale
            mean = (g * normed).mean(-1, keepdim=True)
            gx = g.sub_(normed.mul_(mean)).mul_(inverse).to(x.dtype)
        return gx, gscale, None


class Phi3MLP(nn.Module):
    """``down(up * silu(gate))`` with gate and up in one matrix, gate first.

    Source: transformers 5.23 ``Phi3MLP``.
    """

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module) -> None:
        """Take the two projections as built, D to 2 I and I to D, with or without adapters."""
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., D]`` to ``[..., D]``."""
        return self.down_proj(swiglu(self.gate_up_proj(x)))  # type: ignore[no-any-return]


def swiglu(gate_up: Tensor) -> Tensor:
    """Return ``up * silu(gate)``, ``[..., I]``, of gate and up side by side, ``[..., 2 I]``."""
    if torch.compiler.is_compiling():  # which fuses this into one pass by itself
        gate, up = gate_up.chunk(2, dim=-1)
        return up * F.silu(gate)
    out: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone, where autograd keeps silu(gate) as well."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,), (g,) = ctx.saved_tensors, grads
        gate, up = gate_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_up)
        to_gate, to_up = both.chunk(2, dim=-1)  # written in place: no concatenation
        torch.mul(g, up, out=to_up)  # on its way to the other half
        torch.ops.aten.silu_backward.grad_input(to_up, gate, grad_input=to_gate)
        torch.mul(F.silu(gate), g, out=to_up)
        return both


class Phi3Layer(TransformerSelfAttentionLayer):  # type: ignore[misc]
    """A decoder layer; torchtune's is its base for what its recipes wrap and compile."""

    def forward(
        self,
        x: Tensor,
        *,
        attends: Attends | None = None,
        rows: Tensor | None = None,
        mask: Mask = None,
        input_pos: Tensor | None = None,
        **other: Any,
    ) -> Tensor:
        """Map ``x [B, S, D]`` to the same shape.

        Args:
            x: Hidden states.
            attends: What the tokens see; None is what torchtune says by the next two.
            rows: Numbers of the tokens whose result is wanted, counted over all of B and S; None
                is all. The result is then ``[1, rows, D]``.
            mask: See `Mask`.
            input_pos: Position of each token ``[B, S]``; None counts from 0.
            **other: What torchtune's decoder passes for layers of other kinds.
        """
        if attends is None:
            attends = self.attn.dense(x, mask, input_pos)
        attended = self.attn(self.sa_norm(x), attends, rows)
        h = take(x, rows) + attended
        return h + self.mlp(self.mlp_norm(h))  # type: ignore[no-any-return]


class Phi3Decoder(TransformerDecoder):  # type: ignore[misc]
    """torchtune's decoder, with two more ways to call it: to train, and to generate."""

    neftune_alpha: float | None = None
    """Of the noise on embeddings where gradients are wanted."""

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        rows: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        input_pos: Tensor | None = None,
        step: Step | None = None,
        label_smoothing: float = 0.0,
        teaching: Teaching | None = None,
        **rest: Any,
    ) -> Any:
        """Return logits ``[B, S, V]`` as torchtune's decoder does, or with ``targets`` their log p.

        That is ``[N]``, worked out inside, so that what shards or wraps the model sees one call,
        and head and last feed-forward run for labelled tokens alone; with ``teaching`` it is
        ``[3, N]``, see `token_distances`. With ``rows`` alone return their hidden states, ready for
        the head, ``[N, D]``. With ``step`` return the logits after the last token of each of its
        rows, ``[rows, V]``.

        Args:
            tokens: ``[B, S]``; with ``lengths`` a single row.
            targets: The tokens that are predicted, ``[N]``.
            rows: Numbers of the tokens that predict them, counted over all of B and S, ``[N]``.
            lengths: Tokens of each document, which attend within themselves alone.
            input_pos: Position of each token ``[B, S]``; None counts from 0.
            step: Which cached rows the tokens ``[1, T]`` go on with; they are cached too.
            label_smoothing: See :func:`phi3_plugin.models.logps.token_logps`.
            teaching: What a teacher says of the targets.
            **rest: See torchtune's: ``mask``.

        Raises:
            ConfigError: A document is longer than the model has positions.
        """
        if step is not None:
            return self._next(tokens, step)
        if targets is None and rows is None:
            return super().forward(tokens, input_pos=input_pos, **rest)
        hidden = self._hidden(tokens, rows, lengths, input_pos, **rest)
        if targets is None:
            return hidden
        asked = hidden, self.output, targets, self.tok_embeddings.num_embeddings
        if teaching is not None:
            return token_distances(*asked, teaching)
        return token_logps(*asked, label_smoothing)

    def _hidden(
        self,
        tokens: Tensor,
        rows: Tensor | None,
        lengths: Sequence[int] | None,
        input_pos: Tensor | None,
        **rest: Any,
    ) -> Tensor:
        """Compute what labelled tokens need alone; see :meth:`forward`."""
        longest = tokens.shape[1] if lengths is None else max(lengths)
        if longest > self.max_seq_len and not tokens.is_meta:  # a plan has sizes alone
            raise ConfigError(
                f"tokenizer.max_seq_len: a document has {longest} tokens, but the model has "
                f"{self.max_seq_len} positions. Set it to {self.max_seq_len} or less."
            )
        h = self.tok_embeddings(tokens)
        if self.neftune_alpha and self.training and torch.is_grad_enabled():
            h = noisy(h, lengths, self.neftune_alpha)
        seen: dict[str, Any] = {"input_pos": input_pos, **rest}
        if lengths is not None:
            turns = self._rope.turns(tokens.shape[1], input_pos, h.dtype)
            seen = {"attends": Documents(tuple(lengths), *turns)}
        for layer in self.layers[:-1]:
            h = layer(h, **seen)
        hidden: Tensor = self.norm(self.layers[-1](h, rows=rows, **seen))
        return hidden[0]

    def _next(self, tokens: Tensor, step: Step) -> Tensor:
        """Compute new tokens of cached rows; the step is told which layer asks it."""
        h = self.tok_embeddings(tokens)
        for number, layer in enumerate(self.layers):
            step.layer = number
            is_last = number == len(self.layers) - 1
            h = layer(h, attends=step, rows=step.last() if is_last else None)
        step.done()
        logits: Tensor = self.output(self.norm(h))
        return logits[0]

    def cache(self, rows: int) -> Cache:
        """Return an empty cache for so many rows."""
        attention, scale = self.layers[0].attn, self.norm.scale
        sizes = len(self.layers), rows, attention.heads[1], attention.head_dim
        window = attention.sliding_window
        return Cache(*sizes, window=window, dtype=scale.dtype, device=scale.device)

    def step(self, cache: Cache, rows: Sequence[int], lengths: Sequence[int]) -> Step:
        """Return what ``forward`` needs to know of new tokens, so many for each of these rows."""
        return Step(cache, rows, lengths, self._rope)

    def turns_alike(self, length: int, other: int) -> bool:
        """Whether rows of these lengths turn by the same LongRoPE factors.

        What is cached of a row that grows past the switch is of no use, as for transformers.
        """
        switch = self._rope.switch
        return switch is None or (length > switch) == (other > switch)

    @property
    def _rope(self) -> RotaryEmbedding:
        rope: RotaryEmbedding = self.layers[0].attn.rope
        return rope


MakeLinear = Callable[[str, int, int], nn.Module]
"""(number of the block and target, as in ``3.qkv_proj``, or the head; in_dim, out_dim) -> layer."""


def decoder(
    config: Phi3Config,
    linear: MakeLinear,
    rope_factors: str = "auto",
    embed: Callable[[int, int], nn.Embedding] = Embedding,
) -> TransformerDecoder:
    """Assemble the model in torchtune's shell.

    Args:
        config: Sizes and constants.
        linear: Makes each linear layer, told its name.
        rope_factors: See :func:`phi3`.
        embed: Makes the embedding, told V and D.

    Raises:
        ConfigError: There are no such factors.
    """
    d, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
    rope = RotaryEmbedding(config.rope, config.max_position_embeddings, rope_factors)
    embedding = embed(config.vocab_size, d)
    layers = []
    for number in range(config.num_hidden_layers):
        attention = Phi3Attention(
            qkv_proj=linear(f"{number}.qkv_proj", d, config.qkv_size),
            o_proj=linear(f"{number}.o_proj", d, d),
            rope=rope,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            sliding_window=config.sliding_window,
        )
        gate_up = linear(f"{number}.gate_up_proj", d, 2 * inner)
        mlp = Phi3MLP(gate_up, linear(f"{number}.down_proj", inner, d))
        norms = {"sa_norm": RMSNorm(d, eps), "mlp_norm": RMSNorm(d, eps)}
        layers.append(Phi3Layer(attention, mlp, **norms))
    tied = config.tie_word_embeddings
    return Phi3Decoder(
        tok_embeddings=embedding,
        layers=layers,
        max_seq_len=config.max_position_embeddings,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        norm=RMSNorm(d, eps),
        output=TiedLinear(embedding) if tied else linear(HEAD, d, config.vocab_size),
    )


def adapted(
    config: Phi3Config, settings: LoRASettings, rope_factors: str = "auto"
) -> TransformerDecoder:
    """Assemble the model with adapters.

    Args:
        config: Sizes and constants.
        settings: Where the adapters go, and what is quantized.
        rope_factors: See :func:`phi3`.

    Raises:
        AdapterError: The settings do not fit the model, or the program that trains it; all
            problems, one line each.
    """
    tied, layers = config.tie_word_embeddings, config.num_hidden_layers
    if problems := [*misfits(settings, layers, tied=tied), *under_torchtune(settings)]:
        raise AdapterError("\n".join(problems))
    model = decoder(config, settings.make, rope_factors, settings.make_embedding)
    if settings.quantize_base:
        dequantize_in_state_dicts(model, model.tok_embeddings.weight.dtype)
    return model


MINI = Phi3Config(
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32064,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope=Rope(theta=10000.0, rotary_dim=96),
    sliding_window=2047,
)
"""What microsoft/Phi-3-mini-4k-instruct publishes, for builders without a checkpoint folder."""


def phi3(
    checkpoint_dir: str | Path | None,
    *,
    rope_factors: RopeFactors = "auto",
    quantize_base: bool = False,
) -> TransformerDecoder:
    """Build the model of a checkpoint folder, without adapters.

    The weights are zero until a checkpoint is loaded into them.

    Args:
        checkpoint_dir: Folder in Hugging Face layout; only its config.json is read.
        rope_factors: Which LongRoPE factors turn a batch: auto decides by its longest position,
            as transformers does; short or long fixes one, as vLLM does by its maximum length.
        quantize_base: Store the base weights in NF4, all linear layers but the head; for
            inference, since NF4 weights cannot be trained.

    Raises:
        ConfigError: config.json holds something we do not compute, or sizes NF4 cannot store.
        MissingFileError: No such folder, or no config.json in it.
    """

    def linear(name: str, in_dim: int, out_dim: int) -> Linear:
        return Linear(in_dim, out_dim, quantize_base and name != HEAD)

    return decoder(read_config(checkpoint_dir), linear, rope_factors)


def phi3_reward(
    checkpoint_dir: str | Path | None, *, rope_factors: RopeFactors = "auto"
) -> TransformerDecoder:
    """Build the reward or value model of a checkpoint folder: a score in the place of the logits.

    Its ``forward`` gives one for each token, ``[B, S, 1]``; the one after the last token is what
    transformers' ``Phi3ForSequenceClassification`` gives for the text.

    Args:
        checkpoint_dir: Folder of such a model; only its config.json is read.
        rope_factors: See :func:`phi3`.

    Raises:
        ConfigError: config.json holds something we do not compute.
        MissingFileError: No such folder, or no config.json in it.
    """

    def linear(name: str, in_dim: int, out_dim: int) -> Linear:
        return Linear(in_dim, 1 if name == HEAD else out_dim)

    config = replace(read_config(checkpoint_dir), tie_word_embeddings=False)
    return decoder(config, linear, rope_factors)


@takes(LoRASettings)
def lora_phi3(
    checkpoint_dir: str | Path | None,
    *options: Any,
    rope_factors: RopeFactors = "auto",
    **named: Any,
) -> TransformerDecoder:
    """Build the model of a checkpoint folder with adapters on its linear layers.

    Args:
        checkpoint_dir: Folder in Hugging Face layout; only its config.json is read.
        *options: Those of `LoRASettings` by position, ``lora_attn_modules`` first.
        rope_factors: See :func:`phi3`.
        **named: Those of `LoRASettings` by name: ``lora_rank`` and all others are declared and
            explained there.

    Raises:
        AdapterError: The adapter settings are wrong; all problems are listed.
        ConfigError: config.json holds something we do not compute, or sizes NF4 cannot store.
        MissingFileError: No such folder, or no config.json in it.
    """
    settings = LoRASettings(*options, **named)
    return adapted(read_config(checkpoint_dir), settings, rope_factors)


def phi3_mini() -> TransformerDecoder:
    """Build Phi-3-mini-4k without a checkpoint folder; see :func:`phi3`."""
    return decoder(MINI, lambda _, in_dim, out_dim: Linear(in_dim, out_dim))


@takes(LoRASettings, until="quantize_base")
def lora_phi3_mini(*options: Any, **named: Any) -> TransformerDecoder:
    """Build Phi-3-mini-4k with adapters without a checkpoint folder; see :func:`lora_phi3`.

    It takes what ``torchtune.models.phi3.lora_phi3_mini`` takes, with our targets.
    """
    return adapted(MINI, LoRASettings(*options, **named))


qlora_phi3 = partial(lora_phi3, quantize_base=True)
qlora_phi3.__doc__ = "Build the model of a checkpoint folder over an NF4 base; see `lora_phi3`."

qlora_phi3_mini = partial(lora_phi3_mini, quantize_base=True)
qlora_phi3_mini.__doc__ = "Build Phi-3-mini-4k over an NF4 base; see `lora_phi3_mini`."
