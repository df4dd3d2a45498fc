"""Write a tiny Phi-3 checkpoint folder, laid out file for file like the published ones.

The weights are random, so the model knows nothing; all the rest is what a download
holds: ``config.json``, two safetensors shards with their index, and a tokenizer with
Phi-3's special tokens and chat template. Only sizes and token ids differ.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

# Phi-3's own order, ids and flags: (text, rstrip). A newline after an rstrip token vanishes.
FIRST_TOKENS = [("<unk>", False), ("<s>", False), ("</s>", True)]
ADDED_TOKENS = [
    ("<|endoftext|>", False),
    ("<|assistant|>", True),
    *((f"<|placeholder{n}|>", True) for n in range(1, 5)),
    ("<|system|>", True),
    ("<|end|>", True),
    *((f"<|placeholder{n}|>", True) for n in range(5, 7)),
    ("<|user|>", True),
]
SPECIAL_TOKENS = [*FIRST_TOKENS, *ADDED_TOKENS]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

HIDDEN, INTERMEDIATE, LAYERS, HEADS = 256, 512, 4, 8
CONTEXT = 512
WEIGHT_STD = 0.06
"""Published Phi-3 starts from 0.02; at this width a base that small floors the loss."""


def build_checkpoint(folder: Path, *, words: list[str], layers: int = LAYERS) -> None:
    """Write a checkpoint folder that torchtune, transformers and this package load.

    Equal words give equal files.

    Args:
        folder: Where to write; created with its parents.
        words: Words that become one token each, beside the printable characters.
        layers: How many the model has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(words)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {text: tokenizer.token_to_id(text) for text, _ in SPECIAL_TOKENS}
    unk, bos, eos = "<unk>", "<s>", "<|endoftext|>"
    roles = {"bos": bos, "eos": eos, "pad": eos, "unk": unk}
    config = {
        "_name_or_path": "phi3-demo",
        "architectures": ["Phi3ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": ids[bos],
        "embd_pdrop": 0.0,
        "eos_token_id": ids[eos],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": CONTEXT,
        "model_type": "phi3",
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": HEADS,
        "original_max_position_embeddings": CONTEXT,
        "pad_token_id": ids[eos],
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": CONTEXT - 1,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.39.3",
        "use_cache": True,
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,  # rounded up like Phi-3's
    }
    files: dict[str, dict[str, Any]] = {
        "config.json": config,
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": ids[bos],
            "eos_token_id": [ids[eos], ids["<|assistant|>"], ids["<|end|>"]],  # stops at any
            "pad_token_id": ids[eos],
            "transformers_version": "4.39.3",
        },
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(ids[text]): {**token(text, rstrip), "special": text != "</s>"}
                for text, rstrip in SPECIAL_TOKENS
            },
            "bos_token": bos,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": eos,
            "legacy": False,
            "model_max_length": CONTEXT,
            "pad_token": eos,
            "padding_side": "left",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": unk,
            "use_default_system_prompt": False,
        },
        "special_tokens_map.json": {
            f"{role}_token": token(text, rstrip=False) for role, text in roles.items()
        },
        "added_tokens.json": {text: ids[text] for text, _ in ADDED_TOKENS},
    }
    for name, content in files.items():
        write_json(folder / name, content)
    write_shards(folder, random_weights(config))


def token(text: str, rstrip: bool) -> dict[str, Any]:
    """Return an added token as tokenizer files describe it."""
    flags = {"lstrip": False, "normalized": False, "rstrip": rstrip, "single_word": False}
    return {"content": text, **flags}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def build_tokenizer(words: list[str]) -> Tokenizer:
    """Return a byte-fallback BPE with Phi-3's structure and a vocabulary of a few hundred.

    Args:
        words: Each becomes one token, spelled together from the left with its space before it.
    """
    characters = ["▁", *(chr(c) for c in range(0x21, 0x7F))]
    vocab = [text for text, _ in FIRST_TOKENS] + [f"<0x{byte:02X}>" for byte in range(256)]
    spelled = [f"▁{word}" for word in words]
    # From the left: (▁, a), (▁a, n), and so on
    pairs = [(word[:end], word[end]) for word in spelled for end in range(1, len(word))]
    merges = list(dict.fromkeys(pairs))
    vocab += ["".join(pair) for pair in merges] + characters
    ids = {text: i for i, text in enumerate(vocab)}
    bpe = models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A:0 $B:1")
    for text, rstrip in SPECIAL_TOKENS:
        token = AddedToken(text, rstrip=rstrip, normalized=False, special=text != "</s>")
        # </s> is an ordinary added token in Phi-3, all others are special.
        (tokenizer.add_tokens if text == "</s>" else tokenizer.add_special_tokens)([token])
    return tokenizer


def random_weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return random fp32 weights under the published names, of the sizes in config.json."""
    generator = torch.Generator().manual_seed(0)
    dim, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * WEIGHT_STD

    weights = {"model.embed_tokens.weight": draw(vocab, dim)}
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        weights[f"{layer}.self_attn.qkv_proj.weight"] = draw(3 * dim, dim)
        weights[f"{layer}.self_attn.o_proj.weight"] = draw(dim, dim)
        weights[f"{layer}.mlp.gate_up_proj.weight"] = draw(2 * inner, dim)
        weights[f"{layer}.mlp.down_proj.weight"] = draw(dim, inner)
        weights[f"{layer}.input_layernorm.weight"] = torch.ones(dim)
        weights[f"{layer}.post_attention_layernorm.weight"] = torch.ones(dim)
    return weights | {"model.norm.weight": torch.ones(dim), "lm_head.weight": draw(vocab, dim)}


def write_shards(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write the weights as two safetensors shards with ``model.safetensors.index.json``."""
    names, index = list(weights), {}
    for n, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{n:05d}-of-00002.safetensors"
        save_file({k: weights[k] for k in part}, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
    size = sum(w.numel() * w.element_size() for w in weights.values())
    content = {"metadata": {"total_size": size}, "weight_map": index}
    write_json(folder / "model.safetensors.index.json", content)
