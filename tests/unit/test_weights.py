"""How much the loss counts each token: what rows and messages say, in store, packs and batches."""

import json
import logging

import numpy as np
import pytest
import torch

from phi3_plugin.data import chat_dataset, phi3_tokenizer, preference_dataset, text_dataset
from phi3_plugin.data.collate import IGNORED, concatenate, pad_right
from phi3_plugin.data.findings import UNUSABLE, WEIGHTED, WEIGHTLESS
from phi3_plugin.data.packing import without_padding
from phi3_plugin.errors import DataError
from phi3_plugin.train.step import with_targets

NAN = float("nan")


def row(number, **beside):
    return {"question": "the " * number, "answer": f"other {number}", **beside}


@pytest.fixture
def make(tmp_path, folder):
    def build(rows, *, name="rows.jsonl", limit=None, kind=chat_dataset, **options):
        (tmp_path / name).write_text("\n".join(json.dumps(one) for one in rows), "utf-8")
        return kind(phi3_tokenizer(folder, limit), tmp_path / name, **options)

    return build


def said(dataset, n=0):
    """Return the weights of what is trained on, those that follow each other as one."""
    sample = dataset[n]
    trained = [
        w for w, label in zip(sample["weights"], sample["labels"], strict=True) if label != IGNORED
    ]
    return [w for n, w in enumerate(trained) if n == 0 or trained[n - 1] != w]


def test_rows_say_how_much_they_count(make, caplog):
    weights = [{}, {"weight": 0.5}, {"weight": 3}, {"weight": None}, {"weight": "2.5"}]
    rows = [row(n + 1, **beside) for n, beside in enumerate(weights)]
    with caplog.at_level(logging.WARNING):
        dataset = make(rows)
    assert [said(dataset, n) for n in range(5)] == [[1.0], [0.5], [3.0], [1.0], [2.5]]
    assert dataset.findings.counts[WEIGHTED] == 3
    (line,) = caplog.messages
    assert "3 of 5 rows have a weight other than 1" in line and line.endswith("rows.jsonl:2: 0.5")
    plain = make([row(n + 1) for n in range(5)])
    assert "weights" not in plain[0]
    assert [plain[n]["labels"] for n in range(5)] == [dataset[n]["labels"] for n in range(5)]


def test_other_weights_are_other_data_and_the_cache_keeps_them(make):
    rows = [row(1), row(2, weight=2)]
    first = make(rows)
    again = make(rows)
    assert again.store.folder == first.store.folder and again.store.is_intact()
    assert [said(again, n) for n in range(2)] == [[1.0], [2.0]]
    other = make([row(1), row(2, weight=3)])
    assert len({first.fingerprint, other.fingerprint, make([row(1), row(2)]).fingerprint}) == 3
    (first.store.folder / "weights.bin").write_bytes(b"1234")
    assert make(rows).store.samples["weight"].tolist() == [1, 2]


TALK = [
    {"role": "user", "content": "a", "weight": 7},
    {"role": "assistant", "content": "b", "weight": 0.25},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d", "weight": 0},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "f", "weight": 1},
]


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [("assistant", [0.5, 2.0]), ("marked", [14.0, 0.5, 2.0]), ("last", [2.0]), ("all", [2.0])],
)
def test_messages_and_rows_multiply(make, train_on, expected):
    dataset = make([{"messages": TALK, "weight": 2}, {"messages": TALK[1:3]}], train_on=train_on)
    assert said(dataset) == expected


def test_an_answer_and_the_token_that_ends_it_count_alike(make):
    dataset = make([{"messages": TALK}])
    sample = dataset[0]
    end = phi3_tokenizer_end(sample, dataset)
    assert end == [0.25, 1.0]
    store = dataset.store
    assert store.samples["uneven"].tolist() == [True] and store.is_intact()
    assert (store.folder / "weights.bin").stat().st_size == 4 * len(sample["tokens"])


def phi3_tokenizer_end(sample, dataset):
    """Return the weights of the last trained token of each answer."""
    labels = np.array(sample["labels"]) != IGNORED
    ends = np.flatnonzero(labels & ~np.append(labels[1:], False))
    return [sample["weights"][end] for end in ends]


def test_a_row_of_weight_zero_is_counted_whatever_it_holds(make):
    dataset = make([row(1), row(2, weight=0), {"question": 1, "answer": None, "weight": 0.0}])
    assert len(dataset) == 1 and dataset.findings.counts == {WEIGHTLESS: 2}


