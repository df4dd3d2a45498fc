"""The chat data set: rows in, tokens and labels out; a row gives a sample or is counted as bad."""

import gc
import hashlib
import logging
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torchtune.utils import log_rank_zero
from tqdm import tqdm

from phi3_plugin.data.collate import IGNORED, StockPacks
from phi3_plugin.data.formats import (
    Chat,
    Format,
    Turn,
    Written,
    check_choice,
    check_layout,
    check_share,
    check_switch,
    make_turn,
    pick_format,
)
from phi3_plugin.data.order import group_of, held_out_mask, repeats
from phi3_plugin.data.packing import Packs
from phi3_plugin.data.sources import Filtered, FilterFailed, Row, Source, read_sources
from phi3_plugin.data.store import (
    BLANK_ANSWER,
    BROKEN,
    CUT_AWAY,
    DROPPED,
    DROPPED_MESSAGE,
    FILTERED,
    NO_FINAL_ANSWER,
    PASSED_OVER,
    SPECIAL_IN_TEXT,
    TOO_LONG,
    TRUNCATED,
    UNUSABLE,
    ChatRow,
    Findings,
    Store,
    StoreWriter,
    UnusedRow,
    cached,
)
from phi3_plugin.data.template import Rendered
from phi3_plugin.data.tokenizer import Phi3Tokenizer, TokenizedChats, Tokens
from phi3_plugin.errors import ConfigError, DataError

TRAIN_ON = ("assistant", "last", "marked", "all")
TRUNCATE = ("right", "left", "drop")
SOURCE_OPTIONS = ("format", "columns", "split", "subset", "streaming", "filter", "max_samples")
"""Options of every source, which one in a list may have for itself."""

logger = logging.getLogger(__name__)


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
) -> "ChatDataset | StockPacks":
    """Read, check and tokenize conversations.

    Packed ones come as torchtune's recipes take them; ours takes the padding off again.

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
        truncate: What becomes of conversations longer than ``tokenizer.max_seq_len``. "right":
            the end is cut off. "left": the oldest exchanges go, whole, and the system prompt
            stays; where the last exchange alone is still too long, its question loses its start,
            and where the answer is, its end is cut off. "drop": the conversation goes.
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
        cache_dir: Where tokenized data is kept, see :func:`cached`.

    Raises:
        ConfigError: An option is missing or does not fit the others.
        MissingFileError: A local source is not there.
        DataError: Rows are broken (all are counted, the first ones listed), their format is
            not known, or nothing is left to train on.
        OutputError: The tokenized data cannot be written.
    """
    check_choice("dataset.bad_rows", bad_rows, ("error", "drop"))
    check_choice("dataset.part", part, ("train", "held_out"))
    check_share("dataset.held_out", held_out)
    check_switch("dataset.packed", packed)
    check_switch("dataset.split_documents", split_documents)
    if cache_dir is not None and not isinstance(cache_dir, str | Path):
        raise ConfigError(f"dataset.cache_dir: {cache_dir!r} must be a folder.")
    if type(seed) is not int or seed < 0:
        raise ConfigError(f"dataset.seed: {seed!r} must be a whole number from 0.")
    if part == "held_out" and not held_out:
        raise ConfigError("dataset.part: held_out needs dataset.held_out, a share above 0.")
    if packed and tokenizer.max_seq_len is None:
        raise ConfigError(
            "dataset.packed: True needs the length of a pack. Set tokenizer.max_seq_len."
        )
    if split_documents and not packed:
        raise ConfigError("dataset.split_documents: True needs dataset.packed=True.")
    sources = read_sources(
        source,
        format=format,
        columns=columns,
        split=split,
        subset=subset,
        streaming=streaming,
        filter=filter,
        max_samples=max_samples,
    )
    preparation = Preparation(
        tokenizer,
        sources,
        tool_calls=tool_calls,
        system_prompt=system_prompt,
        train_on=train_on,
        truncate=truncate,
        add_eos=add_eos,
        group_by=group_by,
    )
    store = cached(cache_dir, preparation.settings, preparation.write)
    _report(store, preparation, drop=bad_rows == "drop")
    dataset = ChatDataset(store, _repeated(store, sources, seed))
    if held_out:
        kept, held = dataset.hold_out(held_out, seed)
        dataset = held if part == "held_out" else kept
    if not packed or tokenizer.max_seq_len is None:
        return dataset
    packs = Packs(dataset, tokenizer.max_seq_len, seed=seed, split_documents=split_documents)
    return StockPacks(packs, tokenizer.pad_id)


