"""Tiny models of every kind in the family, and adapters on them, as PEFT makes and saves them.

What a model and its adapter compute is taken from PEFT's model before anything is saved.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from phi3_plugin.recipes.phi3_demo_checkpoint import build_checkpoint
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from benchmarks.served.jobs import Answer, greedy
from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.base import A, B, fused_name, module_sizes, part_rows, to_hf
from phi3_plugin.config import read_config

STEPS = 24
ORIGINAL = 256
"""Up to here LongRoPE has its short factors; llama.cpp counts contexts in steps of so many."""

WINDOW = 48


def longrope(rotary: int) -> dict[str, Any]:
    """Return the keys of a model with two kinds of factors."""
    factors = [1.0 + i / rotary for i in range(rotary // 2)]
    return {
        "max_position_embeddings": 16 * ORIGINAL,
        "original_max_position_embeddings": ORIGINAL,
        "sliding_window": 64 * ORIGINAL,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1 + factor / 16 for factor in factors],
            "long_factor": [factor * 2 for factor in factors],
        },
    }


PHI_4_MINI = {
    **longrope(96),
    "hidden_size": 768,  # three heads to one key, as published; onnxruntime errs at three in all
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
}
PROMPT, LONG_PROMPT = 12, ORIGINAL + 6

# Name -> what differs from a small Phi-3-mini-4k, and tokens of the prompt. The width of a head,
# the part of it that is turned and the number of query heads for a key are the published ones.
BASES: dict[str, tuple[dict[str, Any], int]] = {
    "mini-4k": ({}, PROMPT),
    "mini-4k, beyond its window": ({}, WINDOW + 20),
    "mini-128k": (longrope(96), PROMPT),
    "mini-128k, beyond 4k": (longrope(96), LONG_PROMPT),
    "3.5-mini": (
        {**longrope(96), "rms_norm_eps": 1e-6, "rope_theta": 20000.0},
        PROMPT,
    ),
    "medium-4k": (
        {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1},
        PROMPT,
    ),
    "Phi-4-mini": (PHI_4_MINI, PROMPT),
    "Phi-4-mini, beyond 4k": (PHI_4_MINI, LONG_PROMPT),
}


FOUR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["qkv_proj", "o_proj"]},
    "all targets": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": FOUR,
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {r".*layers\.1\.mlp\.down_proj": 3},
    },
    "rsLoRA": {"target_modules": FOUR, "use_rslora": True, "r": 6, "lora_alpha": 7},
    "DoRA": {"target_modules": FOUR, "use_dora": True},
    "parts": {},
    "head": {"target_modules": [*FOUR, "lm_head"]},
    "embedding": {"target_modules": [*FOUR, "embed_tokens"]},
    "rows of tokens": {
        "target_modules": FOUR,
        "trainable_token_indices": {"embed_tokens": [40, 77]},
    },
    "head and embedding trained whole": {
        "target_modules": FOUR,
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
}
"""What LoraConfig is told; `save_parts` makes what it cannot say."""


@dataclass
class Model:
    """A base, an adapter and what they compute together."""

    base: Path
    adapter: Path
    prompt: list[int]
    reference: Answer
    rank: int = 4
    """The largest of the file."""
    own: Adapter | None = None
    """One that is not PEFT's, but made here."""

    @property
    def context(self) -> int:
        """For how many tokens a runtime reckons: those of LongRoPE's short factors, or more."""
        return 2 * ORIGINAL if len(self.prompt) > ORIGINAL else ORIGINAL


def write_base(folder: Path, name: str) -> Path:
    """Write one of `BASES` as a checkpoint with a tokenizer."""
    build_checkpoint(folder, words=["one"])
    for shard in folder.glob("model*"):
        shard.unlink()
    write_sentencepiece(folder)
    keys = json.loads((folder / "config.json").read_text())
    keys |= {
        "hidden_size": 192,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": WINDOW,
        **BASES[name][0],
    }
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**deepcopy(keys))).float()  # it changes them
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of ones would hide one that is not applied
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.08)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(keys, indent=2))
    return folder


def write_sentencepiece(folder: Path) -> None:
    """Write tokenizer.model, from which llama.cpp's converter takes the vocabulary."""
    pieces = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=False)
    model = sentencepiece_model_pb2.ModelProto()
    kinds = model.SentencePiece
    for text, i in sorted(pieces.items(), key=lambda item: item[1]):
        kind = kinds.BYTE if text.startswith("<0x") else kinds.NORMAL
        kind = {0: kinds.UNKNOWN, 1: kinds.CONTROL, 2: kinds.CONTROL}.get(i, kind)
        model.pieces.add(piece=text, score=-float(i), type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(pieces)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def prompt_of(base: str) -> list[int]:
    """Return the ids of a prompt for one of `BASES`, without special tokens."""
    return [3 + (37 * i) % 300 for i in range(BASES[base][1])]


def reference(model: torch.nn.Module, prompt: list[int]) -> Answer:
    """Return what a model of transformers chooses, and its logits."""

    def logits_of(ids: list[int]) -> list[float]:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), use_cache=False)
        return out.logits[0, -1].tolist()

    return greedy({"prompt": prompt, "steps": STEPS}, logits_of)


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
Prepare = Callable[[torch.nn.Module, LoraConfig], object]


def save_adapter(
    folder: Path,
    base: Path,
    prompt: list[int],
    change: Change | None = None,
    rows: int = 0,
    prepare: Prepare | None = None,
    **keys: Any,
) -> Model:
    """Let PEFT make an adapter of random values and save it.

    Args:
        folder: To create.
        base: A checkpoint.
        prompt: Token ids.
        change: Alters the content of adapter_config.json and the tensors afterwards.
        rows: To which the vocabulary is resized before, if it is.
        prepare: Alters the model before PEFT starts the adapter on it.
        keys: For LoraConfig.
    """
    defaults = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        loaded.resize_token_embeddings(rows)
    torch.manual_seed(1)
    config = LoraConfig(**{**defaults, **keys})
    if prepare:
        prepare(loaded, config)
    model = get_peft_model(loaded, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    found = Model(base, folder, prompt, reference(model, prompt), rank=keys.get("r", 4))
    if change:
        file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        said, tensors = json.loads(file.read_text()), load_file(weights)
        change(said, tensors)
        file.write_text(json.dumps(said, indent=2))
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        save_file(tensors, weights, {"format": "pt"})
    return found


def save_parts(folder: Path, base: Path, prompt: list[int]) -> Model:
    """Make an adapter of random values on parts of the fused layers, which PEFT does not know.

    What it computes is transformers' model with the product of its matrices in those rows.
    """
    config, scale = read_config(base), 2.0
    sizes = module_sizes(config)
    parts = ("attn.qkv_proj.q_proj", "attn.qkv_proj.v_proj", "mlp.gate_up_proj.up_proj")
    modules = [f"layers.{n}.{part}" for n in range(config.num_hidden_layers) for part in parts]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    weights, tensors = dict(model.named_parameters()), {}
    torch.manual_seed(1)
    for module in modules:
        out, into = sizes[module]
        a, b = torch.randn(4, into) * 0.1, torch.randn(out, 4) * 0.1
        tensors |= {module + A: a, module + B: b}
        whole = fused_name(module)
        with torch.no_grad():
            weights[to_hf(f"{whole}.weight")][part_rows(whole, config)[module]] += scale * b @ a
    own = Adapter(tensors, dict.fromkeys(modules, scale))
    return Model(base, folder, prompt, reference(model, prompt), rank=16, own=own)
