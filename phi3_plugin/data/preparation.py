"""From conversations to a store of tokens: rendered here, encoded on all cores beside it.

Only a few batches are held at once, so memory does not grow with the data.
"""

import gc
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from phi3_plugin.data import findings as f
from phi3_plugin.data.encoder import Batch, Tokens, joined
from phi3_plugin.data.layout import Rendered
from phi3_plugin.data.lessons import Lesson
from phi3_plugin.data.store import StoreWriter
from phi3_plugin.data.tokenizer import Phi3Tokenizer
from phi3_plugin.data.truncation import cut, keep_end
from phi3_plugin.data.turns import Chat, Turn, Written
from phi3_plugin.errors import DataError

BATCH = 1024, 1_000_000
"""Conversations, or characters, that are encoded at once: enough for all cores, little to hold."""

WAITING = 2
"""Batches that are being encoded while the next is rendered."""


class Read(NamedTuple):
    """A row that was read."""

    where: str
    source: int
    row: int
    group: int
    """Rows of one group stay together; uint64."""
    chat: Chat


class _Chat(NamedTuple):
    """A row that was rendered."""

    read: Read
    rendered: Rendered


@dataclass(frozen=True)
class Preparation:
    """How conversations become tokens."""

    tokenizer: Phi3Tokenizer
    lesson: Lesson
    truncate: str
    """One of :data:`phi3_plugin.data.truncation.TRUNCATE`."""
    writes_calls: bool = False
    """Whether special tokens in messages may be those of ``dataset.tool_calls``."""

    def write(self, rows: Iterable[Read | tuple[str, str, str]], writer: StoreWriter) -> None:
        """Tokenize rows into a store.

        Args:
            rows: Rows that were read, or kind, place and reason of one that gives no sample.
            writer: Takes samples and findings.
        """
        waiting = deque[tuple[list[_Chat], Future[Batch]]]()
        gc.freeze()  # Or each collection would walk over all that was imported
        with ThreadPoolExecutor(WAITING) as pool:
            try:
                for chats in self._batches(rows, writer):
                    rendered = [chat.rendered for chat in chats]
                    waiting.append((chats, pool.submit(self.tokenizer.encode_chats, rendered)))
                    if len(waiting) > WAITING:
                        self._append(*_finished(waiting), writer)
                while waiting:
                    self._append(*_finished(waiting), writer)
            finally:
                for _, future in waiting:
                    future.cancel()
                gc.unfreeze()

    def _batches(
        self, rows: Iterable[Read | tuple[str, str, str]], writer: StoreWriter
    ) -> Iterator[list[_Chat]]:
        chats, size = list[_Chat](), 0
        for row in tqdm(rows, desc="Tokenizing", unit=" rows", disable=None, leave=False):
            writer.rows += 1
            chat = self._render(row, writer.findings)
            if chat is None:
                continue
            chats.append(chat)
            size += len(chat.rendered.text)
            if len(chats) == BATCH[0] or size > BATCH[1]:
                yield chats
                chats, size = [], 0
        if chats:
            yield chats

    def _render(self, row: Read | tuple[str, str, str], findings: f.Findings) -> _Chat | None:
        if not isinstance(row, Read):
            findings.add(*row)
            return None
        try:
            rendered = self.lesson.render(row.chat, self.tokenizer)
        except DataError as error:
            findings.add(f.UNUSABLE, row.where, str(error))
            return None
        if rendered.dropped:
            findings.add(f.DROPPED_MESSAGE, row.where, ", ".join(rendered.dropped))
        if not isinstance(row.chat, Written) and row.chat[-1].role != "assistant":
            findings.add(f.NO_FINAL_ANSWER, row.where, f"the last turn is {row.chat[-1].role}'s")
        if any(turn.trained and not turn.content.strip() for turn in rendered.turns):
            findings.add(f.BLANK_ANSWER, row.where)
        if self.lesson.passes_over(row.chat):
            findings.add(f.PASSED_OVER, row.where)
        return _Chat(row, rendered)

    def _append(self, chats: Sequence[_Chat], batch: Batch, writer: StoreWriter) -> None:
        for n in np.flatnonzero(batch.special & (not self.writes_calls)).tolist():
            writer.findings.add(f.SPECIAL_IN_TEXT, chats[n].read.where)
        full, batch = batch.lengths, self._fitted(self.lesson.mark(batch), chats)
        counts, ends = np.concatenate([[0], np.cumsum(batch.trained)]), np.cumsum(batch.lengths)
        kept = counts[ends] > counts[ends - batch.lengths]
        for n in np.flatnonzero((full > batch.lengths) | ~kept).tolist():
            self._notice(chats[n].read.where, int(full[n]), bool(kept[n]), writer)
        if not kept.all():
            chats = [chat for chat, keep in zip(chats, kept, strict=True) if keep]
            batch, full = _chosen(batch, kept), full[kept]
        reads = [chat.read for chat in chats]
        columns = {
            "full": full,
            "source": np.array([read.source for read in reads]),
            "row": np.array([read.row for read in reads]),
            "group": np.array([read.group for read in reads], dtype=np.uint64),
        }
        writer.append(batch, [read.where for read in reads], columns)

    def _fitted(self, batch: Batch, chats: Sequence[_Chat]) -> Batch:
        limit = self.tokenizer.max_seq_len
        if limit is None or not (batch.lengths > limit).any():
            return batch
        if self.truncate == "drop":
            parts = batch.split()
            kept = [part.first(0 if len(part.ids) > limit else None) for part in parts]
            return joined(kept, batch.special)
        if self.truncate == "right":
            return cut(batch, limit)
        parts = [
            self._end(chat.rendered, limit) if len(part.ids) > limit else part
            for chat, part in zip(chats, batch.split(), strict=True)
        ]
        return joined(parts, batch.special)

    def _end(self, chat: Rendered, limit: int) -> Tokens:
        def encode(chats: Sequence[Rendered]) -> Batch:
            return self.lesson.mark(self.tokenizer.encode_chats(chats))

        def render(turns: Sequence[Turn]) -> Rendered:
            return self.lesson.write(turns, self.tokenizer)

        try:
            return keep_end(chat, limit, render, encode)
        except DataError:  # The template fails on what is left; nothing of it is trained
            return encode([chat]).split()[0].first(0)

    def _notice(self, where: str, full: int, kept: bool, writer: StoreWriter) -> None:
        limit = self.tokenizer.max_seq_len
        if kept:
            writer.findings.add(f.TRUNCATED, where, f"{full} tokens")
            return
        writer.lose([full])
        if self.truncate == "drop" and limit is not None and full > limit:
            writer.findings.add(f.TOO_LONG, where, f"{full} tokens")
        else:
            writer.findings.add(f.CUT_AWAY, where, f"{full} tokens")


def _finished(
    waiting: deque[tuple[list[_Chat], Future[Batch]]],
) -> tuple[list[_Chat], Batch]:
    chats, future = waiting.popleft()
    return chats, future.result()


def _chosen(batch: Batch, kept: NDArray[np.bool_]) -> Batch:
    tokens = np.repeat(kept, batch.lengths)
    return Batch(batch.ids[tokens], batch.trained[tokens], batch.lengths[kept], batch.special[kept])
