"""What a training run did: ``report.html``, and its losses as a picture."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from inspect import Parameter, signature
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn

from phi3_plugin.inspect import source_name
from phi3_plugin.pages import dotted, render, versions, write_files
from phi3_plugin.pages.charts import NOISY, VALIDATION, Curve, Point, chart, picture
from phi3_plugin.pages.numbers import count, number, percent
from phi3_plugin.settings import Settings, component
from phi3_plugin.terminal import harmless
from phi3_plugin.train.monitor import CHANGED, OVERFLOWED, RESUMED, SKIPPED, History, clock_face

Logged = Mapping[str, Any]
"""A line of metrics.jsonl."""

CHARTS = {
    "reward_margin": "Reward margin",
    "reward_accuracy": "Reward accuracy",
    "kl": "KL divergence",
    "sft_loss": "Cross entropy",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}
"""Drawn beside the losses, by key."""


class Ending(NamedTuple):
    """How far a run has come."""

    steps: int
    """That were made."""
    total: int
    """That were to be made."""
    ending: str | None
    """What ended it before its last step; None if nothing did."""
    date: str
    """When it ended."""

    @property
    def is_finished(self) -> bool:
        """Whether all its steps were made."""
        return self.steps >= self.total

    def in_words(self) -> str:
        """Return all but the date, in a sentence."""
        steps = f"{number(self.steps)} of {count(self.total, 'step')}"
        if self.is_finished:
            return f"Finished: {steps}."
        return f"Stopped after {steps}: {self.ending}."


def write_report(
    folder: Path,
    *,
    model: nn.Module,
    settings: Mapping[str, Any],
    changes: Mapping[str, str],
    adapter: Path,
    base: str,
    outcome: Ending,
    samples: int,
    held_out: int,
    answers: Sequence[tuple[str, str, str]],
    next_commands: Sequence[tuple[str, str]],
) -> Path:
    """Write ``report.html``, which needs no other file, and ``loss.png`` beside it.

    Equal runs give equal files. A run without a loss gets no picture.

    Args:
        folder: Of the run, with its ``metrics.jsonl``.
        model: What was trained.
        settings: As the user gave them, redacted.
        changes: By dotted key, the values of settings that changed on the way.
        adapter: Folder of the last checkpoint.
        base: Name of what was trained, on the Hub or of its folder.
        outcome: How far the run has come.
        samples: That were trained on.
        held_out: Samples that were validated on.
        answers: Prompt, answer before and answer after, of each sample question.
        next_commands: What a user may want to do next, and what to type for it.

    Returns:
        The page.

    Raises:
        OutputError: A file cannot be written.
    """
    history = History.read(folder / "metrics.jsonl")
    losses = _loss_curves(history)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_a")]
    during = [
        (line["step"], line["answers"])
        for line in _to_the_last_questions(history)
        if "answers" in line
    ]
    title = f"{base} on {_data_name(settings)}"
    page = render(
        "report.html.j2",
        title=title,
        outcome=outcome,
        tiles=list(_tiles(history, samples, held_out)),
        loss=chart("Loss", losses) if losses else None,
        charts=[
            chart(title, curves, from_zero=True)
            for key, title in CHARTS.items()
            if (curves := _curves(history, key, title))
        ],
        answers=[
            (*said, [(step, texts[n]) for step, texts in during if n < len(texts)])
            for n, said in enumerate(answers)
        ],
        adapter=str(adapter),
        modules=Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in adapted),
        trainable=sum(size for size, trained in sizes if trained),
        parameters=sum(size for size, _ in sizes),
        settings=list(_settings(settings, changes)),
        versions={**versions("torchao"), "device": device_name()},
        next=next_commands,
        number=number,
        count=count,
    )
    files: dict[str, str | bytes] = {"report.html": page}
    if losses:
        files["loss.png"] = picture(harmless(title), losses)
    write_files(folder, files, "The run is unharmed.")
    if not losses:
        (folder / "loss.png").unlink(missing_ok=True)  # that of an earlier run
    return folder / "report.html"


def device_name() -> str:
    """Return the device as its user knows it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {count(torch.get_num_threads(), 'thread')}"


def _data_name(settings: Mapping[str, Any]) -> str:
    """Return what a run was trained on, files without their folders."""
    names = source_name(settings["dataset"]).split(", ")
    names = [os.path.basename(name.rstrip("/")) or name for name in names]
    more = f" and {len(names) - 2} more" if len(names) > 3 else ""
    return ", ".join(names[: 2 if more else 3]) + more


