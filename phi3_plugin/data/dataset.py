"""Tokenized conversations of a store: all of them, some, some several times."""

import hashlib
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from phi3_plugin.data.findings import Findings
from phi3_plugin.data.selection import held_out
from phi3_plugin.data.store import Store

IGNORED = -100
"""Label of a token that the loss does not count."""


class ChatDataset(Dataset[dict[str, list[int]]]):
    """Tokenized conversations, read from a store one by one."""

    def __init__(self, store: Store, chosen: NDArray[np.int64]) -> None:
        """Choose samples of a store, [N]; see :func:`chat_dataset`."""
        self.store, self.chosen = store, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return ``tokens`` and ``labels``, each [S].

        Labels stand at their own token's position (the recipe shifts them), and are -100 where
        not trained. The first is always -100, so in a pack nothing is predicted across the
        border of two conversations.
        """
        tokens, labels = self.arrays(index)
        return {"tokens": tokens.tolist(), "labels": labels.tolist()}

    def arrays(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return tokens and labels as arrays, each [S]."""
        tokens = self.store.read(int(self.chosen[index]))
        return tokens.ids, np.where(tokens.trained, tokens.ids, np.int32(IGNORED))

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample, [N]."""
        return self._column("length")

    @property
    def labelled(self) -> NDArray[np.int32]:
        """Tokens of each sample that are trained on, [N]."""
        return self._column("labelled")

    @property
    def full(self) -> NDArray[np.int32]:
        """Tokens of each sample before it was cut, [N]."""
        return self._column("full")

    @property
    def groups(self) -> NDArray[np.uint64]:
        """Samples of equal value must not be split between training and validation, [N]."""
        return self._column("group")

    @property
    def lost(self) -> NDArray[np.int32]:
        """Tokens of each conversation that was dropped because of its length."""
        return self.store.lost

    @property
    def findings(self) -> Findings:
        """What was noticed about the rows, also about those that gave no sample."""
        return self.store.findings

    @property
    def rows(self) -> int:
        """Rows that were read."""
        return self.store.rows

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens and labels in their order."""
        digest = hashlib.sha256(self.store.digest.encode())
        digest.update(self.chosen.tobytes())
        return str(digest.hexdigest()[:16])

    def places(self, index: int) -> str:
        """Return where a sample was read, as in ``chats.jsonl:7``."""
        return self.store.places[int(self.chosen[index])]

    def select(self, indices: NDArray[np.int64]) -> "ChatDataset":
        """Return the data set of some of the samples, in the given order."""
        return ChatDataset(self.store, self.chosen[indices])

    def hold_out(self, share: float, seed: int) -> tuple["ChatDataset", "ChatDataset"]:
        """Split into what is trained on and what is held out, groups whole.

        Args:
            share: Of the samples that is held out.
            seed: Decides which.

        Raises:
            DataError: Nothing would be left to train on.
        """
        # Once each: a weight is how often a sample is trained on
        samples = np.unique(self.chosen)
        held = samples[held_out(self.store.samples["group"][samples], share, seed)]
        kept = self.select(np.flatnonzero(~np.isin(self.chosen, held)))
        return kept, ChatDataset(self.store, held)

    def _column(self, name: str) -> NDArray[Any]:
        values: NDArray[Any] = self.store.samples[name][self.chosen]
        return values
