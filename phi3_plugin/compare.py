"""The samples of a run beside what transformers makes of the same conversations."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from phi3_plugin.data.collate import IGNORED
from phi3_plugin.data.dataset import messages_of_rows
from phi3_plugin.data.thoughts import THINK, THOUGHT_DETAILS, THOUGHT_FIELDS, thought_of
from phi3_plugin.inspect import FIRST, Comparison, Samples, arrays, truncation, unpacked
from phi3_plugin.settings import Settings
from phi3_plugin.train.data import RunData

COMPARED = 1000
"""Samples that are compared at most; transformers takes a millisecond for each."""

Marked = tuple[Sequence[int], Sequence[bool]]
"""The ids of a conversation, and which are trained on."""


def compare_with_hf(settings: Settings, data: RunData, samples: Samples) -> Comparison:
    """Compare the first samples with transformers.

    Those that a cut took something from the left of are passed over.

    Args:
        settings: Of a run on chats.
        data: Its data, split and ordered.
        samples: Those of the training data, surveyed.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AddedToken, AutoTokenizer

    tokenizer, options = data.tokenizer, settings.dataset
    theirs = AutoTokenizer.from_pretrained(settings.checkpoint_dir)
    for token in tokenizer.new_tokens.values():
        flags = {name: value for name, value in token.entry.items() if name != "id"}
        theirs.add_tokens([AddedToken(**flags)])
    numbers = {where: i for i, where in reversed(list(enumerate(samples.places)))}
    shortened = samples.full > samples.lengths
    rows = (
        (numbers[where], messages)
        for where, messages in messages_of_rows(tokenizer, options)
        if where in numbers and not (truncation(settings) == "left" and shortened[numbers[where]])
    )
    dataset, compared, places = unpacked(data.order.dataset), 0, list[str]()
    choices = {"limit": tokenizer.max_seq_len, "options": options, "eos_id": tokenizer.eos_id}
    field = tokenizer.template.reads.thought
    for i, messages in islice(rows, COMPARED):
        compared += 1
        ids, labels = arrays(dataset, i)
        ours = ids.tolist(), (labels != IGNORED).tolist()
        raw = [_raw(message, field) for message in messages]
        whole = hf_tokens(theirs, raw, field, **_variables(messages))
        if text := difference(ours, as_trained(whole, **choices)):
            places.append(f"{samples.places[i]}: {text}")
    return Comparison(compared, len(places), places[:FIRST])


def as_trained(
    theirs: Marked, *, limit: int | None, options: Mapping[str, Any], eos_id: int
) -> Marked:
    """Do to a whole conversation what the options of a data set do: end it, mark it, cut it."""
    ids, trained = list(theirs[0]), list(theirs[1])
    if options.get("add_eos", False) and ids[-1:] != [eos_id]:
        ids, trained = [*ids, eos_id], [*trained, False]
    if options.get("train_on") == "all":
        trained = [True] * len(ids)
    return ids[:limit], [False, *trained[1:limit]]


def difference(ours: Marked, theirs: Marked) -> str:
    """Say where two tokenizations begin to differ; nothing if they do not."""
    for what, mine, other in zip(("id", "trained"), ours, theirs, strict=True):
        for n, (a, b) in enumerate(zip(mine, other, strict=False)):
            if a != b:
                return f"token {n} has {what} {a} here, {b} there"
    if len(ours[0]) != len(theirs[0]):
        return f"{len(ours[0])} tokens here, {len(theirs[0])} there"
    return ""


def _raw(message: Mapping[str, Any], thought_field: str | None) -> dict[str, Any]:
    """Return a message as its row has it, but for what our formats alone read."""
    read = ("role", "tools", "tool_calls", *THOUGHT_FIELDS, *THOUGHT_DETAILS)
    raw = {k: v for k, v in message["raw"].items() if k not in read}
    is_ours = message["raw"].get("tool_calls") or thought_of(message["raw"]) is not None
    if is_ours or not isinstance(raw.get("content"), str):
        raw.pop("content", None)
    ours = {
        name: message[name] for name in ("role", "content", "tools", "trained") if name in message
    }
    if thought_field is not None and "thought" in message:
        ours[thought_field] = message["thought"]
    return {**ours, **raw}


