"""What is trained on, cut, counted and refused, and that tokenized data is found again."""

import json
import logging
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config
from torchtune.data import InputOutputToMessages, padded_collate_sft
from torchtune.datasets import SFTDataset
from transformers import AutoTokenizer

from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.data import store as module
from phi3_plugin.data.dataset import messages_of_rows
from phi3_plugin.data.findings import (
    BLANK_ANSWER,
    BROKEN,
    CUT_AWAY,
    FILTERED,
    NO_FINAL_ANSWER,
    PASSED_OVER,
    SPECIAL_IN_TEXT,
    TOO_LONG,
    TRUNCATED,
    UNUSABLE,
)
from phi3_plugin.data.preparation import Preparation
from phi3_plugin.data.tokenizer import Phi3Tokenizer
from phi3_plugin.data.turns import make_turn
from phi3_plugin.errors import ConfigError, DataError, MissingFileError, OutputError
from tests import warm
from tests.chosen import some
from tests.variants import BUILT, MEDIUM, edit_json, phi4_mini, write_checkpoint

PAIRS = [{"question": "the " * n, "answer": f"other {n}"} for n in range(1, 9)]
SYSTEM, USER, ASSISTANT = ("system", "s s"), ("user", "a"), ("assistant", "b")
TALK = [USER, ASSISTANT, ("user", "c"), ("assistant", "d"), ("user", "e"), ("assistant", "f f")]


def message(role, content, **fields):
    return {"role": role, "content": content, **fields}


def write_lines(file, rows):
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return file


def write_chats(file, chats):
    """Write messages, or roles and what they say."""
    chats = [[m if isinstance(m, dict) else message(*m) for m in chat] for chat in chats]
    file.write_text(json.dumps([{"messages": chat} for chat in chats]))
    return file


@pytest.fixture
def pairs(tmp_path):
    return write_lines(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def make(tmp_path, folder):
    def build(*chats, limit=None, tokenizer=None, **options):
        tokenizer = tokenizer or phi3_tokenizer(folder, max_seq_len=limit)
        return chat_dataset(tokenizer, write_chats(tmp_path / "chats.json", chats), **options)

    return build


@pytest.fixture
def medium(tmp_path):
    return write_checkpoint(tmp_path / "medium", chat_template=MEDIUM)


def said(tokenizer, sample):
    kept = [label for label in sample["labels"] if label != -100]
    return tokenizer.decode(kept, skip_special_tokens=False)


def length(dataset, index=0):
    return len(dataset[index]["tokens"])


def test_tokens_and_labels(tokenizer, pairs):
    dataset = chat_dataset(tokenizer, pairs)
    assert len(dataset) == len(PAIRS)
    for row, sample in zip(PAIRS, dataset, strict=True):
        assert said(tokenizer, sample) == row["answer"] + "<|end|>"
        assert type(sample["tokens"]) is type(sample["labels"]) is list
        assert len(sample["tokens"]) == len(sample["labels"])
        assert sample["labels"][0] == -100
        for token, label in zip(sample["tokens"], sample["labels"], strict=True):
            assert label in (-100, token)
    batch = padded_collate_sft([dataset[0], dataset[7]], padding_idx=tokenizer.pad_id)
    assert batch["tokens"].shape == batch["labels"].shape == (2, length(dataset, 7))
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"][0, length(dataset) :].eq(-100).all()


def test_the_stock_data_set_agrees(tokenizer, pairs):
    stock = SFTDataset(
        source="json",
        data_files=str(pairs),
        split="train",
        message_transform=InputOutputToMessages(
            column_map={"input": "question", "output": "answer"}
        ),
        model_transform=pickle.loads(pickle.dumps(tokenizer)),
    )
    for ours, theirs in zip(chat_dataset(tokenizer, pairs), stock, strict=True):
        assert ours == {key: theirs[key] for key in ("tokens", "labels")}


# Options as torchtune's configs hand them over


@pytest.fixture
def from_yaml(folder, pairs):
    def build(tokenizer="", dataset=""):
        text = f"""
tokenizer: {{_component_: phi3_plugin.data.phi3_tokenizer, path: '{folder}', max_seq_len: 64}}
dataset: {{_component_: phi3_plugin.data.chat_dataset, source: '{pairs}'}}
"""
        changes = OmegaConf.create(f"tokenizer: {{{tokenizer}}}\ndataset: {{{dataset}}}")
        cfg = OmegaConf.merge(OmegaConf.create(text), changes)
        config.validate(OmegaConf.create({"tokenizer": cfg.tokenizer}))
        return config.instantiate(cfg.dataset, config.instantiate(cfg.tokenizer))

    return build


def test_every_option_comes_from_a_config(from_yaml, tokenizer):
    dataset = from_yaml(
        tokenizer="pad: unk, special_in_text: text, dropped: warn",
        dataset="columns: {user: answer, assistant: question}, packed: True, train_on: last, "
        "system_prompt: '', split: train, subset: null",
    )
    shortest = dataset[int(dataset.packs.lengths.argmin())]
    assert shortest["tokens"][-1] == dataset.padding_idx == tokenizer.unk_id
    alone = from_yaml(dataset="columns: {user: answer, assistant: question}")
    assert said(tokenizer, alone[1]) == "the the <|end|>"
    assert pickle.loads(pickle.dumps(alone))[1] == alone[1]  # for loader workers


LAYOUTS = ("x", "''", "'{}{}'", "3", "['{}']")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("source: null", r"dataset\.source is not set"),
        ("format: 3", r"dataset\.format: 3 must be the name of a format"),
        ("format: [messages]", r"dataset\.format: \['messages'\] must be the name of a format"),
        (
            "columns: [q, a]",
            r"dataset\.columns: \['q', 'a'\] must be the name of one column for user",
        ),
        (
            "columns: {user: q, assistant: 3}",
            r"dataset\.columns: .* must be the name of one column",
        ),
        ("subset: 2024", r"dataset\.subset: 2024 must be text"),
        ("streaming: 1", r"dataset\.streaming: 1 must be True or False"),
        ("packed: 'no'", r"dataset\.packed: 'no' must be True or False"),
        ("packed: null", r"dataset\.packed: null must be True or False"),
        ("split_documents: True", r"dataset\.split_documents: True needs dataset\.packed"),
        ("add_eos: 1", r"dataset\.add_eos: 1 must be True or False"),
        ("train_on: [last]", r"dataset\.train_on: \['last'\] must be assistant or last"),
        ("train_on: user", r"dataset\.train_on: 'user' must be assistant or"),
        ("truncate: end", r"dataset\.truncate: 'end' must be right or left or drop"),
        ("bad_rows: skip", r"dataset\.bad_rows: 'skip' must be error or drop"),
        ("system_prompt: [a]", r"dataset\.system_prompt: .* must be text"),
        ("system_prompt: 3", r"dataset\.system_prompt: 3 must be text"),
        *((f"tool_calls: {v}", r"dataset\.tool_calls: .* a text with one {}") for v in LAYOUTS),
        ("held_out: 1", r"dataset\.held_out: 1 must be at least 0"),
        ("part: held_out", r"dataset\.part: held_out needs dataset\.held_out"),
        ("seed: -1", r"dataset\.seed: -1 must be a whole number from 0"),
        ("cache_dir: 3", r"dataset\.cache_dir: 3 must be a folder"),
    ],
)
def test_mistakes_in_the_data_set(from_yaml, options, says):
    with pytest.raises(ConfigError, match=says):
        from_yaml(dataset=options)


