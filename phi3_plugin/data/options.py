"""Checks of values that come from a YAML file; ``key`` is the key as the user typed it."""

from collections.abc import Sequence

from phi3_plugin.errors import ConfigError


def check_choice(key: str, value: object, choices: Sequence[str]) -> None:
    """Raise a ConfigError unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{key}: {value!r} must be one of: {', '.join(choices)}.")


def check_switch(key: str, value: object) -> None:
    """Raise a ConfigError unless the value is a bool; a text like "no" would count as True."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key}: {value!r} must be True or False.")


def check_text(key: str, value: object) -> None:
    """Raise a ConfigError unless the value is a string; YAML reads 2024 as a number."""
    if not isinstance(value, str):
        raise ConfigError(f"{key}: {value!r} must be text; put quotes around a number.")


def check_length(key: str, value: object) -> None:
    """Raise a ConfigError unless the value is None or a positive whole number."""
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigError(f"{key}: {value!r} must be a whole number above 0, or null for no limit.")


def check_share(key: str, value: object) -> None:
    """Raise a ConfigError unless the value is a number from 0 up to, but not including, 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"{key}: {value!r} must be a number from 0 up to, but without, 1.")
