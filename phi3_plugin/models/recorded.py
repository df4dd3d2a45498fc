"""Generation on a GPU: the step of one token a row, recorded once as a CUDA graph.

A step reads every weight once, which takes a large GPU two milliseconds, and Python ten to start
all the kernels for it. A graph starts them at once, always with the same memory. So tokens and
lengths are tensors, every row of the cache takes part, and a query sees all places of its row up to
its own; only a cache that grows needs another graph.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from phi3_plugin.device import pinned
from phi3_plugin.models.cache import Cache, Step
from phi3_plugin.models.nf4 import dequantized_into
from phi3_plugin.models.rope import RotaryEmbedding

logger = logging.getLogger(__name__)


# Shapes: N rows of the cache, C places, V vocabulary
class SteadyStep(Step):
    """One new token for every row of a cache; nothing in Python depends on how long rows are."""

    def __init__(self, cache: Cache, positions: Tensor, rope: RotaryEmbedding) -> None:
        """Work out on the device what every layer needs to know.

        Args:
            cache: With a place for each new token.
            positions: Of the new tokens, ``[N]``; a row that has none ignores what is written to
                the place of its next one.
            rope: Of the model.
        """
        self.cache = cache
        self.layer = 0
        self.single = True
        self.cos, self.sin = rope.turns_alone(positions, cache.keys[0].dtype)
        self.at = positions % cache.window if cache.window else positions
        self.numbers = torch.arange(len(positions), device=positions.device)
        self.longest = cache.places
        places = torch.arange(cache.places, device=positions.device)
        self.seen = (places <= positions[:, None])[:, None, None]  # all of a ring that is full

    def done(self) -> None:
        """Leave the lengths to whoever lets the step be computed."""


class Recorded:
    """Answers with a graph; where none can be recorded, it says so once and is not `usable`."""

    usable = True

    def __init__(self, model: Any, cache: Cache) -> None:
        """Record nothing yet.

        Args:
            model: torchtune's decoder as this package builds it, with all weights on one device.
            cache: Of that model; its rows may be used in other ways in between.
        """
        self.model = model
        self.cache = cache
        device = cache.keys[0].device
        self.inputs = torch.zeros(2, len(cache.lengths), dtype=torch.int64, device=device)
        self._places = 0  # of the cache that is recorded
        self._graph: Any = None
        self._logits: Tensor | None = None
        self._kept: list[Tensor] = []

    def logits(self, tokens: Sequence[int]) -> Tensor | None:
        """Let the first rows go on by a token each; return their logits, ``[tokens, V]``.

        They are valid until the next call. None is that there is no graph, and nothing has changed.
        """
        cache, count = self.cache, len(tokens)
        needed = max(cache.lengths) + 1
        if cache.held(needed) > cache.places:  # doubled, so that few graphs are recorded
            cache.reserve(max(needed, min(2 * needed, self.model.max_seq_len)))
        idle = [0] * (len(cache.lengths) - count)
        given = torch.tensor([[*tokens, *idle], cache.lengths])
        self.inputs.copy_(pinned(given, self.inputs.device), non_blocking=True)
        if self._places != cache.places and not self._record():
            return None
        ends = [length + 1 for length in cache.lengths]
        cache.written = [max(pair) for pair in zip(cache.written, ends, strict=True)]
        self._replay()
        cache.lengths[:count] = ends[:count]
        assert self._logits is not None
        return self._logits[:count]

    def compute(self) -> Tensor:
        """Compute what is recorded: from tokens and positions on the device to ``[N, V]``."""
        tokens, positions = self.inputs
        step = SteadyStep(self.cache, positions, self.model.layers[0].attn.rope)
        logits: Tensor = self.model(tokens[None], step=step)
        return logits

    def _record(self) -> bool:
        self._graph = self._logits = None  # their memory is free for the next
        try:
            self.compute()  # what a first call sets up is no part of a graph; it can be repeated
            # Another model's larger layer would let go of it
            self._kept = dequantized_into()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self.compute()
        except RuntimeError as error:
            self.usable = False
            self._graph = None
            reason = str(error).strip().splitlines() or [type(error).__name__]
            logger.warning("Answers come without a CUDA graph, slower: %s", reason[0])
            return False
        self._places = self.cache.places
        return True

    def _replay(self) -> None:
        self._graph.replay()
