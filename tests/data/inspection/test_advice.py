"""Each problem, when it is worth a word, and what is said about it."""

import pytest

from phi3_plugin.data import formats as f
from phi3_plugin.inspect import (
    GROUPED,
    PACKED,
    PLAIN,
    Alike,
    Batching,
    Compared,
    Cut,
    Part,
    count,
    loss,
    percent,
    problems,
)
from tests.data.inspection.inspected import FOUND, findings, numbers

CHAT = FOUND.options


def said(**changes):
    return [f"{problem.text} {problem.advice}" for problem in problems(numbers(**changes))]


def rows(kind, number=3):
    return {"findings": findings(*[(kind, f"chats.jsonl:{n}", "") for n in range(number)])}


def test_nothing_is_said_of_good_data():
    assert said() == []


@pytest.mark.parametrize("kind", [f.BROKEN, f.UNUSABLE])
def test_bad_rows_stop_a_run_unless_they_are_dropped(kind):
    (problem,) = problems(numbers(**rows(kind)))
    assert problem.stops and "dataset: 3 rows cannot be read or used" in problem.text
    assert problem.advice.endswith("dataset.bad_rows=drop.")
    (problem,) = problems(numbers(**rows(kind), options={**CHAT, "bad_rows": "drop"}))
    assert not problem.stops and "leaves them out" in problem.text


def held_out(source, seen=0):
    part = Part(9, 8, 80, 40, seen, findings((f.BROKEN, "val.jsonl:1", "")))
    return {"held_out": part, "options_val": {**CHAT, "source": source}}


def test_bad_rows_of_validation_data_are_told_of_once():
    assert said(**held_out("val.jsonl"))[0].startswith("dataset_val: 1 row cannot be read")
    assert said(**held_out("chats.jsonl")) == []


def test_validation_data_that_is_trained_on():
    (line,) = said(**held_out("chats.jsonl", seen=2))
    assert line.startswith("2 of 8 validation samples (25 %) can be found in the training data")


def test_what_stops_a_run_comes_first():
    listed = problems(numbers(**rows(f.BROKEN), labelled=10, steps=3))
    assert [problem.stops for problem in listed] == [True, False, False]


CUTS = [Cut(2048, 0.12, 0.34, "yours"), Cut(4096, 0.05, 0.01, ""), Cut(8192, 0, 0, "")]


def test_cut_samples():
    changes = {"limit": 2048, "cuts": CUTS}
    start = "12 % of the samples are cut at 2,048: 34 % of all tokens are lost. "
    assert said(**changes, positions=8192) == [
        f"{start}tokenizer.max_seq_len=8192 would lose nothing."
    ]
    assert said(**changes, positions=4096) == [
        f"{start}tokenizer.max_seq_len=4096 would lose 1.0 %."
    ]
    assert said(**changes, positions=2048)[0].startswith(f"{start}That is all the model can take")


def test_dropped_samples():
    (line,) = said(limit=2048, cuts=CUTS, truncate="drop")
    assert line.startswith(
        "12 % of the samples are longer than 2,048 and dropped: 34 % of all tokens are lost. "
    )


def test_a_loss_that_may_be_more():
    listed = [*CUTS[:1], Cut(4096, 0.05, 0.04, "", least=True)]
    assert said(limit=2048, cuts=listed)[0].endswith("=4096 would lose at least 4.0 %.")
    listed = [*CUTS[:1], Cut(4096, 0.05, 0.0001, "", least=True)]
    assert said(limit=2048, cuts=listed)[0].endswith("=4096 would lose more than 0 %.")
    shares = [Cut(512, 0.5, 0.31, "", least) for least in (False, True)]
    assert [loss(cut) for cut in shares] == ["31 %", "≥ 31 %"]
    assert loss(Cut(512, 0.5, 0.0001, "", least=True)) == ">0 %"


def test_rows_that_lose_all_that_is_trained():
    (line,) = said(**rows(f.CUT_AWAY, 1))
    assert line.startswith(
        "1 row left out: nothing to train on is within tokenizer.max_seq_len=256"
    )


def test_longer_than_the_model():
    (line,) = said(longest=5000, limit=None)
    assert "5,000 tokens; the model was made for 4,096. Set tokenizer.max_seq_len=4096" in line


def test_few_trained_tokens():
    (line,) = said(labelled=37)
    assert line.startswith("0.9 % of the tokens are trained on") and "train_on=all" in line


def test_padding_and_what_spares_it():
    plain, packed = Batching(PLAIN, 0.61, 25, True), Batching(PACKED, 0.008, 5, False)
    grouped = Batching(GROUPED, 0.02, 25, False)
    assert said(batchings=[plain, grouped, packed]) == [
        "61 % of each batch is padding, where a recipe pads (torchtune's do). "
        "group_by_length=True would bring it to 2.0 %. "
        "dataset.packed=True would bring it to 0.8 %, with 5 steps an epoch instead of 25."
    ]
    assert said(batchings=[plain, grouped._replace(padding=0.6)]) == []
    packed = packed._replace(padding=0.4, chosen=True)
    assert "another tokenizer.max_seq_len" in said(batchings=[packed])[0]


def test_copies():
    assert said(alike=Alike(1, [], 0), samples=200) == said(alike=Alike(0, [], 50)) == []
    (line,) = said(alike=Alike(20, [], 0))
    assert line.startswith("20 samples (20 %) repeat an earlier one, token for token.")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (f.NO_FINAL_ANSWER, "3 conversations without an answer"),
        (f.PASSED_OVER, "train_on=assistant decides alone"),
        (f.DROPPED_MESSAGE, "3 rows with a message that the chat template leaves out"),
        (f.SPECIAL_IN_TEXT, "tokenizer.special_in_text=text"),
    ],
)
def test_what_was_noticed(kind, text):
    (line,) = said(**rows(kind))
    assert text in line


def test_special_tokens_that_stay_text_are_no_problem():
    assert said(**rows(f.SPECIAL_IN_TEXT), special_in_text="text") == []


def test_samples_that_never_stop():
    (line,) = said(endless=10, endless_uncut=1)
    assert "In 10 samples (10 %) the token that ends a turn is not trained" in line
    assert "cut before the answer ends" in line
    assert "is the answer an assistant's turn" in said(endless=10, endless_uncut=10)[0]


def test_few_steps():
    assert said(steps=1)[0].startswith("The whole run makes 1 step of 4 samples.")


def test_another_tokenizer_disagrees():
    assert said(compared=Compared(9, 0, [])) == []
    (line,) = said(compared=Compared(9, 2, []))
    assert line.startswith("2 of 9 samples differ from what transformers makes of them.")


def test_shares_do_not_look_like_nothing_or_all():
    shares = (0, 0.0001, 0.0005, 0.0994, 0.0996, 0.5, 0.994, 0.996, 0.9999, 1)
    written = ["0", "<0.1", "0.1", "9.9", "10", "50", "99", "99.6", ">99.9", "100"]
    assert [percent(share) for share in shares] == [f"{text} %" for text in written]


def test_counts():
    assert count(1, "row") == "1 row" and count(2000, "row") == "2,000 rows"