def _variables(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return dict(json.loads(messages[-1]["variables"] or "{}"))


def hf_tokens(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    thought_field: str | None = None,
    **variables: Any,
) -> Marked:
    """Return what ``transformers`` makes of a conversation: ids, and which of them are trained on.

    What counts is its ``return_assistant_tokens_mask``, where the template has ``{% generation %}``
    (but for a header's added token that only takes white space of the answer to itself). It has no
    mask for templates such as Phi-3's, so that is worked out from its own texts: rendered once more
    with another text in its place, a conversation differs only where the message speaks. What
    stands there counts with the added token that follows. An answer with a thought counts from
    where its prompt ends, and not at all where the thought is left out.

    Args:
        tokenizer: As transformers loads it.
        messages: With ``role`` and ``content``; ``trained`` where they are to count.
        thought_field: Where the template looks for what was thought.
        **variables: What else the template is given, such as ``documents``.
    """
    plain = [{k: v for k, v in message.items() if k != "trained"} for message in messages]
    text = tokenizer.apply_chat_template(plain, tokenize=False, **variables)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    added = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
    ends = re.compile(rf"\s*({'|'.join(map(re.escape, added))})")
    blocks = _generated(tokenizer, plain, **variables)
    spans = set[tuple[int, int]]()
    for i in (i for i, message in enumerate(messages) if message.get("trained")):
        if thought_field in plain[i] and not any(
            _spoken(tokenizer, plain, i, text, (thought_field,), **variables)
        ):
            continue
        for first, last in _spoken(tokenizer, plain, i, text, ("content", "tools"), **variables):
            end = ends.match(text, last)
            around = [block for block in blocks if block[0] <= first and last <= block[1]]
            start = _asked(tokenizer, plain[:i], text, first, **variables)
            spans.update(around or [(start, end.end() if end else last)])
    ids = list(tokenizer.apply_chat_template(plain, return_dict=False, **variables))
    is_added = set(tokenizer.added_tokens_decoder)
    trained = [
        any(
            start < last and first < end and (first <= start or token not in is_added)
            for first, last in spans
        )
        for token, (start, end) in zip(ids, tokens["offset_mapping"], strict=False)
    ]
    return ids, trained


def _generated(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], **variables: Any
) -> list[tuple[int, int]]:
    """Return [start, end) of what the template puts in ``{% generation %}``, in the text."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        [[dict(message) for message in messages]],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
        **variables,
    )
    return list(rendered[1][0])


def _asked(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    text: str,
    first: int,
    **variables: Any,
) -> int:
    """Return where an answer begins whose content does at a place: thoughts may make that earlier.

    Or later, where its prompt has the mark before the thought already.
    """
    if THINK not in text or not messages:
        return first
    asked = tokenizer.apply_chat_template(
        [*messages], tokenize=False, add_generation_prompt=True, **variables
    )
    between = text[min(first, len(asked)) : max(first, len(asked))]
    return len(asked) if text.startswith(asked) and THINK in between else first


def _spoken(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    i: int,
    text: str,
    fields: Sequence[str],
    **variables: Any,
) -> Iterator[tuple[int, int]]:
    """Yield where a message's texts stand in the rendered text; nothing for one left out."""
    mark = "Qz"
    while mark in text:
        mark += "z"
    for field in {*fields} & messages[i].keys():
        changed = [*messages[:i], {**messages[i], field: mark}, *messages[i + 1 :]]
        rendered = tokenizer.apply_chat_template(changed, tokenize=False, **variables)
        before, spoken, after = rendered.partition(mark)
        first, last = len(before), len(text) - len(after)
        if spoken and first <= last and text.startswith(before) and text.endswith(after):
            yield first, last
