"""Write the files of an evaluation, all of them or none."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from phi3_plugin.errors import OutputError
from phi3_plugin.evaluate.bootstrap import LEVEL, RESAMPLES, Estimate
from phi3_plugin.evaluate.measures import Result
from phi3_plugin.evaluate.outcomes import Evaluation

SAMPLES, RESULTS, PAGE = "samples.jsonl", "results.json", "evaluation.html"
NAMES = (SAMPLES, PAGE, RESULTS)
"""In the order in which they get their names: who finds the results finds the rest."""

LINE_ENDS = re.compile("[\x85\u2028\u2029]")
"""Characters at which some readers would end a line."""


def refuse_earlier(folder: Path) -> None:
    """Refuse to write where an evaluation lies already: it may have taken hours.

    Raises:
        OutputError: One does.
    """
    if found := [name for name in NAMES if os.path.lexists(folder / name)]:
        raise OutputError(
            f"output_dir: {folder} already holds an evaluation ({', '.join(found)}). Choose "
            "another folder, or replace it with overwrite=True."
        )


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files whole; nothing gets its name before everything is on the disk.

    Args:
        folder: Where to; created if missing.
        texts: What each is to hold, by its name.

    Raises:
        OutputError: One cannot be written; earlier ones are untouched.
    """
    aside = {name: folder / f".partial-{name}" for name in texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            _write(aside[name], text)
        for name in texts:
            os.replace(aside[name], folder / name)
    except OSError as error:
        raise OutputError(
            f"output_dir: {folder} could not be written: {error}. Free space or permissions are "
            "missing; run the command again with another folder."
        ) from error
    finally:
        for path in aside.values():
            with suppress(OSError):
                path.unlink()


def samples_text(evaluation: Evaluation) -> str:
    """Return what ``samples.jsonl`` holds: a line a sample."""
    return "".join(_json(line) + "\n" for line in evaluation.lines())


def results_text(evaluation: Evaluation, found: Sequence[Result], seed: int) -> str:
    """Return what ``results.json`` holds: all numbers and what decided them."""
    content = {
        "samples": len(evaluation.samples),
        "answered": len(evaluation.asked),
        "labelled_tokens": sum(sample.tokens for sample in evaluation.samples),
        "measures": {result.measure.key: _result(result) for result in found},
        "ended": evaluation.endings(),
        "notes": list(evaluation.notes),
        "bootstrap": {"resamples": RESAMPLES, "percent": LEVEL, "seed": seed},
        **evaluation.facts,
    }
    return _json(content, indent=2) + "\n"


def _result(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = {
        "title": result.measure.title,
        "better": "lower" if result.measure.lower_is_better else "higher",
        "samples": result.samples,
    }
    found |= {name: _estimate(value) for name, value in result.models.items()}
    if result.difference is not None:
        found |= {"difference": _estimate(result.difference), "verdict": result.verdict}
    if result.shares is not None:
        found["share_of_samples"] = result.shares._asdict()
    return found


def _estimate(value: Estimate) -> dict[str, float | None]:
    numbers = value._asdict().items()
    return {name: number if math.isfinite(number) else None for name, number in numbers}


def _json(content: Any, indent: int | None = None) -> str:
    text = json.dumps(_finite(content), ensure_ascii=False, indent=indent, allow_nan=False)
    return LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(value: Any) -> Any:
    """Return a value without what JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if isinstance(value, str | int | bool | None) else str(value)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
