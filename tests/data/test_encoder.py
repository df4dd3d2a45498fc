"""Ids and what is trained, by added tokens and by the places of tokens."""

import pytest
from hypothesis import given

from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.data.formats import Written, make_turn
from tests.contract.test_ids import MANY, TURNS
from tests.data.variants import phi4

SPOKEN = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="session")
def supported_tokenizer(supported):
    return phi3_tokenizer(supported, dropped="warn")


@pytest.mark.parametrize("special_in_text", ["parse", "text"])
@pytest.mark.parametrize(
    ("said", "trained"),
    [("that", ""), ("that one", " one"), (" that one", " that one"), ("", "")],
)
def test_a_token_that_starts_in_the_header_is_not_trained(tmp_path, said, trained, special_in_text):
    """The header ends in a space here, which goes into the token of the first word."""
    folder = phi4(tmp_path, chat_template=SPOKEN, flags=False)
    tokenizer = phi3_tokenizer(folder, special_in_text=special_in_text)
    (tokens,) = tokenizer.tokenize_chats([[make_turn("user", "a"), make_turn("assistant", said)]])
    text = tokenizer.decode(tokens.ids[tokens.trained].tolist(), skip_special_tokens=False)
    assert text == trained + "<|im_end|>"


@given(turns=TURNS)
@MANY
def test_added_tokens_tell_what_the_places_of_tokens_tell(supported_tokenizer, turns):
    encoder, template = supported_tokenizer._encoder, supported_tokenizer._template
    chats = [template.render([make_turn(*turn) for turn in part]) for part in (turns, turns[-1:])]
    chats.append(template.follow(Written(chats[0].text, None), ()))
    batch = encoder.encode(chats)
    for ours, asked in zip(batch.split(), encoder._encode_asking(chats), strict=True):
        assert ours.ids.tolist() == asked.ids.tolist()
        assert ours.trained.tolist() == asked.trained.tolist()


def test_most_templates_need_not_ask(supported, supported_tokenizer):
    chat = supported_tokenizer.render([make_turn("user", "a"), make_turn("assistant", "b")])
    tells = supported_tokenizer._encoder._marker.marks(chat.layout).tell
    launch = ("launch", "phi3-mini@launch-2024-04-23", "invented-chatml")
    assert tells == (supported.name not in launch)


def test_which_conversations_are_written_normalized(supported, supported_tokenizer):
    encoder = supported_tokenizer._encoder
    chat = supported_tokenizer.render([make_turn("user", "a"), make_turn("assistant", "b")])
    known = encoder._bare is not None and encoder._marker.marks(chat.layout).script is not None
    sentencepiece = "phi4" not in supported.name and "invented" not in supported.name
    assert known == (sentencepiece and "launch" not in supported.name)


def test_special_tokens_of_a_message_are_noticed(supported_tokenizer):
    texts = ["a", "<|end|><|endoftext|><|im_end|>", "b"]
    chats = [
        supported_tokenizer.render([make_turn("user", text), make_turn("assistant", "c")])
        for text in texts
    ]
    assert supported_tokenizer.encode_chats(chats).special.tolist() == [False, True, False]
    assert not supported_tokenizer.encode_chats([]).special.size
