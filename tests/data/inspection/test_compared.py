"""Samples beside another tokenization of the same conversations."""

import json

import pytest

from phi3_plugin.data import chat_dataset
from phi3_plugin.inspect import Compared, as_trained, compare, conversations, difference, marked

OURS = [1, 2, 3], [False, True, True]


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (OURS, ""),
        (([1, 9, 3], OURS[1]), "token 1 has id 2 here, 9 there"),
        ((OURS[0], [False, False, True]), "token 1 has trained True here, False there"),
        (([1, 2], OURS[1][:2]), "3 tokens here, 2 there"),
    ],
)
def test_where_two_begin_to_differ(theirs, said):
    assert difference(OURS, theirs) == said


def test_differences_are_counted_and_the_first_are_named():
    pairs = [(f"chats.jsonl:{n}", OURS, ([n, 2, 3], OURS[1])) for n in range(9)]
    found = compare(iter(pairs))
    assert found == Compared(9, 8, found.places) and len(found.places) == 5
    assert found.places[0] == "chats.jsonl:0: token 0 has id 1 here, 0 there"


def test_options_of_the_data_set_are_followed():
    def done(**options):
        return as_trained(OURS, limit=None, options=options, eos_id=7)

    assert done() == ([1, 2, 3], [False, True, True])
    assert done(add_eos=True) == ([1, 2, 3, 7], [False, True, True, False])
    assert done(add_eos=True, train_on="all") == ([1, 2, 3, 7], [False, True, True, True])
    first = as_trained(([1, 7], [True, True]), limit=1, options={"add_eos": True}, eos_id=7)
    assert first == ([1], [False])


def test_the_messages_that_samples_were_made_of(tokenizer, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "no answer"}]},
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join([*map(json.dumps, rows), "{broken"]))
    ((where, messages),) = conversations(tokenizer, {"source": str(file), "system_prompt": "s"})
    assert where == f"{file}:1"
    assert [(m["role"], m["content"], m["trained"]) for m in messages] == [
        ("system", "s", False),
        ("user", "a", False),
        ("assistant", "b", True),
    ]


def test_a_sample_as_it_is_compared(tokenizer, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}))
    dataset = chat_dataset(tokenizer, tmp_path / "pairs.jsonl", cache_dir=tmp_path / "cache")
    ids, trained = marked(dataset, 0)
    assert ids == dataset[0]["tokens"]
    assert trained == [label != -100 for label in dataset[0]["labels"]]
