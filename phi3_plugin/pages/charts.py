"""Curves over the steps of a run: drawn in a page, where each can be read off, and as a picture.

A page's chart is SVG for lines and HTML for words, so that it has the page's colors and fits every
width; `chart.html.j2` puts together what is worked out here.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from phi3_plugin.pages.numbers import number, rounded

Point = tuple[int, float]
"""A step and the value there."""

TRAINING, NOISY, VALIDATION = "training", "noisy", "validation"
"""Kinds of curves, which have a color each."""
COLORS = {TRAINING: "#2456a6", NOISY: "#b3c7e5", VALIDATION: "#d9641e"}

MARKED = 40
"""Points up to which each has a mark."""
POINTS_DRAWN = 400
"""Points up to which all are drawn; of more, the lowest and the highest of each stretch."""
READ = 200
"""Places at which values can be read off, at most."""


class Curve(NamedTuple):
    """A line of a chart."""

    label: str
    points: list[Point]
    kind: str = TRAINING


class Tick(NamedTuple):
    """A value that an axis names."""

    place: float
    """In percent of the axis."""
    text: str


class Line(NamedTuple):
    """A curve as it is drawn."""

    label: str
    kind: str
    path: str
    """Of an SVG, in percent of the axes."""
    marks: str
    """The same, of points alone; empty where they are too many."""


class Reading(NamedTuple):
    """Where values can be read off."""

    start: float
    """In percent of the axis."""
    width: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Curves, worked out for a page."""

    title: str
    words: str
    """The same, for those who do not see it."""
    xs: list[Tick]
    ys: list[Tick]
    lines: list[Line]
    readings: list[Reading]

    @property
    def room(self) -> int:
        """Characters of the longest value of the upright axis."""
        return max(len(tick.text) for tick in self.ys)


def chart(title: str, curves: Sequence[Curve], *, from_zero: bool = False) -> Chart:
    """Work out a chart.

    Args:
        title: What the values are.
        curves: Each with a point at least.
        from_zero: Whether the upright axis begins there.
    """
    steps = [step for curve in curves for step, _ in curve.points]
    x = _Axis(min(steps), max(steps), whole=True)
    values = [value for curve in curves for _, value in curve.points]
    has_spikes = _has_spikes(values)
    lowest = min(0.0, *values) if from_zero and not has_spikes else min(values)
    y = _Axis(lowest, max(values), logarithmic=has_spikes)
    words = [
        f"{curve.label}: {rounded(first)} at step {number(start)}, "
        f"{rounded(last)} at step {number(end)}."
        for curve in curves
        for (start, first), (end, last) in [(curve.points[0], curve.points[-1])]
    ]
    lines = [_line(curve, x, y) for curve in curves]
    return Chart(title, " ".join(words), x.ticks, y.ticks, lines, _readings(curves, x))


def _has_spikes(values: Sequence[float]) -> bool:
    """Whether one value would flatten all others."""
    return min(values) > 0 and max(values) > 50 * median(values)


class _Axis:
    """Places of values, in percent from low to high."""

    def __init__(
        self, low: float, high: float, *, whole: bool = False, logarithmic: bool = False
    ) -> None:
        self._scale = math.log10 if logarithmic else float
        locator = LogLocator() if logarithmic else _locator(whole=whole)
        values = [float(value) for value in locator.tick_values(low, high)]
        if logarithmic:
            values = [value for value in values if low / 10 < value < high * 10]
        if whole:  # steps end where the run does, and others at a tick
            values = [value for value in values if low <= value <= high]
        else:
            low, high = min(low, values[0]), max(high, values[-1])
        self._low, self._high = self._scale(low), self._scale(high)
        texts = [rounded(value, 6) for value in values]
        if not logarithmic and not any("e" in text for text in texts):  # one precision for all
            places = max(len(text.partition(".")[2]) for text in texts)
            texts = [number(value, places) for value in values]
        self.ticks = [Tick(self.place(v), text) for v, text in zip(values, texts, strict=True)]

    def place(self, value: float) -> float:
        room = self._high - self._low
        return round(100 * (self._scale(value) - self._low) / room, 2) if room else 50.0


def _locator(*, whole: bool) -> MaxNLocator:
    return MaxNLocator(5, integer=whole, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10])


def _line(curve: Curve, x: _Axis, y: _Axis) -> Line:
    points = [(x.place(step), round(100 - y.place(value), 2)) for step, value in _seen(curve)]
    path = "M" + "L".join(f"{right:g} {down:g}" for right, down in points)
    marks = "".join(f"M{right:g} {down:g}h0" for right, down in points)
    return Line(curve.label, curve.kind, path, marks if len(points) <= MARKED else "")


def _seen(curve: Curve) -> list[Point]:
    """Return the points of a curve that are far enough apart to be seen."""
    points = curve.points
    if len(points) <= POINTS_DRAWN:
        return points
    size = -(-len(points) // (POINTS_DRAWN // 2))
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    ends = [{min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])} for s in stretches]
    return [points[0], *(point for pair in ends for point in sorted(pair)), points[-1]]


def _readings(curves: Sequence[Curve], x: _Axis) -> list[Reading]:
    """Return the stretches of the axis, each with the last value that a curve has in it."""
    steps = sorted({step for curve in curves for step, _ in curve.points})
    every = -(-len(steps) // READ)
    ends = steps[::-1][::every][::-1]
    borders = [x.place((a + b) / 2) for a, b in pairwise(ends)]
    borders = [0.0, *borders, 100.0]
    texts = {end: [f"step {number(end)}"] for end in ends}
    for curve in curves:
        points, i = curve.points, 0
        for before, end in pairwise([-1, *ends]):
            while i < len(points) and points[i][0] <= end:
                i += 1
            if i and points[i - 1][0] > before:
                texts[end].append(f"{curve.label}: {rounded(points[i - 1][1], 5)}")
    return [
        Reading(start, round(end - start, 2), "\n".join(texts[step]))
        for step, (start, end) in zip(ends, pairwise(borders), strict=True)
    ]


# As a picture

STYLE = {
    "axes.edgecolor": "#c9ced6",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": "#5b6470",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 9,
    "grid.color": "#e8ebef",
    "legend.frameon": False,
    "lines.markersize": 4,
    "savefig.dpi": 160,
    "text.parse_math": False,  # a name may hold dollars
    "xtick.color": "#5b6470",
    "ytick.color": "#5b6470",
}


def picture(title: str, curves: Sequence[Curve]) -> bytes:
    """Return losses as a PNG; equal curves give equal bytes, whatever the user's matplotlibrc says.

    Args:
        title: Above the picture.
        curves: Each with a point at least.
    """
    buffer = io.BytesIO()
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(10, 4), layout="constrained")
        axes = figure.subplots()
        for label, points, kind in curves:
            marker, width = "o" if len(points) <= MARKED else None, 0.9 if kind == NOISY else 1.3
            steps, values = zip(*points, strict=True)
            color = COLORS[kind]
            axes.plot(steps, values, color=color, label=label, marker=marker, linewidth=width)
        if _has_spikes([value for curve in curves for _, value in curve.points]):
            axes.set_yscale("log")
        axes.set(title=title, xlabel="step", ylabel="loss")
        axes.legend()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: rounded(value, 6)))
        axes.xaxis.set_major_locator(_locator(whole=True))
        figure.savefig(buffer, format="png", metadata={"Software": None})  # of no version
    return buffer.getvalue()
