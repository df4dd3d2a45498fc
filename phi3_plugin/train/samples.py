"""Answers to a few fixed questions, before and after training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

LONGEST = 64
"""Tokens of an answer; each costs a whole forward pass, since training keeps no cache."""


@torch.no_grad()
def answers(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], device: torch.device
) -> list[str]:
    """Answer each prompt greedily; every process of a sharded model must ask.

    Args:
        model: torchtune's decoder; evaluated, then trained on.
        tokenizer: Renders a conversation and knows where an answer stops.
        prompts: What the user says.
        device: Of the model.
    """
    model.eval()
    texts = [_answer(model, tokenizer, prompt, device) for prompt in prompts]
    model.train()
    return texts


def _answer(model: nn.Module, tokenizer: Any, prompt: str, device: torch.device) -> str:
    from torchtune.data import Message

    sample = tokenizer({"messages": [Message(role="user", content=prompt)]}, inference=True)
    tokens: list[int] = list(sample["tokens"])
    said: list[int] = []
    while len(said) < LONGEST and (not said or said[-1] not in tokenizer.stop_tokens):
        logits = model(torch.tensor([tokens + said], device=device))
        said.append(int(logits[0, -1].argmax()))
    stopped = bool(said) and said[-1] in tokenizer.stop_tokens
    return str(tokenizer.decode(said[:-1] if stopped else said))
