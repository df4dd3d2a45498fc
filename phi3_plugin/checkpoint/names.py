"""The one table between Hugging Face's tensor names and ours, read both ways."""

import re

from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

NAMES = {
    EMBEDDING: "tok_embeddings",
    "model.layers.{}.input_layernorm": "layers.{}.sa_norm",
    "model.layers.{}.self_attn.qkv_proj": "layers.{}.attn.qkv_proj",
    "model.layers.{}.self_attn.o_proj": "layers.{}.attn.o_proj",
    "model.layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
    "model.layers.{}.mlp.gate_up_proj": "layers.{}.mlp.gate_up_proj",
    "model.layers.{}.mlp.down_proj": "layers.{}.mlp.down_proj",
    "model.norm": "norm",
    HEAD: "output",
}
"""Module names; ``{}`` is the number of the layer."""

PARAMETERS = {
    "lora_A.weight": "lora_a.weight",
    "lora_B.weight": "lora_b.weight",
    "lora_magnitude_vector": "magnitude",
}
"""Parameter names in an adapter file of PEFT, and ours."""

EMBEDDING_PARAMETERS = {
    "lora_embedding_A": "lora_a.weight",
    "lora_embedding_B": "lora_b.weight",
}
"""The same of an embedding."""

SAVED = ("output.weight", "tok_embeddings.weight")
"""Base tensors that an adapter may replace, PEFT's modules_to_save."""

PEFT_PREFIX = "base_model.model."

_TO_HF = {ours: hf for hf, ours in NAMES.items()}
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def to_ours(name: str) -> str:
    """Return our name of a tensor in a Hugging Face checkpoint."""
    module, _, parameter = name.rpartition(".")
    ours = _rename(module, NAMES)
    return f"{ours}.{'scale' if ours.endswith('norm') else parameter}"


def to_hf(name: str) -> str:
    """Return Hugging Face's name of one of our base tensors."""
    module, _, _ = name.rpartition(".")
    return f"{_rename(module, _TO_HF)}.weight"


def to_peft(name: str) -> str:
    """Return the name under which PEFT stores one of our adapter tensors."""
    if name in SAVED:
        return f"{PEFT_PREFIX}{to_hf(name)}"
    table = EMBEDDING_PARAMETERS if name.startswith("tok_embeddings.") else PARAMETERS
    for theirs, ours in table.items():
        if name.endswith(f".{ours}"):
            return f"{PEFT_PREFIX}{_rename(name.removesuffix(f'.{ours}'), _TO_HF)}.{theirs}"
    raise CheckpointError(f"{name!r} is not an adapter tensor of this model.")


def from_peft(name: str) -> str:
    """Return our name of a tensor in an adapter file of PEFT."""
    inside = name.removeprefix(PEFT_PREFIX)
    for theirs, ours in {**PARAMETERS, **EMBEDDING_PARAMETERS}.items():
        if inside != name and name.endswith(f".{theirs}"):
            return f"{_rename(inside.removesuffix(f'.{theirs}'), NAMES)}.{ours}"
    if inside in (f"{EMBEDDING}.weight", f"{HEAD}.weight") and inside != name:
        return to_ours(inside)
    raise CheckpointError(f"{name!r} is not an adapter tensor of Phi-3.")


def expected_shapes(config: Phi3Config) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a checkpoint of this size holds.

    A head that is tied to the embedding has none of its own.
    """
    d, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (vocab, d),
        "model.layers.{}.input_layernorm": (d,),
        "model.layers.{}.self_attn.qkv_proj": (config.qkv_size, d),
        "model.layers.{}.self_attn.o_proj": (d, d),
        "model.layers.{}.post_attention_layernorm": (d,),
        "model.layers.{}.mlp.gate_up_proj": (2 * inner, d),
        "model.layers.{}.mlp.down_proj": (d, inner),
        "model.norm": (d,),
        HEAD: (vocab, d),
    }
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return {
        f"{module.format(layer)}.weight": shape
        for module, shape in shapes.items()
        for layer in (range(config.num_hidden_layers) if "{}" in module else ("",))
    }


def _rename(module: str, table: dict[str, str]) -> str:
    layer = _LAYER.search(module)
    key = _LAYER.sub("{}", module, count=1)
    if key not in table:
        raise CheckpointError(f"{module!r} is not a module of Phi-3. Known: {', '.join(table)}.")
    return table[key].format(layer.group() if layer else "")
