"""What people see of a run: metrics file, progress, and torchtune's loggers, from one process."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config
from torchtune.training.metric_logging import DiskLogger as TorchtuneDiskLogger
from tqdm import tqdm

from phi3_plugin.errors import CheckpointError, OutputError
from phi3_plugin.settings import Settings
from phi3_plugin.train.step import StepResult

# torchtune's disk logger, started when there is something to log.


class DiskLogger:
    """Writes ``output_dir/logs/log_*.txt`` and the settings, from the first step on.

    torchtune's recipes start their logger before they look at anything else; its own loggers
    write at once, and leave files behind when the run is refused a moment later.
    """

    def __init__(self, output_dir: str | Path | None) -> None:
        """Write nothing yet.

        Args:
            output_dir: Where the run's results go. None is left to the checkpointer to refuse.
        """
        self._output_dir = output_dir
        self._config: DictConfig | None = None
        self._logger: Any = None

    def log_config(self, config: DictConfig) -> None:
        """Keep the settings until the first step."""
        self._config = config

    def log(self, name: str, data: float, step: int) -> None:
        """Write one number."""
        self._start().log(name, data, step)

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Write the numbers of one step on one line."""
        self._start().log_dict(payload, step)

    def close(self) -> None:
        """Close the file if one was opened."""
        if self._logger is not None:
            self._logger.close()

    def _start(self) -> Any:
        if self._logger is None:
            self._logger = TorchtuneDiskLogger(f"{self._output_dir}/logs")
            self._logger.log_config(self._config)
        return self._logger


# What a run measured: one JSON object a line, in a file that survives a kill and a resume.
#
# {"step": 4, "epoch": 0, "loss": 1.31, "lr": 0.0002, "grad_norm": 0.8, "tokens": 4096, …}
# {"step": 4, "val_loss": 1.4, "val_perplexity": 4.06, "val_tokens": 9000}
# {"step": 4, "answers": ["Yes.", "Paris."]}
# {"event": "saved", "step": 4, "folder": "epoch_0"}

SAVED, RESUMED, SKIPPED = "saved", "resumed", "skipped"
"""Events that a report counts."""

MEASURED = frozenset({"tokens_per_second", "seconds", "peak_memory_gib"})
"""Fields that depend on the machine and the hour; all others repeat if the run is repeated."""


