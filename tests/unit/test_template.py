"""What a chat template writes, what of it is trained on, and templates that cannot be followed."""

import re
import time
from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.data.template import ChatTemplate, Piece, token_pattern
from phi3_plugin.data.turns import Turn, make_turn
from phi3_plugin.errors import DataError, TokenizerError
from tests.variants import (
    APRIL,
    MINI,
    MINI_TOKENS,
    MINI_TOOLS,
    PHI4_MINI,
    PHI35,
    TRIMMING,
    edit_json,
)

NAMES = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
ADDED = frozenset([*NAMES.values(), *MINI_TOKENS, *MINI_TOOLS])
ANYTHING = MINI.replace("== 'user'", "not in ['system', 'assistant']")
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def fit(source, added=ADDED):
    template = ChatTemplate(source, "folder/tokenizer_config.json", NAMES, added)
    template.check()
    return template


def turns(*messages):
    return [make_turn(*message) for message in messages]


def rendered(source, *messages, **options):
    return fit(source).render(turns(*messages), **options)


def test_a_message_is_a_header_and_an_output():
    assert rendered(MINI, ("user", "Hello"), ("assistant", "Hi")).pieces == [
        Piece("<|user|>\n", False),
        Piece("Hello", False, said=True),
        Piece("<|end|>\n<|assistant|>\n", False),
        Piece("Hi", True, said=True),
        Piece("<|end|>", True),
        Piece("\n<|endoftext|>", False),
    ]


def test_a_prompt_ends_in_an_open_header():
    chat = rendered(MINI, ("user", "Hello"), add_generation_prompt=True)
    assert chat.pieces[-1] == Piece("<|end|>\n<|assistant|>\n", False)


@pytest.mark.parametrize(("source", "skipped"), [(MINI, False), (PHI35, True), (APRIL, True)])
def test_an_empty_system_message_may_be_left_out(source, skipped):
    chat = rendered(source, ("system", ""), ("user", ""), ("assistant", ""))
    assert ("<|system|>" not in chat.text) is skipped
    assert [piece.text for piece in chat.pieces if piece.trained] == ["", "<|end|>"]
    assert chat.dropped == ()


@pytest.mark.parametrize("blank", ["", " ", "\n\t"])
def test_a_blank_answer_that_is_left_out_is_told(blank):
    source = MINI.replace("'assistant' %}", "'assistant' and message['content'] | trim %}")
    chat = rendered(source, ("user", blank), ("assistant", blank), ("user", "b"))
    assert chat.dropped == ("the assistant message",)
    assert not any(piece.trained for piece in chat.pieces)


def test_white_space_that_the_template_trims_is_not_said():
    chat = rendered(TRIMMING, ("user", " a\n"), ("system", " \n"), ("assistant", " b "))
    assert [piece.text for piece in chat.pieces if piece.said] == ["a", "b"]
    assert [piece.text for piece in chat.pieces if piece.trained] == ["b", " <|endoftext|>"]
    assert chat.dropped == ()


def test_texts_may_come_in_another_order():
    source = "{% for m in messages | reverse %}{{ m.content }}<|end|>{% endfor %}"
    chat = rendered(source, ("user", "a"), ("assistant", "b"), ("user", "a"))
    assert [(p.text, p.trained) for p in chat.pieces if p.said][1] == ("b", True)
    assert chat.text == "a<|end|>b<|end|>a<|end|>"


def test_tools_are_a_part_of_their_message():
    system = Turn("system", "s", False, "[f]")
    pieces = fit(PHI4_MINI).render([system, *turns(("assistant", "b"))]).pieces
    assert [piece.text for piece in pieces if piece.said] == ["s", "[f]", "b"]
    assert pieces[2] == Piece("<|tool|>", False)


def test_what_is_left_out_is_told():
    assert rendered(APRIL, ("system", "s"), ("user", "a")).dropped == ("the system message",)
    with_tools = [Turn("system", "s", False, "[f]"), *turns(("tool", "x"))]
    assert fit(MINI).render(with_tools).dropped == (
        "the tools of the system message",
        "the tool message",
    )


