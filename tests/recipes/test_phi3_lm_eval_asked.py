"""What the harness asks for, in our words."""

import pytest
from phi3_plugin.recipes.phi3_lm_eval_asked import chat_text, plain_encoder, sampling_of

from phi3_plugin.data.vocabulary import read_vocabulary
from phi3_plugin.errors import ConfigError
from tests.recipes.harnessed import harness_inputs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return harness_inputs(tmp_path_factory.mktemp("harness"))


def test_a_template_without_system_messages_leaves_them_out(place):
    template = read_vocabulary(place / "base").template
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"

    class Refusing:
        source, special_tokens = refusing + template.source, template.special_tokens

    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "Hi"}]
    assert chat_text(Refusing, chat, ask=True) == chat_text(template, chat[1:], ask=True)


def test_plain_texts_begin_as_the_checkpoint_says(place):
    for name, ids in (("base", []), ("launch", [1])):
        assert plain_encoder(place / name).encode("").ids == ids


def test_what_tasks_ask_of_answers():
    found = sampling_of({"until": "x", "top_p": 0.9, "temperature": 0.5, "num_beams": 1}, 256)
    assert (found.stop, found.top_p, found.temperature) == (("x",), 0.9, 0.5)
    assert found.max_new_tokens == 256
    keys = {"until": ["", "a"], "do_sample": False, "temperature": 0.7, "max_tokens": 5}
    found = sampling_of(keys, 256)
    assert (found.stop, found.temperature, found.max_new_tokens) == (("a",), 0.0, 5)
    with pytest.raises(ConfigError, match=r"num_beams: unknown, with the value 4") as told:
        sampling_of({"num_beams": 4, "length_penalty": 2.0}, 256)
    assert "length_penalty" in str(told.value)
