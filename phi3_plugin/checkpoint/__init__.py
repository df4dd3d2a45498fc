"""Checkpoint folders and adapter files, ours and other people's."""

from typing import Any


def __getattr__(name: str) -> Any:
    # The name that YAMLs have. Its class saves as runs do, which are a layer above this one.
    if name == "Phi3Checkpointer":
        from phi3_plugin.train.stock import Phi3Checkpointer

        return Phi3Checkpointer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
