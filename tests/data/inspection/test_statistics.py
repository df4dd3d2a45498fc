"""The numbers, against what can be counted by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as draw

from phi3_plugin.data.formats import Findings
from phi3_plugin.data.packing import Packs
from phi3_plugin.inspect import Bin, epoch, histogram, lengths_of, padding, part, unpacked
from tests.data.inspection.test_survey import STOP, Rows, survey


def test_lengths_in_short():
    found = lengths_of(np.arange(1, 101))
    assert (found.median, found.longest) == (50.5, 100)
    assert found.p95 == pytest.approx(95.05)


def test_bars_of_one_width():
    bars = histogram(np.array([3, 16, 17, 30, 32, 90]))
    assert bars == [
        Bin(1, 8, 1),
        Bin(9, 16, 1),
        Bin(17, 24, 1),
        Bin(25, 32, 2),
        *(Bin(low, low + 7, 0) for low in range(33, 89, 8)),
        Bin(89, 96, 1),
    ]


def test_bars_of_doubling_widths_where_few_are_long():
    bars = histogram(np.array([5, 6, 7, 8, 9, 4000]))
    assert bars[:2] == [Bin(5, 8, 4), Bin(9, 16, 1)] and bars[-1] == Bin(2049, 4096, 1)


def test_samples_of_one_length():
    assert histogram(np.array([100] * 3)) == [Bin(97, 112, 3)]
    assert histogram(np.array([1])) == [Bin(1, 1, 1)]


@given(draw.lists(draw.integers(1, 200_000), min_size=1, max_size=50))
def test_every_sample_is_in_one_bar(lengths):
    bars = histogram(np.array(lengths))
    assert len(bars) <= 19
    for bar in bars:
        assert bar.samples == sum(bar.low <= length <= bar.high for length in lengths)
    assert sum(bar.samples for bar in bars) == len(lengths)


def test_padding_of_each_batch_to_its_longest():
    lengths = np.array([10, 4, 6, 1])
    assert padding(lengths, [[0, 1], [2, 3]]) == pytest.approx((6 + 5) / (20 + 12))
    assert padding(lengths, [[0], [1], [2], [3]]) == 0
    assert padding(lengths, []) == 0


class Packed(Packs):
    """Packs of known sizes."""

    def __init__(self, rows):
        self.ds, self.lengths, self.labelled = rows, np.array([3, 1]), np.array([2, 0])


def test_packs_may_cut_what_is_trained_on():
    rows = Rows(([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1]))
    found = survey(rows, [STOP])
    assert epoch(rows, found) == (5, 3) and epoch(Packed(rows), found) == (4, 2)
    assert unpacked(rows) is unpacked(Packed(rows)) is rows


def test_validation_data():
    rows = Rows(([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1]))
    held = Rows(([1, 2, 3], [0, 1, 1]), ([6, 7], [0, 1]))
    held.rows, held.findings = 5, Findings()
    seen = survey(held, [STOP]), survey(rows, [STOP])
    found = part(held, *seen)
    assert found[:5] == (5, 2, 5, 3, 1) and found.findings is held.findings
    assert part(Packed(held), *seen) == found._replace(tokens=4, labelled=2)
