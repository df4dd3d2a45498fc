"""From rows to tokens: which rows are used, what of them is trained on, and what is cut off.

    source --rows--> format --Chat--> template --Rendered--> tokenizer --Tokens--> store

A row gives one sample, or is counted with the reason why not. Rows are read and rendered here and
encoded on all cores beside it; only a few batches are held at once, so memory does not grow with
the data.
"""

import gc
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from tqdm import tqdm

from phi3_plugin.data.columns import with_system_prompt
from phi3_plugin.data.findings import (
    BLANK_ANSWER,
    BROKEN,
    CUT_AWAY,
    DROPPED_MESSAGE,
    FILTERED,
    FORGOTTEN_THOUGHT,
    NO_FINAL_ANSWER,
    PASSED_OVER,
    SPECIAL_IN_TEXT,
    TOO_LONG,
    TRUNCATED,
    UNREAD_TOKEN,
    UNUSABLE,
    WEIGHTED,
    WEIGHTLESS,
    Findings,
    UnusedRow,
)
from phi3_plugin.data.formats import (
    USUAL_ROLES,
    AnyCase,
    Format,
    advise_roles,
    pick_format,
    unknown_role,
)
from phi3_plugin.data.order import group_of
from phi3_plugin.data.rows import Row
from phi3_plugin.data.sources import Filtered, FilterFailed, Source
from phi3_plugin.data.store import ChatRow, StoreWriter
from phi3_plugin.data.template import Rendered
from phi3_plugin.data.thoughts import THOUGHT_IN_TEXT
from phi3_plugin.data.tokenizer import Phi3Tokenizer, TokenizedChats, Tokens
from phi3_plugin.data.turns import Chat, Turn, Written, loss_weight
from phi3_plugin.data.unwanted import refuse_unwanted
from phi3_plugin.errors import DataError
from phi3_plugin.options import AnyText, Kind, Switch

ROWS_OF_FORMAT = 10
"""How many readable rows tell the format."""

CONVERSATIONS_AT_ONCE = 1024
CHARACTERS_AT_ONCE = 1_000_000
"""Whichever comes first is encoded at once: enough for all cores, little to hold."""

LONGEST = 4_000_000
"""Characters of a conversation at most: some million tokens, of which each takes 100 bytes."""

WAITING = 2
"""Batches that are being encoded while the next is rendered."""


def _holds_one_gap(value: object) -> bool:
    return isinstance(value, str) and value.count("{}") == 1


