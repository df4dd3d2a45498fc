"""Which layers can have an adapter, and how a recipe names them."""

import re

TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The linear layers of one Phi-3 block, under Hugging Face's names."""

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What the fused ones hold, in the order of their rows, under the names of HF's Llama."""

FUSED = {part: fused for fused, parts in PARTS.items() for part in parts}

MLP_TARGETS = TARGETS[2:]

HEAD, EMBEDDING = "lm_head", "embed_tokens"

ALIASES = {"output": HEAD, "tok_embeddings": EMBEDDING}
"""torchtune's names, which are those of our modules, for Hugging Face's."""

SYNONYMS = {
    **dict.fromkeys(("output_proj", "out_proj"), "o_proj"),
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}
"""Names people know from other models, and ours."""


_NUMBERED = re.compile(r"(?:layers\.)?(\d+)\.(\w+)")


def place(key: str) -> tuple[int | None, str]:
    """Return layer and target of a pattern's key: ``qkv_proj``, ``3.qkv_proj``, ``output``.

    The layer is None where the key means all of them.
    """
    if numbered := _NUMBERED.fullmatch(key):
        return int(numbered[1]), numbered[2]
    return None, ALIASES.get(key, key)