def _repeated(store: Store, sources: Sequence[Source], seed: int) -> NDArray[np.int64]:
    """Return the samples of an epoch: each as often as the weight of its source says."""
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
    def lost(self) -> NDArray[np.int32]:
        """Tokens of each conversation that was dropped because of its length."""
        return self.store.lost

    @property
    def findings(self) -> "Findings":
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
        held = samples[held_out_mask(self.store.samples["group"][samples], share, seed)]
        kept = self.select(np.flatnonzero(~np.isin(self.chosen, held)))
        return kept, ChatDataset(self.store, held)

    def _column(self, name: str) -> NDArray[Any]:
        values: NDArray[Any] = self.store.samples[name][self.chosen]
        return values


LOGGED = (BROKEN, UNUSABLE, CUT_AWAY, TOO_LONG, TRUNCATED, DROPPED_MESSAGE, PASSED_OVER)
"""What a user is told of."""

ROWS_LISTED = 10
"""How many broken rows an error lists, and how many first rows tell the format."""


def _report(store: Store, preparation: "Preparation", *, drop: bool) -> None:
    """Log what a user should know of the rows.

    Args:
        store: What was made of them.
        preparation: How.
        drop: Whether rows that cannot be used are left out.

    Raises:
        DataError: Rows cannot be used and are not to be dropped, or no sample is left.
    """
    places, counts = store.findings.places, store.findings.counts
    bad = counts[BROKEN] + counts[UNUSABLE]
    if bad and not drop:
        found = [*places.get(BROKEN, []), *places.get(UNUSABLE, [])]
        listed = [f"{where}: {reason}" for where, reason in found[:ROWS_LISTED]]
        listed += [f"and {bad - ROWS_LISTED} more"] if bad > ROWS_LISTED else []
        raise DataError(
            f"dataset.source: {bad} of {store.rows} rows cannot be used. Correct or remove them, "
            "or go on without them with dataset.bad_rows=drop:\n  " + "\n  ".join(listed)
        )
    if not len(store.samples):
        names = ", ".join(source.name for source in preparation.sources)
        reasons = ", ".join(f"{counts[kind]} {kind}" for kind in DROPPED if counts[kind])
        advice = ""
        if counts[CUT_AWAY] or counts[TOO_LONG]:
            limit, nothing = preparation.tokenizer.max_seq_len, NOTHING[preparation.train_on]
            advice = f" Raise tokenizer.max_seq_len: {nothing} within {limit} tokens."
        raise DataError(
            f"dataset.source: {names}: no sample is left of {store.rows} rows: {reasons}.{advice}"
        )
    for kind in LOGGED:
        if counts[kind]:
            where, detail = places[kind][0]
            first = f"{where}: {detail}" if detail else where
            message = f"{counts[kind]} of {store.rows} rows {kind}. The first: {first}"
            log_rank_zero(logger, message, logging.WARNING)


NOTHING = {
    "assistant": "no assistant turn that is trained on starts",
    "last": "the last assistant turn does not start",
    "marked": "no message that asks to be trained on starts",
    "all": "there is no second token",
}
"""Why a conversation that was cut trains nothing; the length it was cut to follows."""


