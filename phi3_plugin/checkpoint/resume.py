"""The part of a checkpoint folder that lets a run go on, and finding the folder to go on from."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from phi3_plugin.errors import CheckpointError, MissingFileError, OutputError

STATE = "recipe_state.pt"
_EPOCH = re.compile(r"epoch_(\d+)")


def epoch_folders(output_dir: Path) -> list[Path]:
    """Return the epoch folders of a run, oldest first."""
    matches = [(path, _EPOCH.fullmatch(path.name)) for path in output_dir.glob("epoch_*")]
    numbered = [(int(match.group(1)), path) for path, match in matches if match]
    return [path for _, path in sorted(numbered)]


def refuse_other_run(output_dir: Path) -> None:
    """Refuse an output folder that holds a run's checkpoints.

    Raises:
        OutputError: It does.
    """
    if folders := epoch_folders(output_dir):
        raise OutputError(
            f"output_dir: {output_dir} holds the checkpoints of another run "
            f"({', '.join(path.name for path in folders)}). Choose another folder, or continue "
            "that run with resume_from_checkpoint=True."
        )


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write optimizer and recipe state beside the adapter."""
    torch.save(state, folder / STATE)


def latest_epoch(output_dir: Path) -> Path:
    """Return the newest epoch folder of an interrupted run.

    Raises:
        CheckpointError: The run is finished.
        MissingFileError: There is nothing to resume from.
    """
    folders = epoch_folders(output_dir)
    if not folders:
        raise MissingFileError(
            f"resume_from_checkpoint: {output_dir} has no epoch_* folder to resume from. "
            "Set output_dir to the folder of the interrupted run, or start anew with "
            "resume_from_checkpoint=False."
        )
    newest = folders[-1]
    if not (newest / STATE).is_file():
        raise CheckpointError(
            f"resume_from_checkpoint: {newest} is the last epoch of a finished run; torchtune's "
            "recipe keeps no optimizer state there. Its adapter is ready to use. To train "
            "longer, start a new run with more epochs, or move this folder away to go on from "
            "the epoch before it."
        )
    return newest


def load_state(folder: Path) -> dict[str, Any]:
    """Read the optimizer and recipe state of an epoch folder.

    Raises:
        CheckpointError: The file is damaged, or holds more than tensors and plain values.
    """
    file = folder / STATE
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {str(error).splitlines()[0]}. Move {file.parent} away to go "
            "on from the epoch before it."
        ) from error
    return state
