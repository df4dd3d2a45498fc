"""The numbers of an evaluation, beside those that the texts themselves give."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import sacrebleu

from phi3_plugin.evaluate import (
    ADAPTER,
    BASE,
    BETTER,
    UNCLEAR,
    WORSE,
    Evaluation,
    Outcome,
    Sample,
    Scorer,
    measures,
    results,
)
from tests.evaluate.made import ROWS, made


@pytest.fixture(scope="module")
def wanted():
    return measures(Scorer())


def found(evaluation, wanted, **choices):
    return {result.measure.key: result for result in results(evaluation, wanted, **choices)}


def test_every_number(wanted):
    evaluation = made()
    got = found(evaluation, wanted)
    tokens = [1, 2, 3, 4, 5]
    for number, name in enumerate((BASE, ADAPTER)):
        values = {key: result.models[name].value for key, result in got.items()}
        answers, references = [row[2 + number] for row in ROWS], [row[1] for row in ROWS]
        loss = sum(one.loss for one in evaluation.outcomes[name]) / sum(tokens)
        assert values["loss"] == pytest.approx(loss)
        assert values["perplexity"] == pytest.approx(math.exp(loss))
        assert values["accuracy"] == pytest.approx(30 + 40 * number)
        assert values["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score)
        assert values["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
        for key in ("rouge1", "rouge2", "rougeL", "rougeLsum", "exact"):
            each = [one.said.scores.values[key] for one in evaluation.outcomes[name]]
            assert values[key] == pytest.approx(np.mean(each)), key
    assert got["exact"].models[BASE].value == 0 and got["exact"].models[ADAPTER].value == 40
    assert got["numeric"].models[BASE].value == pytest.approx(200 / 3)
    assert got["numeric"].samples == 3 and got["exact"].samples == 5
    for result in got.values():
        base, adapter = result.models.values()
        assert result.difference.value == pytest.approx(adapter.value - base.value)


def test_numbers_that_no_reference_has_are_left_out(wanted):
    got = found(made(rows=ROWS[3:]), wanted)
    assert "numeric" not in got and "exact" in got


def test_shares_of_samples(wanted):
    got = found(made(), wanted)
    assert got["loss"].shares == (1.0, 0.0, 0.0)  # lower is better
    assert got["exact"].shares == pytest.approx((0.4, 0, 0.6))
    assert got["numeric"].shares == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert got["bleu"].shares is None is got["perplexity"].shares


def test_verdicts(wanted):
    got = found(made(times=8), wanted)
    assert got["loss"].verdict == got["exact"].verdict == BETTER
    assert got["numeric"].verdict == UNCLEAR
    turned = made(times=8)
    base, adapter = turned.outcomes.values()
    turned = replace(turned, outcomes={BASE: adapter, ADAPTER: base})
    got = found(turned, wanted)
    assert got["loss"].verdict == got["exact"].verdict == WORSE
    same = made(times=8)
    same = replace(same, outcomes=dict.fromkeys((BASE, ADAPTER), same.outcomes[BASE]))
    for result in found(same, wanted).values():
        assert result.difference == (0, 0, 0) and result.verdict == UNCLEAR
        assert result.shares in (None, (0, 0, 1))


@pytest.mark.parametrize(("count", "kind"), [(1, UNCLEAR), (5, UNCLEAR), (6, BETTER)])
def test_too_few_samples_tell_nothing(wanted, count, kind):
    got = found(made(rows=ROWS[:1] * count), wanted)
    assert got["loss"].verdict == got["numeric"].verdict == kind
    assert math.isnan(got["loss"].difference.low) == (count == 1)


def test_pairs_make_the_interval_of_a_difference_narrow(wanted):
    """Samples differ much, the models by the same on each."""
    got = found(made(times=20), wanted)["loss"]
    base = got.models[BASE]
    assert base.high - base.low > 0.05 > got.difference.high - got.difference.low


def test_the_seed_decides_the_intervals(wanted):
    one, same, other = (found(made(times=3), wanted, seed=seed) for seed in (1, 1, 2))
    estimates = [
        {k: [*r.models.values(), r.difference] for k, r in g.items()} for g in (one, same, other)
    ]
    assert repr(estimates[0]) == repr(estimates[1]) != repr(estimates[2])


def test_one_model(wanted):
    for result in found(made(adapter=False), wanted).values():
        assert list(result.models) == [BASE]
        assert result.difference is None is result.shares and result.verdict == ""


def test_without_answers_only_tokens_are_measured():
    evaluation = Evaluation([Sample("a:1", 2, "", "")], {BASE: [Outcome(1.0, 1, 2)]}, {})
    for wanted in (measures(None), measures(Scorer())):
        got = found(evaluation, wanted)
        assert list(got) == ["loss", "perplexity", "accuracy"]
        assert got["loss"].models[BASE].value == 0.5


def test_a_sample_without_labels_or_answer_takes_no_part(wanted):
    evaluation = made(times=2)
    samples = [*evaluation.samples, Sample("x:1", 0, "", "", "no prompt")]
    outcomes = {name: [*seen, Outcome(0.0, 0, 0)] for name, seen in evaluation.outcomes.items()}
    more = found(Evaluation(samples, outcomes, {}), wanted)
    for key, result in found(evaluation, wanted).items():
        assert more[key].samples == result.samples
        values = [[e.value for e in one.models.values()] for one in (more[key], result)]
        assert values[0] == pytest.approx(values[1]), key


def test_a_loss_that_is_infinite_is_told(wanted):
    outcomes = {BASE: [Outcome(1e6, 0, 1)] * 3}
    got = found(Evaluation([Sample("x:1", 1, "", "")] * 3, outcomes, {}), wanted)
    assert got["perplexity"].models[BASE].value == math.inf
    json.dumps(got["accuracy"].models[BASE])  # measured, though never right
    assert got["accuracy"].models[BASE].value == 0
