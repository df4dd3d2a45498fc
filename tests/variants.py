"""A checkpoint folder for every revision of the family, and for templates that nobody published.

The templates are published facts. The tokenizers are small ones with the published special tokens
and flags, Phi-4's those of microsoft/onnxruntime-extensions, test/data/phi-4-base; the flags of its
first revision were not at hand, so it has none.
"""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.trainers import BpeTrainer

from tests.assets import assets_dir

ROLES = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
BLOCK = "{{'<|%s|>\n' + message['content'] + '<|end|>\n'}}"
OPEN_OR_END = (
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def template(system_if: str = "message['role'] == 'system'") -> str:
    return (
        "{% for message in messages %}"
        + ("{% if " + system_if + " %}" + BLOCK % "system")
        + ("{% elif message['role'] == 'user' %}" + BLOCK % "user")
        + ("{% elif message['role'] == 'assistant' %}" + BLOCK % "assistant")
        + "{% endif %}{% endfor %}"
        + OPEN_OR_END
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


APRIL = "{{ bos_token }}" + MEDIUM
"""Of the launch, too."""
PHI4_MINI = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message "
    "and message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] "
    "+ '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + "
    "message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
SYSTEM4 = "'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'"
USER4 = SYSTEM4.replace("system", "user")
OPEN4 = "'<|im_start|>assistant<|im_sep|>'"
PHI4 = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}{{" + SYSTEM4 + "}}"
    "{% elif (message['role'] == 'user') %}{{" + USER4 + "}}"
    "{% elif (message['role'] == 'assistant') %}{{" + OPEN4 + " + message['content'] + '<|im_end|>'"
    "}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ " + OPEN4 + " }}{% endif %}"
)
PHI4_FIRST = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}{{" + SYSTEM4 + "}}"
    "{% elif (message['role'] == 'user') %}{{" + USER4 + " + " + OPEN4 + "}}"
    "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|im_end|>'}}"
    "{% endif %}{% endfor %}"
)
PHI4_REASONING = (
    "<|im_start|>system<|im_sep|>You are Phi, a language model trained by Microsoft to help users. "
    "Your role as an assistant involves thoroughly exploring questions through a systematic "
    "thinking process before providing the final precise and accurate solutions. This requires "
    "engaging in a comprehensive cycle of analysis, summarizing, exploration, reassessment, "
    "reflection, backtracing, and iteration to develop well-considered thinking process. Please "
    "structure your response into two main sections: Thought and Solution using the specified "
    "format: <think> {Thought section} </think> {Solution section}. In the Thought section, detail "
    "your reasoning process in steps. Each step should include detailed considerations such as "
    "analysing questions, summarizing relevant findings, brainstorming new ideas, verifying the "
    "accuracy of the current steps, refining any errors, and revisiting previous steps. In the "
    "Solution section, based on various attempts, explorations, and reflections from the Thought "
    "section, systematically present the final solution that you deem correct. The Solution "
    "section should be logical, accurate, and concise and detail necessary steps needed to reach "
    "the conclusion. Now, try to solve the following question through the above guidelines:"
    "<|im_end|>{% for message in messages %}{% if (message['role'] == 'user') %}{{" + USER4 + "}}"
    "{% elif (message['role'] == 'assistant') %}{{" + OPEN4 + "}}{% generation %}"
    "{{message['content'] + '<|im_end|>'}}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ " + OPEN4 + " }}{% endif %}"
)
"""Of Phi-4-reasoning and -plus, as a user's data set class for verl quotes it whole; other copies
in public repositories agree. Its tokenizer was not at hand; two of Phi-4's placeholders became
<think> and </think> by the technical report (arXiv 2504.21318)."""
PHI4_MINI_REASONING = (
    "{{ '<|system|>Your name is Phi, an AI math expert developed by Microsoft.' }}{% for message "
    "in messages %}{% if message['role'] == 'system' %} {{ message['content'] }}{% if 'tools' in "
    "message and message['tools'] is not none %}{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}"
    "{% endif %}{% endif %}{% endfor %}{{ '<|end|>' }}{% for message in messages %}{% if "
    "message['role'] != 'system' %}{{ '<|' + message['role'] + '|>' + message['content'] + "
    "'<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
"""Source: microsoft/onnxruntime-extensions, test/data/phi-4-mini-reasoning/chat_template.jinja."""
HEAD_THINKING = (
    "{% for message in messages %}{% if message.role == 'user' %}{{" + USER4 + "}}{% else %}"
)
TAIL_THINKING = "{% endif %}{% endfor %}{% if add_generation_prompt %}{{" + OPEN4 + "}}{% endif %}"
WRITES = (
    HEAD_THINKING + "{{" + OPEN4 + "}}{% if message.reasoning_content %}{{ '<think>\n' + "
    "message.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ message.content + '<|im_end|>' }}"
    + TAIL_THINKING
)
"""Invented for Phi-4's tokens: writes every thought."""
FORGETS = (
    "{%- set ns = namespace(last=0) %}{%- for message in messages %}{%- if message.role == 'user' "
    "%}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    + HEAD_THINKING
    + "{{"
    + OPEN4
    + "}}"
    "{%- set thought = '' %}{%- if message.reasoning_content is string %}"
    "{%- set thought = message.reasoning_content %}{%- endif %}"
    "{%- if loop.index0 > ns.last and thought %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + message.content }}"
    "{%- else %}{{ message.content }}{%- endif %}{{ '<|im_end|>' }}" + TAIL_THINKING
)
"""Thoughts of earlier answers are left out, as by Qwen3's."""
CHATML = (
    "{% set ns = namespace(first=true) %}\n{%- for m in messages %}\n"
    "    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}"
)
"""Invented for the family: a header ends in text, with which what is said may merge."""
TRIMMING = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ '<|assistant|>' + message.content | trim + ' ' + eos_token }}"
    "{% elif message.content | trim %}"
    "{{ '<|' + message.role + '|> ' + message.content.strip() + ' <|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Invented: white space goes, and what is blank with it."""