def _tiles(history: Sequence[Logged], samples: int, held_out: int) -> Iterator[tuple[str, str]]:
    events = Counter(line.get("event") for line in history)
    if losses := series(history, "loss"):
        window = _window(losses)
        label = f", mean of {number(window)} steps" if window > 1 else ""
        yield f"Final training loss{label}", number(running_mean(losses, window)[-1][1], 4)
    if losses := series(history, "val_loss"):
        step, best = min(losses, key=lambda point: point[1])
        yield f"Best validation loss, step {number(step)}", number(best, 4)
        if perplexity := dict(series(history, "val_perplexity")).get(step):
            yield "Validation perplexity", number(perplexity, 3)
        if accuracy := dict(series(history, "val_reward_accuracy")).get(step):
            yield "Its reward accuracy", percent(accuracy)
        if distance := dict(series(history, "val_kl")).get(step):
            yield "Its KL divergence", number(distance, 3)
    yield "Samples", number(samples)
    yield "Held out", number(held_out)
    if tokens := series(history, "tokens"):
        yield "Tokens", number(sum(many for _, many in tokens))
    if seconds := series(history, "seconds"):
        yield "Training time", clock_face(sum(many for _, many in seconds))
    if memory := series(history, "peak_memory_gib"):
        yield "Peak memory", f"{number(max(many for _, many in memory), 2)} GiB"
    if skipped := events[SKIPPED]:
        yield "Skipped steps", number(skipped)
    if overflowed := events[OVERFLOWED]:
        yield "Steps skipped for a smaller loss scale", number(overflowed)
    if resumed := series([line for line in history if line.get("event") == RESUMED], "step"):
        yield "Resumed at step", " and ".join(number(step) for step, _ in resumed)


def _to_the_last_questions(history: Sequence[Logged]) -> Sequence[Logged]:
    """Return what was logged since the sample questions changed, if they did."""
    for n in reversed(range(len(history))):
        if history[n].get("event") == CHANGED and history[n].get("key") == "sample_prompts":
            return history[n:]
    return history


# Settings


class Setting(NamedTuple):
    """A key of the YAML, dotted, as the page shows it."""

    key: str
    value: str
    default: str
    """Empty where there is none."""
    changed: bool
    """Whether the value is not the default."""


def _settings(settings: Mapping[str, Any], changes: Mapping[str, str]) -> Iterator[Setting]:
    defaults = _defaults(settings)
    for key, value in {**dict(dotted(settings)), **changes}.items():
        known = key if key in defaults else key.partition(".")[0]
        default = defaults.get(known, "")
        differs = known in defaults and (key != known or value != default)
        yield Setting(key, value, default, differs or key in changes)


def _defaults(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the default of each key that has one: the recipe's, or that of the component."""
    values: dict[str, Any] = {}
    for field in fields(Settings):
        if field.default is not MISSING:
            values[field.name] = field.default
        elif field.default_factory is not MISSING:
            values[field.name] = field.default_factory()
    defaults = dict(dotted(values))
    for key, section in settings.items():
        if isinstance(section, Mapping) and "_component_" in section:
            # null, one that only another recipe needs, or written in C: nothing is known of it
            with suppress(Exception):
                parameters = signature(component(section["_component_"])).parameters.items()
                known = {k: p.default for k, p in parameters if p.default is not Parameter.empty}
                known.pop("source", None)  # null, though it has to be given
                defaults |= dict(dotted(known, key))
    return defaults


# Curves


def series(history: Sequence[Logged], key: str) -> list[Point]:
    """Return the steps at which ``key`` was measured and gave a number, with the number."""
    pairs = ((line.get("step"), line.get(key)) for line in history)
    return [
        (step, float(value))
        for step, value in pairs
        if isinstance(step, int) and isinstance(value, int | float) and math.isfinite(value)
    ]


def running_mean(points: list[Point], window: int) -> list[Point]:
    """Return the mean of the last ``window`` values, at about ten places in each window."""
    values = [value for _, value in points]
    ends = range(len(points), 0, -max(1, window // 10))
    return [(points[end - 1][0], fmean(values[max(0, end - window) : end])) for end in ends[::-1]]


def _window(losses: list[Point]) -> int:
    """Return how many steps a mean is taken over: one if few are to be seen anyway."""
    return len(losses) // 50 if len(losses) >= 200 else 1


def _curves(history: Sequence[Logged], key: str, title: str) -> list[Curve]:
    """Return what was measured at each step, and at each validation if it was there."""
    held_out = Curve("Validation", series(history, f"val_{key}"), VALIDATION)
    training = Curve("Training" if held_out.points else title, series(history, key))
    return [curve for curve in (training, held_out) if curve.points]


def _loss_curves(history: Sequence[Logged]) -> list[Curve]:
    training, validation = series(history, "loss"), series(history, "val_loss")
    curves = [Curve("Training loss", training)]
    if (window := _window(training)) > 1:
        smooth = Curve(f"Mean of {number(window)} steps", running_mean(training, window))
        curves = [curves[0]._replace(kind=NOISY), smooth]
    curves.append(Curve("Validation loss", validation, VALIDATION))
    return [curve for curve in curves if curve.points]
