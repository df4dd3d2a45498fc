"""The chat data set: rows in, tokens and labels out, ready for torchtune's collate functions."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torchtune.datasets import PackedDataset
from torchtune.utils import log_rank_zero

from phi3_plugin.data.encoder import Tokens
from phi3_plugin.data.files import Row
from phi3_plugin.data.formats import Format, pick_format
from phi3_plugin.data.lessons import NOTHING, Lesson, make_lesson
from phi3_plugin.data.options import check_switch
from phi3_plugin.data.packing import pack
from phi3_plugin.data.sources import read_rows
from phi3_plugin.data.tokenizer import Phi3Tokenizer, warn_of_dropped
from phi3_plugin.data.turns import Turn
from phi3_plugin.errors import ConfigError, DataError

IGNORED = -100
"""Label of a token that the loss does not count."""

BATCH = 1024
"""Conversations tokenized at once: enough to keep all cores busy, little to hold in memory."""

LISTED = 10
"""How many broken rows an error lists, and how many first rows tell the format."""

logger = logging.getLogger(__name__)


class ChatDataset(Dataset[dict[str, list[int]]]):
    """Tokenized conversations, held as one int32 array of ids and one of labels each."""

    def __init__(self, chats: Sequence[Tokens]) -> None:
        """Keep the conversations; see :func:`chat_dataset`."""
        self._samples = [(chat.ids, _labels(chat)) for chat in chats]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return ``tokens`` and ``labels``, each [S].

        Labels stand at their own token's position (the recipe shifts them), and are -100 where
        not trained. The first is always -100, so in a pack nothing is predicted across the
        border of two conversations.
        """
        tokens, labels = self._samples[index]
        return {"tokens": tokens.tolist(), "labels": labels.tolist()}


def chat_dataset(
    tokenizer: Phi3Tokenizer,
    source: str | Path | None = None,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    subset: str | None = None,
    system_prompt: str | None = None,
    train_on: str = "assistant",
    packed: bool = False,
) -> ChatDataset | PackedDataset:
    """Read, check and tokenize conversations.

    Args:
        tokenizer: Tokenizer of the checkpoint.
        source: A .json, .jsonl, .csv (each also as .gz) or .parquet file, a folder of them, a
            glob, or a name on the hub.
        format: How rows are read, see :data:`phi3_plugin.data.formats.FORMATS`; by default
            recognized from the first rows.
        columns: Role to column name, for rows that no format fits.
        split: Which part of a hub data set.
        subset: The configuration of a hub data set that has several.
        system_prompt: Put in front of every conversation that has no system message; one that
            has any keeps its own. An empty text is an empty system message, which the template
            may leave out; None adds none.
        train_on: "assistant": what the assistant says and the token that ends it. "last": the
            last such turn only. "all": every token but the first, user text, roles and whatever
            the template ends with among them; conversations need no assistant turn then.
        packed: Fill rows of ``tokenizer.max_seq_len`` tokens with several conversations.

    Raises:
        ConfigError: An option is missing or does not fit the others.
        MissingFileError: A local source is not there.
        DataError: Rows are broken (all are counted, the first ones listed), their format is
            not known, or nothing is left to train on.
    """
    check_switch("dataset.packed", packed)
    limit = tokenizer.max_seq_len
    if packed and limit is None:
        raise ConfigError(
            "dataset.packed: True needs the length of a pack. Set tokenizer.max_seq_len."
        )
    lesson = make_lesson(train_on, system_prompt)
    rows = read_rows(source, split=split, subset=subset)
    chats = _read_chats(rows, _format(rows, source, format, columns), lesson)
    tokens = _tokenize(tokenizer, [row.where for row in rows], chats)
    dataset = ChatDataset(_kept([lesson.mark(chat) for chat in tokens], lesson, limit, source))
    return pack(dataset, limit, tokenizer.pad_id) if packed and limit else dataset


def _format(
    rows: Sequence[Row],
    source: str | Path | None,
    name: str | None,
    columns: Mapping[str, str] | None,
) -> Format:
    readable = [row.value for row in rows if not isinstance(row.value, DataError)]
    if not readable:
        _raise_problems([f"{where}: {error}" for where, error in rows], len(rows))
    try:
        return pick_format(name, columns, readable[:LISTED])
    except DataError as error:
        raise DataError(f"dataset.source: {source}: {error}") from error


def _read_chats(rows: Sequence[Row], format: Format, lesson: Lesson) -> list[list[Turn]]:
    chats, problems = [], []
    for where, value in rows:
        try:
            if isinstance(value, DataError):
                raise value
            chats.append(lesson.prepare(format.read(value)))
        except DataError as error:
            problems.append(f"{where}: {error}")
    _raise_problems(problems, len(rows))
    return chats


def _raise_problems(problems: Sequence[str], total: int) -> None:
    if not problems:
        return
    more = len(problems) - LISTED
    listed = [*problems[:LISTED], *([f"and {more} more"] if more > 0 else [])]
    raise DataError(
        f"dataset.source: {len(problems)} of {total} rows cannot be used. Correct or remove "
        "them:\n  " + "\n  ".join(listed)
    )


def _tokenize(
    tokenizer: Phi3Tokenizer, places: Sequence[str], chats: Sequence[Sequence[Turn]]
) -> list[Tokens]:
    tokens, problems, dropped = list[Tokens](), list[str](), Counter[str]()
    for start in range(0, len(chats), BATCH):
        rendered = []
        for i in range(start, min(start + BATCH, len(chats))):
            try:
                rendered.append(tokenizer.render(chats[i]))
            except DataError as error:
                problems.append(f"{places[i]}: {error}")
        dropped.update(name for chat in rendered for name in chat.dropped)
        if not problems:
            tokens += tokenizer.encode_chats(rendered, tokenizer.max_seq_len)
    _raise_problems(problems, len(chats))
    warn_of_dropped(dropped)
    return tokens


def _kept(
    chats: Sequence[Tokens], lesson: Lesson, limit: int | None, source: str | Path | None
) -> list[Tokens]:
    kept = [chat for chat in chats if chat.trained.any()]
    dropped = (
        f"dropped {len(chats) - len(kept)} of {len(chats)} conversations: "
        f"{NOTHING[lesson.train_on]} within tokenizer.max_seq_len: {limit}"
    )
    if not kept:
        raise DataError(f"dataset.source: {source}: {dropped}. Raise it.")
    if len(kept) < len(chats):
        log_rank_zero(logger, dropped, logging.WARNING)
    return kept


def _labels(chat: Tokens) -> NDArray[np.int32]:
    return np.where(chat.trained, chat.ids, np.int32(IGNORED)).astype(np.int32)
