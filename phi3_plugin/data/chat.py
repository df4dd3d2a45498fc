"""The chat data set: rows in, tokens and labels out, ready for torchtune's collate functions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phi3_plugin.data.cache import cached
from phi3_plugin.data.dataset import ChatDataset
from phi3_plugin.data.options import check_choice, check_share, check_switch
from phi3_plugin.data.packing import Packs
from phi3_plugin.data.reading import Reading, judge, make_reading
from phi3_plugin.data.selection import repeats
from phi3_plugin.data.store import Store
from phi3_plugin.data.tokenizer import Phi3Tokenizer
from phi3_plugin.errors import ConfigError, DataError

PARTS = ("train", "held_out")
BAD_ROWS = ("error", "drop")
COMMON = ("format", "columns", "split", "subset", "streaming", "filter", "max_samples")
"""Options of every source, which one in a list may have for itself."""


def chat_dataset(
    tokenizer: Phi3Tokenizer,
    source: Any = None,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    subset: str | None = None,
    streaming: bool = False,
    filter: str | None = None,
    max_samples: int | None = None,
    tool_calls: str | None = None,
    system_prompt: str | None = None,
    train_on: str = "assistant",
    truncate: str = "right",
    add_eos: bool = False,
    bad_rows: str = "error",
    group_by: str | None = None,
    held_out: float = 0.0,
    part: str = "train",
    seed: int = 0,
    packed: bool = False,
    split_documents: bool = False,
    cache_dir: str | Path | None = None,
) -> ChatDataset | Packs:
    """Read, check and tokenize conversations.

    Args:
        tokenizer: Tokenizer of the checkpoint.
        source: A .json, .jsonl, .csv (each also as .gz), .parquet or .arrow file, a folder of
            them, a glob, or a name on the hub; or a list of these, or of dictionaries with the
            keys of :class:`phi3_plugin.data.sources.Source`.
        format: How rows are read, see :data:`phi3_plugin.data.formats.FORMATS`; by default
            recognized from the first rows.
        columns: Role to column name, for rows that no format fits.
        split: Which part of a hub data set, or of one that ``datasets`` saved.
        subset: The configuration of a hub data set that has several.
        streaming: Read a hub data set without downloading it first.
        filter: Expression over a row's columns; rows for which it is not true are left out.
        max_samples: Take the first so many rows.
        tool_calls: How a message's ``tool_calls`` are written: a text with one ``{}`` for them.
        system_prompt: Put in front of every conversation that has no system message; one that
            has any keeps its own. An empty text is an empty system message, which the template
            may leave out; None adds none.
        train_on: "assistant": what the assistant says and the token that ends it, unless the
            message has a weight of 0 or ``train: false``. "last": the last such turn only.
            "marked": the messages with a weight of 1 or ``train: true``. "all": every token but
            the first, user text, roles and whatever the template ends with among them;
            conversations need no assistant turn then.
        truncate: What becomes of conversations longer than ``tokenizer.max_seq_len``, see
            :mod:`phi3_plugin.data.truncation`.
        add_eos: Put the end-of-text token at the end of conversations whose template does not.
            It is trained on as the template's own is: only with ``train_on: all``.
        bad_rows: "error": rows that cannot be used stop the run. "drop": they are counted.
        group_by: A column; rows with the same value stay together when data is held out. By
            default rows do whose conversations start alike.
        held_out: Share of the samples that is held out.
        part: "train", or "held_out" for the other part.
        seed: Decides what is held out, what weights take, and the packs.
        packed: Fill rows of ``tokenizer.max_seq_len`` tokens with several conversations.
        split_documents: Cut conversations where a pack is full, instead of keeping them whole.
        cache_dir: Where tokenized data is kept, see :func:`phi3_plugin.data.cache.cached`.

    Raises:
        ConfigError: An option is missing or does not fit the others.
        MissingFileError: A local source is not there.
        DataError: Rows are broken (all are counted, the first ones listed), their format is
            not known, or nothing is left to train on.
        OutputError: The tokenized data cannot be written.
    """
    given = locals()
    _check(given)
    common = {name: given[name] for name in COMMON}
    reading = make_reading(
        tokenizer,
        source,
        common,
        tool_calls=tool_calls,
        group_by=group_by,
        lesson=(train_on, system_prompt, add_eos),
        truncate=truncate,
    )
    store = cached(cache_dir, reading.settings, reading.write)
    judge(store, reading, drop=bad_rows == "drop")
    dataset = ChatDataset(store, _weighted(store, reading, seed))
    if held_out:
        dataset = dataset.hold_out(held_out, seed)[PARTS.index(part)]
    if not packed or tokenizer.max_seq_len is None:
        return dataset
    size, pad = tokenizer.max_seq_len, tokenizer.pad_id
    return Packs(dataset, size, pad, seed=seed, split_documents=split_documents)


def _check(given: Mapping[str, Any]) -> None:
    for name in ("packed", "split_documents", "streaming"):
        check_switch(f"dataset.{name}", given[name])
    check_choice("dataset.bad_rows", given["bad_rows"], BAD_ROWS)
    check_choice("dataset.part", given["part"], PARTS)
    check_share("dataset.held_out", given["held_out"])
    if given["cache_dir"] is not None and not isinstance(given["cache_dir"], str | Path):
        raise ConfigError(f"dataset.cache_dir: {given['cache_dir']!r} must be a folder.")
    if given["tool_calls"] is not None and given["tokenizer"].special_in_text == "text":
        raise ConfigError(
            "dataset.tool_calls: special tokens that it writes into messages would become text "
            "with tokenizer.special_in_text=text. Set that to parse."
        )
    if type(given["seed"]) is not int or given["seed"] < 0:
        raise ConfigError(f"dataset.seed: {given['seed']!r} must be a whole number from 0.")
    if given["packed"] and given["tokenizer"].max_seq_len is None:
        raise ConfigError(
            "dataset.packed: True needs the length of a pack. Set tokenizer.max_seq_len."
        )
    if given["part"] == "held_out" and not given["held_out"]:
        raise ConfigError("dataset.part: held_out needs dataset.held_out, a share above 0.")
    if given["split_documents"] and not given["packed"]:
        raise ConfigError("dataset.split_documents: True needs dataset.packed=True.")


def _weighted(store: Store, reading: Reading, seed: int) -> NDArray[np.int64]:
    counts = np.ones(len(store.samples), dtype=np.int64)
    for number, source in enumerate(reading.sources):
        if source.weight != 1:
            mine = np.flatnonzero(store.samples["source"] == number)
            counts[mine] = repeats(source.weight, store.samples["row"][mine], seed + number)
    if not counts.any():
        raise DataError("dataset.source: the weights leave no sample. Raise them.")
    return np.repeat(np.arange(len(counts)), counts)
