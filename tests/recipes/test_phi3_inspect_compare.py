"""The inspection beside transformers, whoever begins a conversation and whoever is trained on."""

import json
import shutil

import pytest
from phi3_plugin.recipes import phi3_inspect_data as recipe

from phi3_plugin import settings as strict
from phi3_plugin.inspect import Compared
from tests.data.tiny import MEDIUM, MINI, PHI35, edit_json
from tests.own import TINY, merged, tiny_inputs

TRIMS = MINI.replace("message['content']", "message['content'] | trim")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint without weights."""
    base = tiny_inputs(tmp_path_factory.mktemp("inputs"), rows=1) / "base"
    for file in base.glob("*.safetensors*"):
        file.unlink()
    return base


@pytest.fixture
def compared(base, tmp_path):
    """Compare conversations of roles, contents and what is asked to be trained on."""

    def run(*chats, template=MINI, **options):
        shutil.copytree(base, tmp_path / "base", dirs_exist_ok=True)
        edit_json(tmp_path / "base" / "tokenizer_config.json", chat_template=template)
        rows = [{"messages": [message(*said) for said in chat]} for chat in chats]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        given = [f"dataset.{key}={value}" for key, value in options.items()]
        given.append("tokenizer.dropped=warn")
        s = strict.read(merged(*TINY, "output_dir=out", *given, cwd=tmp_path))
        return recipe.Inspection(s, recipe.Options(compare=True)).statistics().compared

    return run


def message(role, content, train=None):
    asked = {} if train is None else {"train": train}
    return {"role": role, "content": content, **asked}


SYSTEM, USER, ANSWER = ("system", "one two"), ("user", "Add: one"), ("assistant", "one two")
STARTS = [[ANSWER], [ANSWER, USER, ANSWER], [SYSTEM, ANSWER, USER, ANSWER]]


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("template", [MINI, PHI35, MEDIUM, TRIMS])
def test_conversations_that_the_assistant_begins(compared, template, train_on):
    found = compared(*STARTS, template=template, train_on=train_on)
    assert found == Compared(3, 0, [])


@pytest.mark.parametrize("template", [MINI, PHI35, MEDIUM, TRIMS])
def test_messages_that_ask_for_it(compared, template):
    asks = (*USER, True)
    chats = [[asks, ANSWER], [SYSTEM, asks, ANSWER], [USER, ANSWER, asks, (*ANSWER, True)]]
    assert compared(*chats, template=template, train_on="marked") == Compared(3, 0, [])


def test_system_messages_that_ask_for_it(compared):
    chats = [[(*SYSTEM, True), USER, ANSWER], [("system", " ", True), USER, (*ANSWER, True)]]
    assert compared(*chats, train_on="marked") == Compared(2, 0, [])
    left_out = [("system", "", True), USER, (*ANSWER, True)]
    assert compared(left_out, template=PHI35, train_on="marked") == Compared(1, 0, [])


@pytest.mark.parametrize("content", ["", " ", " one  two ", "one one one"])
@pytest.mark.parametrize("template", [MINI, TRIMS])
def test_white_space_and_repeated_texts(compared, template, content):
    chat = [("user", content), ("assistant", content), ("user", content), ANSWER]
    found = compared(chat, template=template, train_on="assistant")
    assert found == Compared(1, 0, [])
