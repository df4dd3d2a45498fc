"""The text of a template is that of transformers, whatever the template is made of."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from phi3_plugin.data.formats import make_turn
from phi3_plugin.data.template import FilterFailed, compile_filter, run_template
from phi3_plugin.errors import ConfigError

TURNS = [make_turn("system", "é <s>", tools="[f]"), make_turn("user", " a\n"), make_turn("x", "")]
NAMES = {"bos_token": "<s>"}


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
    ],
)
@pytest.mark.parametrize("ask", [True, False])
def test_text_is_that_of_transformers(source, ask):
    messages = [{"role": t.role, "content": t.content} for t in TURNS]
    messages[0]["tools"] = "[f]"
    options = {"chat_template": source, "add_generation_prompt": ask, **NAMES}
    expected = render_jinja_template([messages], **options)[0]
    text = run_template(source, TURNS, add_generation_prompt=ask, special_tokens=NAMES)
    assert [text] == ([expected] if isinstance(expected, str) else expected)


@pytest.mark.parametrize(
    ("expression", "row", "passes"),
    [
        ("lang == 'en' and rating >= 4", {"lang": "en", "rating": 4}, True),
        ("lang == 'en' and rating >= 4", {"lang": "de", "rating": 4}, False),
        ("text | length > 2", {"text": "abc"}, True),
        ("lang in ['en', 'de']", {"lang": "fr"}, False),
        ("rating is defined and rating", {}, False),
        ("messages[-1].role == 'assistant'", {"messages": [{"role": "assistant"}]}, True),
        ("row['a b'] is none", {"a b": None}, True),
        ("result > 1", {"result": 2}, True),
        ("row['row'] > 1 and row['a b']", {"row": 2, "a b": 3}, True),
        ("self > 1 and x.self > 2", {"self": 2, "x": {"self": 3}}, True),
        ("self == 1", {"self": 2}, False),
        ("self is defined", {}, False),
        ("lang is eq('en') and rating is ge(4)", {"lang": "en", "rating": 4}, True),
        ("text", {"text": ""}, False),
    ],
)
def test_filters(expression, row, passes):
    assert compile_filter(expression)(row) is passes


@pytest.mark.parametrize("expression", ["", "a b", "a >", "{{ a }}", "a | nothing", "(" * 2000])
def test_no_filter(expression):
    with pytest.raises(ConfigError, match=r"dataset\.filter: .* is no expression: "):
        compile_filter(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "missing",
        "missing > 1",
        "self",
        "text > 1",
        "text.__class__.__mro__",
        "row.clear()",
        "messages.append(1)",
        "range(3)",
        "lipsum()",
        "''.join(1)",
        "1 // 0",
    ],
)
def test_a_filter_that_fails(expression):
    row = {"text": "a", "messages": []}
    with pytest.raises(FilterFailed, match=r"dataset\.filter .* failed: "):
        compile_filter(expression)(row)
    assert row == {"text": "a", "messages": []}
