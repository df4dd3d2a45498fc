import pytest

from phi3_plugin.data.template import ChatTemplate, Piece, make_turn
from phi3_plugin.errors import DataError, TokenizerError
from tests.data.tiny import MEDIUM, MINI, PHI35

NAMES = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}


def fit(source):
    return ChatTemplate.fit(source, "folder/tokenizer_config.json", NAMES)


def turns(*messages):
    return [make_turn(*message) for message in messages]


def test_a_message_is_a_header_and_an_output():
    pieces = fit(MINI).pieces(turns(("user", "Hello"), ("assistant", "Hi")))
    assert pieces == [
        Piece("<|user|>\n", False),
        Piece("Hello", False, said=True),
        Piece("<|end|>", False),
        Piece("\n", False),
        Piece("<|assistant|>\n", False),
        Piece("Hi", True, said=True),
        Piece("<|end|>", True),
        Piece("\n", False),
        Piece("<|endoftext|>", False),
    ]


def test_a_prompt_ends_in_an_open_header():
    pieces = fit(MINI).pieces(turns(("user", "Hello")), add_generation_prompt=True)
    assert pieces[-1] == Piece("<|assistant|>\n", False)


@pytest.mark.parametrize(("source", "skipped"), [(MINI, False), (PHI35, True)])
def test_an_empty_system_message_is_skipped_by_one_revision(source, skipped):
    text = "".join(p.text for p in fit(source).pieces(turns(("system", ""), ("user", "a"))))
    assert text.startswith("<|user|>") is skipped


@pytest.mark.parametrize(
    "source",
    [
        MEDIUM,
        "{{ bos_token }}" + MINI,
        MINI.replace("message['content']", "message['content'] | trim"),
        MINI.replace("message['content']", "message['content'] | e"),
        MINI.replace("'<|end|>\n'", "'<|end|>'"),
        MINI.replace("{{ eos_token }}", ""),
        "",
    ],
)
def test_other_templates_are_refused(source):
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: this .* not supported\. Su"):
        fit(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system role') }}",
        "{% if",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}{{ ().__class__.__base__.__subclasses__() }}",
        "{% set _ = messages.append(1) %}",
    ],
)
def test_a_template_that_fails_is_a_tokenizer_error(source):
    with pytest.raises(TokenizerError, match=r"folder/tokenizer_config\.json: the chat template f"):
        fit(source)


def test_a_template_that_never_ends_is_refused():
    endless = "{% for a in messages * 99999 %}{% for b in messages * 99999 %}x{{ b }}{% endfor %}"
    with pytest.raises(TokenizerError, match="not supported"):
        fit(endless + "{% endfor %}")


def test_transformers_helpers_are_there():
    fit("{% set unused = strftime_now('%Y') ~ ('<' | tojson) %}" + MINI)
    fit(MINI.replace("{% endfor %}", "{% continue %}{% endfor %}"))


def test_a_template_that_changes_after_the_probes_is_caught():
    sly = fit(
        MINI.replace("'<|user|>", "('!' if 'secret' in message['content'] else '') + '<|user|>")
    )
    sly.pieces(turns(("user", "open")))
    with pytest.raises(TokenizerError, match="unlike its own layout"):
        sly.pieces(turns(("user", "secret")))


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (("tool", "x"), "unknown role 'tool', expected one of: system, user, assistant"),
        ((None, "x"), "unknown role None"),
        (("user", None), "the user content is null, expected a string"),
        (("assistant", 3), "the assistant content is int"),
        (("user", "\ud83d"), "not valid Unicode"),
    ],
)
def test_bad_messages(message, says):
    with pytest.raises(DataError, match=says):
        make_turn(*message)


def test_no_message():
    with pytest.raises(DataError, match="the conversation is empty"):
        fit(MINI).pieces([])
