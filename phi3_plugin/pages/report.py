"""A page and a picture that tell, once a run has ended, what it did."""

import base64
import io
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeGuard

import jinja2
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from phi3_plugin.errors import OutputError
from phi3_plugin.train.monitor import RESUMED, SKIPPED, Point, clock_face, mean, series, thin

_POINTS = 1000  # of one curve, at most
_TEMPLATE = Path(__file__).with_name("report.html.j2")
_WIDE, _NARROW, _SMALL = (10.0, 3.8), (3.9, 2.8), (3.2, 2.1)  # inches of 96 pixels
_BLUE, _PALE, _ORANGE, _GREY = "#2456a6", "#b3c7e5", "#d9641e", "#5b6470"
_CHARTS = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}
_STYLE = {
    "axes.edgecolor": "#c9ced6",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": _GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": "#e8ebef",
    "legend.frameon": False,
    "lines.markersize": 4,
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    "svg.hashsalt": "phi3_plugin",  # without it ids are random
    "xtick.color": _GREY,
    "ytick.color": _GREY,
}
# The page is made to be passed on.
_SECRET = re.compile(
    r"token|(.*_)?(password|secret|api_?key|access_key|(hf|auth|access|api)_token)", re.IGNORECASE
)


@dataclass(frozen=True)
class Facts:
    """What a report tells about a run beside its history."""

    ending: str
    """How the run ended, in a sentence."""
    finished: bool
    """Whether it made all its steps."""
    adapter: str | Path | None
    """Where the adapter lies; None if none was saved."""
    settings: Mapping[str, Any]
    """The configuration, nested as the user wrote it."""
    versions: Mapping[str, str]
    """As ``versions`` returns them."""
    adapted_modules: Sequence[str]
    """Names of the modules that carry an adapter."""
    trainable_parameters: int
    total_parameters: int
    samples: Sequence[Mapping[str, Any]] = ()
    """Answers to compare: prompt, before, after; and during, pairs of a step and an answer."""
    title: str = "Phi-3 fine-tuning"


class _Curve(NamedTuple):
    label: str
    points: list[Point]
    color: str


def write_report(folder: str | Path, history: Sequence[Mapping[str, Any]], facts: Facts) -> Path:
    """Write ``report.html``, which needs no other file, and ``loss.png`` beside it.

    Equal input gives equal files. A run without a loss gets no picture.

    Args:
        folder: Where to; created if missing.
        history: All lines of the run.
        facts: What the history does not say.

    Returns:
        The page.

    Raises:
        OutputError: A file cannot be written.
    """
    page, loss = Path(folder) / "report.html", _loss_curves(history)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(_TEMPLATE.read_text("utf-8")).render(
        facts=facts,
        summary=list(_summary(history)),
        loss=_chart("Loss", loss, _WIDE, _NARROW) if loss else None,
        charts=[
            _chart(title, [_Curve(title, points, _BLUE)], _SMALL)
            for key, title in _CHARTS.items()
            if (points := series(history, key))
        ],
        modules=Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in facts.adapted_modules),
        settings=list(_rows(facts.settings)),
    )
    # An answer cut in the middle of an emoji holds what UTF-8 cannot.
    _write(page, text.encode("utf-8", "replace"))
    _write(page.with_name("loss.png"), _draw("Loss", loss, _WIDE, "png") if loss else None)
    return page


def versions(device: str) -> dict[str, str]:
    """Return the versions that a run depends on, and the device as its user knows it."""
    packages = ("phi3-plugin", "torch", "torchtune", "torchao")
    found = {name: version(name) for name in packages}
    return {**found, "python": platform.python_version(), "device": device}


def _loss_curves(history: Sequence[Mapping[str, Any]]) -> list[_Curve]:
    training, validation = series(history, "loss"), series(history, "val_loss")
    curves = [_Curve("Training loss", training, _BLUE)]
    if (window := _window(training)) > 1:
        smooth = _Curve(f"Mean of {window:,} steps", mean(training, window), _BLUE)
        curves = [curves[0]._replace(color=_PALE), smooth]
    curves.append(_Curve("Validation loss", validation, _ORANGE))
    return [curve for curve in curves if curve.points]


def _window(training: list[Point]) -> int:
    """Return how many steps a mean is taken over: one if few are to be seen anyway."""
    return len(training) // 50 if len(training) >= 200 else 1


def _chart(title: str, curves: list[_Curve], *sizes: tuple[float, float]) -> dict[str, Any]:
    pictures = [base64.b64encode(_draw(title, curves, size, "svg")).decode() for size in sizes]
    said = [
        f"{curve.label}: {first:,.4g} at step {start}, {last:,.4g} at step {end}."
        for curve in curves
        for (start, first), (end, last) in [(curve.points[0], curve.points[-1])]
    ]
    return {"title": title, "alt": " ".join(said), "pictures": pictures}


def _draw(title: str, curves: list[_Curve], size: tuple[float, float], kind: str) -> bytes:
    buffer = io.BytesIO()
    with style.context(["default", _STYLE]):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        _plot(axes, curves)
        if title == "Loss":
            axes.set(xlabel="step", ylabel="loss")
            axes.legend()
        elif axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)
        # Formats write the hour or the version unless told not to.
        told = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, metadata=told)
    return buffer.getvalue()


def _plot(axes: Axes, curves: list[_Curve]) -> None:
    for label, points, color in curves:
        marker, width = "o" if len(points) <= 40 else None, 0.9 if color == _PALE else 1.3
        x, y = zip(*thin(points, _POINTS), strict=True)
        axes.plot(x, y, color=color, label=label, marker=marker, linewidth=width)
    values = [value for curve in curves for _, value in curve.points]
    if min(values) > 0 and max(values) > 50 * median(values):
        axes.set_yscale("log")  # one spike would flatten the rest
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def _tick(value: float, _: object) -> str:
    return f"{value:,.8f}".rstrip("0").rstrip(".")


def _summary(history: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    events = Counter(line.get("event") for line in history)
    if losses := series(history, "loss"):
        window = _window(losses)
        label = f", mean of {window:,} steps" if window > 1 else ""
        yield f"Final training loss{label}", f"{mean(losses, window)[-1][1]:.4f}"
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


def _rows(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting with its dotted name, as it would stand in YAML."""
    items: list[tuple[object, object]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif _is_list(value) and any(isinstance(item, Mapping) for item in value):
        items = list(enumerate(value))
    for key, item in items:
        hidden = isinstance(item, str) and _SECRET.fullmatch(str(key))
        yield from _rows("(not shown)" if hidden else item, f"{name}.{key}" if name else str(key))
    if name and not items:
        yield name, _cell(value)


def _cell(value: object) -> str:
    if _is_list(value) and value:
        return ", ".join(map(_cell, value))
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _write(path: Path, data: bytes | None) -> None:
    """Write a file whole; None removes that of an earlier report."""
    aside = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(data or b"")
        os.replace(aside, path)
        if data is None:
            path.unlink()
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error}. The run is unharmed.") from error
    finally:
        with suppress(OSError):
            aside.unlink()
