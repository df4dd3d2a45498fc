"""Pairs of answers, and answers that are called good or bad: read, tokenized, cut and counted."""

import json

import numpy as np
import pytest
import torch
from torchtune.data import padded_collate_dpo

from phi3_plugin.data import chat_dataset, phi3_tokenizer, preference_dataset
from phi3_plugin.data.collate import concatenate
from phi3_plugin.data.findings import (
    CUT_AWAY,
    NO_FINAL_ANSWER,
    SAME_ANSWERS,
    TOO_LONG,
    TRUNCATED,
    UNUSABLE,
)
from phi3_plugin.data.packing import Packs, without_padding
from phi3_plugin.errors import ConfigError, DataError
from phi3_plugin.inspect import pairs_of, show
from tests.variants import write_checkpoint

ASK = {"role": "user", "content": "the other"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("other the", "the the the"))
ROW = {"prompt": "the other", "chosen": "other the", "rejected": "the the the"}
SHAREGPT = [{"from": "human", "value": "the other"}]
SHAPES = {
    "texts": ROW,
    "messages": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "the prompt within both": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "a text and lists": {"prompt": "the other", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "hh": {
        "chosen": "\n\nHuman: the other\n\nAssistant: other the",
        "rejected": "\n\nHuman: the other\n\nAssistant: the the the",
    },
    "azure": {
        "input": {"messages": [ASK]},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    },
    "sharegpt": {
        "conversations": SHAREGPT,
        "chosen": {"from": "gpt", "value": "other the"},
        "rejected": {"from": "gpt", "value": "the the the"},
    },
    "messages beside": {"messages": [ASK], "chosen": "other the", "rejected": "the the the"},
    "capitals": {"Prompt": "the other", "Chosen": "other the", "Rejected": "the the the"},
}
LABELLED = {
    "prompt and completion": {"prompt": "the other", "completion": "other the"},
    "messages": {"messages": [ASK, GOOD]},
    "lists": {"prompt": [ASK], "completion": [GOOD]},
    "sharegpt": {"conversations": [*SHAREGPT, {"from": "gpt", "value": "other the"}]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def make(tmp_path, folder):
    def build(*rows, limit=None, **options):
        file = tmp_path / "pairs.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        return preference_dataset(phi3_tokenizer(folder, max_seq_len=limit), file, **options)

    return build


@pytest.fixture
def chat(tmp_path, folder):
    """Tokens and labels of a conversation as chat_dataset gives them."""

    def build(*messages):
        file = tmp_path / "chat.json"
        file.write_text(json.dumps([{"messages": messages}]))
        sample = chat_dataset(phi3_tokenizer(folder), file, train_on="last")[0]
        return sample["tokens"], sample["labels"]

    return build


def sides(dataset, index=0):
    """Return tokens and labels of each document of a sample."""
    sample = without_padding(dataset)[index]
    lengths = sample["lengths"].tolist()
    parts = (sample[key].split(lengths) for key in ("tokens", "labels"))
    return [(ids.tolist(), labels.tolist()) for ids, labels in zip(*parts, strict=True)]


@pytest.mark.parametrize("name", SHAPES)
def test_both_sides_are_what_chat_dataset_makes_of_them(name, make, chat):
    dataset = make(SHAPES[name], SHAPES[name])
    assert len(dataset) == 2
    assert sides(dataset) == [chat(ASK, GOOD), chat(ASK, BAD)]
    assert without_padding(dataset)[0]["wanted"].tolist() == [True, False]


@pytest.mark.parametrize("label", [True, False, 1, 0, "true", "False", "good", "rejected"])
@pytest.mark.parametrize("name", LABELLED)
def test_a_labelled_answer_is_one_document(name, label, make, chat):
    wanted = label in (True, 1, "true", "good")
    dataset = make({**LABELLED[name], "label": label})
    assert sides(dataset) == [chat(ASK, GOOD)]
    assert dataset[0]["wanted"].tolist() == [wanted]


NOTES = {"label": "x", "score": 3, "context": "not read", "weight": 2}
NAMED = {
    "texts": (
        {"ask": "the other", "good": "other the", "bad": "the the the"},
        {"prompt": "ask", "chosen": "good", "rejected": "bad"},
    ),
    "lists": (
        {"ask": [ASK], "good": [GOOD], "bad": BAD},
        {"prompt": "ask", "chosen": "good", "rejected": "bad"},
    ),
    "whole conversations": (
        {"good": [ASK, GOOD], "bad": [ASK, BAD]},
        {"chosen": "good", "rejected": "bad"},
    ),
    "messages": (
        {"chat": [ASK], "good": "other the", "bad": "the the the"},
        {"messages": "chat", "chosen": "good", "rejected": "bad"},
    ),
    "sharegpt": (
        {"chat": SHAREGPT, "good": {"from": "gpt", "value": "other the"}, "bad": "the the the"},
        {"messages": "chat", "chosen": "good", "rejected": "bad"},
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_columns_of_pairs_can_be_named(name, make, chat):
    row, columns = NAMED[name]
    dataset = make({**row, **NOTES}, columns=columns)
    assert sides(dataset) == [chat(ASK, GOOD), chat(ASK, BAD)]
    (shape,) = without_padding(dataset).findings.columns_told()
    assert shape.endswith("Not read: label, score, context, weight")


def test_a_prompt_of_pairs_can_be_written(make, chat):
    row = {"a": "the", "b": "other", "good": "other the", "bad": "the the the", "s": "other"}
    columns = {"chosen": "good", "rejected": "bad"}
    assert sides(make(row, prompt="{a} {b}", columns=columns)) == [chat(ASK, GOOD), chat(ASK, BAD)]
    system = {"role": "system", "content": "other"}
    found = sides(make(row, prompt="{a} {b}", columns={**columns, "system": "s"}))
    assert found == [chat(system, ASK, GOOD), chat(system, ASK, BAD)]


@pytest.mark.parametrize("verdict", [True, "bad"])
def test_the_column_of_a_label_can_be_named(verdict, make, chat):
    texts = {"ask": "the other", "reply": "other the", "verdict": verdict, **NOTES}
    columns = {"user": "ask", "assistant": "reply", "label": "verdict"}
    lists = {"chat": [ASK, GOOD], "verdict": verdict, **NOTES}
    written = {"assistant": "reply", "label": "verdict"}
    for dataset in (
        make(texts, columns=columns),
        make(lists, columns={"messages": "chat", "label": "verdict"}),
        make(texts, prompt="{ask}", columns=written),
    ):
        assert sides(dataset) == [chat(ASK, GOOD)]
        assert dataset[0]["wanted"].tolist() == [verdict is True]


def test_chat_dataset_learns_the_answers_that_a_named_column_calls_good(tmp_path, folder, chat):
    file = tmp_path / "rows.jsonl"
    rows = [{"ask": "the other", "reply": "other the", "verdict": value} for value in (True, False)]
    file.write_text("\n".join(map(json.dumps, rows)))
    columns = {"user": "ask", "assistant": "reply", "label": "verdict"}
    with pytest.raises(DataError, match=r"rows.jsonl:2: verdict is False: the answer is not to be"):
        chat_dataset(phi3_tokenizer(folder), file, columns=columns)
    row, columns = NAMED["texts"]
    file.write_text(json.dumps(row))
    sample = chat_dataset(phi3_tokenizer(folder), file, columns=columns)[0]
    assert (sample["tokens"], sample["labels"]) == chat(ASK, GOOD)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"chosen": "good"}, "columns: .* must be the name of one column for user"),
        ({"chosen": "good", "rejected": "bad", "label": "x"}, "columns: .* must be the name"),
        ({"chosen": "good", "rejected": "bad", "prompt": "a", "messages": "b"}, "columns: .* must"),
        ({"label": "x"}, "columns: .* must be the name"),
        ({"assistant": "good", "label": "x"}, "columns names no column for user"),
    ],
)
def test_columns_that_say_too_little_or_too_much(columns, says, make):
    with pytest.raises(ConfigError, match=says):
        make(NAMED["texts"][0], columns=columns)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"ask": "a", "good": "b"}, "there is no 'bad'; the keys are: ask, good"),
        ({"ask": "a", "good": "b", "bad": None}, "there is no rejected answer"),
        ({"ask": "a", "good": 3, "bad": "c"}, "chosen is int"),
        ({"ask": "", "good": "b", "bad": "c"}, "chosen has no prompt before it"),
    ],
)
def test_bad_rows_of_named_columns(row, says, make):
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    with pytest.raises(DataError, match=says):
        make(row, columns=columns)


