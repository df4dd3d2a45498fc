"""What was noticed about rows of data, counted, with the places where it happened."""

from collections import Counter
from typing import Any

BROKEN = "cannot be read"
UNUSABLE = "cannot be used"
FILTERED = "do not pass the filter"
CUT_AWAY = "have nothing to train on within max_seq_len"
TOO_LONG = "are longer than max_seq_len"
DROPPED = (BROKEN, UNUSABLE, FILTERED, CUT_AWAY, TOO_LONG)
"""Why a row gives no sample."""

TRUNCATED = "are cut at max_seq_len"
DROPPED_MESSAGE = "have a message that the chat template leaves out"
NO_FINAL_ANSWER = "do not end with an assistant turn"
BLANK_ANSWER = "have an answer that says nothing, and would be trained on"
SPECIAL_IN_TEXT = "have special tokens written in a message"
PASSED_OVER = "have weight or train fields that dataset.train_on passes over"
NOTICED = (
    *(TRUNCATED, DROPPED_MESSAGE, NO_FINAL_ANSWER),
    *(BLANK_ANSWER, SPECIAL_IN_TEXT, PASSED_OVER),
)
"""What was noticed about rows that do."""

LISTED = 1000
"""Places of one kind that are kept; all are counted."""


class Findings:
    """Counts, and the first places of each kind with what there is to say about them."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[tuple[str, str]]] = {}

    def add(self, kind: str, where: str, detail: str = "") -> None:
        """Count one row.

        Args:
            kind: One of :data:`DROPPED` or :data:`NOTICED`.
            where: The row's place, as in ``chats.jsonl:7``.
            detail: What in particular, if there is more to say.
        """
        self.counts[kind] += 1
        places = self.places.setdefault(kind, [])
        if len(places) < LISTED:
            places.append((where, detail))

    @property
    def dropped(self) -> int:
        """Rows that give no sample."""
        return sum(self.counts[kind] for kind in DROPPED)

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` takes."""
        return {"counts": dict(self.counts), "places": self.places}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Findings":
        """Return findings that were written to a file."""
        findings = cls()
        findings.counts.update(content["counts"])
        for kind, places in content["places"].items():
            findings.places[kind] = [(where, detail) for where, detail in places]
        return findings
