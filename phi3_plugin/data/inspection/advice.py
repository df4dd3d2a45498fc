"""What is worth acting on in the numbers of a data set, in words, with what to do about it."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from phi3_plugin.data.findings import (
    BROKEN,
    CUT_AWAY,
    DROPPED_MESSAGE,
    NO_FINAL_ANSWER,
    PASSED_OVER,
    SPECIAL_IN_TEXT,
    UNUSABLE,
    Findings,
)
from phi3_plugin.data.inspection.limits import Cut
from phi3_plugin.data.inspection.statistics import GROUPED, PACKED, Batching, Statistics

CUT, LOST = 0.01, 0.01
"""Cut samples, and lost tokens, that are worth a word; and what a better length may lose."""

PADDING, SPARED = 0.2, 0.1
"""Padding that is worth a word, and how much less another way must have to be advised."""

LABELLED = 0.05
"""Trained tokens below which most of the work is reading."""

COPIES = 0.01
FEW_STEPS = 10

SWITCHES = {PACKED: "dataset.packed=True", GROUPED: "group_by_length=True"}
"""How each way to spare padding is chosen."""


class Problem(NamedTuple):
    """Something to act on."""

    text: str
    advice: str
    stops: bool = False
    """Whether training would stop because of it."""


def problems(found: Statistics) -> list[Problem]:
    """Return what is worth acting on, the worst first."""
    makers = (
        _bad_rows,
        _stopping,
        _length,
        _labelled,
        _padding,
        _rows,
        _texts,
        _held_out,
        _compared,
    )
    listed = [problem for maker in makers for problem in maker(found)]
    return sorted(listed, key=lambda problem: not problem.stops)  # sorted() keeps the order


def percent(share: float) -> str:
    """Write a share; what is not nothing, or not all, does not look like it."""
    if share <= 0 or share >= 1:
        return f"{100 * share:.0f} %"
    if share < 0.0005:
        return "<0.1 %"
    if share > 0.9995:
        return ">99.9 %"
    return f"{100 * share:.{0 if 0.0995 <= share < 0.995 else 1}f} %"


def loss(cut: Cut) -> str:
    """Write which share of the tokens a limit loses."""
    share = percent(cut.tokens)
    if not cut.least:
        return share
    return ">0 %" if share.startswith("<") else f"≥ {share}"


def count(number: int, one: str) -> str:
    """Write how many there are of something."""
    return f"{number:,} {one if number == 1 else one + 's'}"


def _bad_rows(found: Statistics) -> Iterator[Problem]:
    for name, options, findings in _sections(found):
        bad = sum(findings.counts.get(kind, 0) for kind in (BROKEN, UNUSABLE))
        drop = f"{name}.bad_rows=drop"
        text, fix = f"{name}: {count(bad, 'row')} cannot be read or used", "Correct them"
        if bad and options.get("bad_rows", "error") == "drop":
            yield Problem(f"{text}; {drop} leaves them out.", f"{fix} if they are to be learned.")
        elif bad:
            text = f"{text}: training would stop because of them."
            yield Problem(text, f"{fix}, or leave them out with {drop}.", stops=True)


def _stopping(found: Statistics) -> Iterator[Problem]:
    if found.endless == 0:
        return
    text = (
        f"In {count(found.endless, 'sample')} ({percent(found.endless / found.samples)}) the token "
        "that ends a turn is not trained: the model does not learn from them when to stop."
    )
    if found.endless_uncut * 2 < found.endless:
        yield Problem(text, "They are cut before the answer ends; see the lengths below.")
    else:
        yield Problem(text, "Look at a sample below: is the answer an assistant's turn, and whole?")


def _length(found: Statistics) -> Iterator[Problem]:
    limit, lost = found.limit, found.findings.counts.get(CUT_AWAY, 0)
    if lost:
        yield Problem(
            f"{count(lost, 'row')} left out: nothing to train on is within "
            f"tokenizer.max_seq_len={limit}.",
            "Raise it, or shorten what comes before the answers.",
        )
    if found.cut.samples >= CUT or found.cut.tokens >= LOST:
        yield Problem(
            f"{percent(found.cut.samples)} of the samples are {_cut(found)}: "
            f"{percent(found.cut.tokens)} of all tokens are lost.",
            _longer(found),
        )
    if found.longest > found.positions:
        yield Problem(
            f"The longest sample has {found.longest:,} tokens; the model was made for "
            f"{found.positions:,}.",
            f"Set tokenizer.max_seq_len={found.positions}, or less.",
        )


def _cut(found: Statistics) -> str:
    if found.truncate == "drop":
        return f"longer than {found.limit:,} and dropped"
    return f"cut at {found.limit:,}"


def _longer(found: Statistics) -> str:
    better = [cut for cut in found.cuts if (found.limit or 0) < cut.limit <= found.positions]
    if not better:
        return "That is all the model can take: split these conversations."
    enough = next((cut for cut in better if cut.tokens < LOST), better[-1])
    return f"tokenizer.max_seq_len={enough.limit} would lose {_little(enough)}."


def _little(cut: Cut) -> str:
    words = loss(cut).replace("≥", "at least").replace(">0", "more than 0")
    return words if cut.tokens else "nothing"


def _labelled(found: Statistics) -> Iterator[Problem]:
    share = found.labelled / found.tokens
    if share < LABELLED:
        yield Problem(
            f"{percent(share)} of the tokens are trained on; the rest is only read.",
            "Check in the samples below that the answers are marked. Shorter prompts, or "
            "dataset.train_on=all, would train on more.",
        )
    if found.steps < FEW_STEPS:
        yield Problem(
            f"The whole run makes {count(found.steps, 'step')} of {found.per_step}.",
            "Lower gradient_accumulation_steps or batch_size, or raise epochs.",
        )


def _padding(found: Statistics) -> Iterator[Problem]:
    now = found.batching
    if now.padding < PADDING:
        return
    better = [b for b in found.batchings if b.name in SWITCHES and now.padding - b.padding > SPARED]
    text = f"{percent(now.padding)} of each batch is padding, where a recipe pads (torchtune's do)."
    if better:
        yield Problem(text, " ".join(_switch(batching, now) for batching in better))
    elif now.name == PACKED:
        yield Problem(text, "Set another tokenizer.max_seq_len, the length of a pack.")


def _switch(batching: Batching, now: Batching) -> str:
    text = f"{SWITCHES[batching.name]} would bring it to {percent(batching.padding)}"
    if batching.steps == now.steps:
        return f"{text}."
    return f"{text}, with {batching.steps:,} steps an epoch instead of {now.steps:,}."


def _rows(found: Statistics) -> Iterator[Problem]:
    counted = found.findings.counts
    copies = found.alike.copies
    if copies >= COPIES * found.samples:
        yield Problem(
            f"{count(copies, 'sample')} ({percent(copies / found.samples)}) "
            f"{'repeats' if copies == 1 else 'repeat'} an earlier one, token for token.",
            "Remove them, unless the model is to see them more often.",
        )
    if unanswered := counted.get(NO_FINAL_ANSWER, 0):
        yield Problem(
            f"{count(unanswered, 'conversation')} without an answer to the last message.",
            "What follows the last answer is not trained on. Remove it, or add the answer.",
        )
    if passed := counted.get(PASSED_OVER, 0):
        yield Problem(
            f"{count(passed, 'row')} with weight or train fields that are passed over.",
            f"dataset.train_on={found.options.get('train_on', 'assistant')} decides alone; "
            "dataset.train_on=marked would follow them.",
        )


def _texts(found: Statistics) -> Iterator[Problem]:
    counted = found.findings.counts
    if left_out := counted.get(DROPPED_MESSAGE, 0):
        yield Problem(
            f"{count(left_out, 'row')} with a message that the chat template leaves out.",
            "Move what they say into the user's message, if the model is to know it.",
        )
    special = counted.get(SPECIAL_IN_TEXT, 0)
    if special and found.special_in_text == "parse":
        yield Problem(
            f"{count(special, 'row')} with a special token such as <|end|> written in a message: "
            "it counts as that token, and can end a turn.",
            "Set tokenizer.special_in_text=text to keep it as text.",
        )


def _held_out(found: Statistics) -> Iterator[Problem]:
    part = found.held_out
    if part and part.seen:
        yield Problem(
            f"{part.seen:,} of {count(part.samples, 'validation sample')} "
            f"({percent(part.seen / part.samples)}) can be found in the training data: the "
            "validation loss will look too good.",
            "Remove them from one of the two.",
        )


def _compared(found: Statistics) -> Iterator[Problem]:
    if found.compared and found.compared.differ:
        yield Problem(
            f"{found.compared.differ:,} of {count(found.compared.samples, 'sample')} differ from "
            "what transformers makes of them.",
            "Look at the first ones below. With tokenizer.special_in_text=text that is wanted "
            "where messages hold special tokens.",
        )


def _sections(found: Statistics) -> Iterator[tuple[str, Mapping[str, Any], Findings]]:
    yield "dataset", found.options, found.findings
    # Rows that are only split into two parts are told of once
    val = found.options_val
    if found.held_out and val is not None and val.get("source") != found.options.get("source"):
        yield "dataset_val", val, found.held_out.findings
