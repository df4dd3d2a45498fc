"""From a row of data to a conversation: the formats of rows, by name, and how they are told."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any, NamedTuple, Protocol

from phi3_plugin.errors import ConfigError, DataError

ROLES = ("system", "user", "assistant")
"""The roles that every format of data rows has; a chat template may know others."""


class Turn(NamedTuple):
    """One checked message of a conversation."""

    role: str
    content: str
    trained: bool
    """Whether the loss counts the content and the token that ends it."""
    tools: str | None = None
    """Description of the tools that the assistant may call, as the template writes it."""
    wanted: bool | None = None
    """Whether the message itself asks to be trained on; None where it does not say."""


class Written(NamedTuple):
    """A conversation that is rendered already."""

    text: str
    said: tuple[tuple[int, int], ...] | None
    """[start, end) of what the assistant says; None: the chat template's own marks tell."""


Chat = Sequence[Turn] | Written
"""One row of data, read."""

ROLE = re.compile(r"\w[\w-]*")
SURROGATE = re.compile("[\ud800-\udfff]")


def make_turn(
    role: object,
    content: object,
    trained: bool | None = None,
    tools: object = None,
    wanted: bool | None = None,
) -> Turn:
    """Check one message.

    Args:
        role: Who speaks; whether the template knows the role shows when it is rendered.
        content: What is said.
        trained: Whether the loss counts it; by default what the assistant says counts.
        tools: Text, or None.
        wanted: What the message itself says about being trained on.

    Raises:
        DataError: The role is not a word, or the content or the tools are not text.
    """
    # Templates write the role where special tokens are: text in it could speak for another
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise DataError(f"unknown role {role!r}, expected a word such as {', '.join(ROLES)}")
    text = _text(f"the {role} content", content)
    described = None if tools is None else _text(f"tools of the {role} message", tools)
    counts = role == "assistant" if trained is None else trained
    return Turn(role, text, counts, described, wanted)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {kind(value)}, expected a string")
    if not value.isascii() and SURROGATE.search(value):
        raise DataError(f"{name} is not valid Unicode: it has half a surrogate pair")
    return value


class Format(Protocol):
    """One shape of data row."""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has this shape, judged by its keys."""

    def read(self, row: Mapping[str, Any]) -> Chat:
        """Read the row as a conversation.

        Raises:
            DataError: The row is broken; the message does not name the row.
        """


# What a row or a message holds, and how errors name it

NAMES_LISTED = 20
"""An error names no more keys than this."""

EMPTY = ("[]", "{}", "null")
"""How some data sets write that there is nothing, beside null and the empty text."""

UNSEEN = ("functions", "image", "images", "audio", "audios", "video", "videos")
"""Columns of what was short_repr or offered to the assistant, which no format here reads."""

BESIDE = ("system", "system_prompt", "tools", *UNSEEN)
"""Columns that are a part of a conversation that is whole but for them."""

OUTSIDE = ("system", "system_prompt", "context", "input", "history", "tools", *UNSEEN)
"""Columns that some data sets keep a part of the prompt in."""

NAME_COLUMNS = "name the columns to read with dataset.columns"
"""What to do about rows that keep a part of the prompt in a column of its own."""


def kind(value: object) -> str:
    """Name the type of a JSON value for an error message."""
    return "null" if value is None else type(value).__name__


def column(row: Mapping[str, Any], name: str) -> Any:
    """Return a column of a row, or a field of a message.

    Raises:
        DataError: It has none of this name.
    """
    if name not in row:
        raise DataError(f"there is no {name!r}; the keys are: {key_names(row)}")
    return row[name]


def key_names(keys: Iterable[str]) -> str:
    """Write keys for an error message, whatever they hold."""
    names = [_printable(str(key)) for key in keys]
    return ", ".join([*names[:NAMES_LISTED], *(["…"] if len(names) > NAMES_LISTED else [])])


def short_repr(value: Any) -> str:
    """Write a value for an error message, shortened."""
    return _printable(shortened(value))


def _printable(text: str) -> str:
    # A terminal cannot show half a surrogate pair
    return text.encode("utf-8", "backslashreplace").decode()


def _refuse_filled(row: Mapping[str, Any], names: Iterable[str], advice: str) -> None:
    for name in names:
        if row.get(name) and row[name] not in EMPTY:
            raise DataError(f"there is a {name!r} too, which this format would drop; {advice}")


# Rows that keep a conversation in columns of text


@dataclass(frozen=True)
class Columns:
    """One column a message; a conversation has one message of each role named."""

    names: Mapping[str, str]
    """Role to column."""
    unless: frozenset[str] = frozenset()
    """Columns that would belong to the prompt too: rows that have them are of another shape."""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the columns and none that would be left out."""
        return row.keys() >= set(self.names.values()) and self.unless.isdisjoint(row)

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read system, user and assistant message, in this order."""
        if not self.unless.isdisjoint(row):
            _refuse_filled(row, [name for name in row if name in self.unless], NAME_COLUMNS)
        return [
            make_turn(role, column(row, self.names[role])) for role in ROLES if role in self.names
        ]

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return ", ".join(self.names.values())


def pair(user: str, assistant: str, unless: Sequence[str] = OUTSIDE) -> Columns:
    """Return the shape of rows that have a question and an answer."""
    return Columns({"user": user, "assistant": assistant}, frozenset(unless) - {user, assistant})


@dataclass(frozen=True)
class Alpaca:
    r"""``instruction``, ``output`` and, in rows that need them, ``input`` and ``system``.

    The user says ``{instruction}\n Input: {input}``, as in Microsoft's samples; where the input
    is absent, null or empty, the instruction alone.
    """

    pair: Columns

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the two columns that all rows have."""
        return self.pair.fits(row)

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the system, the user and the assistant message."""
        user, assistant = self.pair.read(row)
        if row.get("input"):
            user = user._replace(content=f"{user.content}\n Input: {_text('input', row['input'])}")
        if not row.get("system"):
            return [user, assistant]
        return [make_turn("system", _text("system", row["system"])), user, assistant]

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return f"{self.pair} and perhaps input and system"


@dataclass(frozen=True)
class TextColumn:
    """A column of conversations that are written as the chat template writes them."""

    name: str

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the column."""
        return self.name in row

    def read(self, row: Mapping[str, Any]) -> Written:
        """Read the text; the marks in it tell later who says what."""
        text = _text(f"the {self.name} content", column(row, self.name))
        lost = [name for name in BESIDE if name in row and not _holds(text, name, row[name])]
        _refuse_filled(row, lost, "write it in the text, or remove the column")
        return Written(text, None)

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return f"{self.name}, written as the chat template writes it"