def test_a_role_needs_a_special_token():
    assert rendered(PHI4_MINI, ("tool", "x")).text == "<|tool|>x<|end|><|endoftext|>"
    with pytest.raises(DataError, match=r"writes <\|asistant\|>, no added token of to"):
        rendered(PHI4_MINI, ("asistant", "x"))
    with pytest.raises(DataError, match="unknown role 'asistant': the chat template has no spec"):
        rendered(ANYTHING, ("asistant", "x"))
    for role in ("endoftext", "end"):  # What ends a text or a turn is nobody
        with pytest.raises(DataError, match=f"unknown role '{role}'"):
            rendered(PHI4_MINI, (role, "x"))


def test_a_template_needs_its_tokens():
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: .* writes <\|user\|>, no"):
        fit(MINI, ADDED - {"<|user|>"})


def test_an_answer_without_an_end_cannot_be_trained_on():
    template = fit(PLAIN)
    assert template.turn_end is None
    chat = template.render(turns(("user", "a")), add_generation_prompt=True)
    assert chat.text == "user: a\n"
    with pytest.raises(TokenizerError, match=r"writes '\\n' after .* never learn to stop"):
        template.render(turns(("user", "a"), ("assistant", "b")))


def test_the_end_of_a_turn():
    assert (fit(MINI).turn_end, fit(TRIMMING).turn_end) == ("<|end|>", "<|endoftext|>")
    assert fit("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}").turn_end is None


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (MINI.replace("message['content']", "message['content'] | e"), "changes what the messages"),
        (MINI.replace("message['content']", "message['content'] | upper"), "repeats the user mess"),
        (MINI.replace("message['content']", "message['content'] * 2"), "repeats the user message"),
        ("{{ '<|user|>' + messages[-1]['content'] }}", "leaves out the user message"),
        (MINI.replace("== 'assistant'", "== 'model'"), "leaves out the assistant message"),
        ("", "leaves out the user message"),
    ],
)
def test_templates_whose_turns_cannot_be_told_apart(source, reason):
    says = rf"tokenizer_config\.json: turns cannot be told apart: the chat template .*{reason}"
    with pytest.raises(TokenizerError, match=says):
        fit(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no user role') }}",
        "{% if",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}{{ ().__class__.__base__.__subclasses__() }}",
        "{% set _ = messages.append(1) %}",
        "{% for a in messages * 99999 %}{% for b in messages * 99999 %}x{{ b }}{% endfor %}"
        "{% endfor %}",
    ],
)
@pytest.mark.usefixtures("impatient")
def test_a_template_that_fails_is_a_tokenizer_error(source):
    with pytest.raises(TokenizerError, match=r"folder/tokenizer_config\.json: the chat template f"):
        fit(source)


def test_transformers_helpers_are_there():
    fit("{% set unused = strftime_now('%Y') ~ ('<' | tojson) %}" + MINI)
    fit(MINI.replace("{% endfor %}", "{% continue %}{% endfor %}"))
    fit(MINI.replace("{% for", "{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{% for"))


def test_a_conversation_that_the_template_refuses():
    strict = fit(
        MINI.replace(
            "{% for",
            "{% if messages[0].role != 'user' %}{{ raise_exception("
            "'the user speaks first') }}{% endif %}{% for",
        )
    )
    with pytest.raises(DataError, match="chat template failed: the user speaks first"):
        strict.render(turns(("assistant", "a")))


def test_a_template_that_changes_after_the_probes_is_caught():
    sly = fit(
        MINI.replace("'<|user|>", "('!' if 'secret' in message['content'] else '') + '<|user|>")
    )
    sly.render(turns(("user", "open")))
    with pytest.raises(DataError, match=r"turns cannot be told apart: .* changes what the mess"):
        sly.render(turns(("user", "secret")))


def test_no_message():
    with pytest.raises(DataError, match="the conversation is empty"):
        fit(MINI).render([])


# Templates that look into the texts: the layout of a shape is not the text of all of its kind

FOR = "{% for m in messages %}"
TELLING = {
    "search": FOR + "{% if 'x' in m.content %}x{% endif %}{{ m.content }}<|end|>{% endfor %}",
    "equal": FOR + "{% if m.content == 'x' %}y{% endif %}{{ m.content }}<|end|>{% endfor %}",
    "set": FOR + "{% set x = m.content %}{% if x == 'x' %}z{% endif %}{{ x }}<|end|>{% endfor %}",
    "compared": FOR + "{% if m.content < 'y' %}x{% endif %}{{ m.content }}<|end|>{% endfor %}",
    "inline if": FOR + "{{ m.content if m.content != 'x' else 'y' }}<|end|>{% endfor %}",
    "changed": FOR + "{{ m.content }}{{ loop.changed(m.content) }}<|end|>{% endfor %}",
    "length": FOR + "{{ m.content }}{{ m.content | length }}<|end|>{% endfor %}",
}


