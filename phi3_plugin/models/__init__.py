"""Phi-3 for torchtune, under Hugging Face's names for its fused layers."""

from phi3_plugin.models.builders import lora_phi3, phi3

__all__ = ["lora_phi3", "phi3"]