def test_options_that_do_not_go_together(from_yaml, tokenizer, pairs):
    with pytest.raises(ConfigError, match=r"dataset\.tool_calls: .*tokenizer\.special_in_text=tex"):
        from_yaml(tokenizer="special_in_text: text", dataset="tool_calls: '<{}>'")
    with pytest.raises(ConfigError, match=r"dataset\.packed: True .* Set tokenizer\.max_seq_len"):
        chat_dataset(tokenizer, pairs, packed=True)
    with pytest.raises(MissingFileError, match="there is no file or folder"):
        from_yaml(dataset="source: ./rows.csv")


# Rows that cannot be used


def test_bad_rows_are_listed_with_their_place(tokenizer, tmp_path):
    bad = [PAIRS[0], "{", {"question": "a", "answer": None}, {"question": "b"}]
    file = write_lines(tmp_path / "bad.jsonl", bad)
    with pytest.raises(DataError) as error:
        chat_dataset(tokenizer, file, format="question_answer")
    lines = str(error.value).split("\n")
    assert lines[0].startswith("dataset.source: 3 of 4 rows cannot be used.")
    assert lines[1].startswith(f"  {file}:2: broken JSON: ")
    assert lines[2:] == [
        f"  {file}:3: the assistant content is null, expected a string",
        f"  {file}:4: there is no 'answer'; the keys are: question",
    ]
    with pytest.raises(DataError, match="there is no 'q'; the keys are: question"):
        chat_dataset(tokenizer, file, columns={"user": "q", "assistant": "answer"})


def test_long_lists_of_bad_rows_are_cut(tokenizer, tmp_path):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(PAIRS[:1] * 10 + [{"question": 1, "answer": "a"}] * 1500))
    with pytest.raises(DataError, match=r"1500 of 1510 rows") as error:
        chat_dataset(tokenizer, file)
    lines = str(error.value).split("\n")
    assert len(lines) == 12
    assert lines[1] == f"  {file}[10]: the user content is int, expected a string"
    assert lines[-1] == "  and 1490 more"


@pytest.mark.parametrize("options", [{}, {"format": "question_answer"}])
def test_many_broken_rows_at_the_start(tokenizer, tmp_path, options):
    file = write_lines(tmp_path / "bad.jsonl", ["{"] * 12 + PAIRS)
    dataset = chat_dataset(tokenizer, file, bad_rows="drop", **options)
    assert len(dataset) == len(PAIRS) and dataset.findings.dropped == 12
    assert dataset.places(0).endswith(":13")


