"""What people see of a run: its metrics file, a progress bar, and torchtune's loggers."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from phi3_plugin.checkpoint.files import append_whole
from phi3_plugin.errors import CheckpointError, OutputError
from phi3_plugin.options import spelled
from phi3_plugin.redaction import as_config, redacted
from phi3_plugin.settings import Settings
from phi3_plugin.terminal import in_lines
from phi3_plugin.train.checkpoints import LastCheckpoint
from phi3_plugin.train.curve import open_logger
from phi3_plugin.train.step import StepResult

RESUMED, SKIPPED, OVERFLOWED, CHANGED = "resumed", "skipped", "overflowed", "changed"
"""Events of the metrics file that a report reads; a step that overflowed in fp16 is skipped too."""

MEASURED = frozenset({"tokens_per_second", "seconds", "peak_memory_gib"})
"""Fields that depend on the machine and the hour; all others repeat if the run is repeated."""


class Monitor:
    """Writes and shows on the main process; elsewhere every method does nothing."""

    def __init__(
        self, is_main: bool, cfg: DictConfig, settings: Settings, *, total: int, start: int
    ) -> None:
        """Open the progress bar; files are opened by the first line written.

        Args:
            is_main: Whether this process speaks for all.
            cfg: The configuration as it was given, for the logger.
            settings: The same, checked.
            total: Steps of the whole run.
            start: Steps made before this start.
        """
        self.is_main = is_main
        if not is_main:
            return
        self._log_every = settings.log_every_n_steps
        self._history = History(settings.output_dir / "metrics.jsonl", start or None)
        self._progress = Progress(total, start)
        self._started = time.perf_counter()
        self._overflows = 0  # since this start
        self._logger: Any = None
        if settings.metric_logger:
            config, folder = as_config(redacted(cfg)), settings.output_dir
            self._logger = open_logger(settings.metric_logger, config, folder, start or None)

    def resumed(
        self, step: int, last: LastCheckpoint, changes: Sequence[Mapping[str, Any]]
    ) -> None:
        """Note where the run goes on, after so many steps, and which settings hold from there on.

        Args:
            step: Steps made.
            last: What it goes on from.
            changes: With ``key``, ``before`` and ``after`` each.
        """
        if not self.is_main:
            return
        for folder, problem in last.passed_over.items():
            self._progress.print(f"resume: skipped {folder}: {problem}")
        if last.folder and self._history.is_beside(last.folder):
            lost = self._history.lost_steps()
            if lost:
                self._progress.print(
                    f"resume: {self._history.path} has no line for {lost} of the {step} steps that "
                    "were made: it was cut short or moved away, and the report will lack them."
                )
        if last.folder:
            self._history.log(step, event=RESUMED, folder=last.folder.name)
            self._progress.print(f"resume: going on from {last.folder}, step {step}")
        for change in changes:
            key, before, after = change["key"], change["before"], change["after"]
            self._history.log(step, event=CHANGED, key=key, before=before, after=after)
            values = f"{spelled(after)}, was {spelled(before)}"
            self._progress.print(f"resume: from step {step + 1} on {key} is {values}")

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
        now = time.perf_counter()
        seconds = now - self._started
        self._started = now
        speed = result.tokens / seconds
        scaled = {} if result.loss_scale is None else {"loss_scale": result.loss_scale}
        self._history.log(
            step,
            epoch=epoch,
            loss=result.loss,
            lr=rate,
            grad_norm=result.grad_norm,
            **result.measures,
            **scaled,
            tokens=result.tokens,
            tokens_per_second=speed,
            seconds=seconds,
            peak_memory_gib=_peak_memory_gib(),
        )
        if result.overflowed:
            self._history.log(step, event=OVERFLOWED)
            self._overflows += 1
            self._progress.print(f"step {step}: skipped, {result.problem}, which is halved")
        elif not result.moved:
            self._history.log(step, event=SKIPPED)
            self._progress.print(f"step {step}: {result.problem}, the weights were left alone")
        self._progress.update(
            step,
            loss=result.loss,
            lr=rate,
            tokens_per_second=speed,
            measures=result.measures,
            skipped=self._overflows,
        )
        if self._logger is not None and step % self._log_every == 0:
            numbers = {"loss": result.loss, "lr": rate, "grad_norm": result.grad_norm}
            numbers |= {**result.measures, **scaled}
            self._logger.log_dict({**numbers, "tokens_per_second": speed}, step=step)

    def validation(
        self,
        step: int,
        loss: float,
        count: int,
        answers: Sequence[str] = (),
        measures: Mapping[str, float] | None = None,
        *,
        weighted: bool = False,
    ) -> None:
        """Note a validation.

        Args:
            step: Steps made.
            loss: Over all that is held out.
            count: Labelled tokens of it; of a loss of answers, the pairs or answers.
            answers: To the sample questions, now.
            measures: What a loss tells beside itself.
            weighted: Whether some tokens count more than others, so that exp(loss) is no
                perplexity.
        """
        if not self.is_main:
            return
        numbers = {f"val_{name}": value for name, value in (measures or {}).items()}
        entropy = numbers.get("val_sft_loss", None if measures else loss)
        if entropy is not None and not weighted:
            # exp overflows at 710; there is no such perplexity to report.
            numbers["val_perplexity"] = math.exp(entropy) if entropy < 700 else math.inf
        counted = "val_answers" if entropy is None else "val_tokens"
        self._history.log(step, val_loss=loss, **numbers, **{counted: count})
        if answers:
            self._history.log(step, answers=answers)
        shown = {name.removeprefix("val_"): value for name, value in numbers.items()}
        self._progress.validation(step, loss=loss, **shown)
        if self._logger is not None:
            self._logger.log_dict({"val_loss": loss, **numbers}, step=step)

    def saved(self, folder: str, step: int) -> None:
        """Note that a checkpoint is whole."""
        if self.is_main:
            self._history.log(step, event="saved", folder=folder)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.is_main:
            self._progress.print(text)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if not self.is_main:
            return
        self._progress.close()
        if self._logger is not None:
            self._logger.close()


def _peak_memory_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


class History:
    """What a run measured: one JSON object a line, in a file that survives a kill and a resume.

        {"step": 4, "epoch": 0, "loss": 1.31, "lr": 0.0002, "grad_norm": 0.8, "tokens": 4096, …}
        {"step": 4, "val_loss": 1.4, "val_perplexity": 4.06, "val_tokens": 9000}
        {"step": 4, "answers": ["Yes.", "Paris."]}
        {"step": 4, "event": "saved", "folder": "step_000004"}

    Each line is in the file when the call returns.
    """

    def __init__(self, path: str | Path, resumed_step: int | None = None) -> None:
        """Touch nothing yet: the run may still be refused.

        The first line written sets an earlier file aside as ``metrics.previous.jsonl``, or cuts
        it back when a run goes on.

        Args:
            path: The file.
            resumed_step: The step that a resumed run goes on from. Lines beyond it are dropped,
                because the run writes them again. None for a new run.
        """
        self.path = Path(path)
        self._resumed_step = resumed_step
        self._begun = False

    def log(self, step: int, **fields: object) -> None:
        """Write what was measured at a step, or what happened after it.

        Args:
            step: Steps made.
            **fields: Numbers that are not finite become null.

        Raises:
            OutputError: The file cannot be written.
        """
        text = json.dumps(_plain({"step": step, **fields}), allow_nan=False, default=str)
        try:
            if not self._begun:
                self._begin()
            # One write a line: whoever reads along sees whole lines.
            append_whole(self.path, text.encode("ascii") + b"\n")
        except OSError as error:
            raise OutputError(
                f"{self.path} could not be written: {error}. Free space or make the folder "
                "writable, then resume from the last checkpoint."
            ) from error

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """Return all lines, without the half of one that a killed run may leave at the end.

        Args:
            path: The file. A run that logged nothing has none.

        Raises:
            CheckpointError: A line before the last one is damaged.
        """
        return [line for line, _ in _lines(Path(path))]

    def is_beside(self, folder: Path) -> bool:
        """Whether a checkpoint is one of the run that the file tells of."""
        return folder.resolve().parent == self.path.resolve().parent

    def lost_steps(self) -> int:
        """Return how many steps before the one that a run goes on from have no line.

        A file that begins with a resume tells nothing of what was before: that was another folder.
        """
        lines = self.read(self.path)
        begins = lines[0]["step"] if lines and lines[0].get("event") == RESUMED else 0
        steps = {line["step"] for line in lines if "loss" in line}
        return sum(step not in steps for step in range(begins + 1, (self._resumed_step or 0) + 1))

    def _begin(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            if self._resumed_step is None:
                os.replace(self.path, self.path.with_suffix(f".previous{self.path.suffix}"))
            else:
                _cut_back(self.path, self._resumed_step)
        self._begun = True


def _cut_back(path: Path, step: int) -> None:
    kept = [raw for line, raw in _lines(path) if line["step"] <= step]
    aside = path.with_name(f".partial-{path.name}")
    try:
        with aside.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield each line, as an object and as it stands in the file."""
    raws = path.read_bytes().split(b"\n") if path.exists() else []
    last = max((number for number, raw in enumerate(raws, 1) if raw.strip()), default=0)
    for number, raw in enumerate(raws[:last], 1):
        if line := _parsed(raw):
            yield line, raw + b"\n"
        elif raw.strip() and number < last:
            raise CheckpointError(
                f"{path}: line {number} is not a JSON object with a step. Remove that line, or "
                "move the file away; it only tells what happened and no run depends on it."
            )