def test_a_system_message_beside_is_in_both_sides(make, chat):
    system = {"role": "system", "content": "other"}
    expected = [chat(system, ASK, GOOD), chat(system, ASK, BAD)]
    assert sides(make({**ROW, "system": "other"})) == expected
    assert sides(make(ROW, system_prompt="other")) == expected


def test_answers_in_the_prompt_are_not_trained_on(make, chat):
    talk = [ASK, GOOD, ASK]
    dataset = make({"prompt": talk, "chosen": [GOOD], "rejected": [BAD]})
    assert sides(dataset) == [chat(*talk, GOOD), chat(*talk, BAD)]


def test_answers_after_the_first_that_differs_are_compared(make):
    row = {"chosen": [ASK, GOOD, ASK, GOOD], "rejected": [ASK, BAD, ASK, GOOD]}
    (tokens, labels), (others, _) = sides(make(row))
    assert tokens != others
    trained = np.array(labels) != -100
    assert np.diff(np.flatnonzero(np.diff(trained.astype(int)))).size  # more than one stretch
    assert without_padding(make(row)).labelled[0] > without_padding(make(ROW)).labelled[0]


def test_torchtunes_recipes_get_their_keys(make, chat):
    dataset = make(ROW, ROW)
    (chosen, labels), (rejected, _) = chat(ASK, GOOD), chat(ASK, BAD)
    assert dataset[1]["chosen_input_ids"] == chosen
    assert dataset[1]["chosen_labels"] == labels
    assert dataset[1]["rejected_input_ids"] == rejected
    tokens, _ = padded_collate_dpo([dataset[0], dataset[1]])
    assert tokens.shape == (4, max(len(chosen), len(rejected)))
    with pytest.raises(ConfigError, match="packed: torchtune"):
        make(ROW, packed=True, limit=32)[0]