def _holds(text: str, name: str, value: Any) -> bool:
    return name not in UNSEEN and isinstance(value, str) and value.strip() in text


# Rows that list messages

SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "function_response", "observation"), "tool"),
    "tool_response": "tool_response",
}
"""The name of each role in ShareGPT's data, to ours."""

CALLS = "function_call"
"""Who says that tools are called, in some of these data sets."""

KEYS = {"role": "content", "from": "value"}
"""The field that holds who speaks, and the one that holds what is said."""

LOST = (
    *("function_call", "refusal", "reasoning", "reasoning_content", "thinking"),
    *("image", "images", "audio", "audios", "video", "videos", "file", "files", "attachments"),
    *("loss", "train_detail"),
)
"""Fields of a message that change what is learned and that nothing here reads.

All others (``id``, ``name``, ``tool_call_id``, ``timestamp``, …) say nothing that a template of
the family writes, and are passed over.
"""


@dataclass(frozen=True)
class MessageList:
    """A column that lists messages: ``{role, content}`` or ``{from, value}``."""

    column: str
    role: str
    """``role`` or ``from``, where a message has both."""
    mapped: bool = False
    """Whether roles are those of :data:`SPEAKERS`, and not taken as they are."""
    tool_calls: str | None = None
    """How calls of tools are written, with {} for them."""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the column."""
        return self.column in row

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the listed messages, and the system message and the tools beside them."""
        return with_rest(self.listed(column(row, self.column), self.column), row)

    def listed(self, messages: Any, name: str) -> list[Turn]:
        """Read a list of messages.

        Raises:
            DataError: It is no list, is empty, or a message is broken.
        """
        if not isinstance(messages, list):
            raise DataError(f"{name} is {kind(messages)}, expected a list")
        if not messages:
            raise DataError(f"{name} is empty")
        return [self._turn(message) for message in messages]

    def _turn(self, message: Any) -> Turn:
        if not isinstance(message, dict):
            raise DataError(f"a message is {kind(message)}, expected an object")
        keys = (key for key in (self.role, *KEYS) if message.get(key) is not None)
        key = next(keys, self.role)
        role, mapped = column(message, key), self.mapped or key == "from"
        if mapped and role == CALLS:
            calls = column(message, KEYS[key])
            calls = _from_json(CALLS, calls) if isinstance(calls, str) else calls
            text = self._with_calls(None, calls if isinstance(calls, list) else [calls])
            return _turn_of("assistant", text, message)
        if mapped and (not isinstance(role, str) or role not in SPEAKERS):
            raise DataError(
                f"unknown role {short_repr(role)}, expected one of: {', '.join([*SPEAKERS, CALLS])}"
            )
        role = SPEAKERS[role] if mapped else role
        if not isinstance(role, str):
            raise DataError(f"unknown role {short_repr(role)}, expected a string")
        if not message.get("tool_calls"):
            return _turn_of(role, _joined(role, column(message, KEYS[key])), message)
        if role != "assistant":
            raise DataError("a message has tool_calls and is not the assistant's")
        text = self._with_calls(_joined(role, message.get(KEYS[key])), message["tool_calls"])
        return _turn_of(role, text, message)

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
        written = _as_json("tool_calls", [_call(call) for call in calls], ensure_ascii=False)
        return (content or "") + self.tool_calls.replace("{}", written)

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return f"{self.column}: [{{{self.role}, {KEYS[self.role]}}}]"


