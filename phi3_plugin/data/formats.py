"""From a row of data to a conversation.

`FORMATS`, at the end, lists the shapes of rows that are read: a new one is a line there, and a
class like those before it where none fits. `BESIDE` in columns.py says which other columns may be
a part of a conversation, and what each format does with them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any, ClassVar, Protocol

from phi3_plugin.data.columns import (
    ADVISE_COLUMNS,
    ADVISE_MESSAGES,
    ASKING,
    BESIDE,
    MEDIA,
    filled,
    filled_but,
    refuse_beside,
    tools_text,
    unread_columns,
    with_columns_beside,
)
from phi3_plugin.data.thoughts import THINK, THOUGHT_FIELDS, THOUGHT_IN_TEXT, thought_of
from phi3_plugin.data.turns import (
    HEAVIEST,
    READS_NOTHING,
    ROLES,
    TRAIN_FLAGS,
    Chat,
    Reads,
    Turn,
    Written,
    as_json,
    checked_text,
    column,
    from_json,
    key_names,
    kind,
    make_turn,
    printable,
    short_repr,
)
from phi3_plugin.errors import DataError
from phi3_plugin.options import is_number


class Format(Protocol):
    """One shape of data row; as text, what an error message calls it."""

    precedence: ClassVar[int]
    """Of the formats that fit, those of the smallest number are meant."""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has this shape, judged by its keys."""

    def read(self, row: Mapping[str, Any]) -> Chat:
        """Read the row as a conversation.

        Raises:
            DataError: The row is broken; the message does not name the row.
        """

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Return the filled columns that are not read.

        Raises:
            DataError: One looks like a part of the prompt.
        """


# Rows that keep a conversation in columns of text


@dataclass(frozen=True)
class Columns:
    """One column a message; a conversation has one message of each role named."""

    names: Mapping[str, str]
    """Role to column."""
    refused: frozenset[str] = frozenset()
    """Columns that would belong to the prompt too: rows that have them are of another shape."""
    precedence: ClassVar[int] = 1

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the columns and none that would be left out."""
        return row.keys() >= set(self.names.values()) and self.refused.isdisjoint(row)

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read system, user and assistant message, in this order; an empty system is none."""
        if not self.refused.isdisjoint(row):
            refuse_beside(
                filled(row, [name for name in row if name in self.refused]), ADVISE_COLUMNS
            )
        texts = [(role, column(row, self.names[role])) for role in ROLES if role in self.names]
        return [make_turn(role, text) for role, text in texts if text or role != "system"]

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Return what is not read; where the user named the columns, nothing is refused."""
        if not self.refused:
            return filled_but(row, self.names.values())
        return unread_columns(row, {*self.names.values(), *BESIDE}, ASKING, ADVISE_COLUMNS)

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return ", ".join(self.names.values())


def question_and_answer(
    user: str, assistant: str, *, unless: Iterable[str] = (), also_read: Iterable[str] = ()
) -> Columns:
    """Return the shape of rows that have a question and an answer.

    Args:
        user: Column of the question.
        assistant: Column of the answer.
        unless: Columns that refuse a row beside all of `BESIDE`.
        also_read: Columns that do not, since somebody reads them.
    """
    refused = {*BESIDE, *unless} - {user, assistant, *also_read}
    return Columns({"user": user, "assistant": assistant}, frozenset(refused))


def alpaca_prompt(instruction: str, told: str) -> str:
    """Return what the user says, as in Microsoft's samples."""
    return f"{instruction}\n Input: {told}"


