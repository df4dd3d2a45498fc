"""What a limit of the length costs, the chosen one and others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from phi3_plugin.data.inspection.survey import Numbers, Samples

# Shapes: N samples, L conversations that gave none

USUAL = (512, 1024, 2048, 4096)
"""Lengths at which it is always told what a limit would cost."""


class Cut(NamedTuple):
    """What a limit of the length costs."""

    limit: int
    samples: float
    """Share of the samples that are longer."""
    tokens: float
    """Share of the tokens that are lost."""
    name: str
    """What this limit is, if it is not just a round number."""
    least: bool = False
    """Whether more tokens may be lost: that would show only if the data were read with it."""


def cuts(
    samples: Samples,
    lost: Numbers,
    named: Mapping[int, str],
    *,
    limit: int | None,
    truncate: str = "right",
) -> list[Cut]:
    """Return what a limit would cost at the usual lengths and at others.

    Args:
        samples: As they were left by the chosen limit.
        lost: [L] tokens of each conversation that gave no sample.
        named: More lengths, and what each of them is.
        limit: The chosen one.
        truncate: What becomes of longer conversations, see :mod:`phi3_plugin.data.truncation`.
    """
    # A shorter conversation would be lost at any limit
    lost = lost[lost > limit] if limit is not None else lost[:0]
    asked = _Asked(samples, lost, limit, truncate)
    return [asked.cut(at, named.get(at, "")) for at in sorted({*USUAL, *named})]


@dataclass(frozen=True)
class _Asked:
    samples: Samples
    lost: Numbers
    limit: int | None
    truncate: str

    def cut(self, at: int, name: str) -> Cut:
        """Return what one limit costs."""
        samples, lost = self.samples, self.lost
        longer = samples.full > (samples.lengths if at == self.limit else at)
        share = (int(longer.sum()) + int((lost > at).sum())) / (len(longer) + len(lost))
        total = int(samples.full.sum()) + int(lost.sum())
        return Cut(at, share, 1 - self._kept(at) / total, name, self._may_lose_more(at))

    def _kept(self, at: int) -> int:
        """Return how many tokens are left, at most."""
        samples, lost = self.samples, self.lost
        if at == self.limit:
            return int(samples.lengths.sum())
        tighter = self.limit is not None and at < self.limit
        # What a limit takes, a tighter one does not give back
        kept, lost = (samples.lengths, lost[:0]) if tighter else (samples.full, lost)
        if self.truncate == "drop":
            kept, lost = kept[samples.full <= at], lost[lost <= at]
        elif self.truncate == "right":
            kept = kept[samples.first < at]  # The others have nothing left to train on
        return sum(int(values.clip(max=at).sum()) for values in (kept, lost))

    def _may_lose_more(self, at: int) -> bool:
        if at == self.limit or self.truncate == "drop":
            return False
        cut = bool((self.lost > at).any())
        if self.truncate == "right":  # Where their answers begin is not known
            return cut and self.limit is not None and at > self.limit
        return cut or bool((self.samples.full > at).any())
