"""Checkpoint folders with a tokenizer of a few hundred tokens, built like Phi-3's."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder

ROLES = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
BLOCK = "{{'<|%s|>\n' + message['content'] + '<|end|>\n'}}"
TAIL = "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"


def template(system_if: str = "message['role'] == 'system'") -> str:
    return (
        "{% for message in messages %}"
        + ("{% if " + system_if + " %}" + BLOCK % "system")
        + ("{% elif message['role'] == 'user' %}" + BLOCK % "user")
        + ("{% elif message['role'] == 'assistant' %}" + BLOCK % "assistant")
        + "{% endif %}{% endfor %}"
        + TAIL
    )


MINI = template()
PHI35 = template("message['role'] == 'system' and message['content']")
MEDIUM = (
    "{% for message in messages %}{% if (message['role'] == 'user') %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n<|assistant|>\n'}}"
    "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
)


def backend(*, rstrip: bool = True) -> Tokenizer:
    """The ids are not Phi-3's, so nothing can rely on those."""
    pairs = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "▁"), ("e", "r"), ("\n", "\n")]
    letters = ["▁", "\n", *map(chr, range(33, 127)), "é", "中"]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    texts += [*letters, *("".join(pair) for pair in pairs)]
    bpe = models.BPE(
        vocab={text: i for i, text in enumerate(dict.fromkeys(texts))},
        merges=pairs,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    plain = [AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "<|endoftext|>")]
    roles = [AddedToken(text, normalized=False, rstrip=rstrip) for text in ROLES]
    tokenizer.add_special_tokens([*plain, *roles])
    tokenizer.add_tokens([AddedToken("</s>", normalized=False, rstrip=True)])
    return tokenizer


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes the key."""
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    write_json(file, {key: value for key, value in content.items() if value is not None})


def write_checkpoint(folder: Path, *, chat_template: str = MINI, rstrip: bool = True) -> Path:
    """Write the files a tokenizer is read from; generation_config.json is not among them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = backend(rstrip=rstrip)
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    added = tokenizer.get_added_tokens_decoder()
    settings = {
        "added_tokens_decoder": {i: {f: getattr(t, f) for f in flags} for i, t in added.items()},
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "LlamaTokenizer",
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "config.json", {"model_type": "phi3", "vocab_size": 448})
    return folder


def model() -> TransformerDecoder:
    """The shell that all decoders of torchtune share, to run batches through."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 448, "embed_dim": 16, "intermediate_dim": 32, "max_seq_len": 64}
    return llama3_2(num_layers=2, num_heads=2, num_kv_heads=1, **sizes).eval()
