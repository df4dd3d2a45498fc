"""What is left of conversations that are too long, against whole conversations."""

import json

import pytest

from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.data.formats import CUT_AWAY, TOO_LONG, TRUNCATED
from phi3_plugin.data.tokenizer import Encoder
from phi3_plugin.errors import ConfigError, DataError

SYSTEM = ("system", "s s s")
TALK = [("user", "a a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
TALK += [("assistant", "f f")]
LONG = [("user", "the " * 30), ("assistant", "g g")]


@pytest.fixture
def make(tmp_path, folder):
    def build(*chats, limit=None, **options):
        file = tmp_path / "chats.json"
        keys = ("role", "content")
        rows = [{"messages": [dict(zip(keys, t, strict=True)) for t in chat]} for chat in chats]
        file.write_text(json.dumps(rows))
        return chat_dataset(phi3_tokenizer(folder, max_seq_len=limit), file, **options)

    return build


def length(dataset, index=0):
    return len(dataset[index]["tokens"])


def test_right_keeps_the_start(make):
    whole, cut = make([SYSTEM, *TALK]), make([SYSTEM, *TALK], limit=20)
    assert cut[0] == {key: values[:20] for key, values in whole[0].items()}
    assert cut.full.tolist() == [length(whole)] and cut.lengths.tolist() == [20]
    assert cut.findings.counts == {TRUNCATED: 1}


@pytest.mark.parametrize("left_out", [1, 2])
@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_left_drops_the_oldest_exchanges_and_keeps_the_system_prompt(make, left_out, system):
    expected = make([*system, *TALK[2 * left_out :]])
    limit = length(expected)
    cut = make([*system, *TALK], limit=limit, truncate="left")
    assert cut[0] == expected[0]
    assert cut.findings.places == {
        TRUNCATED: [(cut.places(0), f"{length(make([*system, *TALK]))} tokens")]
    }
    # A token more changes nothing, one less takes another exchange
    assert make([*system, *TALK], limit=limit + 1, truncate="left")[0] == expected[0]
    if left_out == 1:
        shorter = make([*system, *TALK], limit=limit - 1, truncate="left")
        assert shorter[0] == make([*system, *TALK[4:]])[0]


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_left_cuts_the_question_where_one_exchange_is_too_long(make, system):
    cut = make([*system, *TALK, *LONG], limit=30, truncate="left")[0]
    whole = [make([*system, ("user", "the " * n), LONG[1]]) for n in range(31)]
    fitting = [dataset[0] for dataset in whole if length(dataset) <= 30]
    # Parts of a word may take more tokens than the word
    assert len(fitting[-1]["tokens"]) - 3 <= len(cut["tokens"]) <= 30
    question, answer = LONG
    ends = [make([*system, (question[0], question[1][-n:]), answer])[0] for n in range(1, 121)]
    assert cut in ends


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_left_cuts_the_end_of_an_answer_that_is_too_long(make, system):
    chat = [*system, ("user", "a"), ("assistant", "the " * 60)]
    assert make(chat, limit=30, truncate="left")[0] == make(chat, limit=30)[0]


def test_left_drops_a_greeting_first(make):
    greeted = [("assistant", "the " * 40), *TALK[:2]]
    expected = make(TALK[:2])
    assert make(greeted, limit=length(expected), truncate="left")[0] == expected[0]


def test_left_is_quick_where_many_exchanges_go(make, monkeypatch):
    encoded = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, c: encoded.append(c) or encode(self, c))
    make(TALK * 100, limit=30, truncate="left")
    assert len(encoded) < 12


def test_left_keeps_the_end_of_a_text(make, tmp_path, folder):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "the " * 40}))
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


def test_what_loses_its_answer_is_counted(make):
    dataset = make(LONG, TALK[:2], limit=20)
    assert len(dataset) == 1
    assert dataset.findings.counts == {CUT_AWAY: 1}
    assert dataset.lost.tolist() == [length(make(LONG))]


@pytest.mark.parametrize("value", ["end", None, True])
def test_bad_truncate(make, value):
    with pytest.raises(ConfigError, match=r"dataset\.truncate: .* one of: right, left, drop"):
        make(TALK, truncate=value)
