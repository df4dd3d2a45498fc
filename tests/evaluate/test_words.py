"""What a terminal shows."""

import pytest

from phi3_plugin.evaluate import Scorer, measures, report, results, value, verdict
from tests.evaluate.made import made

WANTED = measures(Scorer())


def said(evaluation):
    return report(evaluation, results(evaluation, WANTED), "eval/evaluation.html")


def test_both_models():
    text = said(made(times=8))
    lines = text.splitlines()
    assert lines[0] == "Evaluation: 40 samples, 40 answers from each model"
    assert "Loss               2.2600   1.2600     -1.0000" in text
    assert lines[4].endswith("  better") and lines[-1] == "All of it: eval/evaluation.html"
    assert "better than the base in 10 measures; no clear difference in Right number." in text
    assert (
        "Answers of the base: 32 ended by themselves, 8 cut at generation.max_new_tokens." in text
    )
    assert all(len(line) <= 100 for line in lines if "better" in line[60:])
    assert "\x1b" not in text


def test_one_model():
    lines = said(made(adapter=False)).splitlines()
    assert lines[0] == "Evaluation: 5 samples, 5 answers"
    assert "difference" not in lines[3] and "The adapter" not in "".join(lines)


@pytest.mark.parametrize(
    ("kinds", "text", "sign"),
    [
        (("better", "better"), "The adapter is better than the base in every measure.", "better"),
        (
            ("worse", "no clear difference"),
            "The adapter is worse than the base in A; no clear difference in B.",
            "worse",
        ),
        (("better", "worse"), "Mixed: better in A; worse in B.", "no clear difference"),
        (("no clear difference",) * 2, "No clear difference: ", "no clear difference"),
        (("", ""), "", ""),
    ],
)
def test_the_verdict(kinds, text, sign):
    class Result:
        def __init__(self, verdict, title):
            self.verdict, self.samples = verdict, 9
            self.measure = type("Measure", (), {"title": title})

    got = verdict([Result(kind, title) for kind, title in zip(kinds, ("A, %", "B"), strict=True)])
    assert got[0].startswith(text) and got[1] == sign


def test_numbers_of_any_size():
    loss, perplexity = results(made(), WANTED)[:2]
    assert value(loss, 1.23456) == "1.2346" and value(loss, 0.5, signed=True) == "+0.5000"
    assert value(loss, -0.00001, signed=True) == "+0.0000" and value(loss, -0.0) == "0.0000"
    assert value(perplexity, 1234567.8) == "1,234,568"
    assert value(perplexity, float("inf")) == value(perplexity, float("nan")) == "–"