def with_rest(turns: Sequence[Turn], row: Mapping[str, Any]) -> list[Turn]:
    """Add what columns beside the messages say: the system message and the tools.

    Raises:
        DataError: They are there twice, or a column shows what no format here reads.
    """
    if row.keys().isdisjoint(BESIDE):
        return list(turns)
    for name in UNSEEN:
        if row.get(name):
            raise DataError(f"there is a column {name!r}, which nothing reads; remove it")
    return _with_tools(_with_system(turns, row), row.get("tools"))


def _with_system(turns: Sequence[Turn], row: Mapping[str, Any]) -> list[Turn]:
    columns = [make_turn("system", row[n]) for n in ("system", "system_prompt") if row.get(n)]
    beside = {turn.content: turn for turn in columns}
    listed = {turn.content for turn in turns if turn.role == "system"}
    if beside.keys() <= listed:
        return list(turns)
    if listed or len(beside) > 1:
        raise DataError("there is a column for the system message and another system message")
    return [*beside.values(), *turns]


def _with_tools(turns: list[Turn], tools: Any) -> list[Turn]:
    if not tools or tools in EMPTY:
        return turns
    systems = [i for i, turn in enumerate(turns) if turn.role == "system"]
    if not systems:
        turns, systems = [make_turn("system", ""), *turns], [0]
    first = turns[systems[0]]
    if first.tools:
        raise DataError("there is a column 'tools' and a system message that has tools")
    turns[systems[0]] = make_turn(
        first.role, first.content, tools=_tools_text(tools), wanted=first.wanted
    )
    return turns


def _turn_of(role: str, content: Any, message: Mapping[str, Any]) -> Turn:
    """Check a message, and the fields of it beside who speaks and what is said."""
    if len(message) == len(KEYS):  # Most messages: no field but these
        return make_turn(role, content)
    for name in LOST:
        # False is what `loss` says of a message that is not learned
        if name in message and message[name] not in (None, "", [], {}):
            as_train = name in ("loss", "train_detail")
            advice = "train: true or false" if as_train else "content, or remove it"
            raise DataError(f"a message has {name}, which nothing reads; write it as {advice}")
    tools = _tools_text(message.get("tools"))
    return make_turn(role, content, tools=tools, wanted=wanted(message))


def wanted(message: Mapping[str, Any]) -> bool | None:
    """Return what the message says about being trained on, by ``weight`` or ``train``.

    Raises:
        DataError: One has another value than 0, 1, true or false, or they disagree.
    """
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and (not isinstance(weight, int | float) or weight not in (0, 1)):
        raise DataError(f"weight is {short_repr(weight)}, expected 0 or 1")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"train is {short_repr(train)}, expected true or false")
    if weight is not None and train is not None and bool(weight) is not train:
        raise DataError(f"weight is {short_repr(weight)} and train is {train}: remove one")
    return train if weight is None else bool(weight)


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
                f"the {_printable(role)} content is list, expected a string or parts such as "
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
        arguments = _from_json("arguments of a tool call", arguments)
    if not isinstance(arguments, dict):
        raise DataError(f"arguments of a tool call is {kind(arguments)}, expected an object")
    return {"name": inner["name"], "arguments": arguments}


