"""The curve of a run at Weights & Biases and their like, in which a resumed run goes on."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchtune.training import metric_logging

from phi3_plugin.settings import component

CURVES = "logger.json"
"""In the folder of a run: its logger, and what the service calls the run."""


def open_logger(
    section: Mapping[str, Any], config: Any, output_dir: Path, resumed_step: int | None
) -> Any:
    """Return the logger of a YAML's section, in the curve of the run that goes on.

    What the section or the environment says of the run comes first. Loggers that are not
    torchtune's are made as they are asked for.

    Args:
        section: Component and arguments.
        config: What is logged of the settings.
        output_dir: Folder of the run.
        resumed_step: The step that a resumed run goes on from; None for a new run.
    """
    kind = component(section["_component_"])
    given = {key: value for key, value in section.items() if key != "_component_"}
    known = _run_of(output_dir, kind.__name__) if resumed_step is not None else None
    logger, run = kind, known
    shows_settings = True
    if kind is metric_logging.WandBLogger:
        run = given.get("id") or os.environ.get("WANDB_RUN_ID") or known or uuid.uuid4().hex[:8]
        # A resumed run may have other settings; by itself wandb refuses to note them.
        logger = kind(**{"id": run, "resume": "allow", "allow_val_change": True, **given})
    elif kind is metric_logging.CometLogger:
        from_environment = os.environ.get("COMET_EXPERIMENT_KEY")
        run = given.get("experiment_key") or from_environment or known or uuid.uuid4().hex
        logger = kind(**{**given, "experiment_key": run})
    elif kind is metric_logging.MLFlowLogger:
        if known:
            os.environ.setdefault("MLFLOW_RUN_ID", known)  # torchtune passes its run_id to nobody
        logger = kind(**given)
        run = logger._run_id
        shows_settings = run != known  # MLflow refuses parameters that have changed
    elif kind is metric_logging.TensorBoardLogger:
        folder = Path(given["log_dir"])
        if known and (folder / known).is_dir():
            logger = kind(**{**given, "log_dir": str(folder / known), "organize_logs": False})
            _purge(logger, resumed_step or 0)
        else:
            logger = kind(**given)
        run = os.path.relpath(logger.log_dir, folder)  # the run may be moved with its logs
    else:
        logger = kind(**given)
    if shows_settings:
        logger.log_config(config)
    if run is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"logger": kind.__name__, "run": run})
        (output_dir / CURVES).write_text(text + "\n", encoding="utf-8")
    return logger


def _run_of(output_dir: Path, logger: str) -> str | None:
    """Return what the service calls the run, if the same logger has noted it."""
    try:
        note = json.loads((output_dir / CURVES).read_text(encoding="utf-8"))
        return str(note["run"]) if note["logger"] == logger else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _purge(logger: Any, step: int) -> None:
    """Let TensorBoard drop what an earlier process wrote beyond a step, which is made again."""
    from torch.utils.tensorboard import SummaryWriter

    if logger._writer is not None:
        logger._writer.close()
        logger._writer = SummaryWriter(log_dir=logger.log_dir, purge_step=step + 1)
