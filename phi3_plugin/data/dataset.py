"""The chat data set: what can be asked of it, and its samples as tokens and labels."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torchtune.utils import log_rank_zero
from typing_extensions import Self

from phi3_plugin.data.collate import IGNORED
from phi3_plugin.data.findings import CUT_AWAY, DROPPED, TOO_LONG, Findings, UnusedRow
from phi3_plugin.data.order import held_out_mask, repeats
from phi3_plugin.data.packing import Packs, StockPacks
from phi3_plugin.data.preparation import Preparation, SampleOptions
from phi3_plugin.data.sources import Source, SourceOptions, read_sources, source_conflicts
from phi3_plugin.data.store import Store, cached
from phi3_plugin.data.tokenizer import Phi3Tokenizer
from phi3_plugin.data.turns import Written, key_names
from phi3_plugin.errors import ConfigError, DataError
from phi3_plugin.options import Kind, Seed, Share, Switch, made, option_problems, takes
from phi3_plugin.terminal import harmless

logger = logging.getLogger(__name__)

_Options = TypeVar("_Options", bound="UseOptions")

_FOLDER = Kind("a folder", lambda value: isinstance(value, str | Path), Path)


@dataclass(frozen=True, kw_only=True)
class UseOptions:
    """Which samples are used, and how they come."""

    bad_rows: Literal["error", "drop"] = "error"
    """"error": rows that cannot be used stop the run. "drop": they are counted."""
    held_out: Share = 0.0
    """Share of the samples that is held out."""
    part: Literal["train", "held_out"] = "train"
    """"train", or "held_out" for the other part."""
    seed: Seed = 0
    """Decides what is held out, what weights take, and the packs."""
    packed: Switch = False
    """Fill rows of ``tokenizer.max_seq_len`` tokens with several conversations."""
    cache_dir: Annotated[Path, _FOLDER] | None = None
    """Where tokenized data is kept, see :func:`phi3_plugin.data.store.cached`."""


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(SourceOptions, SampleOptions, UseOptions):
    """The options of :func:`chat_dataset`.

    `SourceOptions` say which rows are read and how, `SampleOptions` what becomes of a row, and
    `UseOptions` which of the samples are used. A new option is a field of one of them.
    """

    split_documents: Switch = False
    """Cut conversations where a pack is full, instead of keeping them whole."""


@takes(DatasetOptions)
def chat_dataset(
    tokenizer: Phi3Tokenizer, source: Any = None, **options: Any
) -> "ChatDataset | StockPacks":
    """Read, check and tokenize conversations.

    Packed ones come as torchtune's recipes take them; ours takes the padding off again.

    Args:
        tokenizer: Tokenizer of the checkpoint.
        source: A .json, .jsonl, .csv or .tsv (each also as .gz, .xz or .zst), .parquet or .arrow
            file, a folder of them, a glob, or a name on the hub; or a list of these, or of
            dictionaries with ``source``, ``weight`` and options of their own.
        **options: Those of `DatasetOptions`, `SourceOptions`, `SampleOptions` and `UseOptions`.

    Raises:
        ConfigError: An option is missing or does not fit the others.
        MissingFileError: A local source is not there.
        DataError: Rows are broken (all are counted, the first ones listed), their format is
            not known, or nothing is left to train on.
        OutputError: The tokenized data cannot be written.
    """
    o = read_dataset_options(DatasetOptions, "chat_dataset", options, tokenizer)
    preparation = Preparation(tokenizer, read_sources(source, o), o)
    return dataset_of(preparation, o, split_documents=o.split_documents)


def dataset_of(
    preparation: Preparation, options: UseOptions, *, split_documents: bool = False
) -> "ChatDataset | StockPacks":
    """Return the prepared samples, in packs if that is asked for.

    Args:
        preparation: Of the rows.
        options: How the samples are used.
        split_documents: See :class:`phi3_plugin.data.packing.Packs`.

    Raises:
        DataError: As :func:`chat_dataset`.
        OutputError: The tokenized data cannot be written.
    """
    store, tokenizer = prepared(preparation, options), preparation.tokenizer
    chosen = repeated(store, preparation.sources, options.seed)
    dataset = ChatDataset(store, chosen).used(options)
    if not options.packed or tokenizer.max_seq_len is None:
        return dataset
    size = tokenizer.max_seq_len
    packs = Packs(dataset, size, seed=options.seed, split_documents=split_documents)
    return StockPacks(packs, tokenizer.pad_id)


def prepared(preparation: Preparation, options: UseOptions) -> Store:
    """Return the samples of all rows, at least one, and say what was noticed about them.

    Raises:
        DataError: As :func:`chat_dataset`.
        OutputError: The tokenized data cannot be written.
    """
    store = cached(options.cache_dir, preparation.settings, preparation.write)
    if options.bad_rows == "error":
        store.findings.refuse_bad_rows(store.rows)
    if not len(store.samples):
        raise DataError(_no_sample(store, preparation))
    store.findings.log(store.rows)
    _log_passed_over(preparation.sources)
    new = preparation.tokenizer.new_tokens
    if unseen := [str(new[number].entry["content"]) for number in store.lacking(new)]:
        sources = ", ".join(source.name for source in preparation.sources)
        text = f"tokenizer.add_tokens: no sample of {sources} has {', '.join(map(repr, unseen))}"
        log_rank_zero(logger, harmless(text), logging.WARNING)
    return store


def _log_passed_over(sources: Sequence[Source]) -> None:
    for source in sources:
        if source.passed_over:
            text = f"dataset.source: {source.name}: not read: {key_names(source.passed_over)}"
            log_rank_zero(logger, harmless(text), logging.WARNING)


def read_dataset_options(
    kind: type[_Options], name: str, options: Mapping[str, Any], tokenizer: Phi3Tokenizer
) -> _Options:
    """Check the options of a data set.

    Args:
        kind: Their dataclass, of `UseOptions`, `SourceOptions` and more.
        name: Of the data set.
        options: As they are given.
        tokenizer: Of the checkpoint.

    Raises:
        ConfigError: Something is wrong; all problems, one line each.
    """
    problems = option_problems(kind, options, name, section="dataset.")
    problems += source_conflicts(options)
    if problems:
        raise ConfigError("\n".join(problems))
    o = made(kind, options)
    if conflicts := [*_conflicts(o, tokenizer)]:
        raise ConfigError("\n".join(conflicts))
    return o


def _conflicts(o: Any, tokenizer: Phi3Tokenizer) -> Iterator[str]:
    """Say what does not go together."""
    if o.part == "held_out" and not o.held_out:
        yield "dataset.part: held_out needs dataset.held_out, a share above 0."
    if o.packed and tokenizer.max_seq_len is None:
        yield "dataset.packed: True needs the length of a pack. Set tokenizer.max_seq_len."
    if getattr(o, "split_documents", False) and not o.packed:
        yield "dataset.split_documents: True needs dataset.packed=True."
    if getattr(o, "tool_calls", None) is not None and tokenizer.special_in_text == "text":
        yield (
            "dataset.tool_calls: special tokens that it writes into messages would become text "
            "with tokenizer.special_in_text=text. Set that to parse."
        )
    thoughts = getattr(o, "thoughts", None) or ""
    if tokenizer.special_in_text == "text" and tokenizer.template.control_tokens.search(thoughts):
        yield (
            "dataset.thoughts: special tokens that it writes into messages would become text with "
            "tokenizer.special_in_text=text. Set that to parse."
        )


STARTS_TOO_LATE = {
    "assistant": "no assistant turn that is trained on starts",
    "last": "the last assistant turn does not start",
    "marked": "no message that asks to be trained on starts",
    "all": "there is no second token",
}
"""Why a conversation that was cut trains nothing; the length it was cut to follows."""


def _no_sample(store: Store, preparation: Preparation) -> str:
    """Return why there is no sample of any row."""
    counts = store.findings.counts
    names = ", ".join(source.name for source in preparation.sources)
    reasons = ", ".join(f"{counts[kind]} {kind}" for kind in DROPPED if counts[kind])
    text = f"dataset.source: {names}: no sample is left of {store.rows} rows: {reasons}."
    if counts[CUT_AWAY] or counts[TOO_LONG]:
        why = STARTS_TOO_LATE[preparation.options.train_on]
        limit = preparation.tokenizer.max_seq_len
        text += f" Raise tokenizer.max_seq_len: {why} within {limit} tokens."
    return text + store.findings.bad_rows_listed()


def repeated(store: Store, sources: Sequence[Source], seed: int) -> NDArray[np.int64]:
    """Return the conversations of an epoch: each as often as the weight of its source says."""
    counts = np.ones(len(store.samples), dtype=np.int64)
    for number, source in enumerate(sources):
        if source.weight != 1:
            mine = np.flatnonzero(store.samples["source"] == number)
            counts[mine] = repeats(source.weight, store.samples["row"][mine], seed + number)
    if not counts.any():
        raise DataError("dataset.source: the weights leave no sample. Raise them.")
    return np.repeat(np.arange(len(counts)), counts)


# Shapes: N samples, S tokens of one
class ChatDataset(Dataset[dict[str, list[int]]]):
    """Tokenized conversations of a store, read one by one: all, some, or some several times."""

    def __init__(self, store: Store, chosen: NDArray[np.int64]) -> None:
        """Choose samples of a store, [N]; see :func:`chat_dataset`."""
        self.store = store
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, list[Any]]:
        """Return ``tokens`` and ``labels``, each [S], and ``weights``, [S], where any are told.

        Labels stand at their own token's position (the recipe shifts them), and are -100 where
        not trained. The first is always -100, so in a pack nothing is predicted across the
        border of two conversations.
        """
        tokens, labels = self.arrays(index)
        sample = {"tokens": tokens.tolist(), "labels": labels.tolist()}
        weights = self.weights(index)
        return sample if weights is None else {**sample, "weights": weights.tolist()}

    def arrays(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return tokens and labels as arrays, each [S]."""
        tokens = self.store.read(int(self.chosen[index]))
        return tokens.ids, np.where(tokens.trained, tokens.ids, np.int32(IGNORED))

    def weights(self, index: int) -> NDArray[np.float32] | None:
        """Return how much the loss counts each token, [S]; None where all count alike."""
        return self.store.read(int(self.chosen[index])).weights if self.store.is_weighted else None

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

    def select(self, indices: NDArray[np.int64]) -> Self:
        """Return the data set of some of the samples, in the given order."""
        return self._of(self.chosen[indices])

    def used(self, options: UseOptions) -> Self:
        """Return the part that is asked for."""
        if not options.held_out:
            return self
        kept, held = self.hold_out(options.held_out, options.seed)
        return held if options.part == "held_out" else kept

    def hold_out(self, share: float, seed: int) -> tuple[Self, Self]:
        """Split into what is trained on and what is held out, groups whole.

        Args:
            share: Of the samples that is held out.
            seed: Decides which.

        Raises:
            DataError: Nothing would be left to train on.
        """
        # Once each: a weight is how often a sample is trained on
        samples = np.unique(self.chosen)
        held = samples[held_out_mask(self.store.samples["group"][samples], share, seed)]
        kept = self.select(np.flatnonzero(~np.isin(self.chosen, held)))
        return kept, self._of(held)

    def _of(self, chosen: NDArray[np.int64]) -> Self:
        return type(self)(self.store, chosen)

    def _column(self, name: str) -> NDArray[Any]:
        values: NDArray[Any] = self.store.samples[name][self.chosen]
        return values


