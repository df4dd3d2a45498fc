"""The data set against transformers, the stock collate functions and every kind of bad row."""

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config
from torchtune.data import InputOutputToMessages, padded_collate_sft
from torchtune.datasets import SFTDataset

from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.errors import ConfigError, DataError

PAIRS = [{"question": "the " * n, "answer": f"other {n}"} for n in range(1, 9)]


def write_lines(file, rows):
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return file


@pytest.fixture
def pairs(tmp_path):
    return write_lines(tmp_path / "pairs.jsonl", PAIRS)


def said(tokenizer, sample):
    kept = [label for label in sample["labels"] if label != -100]
    return tokenizer.decode(kept, skip_special_tokens=False)


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


def test_many_turns_and_named_columns(tokenizer, tmp_path):
    talk = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": content} for role, content in talk], "x": "e"}
    file = write_lines(tmp_path / "talk.jsonl", [row])
    assert said(tokenizer, chat_dataset(tokenizer, file)[0]) == "b<|end|> d<|end|>"
    columns = {"user": "q", "assistant": "r"}
    file = write_lines(tmp_path / "columns.jsonl", [{"q": "x", "r": "y"}])
    assert said(tokenizer, chat_dataset(tokenizer, file, columns=columns)[0]) == "y<|end|>"


def test_stock_collate(tokenizer, pairs):
    dataset = chat_dataset(tokenizer, pairs)
    batch = padded_collate_sft([dataset[0], dataset[7]], padding_idx=tokenizer.pad_id)
    assert batch["tokens"].shape == batch["labels"].shape == (2, len(dataset[7]["tokens"]))
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"][0, len(dataset[0]["tokens"]) :].eq(-100).all()


def test_from_a_torchtune_config(folder, pairs):
    """As recipes do it: the tokenizer comes first by position, the YAML's values by name."""
    cfg = OmegaConf.create(
        {
            "tokenizer": {"_component_": "phi3_plugin.data.phi3_tokenizer", "path": str(folder)},
            "dataset": {
                "_component_": "phi3_plugin.data.chat_dataset",
                "source": str(pairs),
                "columns": {"user": "answer", "assistant": "question"},
                "packed": False,
            },
        }
    )
    tokenizer = config.instantiate(cfg.tokenizer)
    dataset = config.instantiate(cfg.dataset, tokenizer)
    assert said(tokenizer, dataset[1]) == "the the <|end|>"
    assert pickle.loads(pickle.dumps(dataset))[1] == dataset[1]  # for loader workers


def test_stock_dataset_agrees(tokenizer, pairs):
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


def test_source_not_set(tokenizer):
    with pytest.raises(ConfigError, match=r"dataset\.source is not set"):
        chat_dataset(tokenizer)


def test_samples_cut_before_the_answer_are_dropped(folder, pairs, caplog):
    whole = chat_dataset(phi3_tokenizer(folder), pairs)
    first = [np.flatnonzero(np.array(sample["labels"]) != -100)[0] for sample in whole]
    limit = int(first[4]) + 1
    with caplog.at_level(logging.WARNING):
        cut = chat_dataset(phi3_tokenizer(folder, max_seq_len=limit), pairs)
    assert len(cut) == 5
    assert [sample["tokens"] for sample in cut] == [whole[i]["tokens"][:limit] for i in range(5)]
    first_long = len(whole[5]["tokens"])
    assert caplog.messages == [
        "3 of 8 rows have nothing to train on within max_seq_len. The first: "
        f"{pairs}:6: {first_long} tokens",
        f"5 of 8 rows are cut at max_seq_len. The first: {pairs}:1: "
        f"{len(whole[0]['tokens'])} tokens",
    ]


def test_nothing_left(folder, pairs):
    says = r"no sample is left of 8 rows: 8 have nothing .* Raise tokenizer\.max_seq_len: no "
    with pytest.raises(DataError, match=says):
        chat_dataset(phi3_tokenizer(folder, max_seq_len=3), pairs)


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


def test_long_lists_of_bad_rows_are_cut(tokenizer, tmp_path):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(PAIRS[:1] * 10 + [{"question": 1, "answer": "a"}] * 25))
    with pytest.raises(DataError, match=r"25 of 35 rows") as error:
        chat_dataset(tokenizer, file)
    lines = str(error.value).split("\n")
    assert len(lines) == 12
    assert lines[1] == f"  {file}[10]: the user content is int, expected a string"
    assert lines[-1] == "  and 15 more"


@pytest.mark.parametrize("options", [{}, {"format": "question_answer"}])
def test_many_broken_rows_at_the_start(tokenizer, tmp_path, options):
    file = write_lines(tmp_path / "bad.jsonl", ["{"] * 12 + PAIRS)
    dataset = chat_dataset(tokenizer, file, bad_rows="drop", **options)
    assert len(dataset) == len(PAIRS) and dataset.findings.dropped == 12
    assert dataset.places(0).endswith(":13")


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


def test_no_readable_row(tokenizer, tmp_path):
    file = write_lines(tmp_path / "bad.jsonl", ["{", "3"])
    with pytest.raises(DataError, match=r"2 of 2 rows cannot be used"):
        chat_dataset(tokenizer, file)


def test_unknown_format_names_the_source(tokenizer, tmp_path):
    file = write_lines(tmp_path / "text.jsonl", [{"body": "a"}])
    with pytest.raises(DataError, match=r"dataset\.source: .*text\.jsonl: the format of the rows"):
        chat_dataset(tokenizer, file)
