"""What a run measured: one JSON object a line, in a file that survives a kill and a resume.

{"step": 4, "epoch": 0, "loss": 1.31, "lr": 0.0002, "grad_norm": 0.8, "tokens": 4096, …}
{"step": 4, "val_loss": 1.4, "val_perplexity": 4.06, "val_tokens": 9000}
{"step": 4, "answers": ["Yes.", "Paris."]}
{"event": "saved", "step": 4, "folder": "epoch_0"}
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from phi3_plugin.errors import CheckpointError, OutputError

SAVED, RESUMED, SKIPPED = "saved", "resumed", "skipped"
"""Events that a report counts."""

MEASURED = frozenset({"tokens_per_second", "seconds", "peak_memory_gib"})
"""Fields that depend on the machine and the hour; all others repeat if the run is repeated."""

Point = tuple[int, float]
"""A step and the value there."""


class History:
    """Appends to ``metrics.jsonl``; each line is in the file when the call returns."""

    def __init__(self, path: str | Path, resumed_step: int | None = None) -> None:
        """Touch nothing yet: the run may still be refused.

        The first line written sets an earlier file aside as ``metrics.previous.jsonl``, or cuts
        it back when a run goes on.

        Args:
            path: The file.
            resumed_step: The step that a resumed run goes on from. Lines beyond it are dropped,
                because the run writes them again. None for a new run.
        """
        self._path = Path(path)
        self._resumed_step = resumed_step
        self._begun = False

    def log_step(
        self,
        step: int,
        *,
        epoch: float,
        loss: float,
        lr: float,
        grad_norm: float | None,
        tokens: int,
        tokens_per_second: float | None,
        seconds: float,
        peak_memory_gib: float | None,
        **more: object,
    ) -> None:
        """Write what one optimizer step measured.

        Args:
            step: Steps made, this one included.
            epoch: The epoch it belongs to.
            loss: Mean over the step's labelled tokens.
            lr: Learning rate of this step.
            grad_norm: Before clipping.
            tokens: Tokens of this step alone, on all devices.
            tokens_per_second: Of this step.
            seconds: Duration of this step.
            peak_memory_gib: Most memory held on one device; None where it is not measured.
            **more: Further fields, under their own names.
        """
        self._append(
            {
                "step": step,
                "epoch": epoch,
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens": tokens,
                "tokens_per_second": tokens_per_second,
                "seconds": seconds,
                "peak_memory_gib": peak_memory_gib,
                **more,
            }
        )

    def log_validation(self, step: int, *, loss: float, tokens: int) -> None:
        """Write the loss on data that is not trained on, and its perplexity."""
        # exp overflows at 710; there is no such perplexity to report.
        perplexity = math.exp(loss) if loss < 700 else None
        self._append(
            {"step": step, "val_loss": loss, "val_perplexity": perplexity, "val_tokens": tokens}
        )

    def log_answers(self, step: int, answers: Sequence[str]) -> None:
        """Write what the model says to the sample questions after a step."""
        self._append({"step": step, "answers": answers})

    def log_event(self, event: str, step: int, **facts: object) -> None:
        """Write that something happened after a step: a save, a resume, a skipped step."""
        self._append({"event": event, "step": step, **facts})

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """Return all lines, without the half of one that a killed run may leave at the end.

        Args:
            path: The file. A run that logged nothing has none.

        Raises:
            CheckpointError: A line before the last one is damaged.
        """
        return [line for line, _ in _read(Path(path))]

    def _append(self, line: Mapping[str, object]) -> None:
        text = json.dumps(_plain(line), allow_nan=False, default=str)
        try:
            if not self._begun:
                self._begin()
            # One write a line: whoever reads along sees whole lines.
            with self._path.open("a", encoding="ascii") as file:
                file.write(text + "\n")
        except OSError as error:
            raise OutputError(
                f"{self._path} could not be written: {error}. Free space or make the folder "
                "writable, then resume from the last checkpoint."
            ) from error

    def _begin(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            if self._resumed_step is None:
                os.replace(self._path, self._path.with_suffix(f".previous{self._path.suffix}"))
            else:
                _cut_back(self._path, self._resumed_step)
        self._begun = True


def series(lines: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """Return the steps at which ``key`` was measured and gave a number, with the number."""
    found = ((line.get("step"), line.get(key)) for line in lines)
    return [
        (step, float(value))
        for step, value in found
        if isinstance(step, int) and isinstance(value, int | float) and math.isfinite(value)
    ]


def thin(points: list[Point], limit: int) -> list[Point]:
    """Return at most ``limit`` of the points, and the two ends, that draw the same outline.

    Of each stretch the lowest and the highest point stay, so that no spike is lost.
    """
    if len(points) <= limit:
        return points
    size = math.ceil(2 * len(points) / limit)
    kept = {points[0], points[-1]}
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept.add(min(stretch, key=lambda point: point[1]))
        kept.add(max(stretch, key=lambda point: point[1]))
    return sorted(kept)


def mean(points: list[Point], window: int) -> list[Point]:
    """Return the mean of the last ``window`` values, at about ten places in each window."""
    values = [value for _, value in points]
    ends = range(len(points), 0, -max(1, window // 10))
    return [(points[end - 1][0], fmean(values[max(0, end - window) : end])) for end in ends[::-1]]


def _cut_back(path: Path, step: int) -> None:
    kept = [raw for line, raw in _read(path) if line["step"] <= step]
    aside = path.with_name(f".partial-{path.name}")
    try:
        with aside.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _read(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    raws = path.read_bytes().split(b"\n") if path.exists() else []
    last = max((number for number, raw in enumerate(raws, 1) if raw.strip()), default=0)
    for number, raw in enumerate(raws[:last], 1):
        if line := _parse(raw):
            yield line, raw + b"\n"
        elif raw.strip() and number < last:
            raise CheckpointError(
                f"{path}: line {number} is not a JSON object with a step. Remove that line, or "
                "move the file away; it only tells what happened and no run depends on it."
            )


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except ValueError:  # undecodable bytes included
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _plain(value: object) -> object:
    """Return the value with null for what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
