"""When a run ends before its last step."""

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from phi3_plugin.errors import DataError
from phi3_plugin.launch import STOPPED
from phi3_plugin.train import checkpoints
from phi3_plugin.train.world import World

NO_IMPROVEMENT = "no improvement"
SOON = 0.7
"""Seconds in which Python acts on a signal by itself, unless a library's call holds it up."""


@contextmanager
def at_once() -> Iterator[None]:
    """Leave out the seconds in which Python takes itself apart when a signal has ended the run.

    Within it the process is a command's, and need not outlive the run.
    """
    Stop.is_command = True
    try:
        yield
    except SystemExit as end:
        if end.code != STOPPED:
            raise
        sys.stdout.flush()
        os._exit(STOPPED)


class Stop:
    """Why the run is to stop after the step it is at; all processes agree.

    Until the first step, and once the result is saved, there is nothing to save: a signal ends the
    process at once, and says so. In between it waits for the step, and says so too; a second
    SIGINT does not wait.
    """

    is_command = False
    """Whether the process may be ended where threads that still compute would hold it up."""

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
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_IGN and number == signal.SIGHUP:
                continue  # nohup: the run outlives its terminal
            signal.signal(number, self._on_signal)
        # Python's handlers wait for a call into a library to return. This pipe does not.
        heard, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    @property
    def interrupted(self) -> bool:
        """Whether somebody stopped the run, rather than the run itself."""
        return self.reason not in (None, NO_IMPROVEMENT)

    def after_validation(self, stale: int) -> None:
        """Stop if the last so many validations brought no improvement."""
        if self._patience and stale >= self._patience:
            self.reason = self.reason or NO_IMPROVEMENT

    def now(self) -> bool:
        """Whether the run ends before the next step; every process must ask, all get one answer.

        A signal reaches the processes at different moments, so each acts on it only here.
        """
        asked = torch.tensor(int(self._signal is not None), device=self._world.device)
        if self._world.sum(asked).item():
            self.reason = self.reason or self._signal or "another process was asked to stop"
        self._is_training = True
        return self.reason is not None

    def saved(self) -> None:
        """Let a signal end the process at once again: nothing more is to be saved."""
        self._is_training = False

    def after_step(self, problem: str | None, samples: list[int]) -> None:
        """Refuse to go on if the run has lost its way.

        Args:
            problem: Why the step left the weights alone; None if it did not.
            samples: Numbers of the samples it saw.

        Raises:
            DataError: Too many steps in a row left them alone.
        """
        self._nonfinite = self._nonfinite + 1 if problem else 0
        if self._nonfinite >= self._max_nonfinite:
            last = checkpoints.find(self._output_dir, "auto").folder
            raise DataError(
                f"{self._nonfinite} steps in a row left the weights alone: {problem}. The last "
                f"saw samples {samples}. Lower the learning rate, or look at these samples. "
                + (f"The last checkpoint is {last}." if last else "No checkpoint was saved.")
            )

    def _on_signal(self, number: int, frame: object) -> None:
        self._handled += 1
        if self._is_training and not (self._signal and number == signal.SIGINT):
            self._wait_for_the_step(number)
            return
        self._is_ending = True
        self._say_end(number)
        if self._world.size > 1:
            os._exit(STOPPED)  # an orderly end would wait for the other processes
        raise SystemExit(STOPPED)

    def _listen(self, heard: int) -> None:
        """Act where the handler above cannot, within a call into a library."""
        for count in itertools.count(1):
            number = os.read(heard, 1)[0]
            time.sleep(SOON)
            if signal.getsignal(number) != self._on_signal:
                return  # the run is over, and signals are somebody else's
            if self._handled >= count:
                if self._is_ending and Stop.is_command:
                    os._exit(STOPPED)
            elif self._is_training:
                self._wait_for_the_step(number)
            else:
                self._say_end(number)
                os._exit(STOPPED)

    def _wait_for_the_step(self, number: int) -> None:
        if self._signal is None:
            self._signal = signal.Signals(number).name
            text = "the run saves and ends after this step. Ctrl-C ends it at once."
            self._say(f"{self._signal}: {text}")

    def _say_end(self, number: int) -> None:
        self._say(
            f"{signal.Signals(number).name}: stopped at once. No step was saved for it, and the "
            "checkpoints are as they were."
        )

    def _say(self, text: str) -> None:
        # print() fails if the signal came within another one
        if self._world.is_main:
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f"\nphi3_plugin: {text}\n".encode())
