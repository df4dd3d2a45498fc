"""Raw text, for continued pre-training: whole documents, in windows of which all is trained.

A document becomes the tokens that transformers makes of its text, and the end-of-text token ``E``.
With room for 5 tokens and an overlap of 2::

    document   d0 d1 d2 d3 d4 d5 d6 d7  E
    tokens     d0 d1 d2 d3 d4     d3 d4 d5 d6 d7     d6 d7  E
    labels      . d1 d2 d3 d4      .  . d5 d6 d7      .  .  E

A window is a sample of its own. Those of a document are one group, so none of it is both trained
on and held out. Packed, windows of several documents lie in one row, and none sees another.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, Literal

from phi3_plugin.data.columns import filled_but
from phi3_plugin.data.dataset import (
    ChatDataset,
    UseOptions,
    dataset_of,
    read_dataset_options,
)
from phi3_plugin.data.findings import NO_TEXT, WEIGHTED, Findings, UnusedRow
from phi3_plugin.data.formats import Format
from phi3_plugin.data.packing import StockPacks
from phi3_plugin.data.preparation import LONGEST, Preparation, RenderedRow
from phi3_plugin.data.sources import DocumentOptions, Source, read_sources
from phi3_plugin.data.store import ChatRow, StoreWriter
from phi3_plugin.data.template import Piece, Rendered
from phi3_plugin.data.tokenizer import Phi3Tokenizer, TokenizedChats, Tokens
from phi3_plugin.data.turns import Chat, Written, checked_text, column
from phi3_plugin.errors import ConfigError, DataError
from phi3_plugin.options import AnyText, Kind, is_whole, takes

_OVERLAP = Kind("a whole number, 0 or above", partial(is_whole, least=0))


@dataclass(frozen=True, kw_only=True)
class TextOptions(DocumentOptions, UseOptions):
    """The options of :func:`text_dataset`; those of `UseOptions` are as for `chat_dataset`."""

    overlap: Annotated[int, _OVERLAP] = 0
    """Tokens with which a window of a longer document repeats the end of the one before. They are
    context there and are not trained on again. 0 cuts: the first token of a window, which nothing
    comes before, is then not trained on."""
    special_in_text: Literal["text", "parse"] = "text"
    """What a special token is that is written in a document. "text": the characters it is written
    in. "parse": that token, as for transformers by itself."""
    group_by: AnyText | None = None
    """A column; documents with the same value stay together when data is held out. By default
    those of the same text do."""


@takes(TextOptions)
def text_dataset(
    tokenizer: Phi3Tokenizer, source: Any = None, **options: Any
) -> ChatDataset | StockPacks:
    """Read and tokenize documents, of which every token is trained on.

    Args:
        tokenizer: Tokenizer of the checkpoint; ``max_seq_len`` is the length of a window.
        source: As for :func:`phi3_plugin.data.chat_dataset`, and .txt and .md files (each also as
            .gz, .xz or .zst), each of them one document.
        **options: Those of `TextOptions`, `DocumentOptions`, `RowOptions` and `UseOptions`.

    Raises:
        ConfigError: An option is missing or does not fit the others.
        MissingFileError: A local source is not there.
        DataError: Documents are broken (all are counted, the first ones listed), or nothing is
            left to train on.
        OutputError: The tokenized data cannot be written.
    """
    o = read_dataset_options(TextOptions, "text_dataset", options, tokenizer)
    limit = tokenizer.max_seq_len
    if o.overlap and (limit is None or o.overlap >= limit):
        raise ConfigError(
            f"dataset.overlap: {o.overlap} must be less than the length of a window, which is "
            f"tokenizer.max_seq_len={limit}."
        )
    return dataset_of(TextPreparation(tokenizer, read_sources(source, o), o), o)


@dataclass(frozen=True)
class Document:
    """A column whose text is a document."""

    name: str
    precedence: ClassVar[int] = 0

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the column."""
        return self.name in row

    def read(self, row: Mapping[str, Any]) -> Written:
        """Read the text; null is an empty one.

        Raises:
            DataError: There is no such column, or it holds something else.
        """
        value = column(row, self.name)
        return Written("" if value is None else checked_text(self.name, value), ())

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Return the other columns that are filled."""
        return filled_but(row, [self.name])

    def __str__(self) -> str:
        """Show the shape to the user."""
        return f"documents in {self.name}"


@dataclass(frozen=True)
class TextPreparation(Preparation):
    """How documents become windows."""

    @cached_property
    def settings(self) -> dict[str, Any] | None:
        """All that decides what is in the store; see `Preparation.settings`."""
        o = self.options
        how = [o.overlap, o.special_in_text, self.tokenizer.text_start]
        settings = super().settings
        return settings and {**settings, "documents": how}

    def format_of(self, first: Sequence[dict[str, Any]], source: Source) -> Format:
        """Return how the rows of a source are read."""
        assert source.column is not None  # as `DocumentOptions` have it
        return Document(source.column)

    def read(
        self, row: Mapping[str, Any], format: Format, filter: str | None
    ) -> tuple[Chat, dict[str, Any]]:
        """Read the document of a row.

        Raises:
            DataError: The row has none.
        """
        return format.read(row), {}

    def conversations(self, noticed: Findings | None = None) -> Iterator[ChatRow | UnusedRow]:
        """Read all documents; one without text comes as that."""
        for row in super().conversations(noticed):
            if isinstance(row, ChatRow) and not _text_of(row).strip():
                yield UnusedRow(NO_TEXT, row.where)
            else:
                yield row

    def rendered(self, row: ChatRow) -> list[RenderedRow]:
        """Return a document as it is.

        Raises:
            DataError: It is too long to be encoded at once.
        """
        text = _text_of(row)
        if len(text) > LONGEST:
            raise DataError(
                f"the document has {len(text):,} characters, more than {LONGEST:,}, which are "
                "encoded at once. Split it into several"
            )
        return [(row, Rendered([Piece(text, True, said=True)]))]

    def notice(self, rows: Sequence[RenderedRow], findings: Findings) -> None:
        """Tell of weights; all else that is noticed is about messages."""
        for row, _ in rows:
            if row.weight != 1:
                findings.add(WEIGHTED, row.where, f"{row.weight:g}")

    def encode(self, texts: Sequence[Rendered]) -> TokenizedChats:
        """Encode documents, each with the end-of-text token after it."""
        return self.tokenizer.encode_documents(
            [text.text for text in texts], special=self.options.special_in_text == "parse"
        )

    def append(
        self, rows: Sequence[RenderedRow], encoding: Future[TokenizedChats], writer: StoreWriter
    ) -> None:
        """Write the windows of encoded documents, all of which anything is trained on."""
        windows, owners = list[Tokens](), list[ChatRow]()
        for (row, rendered), document in zip(rows, encoding.result().split(), strict=True):
            if self.tokenizer.new_tokens:
                self.notice_unread(row, rendered, document, writer.findings)
            parts = self._windows(document)
            windows += parts
            owners += [row] * len(parts)
        tokens = TokenizedChats.join(windows)
        kept = tokens.labelled > 0
        kept_rows = [row for row, keep in zip(owners, kept, strict=True) if keep]
        writer.append(tokens.select(kept), tokens.lengths[kept], kept_rows)

    def _windows(self, document: Tokens) -> list[Tokens]:
        limit, overlap = self.tokenizer.max_seq_len, self.options.overlap
        if limit is None or len(document.ids) <= limit:
            return [document]
        windows = []
        for start in range(0, len(document.ids) - overlap, limit - overlap):
            trained = document.trained[start : start + limit].copy()
            trained[: overlap if start else 0] = False
            windows.append(Tokens(document.ids[start : start + limit], trained))
        return windows


def _text_of(row: ChatRow) -> str:
    assert isinstance(row.chat, Written)  # as `Document` reads it
    return row.chat.text
