"""What `phi3_plugin.recipes.phi3_evaluate` measures on: the samples that a run holds out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from phi3_plugin.recipes.phi3_inspect_data import CHAT_DATASETS

from phi3_plugin.data.dataset import IGNORED
from phi3_plugin.data.inspection.compared import conversations
from phi3_plugin.data.inspection.survey import arrays, place
from phi3_plugin.data.turns import make_turn
from phi3_plugin.errors import DataError
from phi3_plugin.evaluate.outcomes import Sample
from phi3_plugin.train.feed import build
from phi3_plugin.train.order import hold_out
from phi3_plugin.train.settings import Settings

NO_ANSWER = "there is no answer of the assistant to a prompt in it"

Messages = Sequence[Mapping[str, Any]]
Question = tuple[list[int], str, str]
"""Tokens and text of a prompt, and what is expected as the answer."""


@dataclass(frozen=True)
class Item:
    """One sample, ready to be measured."""

    sample: Sample
    trained: dict[str, Any]
    """Its ``tokens`` and ``labels``, as a run takes them."""
    prompt: list[int]
    """What is to be answered; empty where nothing is."""


@dataclass(frozen=True)
class Held:
    """The samples, and where they come from."""

    items: list[Item]
    evaluated: str
    """Where they come from, in words."""
    section: Mapping[str, Any]
    """And in those of the configuration."""


def held(s: Settings, tokenizer: Any, *, limit: int | None, positions: int | None) -> Held:
    """Return the validation data, or what is held out, or else all data.

    Args:
        s: Of the run.
        tokenizer: As they ask for it.
        limit: Take the first so many samples; None takes all.
        positions: Of the model, for prompt and answer; None asks for no answers.
    """
    section = unpacked(s.dataset_val or s.dataset)
    share = 0.0 if s.dataset_val else s.val_fraction
    kept, part = hold_out(build(section, tokenizer), share, s.seed)
    dataset = once(kept if part is None else part)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if not count:
        raise DataError("dataset: there is no sample in it to evaluate.")
    chats = {} if positions is None else chats_of(dataset, count, section, tokenizer)
    items = [_item(dataset, i, chats, tokenizer, positions) for i in range(count)]
    words = _in_words(s, section, count, len(dataset)) + _too_long(dataset, count)
    return Held(items, words, section)


def unpacked(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a data set's section under which each conversation is a sample of its own."""
    if section["_component_"] not in CHAT_DATASETS:
        return section
    return {**section, "packed": False, "split_documents": False}


def once(dataset: Any) -> Any:
    """Return a data set in which no sample comes again because of its source's weight."""
    if not hasattr(dataset, "chosen"):
        return dataset
    _, first = np.unique(dataset.chosen, return_index=True)
    return dataset.select(np.sort(first))


def chats_of(
    dataset: Any, count: int, section: Mapping[str, Any], tokenizer: Any
) -> dict[str, Messages]:
    """Return the messages of the first samples, by where they were read."""
    found = dict[str, Messages]()
    if section["_component_"] not in CHAT_DATASETS:
        return found
    missing = {place(dataset, i) for i in range(count)}
    for where, messages in conversations(tokenizer, section):
        if where in missing:
            found[where] = messages
            missing.remove(where)
        if not missing:
            break
    return found


def question(messages: Messages, tokenizer: Any) -> Question:
    """Return what the last answer of a conversation is an answer to, and that answer.

    Raises:
        DataError: There is none, or its prompt cannot be rendered.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise DataError(NO_ANSWER)
    before = messages[: answers[-1]]
    turns = [make_turn(m["role"], m["content"], tools=m.get("tools")) for m in before]
    (tokens,) = tokenizer.tokenize_chats([turns], add_generation_prompt=True)
    text = tokenizer.render(turns, add_generation_prompt=True).text
    return tokens.ids.tolist(), text, messages[answers[-1]]["content"]


def last_labelled(tokens: Sequence[int], labels: Sequence[int], tokenizer: Any) -> Question:
    """Return the last stretch of labelled tokens as the answer to what is before it.

    For samples of which nothing more is known.

    Raises:
        DataError: Nothing is labelled, or all of it is.
    """
    labelled = np.flatnonzero(np.asarray(labels) != IGNORED)
    breaks = np.flatnonzero(np.diff(labelled) > 1)
    start = int(labelled[breaks[-1] + 1 if len(breaks) else 0]) if len(labelled) else 0
    if start < 2:  # one token is no prompt: a sample that is labelled as a whole begins with it
        raise DataError(NO_ANSWER)
    prompt, said = list(tokens[:start]), [labels[i] for i in labelled.tolist() if i >= start]
    return prompt, tokenizer.decode(prompt, False), tokenizer.decode(said)


def _item(
    dataset: Any, i: int, chats: Mapping[str, Messages], tokenizer: Any, positions: int | None
) -> Item:
    ids, labels = (values.tolist() for values in arrays(dataset, i))
    where, tokens = place(dataset, i), sum(label != IGNORED for label in labels[1:])
    prompt, text, reference, unasked = list[int](), "", "", ""
    if positions is not None:
        try:
            chat = chats.get(where)
            prompt, text, reference = (
                last_labelled(ids, labels, tokenizer) if chat is None else question(chat, tokenizer)
            )
            _check_length(len(prompt), positions)
        except DataError as error:
            prompt, unasked = [], str(error)
    sample = Sample(where, tokens, text, reference, unasked)
    return Item(sample, {"tokens": ids, "labels": labels}, prompt)


def _check_length(length: int, positions: int) -> None:
    if length >= positions:
        raise DataError(
            f"its prompt has {length:,} tokens, and the model {positions:,} positions for prompt "
            "and answer"
        )


def _in_words(s: Settings, section: Mapping[str, Any], count: int, total: int) -> str:
    how = "set as dataset_val" if s.dataset_val else "the whole data set"
    if not s.dataset_val and s.val_fraction:
        how = f"held out by val_fraction={s.val_fraction:g}"
    number = f"{count:,}" if count == total else f"The first {count:,} of {total:,}"
    source = section.get("source") or section["_component_"]
    source = ", ".join(map(str, source)) if isinstance(source, list | tuple) else source
    return f"{number} {'sample' if total == 1 else 'samples'} of {source}, {how}."


def _too_long(dataset: Any, count: int) -> str:
    """Say what tokenizer.max_seq_len takes from the numbers; empty where that is nothing."""
    if not hasattr(dataset, "lost"):
        return ""
    lost, cut = len(dataset.lost), int((dataset.full > dataset.lengths)[:count].sum())
    said = f" Cut at tokenizer.max_seq_len for the loss: {cut:,}." if cut else ""
    if lost:
        said += f" Left out, with no answer within tokenizer.max_seq_len: {lost:,} more."
    return said
