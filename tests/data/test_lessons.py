"""What is trained on, and the system message put in front, against transformers."""

import json

import pytest
from transformers import AutoTokenizer

from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.data.tokenizer import TRAIN_ON
from phi3_plugin.errors import ConfigError, DataError

SYSTEM, USER, ASSISTANT = ("system", "s s"), ("user", "a"), ("assistant", "b")
CHATS = {
    "short": [USER, ASSISTANT],
    "system": [SYSTEM, USER, ASSISTANT],
    "empty_system": [("system", ""), USER, ASSISTANT],
    "late_system": [USER, SYSTEM, ASSISTANT],
    "long": [USER, ASSISTANT, ("user", "c"), ("assistant", "d"), ("user", "e")],
    "question": [USER],
}


def as_dicts(turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture
def make(tmp_path):
    def build(tokenizer, *names, **options):
        file = tmp_path / "chats.json"
        file.write_text(json.dumps([{"messages": as_dicts(CHATS[name])} for name in names]))
        return chat_dataset(tokenizer, file, **options)

    return build


def kept(sample):
    return [label for label in sample["labels"] if label != -100]


def said(tokenizer, sample):
    return tokenizer.decode(kept(sample), skip_special_tokens=False)


@pytest.mark.parametrize("prompt", ["", "be brief", " the <|end|>\n"])
def test_system_prompt_is_what_transformers_makes_of_it(supported, make, prompt):
    ours = phi3_tokenizer(supported, dropped="warn")
    theirs = AutoTokenizer.from_pretrained(supported)
    names = [name for name in CHATS if name != "question"]
    dataset = make(ours, *names, system_prompt=prompt)
    for name, sample in zip(names, dataset, strict=True):
        has_one = any(role == "system" for role, _ in CHATS[name])
        turns = CHATS[name] if has_one else [("system", prompt), *CHATS[name]]
        expected = theirs.apply_chat_template(as_dicts(turns), tokenize=True, return_dict=False)
        assert sample["tokens"] == expected
        assert "s" not in said(ours, sample)


def test_no_system_prompt_is_the_default(tokenizer, make):
    assert list(make(tokenizer, "long")) == list(make(tokenizer, "long", system_prompt=None))
    assert make(tokenizer, "long")[0] != make(tokenizer, "long", system_prompt="")[0]


@pytest.mark.parametrize("prompt", [3, ["a"], True, "\ud83d"])
def test_bad_system_prompt(tokenizer, make, prompt):
    with pytest.raises(ConfigError, match=r"dataset\.system_prompt: the system content is"):
        make(tokenizer, "short", system_prompt=prompt)


@pytest.mark.parametrize(
    ("train_on", "long"), [("assistant", "b<|end|> d<|end|>"), ("last", "d<|end|>")]
)
def test_assistant_and_last(tokenizer, make, train_on, long):
    dataset = make(tokenizer, "short", "long", train_on=train_on)
    assert [said(tokenizer, sample) for sample in dataset] == ["b<|end|>", long]
    assert [s["tokens"] for s in dataset] == [s["tokens"] for s in make(tokenizer, "short", "long")]


def test_all_trains_every_token_but_the_first(tokenizer, make):
    dataset = make(tokenizer, *CHATS, train_on="all", system_prompt="s")
    assert len(dataset) == len(CHATS)
    for sample in dataset:
        assert sample["labels"] == [-100, *sample["tokens"][1:]]
        assert sample["labels"][-1] == tokenizer.eos_id


@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_a_conversation_without_an_answer_trains_nothing(tokenizer, make, train_on):
    with pytest.raises(DataError, match=r"\[1\]: there is no assistant turn"):
        make(tokenizer, "short", "question", train_on=train_on)


@pytest.mark.parametrize(
    ("train_on", "limit", "says"),
    [
        ("assistant", 3, "no assistant turn that is trained on starts within 3 tokens"),
        ("last", 7, "the last assistant turn does not start within 7 tokens"),
        ("all", 1, "there is no second token within 1 tokens"),
    ],
)
def test_nothing_left_within_the_limit(folder, make, train_on, limit, says):
    tokenizer = phi3_tokenizer(folder, max_seq_len=limit)
    with pytest.raises(
        DataError, match=f"is left of 1 rows: .* Raise tokenizer.max_seq_len: {says}"
    ):
        make(tokenizer, "long", train_on=train_on)


@pytest.mark.parametrize("value", ["user", "", None, True, ["last"]])
def test_bad_train_on(tokenizer, make, value):
    with pytest.raises(ConfigError, match=r"dataset\.train_on: .* must be one of: assistant, last"):
        make(tokenizer, "short", train_on=value)


def test_the_ways_are_these():
    assert TRAIN_ON == ("assistant", "last", "marked", "all")