def _tools_text(tools: Any) -> Any:
    # As Phi-4-mini's model card writes them: the template puts text between <|tool|> and <|/tool|>
    return _as_json("tools", tools) if isinstance(tools, list | dict) else tools


def _as_json(name: str, value: Any, ensure_ascii: bool = True) -> str:
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{name} cannot be written as JSON: {error}") from error


def _from_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is broken JSON: {error}") from error


# Rows of a better and a worse answer, of which the better one is learned

PROMPTS = ("prompt", "question", "instruction", "input")
"""Columns that may hold what the answers are given to; a row has one of them."""

UNREAD_PROMPTS = ("context", "history")
"""Columns that may be a part of the prompt too, and that this format does not read."""

SPEAKER = re.compile(r"\n\nHuman:|\n\nAssistant:")
HUMAN = "\n\nHuman:"
"""How a conversation begins that is written as in the data set HH-RLHF."""


@dataclass(frozen=True)
class Preference:
    """``chosen`` beside ``rejected``: an answer, messages, or a text as in HH-RLHF."""

    messages: MessageList

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has both answers."""
        return "chosen" in row and "rejected" in row

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the prompt and the chosen answer; the rejected one is not looked at."""
        _refuse_filled(row, UNREAD_PROMPTS, NAME_COLUMNS)
        chosen = row.get("chosen")
        if isinstance(chosen, list):
            turns = self.messages.listed(chosen, "chosen")
            # A whole conversation says again what the prompt says
            before = self._prompt(_prompt_of(row)) if turns[0].role == "assistant" else []
            return with_rest([*before, *turns], row)
        if not isinstance(chosen, str):
            raise DataError(f"chosen is {kind(chosen)}, expected a text or a list of messages")
        if chosen.startswith(HUMAN):
            return with_rest(_transcript(chosen), row)
        prompt = _prompt_of(row)
        before = self._prompt(prompt)
        if isinstance(prompt, str) and before[-1].role == "assistant":
            # The prompt is written up to the name of who speaks next
            before, chosen = before[:-1], before[-1].content + chosen.strip()
        return with_rest([*before, make_turn("assistant", chosen)], row)

    def _prompt(self, prompt: Any) -> list[Turn]:
        if isinstance(prompt, list):
            return self.messages.listed(prompt, "the prompt")
        if isinstance(prompt, str) and prompt.startswith(HUMAN):
            return _transcript(prompt)
        return [make_turn("user", prompt)]

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return "chosen, rejected and perhaps prompt"


def _prompt_of(row: Mapping[str, Any]) -> Any:
    names = [name for name in PROMPTS if row.get(name)]
    if not names:
        raise DataError(f"chosen has no prompt before it; the keys are: {key_names(row)}")
    if len(names) > 1:
        raise DataError(f"the prompt may be any of: {', '.join(names)}; remove the others")
    return row[names[0]]


def _transcript(text: str) -> list[Turn]:
    names, parts = SPEAKER.findall(text), SPEAKER.split(text)[1:]
    roles = ["user" if name == HUMAN else "assistant" for name in names]
    return [make_turn(role, part.strip()) for role, part in zip(roles, parts, strict=True)]


# The formats by name, and which of them rows have

LISTS = ("messages", "sharegpt")
"""Formats of a list of messages: other columns of such rows are taken for notes about it."""


def _formats(tool_calls: str | None = None) -> dict[str, Format]:
    messages = MessageList("messages", "role", tool_calls=tool_calls)
    beside_alpaca = [name for name in OUTSIDE if name not in ("input", "system")]
    beside_input = [*OUTSIDE, "instruction", "prompt", "question", "query"]
    return {
        "messages": messages,
        "sharegpt": MessageList("conversations", "from", mapped=True, tool_calls=tool_calls),
        "preference": Preference(messages),
        "alpaca": Alpaca(pair("instruction", "output", beside_alpaca)),
        "question_answer": pair("question", "answer"),
        "prompt_response": pair("prompt", "response"),
        "prompt_completion": pair("prompt", "completion"),
        "instruction_response": pair("instruction", "response"),
        "query_response": pair("query", "response"),
        "input_output": pair("input", "output", beside_input),
        "text": TextColumn("text"),
    }


FORMATS = _formats()
"""What can be read, by the name that ``dataset.format`` takes."""


