from phi3_plugin.evaluate import Sample, notes
from tests.evaluate.made import ROWS, made


def test_what_limits_the_numbers():
    evaluation = made()
    samples = [*evaluation.samples, Sample("a:9", 0, "", "", "no prompt")]
    samples += [Sample("b:1", 1, "", "", "too long"), Sample("b:2", 1, "", "", "too long")]
    assert notes(samples, evaluation.outcomes) == [
        "Only 8 samples: the intervals are rough, and narrower than they should be.",
        "a:9 was not answered: no prompt.",
        "2 samples, the first b:1, were not answered: too long.",
        "1 of 8 samples has no labelled token, and so no loss.",
        "ROUGE finds no word in 1 of 5 references, for it knows Latin letters and digits alone. "
        "Look at chrF.",
    ]


def test_nothing_to_say():
    evaluation = made(rows=ROWS[:4], times=8)
    assert notes(evaluation.samples, evaluation.outcomes) == []
    assert notes(evaluation.samples[:1], evaluation.outcomes)[0].startswith("Only 1 sample, ")
