"""Build Phi-3 inside torchtune's decoder shell, sized by the checkpoint's config.json."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import nn
from torchtune.modules import TiedLinear, TransformerDecoder

from phi3_plugin.config import Phi3Config, read_config
from phi3_plugin.errors import AdapterError
from phi3_plugin.models.attention import Phi3Attention
from phi3_plugin.models.checks import misfits, under_torchtune
from phi3_plugin.models.decoder import Phi3Decoder, Phi3Layer
from phi3_plugin.models.lora import Linear
from phi3_plugin.models.mlp import Phi3MLP
from phi3_plugin.models.nf4 import dequantize_in_state_dicts
from phi3_plugin.models.norm import RMSNorm
from phi3_plugin.models.rope import RotaryEmbedding
from phi3_plugin.models.settings import LoRASettings
from phi3_plugin.models.targets import HEAD
from phi3_plugin.models.whole import Embedding
from phi3_plugin.positions import Rope

MakeLinear = Callable[[str, int, int], nn.Module]
"""(number of the block and target, as in ``3.qkv_proj``, or the head; in_dim, out_dim) -> layer."""


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
    checkpoint_dir: str | Path | None, *, rope_factors: str = "auto", quantize_base: bool = False
) -> TransformerDecoder:
    """Build the model of a checkpoint folder, without adapters.

    The weights are zero until a checkpoint is loaded into them.

    Args:
        checkpoint_dir: Folder in Hugging Face layout; only its config.json is read.
        rope_factors: See :func:`lora_phi3`.
        quantize_base: Likewise; for inference, since NF4 weights cannot be trained.

    Raises:
        ConfigError: config.json holds something we do not compute, or sizes NF4 cannot store.
        MissingFileError: No such folder, or no config.json in it.
    """
    make: MakeLinear = lambda name, i, o: Linear(i, o, quantize_base and name != HEAD)  # noqa: E731
    return decoder(read_config(checkpoint_dir), make, rope_factors)


def lora_phi3(
    checkpoint_dir: str | Path | None,
    lora_attn_modules: list[str],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    *,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers_to_transform: Sequence[int] | None = None,
    lora_init: str = "kaiming",
    apply_lora_to_embedding: bool = False,
    modules_to_save: Sequence[str] | None = None,
    quantize_base: bool = False,
    rope_factors: str = "auto",
) -> TransformerDecoder:
    """Build the model of a checkpoint folder with adapters on its linear layers.

    Args:
        checkpoint_dir: Folder in Hugging Face layout; only its config.json is read.
        lora_attn_modules: Any of qkv_proj, o_proj, gate_up_proj, down_proj; or of q_proj, k_proj,
            v_proj, gate_proj, up_proj, for an adapter on that part of a fused layer alone. The
            name is torchtune's; its recipes read it.
        apply_lora_to_mlp: Must say whether the list holds gate_up_proj, down_proj or such a part.
        apply_lora_to_output: An adapter on the head as well.
        lora_rank: Inner width of every adapter.
        lora_alpha: The adapters are scaled by lora_alpha / lora_rank.
        lora_dropout: Dropout on the adapters' input.
        use_dora: Train the magnitude of each row as well.
        use_rslora: Scale by lora_alpha / sqrt(lora_rank) instead.
        rank_pattern: Other ranks, by target (``o_proj: 8``) or by layer and target
            (``3.o_proj: 4``), which comes first. Head and embedding are ``lm_head`` and
            ``embed_tokens``, or ``output`` and ``tok_embeddings``.
        alpha_pattern: Other alphas, likewise.
        layers_to_transform: Numbers of the layers that get adapters; None is all.
        lora_init: How the adapters start: kaiming or gaussian draw A; pissa takes the largest
            directions of the base weight, loftq what NF4 loses of it, each for our recipe only.
        apply_lora_to_embedding: An adapter on the embedding as well.
        modules_to_save: lm_head, embed_tokens: trained whole beside the adapters.
        quantize_base: Store the base weights in NF4, all linear layers but the head.
        rope_factors: Which LongRoPE factors turn a batch: auto decides by its longest position,
            as transformers does; short or long fixes one, as vLLM does by its maximum length.

    Raises:
        AdapterError: The adapter settings are wrong; all problems are listed.
        ConfigError: config.json holds something we do not compute, or sizes NF4 cannot store.
        MissingFileError: No such folder, or no config.json in it.
    """
    settings = LoRASettings(
        lora_attn_modules,
        apply_lora_to_mlp,
        apply_lora_to_output,
        lora_rank,
        lora_alpha,
        lora_dropout,
        use_dora,
        quantize_base,
        use_rslora,
        rank_pattern,
        alpha_pattern,
        layers_to_transform,
        lora_init,
        apply_lora_to_embedding,
        modules_to_save,
    )
    return adapted(read_config(checkpoint_dir), settings, rope_factors)


def phi3_mini() -> TransformerDecoder:
    """Build Phi-3-mini-4k without a checkpoint folder; see :func:`phi3`."""
    return decoder(MINI, lambda _, i, o: Linear(i, o))


def lora_phi3_mini(
    lora_attn_modules: list[str],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
) -> TransformerDecoder:
    """Build Phi-3-mini-4k with adapters without a checkpoint folder; see :func:`lora_phi3`.

    The signature is that of ``torchtune.models.phi3.lora_phi3_mini``; the targets are ours.
    """
    settings = LoRASettings(
        lora_attn_modules,
        apply_lora_to_mlp,
        apply_lora_to_output,
        lora_rank,
        lora_alpha,
        lora_dropout,
        use_dora,
        quantize_base,
    )
    return adapted(MINI, settings)


qlora_phi3 = partial(lora_phi3, quantize_base=True)
qlora_phi3.__doc__ = "Build the model of a checkpoint folder over an NF4 base; see `lora_phi3`."

qlora_phi3_mini = partial(lora_phi3_mini, quantize_base=True)
qlora_phi3_mini.__doc__ = "Build Phi-3-mini-4k over an NF4 base; see `lora_phi3_mini`."


def adapted(
    config: Phi3Config, settings: LoRASettings, rope_factors: str = "auto"
) -> TransformerDecoder:
    """Assemble the model with adapters.

    Args:
        config: Sizes and constants.
        settings: Where the adapters go, and what is quantized.
        rope_factors: See :func:`lora_phi3`.

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
        rope_factors: See :func:`lora_phi3`.
        embed: Makes the embedding, told its size.

    Raises:
        ConfigError: There are no such factors.
    """
    rope = RotaryEmbedding(config.rope, config.max_position_embeddings, rope_factors)
    size = config.vocab_size, config.hidden_size
    embedding = embed(*size)
    tied = config.tie_word_embeddings
    return Phi3Decoder(
        rope,
        tok_embeddings=embedding,
        layers=[_layer(config, linear, rope, i) for i in range(config.num_hidden_layers)],
        max_seq_len=config.max_position_embeddings,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        output=TiedLinear(embedding) if tied else linear(HEAD, *reversed(size)),
    )


def _layer(config: Phi3Config, linear: MakeLinear, rope: RotaryEmbedding, number: int) -> Phi3Layer:
    d, inner = config.hidden_size, config.intermediate_size
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
    return Phi3Layer(
        attention,
        Phi3MLP(gate_up, linear(f"{number}.down_proj", inner, d)),
        sa_norm=RMSNorm(d, config.rms_norm_eps),
        mlp_norm=RMSNorm(d, config.rms_norm_eps),
    )
