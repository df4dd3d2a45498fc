"""A thought and an answer told apart, whole or as they are written."""

import pytest

from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.data.template import THINK
from phi3_plugin.data.thoughts import ThoughtsHidden, begun_thought, is_thinking, split_thought
from phi3_plugin.generate import Answer
from phi3_plugin.options import Sampling
from phi3_plugin.prompts import Speaker, answer_row
from tests.variants import BUILT

TEXTS = {
    "It is 4.": (None, "It is 4."),
    "<think>\nTwo.\n</think>\n\nIt is 4.\n": ("Two.", "It is 4.\n"),
    " <think> Two. </think> It is 4.": (" Two. ", " It is 4."),
    "<think></think>4": ("", "4"),
    "Two.\n</think>\n4": ("Two.", "4"),  # of a model whose prompt opens the thought
    "<think>Two.</think>4</think>5": ("Two.", "4</think>5"),
    "<think>Two": ("Two", ""),
    "Why <think>?": (None, "Why <think>?"),
    "": (None, ""),
}


@pytest.mark.parametrize("text", TEXTS)
def test_thought_and_answer(text):
    assert split_thought(text) == TEXTS[text]
    assert is_thinking(text) is (text == "<think>Two")


@pytest.mark.parametrize("text", [text for text in TEXTS if not text.startswith("Two.")])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_thoughts_are_hidden_while_they_are_written(text, size):
    shown = []
    hidden = ThoughtsHidden(shown.append)
    for start in range(0, len(text), size):
        hidden(text[start : start + size])
        assert "hink>" not in "".join(shown) or text in (
            "Why <think>?",
            "<think>Two.</think>4</think>5",
        )
    hidden.end()
    assert "".join(shown) == TEXTS[text][1]


def test_what_a_prompt_ends_in():
    ends = {"a<think>": THINK, "<think>\n": "<think>\n", "<think>\n\n</think>\n\n": "", "a": ""}
    assert {text: begun_thought(text) for text in ends} == ends


def test_a_row_of_an_answer_may_leave_its_thought_out():
    answer = Answer(0, "<think>Two.</think>4", (1,), "stop", 5)
    assert answer_row({}, answer)["answer"] == answer.text
    assert answer_row({}, answer, hide_thoughts=True)["answer"] == "4"


def test_a_cut_within_a_thought_is_told(capsys):
    sampling = Sampling(max_new_tokens=8)
    for text, told in (("<think>Two", ", within its thought"), ("It is", "")):
        speaker = Speaker(hide_thoughts=True)
        speaker(text)
        speaker.end()
        assert speaker.told("length", sampling) == f"cut at 8 tokens (max_new_tokens){told}"
        assert speaker.told("stop", sampling) == ""
    assert capsys.readouterr().out == "\nIt is\n"


def test_the_marks_of_a_thought_show_where_they_are_special_tokens(tmp_path):
    tokenizer = phi3_tokenizer(BUILT["phi4-reasoning"](tmp_path))
    text = "<think>Two.</think>4<|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.special_tokens[THINK] in ids
    assert tokenizer.decode_answer(ids) == text.removesuffix("<|im_end|>")
    assert tokenizer.decode(ids) == "Two.4"
