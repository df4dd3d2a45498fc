"""torchtune's disk logger, started when there is something to log."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchtune.training.metric_logging import DiskLogger as TorchtuneDiskLogger


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