def test_rows_of_another_format_than_most_are_bad_rows(tokenizer, tmp_path):
    file = write_lines(tmp_path / "bad.jsonl", [{"body": "a"}, *PAIRS])
    assert len(chat_dataset(tokenizer, file, bad_rows="drop")) == len(PAIRS)
    file = write_lines(tmp_path / "text.jsonl", [{"body": "a"}])
    with pytest.raises(DataError, match=r"dataset\.source: .*text\.jsonl: the format of the rows"):
        chat_dataset(tokenizer, file)


def test_no_readable_row(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"2 of 2 rows cannot be used"):
        chat_dataset(tokenizer, write_lines(tmp_path / "bad.jsonl", ["{", "3"]))


def test_a_filter_that_fails_is_told_from_a_row_that_cannot_be_read(tmp_path, tokenizer):
    rows = [{"question": "u", "answer": "a", "rating": n} for n in (1, 5, "5", None)]
    file = write_lines(tmp_path / "rated.jsonl", ["{", *rows])
    options = {"filter": "rating >= 4", "cache_dir": tmp_path / "cache"}
    with pytest.raises(DataError, match="3 of 5 rows cannot be used"):
        chat_dataset(tokenizer, file, **options)
    data = chat_dataset(tokenizer, file, bad_rows="drop", **options)
    assert len(data) == 1
    assert data.findings.counts == {BROKEN: 1, UNUSABLE: 2, FILTERED: 1}


def test_what_the_template_leaves_out_is_an_error_of_its_row(medium, make):
    misspelt = [("asistant", "x"), *TALK]
    with pytest.raises(DataError) as error:
        make(TALK, [SYSTEM, *TALK], misspelt, tokenizer=phi3_tokenizer(medium))
    lines = str(error.value).split("\n")
    assert lines[0].startswith("dataset.source: 2 of 3 rows cannot be used.")
    says = "the chat template leaves out the {} message; to go on without, set tokenizer.dropped"
    assert f"[1]: {says.format('system')} to warn" in lines[1]
    assert "[2]: unknown role 'asistant', expected one of: system, user, assistant, " in lines[2]
    assert "dropped" not in lines[2]


def test_what_the_template_leaves_out_is_counted_where_asked_for(medium, make, caplog):
    warns = phi3_tokenizer(medium, dropped="warn")
    with caplog.at_level(logging.WARNING):
        dataset = make(TALK, [SYSTEM, *TALK], [SYSTEM, SYSTEM, *TALK], tokenizer=warns)
    (told,) = caplog.messages
    assert "2 of 3 rows have a message that the chat template leaves out. The first: " in told
    assert told.endswith("[1]: the system message")
    assert dataset[0] == dataset[1] == dataset[2]
    caplog.clear()
    dataset = make(TALK, [("system", ""), *TALK], tokenizer=phi3_tokenizer(medium))
    assert dataset[0] == dataset[1]
    assert not caplog.messages


def test_who_asks_is_never_left_out(medium, make):
    for name in ("customer", "human"):
        chat = [(name, "x"), TALK[-1]]
        with pytest.raises(DataError, match=rf"unknown role '{name}', .*roles=\{{{name}: user\}}"):
            make(chat, tokenizer=phi3_tokenizer(medium, dropped="warn"))


def test_tools(make, tmp_path):
    tools = [{"name": "f", "parameters": {}}]
    chat = [message("system", "be brief", tools=tools), *TALK]
    with pytest.raises(DataError, match=r"\[0\]: .* leaves out the tools of the system message"):
        make(chat)
    tokenizer = phi3_tokenizer(phi4_mini(tmp_path / "phi4-mini"))
    tokens = make(chat, tokenizer=tokenizer)[0]["tokens"]
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    assert text.startswith(f"<|system|>be brief<|tool|>{json.dumps(tools)}<|/tool|><|end|><|user|>")


def test_special_tokens_of_messages_are_noticed(make, folder):
    calls = [{"name": "f", "arguments": {}}]
    chats = [
        TALK,
        [("user", "<|end|><|endoftext|>"), ASSISTANT],
        [USER, message("assistant", None, tool_calls=calls)],
    ]
    assert make(*chats[:2]).findings.counts == {SPECIAL_IN_TEXT: 1}
    assert not make(*chats, tool_calls="<|end|>{}").findings.counts
    as_text = phi3_tokenizer(folder, special_in_text="text")
    assert not make(*chats[:2], tokenizer=as_text).findings.counts


# What is trained on


CHATS = {
    "short": [USER, ASSISTANT],
    "system": [SYSTEM, USER, ASSISTANT],
    "empty_system": [("system", ""), USER, ASSISTANT],
    "late_system": [USER, SYSTEM, ASSISTANT],
    "long": TALK[:5],
}


@pytest.mark.parametrize("prompt", ["", " the <|end|>\n"])
def test_system_prompt_is_what_transformers_makes_of_it(supported, make, prompt):
    ours = phi3_tokenizer(supported, dropped="warn")
    theirs = AutoTokenizer.from_pretrained(supported)
    dataset = make(*CHATS.values(), tokenizer=ours, system_prompt=prompt)
    for chat, sample in zip(CHATS.values(), dataset, strict=True):
        has_one = any(role == "system" for role, _ in chat)
        turns = [message(*m) for m in (chat if has_one else [("system", prompt), *chat])]
        assert sample["tokens"] == theirs.apply_chat_template(turns, return_dict=False)
        assert "s" not in said(ours, sample)


