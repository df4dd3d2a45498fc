"""What may be passed on of a configuration: without secrets, and without the environment's values.

A run's saved state, its report, the model card and the loggers show settings; all ask here.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from phi3_plugin.options import HIDDEN, is_secret, resolved

_FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:[^{},]*\}")
_LOGIN = re.compile(r"(?<=://)[^/?#\s@]*@")
"""In an address: a name, a password, or a token in the place of both."""


def redacted(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration in plain Python, resolved but for what is nobody else's business.

    ``${oc.env:NAME}`` stands as it is, wherever its value would. Values of keys that look secret,
    such as ``api_key`` or ``auth``, are `HIDDEN`, whatever their type; so is a login in an address.

    Args:
        cfg: YAML and command line merged.
    """
    with _environment_as_spelled():
        return {key: _hidden(value, key) for key, value in resolved(cfg).items()}


def redacted_as_spelled(cfg: DictConfig) -> DictConfig:
    """Return a configuration without its secrets that can be run again: nothing is resolved."""
    spelled: Any = OmegaConf.to_container(cfg)
    return OmegaConf.create({key: _hidden(value, key) for key, value in spelled.items()})


def as_config(values: Mapping[str, Any]) -> DictConfig:
    """Return plain values as a configuration that means just them: ``${`` in a text is text."""
    return OmegaConf.create({key: _escaped(value) for key, value in values.items()})


def _hidden(value: Any, key: str, within: bool = False) -> Any:
    secret = within or is_secret(key)
    if isinstance(value, Mapping):
        return {name: _hidden(item, str(name), secret) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(item, key, secret) for item in value]
    if isinstance(value, str):
        value = _LOGIN.sub(f"{HIDDEN}@", value)
    is_spelled = isinstance(value, str) and _FROM_ENVIRONMENT.fullmatch(value)
    return HIDDEN if secret and value is not None and not is_spelled else value


def _escaped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _escaped(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)


@contextmanager
def _environment_as_spelled() -> Iterator[None]:
    """Let ``${oc.env:NAME}`` be its own value, also where another key refers to one that has it."""

    def spelled(name: str, default: Any = None) -> str:
        return f"${{oc.env:{name}}}"

    _register(spelled)
    try:
        yield
    finally:
        _register(oc.env)


def _register(resolver: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # OmegaConf 2.4 names the function as 2.0 did
        OmegaConf.register_new_resolver("oc.env", resolver, replace=True)
