"""Text comes whole characters at a time, and ends before a stop text."""

from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_plugin.generate import Text


class Bytes:
    """A tokenizer with a token for each byte, and one that says nothing."""

    special_tokens: ClassVar = {"<|end|>": 256}
    stop_tokens: ClassVar = [256]

    def decode(self, token_ids, skip_special_tokens=True):
        return bytes(i for i in token_ids if i < 256).decode("utf-8", errors="replace")


def shown(text: str | bytes, *stop: str) -> tuple[list[str], Text]:
    """Return the pieces that are shown, until the text stops."""
    growing, pieces = Text(Bytes(), stop), []
    for byte in text.encode() if isinstance(text, str) else text:
        pieces.append(growing.push(byte))
        if growing.stopped:
            break
    return [*pieces, growing.end()], growing


def test_characters_come_whole():
    pieces, growing = shown("aé𝄞b")
    assert [piece for piece in pieces if piece] == ["a", "é", "𝄞", "b"]
    assert growing.said == "aé𝄞b"


def test_bytes_that_are_no_character_come_in_the_end():
    pieces, growing = shown(b"a\xf0\x9d")
    assert "".join(pieces) == growing.said == "a�"


@pytest.mark.parametrize("stop", ["###", "\n\n", "é", "d###"])
def test_ends_before_a_stop_text(stop):
    text = f"abc{stop}d"
    pieces, growing = shown(text + "###", stop)
    assert growing.stopped
    assert "".join(pieces) == growing.said == "abc"


def test_the_first_of_several_ends_it():
    assert shown("one two three", "three", "two")[1].said == "one "


def test_what_only_begins_like_a_stop_text_is_shown_late_but_shown():
    pieces, growing = shown("a##b##", "###")
    assert pieces[1] == pieces[2] == "" and pieces[3] == "##b"
    assert "".join(pieces) == growing.said == "a##b##"
    assert not growing.stopped


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="ab#é\n", max_size=20),
    st.lists(st.text("ab#é", min_size=1, max_size=3), max_size=3),
)
def test_pieces_add_up_to_the_text_before_the_first_stop(text, stop):
    pieces, growing = shown(text, *stop)
    assert "".join(pieces) == growing.said
    # The one that ends first ends the text, and of those the longest begins first.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert growing.said == (text[: min(ends)[1]] if ends else text)
