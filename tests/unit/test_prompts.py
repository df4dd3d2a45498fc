"""Rows of prompts and of answers, and what may go to a terminal."""

import json

from phi3_plugin.generate import Answer
from phi3_plugin.prompts import answer_row, as_line, safe


def test_answers_of_answers_keep_all():
    row = {"prompt": "a", "answer": 1, "given_answer": 2, "id": 3}
    answer = Answer(index=0, text="x", tokens=(5, 6), reason="stop", prompt_tokens=4)
    assert answer_row(row, answer) == {
        **{"prompt": "a", "given_answer": 1, "given_given_answer": 2, "id": 3},
        **{"answer": "x", "reason": "stop", "tokens": 2, "prompt_tokens": 4},
    }


def test_lines_are_lines_for_every_reader():
    row = {"a": "é\u2028\x85\ud800\n\x1b"}
    line = as_line(row)
    assert "é" in line and len(line.splitlines()) == 1 and line.encode()
    assert json.loads(line) == row


def test_a_terminal_is_not_driven():
    assert safe("a\x1b[31m\rb\x9b\u202e\tc\n👩\u200d🚀 é\u00a0") == "a[31mb\tc\n👩\u200d🚀 é\u00a0"
