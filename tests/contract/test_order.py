from itertools import chain
from random import Random

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from phi3_plugin.data.collate import pad_right
from phi3_plugin.data.order import Order, hold_out, shares
from phi3_plugin.errors import DataError

ROWS = 23


def samples(rows=ROWS):
    """Row n holds the token n, n % 3 + 1 times; its labels are its tokens."""
    return [{"tokens": [n] * (n % 3 + 1), "labels": [n] * (n % 3 + 1)} for n in range(rows)]


def order(processes=1, *, batch_size=2, accumulation=6, rows=ROWS, data=None, **choices):
    sizes = {"batch_size": batch_size, "accumulation": accumulation // processes}
    choices = {"seed": 0, "shuffle": True, **choices}
    data = samples(rows) if data is None else data
    return Order(data, processes=processes, **choices, **sizes)


def seen(batch):
    """Return the rows of a batch that are trained on."""
    return [int(row[0]) for row, labels in zip(*batch.values(), strict=True) if labels[0] >= 0]


def of_all(cut, step, processes):
    return [cut.batches(step, rank, pad_right) for rank in range(processes)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_sees_every_sample_once(shuffle):
    cut = order(shuffle=shuffle, accumulation=2)
    assert cut.steps_per_epoch == 6
    for epoch in range(3):
        steps = [cut.indices(epoch * 6 + step) for step in range(6)]
        assert [len(step) for step in steps] == [4, 4, 4, 4, 4, 3]
        assert sorted(chain(*steps)) == list(range(ROWS))


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_a_step_sees_the_same_samples_on_any_number_of_processes(processes):
    one, many = order(), order(processes)
    assert one.steps_per_epoch == many.steps_per_epoch == 2
    for step in range(4):
        batches = of_all(many, step, processes)
        found = [row for batch in chain(*batches) for row in seen(batch)]
        assert sorted(found) == sorted(one.indices(step))
        # In turns: the first micro-batches of all processes are the first of the order.
        first = [row for mine in batches for row in seen(mine[0])]
        assert first == one.indices(step)[: len(first)]


@pytest.mark.parametrize("processes", [2, 3, 6])
@pytest.mark.parametrize("rows", [1, 2, 13, 17, 24])
def test_every_process_gets_as_many_batches(processes, rows):
    cut = order(processes, rows=rows)
    for step in range(cut.steps_per_epoch):
        counts = {len(mine) for mine in of_all(cut, step, processes)}
        assert len(counts) == 1
        assert counts.pop() <= 6 // processes


def test_a_process_that_gets_no_samples_gets_a_batch_without_labels():
    _, second = of_all(order(2, rows=1), 0, 2)
    assert len(second) == 1
    assert second[0]["tokens"].tolist() == [[0]]
    assert second[0]["labels"].tolist() == [[-100]]


def test_the_last_step_takes_what_is_left():
    cut = order(rows=13)
    assert [len(batch["tokens"]) for batch in cut.batches(0, 0, pad_right)] == [2] * 6
    assert [len(batch["tokens"]) for batch in cut.batches(1, 0, pad_right)] == [1]


def test_without_shuffling_the_order_is_that_of_the_data():
    cut = order(shuffle=False)
    assert cut.indices(0) == cut.indices(2) == list(range(12))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    torch.manual_seed(1)
    first = [order(seed=5).indices(step) for step in range(4)]
    torch.manual_seed(2)
    before = torch.get_rng_state()
    cut = order(seed=5)
    assert [cut.indices(step) for step in (3, 2, 1, 0)] == first[::-1]
    assert torch.equal(torch.get_rng_state(), before)
    assert order(seed=6).indices(0) != first[0]
    assert first[:2] != first[2:]


def test_equal_orders_are_told_by_their_identity():
    assert order(1).identity == order(2).identity == order(3).identity
    others = (order(seed=1), order(shuffle=False), order(rows=22), order(accumulation=12))
    others += (order(group_by_length=True),)
    assert all(other.identity != order().identity for other in others)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_whole_pass_is_shared_out_without_loss(processes):
    cut = order(processes, accumulation=processes, shuffle=False)
    passes = [list(shares(cut, rank, pad_right)) for rank in range(processes)]
    assert len({len(batches) for batches in passes}) == 1
    assert sorted(row for batch in chain(*passes) for row in seen(batch)) == list(range(ROWS))


@pytest.mark.parametrize(("share", "count"), [(0.2, 5), (0.01, 1), (0.9, 21)])
def test_what_is_held_out_is_drawn_by_the_seed_and_kept_in_order(share, count):
    data = list(range(ROWS))
    torch.manual_seed(1)
    kept, held = map(list, hold_out(data, share, seed=3))
    assert len(held) == count
    assert sorted(kept + held) == data
    assert (kept, held) == (sorted(kept), sorted(held))
    torch.manual_seed(2)
    assert list(hold_out(data, share, seed=3)[1]) == held
    assert list(hold_out(data, 0.2, seed=4)[1]) != list(hold_out(data, 0.2, seed=3)[1])


def test_nothing_is_held_out_by_default():
    data = samples()
    assert hold_out(data, 0.0, seed=0) == (data, None)


@pytest.mark.parametrize(("rows", "share"), [(1, 0.01), (2, 0.8)])
def test_a_share_that_leaves_nothing_to_train_on_is_refused(rows, share):
    with pytest.raises(DataError, match=f"val_fraction: {share} of {rows} samples leaves none"):
        hold_out(samples(rows), share, seed=0)


class Offering:
    """A data set that tells what others must be read for; reading it is an error."""

    def __init__(self, rows=1000):
        self.lengths = np.array([Random(n).randint(1, 500) for n in range(rows)], np.int32)
        self.fingerprint = "told"

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        raise AssertionError("was read")

    def hold_out(self, share, seed):
        return f"all but {share}", f"{share} by {seed}"


def grouped(processes=1, **choices):
    return order(processes, **{"data": Offering(), "group_by_length": True, **choices})


@pytest.mark.parametrize("rows", [1, 11, 12, 13, 999, 1200, 1213])
def test_grouped_an_epoch_sees_every_sample_once(rows):
    cut = grouped(data=Offering(rows))
    epochs = []
    for epoch in range(3):
        start = epoch * cut.steps_per_epoch
        steps = [cut.indices(start + step) for step in range(cut.steps_per_epoch)]
        assert {len(step) for step in steps[:-1]} <= {12}
        assert sorted(chain(*steps)) == list(range(rows))
        epochs.append(steps)
    assert rows <= 12 or epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 2), (3, 2), (2, 1), (3, 4), (1, 12)])