class History:
    """Appends to ``metrics.jsonl``; each line is in the file when the call returns."""

    def __init__(self, path: str | Path, resumed_step: int | None = None) -> None:
        """Touch nothing yet: the run may still be refused.

        The first line written sets an earlier file aside as ``metrics.previous.jsonl``, or cuts
        it back when a run goes on.

        Args:
            path: The file.
            resumed_step: The step that a resumed run goes on from. Lines beyond it are dropped,
                because the run writes them again. None for a new run.
        """
        self._path = Path(path)
        self._resumed_step = resumed_step
        self._begun = False

    def log_step(
        self,
        step: int,
        *,
        epoch: float,
        loss: float,
        lr: float,
        grad_norm: float | None,
        tokens: int,
        tokens_per_second: float | None,
        seconds: float,
        peak_memory_gib: float | None,
        **more: object,
    ) -> None:
        """Write what one optimizer step measured.

        Args:
            step: Steps made, this one included.
            epoch: The epoch it belongs to.
            loss: Mean over the step's labelled tokens.
            lr: Learning rate of this step.
            grad_norm: Before clipping.
            tokens: Tokens of this step alone, on all devices.
            tokens_per_second: Of this step.
            seconds: Duration of this step.
            peak_memory_gib: Most memory held on one device; None where it is not measured.
            **more: Further fields, under their own names.
        """
        self._append(
            {
                "step": step,
                "epoch": epoch,
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens": tokens,
                "tokens_per_second": tokens_per_second,
                "seconds": seconds,
                "peak_memory_gib": peak_memory_gib,
                **more,
            }
        )

    def log_validation(self, step: int, *, loss: float, tokens: int) -> None:
        """Write the loss on data that is not trained on, and its perplexity."""
        # exp overflows at 710; there is no such perplexity to report.
        perplexity = math.exp(loss) if loss < 700 else None
        self._append(
            {"step": step, "val_loss": loss, "val_perplexity": perplexity, "val_tokens": tokens}
        )

    def log_answers(self, step: int, answers: Sequence[str]) -> None:
        """Write what the model says to the sample questions after a step."""
        self._append({"step": step, "answers": answers})

    def log_event(self, event: str, step: int, **facts: object) -> None:
        """Write that something happened after a step: a save, a resume, a skipped step."""
        self._append({"event": event, "step": step, **facts})

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """Return all lines, without the half of one that a killed run may leave at the end.

        Args:
            path: The file. A run that logged nothing has none.

        Raises:
            CheckpointError: A line before the last one is damaged.
        """
        return [line for line, _ in _read(Path(path))]

    def _append(self, line: Mapping[str, object]) -> None:
        text = json.dumps(_plain(line), allow_nan=False, default=str)
        try:
            if not self._begun:
                self._begin()
            # One write a line: whoever reads along sees whole lines.
            with self._path.open("a", encoding="ascii") as file:
                file.write(text + "\n")
        except OSError as error:
            raise OutputError(
                f"{self._path} could not be written: {error}. Free space or make the folder "
                "writable, then resume from the last checkpoint."
            ) from error

    def _begin(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            if self._resumed_step is None:
                os.replace(self._path, self._path.with_suffix(f".previous{self._path.suffix}"))
            else:
                _cut_back(self._path, self._resumed_step)
        self._begun = True


def _cut_back(path: Path, step: int) -> None:
    kept = [raw for line, raw in _read(path) if line["step"] <= step]
    aside = path.with_name(f".partial-{path.name}")
    try:
        with aside.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _read(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    raws = path.read_bytes().split(b"\n") if path.exists() else []
    last = max((number for number, raw in enumerate(raws, 1) if raw.strip()), default=0)
    for number, raw in enumerate(raws[:last], 1):
        if line := _parse(raw):
            yield line, raw + b"\n"
        elif raw.strip() and number < last:
            raise CheckpointError(
                f"{path}: line {number} is not a JSON object with a step. Remove that line, or "
                "move the file away; it only tells what happened and no run depends on it."
            )


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except ValueError:  # undecodable bytes included
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _plain(value: object) -> object:
    """Return the value with null for what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# How far a run is: a bar at a terminal, lines in a log file.

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


# What people see of a run: metrics file, progress, and torchtune's loggers, from one process.


class Monitor:
    """Writes and shows on the main process; elsewhere every method does nothing."""

    def __init__(
        self,
        is_main: bool,
        cfg: DictConfig,
        settings: Settings,
        *,
        total: int,
        start: int,
    ) -> None:
        """Open the progress bar; files are opened by the first line written.

        Args:
            is_main: Whether this process speaks for all.
            cfg: The configuration as it was given, for logger and report.
            settings: The same, checked.
            total: Steps of the whole run.
            start: Steps made before this start.
        """
        self.is_main, self._log_every, self._logger = is_main, settings.log_every_n_steps, None
        self._output_dir = settings.output_dir
        if not is_main:
            return
        self.history = History(self._output_dir / "metrics.jsonl", start or None)
        self._progress = Progress(total, start)
        self._started = time.perf_counter()
        if settings.metric_logger:
            self._logger = config.instantiate(OmegaConf.create(settings.metric_logger))
            self._logger.log_config(cfg)

    def step(self, step: int, epoch: int, result: StepResult, rate: float) -> None:
        """Note one optimizer step.

        Args:
            step: Steps made, this one included.
            epoch: Number of the epoch, from 0.
            result: What the step did.
            rate: Learning rate of the step.
        """
        if not self.is_main:
            return
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        speed = result.tokens / seconds
        self.history.log_step(
            step,
            epoch=epoch,
            loss=result.loss,
            lr=rate,
            grad_norm=result.grad_norm,
            tokens=result.tokens,
            tokens_per_second=speed,
            seconds=seconds,
            peak_memory_gib=peak,
        )
        if not result.moved:
            self.history.log_event(SKIPPED, step)
            self.say(f"step {step}: {result.problem}, the weights were left alone")
        self._progress.update(step, loss=result.loss, lr=rate, tokens_per_second=speed)
        if self._logger is not None and step % self._log_every == 0:
            numbers = {"loss": result.loss, "lr": rate, "grad_norm": result.grad_norm}
            self._logger.log_dict({**numbers, "tokens_per_second": speed}, step=step)

    def validation(self, step: int, loss: float, tokens: int, answers: Sequence[str] = ()) -> None:
        """Note a validation, and the answers to the sample questions at it."""
        if not self.is_main:
            return
        perplexity = math.exp(min(loss, 700))
        self.history.log_validation(step, loss=loss, tokens=tokens)
        if answers:
            self.history.log_answers(step, answers)
        self._progress.validation(step, loss=loss, perplexity=perplexity)
        if self._logger is not None:
            self._logger.log_dict({"val_loss": loss, "val_perplexity": perplexity}, step=step)

    def resumed(self, step: int, folder: Path | None, skipped: Sequence[str]) -> None:
        """Note where the run goes on.

        Args:
            step: Steps made before.
            folder: The checkpoint; None for a new run.
            skipped: Newer ones that are not whole, and why.
        """
        for reason in skipped:
            self.say(f"resume: skipped {reason}")
        if folder and self.is_main:
            self.history.log_event(RESUMED, step, folder=folder.name)
            self.say(f"resume: going on from {folder}, step {step}")

    def saved(self, folder: str, step: int) -> None:
        """Note that a checkpoint is whole."""
        if self.is_main:
            self.history.log_event(SAVED, step, folder=folder)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.is_main:
            self._progress.print(text)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.is_main:
            self._progress.close()
        if self._logger is not None:
            self._logger.close()
