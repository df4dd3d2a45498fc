"""ollama's prompts are those of the checkpoint's own chat template."""

import json
from functools import partial

import pytest

from phi3_plugin.checkpoint.ollama import go_template, modelfile, shape_of
from phi3_plugin.data.sandbox import run_template
from phi3_plugin.data.turns import make_turn
from phi3_plugin.errors import ConfigError
from tests.assets import assets_dir
from tests.data.tiny import MEDIUM, MINI, PHI35
from tests.data.variants import APRIL, CHATML, PHI4, PHI4_FIRST, PHI4_MINI, REASONING, TRIMMING

NAMES = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
MINI_GO = (
    '{{ range .Messages }}{{ if eq .Role "system" }}<|system|>\n{{ .Content }}<|end|>\n'
    '{{ else if eq .Role "user" }}<|user|>\n{{ .Content }}<|end|>\n'
    '{{ else if eq .Role "assistant" }}<|assistant|>\n{{ .Content }}<|end|>\n'
    "{{ end }}{{ end }}<|assistant|>\n"
)
MEDIUM_GO = (
    '{{ range .Messages }}{{ if eq .Role "user" }}<|user|>\n{{ .Content }}<|end|>\n<|assistant|>\n'
    '{{ else if eq .Role "assistant" }}{{ .Content }}<|end|>\n{{ end }}{{ end }}'
)
PHI4_MINI_GO = (
    '{{ range .Messages }}{{ if eq .Role "system" }}<|system|>{{ .Content }}<|end|>'
    '{{ else if eq .Role "user" }}<|user|>{{ .Content }}<|end|>'
    '{{ else if eq .Role "assistant" }}<|assistant|>{{ .Content }}<|end|>'
    "{{ end }}{{ end }}<|assistant|>"
)
EXPECTED = {
    "mini": (MINI, MINI_GO),
    "3.5": (PHI35, MINI_GO.replace('eq .Role "system"', 'and (eq .Role "system") .Content')),
    "medium": (MEDIUM, MEDIUM_GO),
    "april": (APRIL, MEDIUM_GO),  # <s> comes from the tokenizer
    "phi-4-mini": (PHI4_MINI, PHI4_MINI_GO),
}
PUBLISHED = {
    "phi3-mini-4k-instruct": "mini",
    "phi3-mini-128k-instruct": "mini",
    "phi3.5-mini-instruct": "3.5",
    "phi3-medium-4k-instruct": "medium",
    "phi4-mini-instruct": "phi-4-mini",
}


def rendered(template, messages):
    turns = [make_turn(role, said) for role, said in messages]
    return run_template(template, turns, add_generation_prompt=True, special_tokens=NAMES)


@pytest.mark.parametrize("name", EXPECTED)
def test_go_says_what_jinja_says(name):
    template, expected = EXPECTED[name]
    assert go_template(partial(rendered, template), bos="<s>") == expected


@pytest.mark.assets
@pytest.mark.parametrize("folder", PUBLISHED)
def test_published_templates_are_these(folder):
    file = assets_dir() / "models" / folder / "tokenizer_config.json"
    template = json.loads(file.read_text("utf-8"))["chat_template"]
    assert go_template(partial(rendered, template)) == EXPECTED[PUBLISHED[folder]][1]


@pytest.mark.parametrize("template", [PHI4, PHI4_FIRST, REASONING, CHATML])
def test_others_of_the_kind_are_found_too(template):
    messages = [("user", "Hi"), ("assistant", "Yes?"), ("user", "1+1")]
    render = partial(rendered, template)
    assert shape_of(render).render(messages) == render(messages)
    assert "{{ range .Messages }}" in go_template(render)


def test_a_prompt_as_ollama_renders_it():
    """By hand, from the text of the template."""
    messages = [("system", "Be terse."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "1+1")]
    assert shape_of(partial(rendered, MINI)).render(messages) == (
        "<|system|>\nBe terse.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nYes?<|end|>\n"
        "<|user|>\n1+1<|end|>\n<|assistant|>\n"
    )
    assert shape_of(partial(rendered, MEDIUM)).render(messages) == (
        "<|user|>\nHi<|end|>\n<|assistant|>\nYes?<|end|>\n<|user|>\n1+1<|end|>\n<|assistant|>\n"
    )


FIRST = (
    "{% for m in messages %}{% if loop.first %}[first]{% endif %}<|{{ m.role }}|>{{ m.content }}"
    "<|end|>{% endfor %}<|assistant|>"
)
AFTER = (
    "{% for m in messages %}{% if m.role == 'user' and not loop.last %}[early]{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
)
LAST_ONLY = "<|user|>{{ messages[-1].content }}<|end|><|assistant|>"
COUNTED = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% if loop.length > 3 %}+"
    "{% endif %}{% endfor %}<|assistant|>"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TRIMMING, "it does otherwise in a conversation of user"),
        (AFTER, "it does otherwise in a conversation of user"),
        (LAST_ONLY, "it leaves out or repeats what a message says"),
        (COUNTED, "it does otherwise in a conversation of system, user, assistant, user"),
    ],
)
def test_what_go_cannot_say_is_refused(template, message):
    with pytest.raises(ConfigError, match=message):
        go_template(partial(rendered, template))


def test_what_stands_before_all_messages_is_kept():
    go = go_template(partial(rendered, FIRST))
    assert go.startswith("[first]{{ range .Messages }}{{ if eq .Role")


def test_braces_are_gos_own():
    template = "{% for m in messages %}<{{ '{{' }}{{ m.role }}>{{ m.content }}{% endfor %}<end>"
    go = go_template(partial(rendered, template))
    assert '}}<{{ "{{" }}user>{{ .Content }}' in go


def test_the_modelfile():
    assert modelfile("phi3:mini", "./adapter.gguf", MINI_GO, ["<|end|>", "<|endoftext|>"]) == (
        f'FROM phi3:mini\nADAPTER ./adapter.gguf\nTEMPLATE """{MINI_GO}"""\n'
        'PARAMETER stop "<|end|>"\nPARAMETER stop "<|endoftext|>"\n'
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("", "a.gguf", "", []), "from_model: '' cannot stand in a Modelfile"),
        (("phi3", "a\nb", "", []), r"adapter: 'a\\nb' cannot stand"),
        (("phi3", "a.gguf", '"""', []), "which a Modelfile cannot hold"),
        (("phi3", "a.gguf", "", ['"']), "cannot be a stop"),
    ],
)
def test_what_would_break_out_of_its_line_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        modelfile(*values)
