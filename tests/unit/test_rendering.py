"""Chat templates: what is cheap runs here, all else in a child with limits."""

import os
import resource
import signal
import time

import pytest

from phi3_plugin.data import phi3_tokenizer, rendering
from phi3_plugin.data.rendering import RenderingError, is_cheap, write_text
from phi3_plugin.data.turns import make_turn
from phi3_plugin.errors import TokenizerError
from tests.variants import APRIL, CHATML, MEDIUM, MINI, PHI4, PHI4_MINI, PHI35, edit_json

MESSAGES = [{"role": "user", "content": "Hi é\ud800"}, {"role": "assistant", "content": "Yo"}]
GIVEN = {"messages": MESSAGES, "add_generation_prompt": False, "eos_token": "</s>"}

ENDLESS = [
    "{% for a in 'a'*9999999 %}{% for b in 'b'*9999999 %}{% endfor %}{% endfor %}",
    "{% macro f() %}{% for a in 'a'*999999999 %}{{ a }}{% endfor %}{% endmacro %}{{ f()|length }}",
]
ENDLESS += [
    pytest.param(source, marks=[pytest.mark.slow, pytest.mark.exhaustive])
    for source in (
        "{% macro f(n) %}{{ f(n-1) ~ f(n-1) if n else '' }}{% endmacro %}{{ f(60) }}",
        "{% for a in messages[0].content * 9999 %}{% for b in 'b'*99999 %}{% endfor %}{% endfor %}",
    )
]
LARGE = [
    "{% set x = 'a'*10**10 %}",
    "{{ 'a'*10**10 }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{% set x = 'a'|center(10000000000) %}",
    "{% set x = messages|tojson(indent=10000000000) %}",
    "{% set x = 9**(9**9) %}",
    "{% set x = 'aa' %}" + "{% set x = x + x %}" * 60,
    "{% set n = namespace(x='aa') %}{% for a in 'a'*60 %}{% set n.x = n.x ~ n.x %}{% endfor %}",
]


REFUSED = r"end|memory|too large|limit|width|depth|format|digits"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("source", [*ENDLESS, *LARGE])
def test_a_template_without_end_is_refused_within_seconds(source):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(RenderingError, match=REFUSED):
        write_text(source, GIVEN)
    assert time.process_time() - start < 3  # the child's time is limited by itself
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # in KB
    assert not is_cheap(source)
    assert write_text("{{ messages|tojson }}", GIVEN).startswith('[{"role": "user"')  # a new child


@pytest.mark.parametrize("source", ["{{ " + "(" * 5000, "{{ " + "1+" * 30_000 + "1 }}", "{% if"])
def test_a_template_that_cannot_be_parsed_is_one_error(source):
    with pytest.raises(RenderingError):
        write_text(source, GIVEN)


def test_the_error_names_the_file(folder):
    edit_json(folder / "tokenizer_config.json", chat_template=LARGE[0])
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: the chat template failed"):
        phi3_tokenizer(folder)


def test_published_templates_run_in_this_process(monkeypatch):
    assert all(map(is_cheap, [MINI, PHI35, MEDIUM, APRIL, CHATML, PHI4, PHI4_MINI]))
    monkeypatch.setattr(rendering, "_CHILD", None)
    assert write_text(MINI, GIVEN).endswith("<|end|>\n</s>")


CHEAP = [
    "{% if loop is defined %}{% endif %}{% for m in messages %}{{ m.content | trim }}{% endfor %}",
    "{% set rest = messages[1:] %}{% for m in rest %}{{ loop.index0 % 2 == 0 }}{% endfor %}",
    "{% set system = messages[0].content + 'x' %}{{ system }}",
    "{% set n = namespace(first=true) %}{% for m in messages %}{% set n.first = false %}"
    "{{ m['content'].strip() ~ eos_token }}{% endfor %}",
    "{% if not messages %}{{ raise_exception('none') }}{% endif %}",
]
COSTLY = [
    "{{ messages | tojson }}",
    "{% macro f() %}{% endmacro %}",
    "{% for m in messages %}{% for n in messages %}{% endfor %}{% endfor %}",
    "{% for m in messages recursive %}{% endfor %}",
    "{% for i in range(10000000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% set x = 'a' + 'b' %}{% set y = x + x %}",
    "{% set loop = '%99d' %}{{ loop.index % 1 }}",
    "{{ messages[0].content.replace('a', 'aaaa') }}",
    "{{ messages[0].content.ljust(9) }}",
    "{{ " + " ~ ".join(["messages[0].content"] * 200) + " ~ ('a' * 3) }}",
    "{{ " + "-" * 100 + "1 }}",
]


@pytest.mark.parametrize("source", CHEAP)
def test_a_child_writes_the_same(source, monkeypatch):
    here = write_text(source, GIVEN)
    assert is_cheap(source)
    monkeypatch.setattr(rendering, "is_cheap", lambda _: False)
    assert write_text(source, GIVEN) == here


@pytest.mark.parametrize("source", COSTLY)
def test_what_may_cost_is_not_cheap(source):
    assert not is_cheap(source)


def test_the_time_is_the_same_in_the_child():
    for _ in range(2):
        now = write_text("{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}", GIVEN)
        assert now == rendering.NOW.strftime("%Y-%m-%d %H:%M:%S.%f")


def test_a_long_conversation_in_the_child():
    long = [make_turn("user", "x" * 4_000_000)._asdict()]
    assert len(write_text("{{ messages | tojson }}", {"messages": long})) > 4_000_000


def test_a_process_that_was_forked_off_has_a_child_of_its_own():
    source = "{{ messages | tojson }}"
    text = write_text(source, GIVEN)
    mine = rendering._CHILD._process.pid
    if (pid := os.fork()) == 0:
        same = write_text(source, GIVEN) == text and rendering._CHILD._process.pid != mine
        rendering._CHILD.end()
        os._exit(0 if same else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert write_text(source, GIVEN) == text
    os.kill(mine, signal.SIGKILL)
    with pytest.raises(RenderingError, match="without end"):
        write_text(source, GIVEN)
    assert write_text(source, GIVEN) == text
