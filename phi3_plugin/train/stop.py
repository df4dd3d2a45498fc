"""When a run ends before its last step."""

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from phi3_plugin.errors import DataError
from phi3_plugin.launch import STOPPED
from phi3_plugin.terminal import in_lines
from phi3_plugin.train import checkpoints
from phi3_plugin.train.step import StepResult
from phi3_plugin.train.world import World

NO_IMPROVEMENT = "no improvement"
INSTEAD_OF_FP16 = "dtype=fp32 over an NF4 base, model._component_=phi3_plugin.models.qlora_phi3"
SOON = 0.7
"""Seconds in which Python acts on a signal by itself, unless a library's call holds it up."""


class Stop:
    """Why the run is to stop after the step it is at; all processes agree.

    Until the first step, and once the result is saved, there is nothing to save: a signal ends the
    process at once, and says so. In between it waits for the step, and says so too; a second
    SIGINT does not wait.
    """

    is_command = False
    """Whether the process is the run's alone, and may end though threads still compute."""

    def __init__(
        self, world: World, output_dir: Path, *, patience: int | None, max_nonfinite: int
    ) -> None:
        """Listen to SIGTERM, SIGINT and SIGHUP, which a closed terminal sends.

        Args:
            world: All processes.
            output_dir: Folder of the run.
            patience: Validations without an improvement that end the run; None never ends it.
            max_nonfinite: Steps in a row without a finite loss or gradient that end it.
        """
        self._world, self._output_dir = world, output_dir
        self._patience, self._max_nonfinite = patience, max_nonfinite
        self._nonfinite = 0
        self._signal: str | None = None
        self._is_training = False
        self._is_ending = False
        self._handled = 0  # signals, by the handler
        self.reason: str | None = None
        self._closed = threading.Event()
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return  # signals are for the main thread; a program that trains in another has its own
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: it outlives its terminal
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._on_signal) for number in numbers}
        # Python's handlers wait for a call into a library to return. This pipe does not.
        heard, self._wakes = os.pipe()
        os.set_blocking(self._wakes, False)
        self._woke_before = signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(heard,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave signals to whom they came before, once the run is over."""
        if not self._before:
            return
        signal.set_wakeup_fd(self._woke_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._closed.set()
        os.close(self._wakes)
        self._thread.join()

    @property
    def interrupted(self) -> bool:
        """Whether somebody stopped the run, rather than the run itself."""
        return self.reason not in (None, NO_IMPROVEMENT)

    @property
    def exit_code(self) -> int:
        """What a command ends with whose run was stopped by a signal: 128 and its number."""
        if not self.interrupted:
            return 0
        return 128 + signal.Signals[self._signal or "SIGTERM"].value

    def after_validation(self, stale: int) -> None:
        """Stop if the last so many validations brought no improvement."""
        if self._patience and stale >= self._patience:
            self.reason = self.reason or NO_IMPROVEMENT

    def now(self) -> bool:
        """Whether the run ends before the next step; every process must ask, all get one answer.

        A signal reaches the processes at different moments, so each acts on it only here.
        """
        if self._world.totals(self._signal is not None)[0]:
            self.reason = self.reason or self._signal or "another process was asked to stop"
        self._is_training = True
        return self.reason is not None

    def saved(self) -> None:
        """Let a signal end the process at once again: nothing more is to be saved."""
        self._is_training = False

    def after_step(self, result: StepResult, samples: list[int]) -> None:
        """Refuse to go on if the run has lost its way.

        A gradient that overflowed in fp16 is no reason, as long as there is a scale to halve.

        Args:
            result: What the step did.
            samples: Numbers of the samples it saw.

        Raises:
            DataError: Too many steps in a row left the weights alone.
        """
        scale = result.loss_scale
        if result.overflowed:
            is_lost = scale is not None and scale <= 1
        else:
            self._nonfinite = self._nonfinite + 1 if result.problem else 0
            is_lost = self._nonfinite >= self._max_nonfinite
        if not is_lost:
            return
        last = checkpoints.find(self._output_dir, "auto").folder
        many = "Step after step" if result.overflowed else f"{self._nonfinite} steps in a row"
        wide = "" if scale is None else f", or use a wider range than fp16 has: {INSTEAD_OF_FP16}"
        raise DataError(
            f"{many} left the weights alone: {result.problem}. The last saw samples {samples}. "
            f"Lower the learning rate, or look at these samples{wide}. "
            + (f"The last checkpoint is {last}." if last else "No checkpoint was saved.")
        )

    def _on_signal(self, number: int, frame: object) -> None:
        self._handled += 1
        if self._waits(number):
            self._wait_for_the_step(number)
            return
        self._is_ending = True
        self._say_end(number)
        if self._world.size > 1:
            os._exit(STOPPED)  # an orderly end would wait for the other processes
        raise SystemExit(STOPPED)

    def _listen(self, heard: int) -> None:
        """Act where the handler above cannot, within a call into a library; until :meth:`close`."""
        with os.fdopen(heard, "rb", buffering=0) as pipe:
            come = 0
            while byte := pipe.read(1):
                number = byte[0]
                if number not in self._before:
                    continue
                come += 1
                # Once the other processes end, what this one waits for from them is a traceback
                at_once = self._world.size > 1 and not self._waits(number)
                if self._closed.wait(0 if at_once else SOON):
                    return
                if self._handled >= come:
                    if self._is_ending and self.is_command:
                        os._exit(STOPPED)
                elif self._waits(number):
                    self._wait_for_the_step(number)
                elif self.is_command:
                    self._say_end(number)
                    os._exit(STOPPED)
                else:  # somebody's Python, which lives on
                    text = "the run ends when the call into a library that it is in returns."
                    self._say(f"{signal.Signals(number).name}: {text}")

    def _waits(self, number: int) -> bool:
        return self._is_training and not (self._signal and number == signal.SIGINT)

    def _wait_for_the_step(self, number: int) -> None:
        if self._signal is None:
            self._signal = signal.Signals(number).name
            self._say(
                f"{self._signal}: the run saves and ends after this step, or the validation or "
                "save that it is at. Ctrl-C ends it at once."
            )

    def _say_end(self, number: int) -> None:
        self._say(
            f"{signal.Signals(number).name}: stopped at once. No step was saved for it, and the "
            "checkpoints are as they were."
        )

    def _say(self, text: str) -> None:
        # print() fails if the signal came within another one
        if self._world.is_main:
            text = in_lines(f"\nphi3_plugin: {text}\n", is_terminal=os.isatty(2))
            with suppress(OSError):  # the terminal may be gone
                os.write(2, text.encode())
