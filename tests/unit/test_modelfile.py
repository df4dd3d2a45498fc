"""What ollama is told: its template writes what the checkpoint's writes, its stops are ours."""

import re
from pathlib import Path

import pytest

from phi3_plugin.checkpoint.modelfile import go_template, modelfile
from phi3_plugin.config import Phi3Config, Rope
from phi3_plugin.data.turns import Turn
from phi3_plugin.data.vocabulary import read_vocabulary
from tests.variants import BUILT, ENDS, MINI, write_checkpoint

TALK = [
    ("system", "Be brief."),
    ("user", "One?"),
    ("assistant", "Two."),
    ("user", "Three?"),
]


def go(template, messages):
    """Write messages as Go's text/template does, of which these few actions are needed."""
    lead, body, tail = re.fullmatch(
        r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL
    ).groups()
    cases = re.findall(
        r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', body, re.DOTALL
    )
    around = dict(cases)
    written = [
        around[role].replace("{{ .Content }}", text) for role, text in messages if role in around
    ]
    return "".join([lead, *written, tail])


@pytest.mark.parametrize("name", [n for n in BUILT if n != "invented-trimming"])
@pytest.mark.parametrize("start", [0, 1])
def test_the_template_for_ollama_writes_the_same(tmp_path, name, start):
    BUILT[name](tmp_path)
    template = read_vocabulary(tmp_path).template
    turns = [Turn(role, text, False) for role, text in TALK[start:]]
    expected = template.write(turns, add_generation_prompt=True)
    assert go(go_template(template), TALK[start:]) == expected


def test_a_template_that_looks_at_its_neighbours_has_none(tmp_path):
    """Here a second question is asked in other words."""
    source = MINI.replace("<|user|>\n'", "<|user|>\n' + ('Again: ' if loop.index > 2 else '')")
    write_checkpoint(tmp_path, chat_template=source)
    assert go_template(read_vocabulary(tmp_path).template) is None


@pytest.mark.parametrize("name", ["mini", "medium", "phi4"])
def test_what_the_file_says(tmp_path, name):
    BUILT[name](tmp_path)
    rope = Rope(10000.0, 96)
    config = Phi3Config(192, 256, 2, 2, 2, 448, 131072, 1e-5, rope, None)
    text = modelfile(Path("some where/my model.gguf"), config, read_vocabulary(tmp_path))
    lines = text.splitlines()
    assert lines[:2] == ["FROM ./my model.gguf", "PARAMETER num_ctx 4096"]
    assert f'PARAMETER stop "{ENDS.get(name, "<|end|>")}"' in lines
    assert 'TEMPLATE """' in text and text.endswith('"""\n')
