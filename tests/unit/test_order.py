"""Who is seen how often and who is held out: by arithmetic that no machine does otherwise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_plugin.data.order import group_of, held_out_mask, repeats
from phi3_plugin.data.turns import Written, make_turn
from phi3_plugin.errors import DataError

U, A, S = make_turn("user", "u"), make_turn("assistant", "a"), make_turn("system", "s")
B = make_turn("assistant", "b")


@pytest.mark.parametrize("weight", [1, 1.0, 2, 3.0])
def test_whole_weights(weight):
    assert set(repeats(weight, np.arange(1000), 0)) == {weight}


@pytest.mark.parametrize("weight", [0.01, 0.5, 1.25, 2.5])
def test_parts_of_a_weight_are_taken_of_some(weight):
    times = repeats(weight, np.arange(100_000), 3)
    assert set(times) == {int(weight), int(weight) + 1}
    assert abs(times.mean() - weight) < 0.01
    assert times.tolist()[:50] == [*repeats(weight, np.arange(50), 3)]


def test_the_seed_decides_who():
    index = np.arange(64)
    assert (repeats(0.5, index, 0) != repeats(0.5, index, 1)).any()
    # Recorded: a change would give every run of the past other data
    assert "".join(map(str, repeats(0.5, np.arange(16), 0))) == "0100111100010100"


def test_held_out_is_recorded():
    held = held_out_mask(np.arange(20, dtype=np.uint64), 0.25, 7)
    assert np.flatnonzero(held).tolist() == [12, 15, 16, 18, 19]


@given(
    groups=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9), min_size=1, max_size=60),
    share=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**70),
)
def test_groups_stay_whole_whatever_the_order(groups, share, seed):
    groups = np.array(groups, dtype=np.uint64)
    order = np.random.default_rng(0).permutation(len(groups))
    try:
        held = held_out_mask(groups, share, seed)
    except DataError as error:
        assert "none would be left" in str(error)
        return
    assert held.any()
    assert not held.all()
    assert not set(groups[held]) & set(groups[~held])
    assert (held_out_mask(groups[order], share, seed) == held[order]).all()
    # No group more than was needed
    assert held.sum() - np.unique(groups[held], return_counts=True)[1].max() < share * len(groups)


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.07, 7), (0.29, 29), (0.5, 50), (1e-9, 1)])
def test_the_share_is_of_samples(share, count):
    assert held_out_mask(np.arange(100, dtype=np.uint64), share, 0).sum() == count


@pytest.mark.parametrize(("count", "share"), [(1, 0.1), (0, 0.1), (2, 0.6), (5, 1.0)])
def test_something_is_left(count, share):
    with pytest.raises(DataError, match=r"a share of .* samples cannot be held out"):
        held_out_mask(np.arange(count, dtype=np.uint64), share, 0)


def test_groups_of_conversations():
    def same(one, other):
        return group_of({}, one, None) == group_of({}, other, None)

    assert same([U, A], [U, B])
    assert same([U, A, U, A], [U, A])
    assert not same([S, U, A], [U, A])
    assert not same([make_turn("user", "v"), A], [U, A])
    assert not same([A], [B])
    assert not same([S, A, U], [S, A, make_turn("user", "v")])
    assert same([S, B, U, A], [S, B, U, B])
    assert not same([make_turn("user", "a\0b")], [make_turn("user", "a"), make_turn("b", "")])


def test_groups_of_texts():
    one, other = Written("u: a", ((3, 4),)), Written("u: b", ((3, 4),))
    assert group_of({}, one, None) == group_of({}, other, None)
    loose = [chat._replace(said=None) for chat in (one, other)]
    assert group_of({}, loose[0], None) != group_of({}, loose[1], None)


def test_groups_of_a_column():
    def group(value):
        return group_of({"tree": value}, [U], "tree")

    assert group({"a": 1, "b": 2}) == group({"b": 2, "a": 1})
    assert len({group(value) for value in ("1", 1, [1], "a", "\ud800", True, float("nan"))}) == 7
    with pytest.raises(DataError, match="there is no 'tree'; the keys are: id"):
        group_of({"id": 1}, [U], "tree")
    with pytest.raises(DataError, match="'tree' is null"):
        group(None)
    nested = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(DataError, match="'tree' cannot be grouped by"):
        group(nested)


def test_groups_are_recorded():
    """Python's own hashes differ from process to process; these must not."""
    assert group_of({"a": "x"}, [], "a") == 14708006590057246573
    assert group_of({}, [make_turn("user", "é")], None) == 17378852866181681687
