"""What differs when a run goes on: its settings beside those that its checkpoint was made with.

Each key of `Settings` is marked with an `OnResume`: another value is honoured from there on, free,
or refused, or what it stands for is compared where that is known. The keys of a section may have
marks of their own: in the signature of their component, or in a `PartsOnResume`.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from phi3_plugin.checkpoint.base import other_base
from phi3_plugin.errors import CheckpointError
from phi3_plugin.options import OnResume, PartsOnResume, marks, resolved, spelled
from phi3_plugin.redaction import redacted
from phi3_plugin.settings import HINTS, Settings, component, own_distillation, own_loss

FINISHING_KEYS = ("epochs", "max_steps", "early_stop_patience")
"""Keys that decide when a run is finished."""

DEFAULTS = {
    f.name: f.default_factory() if f.default_factory is not MISSING else f.default
    for f in fields(Settings)
}
"""Of the keys that have one."""

_ABSENT = "not given"
"""Stands for an argument that is not given and has no default."""


@dataclass(frozen=True)
class Change:
    """A setting that differs from that of a checkpoint."""

    key: str
    """Dotted."""
    before: Any
    after: Any
    mark: OnResume

    def __str__(self) -> str:
        """Return it in one line."""
        return f"{self.key}: {spelled(self.before)} before, {spelled(self.after)} now"


def record(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings of a run as its checkpoints keep them: plain values, and no secrets.

    What comes from the environment is kept as it is spelled, with a digest by which another value
    is noticed, but for keys on which nothing depends.

    Args:
        cfg: As the recipe gets it.
    """
    shown, real = ({**given, **own_distillation(given)} for given in (redacted(cfg), resolved(cfg)))
    return {
        key: _recorded(shown[key], real[key], free=OnResume.FREE in marks(HINTS[key], OnResume))
        for key in HINTS
        if key in real
    }


def _recorded(shown: Any, real: Any, *, free: bool) -> Any:
    if isinstance(shown, dict) and isinstance(real, dict):
        return {key: _recorded(shown[key], real[key], free=free) for key in real if key in shown}
    if isinstance(shown, list) and isinstance(real, list | tuple) and len(shown) == len(real):
        return [_recorded(one, other, free=free) for one, other in zip(shown, real, strict=True)]
    if shown == real or free:
        return shown
    return f"{shown} (sha256 {hashlib.sha256(repr(real).encode()).hexdigest()[:12]})"


