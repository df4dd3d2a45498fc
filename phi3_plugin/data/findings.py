"""What was noticed about the rows of a data set, and what a user is told of it."""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from torchtune.utils import log_rank_zero

from phi3_plugin.data.turns import key_names
from phi3_plugin.errors import DataError
from phi3_plugin.terminal import harmless

logger = logging.getLogger(__name__)

# Kinds of findings, in words that follow "3 rows …"

BROKEN = "cannot be read"
UNUSABLE = "cannot be used"
FILTERED = "do not pass the filter"
CUT_AWAY = "have nothing to train on within max_seq_len"
TOO_LONG = "are longer than max_seq_len"
SAME_ANSWERS = "have two answers that do not differ"
NO_TEXT = "have no text"
WEIGHTLESS = "have a weight of 0"
DROPPED = (BROKEN, UNUSABLE, FILTERED, WEIGHTLESS, SAME_ANSWERS, NO_TEXT, CUT_AWAY, TOO_LONG)
"""Why a row gives no sample."""

TRUNCATED = "are cut at max_seq_len"
DROPPED_MESSAGE = "have a message that the chat template leaves out"
FORGOTTEN_THOUGHT = (
    "have an earlier answer that is not trained on, since the chat template leaves out its thought"
)
NO_FINAL_ANSWER = "do not end with an assistant turn"
BLANK_ANSWER = "have an answer that says nothing, and would be trained on"
SPECIAL_IN_TEXT = "have special tokens written in a message"
UNREAD_TOKEN = "have a text of tokenizer.add_tokens where it is not read as that token"
PASSED_OVER = "have weight or train fields that dataset.train_on passes over"
WEIGHTED = "have a weight other than 1, which the loss of phi3_lora_finetune counts"
NOTICED = (
    *(TRUNCATED, DROPPED_MESSAGE, FORGOTTEN_THOUGHT, NO_FINAL_ANSWER),
    *(BLANK_ANSWER, SPECIAL_IN_TEXT, UNREAD_TOKEN, PASSED_OVER, WEIGHTED),
)
"""What was noticed about rows that do."""

LOGGED = (
    *(BROKEN, UNUSABLE, WEIGHTLESS, SAME_ANSWERS, NO_TEXT, CUT_AWAY, TOO_LONG, TRUNCATED),
    *(DROPPED_MESSAGE, FORGOTTEN_THOUGHT, UNREAD_TOKEN, PASSED_OVER, WEIGHTED),
)
"""What is logged; `phi3-tune inspect-data` shows all."""

PLACES_KEPT = 1000
"""Places of one kind that are kept; all are counted."""

ROWS_LISTED = 10
"""How many broken rows an error lists."""


class UnusedRow(NamedTuple):
    """A row that gives no sample."""

    kind: str
    """One of `DROPPED`."""
    where: str
    """The row's place, as in ``chats.jsonl:7``."""
    reason: str = ""


class Findings:
    """Counts, and the first places of each kind with what there is to say about them."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[tuple[str, str]]] = {}
        self.columns: dict[str, Counter[str]] = {}
        """How rows were read, and in how many of them which columns were filled and not read."""

    def add(self, kind: str, where: str, detail: str = "") -> None:
        """Count one row.

        Args:
            kind: One of `DROPPED` or `NOTICED`.
            where: The row's place, as in ``chats.jsonl:7``.
            detail: What in particular, if there is more to say.
        """
        self.counts[kind] += 1
        places = self.places.setdefault(kind, [])
        if len(places) < PLACES_KEPT:
            places.append((where, detail))

    def add_columns(self, shape: str, unread: Iterable[str]) -> None:
        """Count the columns of a row that were not read.

        Args:
            shape: The source, and how its rows are read.
            unread: The columns.
        """
        if shape not in self.columns:
            self.columns[shape] = Counter()
        if unread:
            self.columns[shape].update(unread)

    def columns_told(self) -> list[str]:
        """Say of each source how it was read, and which columns were not."""
        return [
            f"{shape}. Not read: {key_names(unread) if unread else 'nothing'}"
            for shape, unread in self.columns.items()
        ]

    @property
    def dropped(self) -> int:
        """Rows that give no sample."""
        return sum(self.counts[kind] for kind in DROPPED)

    def refuse_bad_rows(self, rows: int) -> None:
        """Raise a DataError that lists rows that cannot be used, if there are any.

        Args:
            rows: How many were read.
        """
        if listed := self.bad_rows_listed():
            bad = self.counts[BROKEN] + self.counts[UNUSABLE]
            raise DataError(
                f"dataset.source: {bad} of {rows} rows cannot be used. Correct or remove them, or "
                f"go on without them with dataset.bad_rows=drop:{listed}"
            )

    def bad_rows_listed(self) -> str:
        """Return a line for each of the first rows that cannot be used, and why."""
        bad = self.counts[BROKEN] + self.counts[UNUSABLE]
        found = [*self.places.get(BROKEN, []), *self.places.get(UNUSABLE, [])]
        listed = [f"\n  {where}: {reason}" for where, reason in found[:ROWS_LISTED]]
        more = [f"\n  and {bad - ROWS_LISTED} more"] if bad > ROWS_LISTED else []
        return "".join([*listed, *more])

    def log(self, rows: int) -> None:
        """Log a line for each kind that a user should know of.

        Args:
            rows: How many were read.
        """
        for told, unread in zip(self.columns_told(), self.columns.values(), strict=True):
            if unread:
                log_rank_zero(logger, harmless(f"dataset.source: {told}"), logging.WARNING)
        for kind in LOGGED:
            if self.counts[kind]:
                where, detail = self.places[kind][0]
                first = f"{where}: {detail}" if detail else where
                message = f"{self.counts[kind]} of {rows} rows {kind}. The first: {first}"
                log_rank_zero(logger, harmless(message), logging.WARNING)

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` takes."""
        return {"counts": dict(self.counts), "places": self.places, "columns": self.columns}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Findings":
        """Return findings that were written to a file."""
        findings = cls()
        findings.counts.update(content["counts"])
        for kind, places in content["places"].items():
            findings.places[kind] = [(where, detail) for where, detail in places]
        for shape, unread in content["columns"].items():
            findings.columns[shape] = Counter(unread)
        return findings
