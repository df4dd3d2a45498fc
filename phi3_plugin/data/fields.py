"""The fields of one message beside who speaks: what is said, the tools, what is trained on."""

import json
from collections.abc import Mapping
from reprlib import repr as shortened
from typing import Any

from phi3_plugin.data.shapes import printable
from phi3_plugin.data.turns import kind
from phi3_plugin.errors import ConfigError, DataError

LOST = (
    *("function_call", "refusal", "reasoning", "reasoning_content", "thinking"),
    *("image", "images", "audio", "audios", "video", "videos", "file", "files", "attachments"),
    *("loss", "train_detail"),
)
"""Fields that change what is learned and that nothing here reads.

All others (``id``, ``name``, ``tool_call_id``, ``timestamp``, …) say nothing that a template of
the family writes, and are passed over.
"""


def check_layout(layout: object) -> None:
    """Raise a ConfigError unless the option ``tool_calls`` is a text with one place to fill."""
    if layout is not None and (not isinstance(layout, str) or layout.count("{}") != 1):
        raise ConfigError(
            f"dataset.tool_calls: {layout!r} must be a text with one {{}}, where the calls are "
            "written, as in <|tool_call|>{}<|/tool_call|>"
        )


def check_lost(message: Mapping[str, Any]) -> None:
    """Refuse a message that says more than can be read.

    Raises:
        DataError: A field of :data:`LOST` has a value.
    """
    for name in LOST:
        # False is what `loss` says of a message that is not learned
        if name in message and message[name] not in (None, "", [], {}):
            raise DataError(f"a message has {name}, which nothing reads; {_advice(name)}")


def _advice(name: str) -> str:
    if name in ("loss", "train_detail"):
        return "write it as train: true or false"
    return "write it as content, or remove it"


def said(role: Any, content: Any) -> Any:
    """Return the content; where OpenAI's parts are all text, the texts as one.

    Raises:
        DataError: The content is a list of something else.
    """
    if not isinstance(content, list):
        return content
    return "".join(_part(role, part) for part in content) if content else content


def _part(role: Any, part: Any) -> str:
    form = part.get("type") if isinstance(part, dict) else part
    text = part.get("text") if isinstance(part, dict) else None
    if form == "text" and isinstance(text, str):
        return text
    raise DataError(
        f"the {printable(str(role))} content is list, expected a string or parts such as "
        f"{{type: text, text: …}}; one part is {shown(form)}"
    )


def wanted(message: Mapping[str, Any]) -> bool | None:
    """Return what the message says about being trained on, by ``weight`` or ``train``.

    Raises:
        DataError: One has another value than 0, 1, true or false, or they disagree.
    """
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and (not isinstance(weight, int | float) or weight not in (0, 1)):
        raise DataError(f"weight is {shown(weight)}, expected 0 or 1")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"train is {shown(train)}, expected true or false")
    if weight is not None and train is not None and bool(weight) is not train:
        raise DataError(f"weight is {shown(weight)} and train is {shown(train)}: remove one")
    return train if weight is None else bool(weight)


def with_calls(content: Any, calls: Any, layout: str | None) -> str:
    """Put the calls of tools after what is said.

    Args:
        content: What is said, or None.
        calls: ``[{"name", "arguments"}]``, or as OpenAI writes them.
        layout: The option ``tool_calls``.

    Raises:
        DataError: There is no layout, or the calls are broken.
    """
    if layout is None:
        raise DataError(
            "a message has tool_calls, and nothing says how to write them; set dataset.tool_calls, "
            "as in <|tool_call|>{}<|/tool_call|>, or write them as content"
        )
    if not isinstance(calls, list):
        raise DataError(f"tool_calls is {kind(calls)}, expected a list")
    if content is not None and not isinstance(content, str):
        raise DataError(f"the content beside tool_calls is {kind(content)}, expected a string")
    written = as_json("tool_calls", [_call(call) for call in calls], ensure_ascii=False)
    return (content or "") + layout.replace("{}", written)


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


def tools_text(tools: Any) -> Any:
    """Return a list of tools as JSON, and anything else as it is."""
    # As Phi-4-mini's model card writes them: the template puts text between <|tool|> and <|/tool|>
    return as_json("tools", tools) if isinstance(tools, list | dict) else tools


def as_json(name: str, value: Any, ensure_ascii: bool = True) -> str:
    """Write a value as JSON.

    Raises:
        DataError: JSON has no such value.
    """
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{name} cannot be written as JSON: {error}") from error


def from_json(name: str, text: str) -> Any:
    """Read a value from JSON.

    Raises:
        DataError: The text is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is broken JSON: {error}") from error


def shown(value: Any) -> str:
    """Write a value for an error message, shortened."""
    return printable(shortened(value))
