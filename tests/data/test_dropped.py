"""What a chat template leaves out is an error of its row or, where asked for, counted."""

import json
import logging

import pytest
from torchtune.data import Message

from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.errors import ConfigError, DataError
from tests.data.tiny import MEDIUM, write_checkpoint
from tests.data.variants import phi4_mini

SYSTEM = {"role": "system", "content": "be brief"}
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def medium(tmp_path):
    return write_checkpoint(tmp_path / "medium", chat_template=MEDIUM)


def write(folder, *chats):
    file = folder / "chats.json"
    file.write_text(json.dumps([{"messages": chat} for chat in chats]))
    return file


def test_rows_are_named(medium, tmp_path):
    file = write(tmp_path, TALK, [SYSTEM, *TALK], [{"role": "asistant", "content": "x"}, *TALK])
    with pytest.raises(DataError) as error:
        chat_dataset(phi3_tokenizer(medium), file)
    lines = str(error.value).split("\n")
    assert lines[0].startswith("dataset.source: 2 of 3 rows cannot be used.")
    says = "the chat template leaves out the {} message; to go on without, set tokenizer.dropped"
    assert lines[1].startswith(f"  {file}[1]: {says.format('system')} to warn")
    assert lines[2].startswith(f"  {file}[2]: {says.format('asistant')}")


def test_many_rows_are_cut(medium, tmp_path):
    file = write(tmp_path, *[[SYSTEM, *TALK]] * 1500)
    with pytest.raises(DataError, match="1500 of 1500 rows cannot be used") as error:
        chat_dataset(phi3_tokenizer(medium), file)
    assert str(error.value).endswith("and 1490 more")


def test_warn_counts(medium, tmp_path, caplog):
    file = write(tmp_path, TALK, [SYSTEM, *TALK], [SYSTEM, SYSTEM, *TALK])
    with caplog.at_level(logging.WARNING):
        dataset = chat_dataset(phi3_tokenizer(medium, dropped="warn"), file)
    assert caplog.messages == [
        "2 of 3 rows have a message that the chat template leaves out. The first: "
        f"{file}[1]: the system message"
    ]
    assert dataset[0] == dataset[1] == dataset[2]


def test_an_empty_system_message_is_not_missed(medium, tmp_path, caplog):
    file = write(tmp_path, TALK, [SYSTEM | {"content": ""}, *TALK])
    with caplog.at_level(logging.WARNING):
        dataset = chat_dataset(phi3_tokenizer(medium), file)
    assert dataset[0] == dataset[1]
    assert not caplog.messages


def test_prompts(medium, caplog):
    talk = [Message("system", "be brief"), Message("user", "a")]
    with pytest.raises(DataError, match="leaves out the system message"):
        phi3_tokenizer(medium)({"messages": list(talk)}, inference=True)
    with caplog.at_level(logging.WARNING):
        phi3_tokenizer(medium, dropped="warn")({"messages": list(talk)}, inference=True)
    assert caplog.messages == ["the chat template leaves out the system message (1 times)"]


def test_tools(folder, tmp_path):
    tools = [{"name": "f", "parameters": {}}]
    file = write(tmp_path, [SYSTEM | {"tools": tools}, *TALK])
    with pytest.raises(DataError, match=r"\[0\]: .* leaves out the tools of the system message"):
        chat_dataset(phi3_tokenizer(folder), file)
    tokenizer = phi3_tokenizer(phi4_mini(tmp_path / "phi4-mini"))
    text = tokenizer.decode(chat_dataset(tokenizer, file)[0]["tokens"], skip_special_tokens=False)
    assert text.startswith(f"<|system|>be brief<|tool|>{json.dumps(tools)}<|/tool|><|end|><|user|>")


def test_an_answer_that_is_first_has_nothing_before_it(medium, tmp_path):
    (sample,) = chat_dataset(phi3_tokenizer(medium), write(tmp_path, TALK[1:]))
    assert sample["labels"] == [-100, *sample["tokens"][1:]]


@pytest.mark.parametrize("value", ["ignore", None, False, ["warn"]])
def test_bad_value(folder, value):
    with pytest.raises(ConfigError, match=r"tokenizer\.dropped: .* must be one of: error, warn\."):
        phi3_tokenizer(folder, dropped=value)
