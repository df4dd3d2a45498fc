"""Answers to a few fixed questions while `phi3_plugin.recipes.lora_finetune` trains."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchtune.data import Message

from phi3_plugin.errors import CheckpointError
from phi3_plugin.generate.engine import Generator
from phi3_plugin.generate.sampling import Sampling

TOGETHER = 8
"""Questions that are answered at a time."""

BROKEN = "(no answer: the model's scores are not finite)"
"""Stands where an answer would."""


def answers(model: nn.Module, tokenizer: Any, prompts: Sequence[str], longest: int) -> list[str]:
    """Answer each question greedily; every process of a sharded model must ask.

    Args:
        model: Evaluated, then trained on.
        tokenizer: Renders a conversation and knows where an answer stops.
        prompts: What the user says.
        longest: Tokens of an answer.
    """
    generator = Generator(model, tokenizer, Sampling(max_new_tokens=longest), batch_size=TOGETHER)
    training = model.training
    model.eval()
    # Compiled layers would be compiled again for every length that a cache can have
    try:
        with torch.compiler.set_stance("force_eager"):
            found = list(generator.answers(_asked(tokenizer, prompt) for prompt in prompts))
    except CheckpointError:  # not finite; when a run is given up for that, the run decides
        return [BROKEN] * len(prompts)
    finally:
        model.train(training)
    return [answer.text for answer in sorted(found, key=lambda answer: answer.index)]


def _asked(tokenizer: Any, prompt: str) -> list[int]:
    sample = tokenizer({"messages": [Message(role="user", content=prompt)]}, inference=True)
    return list(sample["tokens"])
