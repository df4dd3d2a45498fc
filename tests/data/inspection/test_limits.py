"""What a limit costs, against what a run with that limit loses."""

import json

import numpy as np
import pytest

from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.inspect import Cut, cuts, survey
from tests.data.inspection.test_survey import STOP, Rows

NONE = np.array([], dtype=np.int64)
LENGTHS = ((700, 80), (30, 900), (20, 20), (60, 500), (1100, 30))
"""Letters of question and answer; some answers begin late."""


def samples_of(*full, limit=None, first=1):
    """Survey samples of which the first tokens are only read, cut at a limit."""
    rows = Rows(
        *[([1] * n, [0] * first + [1] * (n - first)) for n in (min(n, limit or n) for n in full)]
    )
    rows.full = np.array(full)
    return survey(rows, [STOP])


def by_limit(*args, **kwargs):
    return {cut.limit: cut for cut in cuts(*args, **kwargs)}


def test_at_the_usual_lengths_and_yours():
    samples = samples_of(100, 600, 1300, limit=1000)
    found = by_limit(samples, NONE, {1000: "yours"}, limit=1000)
    assert list(found) == [512, 1000, 1024, 2048, 4096]
    assert found[512] == Cut(512, 2 / 3, pytest.approx((88 + 788) / 2000), "")
    assert found[1000] == Cut(1000, 1 / 3, pytest.approx(300 / 2000), "yours")
    assert found[2048] == Cut(2048, 0.0, 0.0, "")


def test_answers_that_begin_behind_a_limit_are_lost_whole():
    found = by_limit(samples_of(1000, first=600), NONE, {}, limit=None)
    assert found[512] == Cut(512, 1.0, 1.0, "")
    found = by_limit(samples_of(400), np.array([600]), {500: "yours"}, limit=500)
    assert found[500] == Cut(500, 0.5, pytest.approx(0.6), "yours")
    assert found[512] == Cut(512, 0.5, pytest.approx(0.088), "", least=True)
    assert found[1024] == Cut(1024, 0.0, 0.0, "")


def test_what_no_limit_could_save_is_no_loss_of_one():
    found = by_limit(samples_of(400), np.array([1]), {500: "yours"}, limit=500)
    assert found[500] == Cut(500, 0.0, 0.0, "yours") and found[1024].tokens == 0


def test_dropped_samples_are_lost_whole():
    found = by_limit(samples_of(100, 300), np.array([600]), {500: ""}, limit=500, truncate="drop")
    assert found[500] == found[512]._replace(limit=500) == Cut(500, 1 / 3, pytest.approx(0.6), "")
    assert found[1024] == Cut(1024, 0.0, 0.0, "")


@pytest.fixture
def surveyed(folder, tmp_path):
    """Survey conversations as a run with a limit has them."""
    turns = [
        [{"role": "user", "content": "q" * q}, {"role": "assistant", "content": "a" * a}]
        for q, a in LENGTHS
    ]
    chats = [*turns, [*turns[0], *turns[1]], [*turns[2], *turns[3], *turns[0]]]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))

    def run(limit, truncate):
        tokenizer = phi3_tokenizer(folder, max_seq_len=limit)
        cache = tmp_path / "cache"
        dataset = chat_dataset(tokenizer, file, truncate=truncate, cache_dir=cache)
        return survey(dataset, tokenizer.stop_tokens), dataset.lost

    return run


@pytest.mark.parametrize("truncate", ["right", "left", "drop"])
@pytest.mark.parametrize("limit", [None, 300, 512, 800, 1024])
def test_the_loss_is_that_of_a_run(surveyed, truncate, limit):
    named = {} if limit is None else {limit: "yours"}
    for cut in cuts(*surveyed(limit, truncate), named, limit=limit, truncate=truncate):
        samples, lost = surveyed(cut.limit, truncate)
        total = samples.full.sum() + lost.sum()
        true = 1 - samples.lengths.sum() / total
        assert cut.tokens == pytest.approx(true) or (cut.least and cut.tokens < true)
        over = (samples.full > cut.limit).sum() + (lost > cut.limit).sum()
        assert cut.samples == pytest.approx(over / (len(samples.full) + len(lost)))
        if truncate == "drop" or cut.limit == limit or not over:
            assert not cut.least