_CALLS = Kind(
    "a text with one {}, where the calls are written, as in <|tool_call|>{}<|/tool_call|>,",
    _holds_one_gap,
)
_THOUGHTS = Kind(
    f"a text with one {{}}, where the thought is written, as in {THOUGHT_IN_TEXT!r},",
    _holds_one_gap,
)


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """How a conversation is written; a data set is tokenized again if one of them changes."""

    tool_calls: Annotated[str, _CALLS] | None = None
    """How a message's ``tool_calls`` are written: a text with one ``{}`` for them."""
    thoughts: Annotated[str, _THOUGHTS] | None = None
    """How what a message has in ``reasoning_content``, ``reasoning`` or ``thinking`` is written in
    front of its content: a text with one ``{}`` for it. By default where the chat template writes
    it, or ``<think>\\n{}\\n</think>\\n`` for a checkpoint that thinks; any other refuses it."""
    system_prompt: AnyText | None = None
    """Put in front of every conversation that has no system message; one that has any keeps its
    own. An empty text is an empty system message, which the template may leave out; None adds
    none."""
    add_eos: Switch = False
    """Put the end-of-text token at the end of conversations whose template does not. It is trained
    on as the template's own is: only with ``train_on: all``."""
    group_by: AnyText | None = None
    """A column; rows with the same value stay together when data is held out. By default rows do
    whose conversations start alike."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions(RenderOptions):
    """How a row becomes a sample; a data set is tokenized again if one of them changes."""

    train_on: Literal["assistant", "last", "marked", "all"] = "assistant"
    """"assistant": what the assistant says and the token that ends it, unless the message has a
    weight of 0 or ``train: false``. "last": the last such turn only. "marked": the messages with a
    weight above 0 or ``train: true``. "all": every token but the first, user text, roles and what
    the template ends with among them; conversations need no assistant turn then."""
    truncate: Literal["right", "left", "drop"] = "right"
    """What becomes of conversations longer than ``tokenizer.max_seq_len``. "right": the end is cut
    off. "left": the oldest exchanges go, whole, and the system prompt stays; where the last
    exchange alone is still too long, its question loses its start, and where the answer is, its end
    is cut off. "drop": the conversation goes."""


RenderedRow = tuple[ChatRow, Rendered]


@dataclass(frozen=True)
class Preparation:
    """How the rows of some sources become samples."""

    tokenizer: Phi3Tokenizer
    sources: Sequence[Source]
    options: Any
    """`SampleOptions`, or what another data set has in their place."""

    @cached_property
    def settings(self) -> dict[str, Any] | None:
        """All that decides what is in the store, as JSON values; None if that cannot be known."""
        content = [source.fingerprint() for source in self.sources]
        if None in content:
            return None
        names = [field.name for field in fields(SampleOptions) if hasattr(self.options, field.name)]
        return {
            "content": content,
            "sources": [[*map(str, s.files or ()), s.settings()] for s in self.sources],
            "tokenizer": [self.tokenizer.fingerprint, self.tokenizer.max_seq_len],
            "options": {name: getattr(self.options, name) for name in names},
        }

    def write(self, writer: StoreWriter) -> None:
        """Tokenize all rows into a store.

        Raises:
            DataError: A source cannot be read to its end, or was changed meanwhile.
        """
        settings = self.settings  # of the files as they are before they are read
        waiting = deque[tuple[list[RenderedRow], Future[TokenizedChats]]]()
        gc.freeze()  # Or each collection would walk over all that was imported
        with ThreadPoolExecutor(WAITING) as pool:
            try:
                for rows in self._rendered(writer):
                    texts = [rendered for _, rendered in rows]
                    waiting.append((rows, pool.submit(self.encode, texts)))
                    if len(waiting) > WAITING:
                        self.append(*waiting.popleft(), writer)
                while waiting:
                    self.append(*waiting.popleft(), writer)
            finally:
                for _, future in waiting:
                    future.cancel()
                gc.unfreeze()
        if settings and settings["content"] != [s.fingerprint() for s in self.sources]:
            raise DataError(
                "dataset.source: files were changed while they were read. Run the command again."
            )

    def _rendered(self, writer: StoreWriter) -> Iterator[list[RenderedRow]]:
        """Yield batches of rendered rows; the writer is told of all rows, and of unused ones why.

        What was noticed about the others is told too.
        """
        batch = list[RenderedRow]()
        size = 0
        rows = tqdm(
            self.conversations(writer.findings),
            desc="Tokenizing",
            unit=" rows",
            disable=None,
            leave=False,
        )
        for row in rows:
            writer.rows += 1
            if isinstance(row, UnusedRow):
                writer.findings.add(*row)
                continue
            try:
                sides = self.rendered(row)
                for size_of_one in (len(rendered.text) for _, rendered in sides):
                    if size_of_one > LONGEST:
                        raise DataError(
                            f"the conversation has {size_of_one:,} characters, more than "
                            f"{LONGEST:,}, which are several times what any model reads. Split it"
                        )
            except DataError as error:
                writer.findings.add(UNUSABLE, row.where, str(error))
                continue
            self.notice(sides, writer.findings)
            batch += sides
            size += sum(len(rendered.text) for _, rendered in sides)
            if len(batch) >= CONVERSATIONS_AT_ONCE or size > CHARACTERS_AT_ONCE:
                yield batch
                batch = []
                size = 0
        if batch:
            yield batch

    def rendered(self, row: ChatRow) -> list[RenderedRow]:
        """Return what a row gives, rendered: a conversation, or two that are dropped together.

        Raises:
            DataError: There is nothing to train on, or it cannot be rendered.
        """
        return [(row, self.render(row.chat))]

    def notice(self, rows: Sequence[RenderedRow], findings: Findings) -> None:
        """Tell what is noticed about a row."""
        for row, rendered in rows:
            self._notice(row, rendered, findings)

    def _notice(self, row: ChatRow, rendered: Rendered, findings: Findings) -> None:
        if rendered.dropped:
            findings.add(DROPPED_MESSAGE, row.where, ", ".join(rendered.dropped))
        if rendered.forgotten:
            findings.add(FORGOTTEN_THOUGHT, row.where)
        if not isinstance(row.chat, Written) and row.chat[-1].role != "assistant":
            findings.add(NO_FINAL_ANSWER, row.where, f"the last turn is {row.chat[-1].role}'s")
        if any(turn.trained and not turn.content.strip() for turn in rendered.turns):
            findings.add(BLANK_ANSWER, row.where)
        if self._passes_over(row.chat):
            findings.add(PASSED_OVER, row.where)
        weights = {row.weight * turn.weight for turn in rendered.turns if turn.trained}
        weights = weights or {row.weight}  # of a text that is written already
        if weights != {1.0}:
            told = " and ".join(f"{weight:g}" for weight in sorted(weights))
            findings.add(WEIGHTED, row.where, told)
        # Calls of tools are written with special tokens
        if self.tokenizer.special_in_text == "parse" and self.options.tool_calls is None:
            tokens = self.tokenizer.template.control_tokens
            if any(piece.said and tokens.search(piece.text) for piece in rendered.pieces):
                findings.add(SPECIAL_IN_TEXT, row.where)

    def encode(self, texts: Sequence[Rendered]) -> TokenizedChats:
        """Encode what was rendered."""
        return self.tokenizer.encode_chats(texts)

    def append(
        self, rows: Sequence[RenderedRow], encoding: Future[TokenizedChats], writer: StoreWriter
    ) -> None:
        """Write encoded conversations, each cut to its length, if anything of it is trained on."""
        chats = encoding.result()
        if self.tokenizer.new_tokens:
            for (row, rendered), tokens in zip(rows, chats.split(), strict=True):
                self.notice_unread(row, rendered, tokens, writer.findings)
        full = chats.lengths
        limit = self.tokenizer.max_seq_len
        if limit is not None and (full > limit).any():
            whole = zip(rows, chats.split(), strict=True)
            chats = TokenizedChats.join(
                [self._shorten(rendered, tokens, limit) for (_, rendered), tokens in whole]
            )
        kept = chats.labelled > 0
        for n in np.flatnonzero((full > chats.lengths) | ~kept).tolist():
            kind = TRUNCATED if kept[n] else CUT_AWAY
            if not kept[n]:
                writer.lost.append(int(full[n]))
                if self.options.truncate == "drop" and limit is not None and full[n] > limit:
                    kind = TOO_LONG
            writer.findings.add(kind, rows[n][0].where, f"{full[n]} tokens")
        kept_rows = [row for (row, _), keep in zip(rows, kept, strict=True) if keep]
        writer.append(chats.select(kept), full[kept], kept_rows)

    def notice_unread(
        self, row: ChatRow, rendered: Rendered, tokens: Tokens, findings: Findings
    ) -> None:
        """Tell of texts that were to be one token and are not, as behind a letter for a Phi-3."""
        text = "".join(piece.text for piece in rendered.pieces)
        for number, token in self.tokenizer.new_tokens.items():
            written = text.count(token.entry["content"])
            read = int((tokens.ids == number).sum())
            if read < written:
                said = f"{token.entry['content']!r} is written {written} times, and read {read}"
                findings.add(UNREAD_TOKEN, row.where, f"{said}: see normalized in docs/data.md")

    # Which rows are conversations

    def conversations(self, noticed: Findings | None = None) -> Iterator[ChatRow | UnusedRow]:
        """Read all sources; a row that is no conversation comes as why it is none.

        Args:
            noticed: Is told how rows are read, and which of their columns are not.
        """
        for number, source in enumerate(self.sources):
            rows = _numbered(source.rows())
            first = list[tuple[int, Row]]()
            for index, row in rows:
                if isinstance(row.value, DataError):
                    yield _unused(row.where, row.value)
                    continue
                first.append((index, row))
                if len(first) == ROWS_OF_FORMAT:
                    break
            if not first:
                continue
            readable = [row.value for _, row in first if isinstance(row.value, dict)]
            format = self.format_of(readable, source)
            shape = f"{source.name}: read as {format}"
            for index, row in chain(first, rows):
                if isinstance(row.value, DataError):
                    yield _unused(row.where, row.value)
                else:
                    found, unread = self._conversation(number, index, row.where, row.value, format)
                    if noticed is not None and isinstance(found, ChatRow):
                        noticed.add_columns(shape, unread)
                    yield found

    def format_of(self, first: Sequence[dict[str, Any]], source: Source) -> Format:
        """Return how the rows of a source are read, judged by the first, at least one.

        Raises:
            DataError: No format fits.
        """
        options = {
            "tool_calls": self.options.tool_calls,
            "roles": source.roles,
            "reads": self.tokenizer.template.reads,
            "thoughts": self.options.thoughts or self.tokenizer.thoughts,
        }
        return _format(first, source, options)

    def _conversation(
        self, source: int, index: int, where: str, row: dict[str, Any], format: Format
    ) -> tuple[ChatRow | UnusedRow, list[str]]:
        """Read one row; and say which of its columns are not read."""
        try:
            name = self.weight_column(row, format, self.sources[source])
            weight = loss_weight(row.get(name), name)
            if not weight:
                return UnusedRow(WEIGHTLESS, where), []
            chat, beside = self.read(row, format, self.sources[source].filter)
            reads = self.tokenizer.template.reads
            unread = format.unread(reads.without(row))
            group = group_of(row, chat, self.options.group_by)
        except DataError as error:
            return UnusedRow(UNUSABLE, where, str(error)), []
        unread = [one for one in unread if one != name]
        return ChatRow(where, source, index, group, chat, row, weight=weight, **beside), unread

    def weight_column(self, row: Mapping[str, Any], format: Format, source: Source) -> str:
        """Return which column says how much the loss counts a row; "" is none.

        Where the user says what to read, it is what they say.
        """
        if source.columns is not None or source.prompt is not None:
            return (source.columns or {}).get("weight", "")
        if isinstance(format, AnyCase):
            return next((name for name in row if name.strip().lower() == "weight"), "")
        return "weight"

    def read(
        self, row: Mapping[str, Any], format: Format, filter: str | None
    ) -> tuple[Chat, dict[str, Any]]:
        """Read the conversation of a row, and what else `ChatRow` has of it.

        Raises:
            DataError: The row cannot be used.
        """
        chat = self.completed(format.read(row), row)
        refuse_unwanted(row, format, filter)
        return chat, {}

    def completed(self, chat: Chat, row: Mapping[str, Any]) -> Chat:
        """Return a conversation with what the template reads of the row, or finds in a text."""
        if not isinstance(chat, Written):
            return self.tokenizer.template.reads.of_row(chat, row)
        with suppress(DataError):  # where it matters, it is said when it is rendered
            return self.tokenizer.template.find_answers(chat)
        return chat

    # What is trained on

    def render(self, chat: Chat) -> Rendered:
        """Write a conversation as the template does, and mark what is trained on.

        Raises:
            DataError: There is nothing to train on, or the conversation cannot be rendered.
        """
        if isinstance(chat, Written):
            return self._render_text(chat)
        return self._render_turns(self.marked(chat))

    def marked(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Mark the turns that are trained on, and add the system message.

        Raises:
            DataError: There is nothing to train on.
        """
        train_on = self.options.train_on
        if train_on == "marked":
            chosen = [turn.wanted is True for turn in turns]
        elif train_on == "last":
            last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
            chosen = [i == last for i in range(len(turns))]
        else:
            chosen = [turn.role == "assistant" and turn.wanted is not False for turn in turns]
        if train_on != "all" and not any(chosen):
            raise DataError(_nothing_to_train_on(train_on, turns))
        turns = [
            turn if turn.trained is trained else turn._replace(trained=trained)
            for turn, trained in zip(turns, chosen, strict=True)
        ]
        if train_on in ("last", "all"):  # which pass over what messages say
            turns = [turn if turn.weight == 1 else turn._replace(weight=1.0) for turn in turns]
        prompt = self.options.system_prompt
        return turns if prompt is None else with_system_prompt(turns, prompt)

    def _passes_over(self, chat: Chat) -> bool:
        """Whether a message asks for something that is not done."""
        if isinstance(chat, Written) or self.options.train_on == "marked":
            return False
        if self.options.train_on == "assistant":
            return any(turn.wanted and turn.role != "assistant" for turn in chat)
        return any(turn.wanted is not None for turn in chat)

    def _render_turns(self, turns: Sequence[Turn]) -> Rendered:
        try:
            rendered = self.tokenizer.render(turns)
        except DataError as error:
            if (role := _unusual_role(turns)) and "leaves out" in str(error):
                raise unknown_role(role) from error
            raise
        # Who asks or answers under a name that the template does not know is not left out
        if rendered.dropped and (role := _unusual_role(turns, rendered.dropped)):
            raise unknown_role(role)
        if rendered.forgotten and not any(piece.trained for piece in rendered.pieces):
            raise DataError("the chat template leaves out the thought of what is to be trained on")
        if self.options.add_eos:
            rendered = rendered.ended(self.tokenizer.eos_token)
        return rendered.trained_throughout() if self.options.train_on == "all" else rendered

    def _render_text(self, chat: Written) -> Rendered:
        template = self.tokenizer.template
        eos = self.tokenizer.eos_token
        train_on = self.options.train_on
        if self.options.system_prompt is not None:
            raise DataError(
                "dataset.system_prompt cannot be put in front of a text that is written already"
            )
        if self.options.add_eos and not chat.text.rstrip().endswith(eos):
            chat = chat._replace(text=chat.text + eos)
        if train_on == "all":
            return template.cut_up(chat, ()).trained_throughout()
        if train_on == "marked":
            raise DataError("a text has no messages that could ask to be trained on")
        said = chat.said if chat.said is not None else template.find_answers(chat).said or ()
        if not said:
            raise DataError(_nothing_to_train_on(train_on, ()))
        return template.cut_up(chat, said[-1:] if train_on == "last" else said)

    # What becomes of conversations that are too long

    def _shorten(self, chat: Rendered, tokens: Tokens, limit: int) -> Tokens:
        """Return what is left of a conversation; nothing of one that goes."""
        if len(tokens.ids) <= limit:
            return tokens
        if self.options.truncate == "right":
            return tokens.first(limit)
        if self.options.truncate == "drop":
            return tokens.first(0)
        if not chat.turns:
            return _end_of_text(tokens, limit)
        try:
            return self.without_oldest([chat.turns], limit)[0]
        except DataError:  # The template fails on what is left; nothing of it is trained
            return tokens.first(0)

    def without_oldest(self, sides: Sequence[Sequence[Turn]], limit: int) -> list[Tokens]:
        """Shorten conversations that begin alike from their start, all of them alike.

        Args:
            sides: Their turns carry what is trained on.
            limit: Tokens that each may have.

        Raises:
            DataError: The template fails on what is left.
        """
        first = sides[0][: shared_turns(sides)]
        system = [turn for turn in first[:1] if turn.role == "system"]
        starts = [i for i, turn in enumerate(first) if turn.role == "user" and i > len(system)]
        later = [[[*system, *turns[start:]] for turns in sides] for start in starts]
        fitting = self._first_fit(len(later), later.__getitem__, limit)
        if fitting is not None:
            return fitting
        last = later[-1] if later else [list(turns) for turns in sides]
        asked = enumerate(last[0][: shared_turns(last)])
        asking = [i for i, turn in asked if turn.role == "user" and not turn.trained]
        if asking:
            at = asking[0]
            question = last[0][at]

            def without_start(n: int) -> list[list[Turn]]:
                shorter = question._replace(content=question.content[n + 1 :])
                return [[*turns[:at], shorter, *turns[at + 1 :]] for turns in last]

            fitting = self._first_fit(len(question.content), without_start, limit)
        if fitting is not None:
            return fitting
        return [self._encode(turns).first(limit) for turns in last]

    def _first_fit(
        self, count: int, candidate: Callable[[int], Sequence[Sequence[Turn]]], limit: int
    ) -> list[Tokens] | None:
        """Return the first that are short enough, of conversations that get shorter.

        By bisection, so that a hundred exchanges are rendered and encoded seven times.
        """
        tokens = dict[int, list[Tokens]]()

        def fits(index: int) -> bool:
            tokens[index] = [self._encode(turns) for turns in candidate(index)]
            return all(len(side.ids) <= limit for side in tokens[index])

        at = bisect_left(range(count), True, key=fits)
        return tokens[at] if at < count else None

    def _encode(self, turns: Sequence[Turn]) -> Tokens:
        return self.tokenizer.encode_chats([self._render_turns(turns)]).split()[0]