@pytest.mark.parametrize("own", [[], [{"role": "system", "content": ""}]])
def test_system_prompt_of_rows_with_tools(tmp_path, own):
    """The tools stand in a system message; one that the row itself has is kept as it is."""
    tokenizer = phi3_tokenizer(phi4_mini(tmp_path / "phi4-mini"))
    row = {
        "messages": [*own, message("user", "a"), message("assistant", "b")],
        "tools": [{"name": "f"}],
    }
    file = write_lines(tmp_path / "tools.jsonl", [row])
    sample = chat_dataset(tokenizer, file, system_prompt="Be kind")[0]
    text = tokenizer.decode(sample["tokens"], skip_special_tokens=False)
    prompt = "" if own else "Be kind"
    assert text.startswith(f'<|system|>{prompt}<|tool|>[{{"name": "f"}}]<|/tool|><|end|><|user|>')


BESIDE_CONTENT = {
    "name": (
        "{% if m.name %}{{ m.name + ': ' }}{% endif %}",
        {"messages": [message("user", "hi", name="ann"), message("assistant", "b", name="")]},
        {},
    ),
    "compared": (
        "{% if 'kind' in m and m['kind'] == 'x' %}X{% endif %}",
        {"messages": [message("user", "hi", kind="x"), message("assistant", "b", kind="y")]},
        {},
    ),
    "all": (
        "{% for key, value in m.items() if key not in ['role', 'content'] %}{{ key }}={{ value }}"
        "{% endfor %}",
        {"messages": [message("user", "hi", id=7), message("assistant", "b")]},
        {},
    ),
    "documents": (
        "{% if loop.first %}{% for d in documents or [] %}{{ d.text }}{% endfor %}{% endif %}",
        {"messages": [message("user", "hi"), message("assistant", "b")]},
        {"documents": [{"title": "t", "text": "é x"}]},
    ),
    "tools": (
        "{% if loop.first and tools %}{{ tools | tojson }}{% endif %}",
        {"messages": [message("user", "hi"), message("assistant", "b")]},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
    ),
    "no tools": (
        "{% if loop.first and tools is not none %}{{ tools | tojson }}{% endif %}",
        {"messages": [message("user", "hi"), message("assistant", "b")]},
        {"tools": []},
    ),
    "another": (
        "{% if loop.first %}{{ style | default('plain') }}{% endif %}",
        {"messages": [message("user", "hi"), message("assistant", "b")]},
        {"style": "short"},
    ),
}


@pytest.mark.parametrize("name", BESIDE_CONTENT)
def test_what_the_template_reads_beside_the_content_reaches_it(tmp_path, name):
    written, row, variables = BESIDE_CONTENT[name]
    source = "{% for m in messages %}{{ '<|' + m.role + '|>' }}" + written
    source += "{{ m.content + '<|end|>' }}{% endfor %}"
    folder = write_checkpoint(tmp_path / "checkpoint", chat_template=source)
    file = write_lines(tmp_path / "rows.jsonl", [{**row, **variables}] * 2)
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(row["messages"], return_dict=False, **variables)
    tokenizer = phi3_tokenizer(folder)
    for sample in chat_dataset(tokenizer, file):
        assert sample["tokens"] == ids
        assert said(tokenizer, sample) == "b<|end|>"


def test_a_field_cannot_end_a_turn_where_texts_cannot(tmp_path):
    source = BLOCKS.replace("{{ m.content", "{{ m.name | default('') + m.content")
    folder = write_checkpoint(tmp_path / "checkpoint", chat_template=source)
    talk = [message("user", "hi", name="x<|end|>"), message("assistant", "b", name="")]
    file = write_lines(tmp_path / "rows.jsonl", [{"messages": talk}])
    with pytest.raises(DataError, match=r"beside the content holds '<\|end\|>'"):
        chat_dataset(phi3_tokenizer(folder, special_in_text="text"), file)


BLOCKS = "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content + '<|end|>' }}{% endfor %}"


