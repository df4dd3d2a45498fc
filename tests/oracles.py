"""Reference models built by transformers and PEFT from the published configuration values.

Only sizes are overridden. Nothing here reads phi3_plugin's own config, so a value that we
misread cannot hide.
"""

from pathlib import Path

import torch
from transformers import Phi3Config, Phi3ForCausalLM

MINI_4K = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32064,
}
"""What microsoft/Phi-3-mini-4k-instruct publishes, less the keys that name files."""

MEDIUM_4K = {
    **MINI_4K,
    "attention_bias": False,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
}
"""What microsoft/Phi-3-medium-4k-instruct publishes: grouped-query attention."""

TINY_MHA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 160,
    "eos_token_id": 150,
    "pad_token_id": 150,
}
TINY_GQA = {**TINY_MHA, "num_attention_heads": 8, "num_key_value_heads": 2}
"""Published ratio of query to key heads: 4."""


def tiny_phi4_mini(hidden_size: int, pairs: int) -> dict[str, object]:
    """Return sizes of a tiny Phi-4-mini: LongRoPE of so many rotated pairs, and a tied head."""
    return {
        **TINY_GQA,
        "hidden_size": hidden_size,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 16,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + n / 10 for n in range(pairs)],
            "long_factor": [1.0 + n for n in range(pairs)],
        },
        "sliding_window": 512,
        "tie_word_embeddings": True,
    }


def hf_model(published: dict, seed: int = 0, std: float = 0.06, **sizes: object) -> Phi3ForCausalLM:
    """Return transformers' fp32 model with random weights, from published values."""
    torch.manual_seed(seed)
    model = Phi3ForCausalLM(Phi3Config(**{**published, **sizes})).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide a norm that is not applied
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=std)
    return model


def save_checkpoint(model: Phi3ForCausalLM, published: dict, folder: Path, **sizes: object) -> Path:
    """Write the folder as published: our own config.json text, weights in two shards."""
    import json

    total = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=total // 2)
    (folder / "config.json").write_text(json.dumps({**published, **sizes}))
    return folder


def hf_logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return fp32 logits ``[B, S, V]``."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.float()
