"""Phi-3 for torchtune, under Hugging Face's names for its fused layers."""

from phi3_plugin.models.phi3 import (
    lora_phi3,
    lora_phi3_mini,
    phi3,
    phi3_mini,
    phi3_reward,
    qlora_phi3,
    qlora_phi3_mini,
)

__all__ = [
    "lora_phi3",
    "lora_phi3_mini",
    "phi3",
    "phi3_mini",
    "phi3_reward",
    "qlora_phi3",
    "qlora_phi3_mini",
]
