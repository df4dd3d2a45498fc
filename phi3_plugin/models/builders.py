"""Build Phi-3 inside torchtune's decoder shell, sized by the checkpoint's config.json."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer

from phi3_plugin.config import Phi3Config, read_config
from phi3_plugin.errors import AdapterError
from phi3_plugin.models.attention import Phi3Attention
from phi3_plugin.models.lora import Linear, LoRALinear, check_lora
from phi3_plugin.models.mlp import Phi3MLP
from phi3_plugin.models.norm import RMSNorm
from phi3_plugin.models.rope import RotaryEmbedding

MakeLinear = Callable[[str, int, int], nn.Module]
"""(name under which the layer is a target, in_dim, out_dim) -> layer."""


def phi3(checkpoint_dir: str | Path | None) -> TransformerDecoder:
    """Build the model of a checkpoint folder, without adapters.

    The weights are zero until a checkpoint is loaded into them.

    Args:
        checkpoint_dir: Folder in Hugging Face layout; only its config.json is read.

    Raises:
        ConfigError: config.json holds something we do not compute.
        MissingFileError: No such folder, or no config.json in it.
    """
    return decoder(read_config(checkpoint_dir), lambda _, i, o: Linear(i, o))


def lora_phi3(
    checkpoint_dir: str | Path | None,
    lora_attn_modules: list[str],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    *,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
) -> TransformerDecoder:
    """Build the model of a checkpoint folder with LoRA on its linear layers.

    Args:
        checkpoint_dir: Folder in Hugging Face layout; only its config.json is read.
        lora_attn_modules: Any of qkv_proj, o_proj, gate_up_proj, down_proj. The name is
            torchtune's; its recipes read it.
        apply_lora_to_mlp: Must say whether the list holds gate_up_proj or down_proj.
        apply_lora_to_output: LoRA on the head; not supported yet.
        lora_rank: Inner width of every adapter.
        lora_alpha: The adapters are scaled by lora_alpha / lora_rank.
        lora_dropout: Dropout on the adapters' input.

    Raises:
        AdapterError: The adapter settings are wrong; all problems are listed.
        ConfigError: config.json holds something we do not compute.
        MissingFileError: No such folder, or no config.json in it.
    """
    if apply_lora_to_output:
        raise AdapterError("apply_lora_to_output: True is not supported yet. Set it to False.")
    targets = list(lora_attn_modules)
    check_lora(targets, apply_lora_to_mlp, lora_rank, lora_alpha, lora_dropout)

    def linear(name: str, in_dim: int, out_dim: int) -> nn.Module:
        if name in targets:
            return LoRALinear(in_dim, out_dim, lora_rank, lora_alpha, lora_dropout)
        return Linear(in_dim, out_dim)

    return decoder(read_config(checkpoint_dir), linear)


def decoder(config: Phi3Config, linear: MakeLinear) -> TransformerDecoder:
    """Assemble the model in torchtune's shell.

    Args:
        config: Sizes and constants.
        linear: Makes each linear layer, told its name.
    """
    rope = RotaryEmbedding(config.head_dim, config.max_position_embeddings, config.rope_theta)
    return TransformerDecoder(
        tok_embeddings=nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            _weight=torch.zeros(config.vocab_size, config.hidden_size),
        ),
        layers=[_layer(config, linear, rope) for _ in range(config.num_hidden_layers)],
        max_seq_len=config.max_position_embeddings,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        output=linear("lm_head", config.hidden_size, config.vocab_size),
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