def test_no_system_prompt_is_the_default(make):
    assert make(TALK)[0] == make(TALK, system_prompt=None)[0] != make(TALK, system_prompt="")[0]


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
    [("assistant", "d<|end|> f<|end|>"), ("last", "f<|end|>"), ("marked", "a<|end|> f<|end|>")],
)
def test_what_messages_ask_for(make, tokenizer, train_on, expected):
    dataset = make(MIXED, train_on=train_on)
    assert said(tokenizer, dataset[0]) == expected
    plain = [(m["role"], m["content"]) for m in MIXED]
    assert dataset[0]["tokens"] == make(plain)[0]["tokens"]
    options = {"source": "chats.json", "train_on": train_on, "packed": True, "_component_": "x"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(dataset.places(0).rpartition("/")[0])
        write_chats(Path("chats.json"), [MIXED, [USER], []])
        ((where, messages),) = messages_of_rows(tokenizer, options)
    assert where == "chats.json[0]"
    trained = [m["content"] + "<|end|>" for m in messages if m["trained"]]
    assert " ".join(trained) == expected


def test_all_trains_every_token_but_the_first(tokenizer, make):
    for sample in make(*CHATS.values(), [USER], train_on="all", system_prompt="s"):
        assert sample["labels"] == [-100, *sample["tokens"][1:]]
        assert sample["labels"][-1] == tokenizer.eos_id


def test_what_is_passed_over_is_said(make, caplog):
    with caplog.at_level(logging.WARNING):
        for train_on, count in (("assistant", 1), ("last", 1), ("all", 1), ("marked", 0)):
            assert make(MIXED, train_on=train_on).findings.counts[PASSED_OVER] == count
    assert len(caplog.messages) == 3 and "weight or train fields" in caplog.text
    caplog.clear()
    assert not make(MIXED[1:4]).findings.counts[PASSED_OVER]
    assert not caplog.messages


@pytest.mark.parametrize(
    ("train_on", "chat", "says"),
    [
        ("marked", TALK, "no message has a weight"),
        ("assistant", MIXED[:2], "every assistant turn has a weight of 0"),
        ("assistant", MIXED[:1], "there is no assistant turn"),
        ("last", MIXED[:1], "there is no assistant turn"),
    ],
)
def test_nothing_asked_for(make, train_on, chat, says):
    with pytest.raises(DataError, match=says):
        make(chat, train_on=train_on)


@pytest.mark.parametrize("field", [{"weight": 0}, {"train": False}])
def test_an_answer_that_asks_not_to_be_trained_on(make, tokenizer, field):
    chat = [USER, message("assistant", "bad", **field), USER, ("assistant", "good")]
    assert said(tokenizer, make(chat)[0]) == "good<|end|>"
    assert said(tokenizer, make([*chat[2:], *chat[:2]], train_on="last")[0]) == "bad<|end|>"


def test_odd_ends_are_noticed(make):
    dataset = make(TALK, TALK[:5], [USER, ("assistant", " \n")])
    assert dataset.findings.places == {
        NO_FINAL_ANSWER: [(dataset.places(1), "the last turn is user's")],
        BLANK_ANSWER: [(dataset.places(2), "")],
    }


def test_an_answer_that_is_first_has_nothing_before_it(medium, make):
    (sample,) = make([ASSISTANT], tokenizer=phi3_tokenizer(medium))
    assert sample["labels"] == [-100, *sample["tokens"][1:]]


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_the_end_of_text_comes_where_the_template_has_none(make, medium, folder, train_on):
    for path, added in ((medium, 1), (folder, 0)):
        tokenizer = phi3_tokenizer(path)
        options = {"tokenizer": tokenizer, "train_on": train_on}
        plain, ended = (make(TALK, add_eos=add, **options)[0] for add in (False, True))
        assert ended["tokens"] == plain["tokens"] + [tokenizer.eos_id] * added
        label = tokenizer.eos_id if train_on == "all" else -100
        assert ended["labels"] == plain["labels"] + [label] * added


# Texts that are written already


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("name", BUILT)
def test_a_text_that_the_template_wrote_gives_the_same_as_its_messages(
    tmp_path, make, name, train_on
):
    tokenizer = phi3_tokenizer(BUILT[name](tmp_path / name), dropped="warn")
    chats = [TALK, TALK[:2], [("system", "s"), *TALK]]
    texts = [tokenizer.render([make_turn(*m) for m in chat]).text for chat in chats]
    file = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    ours = chat_dataset(tokenizer, file, train_on=train_on)
    assert list(ours) == list(make(*chats, tokenizer=tokenizer, train_on=train_on))


def test_texts_of_another_kind(tokenizer, tmp_path):
    file = write_lines(tmp_path / "texts.jsonl", [{"text": "the other"}])
    with pytest.raises(DataError, match=r"no assistant message, which would start with '<\|assis"):
        chat_dataset(tokenizer, file)
    with pytest.raises(DataError, match="a text has no messages"):
        chat_dataset(tokenizer, file, train_on="marked")
    with pytest.raises(DataError, match="system_prompt cannot be put in front of a text"):
        chat_dataset(tokenizer, file, system_prompt="s")
    (sample,) = chat_dataset(tokenizer, file, train_on="all", add_eos=True)
    assert sample["tokens"] == tokenizer.encode("the other", add_eos=True)
    assert sample["labels"] == [-100, *sample["tokens"][1:]]


def test_texts_whose_answer_does_not_end(tokenizer, tmp_path):
    text = "<|user|>\na<|end|>\n<|assistant|>\nb\n<|user|>\nc<|end|>\n<|assistant|>\nd<|end|>"
    with pytest.raises(DataError, match=r"goes on into '<\|user\|>', expected '<\|end\|>'"):
        chat_dataset(tokenizer, write_lines(tmp_path / "t.jsonl", [{"text": text}]))
    unended = "<|user|>\na<|end|>\n<|assistant|>\nb the"
    (sample,) = chat_dataset(tokenizer, write_lines(tmp_path / "t.jsonl", [{"text": unended}]))
    assert said(tokenizer, sample) == "b the"


# What is left of conversations that are too long

LONG = [("user", "the " * 30), ("assistant", "g g")]


def test_right_keeps_the_start(make, caplog):
    whole = make([SYSTEM, *TALK])
    with caplog.at_level(logging.WARNING):
        cut = make([SYSTEM, *TALK], limit=20)
    assert cut[0] == {key: values[:20] for key, values in whole[0].items()}
    assert cut.full.tolist() == [length(whole)] and cut.lengths.tolist() == [20]
    assert cut.findings.counts == {TRUNCATED: 1}
    where = f"{cut.places(0)}: {length(whole)} tokens"
    assert caplog.messages == [f"1 of 1 rows are cut at max_seq_len. The first: {where}"]


def test_samples_cut_before_the_answer_are_dropped(folder, pairs, caplog):
    whole = chat_dataset(phi3_tokenizer(folder), pairs)
    first = [np.flatnonzero(np.array(sample["labels"]) != -100)[0] for sample in whole]
    limit = int(first[4]) + 1
    with caplog.at_level(logging.WARNING):
        cut = chat_dataset(phi3_tokenizer(folder, max_seq_len=limit), pairs)
    assert [sample["tokens"] for sample in cut] == [whole[i]["tokens"][:limit] for i in range(5)]
    assert cut.findings.counts == {CUT_AWAY: 3, TRUNCATED: 5}
    assert cut.lost.tolist() == [length(whole, i) for i in (5, 6, 7)]
    says = f"3 of 8 rows have nothing to train on within max_seq_len. The first: {pairs}:6: "
    assert caplog.messages[0] == f"{says}{length(whole, 5)} tokens"


@pytest.mark.parametrize("left_out", [1, 2])
@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_left_drops_the_oldest_exchanges_and_keeps_the_system_prompt(make, left_out, system):
    expected = make([*system, *TALK[2 * left_out :]])
    limit = length(expected)
    cut = make([*system, *TALK], limit=limit, truncate="left")
    assert cut[0] == expected[0]
    assert cut.findings.counts == {TRUNCATED: 1}
    # A token more changes nothing, one less takes another exchange
    assert make([*system, *TALK], limit=limit + 1, truncate="left")[0] == expected[0]
    if left_out == 1:
        shorter = make([*system, *TALK], limit=limit - 1, truncate="left")
        assert shorter[0] == make([*system, *TALK[4:]])[0]


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_left_cuts_the_question_where_one_exchange_is_too_long(make, system):
    cut = make([*system, *TALK, *LONG], limit=30, truncate="left")[0]
    question, answer = LONG
    ends = [[*system, (question[0], question[1][-n:]), answer] for n in range(1, 121)]
    fitting = [sample for sample in make(*ends) if len(sample["tokens"]) <= 30]
    assert cut in fitting
    # Parts of a word may take more tokens than the word
    assert len(cut["tokens"]) >= max(len(sample["tokens"]) for sample in fitting) - 3


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_left_cuts_the_end_of_an_answer_that_is_too_long(make, system):
    chat = [*system, USER, ("assistant", "the " * 60)]
    assert make(chat, limit=30, truncate="left")[0] == make(chat, limit=30)[0]


def test_left_drops_a_greeting_first(make):
    greeted = [("assistant", "the " * 40), *TALK[:2]]
    expected = make(TALK[:2])
    assert make(greeted, limit=length(expected), truncate="left")[0] == expected[0]


def test_left_is_quick_where_many_exchanges_go(make, monkeypatch):
    encoded, encode = [], Phi3Tokenizer.encode_chats
    watched = lambda self, chats: encoded.append(chats) or encode(self, chats)  # noqa: E731
    monkeypatch.setattr(Phi3Tokenizer, "encode_chats", watched)
    make(TALK * 100, limit=30, truncate="left")
    assert len(encoded) < 12


def test_left_keeps_the_end_of_a_text(tmp_path, folder):
    file = write_lines(tmp_path / "text.jsonl", [{"text": "the " * 40}])
    whole = chat_dataset(phi3_tokenizer(folder), file, train_on="all")[0]
    tokenizer = phi3_tokenizer(folder, max_seq_len=7)
    cut = chat_dataset(tokenizer, file, train_on="all", truncate="left")[0]
    assert cut["tokens"] == whole["tokens"][-7:]
    assert cut["labels"] == [-100, *whole["tokens"][-6:]]


def test_left_keeps_the_end_of_text_token(make):
    expected = make(TALK[4:], add_eos=True)
    cut = make(TALK, limit=length(expected), truncate="left", add_eos=True)
    assert cut[0] == expected[0]


def test_drop(make):
    dataset = make([SYSTEM, *TALK], TALK[:2], limit=20, truncate="drop")
    assert len(dataset) == 1 and dataset[0] == make(TALK[:2])[0]
    assert dataset.findings.counts == {TOO_LONG: 1}
    assert dataset.lost.tolist() == [length(make([SYSTEM, *TALK]))]
    with pytest.raises(DataError, match="no sample is left of 1 rows: 1 are longer than max_seq"):
        make(TALK, limit=5, truncate="drop")


@pytest.mark.parametrize(
    ("train_on", "limit", "says"),
    [
        ("assistant", 3, "no assistant turn that is trained on starts within 3 tokens"),
        ("last", 7, "the last assistant turn does not start within 7 tokens"),
        ("all", 1, "there is no second token within 1 tokens"),
    ],
)
def test_nothing_left_within_the_limit(make, train_on, limit, says):
    match = f"is left of 1 rows: 1 have nothing.* Raise tokenizer.max_seq_len: {says}"
    with pytest.raises(DataError, match=match):
        make(TALK, limit=limit, train_on=train_on)


# Parts of a data set


def test_weights_count_for_training_alone(tokenizer, pairs):
    source = [{"source": str(pairs), "weight": 2.5}]
    whole = chat_dataset(tokenizer, source)
    train, held = (
        chat_dataset(tokenizer, source, held_out=0.3, part=part) for part in ("train", "held_out")
    )
    assert len(set(held.chosen)) == len(held) == 3
    assert sorted([*train.chosen, *(i for i in whole.chosen if i in held.chosen)]) == sorted(
        whole.chosen
    )
    with pytest.raises(DataError, match="the weights leave no sample"):
        chat_dataset(tokenizer, [{"source": str(pairs), "weight": 1e-9}])


# Tokenized data is found again exactly as long as nothing it depends on has changed


@pytest.fixture
def stores(tmp_path):
    """Return the folders in the cache."""
    folder = tmp_path / "kept"

    def find():
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())

    find.folder = folder
    return find


