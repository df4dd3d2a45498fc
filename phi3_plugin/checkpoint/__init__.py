"""Checkpoints in, adapters out."""

from phi3_plugin.checkpoint.torchtune import Phi3Checkpointer

__all__ = ["Phi3Checkpointer"]