@dataclass(frozen=True)
class Alpaca:
    r"""``instruction``, ``output`` and, in rows that need them, ``input`` and ``system``.

    The user says ``{instruction}\n Input: {input}``, as in Microsoft's samples; where the input
    is absent, null or empty, the instruction alone.
    """

    columns: Columns
    precedence: ClassVar[int] = 1

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the two columns that all rows have."""
        return self.columns.fits(row)

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the system, the user and the assistant message."""
        user, assistant = self.columns.read(row)
        if row.get("input"):
            told = checked_text("input", row["input"])
            user = user._replace(content=alpaca_prompt(user.content, told))
        if not row.get("system"):
            return [user, assistant]
        return [make_turn("system", row["system"]), user, assistant]

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return f"{self.columns} and perhaps input and system"

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Return what is not read."""
        return self.columns.unread(row)


@dataclass(frozen=True)
class Dolly(Columns):
    """``instruction``, ``response`` and, in rows that need it, ``context`` after the first."""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has all three columns, and none that would be left out."""
        return "context" in row and super().fits(row)

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the user and the assistant message."""
        user, assistant = super().read(row)
        if row.get("context"):
            context = checked_text("context", row["context"])
            user = user._replace(content=f"{user.content}\n\n{context}")
        return [user, assistant]

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return f"{super().__str__()} and context"


ANSWERS = ("output", "response", "answer", "completion")
"""Columns that may hold the answer where the prompt alone is written by the user."""


@dataclass(frozen=True)
class PromptText:
    """A prompt that the user writes, with columns in braces, and the column of the answer."""

    text: str
    names: Mapping[str, str]
    """Role to column, for the assistant and perhaps the system."""
    precedence: ClassVar[int] = 1

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the columns."""
        return row.keys() >= {*prompt_columns(self.text), *self.names.values()}

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read system, user and assistant message."""
        user = make_turn("user", _written_prompt(self.text, row))
        system, assistant = (self.names.get(role) for role in ("system", "assistant"))
        turns = [user, make_turn("assistant", column(row, assistant or ""))]
        if system and (text := column(row, system)):
            turns.insert(0, make_turn("system", text))
        return turns

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Return the columns that the user did not name."""
        return filled_but(row, [*prompt_columns(self.text), *self.names.values()])

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return ", ".join([*prompt_columns(self.text), *self.names.values()])


def prompt_columns(text: str) -> list[str]:
    """Return the columns that a prompt names in braces.

    Raises:
        ValueError: It names none, or braces hold something else.
    """
    parts = [*Formatter().parse(text)]
    names = [name for _, name, _, _ in parts if name is not None]
    if not names or not all(names) or any(form or convert for _, _, form, convert in parts):
        raise ValueError("it must name columns in braces, as in {instruction}")
    return names


def _written_prompt(text: str, row: Mapping[str, Any]) -> str:
    """Write a prompt; what is null is empty in it, and no white space is at its ends."""
    values = {name: _in_prompt(column(row, name)) for name in prompt_columns(text)}
    parts = (
        before + (values[name] if name else "") for before, name, _, _ in Formatter().parse(text)
    )
    return "".join(parts).strip()


