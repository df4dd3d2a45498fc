"""The text of each token: nothing garbled, nothing lost, nothing that drives a terminal."""

import numpy as np
import pytest

from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.inspect import Speller, harmless, show
from tests.assets import assets_dir


def spelled(tokenizer, text, trained=None):
    ids = np.array(tokenizer.encode(text), dtype=np.int32)
    marks = np.zeros(len(ids), np.bool_) if trained is None else trained(ids)
    return Speller(tokenizer).units(ids, marks)


def texts(units):
    return [unit.text for unit in units]


def test_spaces_stay_at_their_tokens(tokenizer):
    units = spelled(tokenizer, "the other\nthe")
    assert "".join(texts(units)) == " the other\nthe"
    assert units[0].text == " the" and len(units[0].ids) == 1


def test_a_character_of_several_tokens_is_one_unit(tokenizer):
    (unit,) = (unit for unit in spelled(tokenizer, "a😀b") if len(unit.ids) > 1)
    assert unit.text == "😀" and len(unit.ids) == 4
    assert "".join(texts(spelled(tokenizer, "ab世界c"))) == " ab世界c"


def test_a_character_that_was_cut_shows_its_bytes(tokenizer):
    ids = tokenizer.encode("a😀")[:-1]
    units = Speller(tokenizer).units(np.array(ids), np.zeros(len(ids), np.bool_))
    assert texts(units)[-3:] == ["<0xF0>", "<0x9F>", "<0x98>"]
    ids = [*ids[-3:-1], *tokenizer.encode("é😀b")]  # a part, and whole ones behind it
    units = Speller(tokenizer).units(np.array(ids), np.zeros(len(ids), np.bool_))
    assert "".join(texts(units)) == "<0xF0><0x9F> é😀b"


def test_added_tokens_are_told_apart(tokenizer):
    units = spelled(tokenizer, "<|user|>\nthe<|end|></s>")
    assert [(unit.text, unit.special) for unit in units] == [
        ("<|user|>", True),
        (" the", False),
        ("<|end|>", True),
        ("</s>", True),
    ]


def test_what_is_trained_is_marked(tokenizer):
    units = spelled(tokenizer, "a😀", lambda ids: np.arange(len(ids)) > 1)
    assert [unit.trained for unit in units] == [False] * (len(units) - 1) + [True]


@pytest.mark.assets
@pytest.mark.parametrize("text", ["", "  two  spaces", "你好 𝕏\t😀👍\r\nx", "ｆｕｌｌ", "\x00\x7f"])
def test_the_text_of_the_published_vocabulary(text):
    tokenizer = phi3_tokenizer(assets_dir() / "models" / "phi3-mini-4k-instruct")
    assert "".join(texts(spelled(tokenizer, text))) == (" " + text if text else "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("naïve 你好 😀 a\nb\tc", "naïve 你好 😀 a\nb\tc"),
        ("\x1b[31m\r\x07\x9b", "\\x1b[31m\\x0d\\x07\\x9b"),
        ("\u202e\u2066\u200b\ufeff\u2028\xa0", "\\u202e\\u2066\\u200b\\ufeff\\u2028\\xa0"),
        ("\ud800\U000e0041", "\\ud800\\U000e0041"),
    ],
)
def test_harmless(text, expected):
    assert harmless(text) == expected


def test_every_kind_of_vocabulary(supported):
    tokenizer = phi3_tokenizer(supported)
    units = spelled(tokenizer, "one é世界😀  two\n")
    assert "".join(texts(units)).lstrip() == "one é世界😀  two\n"
    assert not [unit for unit in units if "\ufffd" in unit.text or "Ġ" in unit.text]


class Rows:
    full = np.array([9, 2])

    def arrays(self, i):
        return np.array([5, 6], np.int32), np.array([-100, 6], np.int32)

    def places(self, i):
        return f"rows.jsonl:{i + 1}"


def test_a_sample(tokenizer):
    first, second = show(Rows(), [0, 1], Speller(tokenizer))
    assert (first.where, first.tokens, first.trained, first.lost) == ("rows.jsonl:1", 2, 1, 7)
    assert (second.where, second.lost) == ("rows.jsonl:2", 0)
