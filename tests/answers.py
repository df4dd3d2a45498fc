"""What transformers and we answer to the same prompts, and how our commands are asked."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.generate import Generator
from phi3_plugin.models import phi3
from phi3_plugin.models.cache import serve
from phi3_plugin.options import Sampling


class Letters:
    """A tokenizer whose token n says the character n; special ones say nothing."""

    special_tokens: ClassVar = {"<|end|>": 148, "<|other|>": 149}

    def __init__(self, stop_tokens: Sequence[int] = ()) -> None:
        self.stop_tokens = list(stop_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        special = self.special_tokens.values()
        return "".join(chr(64 + i) for i in token_ids if i not in special)


def prompts_of(*lengths: int, vocabulary: int = 140, seed: int = 0) -> list[list[int]]:
    """Return random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def theirs(model: nn.Module, prompts: list[list[int]], count: int, **how) -> list[list[int]]:
    """Return what transformers generates, from one batch that is padded on the left."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    given = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(tokens, attention_mask=mask, **{**given, **how})
    return out[:, longest:].tolist()


def served(folder: Path) -> nn.Module:
    """Return our base model of a folder, ready to answer."""
    model = phi3(folder)
    model.load_state_dict(load_base_weights(folder))
    serve(model)
    return model


def ours(model: nn.Module, prompts: list[list[int]], count: int, **how) -> list[list[int]]:
    """Return what we generate, in the order of the prompts."""
    batch_size, stops = how.pop("batch_size", 8), how.pop("stop_tokens", ())
    sampling = Sampling(max_new_tokens=count, **how)
    generator = Generator(model, Letters(stops), sampling, batch_size=batch_size)
    answers = sorted(generator.answers(prompts), key=lambda answer: answer.index)
    return [list(answer.tokens) for answer in answers]


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """Return the statistic of what was counted against what was expected, and its freedom."""
    usual = expected >= 5  # as the test needs it; the rest is taken together
    pairs = [(counts[usual], expected[usual])]
    if expected[~usual].sum() >= 5:
        pairs.append((counts[~usual].sum()[None], expected[~usual].sum()[None]))
    squares = sum(((c - e) ** 2 / e).sum().item() for c, e in pairs)
    freedom = sum(len(c) for c, _ in pairs) - 1
    return squares, freedom


def keys(**more):
    """Return the keys of `generate` or `chat` over the checkpoint ``base``."""
    return {"checkpoint_dir": "base", "dtype": "fp32", "device": "cpu", "max_new_tokens": 6, **more}


def without_system(base, folder):
    """Copy a checkpoint; in the copy, the chat template leaves system messages out."""
    shutil.copytree(base, folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    start, end = (settings["chat_template"].index(word) for word in ("{% if m", "{% elif m"))
    template = settings["chat_template"]
    settings["chat_template"] = template[:start] + "{% if m" + template[end + 9 :]
    file.write_text(json.dumps(settings))
    return folder
