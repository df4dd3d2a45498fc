"""Checkpoints in, adapters out."""

from phi3_plugin.checkpoint.checkpointer import Phi3Checkpointer

__all__ = ["Phi3Checkpointer"]