def changes_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Return what differs between two records of `record`, but for what is free.

    A value that is not given is its default. Where the base has moved, what names it has too.
    """
    found: list[Change] = []
    for key, hint in HINTS.items():
        (mark,) = marks(hint, OnResume)
        one, other = _value(before, key), _value(after, key)
        if not isinstance(one, dict) or not isinstance(other, dict):
            found.append(Change(key, one, other, mark))
        elif one.get("_component_") != other.get("_component_"):
            found.append(Change(f"{key}._component_", _name(one), _name(other), mark))
            if mark is not OnResume.REFUSED:  # which says enough
                found += _parts(key, one, other)
        else:
            found += _parts(key, one, other)
    moved = before.get("checkpoint_dir"), after.get("checkpoint_dir")
    return [
        change
        for change in found
        if change.mark is not OnResume.FREE
        and _plain(change.before) != _plain(change.after)
        and (change.before, change.after) != moved
        # It has done its work at the start, and may be gone
        and (change.key, change.after) != ("init_adapter", None)
    ]


def _value(settings: Mapping[str, Any], key: str) -> Any:
    value = settings.get(key, DEFAULTS[key])
    if key == "loss" and isinstance(value, dict):
        return own_loss(value)
    if isinstance(value, Mapping) and value.get("_component_", ...) is None:
        return None
    if value is None:
        return {"seed": 0, "adapter_dtype": settings.get("dtype")}.get(key)
    return value


def _name(section: Mapping[str, Any]) -> Any:
    return section.get("_component_")


def _parts(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    """Yield the parts of a section, equal ones too."""
    parameters = _parameters(after)
    defaults_of = [
        {name: p.default for name, p in _parameters(section).items() if p.default is not p.empty}
        for section in (before, after)
    ]
    (mark,) = marks(HINTS[key], OnResume)
    table = next(iter(marks(HINTS[key], PartsOnResume)), PartsOnResume())
    own = str(_name(after)).startswith("phi3_plugin.")
    if mark is OnResume.CONTENT and not own:  # what it stands for is not known
        mark = OnResume.REFUSED
    for name in dict.fromkeys([*before, *after]):
        if name == "_component_":
            continue
        one, other = (
            section.get(name, defaults.get(name, _ABSENT))
            for section, defaults in zip((before, after), defaults_of, strict=True)
        )
        said = marks(parameters[name].annotation, OnResume) if name in parameters else []
        if name in table.honoured:
            said = [OnResume.HONOURED]
        elif name in table.free:
            said = [OnResume.FREE]
        yield Change(f"{key}.{name}", one, other, said[0] if said else mark)


def _parameters(section: Mapping[str, Any]) -> Mapping[str, Parameter]:
    try:
        return signature(component(str(_name(section)))).parameters
    except Exception:  # gone since, or written in C; the settings of now were checked
        return {}


def _plain(value: Any) -> Any:
    """Return a value as it compares: a list is what a tuple is, and a path its text."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def check_base(folder: Path, base_hash: str, checkpoint_dir: Path) -> None:
    """Refuse to go on over other base weights: no shape would tell.

    Args:
        folder: Of the checkpoint.
        base_hash: Of the weights that it was trained over.
        checkpoint_dir: Of the base model.

    Raises:
        CheckpointError: They are others.
    """
    if hashes := other_base(base_hash, checkpoint_dir):
        raise CheckpointError(
            f"resume: {folder} was trained over other base weights than those of {checkpoint_dir}: "
            f"over some with the hash {hashes}. Give the base the run was started with as "
            "checkpoint_dir, or start anew in another output_dir."
        )


def check_changes(folder: Path, changes: Iterable[Change]) -> None:
    """Refuse changes with which a run cannot go on.

    Args:
        folder: Of the checkpoint.
        changes: All, of `changes_of`.

    Raises:
        CheckpointError: There are some.
    """
    if refused := [str(change) for change in changes if change.mark is OnResume.REFUSED]:
        raise CheckpointError(
            f"resume: {folder} was trained with other settings, which cannot change on the way:\n  "
            + "\n  ".join(refused)
            + "\nUse those of before, or start anew in another output_dir."
        )


def moved(changes: Iterable[Change]) -> bool:
    """Whether only the data itself can tell if it is that of before."""
    return any(map(_is_of_data, changes))


def _is_of_data(change: Change) -> bool:
    return change.mark is OnResume.CONTENT and not change.key.startswith("model.")


def check_unfinished(folder: Path, step: int, changes: Iterable[Change]) -> None:
    """Refuse to repeat a finished run with other settings: nothing would be trained with them.

    Args:
        folder: Its last checkpoint.
        step: Steps made.
        changes: All, of `changes_of`.

    Raises:
        CheckpointError: There are some.
    """
    if lines := [str(change) for change in changes if not _is_of_data(change)]:
        raise CheckpointError(
            f"output_dir: {folder.parent} holds a finished run of {step} steps, and these settings "
            "differ from those it was trained with. Nothing was trained or written:\n  "
            + "\n  ".join(lines)
            + "\nSet another output_dir for a run with them, or use those of before; to train on, "
            "raise max_steps or epochs."
        )


def noted(changes: Iterable[Change], step: int) -> list[dict[str, Any]]:
    """Return the honoured changes as a checkpoint keeps them, with the step after which they hold.

    Args:
        changes: All, of `changes_of`.
        step: Steps made.
    """
    return [
        {"step": step, "key": c.key, "before": _plain(c.before), "after": _plain(c.after)}
        for c in changes
        if c.mark is OnResume.HONOURED
    ]


def told(changes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return by key what a record says of a setting that changed: its values, and since when.

    Args:
        changes: Those of `noted`, in their order.
    """
    texts: dict[str, str] = {}
    for change in changes:
        before = texts.get(change["key"], spelled(change["before"]))
        after = f"from step {change['step'] + 1} on {spelled(change['after'])}"
        texts[change["key"]] = f"{before}; {after}"
    return texts