def _parsed(raw: bytes) -> dict[str, Any] | None:
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


LOG_LINES = 100
"""A log file gets about this many lines a run."""
SIGN_OF_LIFE = 60.0
"""And one after this many seconds, if its steps are slow."""

SHOWN = {"reward_accuracy": "accuracy", "reward_margin": "margin", "kl": "kl", "sft_loss": "sft"}
"""What is shown of what a loss measures, and as what."""

# The numbers come last: a narrow terminal cuts them off and leaves the rest.
_BAR = "{percentage:3.0f}% {n_fmt}/{total_fmt} {bar} {remaining} left  {desc}"
_ENDED = "{percentage:3.0f}% {n_fmt}/{total_fmt} {bar} {elapsed} in all  {desc}"


class Progress:
    """Shows loss, learning rate, speed and time left: a bar at a terminal, lines in a log file."""

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
        self._total = total_steps
        self._start = start_step
        self._stream = stream or sys.stderr
        self._clock = clock
        self._begun = clock()
        self._shown = self._begun
        self._bar: tqdm[None] | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                ncols=columns,
                dynamic_ncols=columns is None,
                bar_format=_BAR,
                miniters=1,  # by default a fast start keeps slow steps from being shown
                smoothing=0.1,
            )

    def update(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        tokens_per_second: float,
        measures: Mapping[str, float] | None = None,
        skipped: int = 0,
    ) -> None:
        """Show that ``step`` steps are made.

        Args:
            step: Steps made, those before a resume included.
            loss: Of this step.
            lr: Learning rate of this step.
            tokens_per_second: Of this step.
            measures: What a loss tells beside itself; those in `SHOWN` are shown.
            skipped: Steps that overflowed in fp16, of those since this start.
        """
        measures = measures or {}
        told = [
            f"{word} {measures[name]:.3g}  " for name, word in SHOWN.items() if name in measures
        ]
        told += [f"skipped {skipped}  "] if skipped else []
        numbers = f"loss {loss:.4f}  {''.join(told)}lr {lr:.2e}  {tokens_per_second:,.0f} tok/s"
        if self._bar is not None:
            self._bar.set_description_str(numbers, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._is_due(step):
            self._shown = self._clock()
            share = 100 * step // self._total
            self.print(f"{self._of_total(step)}  {share:3}%  {numbers}  {self._time(step)}")

    def validation(self, step: int, *, loss: float, **measures: float) -> None:
        """Show a validation, with what is measured beside its loss, on a line of its own."""
        told = [f"  {name.replace('_', ' ')} {value:#.4g}" for name, value in measures.items()]
        self.print(f"{self._of_total(step)}  validation loss {loss:.4f}{''.join(told)}")

    def print(self, text: str) -> None:
        """Write text above the bar."""
        if self._bar is not None:
            self._bar.write(in_lines(text, is_terminal=True), file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """End the bar's line; harmless if done twice."""
        if self._bar is not None:
            self._bar.bar_format = _ENDED
            self._bar.close()

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
