"""Which templates need not be run for each conversation."""

import pytest
from hypothesis import HealthCheck, given, settings

from phi3_plugin.data.formats import make_turn
from phi3_plugin.data.template import ChatTemplate, is_plain
from tests.contract.test_ids import TURNS
from tests.data import variants
from tests.data.tiny import MEDIUM, MINI, PHI35, ROLES

PLAIN = {
    **{"mini": MINI, "3.5": PHI35, "medium": MEDIUM, "phi4-mini": variants.PHI4_MINI},
    **{"phi4": variants.PHI4, "reasoning": variants.REASONING, "april": variants.APRIL},
}
FOR = "{% for m in messages %}"
NOT_PLAIN = {
    "filter": FOR + "{{ m.content | upper }}{% endfor %}",
    "trim": FOR + "{{ m.content | trim }}{% endfor %}",
    "method": FOR + "{{ m.content.strip() }}{% endfor %}",
    "search": FOR + "{% if 'x' in m.content %}x{% endif %}{{ m.content }}{% endfor %}",
    "equal": FOR + "{% if m.content == 'x' %}x{% endif %}{{ m.content }}{% endfor %}",
    "length": FOR + "{{ m.content | length }}{{ m.content }}{% endfor %}",
    "slice": FOR + "{{ m.content[1:] }}{% endfor %}",
    "whole message": FOR + "{{ m }}{% endfor %}",
    "tojson": "{{ messages | tojson }}",
    "times": FOR + "{{ m.content * 2 }}{% endfor %}",
    "format": FOR + "{{ '%s' % m.content }}{% endfor %}",
    "or": FOR + "{{ m.content or 'none' }}{% endfor %}",
    "other field": FOR + "{{ m.name }}{{ m.content }}{% endfor %}",
    "set to text": FOR + "{% set x = m.content %}{% if x == 'y' %}z{% endif %}{% endfor %}",
    "set in a branch": "{% set x = 'a' %}{% if messages %}{% set x = messages[0].content %}"
    "{% endif %}{% if x == 'b' %}c{% endif %}",
    "neighbour": FOR + "{% if loop.previtem.content == 'x' %}y{% endif %}{% endfor %}",
    "changed": FOR + "{{ loop.changed(m.content) }}{% endfor %}",
    "macro": "{% macro f(m) %}{{ m.content }}{% endmacro %}{{ f(messages[0]) }}",
    "each letter": FOR + "{% for c in m.content %}{{ c }}.{% endfor %}{% endfor %}",
    "namespace": "{% set ns = namespace(x='') %}" + FOR + "{% set ns.x = m.content %}{% endfor %}",
    "compared": FOR + "{% if m.content > 'k' %}x{% endif %}{{ m.content }}{% endfor %}",
    "inline if": FOR + "{{ m.content if m.content != 'x' else 'y' }}{% endfor %}",
    "test of text": FOR + "{% if m.content is in ['x'] %}x{% endif %}{{ m.content }}{% endfor %}",
    "clock": "{{ strftime_now('%H') }}" + FOR + "{{ m.content }}{% endfor %}",
    "slice by text": "{% for m in messages[:(messages[0].content|length)] %}{{ m.content }}"
    "{% endfor %}",
    "slice by a named text": "{% for m in messages[:messages[0].content] %}{{ m.content }}"
    "{% endfor %}",
    "index by text": "{{ messages[-(messages[0].content|length)].content }}",
    "broken": "{% for %}",
}


@pytest.mark.parametrize("name", PLAIN)
def test_published_templates_are_plain(name):
    assert is_plain(PLAIN[name])


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_whatever_looks_into_a_text_is_not(name):
    assert not is_plain(NOT_PLAIN[name])


@pytest.mark.parametrize("name", PLAIN)
@given(turns=TURNS)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_layout_is_what_the_template_renders(name, turns):
    tokens = (*ROLES, "<|endoftext|>", "<s>", *variants.PHI4_TOKENS, *variants.MINI_TOOLS)
    names = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
    template = ChatTemplate(PLAIN[name], "file", names, frozenset(tokens))
    chat = [make_turn(*turn) for turn in turns]
    for ask in (False, True):
        rendered = template.render(chat, add_generation_prompt=ask)
        assert rendered.text == template._run(chat, ask)