@pytest.mark.parametrize(
    "bad", [-1, NAN, float("inf"), 1e39, 10**400, "heavy", "nan", "-1", True, [1], {"a": 1}]
)
def test_what_is_no_weight_is_an_error_or_counted(make, bad, tmp_path, folder):
    rows = [row(1), row(2, weight=bad)]
    if bad == bad and bad != float("inf"):  # JSON has no such number
        with pytest.raises(DataError, match=r"rows.jsonl:2: weight is .* expected a number from 0"):
            make(rows)
        assert make(rows, bad_rows="drop").findings.counts == {UNUSABLE: 1}
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"question": ["a", "b"], "answer": ["c", "d"], "weight": [1.0, bad]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"weight is .* expected a number from 0"):
        chat_dataset(phi3_tokenizer(folder), tmp_path / "rows.parquet")


def test_a_column_of_another_name_and_one_that_is_something_else(make, caplog):
    rows = [{"ask": "a", "reply": "b", "w": 0.5, "weight": "72 kg"}]
    columns = {"user": "ask", "assistant": "reply"}
    with caplog.at_level(logging.WARNING):
        assert said(make(rows, columns={**columns, "weight": "w"})) == [0.5]
        assert "weights" not in make(rows, columns=columns)[0]
    assert caplog.messages[-1].endswith("Not read: w, weight")
    listed = [{"chat": TALK[2:3] + TALK[-1:], "w": "0.5"}]
    assert said(make(listed, columns={"messages": "chat", "weight": "w"})) == [0.5]
    capitals = [{"Question": "a", "Answer": "b", "Weight": 4}]
    assert said(make(capitals)) == [4.0]


def test_rows_of_one_turn_each(make):
    texts = [("user", "a", 1), ("assistant", "b", 0.5), ("user", "c", 1), ("assistant", "d", 2)]
    rows = [
        {"conversation_id": 1, "role": role, "content": text, "weight": weight}
        for role, text, weight in texts
    ]
    assert said(make(rows)) == [0.5, 2.0]


def test_documents_have_weights_too(make):
    rows = [{"text": "one two three", "weight": 0.5}, {"text": "four"}]
    dataset = make(rows, kind=text_dataset, limit=3)
    assert len(dataset) > 2 and said(dataset) == [0.5] and said(dataset, len(dataset) - 1) == [1.0]
    assert dataset.findings.counts[WEIGHTED] == 1


def test_pairs_have_none(make, caplog):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "weight": 2}
    with caplog.at_level(logging.WARNING):
        dataset = without_padding(make([pair], kind=preference_dataset))
    assert caplog.messages[-1].endswith("Not read: weight")
    assert not dataset.store.is_weighted and "weights" not in dataset[0]
    heavy = {"role": "assistant", "content": "b", "weight": 2}
    pair = {"prompt": "a", "chosen": [heavy], "rejected": [{**heavy, "content": "c"}]}
    assert not without_padding(make([pair], kind=preference_dataset)).store.is_weighted


@pytest.mark.parametrize("truncate", ["right", "left"])
def test_what_is_cut_keeps_its_weights(make, truncate):
    long = [dict(one, content=f"{one['content']} the the the") for one in TALK]
    whole = make([{"messages": long, "weight": 2}], limit=None)
    cut = make([{"messages": long, "weight": 2}], limit=30, truncate=truncate)
    assert len(cut[0]["tokens"]) <= 30 < len(whole[0]["tokens"])
    assert said(cut) == ([0.5] if truncate == "right" else [2.0])


@pytest.mark.parametrize("split", [False, True])
def test_packs_and_batches_keep_each_token_its_weight(make, split):
    weights = [0.5, 1, 2, 3]
    rows = [{"messages": TALK[2:3] * n + TALK[-1:], "weight": w} for n, w in enumerate(weights, 1)]
    rows.append({"messages": TALK})
    alone = make(rows)
    packed = without_padding(make(rows, limit=40, packed=True, split_documents=split))
    expected = []
    for n in range(len(alone)):
        sample = alone[n]
        expected += [*zip(sample["tokens"], sample["labels"], sample["weights"], strict=True)]
    found = []
    for n in range(len(packed)):
        batch = concatenate([packed[n]])
        found += [
            *zip(
                *(batch[name][0].tolist() for name in ("tokens", "labels", "weights")), strict=True
            )
        ]
    if split:  # the first token behind a cut is not trained on
        found, expected = ([(t, w) for t, _, w in side] for side in (found, expected))
    assert sorted(found) == sorted(expected)
    for collate in (concatenate, pad_right):
        batch = with_targets(collate([alone[n] for n in range(len(alone))]))
        pairs = [
            (label, weight)
            for n in range(len(alone))
            for label, weight in zip(alone[n]["labels"], alone[n]["weights"], strict=True)
            if label != IGNORED
        ]
        assert [*zip(batch["targets"].tolist(), batch["weights"].tolist(), strict=True)] == pairs
        assert batch["weights"].dtype == torch.float32