@pytest.fixture
def read(folder, pairs, stores):
    def build(**options):
        tokens = {"max_seq_len": options.pop("max_seq_len", None)}
        tokenizer = phi3_tokenizer(options.pop("path", folder), **tokens)
        options = {"source": pairs, "cache_dir": stores.folder} | options
        return chat_dataset(tokenizer, options.pop("source"), **options)

    return build


def test_the_second_time_nothing_is_tokenized(read, stores, monkeypatch):
    first = list(read())
    monkeypatch.setattr(Phi3Tokenizer, "encode_chats", None)
    again = read()
    assert list(again) == first and again.rows == 8
    assert again.places(3).endswith("pairs.jsonl:4")
    assert len(stores()) == 1


def test_what_another_user_has_kept_is_read(read, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    first = list(read())
    monkeypatch.setattr(Phi3Tokenizer, "encode_chats", None)
    for name in ("os.utime", "FileLock", "tempfile.TemporaryFile"):
        monkeypatch.setattr(f"{module.__name__}.{name}", refuse)
    assert list(read()) == first


def test_what_is_decided_after_reading_shares_the_store(read, stores):
    read()
    for options in ({"held_out": 0.5}, {"seed": 3}, {"bad_rows": "drop"}):
        read(**options)
    read(max_seq_len=64)
    read(max_seq_len=64, packed=True)
    assert len(stores()) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"train_on": "all"},
        {"system_prompt": "s"},
        {"truncate": "left"},
        {"add_eos": True},
        {"filter": "'8' in answer"},
        {"max_samples": 2},
        {"columns": {"user": "answer", "assistant": "question"}},
        {"max_seq_len": 12},
        {"group_by": "answer"},
        {"tool_calls": "<{}>"},
    ],
)
def test_every_option_has_a_store_of_its_own(read, stores, options):
    plain = list(read())
    changed = list(read(**options))
    assert len(stores()) == 2
    same = {"truncate", "add_eos", "group_by", "tool_calls"}
    assert changed != plain or options.keys() & same


