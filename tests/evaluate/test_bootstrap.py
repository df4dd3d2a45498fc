import numpy as np
import pytest

from phi3_plugin import evaluate as bootstrap
from phi3_plugin.evaluate import estimate, resampled


def test_sums_are_those_of_samples_drawn_again():
    columns = np.stack([np.ones(7), np.arange(7.0), np.arange(7.0) ** 2], axis=1)
    sums = resampled(columns, resamples=50, seed=3)
    assert sums.shape == (50, 3)
    assert (sums[:, 0] == 7).all()  # as many as there are
    assert len(np.unique(sums[:, 1])) > 10
    pairs = np.concatenate([columns, 2 * columns], axis=1)
    drawn = resampled(pairs, resamples=50, seed=3)
    assert np.array_equal(drawn, np.concatenate([sums, 2 * sums], axis=1))  # the same draws


def test_a_seed_decides_them_whatever_the_blocks(monkeypatch):
    columns = np.random.default_rng(0).normal(size=(40, 2))
    sums = resampled(columns, resamples=101, seed=1)
    assert np.array_equal(sums, resampled(columns, resamples=101, seed=1))
    assert not np.array_equal(sums, resampled(columns, resamples=101, seed=2))
    monkeypatch.setattr(bootstrap, "_DRAWN", 400)
    assert np.allclose(sums, resampled(columns, resamples=101, seed=1), rtol=1e-13)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """The mean of 60 skewed numbers: theory has the interval hold it in a little under 95 %."""
    random = np.random.default_rng(0)
    held = 0
    for trial in range(300):
        values = random.exponential(size=60)
        draws = resampled(values[:, None], resamples=1000, seed=trial)[:, 0] / 60
        found = estimate(values.mean(), draws)
        held += found.low <= 1.0 <= found.high
    assert 0.89 <= held / 300 <= 0.97


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(size=400)
    found = estimate(values.mean(), resampled(values[:, None], resamples=4000)[:, 0] / 400)
    half = 1.96 * values.std() / 20
    ends = (values.mean() - half, values.mean() + half)
    assert (found.low, found.high) == pytest.approx(ends, abs=0.006)


def test_what_cannot_be_computed_does_not_count():
    assert estimate(1.0, np.array([np.nan, 2.0, np.inf, 2.0])) == (1.0, 2.0, 2.0)
    assert np.isnan(estimate(1.0, np.array([np.nan]))[1:]).all()
