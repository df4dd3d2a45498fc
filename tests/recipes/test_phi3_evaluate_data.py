"""Which samples are evaluated, and what is asked of each."""

import json

import pytest

from phi3_plugin import evaluate as data
from phi3_plugin import settings as strict
from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.errors import DataError
from phi3_plugin.train.feed import build
from tests.own import TINY, chat, merged


@pytest.fixture
def tokenizer(cwd):
    return phi3_tokenizer(cwd / "base")


@pytest.fixture
def held(cwd):
    """Return what is evaluated with such settings, and rows if they are given."""

    def get(*settings, rows=None, limit=None, positions=1000):
        if rows is not None:
            (cwd / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            settings = ("dataset.source=own.jsonl", *settings)
        s = strict.read(merged(*TINY, "output_dir=eval", *settings, cwd=cwd))
        return data.held(s, build(s.tokenizer), limit=limit, positions=positions)

    return get


def message(role, content, **rest):
    return {"role": role, "content": content, **rest}


def conversation(*messages):
    return {"messages": list(messages)}


def test_all_of_a_data_set(held, cwd):
    found = held()
    assert found.evaluated == f"40 samples of {cwd / 'rows.jsonl'}, the whole data set."
    dataset = chat_dataset(phi3_tokenizer(cwd / "base", 96), str(cwd / "rows.jsonl"))
    assert [item.trained for item in found.items] == [dataset[i] for i in range(40)]
    for number, item in enumerate(found.items):
        assert item.sample.reference == chat(number)["messages"][1]["content"]
        assert item.sample.tokens == dataset.labelled[number]
        assert item.trained["tokens"][: len(item.prompt)] == item.prompt


def test_the_same_is_held_out_as_in_training(held, cwd):
    for packed in ("dataset.packed=True", "dataset.packed=False"):
        s = strict.read(merged(*TINY, "output_dir=x", "val_fraction=0.2", "seed=3", cwd=cwd))
        dataset = chat_dataset(phi3_tokenizer(cwd / "base", 96), str(cwd / "rows.jsonl"))
        part = dataset.hold_out(s.val_fraction, s.seed)[1]
        found = held("val_fraction=0.2", "seed=3", packed)
        places = [item.sample.where for item in found.items]
        assert places == [part.places(i) for i in range(len(part))] and len(places) < 40


def test_the_first_samples(held):
    found = held(limit=3)
    assert len(found.items) == 3 and found.evaluated.startswith("The first 3 of 40 samples of ")
    assert len(held(limit=300).items) == 40


def test_a_weight_repeats_nothing(held, cwd):
    source = "{source: " + str(cwd / "rows.jsonl") + ", weight: 2.5}"
    s = strict.read(merged(*TINY, "output_dir=x", cwd=cwd))
    s.dataset["source"] = [{"source": str(cwd / "rows.jsonl"), "weight": 2.5}]
    found = data.held(s, build(s.tokenizer), limit=None, positions=1000)
    assert len(found.items) == 40, source
    assert all(item.prompt for item in found.items)


def test_the_last_answer_is_asked_for(held, tokenizer):
    messages = [
        message("system", "one"),
        message("user", "two"),
        message("assistant", "three"),
        message("user", "four"),
        message("assistant", "five"),
        message("user", "six"),
    ]
    (item,) = held(rows=[conversation(*messages)]).items
    assert item.sample.reference == "five"
    assert item.sample.prompt == (
        "<|system|>\none<|end|>\n<|user|>\ntwo<|end|>\n<|assistant|>\nthree<|end|>\n"
        "<|user|>\nfour<|end|>\n<|assistant|>\n"
    )
    assert tokenizer.decode(item.prompt, False).count("three") == 1


def test_a_prompt_is_whole_where_training_cuts_it(held):
    long = conversation(message("user", "two " * 100), message("assistant", "three " * 90))
    row = conversation(message("user", "one"), message("assistant", "three " * 200))
    found = held("dataset.bad_rows=drop", rows=[long, row, chat(1)])
    cut, short = found.items
    assert len(cut.trained["tokens"]) == 96 and cut.sample.reference.count("three") == 200
    assert short.sample.reference == "four five six seven"


def test_what_is_too_long_is_told(held, cwd):
    asked, filler = message("user", "one"), "two three " * 60
    rows = [
        conversation(asked, message("assistant", "two")),
        conversation(asked, message("assistant", filler)),
        conversation(message("user", filler), message("assistant", "two")),
    ]
    found = held(rows=rows)
    assert len(found.items) == 2 and found.items[1].sample.reference == filler
    assert found.evaluated == (
        f"2 samples of {cwd / 'own.jsonl'}, the whole data set. "
        "Cut at tokenizer.max_seq_len for the loss: 1. "
        "Left out, with no answer within tokenizer.max_seq_len: 1 more."
    )


def test_several_sources_are_named(held, cwd):
    file = cwd / "rows.jsonl"
    section = ("_component_=phi3_plugin.data.chat_dataset", f"source=[{file},{file}]")
    found = held(*(f"dataset_val.{part}" for part in section))
    assert f" of {file}, {file}, set as dataset_val" in found.evaluated


def test_a_system_prompt_of_the_run(held):
    found = held("dataset.system_prompt=seven", limit=1)
    assert found.items[0].sample.prompt.startswith("<|system|>\nseven<|end|>\n<|user|>")


def test_what_cannot_be_asked_is_told_and_still_has_a_loss(held):
    rows = [
        conversation(message("assistant", "one two")),
        conversation(message("user", "two " * 30), message("assistant", "three")),
        chat(1),
    ]
    first, long, good = held(rows=rows, positions=25).items
    assert first.sample.unasked == data.NO_ANSWER and first.prompt == []
    assert "tokens, and the model 25 positions for prompt and answer" in long.sample.unasked
    assert good.sample.unasked == "" and good.prompt
    assert all(item.sample.tokens for item in (first, long, good))


def test_no_answers_are_wanted(held):
    found = held(limit=2, positions=None)
    assert all(item.prompt == [] and item.sample.unasked == "" for item in found.items)


@pytest.mark.parametrize(
    ("labels", "prompt", "said"),
    [
        ([-100, -100, 7, 8], [5, 6], [7, 8]),
        ([-100, 6, -100, 8], [5, 6, 7], [8]),
    ],
)
def test_without_messages_labels_tell(tokenizer, labels, prompt, said):
    found = data.last_labelled([5, 6, 7, 8], labels, tokenizer)
    assert found == (prompt, tokenizer.decode(prompt, False), tokenizer.decode(said))


@pytest.mark.parametrize("labels", [[-100] * 4, [-100, 6, 7, 8], [5, 6, 7, 8]])
def test_labels_that_leave_no_prompt(tokenizer, labels):
    with pytest.raises(DataError, match="no answer"):
        data.last_labelled([5, 6, 7, 8], labels, tokenizer)


def test_a_data_set_of_the_users_own(held, tmp_path, monkeypatch):
    (tmp_path / "rows_of_my_own.py").write_text(
        "def rows(tokenizer, source=None):\n"
        "    return [{'tokens': [5, 6, 7, 8], 'labels': [-100, -100, 7, 8]}] * 10\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = held("dataset._component_=rows_of_my_own.rows", "val_fraction=0.2")
    assert len(found.items) == 2 and found.items[0].prompt == [5, 6]
    assert found.items[0].sample.where == "sample 0"
