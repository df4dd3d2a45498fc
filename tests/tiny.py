"""A model of a few thousand random weights, and batches with uneven labels."""

from dataclasses import replace

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from phi3_plugin.models.lora import Linear
from phi3_plugin.models.lora_settings import TARGETS, LoRASettings
from phi3_plugin.models.phi3 import MINI, adapted, decoder

CONFIG = replace(
    MINI,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=161,
    rope=replace(MINI.rope, rotary_dim=16),
)


def new_model(lora: bool = True, **settings: object) -> TransformerDecoder:
    """Build a model, its base weights zero, with adapters of rank 3 if it has any."""
    if not lora:
        return decoder(CONFIG, lambda _, i, o: Linear(i, o))
    keys = {"apply_lora_to_mlp": True, "lora_rank": 3, "lora_alpha": 6, **settings}
    return adapted(CONFIG, LoRASettings(TARGETS, **keys))


def tiny_model(lora: bool = True, **settings: object) -> TransformerDecoder:
    """Build a model with random weights, those of B and of the norms included."""
    model = new_model(lora, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def tiny_batch(lengths: tuple[int, ...] = (9, 4, 7, 17)) -> dict[str, Tensor]:
    """Return rows padded to the longest; the second has no label, the others uneven numbers."""
    generator = torch.Generator().manual_seed(sum(lengths))
    shape = len(lengths), max(lengths)
    tokens = torch.randint(0, CONFIG.vocab_size, shape, generator=generator)
    labels = torch.full(shape, -100)
    for row, length in enumerate(lengths):
        first = length if row == 1 else row + 1
        labels[row, first:length] = tokens[row, first:length]
    return {"tokens": tokens, "labels": labels}


def rows(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return each row as a batch of its own."""
    return [
        {"tokens": tokens[None], "labels": labels[None]}
        for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True)
    ]
