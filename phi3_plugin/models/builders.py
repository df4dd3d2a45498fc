"""Build Phi-3 inside torchtune's decoder shell, sized by the checkpoint's config.json."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torchtune.modules import TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer

from phi3_plugin.config import Phi3Config, read_config
from phi3_plugin.errors import AdapterError
from phi3_plugin.models.attention import Phi3Attention
from phi3_plugin.models.lora import Linear
from phi3_plugin.models.mlp import Phi3MLP
from phi3_plugin.models.nf4 import dequantize_in_state_dicts
from phi3_plugin.models.norm import RMSNorm
from phi3_plugin.models.rope import RotaryEmbedding
from phi3_plugin.models.targets import HEAD, LoRASettings
from phi3_plugin.positions import Rope

MakeLinear = Callable[[str, int, int], nn.Module]
"""(name under which the layer is a target, in_dim, out_dim) -> layer."""


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


def phi3(checkpoint_dir: str | Path | None, *, rope_factors: str = "auto") -> TransformerDecoder:
    """Build the model of a checkpoint folder, without adapters.

    The weights are zero until a checkpoint is loaded into them.

    Args:
        checkpoint_dir: Folder in Hugging Face layout; only its config.json is read.
        rope_factors: See :func:`lora_phi3`.

    Raises:
        ConfigError: config.json holds something we do not compute.
        MissingFileError: No such folder, or no config.json in it.
    """
    return decoder(read_config(checkpoint_dir), lambda _, i, o: Linear(i, o), rope_factors)


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
        apply_lora_to_output: An adapter on the head as well. PEFT loads it, vLLM does not.
        lora_rank: Inner width of every adapter.
        lora_alpha: The adapters are scaled by lora_alpha / lora_rank.
        lora_dropout: Dropout on the adapters' input.
        use_dora: Train the magnitude of each row as well.
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
        AdapterError: An adapter is asked for where there is no layer to adapt.
    """
    if config.tie_word_embeddings and settings.apply_lora_to_output:
        raise AdapterError(
            "apply_lora_to_output: True needs a head of its own, but this checkpoint ties it to "
            "the embedding, which a merged adapter would change as well. Set it to False."
        )
    model = decoder(config, settings.make, rope_factors)
    if settings.quantize_base:
        dequantize_in_state_dicts(model, model.tok_embeddings.weight.dtype)
    return model


def decoder(
    config: Phi3Config, linear: MakeLinear, rope_factors: str = "auto"
) -> TransformerDecoder:
    """Assemble the model in torchtune's shell.

    Args:
        config: Sizes and constants.
        linear: Makes each linear layer, told its name.
        rope_factors: See :func:`lora_phi3`.

    Raises:
        ConfigError: There are no such factors.
    """
    rope = RotaryEmbedding(config.rope, config.max_position_embeddings, rope_factors)
    size = config.vocab_size, config.hidden_size
    embedding = nn.Embedding(*size, _weight=torch.zeros(size))
    tied = config.tie_word_embeddings
    return TransformerDecoder(
        tok_embeddings=embedding,
        layers=[_layer(config, linear, rope) for _ in range(config.num_hidden_layers)],
        max_seq_len=config.max_position_embeddings,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        output=TiedLinear(embedding) if tied else linear(HEAD, *reversed(size)),
    )


def _layer(
    config: Phi3Config, linear: MakeLinear, rope: RotaryEmbedding
) -> TransformerSelfAttentionLayer:
    d, inner = config.hidden_size, config.intermediate_size
    attention = Phi3Attention(
        qkv_proj=linear("qkv_proj", d, config.qkv_size),
        o_proj=linear("o_proj", d, d),
        rope=rope,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        sliding_window=config.sliding_window,
    )
    return TransformerSelfAttentionLayer(
        attention,
        Phi3MLP(linear("gate_up_proj", d, 2 * inner), linear("down_proj", inner, d)),
        sa_norm=RMSNorm(d, config.rms_norm_eps),
        mlp_norm=RMSNorm(d, config.rms_norm_eps),
    )
