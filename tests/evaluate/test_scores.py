"""Scores are those of the packages themselves, for one answer and for all."""

import sys

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from phi3_plugin.errors import MissingFileError
from phi3_plugin.evaluate import ROUGE, Scorer

PAIRS = [
    ("The cats were running.", "A cat runs."),
    ("One line.\nAnother line here.\n\nThird.", "Another line.\nOne line here.\nThird thing."),
    ("line one\r\nline two", "line one\nline two"),
    ("exactly the same text of seven words", "exactly the same text of seven words"),
    ("", "no answer at all"),
    ("中文答案", "中文的答案"),
    ("something", ""),
    ("I said: 12,000 dollars ended.", "Work.\n#### 12000"),
]


@pytest.fixture(scope="module")
def scorer():
    return Scorer()


@pytest.fixture(scope="module")
def scores(scorer):
    return [scorer.score(*pair) for pair in PAIRS]


def test_rouge_is_the_mean_of_the_scorer(scores):
    theirs = RougeScorer(list(ROUGE), use_stemmer=True)
    for name in ROUGE:
        each = [theirs.score(reference, answer)[name].fmeasure for answer, reference in PAIRS]
        assert [one.values[name] for one in scores] == pytest.approx([100 * f for f in each])
    assert scores[1].values["rougeLsum"] != scores[1].values["rougeL"]


def test_bleu_and_chrf_are_those_of_the_corpus(scorer, scores):
    answers, references = map(list, zip(*PAIRS, strict=True))
    ours = scorer.bleu(np.sum([one.bleu for one in scores], axis=0, keepdims=True))
    assert ours == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score)
    ours = scorer.chrf(np.sum([one.chrf for one in scores], axis=0, keepdims=True))
    assert ours == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
    for one, (answer, reference) in zip(scores, PAIRS, strict=True):
        assert one.values["chrf"] == pytest.approx(
            sacrebleu.sentence_chrf(answer, [reference]).score
        )


def test_nothing_has_no_corpus_score(scorer, scores):
    for of, sums in ((scorer.bleu, scores[0].bleu), (scorer.chrf, scores[0].chrf)):
        values = of(np.array([[0.0] * len(sums), sums]))
        assert np.isnan(values[0]) and not np.isnan(values[1])


def test_exact_and_numeric(scores):
    assert [one.values["exact"] for one in scores] == [0, 0, 100, 100, 0, 0, 0, 0]
    assert [one.values.get("numeric") for one in scores] == [None] * 7 + [100]


def test_rouge_cannot_read_every_script(scores):
    assert [one.readable for one in scores] == [True] * 5 + [False, False, True]
    assert scores[5].values["rouge1"] == 0 and scores[5].values["chrf"] > 0


def test_how_scores_can_be_had_again(scorer):
    signatures = scorer.signatures()
    assert "tok:13a" in signatures["bleu"] and "nc:6" in signatures["chrf"]
    assert all(f"version:{sacrebleu.__version__}" in text for text in signatures.values())


@pytest.mark.parametrize("package", ["rouge_score", "sacrebleu"])
def test_without_the_packages(monkeypatch, package):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingFileError, match=r"pip install 'phi3-plugin\[eval\]'") as error:
        Scorer()
    assert "\n" not in str(error.value) and package.replace("_", "-") in str(error.value)