def messages_of_rows(
    tokenizer: Phi3Tokenizer, section: Mapping[str, Any]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield where each row stands, and its messages: role, content, tools and whether trained.

    ``thought``, ``fields`` and ``variables`` are those of `Turn`, and ``raw`` is the message as it
    is in the row, where the row has one. Rows that give no sample, and those that are a text
    already, are passed over.

    Args:
        tokenizer: Of the checkpoint.
        section: Of the YAML, for :func:`chat_dataset`, which has accepted it.
    """
    o = made(DatasetOptions, section)
    preparation = Preparation(tokenizer, read_sources(section.get("source"), o), o)
    for row in preparation.conversations():
        if isinstance(row, UnusedRow) or isinstance(row.chat, Written):
            continue
        try:
            turns = preparation.marked(row.chat)
        except DataError:  # there is nothing to train on
            continue
        messages = []
        raws = raw_messages(row.raw, len(turns))
        for turn, raw in zip(turns, raws, strict=True):
            tools = {} if turn.tools is None else {"tools": turn.tools}
            message = {"role": turn.role, "content": turn.content, **tools}
            if turn.thought is not None:
                message["thought"] = turn.thought
            beside = {"fields": turn.fields, "variables": turn.variables, "raw": raw}
            messages.append({**message, "trained": turn.trained, **beside})
        yield row.where, messages


def raw_messages(row: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return the messages of a row as they are, for each of its turns; {} for what is none."""
    for listed in row.values():
        if not isinstance(listed, list) or not 0 < len(listed) <= count:
            continue
        if all(isinstance(message, dict) and "role" in message for message in listed):
            return [*([{}] * (count - len(listed))), *listed]
    return [dict[str, Any]()] * count
