import pytest

from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.data.turns import make_turn
from tests.data.variants import phi4

SPOKEN = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"


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