@pytest.mark.parametrize("name", TELLING)
def test_a_template_that_looks_into_texts_writes_what_it_writes_or_is_refused(name):
    """Every text is compared with what the template renders of it."""
    try:
        template = fit(TELLING[name])
    except TokenizerError as error:
        assert "turns cannot be told apart" in str(error)
        return
    for words in (("a", "b"), ("x", "b"), ("x", "x"), ("zz", "x y")):
        chat = turns(("user", words[0]), ("assistant", words[1]))
        try:
            found = template.render(chat)
        except (DataError, TokenizerError) as error:
            assert re.search("turns cannot be told apart|never learn to stop", str(error))
            continue
        assert found.text == template.write(chat, add_generation_prompt=False)
        assert [piece.text for piece in found.pieces if piece.said] == list(words)


# The text is that of transformers, whatever the template is made of


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n  {% if m.content %}\n {{ m.role }}\n  {% endif %}\n{% endfor %}",
        "{% for m in messages %}{{ m | tojson }}{{ m.tools is defined }}{% endfor %}\n",
        "{% for m in messages %}{{ m | tojson(ensure_ascii=true, indent=1) }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ bos_token }}{{ eos }}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "{{ strftime_now('%Y') }}{{ messages[0]['content'] | upper | trim }}",
        "{% for i in range(messages | length) %}{{ messages[i].role }}{% endfor %}",
        "{% set next = joiner(', ') %}{% for m in messages %}{{ next() + m.role }}{% endfor %}",
        "{% set n = dict(user='U', x='X') %}{% for m in messages %}{{ n[m.role] }}{% endfor %}",
        "{% set c = cycler('a', 'b') %}{% for m in messages %}{{ c.next() }}{% endfor %}",
    ],
)
@pytest.mark.parametrize("ask", [True, False])
def test_text_is_that_of_transformers(source, ask):
    chat = turns(("system", "é <s>", None, "[f]"), ("user", " a\n"), ("x", ""))
    messages = [{"role": turn.role, "content": turn.content} for turn in chat]
    messages[0]["tools"] = "[f]"
    options = {"add_generation_prompt": ask, "bos_token": "<s>"}
    expected = render_jinja_template([messages], chat_template=source, **options)[0]
    template = ChatTemplate(source, "folder/tokenizer_config.json", {"bos_token": "<s>"}, ADDED)
    found = template.write(chat, add_generation_prompt=ask)
    assert [found] == ([expected] if isinstance(expected, str) else expected)


def test_the_leftmost_and_longest_token_is_found():
    assert token_pattern(["<|a|>", "<|a|><|b|>", "|><"]).findall("<|a|><|b|><|a|>x") == [
        "<|a|><|b|>",
        "<|a|>",
    ]
    assert token_pattern(["a", "ab", "b+"]).findall("xabb+") == ["ab", "b+"]
    assert token_pattern([]).findall("a") == []


# Templates whose syntax proves that they only write texts


@pytest.mark.parametrize("source", [MINI, APRIL, PHI35, PHI4_MINI, FOR + "{{ m.content | trim }}"])
def test_templates_that_only_write(source):
    ends = "{% endfor %}" if source.startswith(FOR) else ""
    assert ChatTemplate(source + ends, "file", NAMES, ADDED).only_writes


@pytest.mark.parametrize(
    "looks",
    [
        *("{{ m }}", "{{ m.content | length }}", "{{ m.content[0] }}", "{{ m.content * 2 }}"),
        *("{{ m.get('content') }}", "{{ m[m.role] }}", "{% set x = m.content %}{{ x }}"),
        *("{% if m.content in 'abc' %}y{% endif %}", "{{ (m.content ~ 'a') | upper }}"),
        *("{{ 'a' if m.content > 'b' }}", "{{ loop.previtem.content | length }}", "{{ messages }}"),
        *("{{ loop.changed(m.content) }}", "{% with x = m %}{{ x.content }}{% endwith %}"),
        *("{% filter upper %}{{ m.content }}{% endfilter %}", "{{ m.content | trim('x') }}"),
        *("{% set x %}{{ m.content }}{% endset %}{{ x | length }}", "{{ m.values() | list }}"),
        "{% macro f(x) %}{{ x | length }}{% endmacro %}{{ f(m.content) }}",
        "{% for n in messages if n.content < 'b' %}{{ n.role }}{% endfor %}",
        "{% for n in messages[m.content | length :] %}{{ n.role }}{% endfor %}",
    ],
)
def test_templates_that_may_look_into_texts(looks):
    source = FOR + looks + "{% endfor %}"
    assert not ChatTemplate(source, "file", NAMES, ADDED).only_writes


