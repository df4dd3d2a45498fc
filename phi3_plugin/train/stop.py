"""When a run ends before its last step."""

import signal

import torch

from phi3_plugin.errors import DataError
from phi3_plugin.train.world import World

NO_IMPROVEMENT = "no improvement"


class Stop:
    """Why the run is to stop after the step it is at; all processes agree."""

    def __init__(self, world: World, *, patience: int | None, max_nonfinite: int) -> None:
        """Listen to SIGTERM and SIGINT.

        Args:
            world: All processes.
            patience: Validations without an improvement that end the run; None never ends it.
            max_nonfinite: Steps in a row without a finite loss or gradient that end it.
        """
        self._world, self._patience, self._max_nonfinite = world, patience, max_nonfinite
        self._nonfinite = 0
        self._signal: str | None = None
        self.reason: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

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
        return self.reason is not None

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
            raise DataError(
                f"{self._nonfinite} steps in a row left the weights alone: {problem}. The last "
                f"saw samples {samples}. Lower the learning rate, or look at these samples. The "
                "last checkpoint is whole."
            )

    def _on_signal(self, number: int, frame: object) -> None:
        self._signal = signal.Signals(number).name