def pick_format(
    name: str | None,
    columns: Mapping[str, str] | None,
    rows: Sequence[Mapping[str, Any]],
    *,
    tool_calls: str | None = None,
) -> Format:
    """Choose how rows are read.

    Rows that list messages are read as those, whatever other columns they have; the column
    ``text`` is read only where nothing else can be. A column that is null in all rows is as if
    it were not there.

    Args:
        name: A key of :data:`FORMATS`, or None to recognize the format.
        columns: Role to column, instead of a known format.
        rows: The first rows, at least one.
        tool_calls: How calls of tools are written, with {} for them; None refuses them.

    Raises:
        ConfigError: An option is not usable.
        DataError: No format fits the rows, or several do.
    """
    check_format(name, columns)
    check_layout(tool_calls)
    if columns is not None:
        return Columns(columns)
    known = FORMATS if tool_calls is None else _formats(tool_calls)
    return known[name or _recognized(rows)]


def _recognized(rows: Sequence[Mapping[str, Any]]) -> str:
    filled = {key for row in rows for key, value in row.items() if value is not None}
    without_nulls = [{key: row[key] for key in row if key in filled} for row in rows]
    # Rows that are null where they should not be are better named than not recognized
    fitting = _fitting(without_nulls) or _fitting(rows)
    if len(fitting) == 1:
        return fitting[0]
    keys = key_names(dict.fromkeys(key for row in rows for key in row))
    if fitting:
        raise DataError(
            f"the rows (keys: {keys}) fit several formats: {', '.join(fitting)}. "
            "Choose one with dataset.format."
        )
    raise DataError(
        f"the format of the rows is not known; their keys are: {keys}. Known formats:{_known()}\n"
        "For other column names set dataset.columns, as in {user: question, assistant: answer}.\n"
        f"A column that may hold a part of the prompt ({', '.join(OUTSIDE)}) is not left out "
        "silently: dataset.columns says what is read."
    )


def _fitting(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    fitting = [name for name, format in FORMATS.items() if all(map(format.fits, rows))]
    lists = [name for name in fitting if name in LISTS]
    others = [name for name in fitting if name != "text"]
    return lists or others or fitting


def _known() -> str:
    return "".join(f"\n  {name} ({format})" for name, format in FORMATS.items())


# Checks of values that come from a YAML file; ``key`` is the key as the user typed it


def check_format(name: str | None, columns: Mapping[str, str] | None, key: str = "dataset") -> None:
    """Raise a ConfigError unless rows can be read so; ``key`` is where the two options stand."""
    if columns is None:
        if name is not None and (not isinstance(name, str) or name not in FORMATS):
            raise ConfigError(f"{key}.format: {name!r} is unknown. Known formats:{_known()}")
        return
    if name is not None:
        raise ConfigError(f"{key}.format and {key}.columns are both set. Remove one of them.")
    texts = isinstance(columns, Mapping) and all(isinstance(c, str) for c in columns.values())
    if not texts or not {"user", "assistant"} <= columns.keys() <= set(ROLES):
        raise ConfigError(
            f"{key}.columns: {columns!r} must name one column for user, one for assistant and "
            "at most one for system, as in {user: question, assistant: answer}."
        )


def check_layout(layout: object) -> None:
    """Raise a ConfigError unless the option ``tool_calls`` is a text with one place to fill."""
    if layout is not None and (not isinstance(layout, str) or layout.count("{}") != 1):
        raise ConfigError(
            f"dataset.tool_calls: {layout!r} must be a text with one {{}}, where the calls are "
            "written, as in <|tool_call|>{}<|/tool_call|>"
        )


def check_choice(key: str, value: object, choices: Sequence[str]) -> None:
    """Raise a ConfigError unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{key}: {value!r} must be one of: {', '.join(choices)}.")


def check_switch(key: str, value: object) -> None:
    """Raise a ConfigError unless the value is a bool; a text like "no" would count as True."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key}: {value!r} must be True or False.")


def check_text(key: str, value: object) -> None:
    """Raise a ConfigError unless the value is a string; YAML reads 2024 as a number."""
    if not isinstance(value, str):
        raise ConfigError(f"{key}: {value!r} must be text; put quotes around a number.")


def check_length(key: str, value: object) -> None:
    """Raise a ConfigError unless the value is None or a positive whole number."""
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigError(f"{key}: {value!r} must be a whole number above 0, or null for no limit.")


def check_share(key: str, value: object) -> None:
    """Raise a ConfigError unless the value is a number from 0 up to, but not including, 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"{key}: {value!r} must be a number from 0 up to, but without, 1.")