@pytest.mark.parametrize("name", TELLING)
def test_none_of_those_that_look_is_taken_for_one_that_writes(name):
    assert not ChatTemplate(TELLING[name], "file", NAMES, ADDED).only_writes


INDEXED = (
    "{% for i in range(messages | length) %}{% set m = messages[i] %}" + MINI.split("%}", 1)[1]
)


@pytest.mark.parametrize(
    "source",
    [
        INDEXED.replace("message[", "m["),
        "{% set n = dict(user='user', assistant='assistant') %}"
        + MINI.replace("== 'user'", "== n.user"),
        "{% set sep = joiner('\n') %}" + FOR + "{{ sep() + '<|' + m.role + '|>' + m.content }}"
        "<|end|>{% endfor %}",
    ],
)
def test_templates_may_use_what_jinja_has(source):
    chat = rendered(source, ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert [piece.text for piece in chat.pieces if piece.said] == ["a", "b", "c", "d"]
    assert "".join(piece.text for piece in chat.pieces if piece.trained) == "b<|end|>d<|end|>"


def test_the_identity_has_the_date_as_the_template_writes_it(monkeypatch):
    def identity(now, source):
        monkeypatch.setattr("phi3_plugin.data.template.NOW", datetime(2024, 5, *now))
        return ChatTemplate(source, "file", NAMES, ADDED).identity

    dated = "{{ strftime_now('%d %b %Y') }}" + MINI
    assert identity((1, 8), dated) == identity((1, 9), dated) != identity((2, 8), dated)
    computed = "{% set f = '%d' %}{{ strftime_now(f) }}" + MINI
    assert identity((1, 8), computed) != identity((1, 9), computed)
    assert identity((1, 8), MINI) == identity((2, 9), MINI)


# Templates that say by {% generation %} what the assistant generates

BLOCK = "{% generation %}{{ m.content + '<|end|>\n' }}{% endgeneration %}"
GENERATION = FOR + "{% if m.role == 'assistant' %}" + BLOCK + "{% else %}{{ m.content }}{% endif %}"


def test_all_of_a_generation_block_is_trained_with_its_message():
    source = GENERATION + "{% endfor %}<|endoftext|>"
    chat = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d", False))
    assert fit(source).render(chat).pieces == [
        Piece("a", False, said=True),
        Piece("b", True, said=True),
        Piece("<|end|>\n", True),
        Piece("c", False, said=True),
        Piece("d", False, said=True),
        Piece("<|end|>\n<|endoftext|>", False),
    ]
    assert fit(source).turn_end == "<|end|>"


def test_what_stands_outside_of_a_generation_block_is_not_trained():
    source = GENERATION.replace(" + '<|end|>\n' }}", " }}").replace("{% else", "<|end|>{% else")
    pieces = fit(source + "{% endfor %}").render(turns(("user", "a"), ("assistant", "b"))).pieces
    assert [piece.text for piece in pieces if piece.trained] == ["b"]


SKIPPING = MINI.replace(
    "{% for message in messages %}", "{% for message in messages if message['content'] %}"
)


@pytest.mark.parametrize(("chat_template", "ends"), [(MINI, None), (SKIPPING, "too many of them")])
def test_many_blank_messages_take_little_time(folder, chat_template, ends):
    edit_json(folder / "tokenizer_config.json", chat_template=chat_template)
    tokenizer = phi3_tokenizer(folder, dropped="warn")
    turns = [make_turn(role, "") for _ in range(1000) for role in ("user", "assistant")]
    turns.append(make_turn("user", "a"))
    start = time.process_time()
    if ends:
        with pytest.raises(DataError, match=ends):
            tokenizer.render(turns)
    else:
        assert len(tokenizer.render(turns).turns) == 2001
    assert time.process_time() - start < 20
    few = tokenizer.render([*turns[:20], turns[-1]])
    assert few.text.count("<|user|>") == (1 if ends else 11)
