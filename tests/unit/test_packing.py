"""Plans of packs: every token once, little room left, the same wherever they are made."""

from hashlib import sha256
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.data.packing import CARRIED, Packs, plan_packs
from phi3_plugin.errors import DataError
from tests import warm
from tests.assets import assets_dir
from tests.chosen import some

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=80)
BUFFERS = st.integers(1, 90)


def sizes(seed=0, count=2000, longest=512):
    return np.random.RandomState(seed).randint(1, longest, count).astype(np.int32)


def packs(planned):
    """Return each pack's pieces: document, first token, length."""
    pieces = list(zip(planned.documents, planned.starts, planned.lengths, strict=True))
    return [pieces[a:b] for a, b in zip(planned.borders, planned.borders[1:], strict=False)]


@given(LENGTHS, st.integers(40, 64), BUFFERS, st.integers(0, 3))
def test_every_document_whole_and_once(lengths, size, buffer, seed):
    planned = plan_packs(lengths, size, seed=seed, buffer=buffer)
    assert sorted(planned.documents.tolist()) == list(range(len(lengths)))
    assert planned.lengths.tolist() == [lengths[i] for i in planned.documents]
    assert not planned.starts.any()
    filled = [sum(length for _, _, length in pack) for pack in packs(planned)]
    assert filled == planned.summed(planned.lengths).tolist()
    assert all(0 < tokens <= size for tokens in filled)
    assert planned.waste == pytest.approx(1 - sum(filled) / (len(planned) * size))


@given(LENGTHS, st.integers(1, 64), st.integers(0, 3))
def test_split_documents_leave_room_in_one_pack_only(lengths, size, seed):
    planned = plan_packs(lengths, size, seed=seed, split_documents=True)
    filled = sorted(planned.summed(planned.lengths).tolist())
    assert filled[1:] == [size] * (len(filled) - 1)
    assert sum(filled) == sum(lengths)
    tokens = [[] for _ in lengths]
    for document, start, length in sorted(piece for pack in packs(planned) for piece in pack):
        tokens[document] += range(start, start + length)
    assert tokens == [list(range(length)) for length in lengths]


@given(LENGTHS, st.integers(0, 3), st.data())
def test_some_packs_of_a_plan(lengths, seed, data):
    planned = plan_packs(lengths, 40, seed=seed, split_documents=True)
    chosen = data.draw(st.permutations(range(len(planned))))[::2]
    some = planned.select(np.array(chosen, dtype=np.int64))
    assert packs(some) == [packs(planned)[i] for i in chosen]


@given(LENGTHS, st.integers(0, 3))
def test_no_two_packs_would_fit_into_one(lengths, seed):
    """Else the document that opened the later one would have gone into the earlier one."""
    planned = plan_packs(lengths, 40, seed=seed)
    filled = sorted(planned.summed(planned.lengths).tolist())
    assert len(filled) == 1 or filled[0] + filled[1] > 40


def test_best_fit_and_longest_first():
    """By hand: 6 opens a pack, 5 another, 4 fills the first, 3 goes where the least is left."""
    planned = plan_packs([3, 6, 4, 5, 2], 10, seed=0)
    found = sorted(sorted(int(length) for _, _, length in pack) for pack in packs(planned))
    assert found == [[2, 3, 5], [4, 6]]
    assert planned.waste == 0


def test_a_plan_depends_on_seed_and_lengths_and_on_nothing_else(tmp_path):
    """Another process hashes texts otherwise."""
    code = """
import hashlib
import numpy as np
from phi3_plugin.data.packing import plan_packs
lengths = np.random.RandomState(0).randint(1, 512, 2000).astype(np.int32)
for split in (False, True):
    planned = plan_packs(lengths, 512, seed=7, split_documents=split)
    print(hashlib.sha256(planned.documents.tobytes() + planned.borders.tobytes()).hexdigest())
"""
    expected = [plan_packs(sizes(), 512, seed=7, split_documents=split) for split in (False, True)]
    hashes = [sha256(p.documents.tobytes() + p.borders.tobytes()).hexdigest() for p in expected]
    assert warm.run("python", "-c", code, cwd=tmp_path).stdout.split() == hashes
    assert plan_packs(sizes(), 512, seed=8).documents.tolist() != expected[0].documents.tolist()


def test_a_recorded_plan():
    """So that a run goes on with the same packs under another version of numpy."""
    planned = plan_packs([3, 6, 4, 5, 2, 6, 1, 7], 10, seed=3)
    assert planned.documents.tolist() == [1, 2, 4, 5, 6, 3, 0, 7]
    assert planned.borders.tolist() == [0, 2, 5, 6, 8]


def test_packs_are_not_in_the_order_of_their_documents_lengths():
    planned = plan_packs(sizes(), 512, seed=0)
    longest = [max(length for _, _, length in pack) for pack in packs(planned)]
    half = len(longest) // 2
    assert abs(np.mean(longest[:half]) - np.mean(longest[half:])) < 30
    first = [pack[0][2] == max(n for _, _, n in pack) for pack in packs(planned) if len(pack) > 1]
    assert 0.2 < np.mean(first) < 0.8


def test_what_a_buffer_leaves_open_the_next_one_fills():
    lengths = sizes(count=4000)
    filled = plan_packs(lengths, 512, seed=0, buffer=100)
    assert filled.waste < 0.05
    assert plan_packs(lengths, 512, seed=0).waste <= filled.waste
    assert len(lengths) > CARRIED  # so that some are closed with room left


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([], "there is no document to pack"),
        ([2, 0], "document 1 has no tokens. Leave it out"),
        ([2, 11, 3], r"document 1 has 11 tokens, a pack has room for 10\. Cut documents to"),
    ],
)
def test_what_cannot_be_packed(lengths, message):
    with pytest.raises(DataError, match=message):
        plan_packs(lengths, 10, seed=0)


def test_a_plan_is_small():
    planned = plan_packs(sizes(count=20000), 2048, seed=0)
    arrays = (planned.documents, planned.starts, planned.lengths, planned.borders)
    assert sum(array.nbytes for array in arrays) < 20000 * 20


@pytest.mark.assets
@pytest.mark.parametrize(
    "file",
    some(["gsm8k_train.jsonl", "oasst_en_100_messages.jsonl"], {"oasst_en_100_messages.jsonl"}),
)
def test_real_conversations_leave_little_room(file):
    folder = assets_dir()
    tokenizer = phi3_tokenizer(folder / "models" / "phi3-mini-4k-instruct", max_seq_len=2048)
    alone = chat_dataset(tokenizer, folder / "data" / file)
    packs = Packs(alone, 2048)
    assert packs.waste < 0.02
    found = chain.from_iterable(packs.documents(i) for i in range(len(packs)))
    assert sorted(found) == [(i, 0, n) for i, n in enumerate(packs.ds.lengths)]
    document, _, length = packs.documents(0)[-1]
    assert packs[0]["tokens"][-length:].tolist() == alone[document]["tokens"]
