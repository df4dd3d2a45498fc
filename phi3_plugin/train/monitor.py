"""What people see of a run: metrics file, progress, and torchtune's loggers, from one process."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import config

from phi3_plugin.train.history import RESUMED, SAVED, SKIPPED, History
from phi3_plugin.train.progress import Progress
from phi3_plugin.train.settings import Settings
from phi3_plugin.train.step import StepResult


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
        self._settings: Any = OmegaConf.to_container(cfg, resolve=True)
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

    def report(
        self,
        model: nn.Module,
        folder: Path,
        ending: str | None,
        samples: Sequence[tuple[str, str, str]],
    ) -> None:
        """Write ``report.html`` and ``loss.png`` into the run's folder.

        Args:
            model: What was trained.
            folder: The last checkpoint.
            ending: What ended the run before its last step; None if nothing did.
            samples: Prompt, answer before and answer after, of each sample question.
        """
        if not self.is_main:
            return
        from phi3_plugin.train.report import Facts, versions, write_report  # brings matplotlib

        cuda = torch.cuda.is_available()
        cpu = f"CPU, {torch.get_num_threads()} threads"
        device = torch.cuda.get_device_name() if cuda else cpu
        history = History.read(self._output_dir / "metrics.jsonl")
        facts = Facts(
            ending=f"It stopped early: {ending}." if ending else "It made all its steps.",
            finished=ending is None,
            adapter=folder,
            settings=self._settings,
            versions=versions(device),
            adapted_modules=[n for n, m in model.named_modules() if hasattr(m, "lora_a")],
            trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            total_parameters=sum(p.numel() for p in model.parameters()),
            samples=[_sample(n, *texts, history) for n, texts in enumerate(samples)],
        )
        page = write_report(self._output_dir, history, facts)
        self.say(f"Wrote {page}.")

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.is_main:
            self._progress.close()
        if self._logger is not None:
            self._logger.close()


def _sample(
    number: int, prompt: str, before: str, after: str, history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return all that was said to one of the sample questions."""
    told = [(line["step"], line["answers"]) for line in history if "answers" in line]
    during = [(step, answers[number]) for step, answers in told if number < len(answers)]
    return {"prompt": prompt, "before": before, "after": after, "during": during}
