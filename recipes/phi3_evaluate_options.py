"""The keys of `phi3_plugin.recipes.phi3_evaluate`, beside those of a training run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from phi3_plugin.recipes.phi3_inspect_data import as_worker_of

from phi3_plugin.errors import ConfigError
from phi3_plugin.generate.sampling import Sampling, read_sampling
from phi3_plugin.train import settings as strict
from phi3_plugin.train.kinds import Count, Folder, Section, Seed, Switch, kinds_of
from phi3_plugin.train.settings import Settings
from phi3_plugin.train.stock_keys import STOCK_KEYS, closest, shown, unknown_key


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys that only this recipe has."""

    adapter: Folder | None = None
    """Of any origin; or a whole model that was fine-tuned. null evaluates the base alone."""
    check_base: Switch = True
    """Refuse an adapter that says it was made for other base weights."""
    answers: Switch = True
    """False measures loss and accuracy alone, which takes no time beside answers."""
    generation: Section = field(default_factory=dict)
    """How answers are generated, see phi3_plugin.generate.sampling; greedily by default."""
    generation_batch_size: Count = 8
    """Answers that one process generates at once."""
    max_samples: Count | None = None
    """Evaluate the first so many; null is all."""
    worst: Seed = 10
    """Answers that the page shows of each kind."""
    overwrite: Switch = False
    """Replace an evaluation that output_dir holds already."""


HINTS = get_type_hints(Options, include_extras=True)


def read_options(cfg: DictConfig) -> tuple[Settings, Options, Sampling]:
    """Read a configuration: the run's settings, the recipe's own, and how answers are generated.

    Args:
        cfg: YAML and command line merged; is left without the recipe's own keys.

    Raises:
        ConfigError: Something is wrong; all problems, one line each.
    """
    given, problems = _taken(cfg)
    problems += [line for key in given for line in _mistake(key, given[key])]
    problems += _misspelled(cfg)
    readings: dict[str, Any] = {}
    for name, read in {
        "settings": lambda: _settings(cfg),
        "sampling": lambda: _sampling(given.get("generation")),
    }.items():
        try:
            readings[name] = read()
        except ConfigError as error:
            problems += str(error).splitlines()
    if problems:
        raise ConfigError("\n".join(problems))
    if given.get("adapter") is not None:
        given["adapter"] = Path(given["adapter"])
    return readings["settings"], Options(**given), readings["sampling"]


def _taken(cfg: DictConfig) -> tuple[dict[str, Any], list[str]]:
    """Take the recipe's own keys out; return their values, and the problem of each without one."""
    given, problems = dict[str, Any](), list[str]()
    for key in [key for key in HINTS if key in cfg]:
        try:
            value = cfg.get(key)
            is_section = OmegaConf.is_config(value)
            given[key] = OmegaConf.to_container(value, resolve=True) if is_section else value
        except OmegaConfBaseException as error:
            problems.append(f"{key}: {str(error).splitlines()[0]}.")
        cfg.pop(key, None)
    if given.get("generation", {}) is None:
        given["generation"] = {}
    return given, problems


def _mistake(key: str, value: Any) -> list[str]:
    kinds = kinds_of(HINTS[key])
    if any(kind.accepts(value) for kind in kinds):
        return []
    return [f"{key}: {shown(value)} must be {' or '.join(kind.words for kind in kinds)}."]


def _misspelled(cfg: DictConfig) -> list[str]:
    """Take out keys that are nearly the recipe's own, which a run knows nothing of."""
    known = [*strict.HINTS, *STOCK_KEYS, "loss", "profiler"]
    wrong = [str(key) for key in cfg if key not in known]
    meant = [key for key in wrong if closest(key, [*HINTS, *known]) in HINTS]
    return [unknown_key(key, cfg.pop(key), "this recipe", HINTS) for key in meant]


def _settings(cfg: DictConfig) -> Settings:
    with as_worker_of(1):  # what several processes cannot train on they can evaluate
        return strict.read(cfg)


def _sampling(section: Any) -> Sampling:
    if not isinstance(section, Mapping):
        return Sampling()
    try:
        return read_sampling(section)
    except ConfigError as error:
        lines = str(error).splitlines()
        raise ConfigError("\n".join(f"generation.{line}" for line in lines)) from error
