"""Checks of what a configuration says about one source of rows."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_plugin.data.formats import check_format
from phi3_plugin.data.options import check_length, check_switch, check_text
from phi3_plugin.data.sandbox import compile_filter
from phi3_plugin.errors import ConfigError

UNSET = (
    "Give a .json, .jsonl, .csv, .arrow or .parquet file, a folder of them, a glob or the name of "
    "a data set on the Hugging Face hub, as in dataset.source=data/train.jsonl"
)


def wrong_source(key: str, source: object) -> list[str]:
    """Return what is wrong with a source: a name, or a dictionary of options."""
    if not isinstance(source, Mapping):
        return _wrong_name(key, source)
    named = [] if "source" not in source else _wrong_name(f"{key}.source", source["source"])
    missing = [] if "source" in source else [f"{key}.source is not set. {UNSET}"]
    return [*missing, *named, *wrong_options(key, {k: source[k] for k in source if k != "source"})]


def wrong_options(key: str, options: Mapping[Any, Any]) -> list[str]:
    """Return what is wrong with options; ``key`` is where they stand."""
    problems = []
    if options.keys() & {"format", "columns"}:
        options = {**options, "format": (options.get("format"), options.get("columns"))}
    for name, value in options.items():
        try:
            _check(key, name, value)
        except ConfigError as error:
            problems.append(str(error))
    return problems


def _check(key: str, name: Any, value: Any) -> None:
    known = ("weight", "format", "columns", "split", "subset", "streaming", "filter", "max_samples")
    if name not in known:
        raise ConfigError(f"{key}.{name} is unknown. Known keys: source, {', '.join(known)}.")
    key_of_value = f"{key}.{name}"
    if name == "format":
        check_format(value[0], value[1], key)
    elif name == "weight":
        _check_weight(key_of_value, value)
    elif name == "max_samples":
        check_length(key_of_value, value)
    elif name == "streaming":
        check_switch(key_of_value, value)
    elif name == "split" or (name in ("subset", "filter") and value is not None):
        check_text(key_of_value, value)
        if name == "filter":
            compile_filter(value, key_of_value)


def _check_weight(key: str, weight: object) -> None:
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 < weight < math.inf:  # type: ignore[operator]
        raise ConfigError(
            f"{key}: {weight!r} must be a number above 0: how often an epoch sees each sample."
        )


def _wrong_name(key: str, name: object) -> list[str]:
    if name and isinstance(name, str | Path):
        return []
    return [f"{key}: {name!r} must be a string. {UNSET}" if name else f"{key} is not set. {UNSET}"]
