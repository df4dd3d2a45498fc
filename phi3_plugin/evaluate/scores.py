"""How close an answer is to the one that was expected, by measures that others compute too.

ROUGE is Google's ``rouge-score``, BLEU and chrF are ``sacrebleu``; both come with
``phi3-plugin[eval]``.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phi3_plugin.errors import MissingFileError
from phi3_plugin.evaluate.numeric import last_number, marked_number

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")

PACKAGES = ("rouge_score", "sacrebleu")
"""Whose versions decide the scores."""


@dataclass(frozen=True)
class Scores:
    """Of one answer; everything from 0 to 100."""

    values: dict[str, float]
    """ROUGE as F-measures, ``exact``, ``chrf`` and, where the reference has one, ``numeric``."""
    bleu: tuple[float, ...]
    """What sums up to BLEU over a corpus."""
    chrf: tuple[float, ...]
    """What sums up to chrF over a corpus."""
    readable: bool
    """Whether ROUGE finds words in the reference; it knows Latin letters and digits alone."""


class Scorer:
    """Scores answers one by one; sums over many are what scoring them together gives."""

    def __init__(self) -> None:
        """Load the packages.

        Raises:
            MissingFileError: One is not installed.
        """
        scorer = _module("rouge_score.rouge_scorer").RougeScorer
        self._rouge: Any = scorer(ROUGE, use_stemmer=True)
        metrics = _module("sacrebleu.metrics")
        self._bleu, self._chrf = metrics.BLEU(), metrics.CHRF()

    def score(self, answer: str, reference: str) -> Scores:
        """Compare an answer with what was expected.

        Args:
            answer: What a model wrote.
            reference: What the data set has.
        """
        found = self._rouge.score(reference, answer)
        values = {name: 100.0 * float(found[name].fmeasure) for name in ROUGE}
        values["exact"] = 100.0 * (_plain(answer) == _plain(reference))
        if (expected := marked_number(reference)) is not None:
            values["numeric"] = 100.0 * (last_number(answer) == expected)
        bleu, chrf = (self._sums(metric, answer, reference) for metric in (self._bleu, self._chrf))
        values["chrf"] = float(self._chrf._compute_score_from_stats(list(map(int, chrf))).score)
        readable = bool(self._rouge._tokenizer.tokenize(reference))
        return Scores(values, bleu, chrf, readable)

    def bleu(self, sums: NDArray[Any]) -> NDArray[np.float64]:
        """Return the BLEU of each row of sums, ``[R, K]`` to ``[R]``; NaN of nothing."""
        return _from_sums(self._bleu, sums)

    def chrf(self, sums: NDArray[Any]) -> NDArray[np.float64]:
        """Return the chrF of each row of sums, ``[R, K]`` to ``[R]``; NaN of nothing."""
        return _from_sums(self._chrf, sums)

    def signatures(self) -> dict[str, str]:
        """Return by which settings the scores can be had again, as sacrebleu writes them."""
        self.score("", "")  # without an answer it has none
        named = {"bleu": self._bleu, "chrf": self._chrf}
        return {name: str(metric.get_signature().format()) for name, metric in named.items()}

    @staticmethod
    def _sums(metric: Any, answer: str, reference: str) -> tuple[float, ...]:
        (sums,) = metric._extract_corpus_statistics([answer], [[reference]])
        return tuple(map(float, sums))


def _from_sums(metric: Any, sums: NDArray[Any]) -> NDArray[np.float64]:
    rows = [list(map(int, row)) for row in sums.tolist()]
    scores = [float(metric._compute_score_from_stats(r).score) if any(r) else np.nan for r in rows]
    return np.array(scores, dtype=np.float64)


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").strip()


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise MissingFileError(
            f"answers: they are scored by {package}, which is not installed. Run: pip install "
            "'phi3-plugin[eval]'; or measure the loss alone with answers=False."
        ) from error