def test_an_edit_of_equal_length_at_the_same_time_is_seen(read, pairs, stores):
    before, stamp = list(read()), pairs.stat()
    pairs.write_text(pairs.read_text().replace("other 8", "other 9"))
    os.utime(pairs, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert pairs.stat().st_size == stamp.st_size
    after = list(read())
    assert after[:7] == before[:7] and after[7] != before[7] and len(stores()) == 2


def test_another_template_tokenizer_or_program_is_seen(
    read, stores, tmp_path, folder, medium, monkeypatch
):
    read()
    read(path=medium)
    read(path=write_checkpoint(tmp_path / "launch", rstrip=False))
    edit_json(folder / "tokenizer_config.json", eos_token="</s>")
    read()
    assert len(stores()) == 4
    monkeypatch.setattr(module, "_code", lambda: "changed")
    read()
    assert len(stores()) == 5


@pytest.mark.parametrize("name", ["tokens.bin", "trained.bin", "samples.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_broken_store_is_written_again(read, stores, name, damage):
    first = list(read())
    file = stores.folder / stores()[0] / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-3])
    assert list(read()) == first and len(stores()) == 1


def test_nothing_is_kept_of_a_source_that_breaks(read, pairs, stores):
    pairs.write_text("{}")
    with pytest.raises(DataError):
        read()
    assert not stores()
    broken = pairs.with_name("broken.json")
    broken.write_text("[" + json.dumps(PAIRS[0]) + ", {")
    with pytest.raises(DataError, match="broken JSON"):
        read(source=broken)
    assert not stores()


def test_a_file_that_changes_while_it_is_read(read, pairs, stores, monkeypatch):
    read_all = Preparation.conversations

    def changed(preparation, noticed):
        yield from read_all(preparation, noticed)
        write_lines(pairs, PAIRS[1:])

    monkeypatch.setattr(Preparation, "conversations", changed)
    with pytest.raises(DataError, match="changed while they were read"):
        read()
    assert not stores()


KILLED = """
import os, signal, sys
from phi3_plugin.data import chat_dataset, phi3_tokenizer, store
write = store.StoreWriter.{method}
def die(self, *args):
    write(self, *args)
    os.kill(os.getpid(), signal.SIGKILL)
store.StoreWriter.{method} = die
chat_dataset(phi3_tokenizer(sys.argv[1]), sys.argv[2], cache_dir=sys.argv[3])
"""


@pytest.mark.parametrize("method", some(["append", "_finish"], quick={"append"}))
def test_a_killed_run_leaves_nothing_that_is_taken_for_data(read, folder, pairs, stores, method):
    code = KILLED.format(method=method)
    words = "-c", code, folder, pairs, stores.folder
    assert warm.run("python", *words, cwd=folder).returncode == -9
    assert [name.endswith("-unfinished") for name in stores()] == [True]
    # What it left goes with the next store, of whatever it is
    write_lines(pairs, PAIRS[1:] if method == "append" else PAIRS)
    assert len(read()) == (7 if method == "append" else 8)
    assert [name.endswith("-unfinished") for name in stores()] == [False]


TOGETHER = """
import sys
from phi3_plugin.data import chat_dataset, phi3_tokenizer, preparation
write = preparation.Preparation.write
def told(*args):
    print("wrote")
    write(*args)
preparation.Preparation.write = told
print(sum(chat_dataset(phi3_tokenizer(sys.argv[1]), sys.argv[2], cache_dir=sys.argv[3]).lengths))
"""


def test_of_several_processes_one_writes(folder, pairs, stores):
    words = "-c", TOGETHER, folder, pairs, stores.folder
    runs = [warm.begin("python", *words, cwd=folder) for _ in range(2)]
    printed = [run.communicate()[0].split() for run in runs]
    assert sorted(words[0] == "wrote" for words in printed) == [False, True]
    assert len({words[-1] for words in printed}) == 1


def test_a_store_that_is_removed_while_it_is_used(read, stores):
    dataset = read()
    shutil.rmtree(stores.folder)
    assert len(list(dataset)) == 8
    with pytest.raises(OutputError, match="was removed while it was used"):
        dataset.places(0)
    with pytest.raises(OutputError, match="was removed while it was used"):
        pickle.loads(pickle.dumps(dataset))[0]


def test_another_place_of_the_same_file(read, pairs):
    read(source=str(pairs.parent / "*.jsonl"))
    pairs.rename(pairs.with_name("other.jsonl"))
    assert read(source=str(pairs.parent / "*.jsonl")).places(0).endswith("other.jsonl:1")


def test_old_stores_go_when_a_new_one_is_written(read, stores):
    read()
    (old,) = stores()
    long_ago = time.time() - 31 * 24 * 3600
    os.utime(stores.folder / old, (long_ago, long_ago))
    read(train_on="all")
    assert old not in stores() and len(stores()) == 1


def test_a_named_folder_that_cannot_be_written_to(read, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"written to .*file.* dataset\.cache_dir"):
        read(cache_dir=tmp_path / "file")


def test_without_a_home_nothing_is_kept(read, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv(module.CACHE_VARIABLE, str(tmp_path / "file"))
    dataset = read(cache_dir=None)
    assert len(list(dataset)) == 8
    assert "tokenized data is not kept" in caplog.text
    assert pickle.loads(pickle.dumps(dataset))[7] == dataset[7]  # for loader workers
    private = dataset.store.folder
    assert private.is_dir()
    del dataset
    assert not private.is_dir()


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv(module.CACHE_VARIABLE, str(tmp_path))
    assert module.default_folder() == tmp_path
    monkeypatch.delenv(module.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module.default_folder() == tmp_path / "phi3_plugin"


@pytest.mark.parametrize("name", ["tokens.bin", "trained.bin"])
def test_a_cache_whose_bytes_changed_is_written_again(tokenizer, pairs, tmp_path, name, caplog):
    cache = tmp_path / "kept"
    whole = [tensors(row) for row in chat_dataset(tokenizer, pairs, cache_dir=cache)]
    (file,) = cache.glob(f"*/{name}")
    data = bytearray(file.read_bytes())
    data[8] ^= 1  # as long as before
    file.write_bytes(data)
    again = chat_dataset(tokenizer, pairs, cache_dir=cache)
    assert [tensors(row) for row in again] == whole
    assert "has changed since it was written" in caplog.text
    caplog.clear()
    assert len(chat_dataset(tokenizer, pairs, cache_dir=cache)) == len(whole)
    assert "has changed" not in caplog.text


def tensors(row):
    return {key: np.asarray(value).tolist() for key, value in row.items()}


def test_a_conversation_beyond_all_lengths_is_a_bad_row(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("phi3_plugin.data.preparation.LONGEST", 1000)
    rows = [{"question": "q" * length, "answer": "a"} for length in (10, 2000)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"a\.jsonl:2: the conversation has 2,\d+ characters, more"):
        chat_dataset(tokenizer, file)
    assert len(chat_dataset(tokenizer, file, bad_rows="drop")) == 1