O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|"
    r"'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LINES = [
    "the other brother said that the weather there is rather good, then they gathered together",
    "one\n\n\ntwo\n\n  three\n   four    five 1234 56 <html> [x] {{ y }} 中文 é 😀😀 \t\n \n the",
]
MINI_TOKENS = ("<|assistant|>", "<|end|>", "<|user|>", "<|system|>")
MINI_TOOLS = ("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>")
PHI4_TOKENS = ("<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|fim_prefix|>")
THOUGHT_TOKENS = ("<think>", "</think>")


def byte_level(special: Sequence[str], plain: Sequence[str] = (), **flags: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        LINES * 3, BpeTrainer(initial_alphabet=alphabet, vocab_size=400, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, **flags) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False, **flags) for t in plain])
    return tokenizer


def phi4_mini(folder: Path, *, chat_template: str = PHI4_MINI) -> Path:
    backend = byte_level(MINI_TOKENS, MINI_TOOLS, rstrip=True)
    names = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "pad", "unk")}
    return write_byte_level(folder, backend, chat_template, names)


def phi4(
    folder: Path,
    *,
    chat_template: str = PHI4,
    flags: bool = True,
    tokens: Sequence[str] = PHI4_TOKENS,
) -> Path:
    backend = byte_level(tokens, lstrip=flags, rstrip=flags)
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|fim_prefix|>"}
    # A named token that is only in the vocabulary, as Phi-4's unknown token may be
    return write_byte_level(folder, backend, chat_template, {**names, "unk_token": "the"})


def write_byte_level(folder: Path, backend: Tokenizer, template: str, names: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": template, "tokenizer_class": "GPT2Tokenizer", **names}
    write_json(folder / "tokenizer_config.json", settings)
    size = backend.get_vocab_size()
    write_json(folder / "config.json", {"model_type": "phi3", "vocab_size": size + 3})
    return folder


def published(folder: Path, *, name: str) -> Path:
    return shutil.copytree(assets_dir() / "models" / name, folder)


def rebuilt(folder: Path, *, rstrip: bool) -> Path:
    """April's files, and with no ``rstrip`` those of the launch, from Phi-3-mini-4k's."""
    published(folder, name="phi3-mini-4k-instruct")
    edit_json(folder / "tokenizer_config.json", chat_template=APRIL)
    if not rstrip:
        for file, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", DECODER)):
            tokens = json.loads((folder / file).read_text(encoding="utf-8"))[key]
            for token in tokens.values() if isinstance(tokens, dict) else tokens:
                token["rstrip"] = False
            edit_json(folder / file, **{key: tokens})
    return folder


DECODER = "added_tokens_decoder"
BUILT = {
    "launch": partial(write_checkpoint, chat_template=APRIL, rstrip=False),
    "april": partial(write_checkpoint, chat_template=APRIL),
    "mini": partial(write_checkpoint, chat_template=MINI),
    "3.5": partial(write_checkpoint, chat_template=PHI35),
    "medium": partial(write_checkpoint, chat_template=MEDIUM),
    "phi4-mini": phi4_mini,
    "phi4": phi4,
    "phi4-first": partial(phi4, chat_template=PHI4_FIRST, flags=False),
    "phi4-reasoning": partial(
        phi4, chat_template=PHI4_REASONING, tokens=(*PHI4_TOKENS, *THOUGHT_TOKENS)
    ),
    "phi4-mini-reasoning": partial(phi4_mini, chat_template=PHI4_MINI_REASONING),
    "invented-chatml": partial(phi4, chat_template=CHATML, flags=False),
    "invented-trimming": partial(write_checkpoint, chat_template=TRIMMING, rstrip=False),
}
FROM_ASSETS = {
    "phi3-mini@launch-2024-04-23": partial(rebuilt, rstrip=False),
    "phi3-mini-4k@2024-04": partial(rebuilt, rstrip=True),
    "phi3-mini-128k@2024-06": partial(published, name="phi3-mini-128k-instruct"),
    "phi3-mini-4k@2024-07": partial(published, name="phi3-mini-4k-instruct"),
    "phi3.5-mini": partial(published, name="phi3.5-mini-instruct"),
    "phi3-medium-4k": partial(published, name="phi3-medium-4k-instruct"),
}
"""By the names of the recorded ids."""


ENDS = {"invented-trimming": "<|endoftext|>"} | dict.fromkeys(
    ("phi4", "phi4-first", "phi4-reasoning", "invented-chatml"), "<|im_end|>"
)
"""The token that ends a turn of the assistant, where it is not ``<|end|>``."""