# From rows to tokens: read and rendered here, encoded on all cores beside it. Only a few batches
# are held at once, so memory does not grow with the data.

ENCODED_AT_ONCE = 1024, 1_000_000
"""Conversations, or characters, that are encoded at once: enough for all cores, little to hold."""

WAITING = 2
"""Batches that are being encoded while the next is rendered."""


@dataclass(frozen=True)
class Preparation:
    """How rows become samples: the options of :func:`chat_dataset` that decide what is stored."""

    tokenizer: Phi3Tokenizer
    sources: Sequence[Source]
    tool_calls: str | None = None
    system_prompt: str | None = None
    train_on: str = "assistant"
    truncate: str = "right"
    add_eos: bool = False
    group_by: str | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: One has a value that it cannot have.
        """
        check_choice("dataset.train_on", self.train_on, TRAIN_ON)
        check_choice("dataset.truncate", self.truncate, TRUNCATE)
        check_switch("dataset.add_eos", self.add_eos)
        check_layout(self.tool_calls)
        if self.tool_calls is not None and self.tokenizer.special_in_text == "text":
            raise ConfigError(
                "dataset.tool_calls: special tokens that it writes into messages would become text "
                "with tokenizer.special_in_text=text. Set that to parse."
            )
        try:
            _ = self._system
        except DataError as error:
            raise ConfigError(f"dataset.system_prompt: {error}.") from error

    @cached_property
    def settings(self) -> dict[str, Any] | None:
        """All that decides what is in the store, as JSON values; None if that cannot be known."""
        content = [source.fingerprint() for source in self.sources]
        if None in content:
            return None
        options = [getattr(self, field.name) for field in fields(self)[2:]]
        described = [[*map(str, s.files or ()), s.settings()] for s in self.sources]
        tokenizer = [self.tokenizer.fingerprint, self.tokenizer.max_seq_len]
        return {
            "content": content,
            "sources": described,
            "tokenizer": tokenizer,
            "options": options,
        }

    def write(self, writer: StoreWriter) -> None:
        """Tokenize all rows into a store.

        Raises:
            DataError: A source cannot be read to its end, or was changed meanwhile.
        """
        settings = self.settings  # of the files as they are before they are read
        waiting = deque[tuple[list[tuple[ChatRow, Rendered]], Future[TokenizedChats]]]()
        gc.freeze()  # Or each collection would walk over all that was imported
        with ThreadPoolExecutor(WAITING) as pool:
            try:
                for chats in self._batches(writer):
                    texts = [rendered for _, rendered in chats]
                    waiting.append((chats, pool.submit(self.tokenizer.encode_chats, texts)))
                    if len(waiting) > WAITING:
                        chats, future = waiting.popleft()
                        self._append(chats, future.result(), writer)
                for chats, future in waiting:
                    self._append(chats, future.result(), writer)
            finally:
                for _, future in waiting:
                    future.cancel()
                gc.unfreeze()
        if settings and settings["content"] != [s.fingerprint() for s in self.sources]:
            raise DataError(
                "dataset.source: files were changed while they were read. Run the command again."
            )

    def conversations(self) -> Iterator[ChatRow | UnusedRow]:
        """Read all sources; a row that is no conversation comes as why it is none."""
        for number, source in enumerate(self.sources):
            rows, first = _numbered(source.rows()), list[tuple[int, Row]]()
            for index, row in rows:
                if isinstance(row.value, DataError):
                    yield _unused(row.where, row.value)
                    continue
                first.append((index, row))
                if len(first) == ROWS_LISTED:
                    break
            format = _format([row for _, row in first], source, self.tool_calls)
            for index, row in chain(first, rows):
                yield self._conversation(number, index, row, format)

    def _conversation(
        self, number: int, index: int, row: Row, format: Format | None
    ) -> ChatRow | UnusedRow:
        if isinstance(row.value, DataError):
            return _unused(row.where, row.value)
        assert format is not None  # There is one as soon as a row could be read
        try:
            chat = format.read(row.value)
            if isinstance(chat, Written):
                with suppress(DataError):  # where it matters, it is said when it is rendered
                    chat = self.tokenizer.template.split(chat)
            group = group_of(row.value, chat, self.group_by)
        except DataError as error:
            return UnusedRow(UNUSABLE, row.where, str(error))
        return ChatRow(row.where, number, index, group, chat)

    def _batches(self, writer: StoreWriter) -> Iterator[list[tuple[ChatRow, Rendered]]]:
        batch, size = list[tuple[ChatRow, Rendered]](), 0
        rows = tqdm(
            self.conversations(), desc="Tokenizing", unit=" rows", disable=None, leave=False
        )
        for row in rows:
            writer.rows += 1
            if isinstance(row, UnusedRow):
                writer.findings.add(*row)
                continue
            try:
                rendered = self.render(row.chat)
            except DataError as error:
                writer.findings.add(UNUSABLE, row.where, str(error))
                continue
            self._notice(row, rendered, writer.findings)
            batch.append((row, rendered))
            size += len(rendered.text)
            if len(batch) == ENCODED_AT_ONCE[0] or size > ENCODED_AT_ONCE[1]:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _notice(self, row: ChatRow, rendered: Rendered, findings: Findings) -> None:
        if rendered.dropped:
            findings.add(DROPPED_MESSAGE, row.where, ", ".join(rendered.dropped))
        if not isinstance(row.chat, Written) and row.chat[-1].role != "assistant":
            findings.add(NO_FINAL_ANSWER, row.where, f"the last turn is {row.chat[-1].role}'s")
        if any(turn.trained and not turn.content.strip() for turn in rendered.turns):
            findings.add(BLANK_ANSWER, row.where)
        if self._passes_over(row.chat):
            findings.add(PASSED_OVER, row.where)
        # Calls of tools are written with special tokens
        if self.tokenizer.special_in_text == "parse" and self.tool_calls is None:
            tokens = self.tokenizer.template.tokens
            if any(piece.said and tokens.search(piece.text) for piece in rendered.pieces):
                findings.add(SPECIAL_IN_TEXT, row.where)

    def _append(
        self,
        chats: Sequence[tuple[ChatRow, Rendered]],
        batch: TokenizedChats,
        writer: StoreWriter,
    ) -> None:
        """Write conversations that were encoded, each cut to its length, if anything is trained."""
        full, limit = batch.lengths, self.tokenizer.max_seq_len
        batch = self._mark(batch)
        if limit is not None and (full > limit).any():
            whole = zip(chats, batch.split(), strict=True)
            batch = TokenizedChats.join(
                [self._fit(chat, tokens, limit) for (_, chat), tokens in whole]
            )
        kept = batch.labelled > 0
        for n in np.flatnonzero((full > batch.lengths) | ~kept).tolist():
            kind = TRUNCATED if kept[n] else CUT_AWAY
            if not kept[n]:
                writer.lost.append(int(full[n]))
                if self.truncate == "drop" and limit is not None and full[n] > limit:
                    kind = TOO_LONG
            writer.findings.add(kind, chats[n][0].where, f"{full[n]} tokens")
        rows = [row for (row, _), keep in zip(chats, kept, strict=True) if keep]
        writer.append(batch.select(kept), full[kept], rows)

    # What is trained on

    def render(self, chat: Chat) -> Rendered:
        """Write a conversation as the template does, and mark what is trained on.

        Raises:
            DataError: There is nothing to train on, or the conversation cannot be rendered.
        """
        return self._follow(chat) if isinstance(chat, Written) else self._write(self.marked(chat))

    def marked(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Mark the turns that are trained on, and add the system message.

        Raises:
            DataError: There is nothing to train on.
        """
        chosen = self._chosen(turns)
        if self.train_on != "all" and not any(chosen):
            raise DataError(_nothing(self.train_on, turns))
        turns = [
            turn if turn.trained is trained else turn._replace(trained=trained)
            for turn, trained in zip(turns, chosen, strict=True)
        ]
        if self._system is None or any(turn.role == "system" for turn in turns):
            return turns
        return [self._system, *turns]

    @cached_property
    def _system(self) -> Turn | None:
        return None if self.system_prompt is None else make_turn("system", self.system_prompt)

    def _chosen(self, turns: Sequence[Turn]) -> list[bool]:
        if self.train_on == "marked":
            return [turn.wanted is True for turn in turns]
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if self.train_on == "last":
            return [i in answers[-1:] for i in range(len(turns))]
        return [turn.role == "assistant" and turn.wanted is not False for turn in turns]

    def _passes_over(self, chat: Chat) -> bool:
        """Whether a message asks for something that is not done."""
        if isinstance(chat, Written) or self.train_on == "marked":
            return False
        if self.train_on == "assistant":
            return any(turn.wanted and turn.role != "assistant" for turn in chat)
        return any(turn.wanted is not None for turn in chat)

    def _write(self, turns: Sequence[Turn]) -> Rendered:
        rendered = self.tokenizer.render(turns)
        if not self.add_eos:
            return rendered
        return rendered.ended(self.tokenizer.eos_token, trained=self.train_on == "all")

    def _follow(self, chat: Written) -> Rendered:
        template, eos = self.tokenizer.template, self.tokenizer.eos_token
        if self._system is not None:
            raise DataError(
                "dataset.system_prompt cannot be put in front of a text that is written already"
            )
        if self.add_eos and not chat.text.rstrip().endswith(eos):
            chat = chat._replace(text=chat.text + eos)
        if self.train_on == "all":
            return template.follow(chat, ())
        if self.train_on == "marked":
            raise DataError("a text has no messages that could ask to be trained on")
        said = chat.said if chat.said is not None else template.split(chat).said or ()
        if not said:
            raise DataError(_nothing(self.train_on, ()))
        return template.follow(chat, said[-1:] if self.train_on == "last" else said)

    def _mark(self, batch: TokenizedChats) -> TokenizedChats:
        """Mark all tokens where all are trained on; else they are marked by the turns."""
        if self.train_on != "all":
            return batch
        trained = np.ones(len(batch.ids), dtype=np.bool_)
        # Nothing comes before the first, from which it could be predicted
        trained[batch.starts[batch.lengths > 0]] = False
        return batch._replace(trained=trained)

    # What becomes of conversations that are too long

    def _fit(self, chat: Rendered, tokens: Tokens, limit: int) -> Tokens:
        if len(tokens.ids) <= limit:
            return tokens
        if self.truncate == "right":
            return tokens.first(limit)
        if self.truncate == "drop":
            return tokens.first(0)
        if not chat.turns:
            return _tail(tokens, limit)
        try:
            return self._keep_end(chat.turns, limit)
        except DataError:  # The template fails on what is left; nothing of it is trained
            return tokens.first(0)

    def _keep_end(self, turns: Sequence[Turn], limit: int) -> Tokens:
        """Shorten a conversation from its start; its turns carry what is trained on."""
        system = [turn for turn in turns[:1] if turn.role == "system"]
        starts = [i for i, turn in enumerate(turns) if turn.role == "user" and i > len(system)]
        later = [[*system, *turns[start:]] for start in starts]
        fitting = self._first_fit(len(later), later.__getitem__, limit)
        if fitting is not None:
            return fitting
        last = later[-1] if later else list(turns)
        asking = [i for i, turn in enumerate(last) if turn.role == "user" and not turn.trained]
        if asking:
            at, question = asking[0], last[asking[0]]

            def without_start(n: int) -> Sequence[Turn]:
                shorter = question._replace(content=question.content[n + 1 :])
                return [*last[:at], shorter, *last[at + 1 :]]

            fitting = self._first_fit(len(question.content), without_start, limit)
        return self._encode(last).first(limit) if fitting is None else fitting

    def _first_fit(
        self, count: int, candidate: Callable[[int], Sequence[Turn]], limit: int
    ) -> Tokens | None:
        """Return the first that is short enough, of conversations that get shorter."""
        tokens = dict[int, Tokens]()

        def fits(index: int) -> bool:
            tokens[index] = self._encode(candidate(index))
            return len(tokens[index].ids) <= limit

        at = bisect_left(range(count), True, key=fits)
        return tokens[at] if at < count else None

    def _encode(self, turns: Sequence[Turn]) -> Tokens:
        return self._mark(self.tokenizer.encode_chats([self._write(turns)])).split()[0]