def _in_prompt(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        value = "\n".join(value)
    return value if isinstance(value, str) else as_json("a column", value, ensure_ascii=False)


@dataclass(frozen=True)
class TextColumn:
    """A column of conversations that are written as the chat template writes them."""

    name: str
    precedence: ClassVar[int] = 2

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the column."""
        return self.name in row

    def read(self, row: Mapping[str, Any]) -> Written:
        """Read the text; the marks in it tell later who says what."""
        text = checked_text(f"the {self.name} content", column(row, self.name))
        for name in filled(row, BESIDE):
            value = row[name]
            part = BESIDE[name]
            is_in_text = part != "unread" and isinstance(value, str) and value.strip() in text
            if part != "prompt" and not is_in_text:
                refuse_beside([name], "write it in the text, or remove the column")
        return Written(text, None)

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Return the other columns: what the text was made of, or notes about it."""
        return filled_but(row, [self.name])

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return f"{self.name}, written as the chat template writes it"


# What was thought before an answer


def with_thought(turn: Turn, thought: str, reads: Reads, thoughts: str | None) -> Turn:
    """Put what was thought where the template writes it, or in front of what is said.

    Args:
        turn: What was said.
        thought: What was thought.
        reads: What the chat template reads.
        thoughts: See `MessageList`.

    Raises:
        DataError: Nobody says how to write it, or it does not belong there.
    """
    checked_text(f"the thought of the {turn.role} message", thought)
    if turn.role != "assistant":
        raise DataError(f"the {turn.role} message has a thought, and only the assistant's may")
    if turn.content.lstrip().startswith(THINK):
        raise DataError(
            f"a message has its thought in a field, and {THINK} in its content; remove one"
        )
    if thoughts is not None:
        return turn._replace(content=thoughts.replace("{}", thought) + turn.content)
    if reads.thought is None:
        raise DataError(
            "a message has a thought, and neither the chat template nor anything else says how "
            f"to write it; set dataset.thoughts, as in {THOUGHT_IN_TEXT!r}, or remove it"
        )
    return turn._replace(thought=thought)


@dataclass(frozen=True)
class ThoughtColumn:
    """A question and an answer, and what was thought before the answer, in a column of its own."""

    column: str
    format: Columns | PromptText
    reads: Reads = READS_NOTHING
    thoughts: str | None = None
    """See `MessageList`."""
    precedence: ClassVar[int] = 1

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the columns."""
        return self.column in row and self.format.fits(row)

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the messages; a thought that is blank is none."""
        *before, answer = self.format.read(row)
        thought = thought_of({THOUGHT_FIELDS[0]: column(row, self.column)})
        if thought is not None:
            answer = with_thought(answer, thought, self.reads, self.thoughts)
        return [*before, answer]

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Return the columns that the user did not name."""
        return [name for name in self.format.unread(row) if name != self.column]

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return f"{self.format}, {self.column}"


# Rows that list messages

FIELDS = {"role": "content", "from": "value"}
"""The field of a message that holds who speaks, and the one that holds what is said."""

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "function_response", "observation"), "tool"),
    "tool_response": "tool_response",
}
"""The name of each role in ShareGPT's data, to ours."""

USUAL_ROLES = (*ROLES, "tool", "tool_response", "function")
"""Roles that templates know, and that they may leave out without losing who asks or answers."""


def unknown_role(role: object) -> DataError:
    """Return the error of a role that no template of the family writes."""
    return DataError(
        f"unknown role {short_repr(role)}, expected one of: {', '.join(USUAL_ROLES)}; "
        f"{advise_roles(role)}"
    )


def advise_roles(role: object) -> str:
    """Say how to tell what a role means."""
    meant = SHAREGPT_ROLES.get(str(role).lower(), "user")
    return f"say what it means, as in dataset.roles={{{short_repr(role)[1:-1]}: {meant}}}"


CALLS = "function_call"
"""Who says that tools are called, in some of these data sets: an assistant without words."""

UNREAD_FIELDS = {
    **dict.fromkeys(
        (
            *("function_call", "refusal"),
            *(*MEDIA, "file", "files", "attachments"),
        ),
        "content, or remove it",
    ),
    "train_detail": "train: true or false",
}
"""Fields of a message that change what is learned and that nothing here reads; what to write.

All others (``id``, ``name``, ``tool_call_id``, ``timestamp``, …) say nothing that a template of
the family writes; they reach a template that reads them.
"""


@dataclass(frozen=True)
class MessageList:
    """A column that lists messages: ``{role, content}`` or ``{from, value}``."""

    column: str
    role: str
    """``role`` or ``from``, where a message has both."""
    mapped: bool = False
    """Whether roles are those of `SHAREGPT_ROLES`, and not taken as they are."""
    tool_calls: str | None = None
    """How calls of tools are written, with {} for them; None refuses them."""
    roles: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What names of roles mean that nobody else knows, or that mean something else here."""
    names: Mapping[str, str] | None = field(default=None, hash=False)
    """What to read beside the list, by the part that it is: the user said so."""
    reads: Reads = READS_NOTHING
    """What the chat template reads of a message and of the row."""
    thoughts: str | None = None
    """How thoughts are written in front of the content, with {} for them; None leaves them to the
    template, or refuses them where it reads none."""
    precedence: ClassVar[int] = 0

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the column."""
        return self.column in row

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the listed messages, and the system message and the tools beside them."""
        turns = self.listed(column(row, self.column), self.column)
        if self.names is None:
            return with_columns_beside(turns, self.reads.without(row))
        return with_columns_beside(
            turns, {part: column(row, name) for part, name in self.names.items()}
        )

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Return the columns beside the list that are not read: notes, as a rule."""
        if self.names is not None:
            return filled_but(row, [self.column, *self.names.values()])
        read = (self.column, *(name for name, part in BESIDE.items() if part != "prompt"))
        notes = [name for name in row if BESIDE.get(name) == "prompt" and filled(row, [name])]
        advice = ADVISE_MESSAGES.format(self.column)
        return [*notes, *unread_columns(row, (*read, *notes), (), advice)]

    def listed(self, messages: Any, name: str) -> list[Turn]:
        """Read a list of messages.

        Raises:
            DataError: It is no list, is empty, or a message is broken.
        """
        if isinstance(messages, str) and messages.lstrip().startswith("["):
            messages = from_json(name, messages)  # as in a table of texts
        if not isinstance(messages, list):
            raise DataError(f"{name} is {kind(messages)}, expected a list")
        if not messages:
            raise DataError(f"{name} is empty")
        return [turn for message in messages for turn in self._turns(message)]

    def _turns(self, message: Any) -> list[Turn]:
        if isinstance(message, dict) and message.keys() >= {"input", "output"}:
            answer = make_turn("assistant", message["output"])
            return [make_turn("user", message["input"]), _asked(answer, message)]
        return [self._turn(message)]

    def _turn(self, message: Any) -> Turn:
        if not isinstance(message, dict):
            raise DataError(f"a message is {kind(message)}, expected an object")
        keys = (key for key in (self.role, *FIELDS) if message.get(key) is not None)
        key = next(keys, self.role)
        speaker = column(message, key)
        mapped = self.mapped or key == "from"
        calls = message.get("tool_calls")
        if mapped and speaker == CALLS:
            role = "assistant"
            calls = column(message, FIELDS[key])
            calls = from_json(CALLS, calls) if isinstance(calls, str) else calls
            content = self._with_calls(None, calls if isinstance(calls, list) else [calls])
        elif calls:
            role = self._role(speaker, mapped)
            if role != "assistant":
                raise DataError("a message has tool_calls and is not the assistant's")
            content = self._with_calls(_joined(role, message.get(FIELDS[key])), calls)
        else:
            role = self._role(speaker, mapped)
            content = _joined(role, column(message, FIELDS[key]))
        for name in message:
            if name in UNREAD_FIELDS and message[name] not in (None, "", [], {}):
                advice = f"write it as {UNREAD_FIELDS[name]}"
                raise DataError(f"a message has {name}, which nothing reads; {advice}")
        tools = tools_text(message.get("tools"))
        turn = _asked(make_turn(role, content, tools=tools), message)
        if (thought := thought_of(message)) is not None:
            turn = with_thought(turn, thought, self.reads, self.thoughts)
        fields = self.reads.of_message(message)
        return turn._replace(fields=fields) if fields else turn

    def _role(self, speaker: Any, mapped: bool) -> str:
        if not isinstance(speaker, str):
            raise DataError(f"unknown role {short_repr(speaker)}, expected a string")
        if speaker in self.roles:
            return self.roles[speaker]
        usual = speaker.strip().lower()
        if mapped and usual in SHAREGPT_ROLES:
            return SHAREGPT_ROLES[usual]
        if mapped:
            known = ", ".join([*SHAREGPT_ROLES, CALLS])
            raise DataError(
                f"unknown role {short_repr(speaker)}, expected one of: {known}; "
                f"{advise_roles(speaker)}"
            )
        if usual in USUAL_ROLES:
            return usual
        if usual in SHAREGPT_ROLES:  # a template that leaves it out would leave out the question
            raise unknown_role(speaker)
        return speaker

    def _with_calls(self, content: Any, calls: Any) -> str:
        """Put the calls of tools after what is said: ``[{"name", "arguments"}]``, or OpenAI's."""
        if self.tool_calls is None:
            raise DataError(
                "a message has tool_calls, and nothing says how to write them; set "
                "dataset.tool_calls, as in <|tool_call|>{}<|/tool_call|>, or write them as content"
            )
        if not isinstance(calls, list):
            raise DataError(f"tool_calls is {kind(calls)}, expected a list")
        if content is not None and not isinstance(content, str):
            raise DataError(f"the content beside tool_calls is {kind(content)}, expected a string")
        written = as_json("tool_calls", [_call(call) for call in calls], ensure_ascii=False)
        return (content or "") + self.tool_calls.replace("{}", written)

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return f"{self.column}: [{{{self.role}, {FIELDS[self.role]}}}]"


def _asked(turn: Turn, message: Mapping[str, Any]) -> Turn:
    """Return a turn with what its message says about being trained on, and how much."""
    wanted = _train_flag(message)
    weight = message.get("weight") if wanted else None
    if wanted is None:
        return turn
    return turn._replace(wanted=wanted, weight=1.0 if weight is None else float(weight))


def _train_flag(message: Mapping[str, Any]) -> bool | None:
    """Return what a message says about being trained on, by its `TRAIN_FLAGS`."""
    flags = {name: message[name] for name in TRAIN_FLAGS if message.get(name) is not None}
    for name, value in flags.items():
        is_weight = name == "weight" and is_number(value, least=0) and value <= HEAVIEST
        if not is_weight and (not isinstance(value, int | float) or value not in (0, 1)):
            number = ", or a number from 0 on" if name == "weight" else ""
            raise DataError(
                f"{name} is {short_repr(value)}, expected 0 or 1, false or true{number}"
            )
    wanted = {bool(value) is not (name == "masked") for name, value in flags.items()}
    if len(wanted) > 1:
        said = " and ".join(f"{name} is {short_repr(value)}" for name, value in flags.items())
        raise DataError(f"{said}: remove one")
    return next(iter(wanted), None)


def _joined(role: str, content: Any) -> Any:
    """Return the content; where OpenAI's parts are all text, the texts as one."""
    if not isinstance(content, list) or not content:
        return content
    texts = []
    for part in content:
        form = part.get("type") if isinstance(part, dict) else part
        text = part.get("text") if isinstance(part, dict) else None
        if form != "text" or not isinstance(text, str):
            raise DataError(
                f"the {printable(role)} content is list, expected a string or parts such as "
                f"{{type: text, text: …}}; one part is {short_repr(form)}"
            )
        texts.append(text)
    return "".join(texts)


def _call(call: Any) -> dict[str, Any]:
    inner = call.get("function") or call if isinstance(call, dict) else call
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise DataError("a tool call has no name, expected {name, arguments}")
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        arguments = from_json("arguments of a tool call", arguments)
    if not isinstance(arguments, dict):
        raise DataError(f"arguments of a tool call is {kind(arguments)}, expected an object")
    return {"name": inner["name"], "arguments": arguments}


# Rows of a better and a worse answer, of which the better one is learned

PROMPTS = ("prompt", "question", "instruction", "input")
"""Columns that may hold what the answers are given to; a row has one of them."""

TRANSCRIPT = {"\n\nHuman:": "user", "\n\nAssistant:": "assistant"}
"""What comes before each turn in a text such as those of HH-RLHF; the first begins the text."""

TRANSCRIPT_START = "\n\nHuman:"


@dataclass(frozen=True)
class PreferencePair(MessageList):
    """``chosen`` beside ``rejected``: an answer, messages, or a text as in HH-RLHF."""

    precedence: ClassVar[int] = 1
    other: ClassVar[str] = "rejected"
    """Column of the worse answer."""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has both answers."""
        return self.column in row and "rejected" in row

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the prompt and the chosen answer; the rejected one is not looked at."""
        refuse_beside(filled(row, ("context", "history")), ADVISE_COLUMNS)
        chosen = answer_of(row, self.column)
        if isinstance(chosen, dict):
            chosen = [chosen]
        if isinstance(chosen, list):
            turns = self.listed(chosen, self.column)
            # A whole conversation says again what the prompt says
            before = self._prompt(_prompt_of(row)) if turns[0].role == "assistant" else []
            return with_columns_beside([*before, *turns], row)
        if not isinstance(chosen, str):
            raise DataError(f"chosen is {kind(chosen)}, expected a text or a list of messages")
        if chosen.startswith(TRANSCRIPT_START):
            return with_columns_beside(_transcript(chosen), row)
        prompt = _prompt_of(row)
        before = self._prompt(prompt)
        if isinstance(prompt, str) and before[-1].role == "assistant":
            # The prompt is written up to the name of who speaks next
            chosen = before.pop().content + chosen.strip()
        return with_columns_beside([*before, make_turn("assistant", chosen)], row)

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Return what is not read."""
        read = (self.column, "rejected", *PROMPTS, *BESIDE)
        return unread_columns(row, read, (), ADVISE_COLUMNS)

    def _prompt(self, prompt: Any) -> list[Turn]:
        if isinstance(prompt, list):
            return self.listed(prompt, "the prompt")
        if isinstance(prompt, str) and prompt.startswith(TRANSCRIPT_START):
            return _transcript(prompt)
        return [make_turn("user", prompt)]

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return "chosen, rejected and perhaps prompt"


@dataclass(frozen=True)
class ListedPreference(PreferencePair):
    """A list of messages that ends in a question, beside ``chosen`` and ``rejected``."""

    listed_in: str = "messages"
    precedence: ClassVar[int] = -1

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has both answers, and a list that they answer or say again."""
        if self.listed_in not in row or not super().fits(row):
            return False
        if not isinstance(row[self.column], str):
            return True
        with suppress(DataError):  # which is told of when the row is read
            turns = self.listed(column(row, self.listed_in), self.listed_in)
            return turns[-1].role != "assistant"
        return True

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the messages and the chosen answer; the rejected one is not looked at."""
        chosen = answer_of(row, self.column)
        chosen = [chosen] if isinstance(chosen, dict) else chosen
        beside = {name: row[name] for name in row if name not in PROMPTS}
        if isinstance(chosen, str):
            answer = [make_turn("assistant", chosen)]
        else:
            answer = self.listed(chosen, self.column)
        if answer[0].role != "assistant":  # a whole conversation says again what the list says
            return with_columns_beside(answer, beside)
        before = self.listed(column(row, self.listed_in), self.listed_in)
        if before[-1].role == "assistant":
            raise DataError(
                f"{self.listed_in} ends with an answer, and chosen and rejected are others; end it "
                "with the question"
            )
        return with_columns_beside([*_only_asked(before), *answer], beside)

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Return what is not read."""
        notes = [name for name in PROMPTS if name in row]
        read = (self.listed_in, self.column, self.other, *BESIDE, *notes)
        return [*notes, *unread_columns(row, read, (), ADVISE_MESSAGES.format(self.listed_in))]

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return f"{self.listed_in}, chosen, rejected"


def answer_of(row: Mapping[str, Any], name: str) -> Any:
    """Return one of the answers of a pair.

    Raises:
        DataError: It is not there, or is null or empty.
    """
    if (answer := row.get(name)) in (None, "", []):
        raise DataError(f"there is no {name} answer")
    return answer


def _prompt_of(row: Mapping[str, Any]) -> Any:
    names = [name for name in PROMPTS if row.get(name)]
    if not names:
        raise DataError(f"chosen has no prompt before it; the keys are: {key_names(row)}")
    if names == ["instruction", "input"]:
        return alpaca_prompt(*(checked_text(name, row[name]) for name in names))
    if len(names) > 1:
        raise DataError(f"the prompt may be any of: {', '.join(names)}; remove the others")
    return row[names[0]]


def _transcript(text: str) -> list[Turn]:
    _, *parts = re.split(f"({'|'.join(TRANSCRIPT)})", text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [make_turn(TRANSCRIPT[name], said.strip()) for name, said in turns]


@dataclass(frozen=True)
class OpenAIPreference(MessageList):
    """``input`` with messages, ``preferred_output`` and ``non_preferred_output``."""

    other: ClassVar[str] = "non_preferred_output"
    """Column of the worse answer."""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the three columns."""
        return row.keys() >= {"input", self.column, "non_preferred_output"}

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the messages and the preferred answer; the other one is not looked at."""
        asked = column(row, "input")
        if not isinstance(asked, dict):
            raise DataError(f"input is {kind(asked)}, expected an object with messages")
        before = self.listed(column(asked, "messages"), "input.messages")
        answer = self.listed(column(row, self.column), self.column)
        return with_columns_beside([*_only_asked(before), *answer], {**asked, "input": None})

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Return what is not read."""
        read = ("input", self.column, "non_preferred_output")
        return unread_columns(row, read, (), ADVISE_MESSAGES.format("input"))

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return "input: {messages}, preferred_output, non_preferred_output"


@dataclass(frozen=True)
class PromptAnswer(MessageList):
    """``prompt`` and an answer: texts, or lists of messages of which those of the answer count."""

    texts: Columns = Columns({})
    precedence: ClassVar[int] = 1

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the two columns, and none that would be left out."""
        if not row.keys() >= {"prompt", self.column}:
            return False
        return self._lists(row) or self.texts.fits(row)

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the prompt and the answer."""
        if not self._lists(row):
            return self.texts.read(row)
        refuse_beside(filled(row, ("context", "input", "history")), ADVISE_COLUMNS)
        prompt, answer = column(row, "prompt"), column(row, self.column)
        before = self._said("prompt", "user", prompt)
        after = self._said(self.column, "assistant", answer)
        return with_columns_beside([*_only_asked(before), *after], row)

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Return what is not read."""
        return self.texts.unread(row)

    def _lists(self, row: Mapping[str, Any]) -> bool:
        return any(_are_messages(row.get(name)) for name in ("prompt", self.column))

    def _said(self, name: str, role: str, value: Any) -> list[Turn]:
        return self.listed(value, name) if isinstance(value, list) else [make_turn(role, value)]

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return str(self.texts)


def prompt_and_answer(answer: str) -> PromptAnswer:
    """Return the shape of rows that have a ``prompt``, and an answer in a column of this name."""
    return PromptAnswer(answer, "role", texts=question_and_answer("prompt", answer))


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(one, dict) for one in value)


def _only_asked(turns: Iterable[Turn]) -> list[Turn]:
    """Return the turns of a prompt: answers within it are not learned unless they say so."""
    return [
        turn._replace(wanted=False) if turn.role == "assistant" and turn.wanted is None else turn
        for turn in turns
    ]


# Names that differ in capitals


@dataclass(frozen=True)
class AnyCase:
    """A format whose columns are written with capitals, or with spaces around their names."""

    format: Format
    precedence: ClassVar[int] = 1

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the shape then."""
        return self.format.fits(in_small_letters(row))

    def renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row as the format takes it."""
        return in_small_letters(row)

    def read(self, row: Mapping[str, Any]) -> Chat:
        """Read the row as a conversation."""
        return self.format.read(in_small_letters(row))

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Return what is not read."""
        return self.format.unread(in_small_letters(row))

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return str(self.format)


def in_small_letters(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row whose columns have names in small letters.

    Raises:
        DataError: Two have the same name then.
    """
    small = {name.strip().lower(): value for name, value in row.items()}
    if len(small) < len(row):
        raise DataError(f"names of columns differ only in capitals: {key_names(row)}")
    return small


# Names that the user tells


@dataclass(frozen=True)
class NamedColumns:
    """A format whose columns have other names: of pairs of answers, or of answers with a label."""

    format: Format
    names: Mapping[str, str] = field(hash=False)
    """What the format reads, to the name of the column that it is in."""
    prompt: str | None = None
    """What the user says, with columns in braces."""
    precedence: ClassVar[int] = 1

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the columns."""
        return row.keys() >= {*self._columns()}

    def renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row as the format takes it, with nothing else.

        Raises:
            DataError: A column is not there.
        """
        parts = {part: column(row, name) for part, name in self.names.items()}
        if self.prompt is None:
            return parts
        asked = "prompt" if "chosen" in parts else "user"
        return {**parts, asked: _written_prompt(self.prompt, row)}

    def read(self, row: Mapping[str, Any]) -> Chat:
        """Read the row as a conversation."""
        return self.format.read(self.renamed(row))

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Return the columns that the user did not name."""
        return filled_but(row, self._columns())

    def _columns(self) -> list[str]:
        return [*self.names.values(), *(prompt_columns(self.prompt) if self.prompt else [])]

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return ", ".join(self._columns())


# The formats by name, and which of them rows have

FORMATS: Mapping[str, Format] = {
    # Lists of messages go before all else: other columns are notes about them
    "messages": MessageList("messages", "role"),
    "sharegpt": MessageList("conversations", "from", mapped=True),
    "conversation": MessageList("conversation", "role", mapped=True),
    # Two answers to a prompt, of which the better one is learned
    "preference": PreferencePair("chosen", "role"),
    "messages_preference": ListedPreference("chosen", "role"),
    "sharegpt_preference": ListedPreference(
        "chosen", "from", mapped=True, listed_in="conversations"
    ),
    "openai_preference": OpenAIPreference("preferred_output", "role"),
    # A question and an answer, under the names that data sets give them
    "alpaca": Alpaca(question_and_answer("instruction", "output", also_read=("input", "system"))),
    "question_answer": question_and_answer("question", "answer"),
    "prompt_response": prompt_and_answer("response"),
    "prompt_completion": prompt_and_answer("completion"),
    "instruction_response": question_and_answer("instruction", "response"),
    "dolly": Dolly(
        {"user": "instruction", "assistant": "response"}, frozenset({*BESIDE} - {"context"})
    ),
    "query_response": question_and_answer("query", "response"),
    "input_output": question_and_answer(
        "input", "output", unless=("instruction", "prompt", "question", "query")
    ),
    # A whole conversation as text; many data sets have it beside the columns it was made of
    "text": TextColumn("text"),
}
"""What can be read, by the name that ``dataset.format`` takes."""


def pick_format(
    name: str | None,
    columns: Mapping[str, str] | None,
    rows: Sequence[Mapping[str, Any]],
    *,
    tool_calls: str | None = None,
    roles: Mapping[str, str] | None = None,
    prompt: str | None = None,
    reads: Reads = READS_NOTHING,
    thoughts: str | None = None,
) -> Format:
    """Choose how rows are read.

    Rows that list messages are read as those, whatever other columns they have; the column
    ``text`` is read only where nothing else can. A column that is null in all rows is as if
    it were not there. Capitals in the names of columns count only where they make a difference.

    Args:
        name: A key of `FORMATS`, or None to recognize the format.
        columns: Role to column, instead of a known format; or where the messages are, or both
            answers of a pair; or ``label`` too, which says whether an answer is a good one.
        rows: The first rows, at least one.
        tool_calls: How calls of tools are written, with {} for them; None refuses them.
        roles: Names of roles, and what they mean.
        prompt: What the user says, with columns in braces.
        reads: What the chat template reads beside.
        thoughts: How thoughts are written in front of an answer, with {} for them; None leaves them
            to the template, or refuses them where it reads none.

    Raises:
        DataError: No format fits the rows, or several do.
    """
    format: Format
    thought = (columns or {}).get("thought")
    if columns is not None:
        columns = {part: columns[part] for part in columns if part not in ("weight", "thought")}
    if thought is not None:
        pair = pick_format(None, columns, rows, prompt=prompt)
        assert isinstance(pair, Columns | PromptText)  # nothing else has such a column
        return ThoughtColumn(thought, pair, reads, thoughts)
    options = {"tool_calls": tool_calls, "roles": roles or {}, "reads": reads, "thoughts": thoughts}
    if columns is not None and columns.keys() & {"chosen", "label"}:
        return NamedColumns(_with_options(_format_of_answers(columns), options), columns, prompt)
    if prompt is not None:
        return PromptText(prompt, columns or {"assistant": _answer_column(prompt, rows)})
    if columns is not None and "messages" in columns:
        beside = {part: columns[part] for part in columns if part != "messages"}
        format = MessageList(columns["messages"], "role", names=beside)
    elif columns is not None:
        return Columns(columns)
    else:
        format = FORMATS[name] if name else _recognized(rows)
        if name and not any(map(format.fits, rows)) and _has_capitals(rows):
            format = AnyCase(format)
    if isinstance(format, AnyCase):
        return AnyCase(_with_options(format.format, options))
    return _with_options(format, options)


def _format_of_answers(columns: Mapping[str, str]) -> Format:
    """Return how a pair of answers, or an answer with a label, is read once columns are renamed."""
    if "chosen" in columns:
        return FORMATS["messages_preference" if "messages" in columns else "preference"]
    if "messages" in columns:
        beside = {part: part for part in columns if part not in ("messages", "label")}
        return MessageList("messages", "role", names=beside)
    return Columns({"user": "user", **{part: part for part in columns if part in ROLES}})


def _with_options(format: Format, options: Mapping[str, Any]) -> Format:
    if isinstance(format, MessageList) and any(options.values()):
        return replace(format, **options)
    return format


def _answer_column(prompt: str, rows: Sequence[Mapping[str, Any]]) -> str:
    asked = prompt_columns(prompt)
    names = [name for name in ANSWERS if name in rows[0] and name not in asked]
    if len(names) != 1:
        where = (
            f"the answer may be in: {', '.join(names)}"
            if names
            else (f"no column of the answer is known; the keys are: {key_names(rows[0])}")
        )
        raise DataError(
            f"dataset.prompt says what is asked, and {where}. Name the column of the answer with "
            "dataset.columns={assistant: …}."
        )
    return names[0]


def _has_capitals(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether names of columns would be others in small letters, and would still differ."""
    try:
        return any(in_small_letters(row) != row for row in rows)
    except DataError:
        return False


def _recognized(rows: Sequence[Mapping[str, Any]], any_case: bool = False) -> Format:
    filled = {key for row in rows for key, value in row.items() if value is not None}
    without_nulls = [{key: row[key] for key in row if key in filled} for row in rows]
    # Rows that are null where they should not be are better named than not recognized
    fitting = _fitting(without_nulls) or _fitting(rows)
    if len(fitting) == 1:
        return FORMATS[fitting[0]]
    keys = key_names(dict.fromkeys(key for row in rows for key in row))
    if fitting:
        raise DataError(
            f"the rows (keys: {keys}) fit several formats: {', '.join(fitting)}. "
            "Choose one with dataset.format."
        )
    if not any_case and _has_capitals(rows):
        with suppress(DataError):
            small = [in_small_letters(row) for row in rows]
            return AnyCase(_recognized(small, any_case=True))
    raise DataError(
        f"the format of the rows is not known; their keys are: {keys}. {known_formats()}\n"
        f"{_lacking_a_side(rows)}"
        "For other column names set dataset.columns, as in {user: question, assistant: answer}, or "
        "{messages: chat} for a list of messages, or {prompt: ask, chosen: good, rejected: bad} of "
        "pairs; or write the prompt with dataset.prompt.\n"
        f"A column that may hold a part of the prompt ({', '.join(BESIDE)}) is not left out "
        "silently: dataset.columns says what is read."
    )


def _lacking_a_side(rows: Sequence[Mapping[str, Any]]) -> str:
    sides = ("chosen", "rejected")
    found = [name for name in sides if any(name in row for row in rows)]
    lacking = [name for name in sides if name not in found]
    return f"There is a {found[0]!r} and no {lacking[0]!r}.\n" if len(found) == 1 else ""


def _fitting(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    fitting = [name for name, format in FORMATS.items() if all(map(format.fits, rows))]
    first = min((FORMATS[name].precedence for name in fitting), default=0)
    return [name for name in fitting if FORMATS[name].precedence == first]


def known_formats() -> str:
    """List the formats and their shapes, for an error message."""
    return "Known formats:" + "".join(f"\n  {name} ({shape})" for name, shape in FORMATS.items())
