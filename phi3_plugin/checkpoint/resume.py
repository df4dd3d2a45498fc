"""The part of a checkpoint folder that lets a run go on, and finding the folder to go on from."""

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
    write_state(folder / STATE, state)


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
    advice = f" Move {folder} away to go on from the epoch before it."
    return read_state(folder / STATE, advice)


def write_state(file: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values.

    Raises:
        OSError: The disk is full; torch alone hides that behind a RuntimeError.
    """
    try:
        with file.open("wb") as stream:
            torch.save(state, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def read_state(file: Path, advice: str = "") -> dict[str, Any]:
    """Read tensors and plain values; nothing in the file is run.

    Args:
        file: What ``torch.save`` wrote.
        advice: Ends the message of an error.

    Raises:
        CheckpointError: The file is damaged, or holds more than tensors and plain values.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises every kind, for the many ways to be broken
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file} cannot be read: {problem}.{advice}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, no state.{advice}")
    return state
