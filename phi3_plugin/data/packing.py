"""Several documents in one row of fixed length; :mod:`phi3_plugin.data.plan` says which.

With room for 8 tokens, documents of 3, 2 and 5 tokens become two packs::

    tokens     a0 a1 a2 c0 c1 c2 c3 c4      b0 b1  _  _  _  _  _  _
    labels      . a1 a2  . c1 c2 c3 c4       . b1  .  .  .  .  .  .
    input_pos   0  1  2  0  1  2  3  4       0  1  0  0  0  0  0  0
    seq_lens   [3, 5]                       [2, 6]

and, if documents may be split::

    tokens     a0 a1 a2 b0 b1 c0 c1 c2      c3 c4  _  _  _  _  _  _
    labels      . a1 a2  . b1  . c1 c2       . c4  .  .  .  .  .  .
    input_pos   0  1  2  0  1  0  1  2       0  1  0  0  0  0  0  0
    seq_lens   [3, 2, 3]                    [2, 6]

``_`` is padding, ``.`` is not trained on. The first token of a document never is, and neither is
that of a part that a cut has left without what comes before it. So after the shift that the
recipes do, nothing is predicted from one document about the next.
"""

import hashlib
import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX as IGNORED
from torchtune.datasets import PackedDataset
from torchtune.utils import log_rank_zero

from phi3_plugin.data.plan import BUFFER, Plan, plan
from phi3_plugin.errors import DataError

logger = logging.getLogger(__name__)


class Packs(PackedDataset):  # type: ignore[misc]
    """Packs, each made of its documents when it is asked for.

    A stock recipe takes it as torchtune's own packed data set. A pack of which nothing is
    trained, as a cut may leave it, is not among them: it would be a step without a loss.
    """

    def __init__(
        self,
        dataset: Any,
        size: int,
        padding_idx: int = 0,
        *,
        seed: int = 0,
        split_documents: bool = False,
        buffer: int = BUFFER,
    ) -> None:
        """Plan the packs; see :func:`plan`.

        Args:
            dataset: Samples of ``tokens`` and ``labels``. Those of a chat data set are read as
                arrays, others one by one.
            size: Tokens of a pack.
            padding_idx: Fills a pack up.
            seed: Decides the packs and their order.
            split_documents: See :func:`plan`.
            buffer: See :func:`plan`.

        Raises:
            DataError: A document is longer than a pack, or nothing is trained on.
        """
        self.ds, self.max_seq_len, self.padding_idx = dataset, size, padding_idx
        self._choices: dict[str, Any] = {"seed": seed, "buffer": buffer}
        self._choices["split_documents"] = split_documents
        if not hasattr(dataset, "arrays"):
            self.ds = dataset = _Arrays(dataset)
        planned = plan(dataset.lengths, size, **self._choices)
        labelled = planned.summed(self._labelled(planned))
        if not labelled.any():
            raise DataError("there is no token to train on in any pack.")
        kept = np.flatnonzero(labelled)
        if left_out := len(planned) - len(kept):
            message = f"left out {left_out} of {len(planned)} packs: they train nothing"
            log_rank_zero(logger, message, logging.WARNING)
        self.plan, self.labelled = planned.select(kept), labelled[kept].astype(np.int32)
        self.lengths = self.plan.summed(self.plan.lengths).astype(np.int32)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``tokens``, ``labels`` and ``input_pos``, each [size], and ``seq_lens``.

        The padding is one more document, but for its positions: they stay at 0, so that they
        cannot come past the one from which LongRoPE turns every angle of the batch.
        """
        fills = {"tokens": self.padding_idx, "labels": IGNORED, "input_pos": 0}
        pack = {key: np.full(self.max_seq_len, fill, np.int64) for key, fill in fills.items()}
        end, lengths = 0, list[int]()
        for document, start, length in self.documents(index):
            ids, labels = self.ds.arrays(document)
            begin, end = end, end + length
            pack["tokens"][begin:end] = ids[start : start + length]
            pack["labels"][begin + 1 : end] = labels[start + 1 : start + length]
            pack["input_pos"][begin:end] = np.arange(length)
            lengths.append(length)
        if end < self.max_seq_len:
            lengths.append(self.max_seq_len - end)
        pack["seq_lens"] = np.array(lengths, np.int64)
        return {key: torch.from_numpy(values) for key, values in pack.items()}

    def documents(self, index: int) -> list[tuple[int, int, int]]:
        """Return the documents of a pack: index in the data set, first token and length."""
        index = range(len(self))[index]
        here = slice(self.plan.borders[index], self.plan.borders[index + 1])
        values = (self.plan.documents[here], self.plan.starts[here], self.plan.lengths[here])
        return list(zip(*(array.tolist() for array in values), strict=True))

    @property
    def waste(self) -> float:
        """Share of the padding in all packs."""
        return self.plan.waste

    @property
    def fingerprint(self) -> str:
        """A hash of all that the packs hold: the data set's own, and the plan."""
        arrays = (self.plan.documents, self.plan.starts, self.plan.lengths, self.plan.borders)
        settings = f"{self.ds.fingerprint} {self.max_seq_len} {self.padding_idx}"
        digest = hashlib.sha256(settings.encode())
        for array in arrays:
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def hold_out(self, share: float, seed: int) -> tuple["Packs", "Packs"]:
        """Split the documents as their data set does, and pack both parts.

        Args:
            share: Of the documents that is held out.
            seed: Decides which.

        Returns:
            What to train on, and what is held out.
        """
        kept, held = self.ds.hold_out(share, seed)
        return self._packed(kept), self._packed(held)

    def _packed(self, dataset: Any) -> "Packs":
        return Packs(dataset, self.max_seq_len, self.padding_idx, **self._choices)

    def _labelled(self, planned: Plan) -> NDArray[np.int32]:
        counts: NDArray[np.int32] = self.ds.labelled[planned.documents]
        for piece in np.flatnonzero(planned.lengths < self.ds.lengths[planned.documents]):
            _, labels = self.ds.arrays(int(planned.documents[piece]))
            start, length = int(planned.starts[piece]), int(planned.lengths[piece])
            counts[piece] = np.count_nonzero(labels[start + 1 : start + length] != IGNORED)
        return counts


class _Arrays:
    """A data set that offers samples only, read once."""

    def __init__(self, dataset: Any) -> None:
        self._samples = []
        for i in range(len(dataset)):  # torch's data sets have no end that iteration would find
            sample = dataset[i]
            pair = (np.asarray(sample[key], np.int32) for key in ("tokens", "labels"))
            self._samples.append(tuple(pair))
        self.lengths = np.array([len(ids) for ids, _ in self._samples], np.int32)
        counts = [np.count_nonzero(labels[1:] != IGNORED) for _, labels in self._samples]
        self.labelled = np.array(counts, np.int32)

    def arrays(self, index: int) -> tuple[NDArray[np.int32], ...]:
        return self._samples[index]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.lengths.tobytes())
        for array in (array for sample in self._samples for array in sample):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def hold_out(self, share: float, seed: int) -> tuple[Any, Any]:
        raise DataError(
            f"val_fraction: {share} cannot be split off a packed data set that does not say how. "
            "Set dataset_val."
        )