def shared_turns(sides: Sequence[Sequence[Turn]]) -> int:
    """Return with how many turns conversations begin alike."""
    alike = 0
    for turns in zip(*sides, strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        alike += 1
    return alike


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


def _format(first: Sequence[dict[str, Any]], source: Source, options: dict[str, Any]) -> Format:
    """Return how the rows of a source are read, judged by the first, at least one."""
    try:
        return pick_format(source.format, source.columns, first, prompt=source.prompt, **options)
    except DataError as error:
        # That of most rows, so that the others are bad rows
        usual = dict[str, list[Format]]()
        for row in first:
            with suppress(DataError):
                format = pick_format(None, None, [row], **options)
                usual.setdefault(str(format), []).append(format)
        if not usual:
            raise DataError(f"dataset.source: {source.name}: {error}") from error
        return max(usual.values(), key=len)[0]


def _unusual_role(turns: Iterable[Turn], dropped: Sequence[str] | None = None) -> str | None:
    """Return a role that is none of the usual ones, and whose message was dropped."""
    for turn in turns:
        is_dropped = dropped is None or f"the {turn.role} message" in dropped
        if turn.role not in USUAL_ROLES and is_dropped:
            return turn.role
    return None


def _nothing_to_train_on(train_on: str, turns: Sequence[Turn]) -> str:
    if train_on == "marked":
        return "no message has a weight above 0 or train: true, so nothing to train on"
    if any(turn.role == "assistant" for turn in turns):
        return "every assistant turn has a weight of 0 or train: false, so nothing to train on"
    roles = ", ".join(dict.fromkeys(turn.role for turn in turns))
    advice = f"; the roles are: {roles}" if roles else ""
    if role := _unusual_role(turns):
        advice += f"; {advise_roles(role)}"
    return f"there is no assistant turn, so nothing to train on{advice}"


def _end_of_text(tokens: Tokens, limit: int) -> Tokens:
    """Keep the end of a text, but do not train the rest of an answer whose start is cut off."""
    end = tokens.part(slice(-limit, None))
    trained = end.trained.copy()
    if not tokens.trained[1:].all():  # or there are no answers: all of it is trained on
        untrained = np.flatnonzero(~trained)
        trained[: untrained[0] if len(untrained) else limit] = False
    return end._replace(trained=trained)
