"""Messages that ask to be trained on, texts that are rendered already, and the end of text."""

import json
import logging

import pytest

from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.data.formats import BLANK_ANSWER, NO_FINAL_ANSWER, PASSED_OVER
from phi3_plugin.errors import ConfigError, DataError
from tests.data.tiny import MEDIUM, write_checkpoint
from tests.data.variants import BUILT


def message(role, content, **fields):
    return {"role": role, "content": content, **fields}


def write(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def read(tmp_path, tokenizer):
    def build(*chats, **options):
        file = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
        return chat_dataset(tokenizer, file, **options)

    return build


def said(tokenizer, sample):
    kept = [label for label in sample["labels"] if label != -100]
    return tokenizer.decode(kept, skip_special_tokens=False)


MIXED = [
    message("user", "a", train=True),
    message("assistant", "b", weight=0),
    message("user", "c"),
    message("assistant", "d"),
    message("user", "e"),
    message("assistant", "f", weight=1),
]


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", "d<|end|> f<|end|>"),
        ("last", "f<|end|>"),
        ("marked", "a<|end|> f<|end|>"),
    ],
)
def test_what_messages_ask_for(read, tokenizer, train_on, expected):
    dataset = read(MIXED, train_on=train_on)
    assert said(tokenizer, dataset[0]) == expected
    plain = [message(m["role"], m["content"]) for m in MIXED]
    assert dataset[0]["tokens"] == read(plain)[0]["tokens"]


def test_what_is_passed_over_is_said(read, caplog):
    with caplog.at_level(logging.WARNING):
        for train_on, count in (("assistant", 1), ("last", 1), ("all", 1), ("marked", 0)):
            assert read(MIXED, train_on=train_on).findings.counts[PASSED_OVER] == count
    assert len(caplog.messages) == 3 and "weight or train fields" in caplog.text
    caplog.clear()
    assert not read(MIXED[1:4]).findings.counts[PASSED_OVER]
    assert not caplog.messages


@pytest.mark.parametrize(
    ("train_on", "chat", "says"),
    [
        ("marked", [message("user", "a"), message("assistant", "b")], "no message has a weight"),
        ("assistant", MIXED[:2], "every assistant turn has a weight of 0"),
        ("assistant", MIXED[:1], "there is no assistant turn"),
    ],
)
def test_nothing_asked_for(read, train_on, chat, says):
    with pytest.raises(DataError, match=says):
        read(chat, train_on=train_on)


def test_a_question_at_the_end_is_noticed(read):
    dataset = read(MIXED, MIXED[:5])
    assert dataset.findings.places[NO_FINAL_ANSWER] == [
        (dataset.places(1), "the last turn is user's")
    ]


@pytest.mark.parametrize("field", [{"weight": 0}, {"train": False}])
def test_an_answer_that_asks_not_to_be_trained_on(read, tokenizer, field):
    chat = [
        *(message("user", "a"), message("assistant", "bad", **field)),
        *(message("user", "c"), message("assistant", "good")),
    ]
    assert said(tokenizer, read(chat)[0]) == "good<|end|>"
    assert said(tokenizer, read([*chat[2:], *chat[:2]], train_on="last")[0]) == "bad<|end|>"


@pytest.mark.parametrize("content", ["", " \n"])
def test_a_blank_answer_is_noticed(read, content):
    dataset = read([message("user", "a"), message("assistant", content)])
    assert dataset.findings.counts[BLANK_ANSWER] == 1


TALK = [message("system", "s"), *(message(m["role"], m["content"]) for m in MIXED)]


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("name", BUILT)
def test_a_text_that_the_template_wrote_gives_the_same_as_its_messages(tmp_path, name, train_on):
    folder = BUILT[name](tmp_path / name)
    tokenizer = phi3_tokenizer(folder, dropped="warn")
    chats = [TALK[1:], TALK[1:3], TALK]
    texts = write(tmp_path / "texts.jsonl", [{"text": text(tokenizer, chat)} for chat in chats])
    messages = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    ours, theirs = (chat_dataset(tokenizer, f, train_on=train_on) for f in (texts, messages))
    assert list(ours) == list(theirs)


def text(tokenizer, chat):
    from phi3_plugin.data.formats import make_turn

    return tokenizer.render([make_turn(m["role"], m["content"]) for m in chat]).text


def test_texts_of_another_kind(tokenizer, tmp_path):
    file = write(tmp_path / "texts.jsonl", [{"text": "the other"}])
    with pytest.raises(DataError, match=r"no assistant message, which would start with '<\|assis"):
        chat_dataset(tokenizer, file)
    with pytest.raises(DataError, match="a text has no messages"):
        chat_dataset(tokenizer, file, train_on="marked")
    (sample,) = chat_dataset(tokenizer, file, train_on="all", add_eos=True)
    assert sample["tokens"] == tokenizer.encode("the other", add_eos=True)
    assert sample["labels"] == [-100, *sample["tokens"][1:]]


def test_a_text_whose_answer_goes_on_into_the_next_turn(tokenizer, tmp_path):
    text = "<|user|>\na<|end|>\n<|assistant|>\nb\n<|user|>\nc<|end|>\n<|assistant|>\nd<|end|>"
    with pytest.raises(DataError, match=r"goes on into '<\|user\|>', expected '<\|end\|>'"):
        chat_dataset(tokenizer, write(tmp_path / "t.jsonl", [{"text": text}]))


def test_no_system_prompt_for_texts(tokenizer, tmp_path):
    file = write(tmp_path / "t.jsonl", [{"text": "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>"}])
    with pytest.raises(DataError, match="system_prompt cannot be put in front of a text"):
        chat_dataset(tokenizer, file, system_prompt="s")


def test_a_text_that_ends_within_an_answer(tokenizer, tmp_path):
    unended = "<|user|>\na<|end|>\n<|assistant|>\nb the"
    (sample,) = chat_dataset(tokenizer, write(tmp_path / "t.jsonl", [{"text": unended}]))
    assert said(tokenizer, sample) == "b the"


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_the_end_of_text_comes_where_the_template_has_none(tmp_path, folder, train_on):
    file = write(tmp_path / "chats.jsonl", [{"messages": TALK[1:3]}])
    medium = write_checkpoint(tmp_path / "medium", chat_template=MEDIUM)
    for path, added in ((medium, 1), (folder, 0)):
        tokenizer = phi3_tokenizer(path)
        plain, ended = (
            chat_dataset(tokenizer, file, train_on=train_on, add_eos=add)[0]
            for add in (False, True)
        )
        assert ended["tokens"] == plain["tokens"] + [tokenizer.eos_id] * added
        label = tokenizer.eos_id if train_on == "all" else -100
        assert ended["labels"] == plain["labels"] + [label] * added


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_bad_add_eos(read, value):
    with pytest.raises(ConfigError, match=r"dataset\.add_eos: .* must be True or False"):
        read(MIXED, add_eos=value)
