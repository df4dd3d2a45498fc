"""How far a run is: a bar at a terminal, lines in a log file."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

LOG_LINES = 100
"""A log file gets about this many lines a run."""
SIGN_OF_LIFE = 60.0
"""And one after this many seconds, if its steps are slow."""

# The numbers come last: a narrow terminal cuts them off and leaves the rest.
_BAR = "{percentage:3.0f}% {n_fmt}/{total_fmt} {bar} {remaining} left  {desc}"
_ENDED = "{percentage:3.0f}% {n_fmt}/{total_fmt} {bar} {elapsed} in all  {desc}"


class Progress:
    """Shows loss, learning rate, speed and time left; a context manager."""

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        columns: int | None = None,
    ) -> None:
        """Show the bar, if the stream is a terminal.

        Args:
            total_steps: Optimizer steps of the whole run.
            start_step: Steps made before this start; they do not count towards the speed.
            stream: Where to write, by default stderr.
            clock: Tells seconds.
            columns: Width of the bar, by default that of the terminal at any time.
        """
        self._total, self._start = total_steps, start_step
        self._stream = stream or sys.stderr
        self._clock = clock
        self._begun = self._shown = clock()
        self._bar = self._open_bar(columns) if self._stream.isatty() else None

    def __enter__(self) -> "Progress":
        """Return the progress itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last state on the screen."""
        self.close()

    def update(self, step: int, *, loss: float, lr: float, tokens_per_second: float | None) -> None:
        """Show that ``step`` steps are made.

        Args:
            step: Steps made, those before a resume included.
            loss: Of this step.
            lr: Learning rate of this step.
            tokens_per_second: None where it is not known.
        """
        speed = [] if tokens_per_second is None else [f"{tokens_per_second:,.0f} tok/s"]
        numbers = "  ".join([f"loss {loss:.4f}", f"lr {lr:.2e}", *speed])
        if self._bar is not None:
            self._bar.set_description_str(numbers, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._is_due(step):
            self._shown = self._clock()
            share = 100 * step // self._total
            self.print(f"{self._of_total(step)}  {share:3}%  {numbers}  {self._time(step)}")

    def validation(self, step: int, *, loss: float, perplexity: float) -> None:
        """Show a validation on a line of its own."""
        self.print(
            f"{self._of_total(step)}  validation loss {loss:.4f}  perplexity {perplexity:.4g}"
        )

    def print(self, text: str) -> None:
        """Write text above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """End the bar's line; harmless if done twice."""
        if self._bar is not None:
            self._bar.bar_format = _ENDED
            self._bar.close()

    def _open_bar(self, columns: int | None) -> "tqdm[None]":
        return tqdm(
            total=self._total,
            initial=self._start,
            file=self._stream,
            ncols=columns,
            dynamic_ncols=columns is None,
            bar_format=_BAR,
            miniters=1,  # by default a fast start keeps slow steps from being shown
            smoothing=0.1,
        )

    def _is_due(self, step: int) -> bool:
        every = max(1, self._total // LOG_LINES)
        late = self._clock() - self._shown >= SIGN_OF_LIFE
        return late or step % every == 0 or step in (self._start + 1, self._total)

    def _of_total(self, step: int) -> str:
        return f"step {step:{len(str(self._total))}}/{self._total}"

    def _time(self, step: int) -> str:
        took = self._clock() - self._begun
        if step >= self._total:
            return f"{clock_face(took)} in all"
        return f"{clock_face(took / max(1, step - self._start) * (self._total - step))} left"


def clock_face(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