def test_grouped_a_step_sees_the_same_samples_however_it_is_cut(processes, batch_size):
    accumulation = 12 // batch_size
    many = grouped(processes, batch_size=batch_size, accumulation=accumulation)
    one = grouped()
    for step in (0, 1, 82, 83, 84, 200):
        assert many.indices(step) == one.indices(step)


def test_grouped_a_step_has_samples_of_similar_length_and_they_come_longest_first():
    cut = grouped(data=Offering(6000))
    padding = total = 0
    for step in range(cut.steps_per_epoch):
        found = cut.lengths[cut.indices(step)]
        assert found.tolist() == sorted(found, reverse=True)
        # As much as if all processes and turns of a step were one batch
        padding += found[0] * len(found) - found.sum()
        total += found.sum()
    assert padding < 0.04 * total


def test_grouped_steps_come_in_no_order_of_length():
    cut = grouped(data=Offering(6000))
    longest = [cut.lengths[cut.indices(step)].max() for step in range(cut.steps_per_epoch)]
    halves = longest[: len(longest) // 2], longest[len(longest) // 2 :]
    assert abs(np.mean(halves[0]) - np.mean(halves[1])) < 50
    assert np.abs(np.diff(longest)).mean() > 100


def test_grouped_few_samples_meet_others_in_each_epoch():
    cut = grouped(data=Offering(96))
    met = [{frozenset(cut.indices(8 * epoch + step)) for step in range(8)} for epoch in range(3)]
    assert len(set.union(*met)) > 20


@pytest.mark.parametrize("rows", [5, 12, 13, 700])
@pytest.mark.parametrize("seed", range(4))
def test_grouped_the_longest_sample_of_all_comes_first(rows, seed):
    cut = grouped(data=Offering(rows), seed=seed)
    assert cut.lengths[cut.indices(0)[0]] == cut.lengths.max()


def test_grouped_lengths_are_those_of_the_samples():
    told = Offering()
    assert order(data=told).lengths.tolist() == told.lengths.tolist()
    assert order(data=Subset(told, [5, 3])).lengths.tolist() == told.lengths[[5, 3]].tolist()
    assert order().lengths.tolist() == [n % 3 + 1 for n in range(ROWS)]
    assert order(data=Subset(samples(), [5, 4])).lengths.tolist() == [3, 2]


def test_a_fingerprint_spares_reading_all_samples():
    assert order(data=Offering()).identity["content"] == "told"
    part = Subset(samples(), range(ROWS))  # of what it is a part does not tell what is in it
    assert order(data=part).identity == order().identity


def test_a_data_set_that_can_be_split_does_it_itself():
    assert hold_out(Offering(), 0.1, seed=7) == ("all but 0.1", "0.1 by 7")
    told = Offering()
    assert hold_out(told, 0.0, seed=7) == (told, None)