def conversations(
    tokenizer: Phi3Tokenizer, options: Mapping[str, Any]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield where each row stands, and its messages: role, content, tools and whether trained.

    Rows that give no sample, and those that are a text already, are passed over.

    Args:
        tokenizer: Of the checkpoint.
        options: Of :func:`chat_dataset`.
    """
    common = {name: options[name] for name in SOURCE_OPTIONS if name in options}
    sources = read_sources(options.get("source"), **common)
    own = [field.name for field in fields(Preparation)[2:]]
    preparation = Preparation(tokenizer, sources, **{n: options[n] for n in own if n in options})
    for row in preparation.conversations():
        if isinstance(row, UnusedRow) or isinstance(row.chat, Written):
            continue
        try:
            turns = preparation.marked(row.chat)
        except DataError:  # there is nothing to train on
            continue
        messages = []
        for turn in turns:
            tools = {} if turn.tools is None else {"tools": turn.tools}
            message = {"role": turn.role, "content": turn.content, **tools}
            messages.append({**message, "trained": turn.trained})
        yield row.where, messages


def _numbered(rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
    """Number rows; those that a filter leaves out do not count."""
    index = 0
    for row in rows:
        yield index, row
        index += not isinstance(row.value, Filtered)


def _unused(where: str, problem: DataError) -> UnusedRow:
    if isinstance(problem, Filtered):
        return UnusedRow(FILTERED, where)
    kind = UNUSABLE if isinstance(problem, FilterFailed) else BROKEN
    return UnusedRow(kind, where, str(problem))


def _format(first: Sequence[Row], source: Source, tool_calls: str | None) -> Format | None:
    """Return how the rows of a source are read; None where none of them can be."""
    readable = [row.value for row in first if isinstance(row.value, dict)]
    if not readable:
        return None
    try:
        return pick_format(source.format, source.columns, readable, tool_calls=tool_calls)
    except DataError as error:
        # That of most rows, so that the others are bad rows
        usual = dict[str, list[Format]]()
        for row in readable:
            with suppress(DataError):
                format = pick_format(None, None, [row], tool_calls=tool_calls)
                usual.setdefault(str(format), []).append(format)
        if not usual:
            raise DataError(f"dataset.source: {source.name}: {error}") from error
        return max(usual.values(), key=len)[0]


def _nothing(train_on: str, turns: Sequence[Turn]) -> str:
    if train_on == "marked":
        return "no message has a weight of 1 or train: true, so nothing to train on"
    if any(turn.role == "assistant" for turn in turns):
        return "every assistant turn has a weight of 0 or train: false, so nothing to train on"
    return "there is no assistant turn, so nothing to train on"


def _tail(tokens: Tokens, limit: int) -> Tokens:
    """Keep the end of a text, but do not train the rest of an answer whose start is cut off."""
    ids, trained = tokens.ids[-limit:], tokens.trained[-limit:].copy()
    if not tokens.trained[1:].all():
        trained[: int(np.argmin(trained)) if not trained.all() else len(trained)] = False
    trained[:1] = False  # Nothing comes before it, from which it could be predicted
    return Tokens(ids, trained)
