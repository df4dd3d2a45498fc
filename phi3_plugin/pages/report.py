"""What a training run did: ``report.html``, and its losses as a picture."""

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import nn

from phi3_plugin.pages import dotted, render, versions, write_files
from phi3_plugin.train.monitor import CHANGED, RESUMED, SKIPPED, History, clock_face

Line = Mapping[str, Any]
"""A line of metrics.jsonl."""

Point = tuple[int, float]
"""A step and the value there."""


def write_report(
    folder: Path,
    *,
    model: nn.Module,
    settings: Mapping[str, Any],
    changes: Mapping[str, str],
    adapter: Path,
    ending: str | None,
    answers: Sequence[tuple[str, str, str]],
) -> Path:
    """Write ``report.html``, which needs no other file, and ``loss.png`` beside it.

    Equal runs give equal files. A run without a loss gets no picture.

    Args:
        folder: Of the run, with its ``metrics.jsonl``.
        model: What was trained.
        settings: As the user gave them, redacted.
        changes: By dotted key, the values of settings that changed on the way.
        adapter: Folder of the last checkpoint.
        ending: What ended the run before its last step; None if nothing did.
        answers: Prompt, answer before and answer after, of each sample question.

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
    page = render(
        "report.html.j2",
        ending=ending,
        tiles=list(_tiles(history)),
        loss=_chart("Loss", losses, WIDE, NARROW) if losses else None,
        charts=[
            _chart(title, [Curve(title, points, BLUE)], SMALL)
            for key, title in CHARTS.items()
            if (points := series(history, key))
        ],
        answers=[
            (*said, [(step, texts[n]) for step, texts in during if n < len(texts)])
            for n, said in enumerate(answers)
        ],
        adapter=str(adapter),
        modules=Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in adapted),
        trainable=sum(size for size, trained in sizes if trained),
        parameters=sum(size for size, _ in sizes),
        settings=list({**dict(dotted(settings)), **changes}.items()),
        versions={**versions("torchao"), "device": device_name()},
    )
    picture = {"loss.png": _draw("Loss", losses, WIDE, "png")} if losses else {}
    write_files(folder, {"report.html": page, **picture}, "The run is unharmed.")
    if not losses:
        (folder / "loss.png").unlink(missing_ok=True)  # that of an earlier run
    return folder / "report.html"


def device_name() -> str:
    """Return the device as its user knows it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def _tiles(history: Sequence[Line]) -> Iterator[tuple[str, str]]:
    events = Counter(line.get("event") for line in history)
    if losses := series(history, "loss"):
        window = _window(losses)
        label = f", mean of {window:,} steps" if window > 1 else ""
        yield f"Final training loss{label}", f"{running_mean(losses, window)[-1][1]:.4f}"
    if losses := series(history, "val_loss"):
        step, best = min(losses, key=lambda point: point[1])
        yield f"Best validation loss, step {step:,}", f"{best:.4f}"
    yield "Steps", f"{max((step for step, _ in series(history, 'step')), default=0):,}"
    if tokens := series(history, "tokens"):
        yield "Tokens", f"{sum(number for _, number in tokens):,.0f}"
    if seconds := series(history, "seconds"):
        yield "Training time", clock_face(sum(number for _, number in seconds))
    if memory := series(history, "peak_memory_gib"):
        yield "Peak memory", f"{max(number for _, number in memory):.2f} GiB"
    yield "Skipped steps", f"{events[SKIPPED]:,}"
    if resumed := series([line for line in history if line.get("event") == RESUMED], "step"):
        yield "Resumed at step", " and ".join(f"{step:,}" for step, _ in resumed)


def _to_the_last_questions(history: Sequence[Line]) -> Sequence[Line]:
    """Return what was logged since the sample questions changed, if they did."""
    for n in reversed(range(len(history))):
        if history[n].get("event") == CHANGED and history[n].get("key") == "sample_prompts":
            return history[n:]
    return history


# Curves


def series(history: Sequence[Line], key: str) -> list[Point]:
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


# Charts

WIDE, NARROW, SMALL = (10.0, 3.8), (3.9, 2.8), (3.2, 2.1)
"""Sizes in inches of 96 pixels."""

BLUE, PALE, ORANGE, GREY = "#2456a6", "#b3c7e5", "#d9641e", "#5b6470"
CHARTS = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}
STYLE = {
    "axes.edgecolor": "#c9ced6",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": "#e8ebef",
    "legend.frameon": False,
    "lines.markersize": 4,
    "path.simplify_threshold": 1.0,  # pixels; a long run has more steps than a page has
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    "svg.hashsalt": "phi3_plugin",  # without it ids are random
    "xtick.color": GREY,
    "ytick.color": GREY,
}


class Curve(NamedTuple):
    """A line of a chart."""

    label: str
    points: list[Point]
    color: str


def _loss_curves(history: Sequence[Line]) -> list[Curve]:
    training, validation = series(history, "loss"), series(history, "val_loss")
    curves = [Curve("Training loss", training, BLUE)]
    if (window := _window(training)) > 1:
        smooth = Curve(f"Mean of {window:,} steps", running_mean(training, window), BLUE)
        curves = [curves[0]._replace(color=PALE), smooth]
    curves.append(Curve("Validation loss", validation, ORANGE))
    return [curve for curve in curves if curve.points]


def _chart(title: str, curves: list[Curve], *sizes: tuple[float, float]) -> dict[str, Any]:
    """Return what the template needs for a chart, drawn in each of the sizes."""
    words = [
        f"{curve.label}: {first:,.4g} at step {start}, {last:,.4g} at step {end}."
        for curve in curves
        for (start, first), (end, last) in [(curve.points[0], curve.points[-1])]
    ]
    pictures = [base64.b64encode(_draw(title, curves, size, "svg")).decode() for size in sizes]
    return {"title": title, "alt": " ".join(words), "pictures": pictures}


def _draw(title: str, curves: list[Curve], size: tuple[float, float], kind: str) -> bytes:
    buffer = io.BytesIO()
    with style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for label, points, color in curves:
            marker, width = "o" if len(points) <= 40 else None, 0.9 if color == PALE else 1.3
            axes.plot(
                *zip(*points, strict=True), color=color, label=label, marker=marker, linewidth=width
            )
        values = [value for curve in curves for _, value in curve.points]
        if min(values) > 0 and max(values) > 50 * median(values):
            axes.set_yscale("log")  # one spike would flatten the rest
        elif title != "Loss":
            axes.set_ylim(bottom=0)
        if title == "Loss":
            axes.set(xlabel="step", ylabel="loss")
            axes.legend()
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        # Formats write the hour or the version unless told not to
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        # A page's card shows through, whatever its color
        figure.savefig(buffer, format=kind, metadata=metadata, transparent=kind == "svg")
    return buffer.getvalue()


def _tick(value: float, _: object) -> str:
    return f"{value:,.8f}".rstrip("0").rstrip(".")
