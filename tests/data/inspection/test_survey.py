"""One pass over the samples: what it counts, and what it takes for the same."""

import numpy as np
import pytest

from phi3_plugin.errors import DataError
from phi3_plugin.inspect import Alike, alike, survey

STOP = 9


class Rows(list):
    """Samples of ids and whether each is trained on; a place for each."""

    def __init__(self, *samples, places=None):
        super().__init__(samples)
        self.names = places or [f"chats.jsonl:{n}" for n in range(1, len(samples) + 1)]

    def __getitem__(self, index):
        ids, trained = super().__getitem__(index)
        labels = [i if counts else -100 for i, counts in zip(ids, trained, strict=True)]
        return {"tokens": ids, "labels": labels}

    def places(self, index):
        return self.names[index]


def test_what_is_counted():
    rows = Rows(([1, 2, 3, STOP], [0, 0, 1, 1]), ([1, 2], [0, 1]), ([4], [0]))
    found = survey(rows, [STOP])
    assert found.lengths.tolist() == found.full.tolist() == [4, 2, 1]
    assert found.labelled.tolist() == [2, 1, 0]
    assert found.first.tolist() == [2, 1, 1]
    assert found.stops.tolist() == [True, False, False]
    assert found.places == ["chats.jsonl:1", "chats.jsonl:2", "chats.jsonl:3"]


def test_a_turn_end_that_is_only_read_teaches_no_stopping():
    assert survey(Rows(([1, STOP, 2], [0, 0, 1])), [STOP]).stops.tolist() == [False]


def test_copies_and_other_answers():
    answer = [0, 0, 1]
    rows = Rows(([1, 2, 3], answer), ([1, 2, 4], answer), ([1, 2, 3], answer), ([5, 6, 7], answer))
    pairs = [("chats.jsonl:1", "chats.jsonl:3")]
    assert alike(survey(rows, [STOP])) == Alike(copies=1, pairs=pairs, answers=2)


def test_what_every_conversation_begins_with_is_no_prompt():
    every = [0, 1, 1]  # as with train_on=all
    rows = Rows(([1, 2, 3], every), ([1, 2, 4], every), ([1, 5, 6], every))
    assert alike(survey(rows, [STOP])) == Alike(0, [], 0)


def test_a_row_that_is_seen_twice_on_purpose_is_no_copy():
    rows = Rows(*[([1, 2], [0, 1])] * 3, places=["a:1", "a:1", "a:1"])
    assert alike(survey(rows, [STOP])) == Alike(0, [], 0)


def test_equal_ids_in_other_places_are_not_equal_samples():
    rows = Rows(([1, 2, 3], [0, 1, 1]), ([1, 2, 3, 0], [0, 1, 1, 1]))
    found = survey(rows, [STOP])
    assert found.content[0] != found.content[1] and found.prompt[0] == found.prompt[1]


def test_what_a_chat_data_set_offers_is_used():
    rows = Rows(([1, 2], [0, 1]))
    rows.full = np.array([7], dtype=np.int32)
    rows.arrays = lambda i: (np.array([1, 2], np.int32), np.array([-100, 2], np.int32))
    found = survey(rows, [STOP])
    assert found.full.tolist() == [7] and found.lengths.tolist() == [2]


def test_any_data_set_will_do():
    assert survey([{"tokens": [1, 2], "labels": [-100, 2]}], [STOP]).places == ["sample 0"]


def test_an_empty_data_set_is_refused():
    with pytest.raises(DataError, match="there is no sample in it"):
        survey([], [STOP])