def test_packs_hold_whole_pairs(make):
    rows = [{**ROW, "chosen": "other " * n} for n in range(1, 8)]
    single = without_padding(make(*rows))
    packs = without_padding(make(*rows, packed=True, limit=64))
    assert isinstance(packs, Packs)
    assert packs.size == 128
    assert sum(len(pack["lengths"]) for pack in packs) == 14
    row = concatenate([packs[i] for i in range(len(packs))])
    assert row["wanted"].tolist() == [True, False] * 7
    assert sum(row["lengths"]) == single.lengths.sum() == row["tokens"].shape[1]
    assert (row["labels"] != -100).sum() == single.labelled.sum()


def test_another_answer_comes_with_each_prompt(make):
    rows = [{"prompt": "other " * n, "completion": "the " * n, "label": n % 2} for n in range(1, 5)]
    dataset = make(*rows)
    dataset.has_mismatched = True
    for index in range(4):
        ((tokens, labels),) = sides(dataset, index)
        ((before, others),) = sides(dataset, index - 1)
        start, other = ([label != -100 for label in part].index(True) for part in (labels, others))
        expected = (tokens[:start] + before[other:])[: int(dataset.lengths.max())]
        found = dataset[index]["mismatched"]
        assert found["tokens"].tolist() == expected
        assert found["lengths"].tolist() == [len(expected)]
        assert found["labels"].tolist()[:start] == [-100] * start
    row = concatenate([dataset[0], dataset[1]])
    assert row["mismatched"]["tokens"].shape[1] == sum(row["mismatched"]["lengths"])


PROBLEMS = {
    "missing": ({**ROW, "rejected": None}, "there is no rejected answer"),
    "absent": ({"prompt": "the", "chosen": "other"}, "there is no rejected answer"),
    "no chosen": ({"prompt": "the", "rejected": "other", "chosen": None}, "no chosen answer"),
    "empty": ({**ROW, "chosen": " "}, "the chosen answer is empty"),
    "prompts": (
        {"chosen": [ASK, GOOD], "rejected": [{**ASK, "content": "the"}, BAD]},
        "different prompts: message 1 of chosen is user's",
    ),
    "ends early": ({"chosen": [ASK, GOOD, ASK, GOOD], "rejected": [ASK, GOOD]}, "rejected has"),
    "no list": ({**ROW, "rejected": 3}, "rejected: chosen is int"),
    "label": ({"prompt": "the", "completion": "other", "label": "perhaps"}, "expected true or"),
    "no label": ({"prompt": "the", "completion": "other"}, "no label; the keys are: prompt"),
    "two": (
        {"prompt": "the", "completion": "other", "label": True, "liked": True},
        "more than one label",
    ),
}


def test_what_is_read_of_a_labelled_answer_is_not_called_unread(make, caplog):
    make({**LABELLED["messages"], "label": True, "note": "x"})
    assert caplog.messages[-1].endswith("Not read: note")


