"""Answers that are compared: two to a question, or one that is called a good or a bad one.

A row is read as in `chat_dataset`, twice where it has two answers: with the chosen one, and with
the rejected one in its place. Both become documents of the store, neighbours of which only the
answers are trained on, and a sample of both::

    tokens     p0 p1 p2 c3 c4 c5 p0 p1 p2 r3 r4
    labels      .  .  . c3 c4 c5  .  .  . r3 r4
    lengths    [6, 5]
    wanted     [True, False]
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from phi3_plugin.data.collate import IGNORED
from phi3_plugin.data.columns import with_system_prompt
from phi3_plugin.data.dataset import (
    ChatDataset,
    UseOptions,
    prepared,
    read_dataset_options,
    repeated,
)
from phi3_plugin.data.findings import (
    CUT_AWAY,
    SAME_ANSWERS,
    TOO_LONG,
    TRUNCATED,
    Findings,
    UnusedRow,
)
from phi3_plugin.data.formats import (
    AnyCase,
    Format,
    NamedColumns,
    OpenAIPreference,
    PreferencePair,
    answer_of,
)
from phi3_plugin.data.packing import Packs, StockPacks, StockPairs
from phi3_plugin.data.preparation import (
    Preparation,
    RenderedRow,
    RenderOptions,
    shared_turns,
)
from phi3_plugin.data.sources import Source, SourceOptions, read_sources
from phi3_plugin.data.store import ChatRow, Store, StoreWriter
from phi3_plugin.data.template import Rendered
from phi3_plugin.data.tokenizer import Phi3Tokenizer, TokenizedChats, Tokens
from phi3_plugin.data.turns import Chat, Turn, Written, key_names, short_repr
from phi3_plugin.data.unwanted import APPROVALS, SAYS_NO
from phi3_plugin.errors import DataError
from phi3_plugin.options import takes


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions(SourceOptions, RenderOptions, UseOptions):
    """The options of :func:`preference_dataset`.

    Those of `SourceOptions`, `RenderOptions` and `UseOptions` are as for `chat_dataset`.
    """

    train_on: ClassVar[str] = "last"
    truncate: Literal["left", "right", "drop"] = "left"
    """What becomes of answers that are longer, with their question, than
    ``tokenizer.max_seq_len``. "left": the oldest exchanges go, whole and from both sides, and the
    system prompt stays; then the question loses its start, and where an answer alone is too long,
    its end is cut off. "right": the ends are cut off. "drop": the pair goes. A pair goes in any
    case of which no difference would be left."""


@takes(PreferenceOptions)
def preference_dataset(tokenizer: Phi3Tokenizer, source: Any = None, **options: Any) -> Any:
    """Read, check and tokenize pairs of answers, or answers that are called good or bad.

    Pairs come as torchtune's DPO recipes take them; ours takes them as they are.

    Args:
        tokenizer: Tokenizer of the checkpoint.
        source: As for :func:`phi3_plugin.data.chat_dataset`.
        **options: Those of `PreferenceOptions`, `SourceOptions`, `RenderOptions` and `UseOptions`.

    Raises:
        ConfigError: An option is missing or does not fit the others.
        MissingFileError: A local source is not there.
        DataError: Rows are broken (all are counted, the first ones listed), their format is
            not known, or nothing is left to train on.
        OutputError: The tokenized data cannot be written.
    """
    o = read_dataset_options(PreferenceOptions, "preference_dataset", options, tokenizer)
    preparation = AnswerPreparation(tokenizer, read_sources(source, o), o)
    store = prepared(preparation, o)
    chosen = repeated(store, preparation.sources, o.seed)
    if is_paired := _is_paired(store):
        chosen = chosen[store.samples["wanted"][chosen]]
    dataset = PreferenceDataset(store, chosen).used(o)
    if o.packed and tokenizer.max_seq_len is not None:
        packs = Packs(dataset, tokenizer.max_seq_len * (1 + is_paired), seed=o.seed)
        return StockPairs(packs) if is_paired else StockPacks(packs, tokenizer.pad_id)
    return StockPairs(dataset) if is_paired else dataset


def _is_paired(store: Store) -> bool:
    """Whether two neighbours of a store are a pair.

    Raises:
        DataError: Some are, and others are single answers.
    """
    rows = store.samples[["source", "row"]]
    alike = rows[1:] == rows[:-1]
    if not alike.any():
        return False
    if len(rows) % 2 or not alike[::2].all():
        raise _mixed()
    return True


def _mixed() -> DataError:
    return DataError(
        "dataset.source: some rows have two answers and others one with a label. Train on one kind "
        "at a time."
    )


@dataclass(frozen=True)
class AnswerPreparation(Preparation):
    """How rows of answers become documents: two of a pair, or one."""

    @cached_property
    def settings(self) -> dict[str, Any] | None:
        """All that decides what is in the store; see `Preparation.settings`."""
        settings = super().settings
        return settings and {**settings, "answers": True}

    def read(
        self, row: Mapping[str, Any], format: Format, filter: str | None
    ) -> tuple[Chat, dict[str, Any]]:
        """Read the chosen answer and the rejected one, or an answer and whether it is a good one.

        Raises:
            DataError: The row cannot be used.
        """
        given = row
        if isinstance(format, AnyCase | NamedColumns):
            given, format = format.renamed(row), format.format
        row = {**row, **given}
        chosen = self.completed(format.read(given), row)
        if not isinstance(format, PreferencePair | OpenAIPreference):
            return chosen, {"wanted": _label(given)}
        other = answer_of(given, format.other)
        try:
            rejected = self.completed(format.read({**given, format.column: other}), row)
        except DataError as error:
            raise DataError(f"{format.other}: {error}") from error
        return chosen, {"rejected": rejected}

    def _conversation(
        self, source: int, index: int, where: str, row: dict[str, Any], format: Format
    ) -> tuple[ChatRow | UnusedRow, list[str]]:
        """Read one row; of single answers the label is read too."""
        found, unread = super()._conversation(source, index, where, row, format)
        if isinstance(found, ChatRow) and found.rejected is None:
            unread = [name for name in unread if name.strip().lower() not in APPROVALS]
        return found, unread

    def weight_column(self, row: Mapping[str, Any], format: Format, source: Source) -> str:
        """Return no column: losses of answers count all alike."""
        return ""

    def rendered(self, row: ChatRow) -> list[RenderedRow]:
        """Return the chosen and the rejected answer after the same prompt, or one answer.

        Raises:
            DataError: The prompts differ, an answer is missing, or cannot be rendered.
        """
        if row.rejected is None:
            return super().rendered(row)
        sides = _trained_where_they_differ(row.chat, row.rejected)
        if self.options.system_prompt is not None:
            sides = [with_system_prompt(side, self.options.system_prompt) for side in sides]
        chosen, rejected = map(self._render_turns, sides)
        return [(row, chosen), (row._replace(wanted=False, chat=row.rejected), rejected)]

    def notice(self, rows: Sequence[RenderedRow], findings: Findings) -> None:
        """Tell what is noticed about a row, once, whichever side it is of."""
        both = [Findings() for _ in rows]
        for one, noticed in zip(rows, both, strict=True):
            super().notice([one], noticed)
        for kind in dict.fromkeys(kind for noticed in both for kind in noticed.counts):
            place = next(found.places[kind][0] for found in both if kind in found.places)
            findings.add(kind, *place)

    def append(
        self, rows: Sequence[RenderedRow], encoding: Future[TokenizedChats], writer: StoreWriter
    ) -> None:
        """Write encoded answers, both of a pair or none, each cut to its length."""
        single = [row.rejected is None for row, _ in rows]
        if any(single) and not all(single):
            raise _mixed()
        if all(single):
            super().append(rows, encoding, writer)
            return
        chats = encoding.result()
        full = chats.lengths
        whole = chats.split()
        kept, shortened = np.zeros(len(rows), np.bool_), list[Tokens]()
        for first in range(0, len(rows), 2):
            here = slice(first, first + 2)
            where = rows[first][0].where
            sides = self._cut([chat for _, chat in rows[here]], whole[here])
            shortened += sides
            kept[here] = is_kept = _differ(sides) and all(side.trained.any() for side in sides)
            longest = int(full[here].max())
            if not _differ(whole[here]):
                writer.findings.add(SAME_ANSWERS, where)
                continue
            if not is_kept:
                writer.lost.append(longest)
                is_dropped = self.options.truncate == "drop"
                writer.findings.add(
                    TOO_LONG if is_dropped else CUT_AWAY, where, f"{longest} tokens"
                )
            elif any(len(side.ids) < size for side, size in zip(sides, full[here], strict=True)):
                writer.findings.add(TRUNCATED, where, f"{longest} tokens")
        kept_rows = [row for (row, _), keep in zip(rows, kept, strict=True) if keep]
        writer.append(TokenizedChats.join(shortened).select(kept), full[kept], kept_rows)

    def _cut(self, chats: Sequence[Rendered], sides: Sequence[Tokens]) -> list[Tokens]:
        """Return what is left of both sides; nothing of a pair that goes."""
        limit = self.tokenizer.max_seq_len
        if limit is None or all(len(side.ids) <= limit for side in sides):
            return list(sides)
        if self.options.truncate == "right":
            return [side.first(limit) for side in sides]
        if self.options.truncate == "drop":
            return [side.first(0) for side in sides]
        try:
            return self.without_oldest([chat.turns for chat in chats], limit)
        except DataError:  # The template fails on what is left; nothing of it is trained
            return [side.first(0) for side in sides]


def _differ(sides: Sequence[Tokens]) -> bool:
    return not np.array_equal(sides[0].ids, sides[1].ids)


def _trained_where_they_differ(chosen: Chat, rejected: Chat) -> list[list[Turn]]:
    """Return both sides of a pair; answers from the first one on that differs are trained on.

    Raises:
        DataError: They differ before there is an answer, or one of them has none.
    """
    if isinstance(chosen, Written) or isinstance(rejected, Written):
        raise DataError("an answer is written as one text, and nothing tells it from its prompt")
    chosen, rejected = ([_plain(turn) for turn in chat] for chat in (chosen, rejected))
    alike = shared_turns([chosen, rejected])
    if alike == len(chosen) == len(rejected):  # counted later, as those that are tokenized alike
        alike = max((i for i, turn in enumerate(chosen) if turn.role == "assistant"), default=alike)
    named = {"chosen": chosen, "rejected": rejected}
    if ended := [name for name, turns in named.items() if len(turns) == alike]:
        raise DataError(f"{ended[0]} has no answer: it ends where that of the other begins")
    sides = []
    for name, turns in named.items():
        if turns[alike].role != "assistant":
            raise DataError(
                "chosen and rejected have different prompts: message "
                f"{alike + 1} of {name} is {turns[alike].role}'s, "
                f"{short_repr(turns[alike].content)}, and is not that of the other"
            )
        if not turns[alike].content.strip():
            raise DataError(f"the {name} answer is empty")
        sides.append(
            [
                turn._replace(trained=i >= alike and turn.role == "assistant")
                for i, turn in enumerate(turns)
            ]
        )
    return sides


def _plain(turn: Turn) -> Turn:
    """Return a message without what it asks to be trained on: the answers are."""
    return turn._replace(trained=False, wanted=None, weight=1.0)


SAYS_YES = (
    *("true", "yes", "1", "good", "desirable", "chosen", "thumbs_up", "up", "positive", "like"),
    "liked",
)


def _label(row: Mapping[str, Any]) -> bool:
    """Return whether a row calls its answer a good one.

    Raises:
        DataError: It does not say, or says it twice.
    """
    said = {name: row[name] for name in row if name.strip().lower() in APPROVALS}
    labels = {name: value for name, value in said.items() if value is not None}
    if len(labels) != 1:
        raise DataError(
            f"there is no rejected answer and {'no' if not labels else 'more than one'} label; the "
            f"keys are: {key_names(row)}"
        )
    ((name, value),) = labels.items()
    plain = value.strip().lower() if isinstance(value, str) else value
    if plain in SAYS_YES or (isinstance(plain, int | float) and plain == 1):
        return True
    if plain in SAYS_NO or (isinstance(plain, int | float) and plain in (0, -1)):
        return False
    raise DataError(f"{name} is {short_repr(value)}, expected true or false")


# Shapes: N samples, W documents of one, T tokens of all of these
class PreferenceDataset(ChatDataset):
    """Pairs of answers of a store, or answers, read one by one."""

    def __init__(self, store: Store, chosen: NDArray[np.int64]) -> None:
        """Choose samples of a store by their first documents, [N]."""
        super().__init__(store, chosen)
        self.is_paired = _is_paired(store)
        self.has_mismatched = False
        """Whether each sample comes with answers to other questions, as KTO needs them."""
        self.reference: NDArray[np.float32] | None = None
        """Log p of every document of the store without the adapter, [documents], and of it with
        another one's answer, [2, documents], where these were computed once."""

    @property
    def document_lengths(self) -> NDArray[np.int32]:
        """Tokens of each document of the store."""
        return np.asarray(self.store.samples["length"], np.int32)

    @property
    def width(self) -> int:
        """Documents of a sample."""
        return 1 + self.is_paired

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``tokens`` and ``labels``, each [T], and of each document what `beside` has."""
        tokens, labels = self.arrays(index)
        sample = {"tokens": torch.tensor(tokens), "labels": torch.tensor(labels)}
        return {**sample, **self.beside(index)}

    def arrays(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return tokens and labels of all documents as arrays, each [T]."""
        sides = [self.document(document) for document in self.documents_of(index)]
        tokens, labels = (np.concatenate(parts) for parts in zip(*sides, strict=True))
        return tokens, labels

    def beside(self, index: int) -> dict[str, Any]:
        """Return ``lengths`` and ``wanted``, each [W], of the documents of a sample.

        And ``reference``, [W], log p without the adapter, where it is known; and ``mismatched``,
        another sample, the prompts with answers to others.
        """
        documents = self.documents_of(index)
        samples = self.store.samples[documents]
        beside: dict[str, Any] = {
            "lengths": torch.tensor(samples["length"].tolist()),
            "wanted": torch.tensor(samples["wanted"].tolist()),
        }
        if self.has_mismatched:
            beside["mismatched"] = self._mismatched(documents)
        if self.reference is not None:
            own, others = torch.tensor(self.reference[:, documents])
            beside["reference"] = own
            if self.has_mismatched:
                beside["mismatched"]["reference"] = others
        return beside

    def documents_of(self, index: int) -> list[int]:
        """Return the documents of a sample, as the store numbers them."""
        first = int(self.chosen[index])
        return list(range(first, first + self.width))

    def document(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return tokens and labels of a document of the store, each [S]."""
        tokens = self.store.read(number)
        return tokens.ids, np.where(tokens.trained, tokens.ids, np.int32(IGNORED))

    def single(self) -> ChatDataset:
        """Return the documents as samples of their own."""
        documents = self.chosen[:, None] + np.arange(self.width)
        return ChatDataset(self.store, documents.ravel())

    def _mismatched(self, documents: Sequence[int]) -> dict[str, Any]:
        """Return prompts with the answers of the sample before, of the whole store.

        As long as the store's longest document at most.
        """
        limit = int(self.store.samples["length"].max())
        rows = []
        for document in documents:
            ids, labels = self.document(document)
            others, other_labels = self.document((document - self.width) % len(self.store.samples))
            prompt, start = (
                int((labels != IGNORED).argmax()),
                int((other_labels != IGNORED).argmax()),
            )
            tokens = np.concatenate([ids[:prompt], others[start:]])[:limit]
            labels = np.concatenate([np.full(prompt, IGNORED), other_labels[start:]])[:limit]
            rows.append((tokens, labels))
        return {
            "tokens": torch.tensor(np.concatenate([tokens for tokens, _ in rows])),
            "labels": torch.tensor(np.concatenate([labels for _, labels in rows])),
            "lengths": torch.tensor([len(tokens) for tokens, _ in rows]),
            "wanted": torch.ones(len(rows), dtype=torch.bool),
        }

    def _of(self, chosen: NDArray[np.int64]) -> "PreferenceDataset":
        other = super()._of(chosen)
        other.has_mismatched, other.reference = self.has_mismatched, self.reference
        return other

    def _column(self, name: str) -> NDArray[Any]:
        values = self.store.samples[name]
        total = values[self.chosen]
        for later in range(1, self.width):
            total = total + values[self.chosen + later]
        return total