def test_an_answer_that_is_not_the_last_turn_is_noticed_on_either_side(make):
    for side in ("chosen", "rejected"):
        row = {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
        row[side] = [*row[side], ASK]
        assert without_padding(make(row)).findings.counts == {NO_FINAL_ANSWER: 1}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_bad_pair_is_one_clear_error_or_is_counted(name, make):
    row, problem = PROBLEMS[name]
    good = ROW if "chosen" in row else {"prompt": "the", "completion": "other", "label": True}
    with pytest.raises(DataError, match=problem):
        make(good, row)
    dataset = without_padding(make(good, row, bad_rows="drop"))
    assert len(dataset) == 1
    assert dataset.findings.counts[UNUSABLE] == 1


def test_equal_answers_are_counted(make, caplog):
    same = {**ROW, "rejected": ROW["chosen"]}
    dataset = without_padding(make(ROW, same, ROW))
    assert len(dataset) == 2
    assert dataset.findings.counts[SAME_ANSWERS] == 1
    assert "1 of 3 rows have two answers that do not differ" in caplog.text
    with pytest.raises(DataError, match="no sample is left of 1 rows: 1 have two answers that"):
        make(same)


def test_pairs_and_single_answers_do_not_mix(make, tmp_path, folder):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "the", "completion": "other", "label": True}))
    (tmp_path / "pairs.jsonl").write_text(json.dumps(ROW))
    with pytest.raises(DataError, match="some rows have two answers and others one"):
        preference_dataset(phi3_tokenizer(folder), [str(tmp_path / "pairs.jsonl"), str(other)])


LONG = {
    "prompt": [{"role": "user", "content": "the " * 30}, GOOD, {**ASK, "content": "other " * 20}],
    "chosen": "the " * 4 + "other",
    "rejected": "the " * 4 + "the",
}


def test_the_prompt_is_cut_alike_on_both_sides_and_the_difference_stays(make, chat):
    row = {**LONG, "chosen": [{**GOOD, "content": LONG["chosen"]}]}
    row["rejected"] = [{**BAD, "content": LONG["rejected"]}]
    whole = sides(make(row))
    longest = max(len(tokens) for tokens, _ in whole)
    for limit in (longest - 1, longest // 2, 14):
        dataset = without_padding(make(row, limit=limit))
        assert dataset.findings.counts[TRUNCATED] == 1
        (chosen, labels), (rejected, others) = sides(dataset)
        assert max(len(chosen), len(rejected)) <= limit
        prompt, other = ([label != -100 for label in part].index(True) for part in (labels, others))
        assert chosen[:prompt] == rejected[:other]
        for (_, cut), (_, full) in zip(((0, labels), (0, others)), whole, strict=True):
            assert [x for x in cut if x != -100] == [x for x in full if x != -100]


def test_a_pair_whose_difference_is_cut_away_goes(make):
    row = {**ROW, "chosen": "the " * 40 + "other", "rejected": "the " * 40 + "the"}
    for truncate, kind in (("left", CUT_AWAY), ("right", CUT_AWAY), ("drop", TOO_LONG)):
        dataset = without_padding(make(ROW, row, limit=24, truncate=truncate))
        assert len(dataset) == 1
        assert dataset.findings.counts[kind] == 1
    assert len(dataset.lost) == 1


def test_one_prompt_is_held_out_with_all_its_pairs(make):
    rows = [{**ROW, "prompt": "the " * (n // 2), "chosen": "other " * n} for n in range(2, 22)]
    dataset = without_padding(make(*rows))
    kept, held = dataset.hold_out(0.2, 0)
    assert (len(kept), len(held)) == (16, 4)
    starts = [{tuple(sides(part, i)[0][0][:4]) for i in range(len(part))} for part in (kept, held)]
    assert len(kept.fingerprint) == 16
    assert kept.fingerprint != dataset.fingerprint
    assert starts[0]


def test_a_reference_comes_with_its_documents(make):
    dataset = without_padding(make(ROW, ROW, ROW))
    dataset.reference = np.arange(12, dtype=np.float32).reshape(2, 6)
    dataset.has_mismatched = True
    sample = dataset.select(np.array([2]))[0]
    assert sample["reference"].tolist() == [4, 5]
    assert sample["mismatched"]["reference"].tolist() == [10, 11]
    assert torch.is_tensor(concatenate([dataset[0], dataset[1]])["mismatched"]["reference"])


def test_an_inspection_shows_both_sides_and_their_difference(make, folder):
    dataset = without_padding(make(ROW, {**ROW, "rejected": "other"}))
    shown = show(dataset, [0], phi3_tokenizer(folder))
    assert [one.where.rpartition(", ")[2] for one in shown] == ["chosen", "rejected"]
    assert [one.trained for one in shown] == [
        int((np.array(x) != -100).sum()) for _, x in sides(dataset)
    ]
    assert "".join(unit.text for unit in shown[0].units if unit.trained) == " other the<|end|>"
    assert shown[0].difference == ""
    assert shown[1].difference == "' the the' in place of ' other'"
    assert pairs_of(dataset) == (7, 5, 1.0)
    assert len(dataset.single()) == 4
    (one,) = show(
        make({"prompt": "the", "completion": "other", "label": 0}), [0], phi3_tokenizer(folder)
    )
    assert one.where.endswith(", bad answer")
