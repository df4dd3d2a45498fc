"""Models by their name on the Hugging Face Hub, such as ``microsoft/Phi-3-mini-4k-instruct``.

huggingface_hub downloads them once into its cache, and goes on where it was interrupted. HF_HOME,
HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT mean what they mean everywhere.
"""

import json
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from phi3_plugin.errors import MissingFileError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""A name on the Hub."""

DEFAULT_BASE = "microsoft/Phi-3-mini-4k-instruct"

INDEX = "model.safetensors.index.json"
SMALL = (
    *("config.json", "generation_config.json", INDEX, "LICENSE*"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    "chat_template*",
)
"""Configuration and tokenizer, as the models of the family have them."""
SAFETENSORS = ("model.safetensors", "model-*.safetensors")

OF_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors")
"""The last are the weights as mlx-lm names them, in the place of PEFT's."""


def is_repository(name: str | Path) -> bool:
    """Whether a name is one of the Hub's, and of no folder here."""
    return REPOSITORY.fullmatch(str(name)) is not None and not os.path.exists(name)


def has_token() -> bool:
    """Whether there is a token, in HF_TOKEN or of a login."""
    from huggingface_hub import get_token

    return get_token() is not None


@cache
def checkpoint(name: str, *, weights: bool = True) -> Path:
    """Return the folder of a model of the Hub, downloaded if it is not in the cache.

    Args:
        name: Of the model.
        weights: False does without them.

    Raises:
        MissingFileError: It is not in the cache and cannot be downloaded; why, and what to do.
    """
    wanted = [*SMALL, *SAFETENSORS] if weights else [*SMALL]
    folder = _cached(name, wanted)
    if folder and _is_whole(folder, weights):  # others may have cached less of it
        return folder
    return download(name, wanted)


@cache
def adapter(name: str) -> Path:
    """Return the folder of an adapter: one of the Hub is downloaded if it is not in the cache.

    Args:
        name: A path, or a name of the Hub. What looks like either is a path if its first part is a
            folder here: a run's own may not have ended yet.

    Raises:
        MissingFileError: It cannot be downloaded, or is no adapter; why, and what to do.
    """
    if not is_repository(name) or Path(name).parent.is_dir():
        return Path(name)
    wanted = [*OF_ADAPTER, *SMALL]
    folder = _cached(name, wanted)
    if folder is None or _missing_of_adapter(folder):
        folder = download(name, wanted)
    if missing := _missing_of_adapter(folder):
        raise MissingFileError(
            f"{name} has no {' and no '.join(missing)} on the Hub: it is no adapter in "
            "safetensors. Give an adapter's name, or its folder."
        )
    return folder


def _missing_of_adapter(folder: Path) -> list[str]:
    config, weights, theirs = OF_ADAPTER
    missing = [] if (folder / config).is_file() else [config]
    if not any((folder / file).is_file() for file in (weights, theirs)):
        missing.append(weights)
    return missing


def _cached(name: str, wanted: list[str]) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
    except OSError:
        return None


def download(name: str, wanted: list[str], to: Path | None = None) -> Path:
    """Ask the Hub for a model, and return the folder of its newest files.

    Args:
        name: Of the model.
        wanted: Patterns of its files.
        to: Folder to download it to; None is the cache.

    Raises:
        MissingFileError: It cannot be downloaded; why, and what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if int(os.environ.get("RANK", 0)):  # the first process shows how far it is
        disable_progress_bars()
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_dir=to))
    except Exception as error:
        # Connections break in many ways, and none of them is a fault of this program
        raise MissingFileError(f"{name}: {_reason(name, error)}") from error


def _is_whole(folder: Path, weights: bool) -> bool:
    names = ["config.json", "tokenizer_config.json"]
    try:
        if weights and (folder / INDEX).is_file():
            names += json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()
        elif weights:
            names.append("model.safetensors")
        return all((folder / name).is_file() for name in names)
    except (ValueError, LookupError, AttributeError, TypeError):  # what is broken is named later
        return True


def _reason(name: str, error: Exception) -> str:
    """Say why a model is not here, and what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"this model is gated. Accept its terms at {page}, and give a token of yours as "
            "HF_TOKEN."
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return (
            f"there is no such folder here and no such model at {constants.ENDPOINT}. Correct the "
            "name; if the model is private, give a token that may read it as HF_TOKEN."
        )
    if status in (401, 403):
        return f"{page} refuses the token ({status}). Give one that may read it as HF_TOKEN."
    if constants.HF_HUB_OFFLINE:
        return (
            f"it is not a folder, and as a model of the Hub not wholly in the cache "
            f"{constants.HF_HUB_CACHE}. HF_HUB_OFFLINE is set: without it the model is downloaded."
        )
    cause: Any = error.__cause__ or error
    text = str(cause).strip().partition("\n")[0] or type(cause).__name__
    return (
        f"{constants.ENDPOINT} cannot be reached or broke off ({text}). Repeat the command, which "
        "goes on where it was, or give a folder that holds the model."
    )


def name_of(folder: Path) -> str | None:
    """Return the name of the model whose files a folder of the Hub's cache holds."""
    parts = folder.absolute().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    return parts[-3].removeprefix("models--").replace("--", "/", 1)


@cache
def say_that_a_folder_has_the_name(name: str) -> None:
    """Say once that a folder here is taken, not a model of the family by that name."""
    if name.startswith("microsoft/") and int(os.environ.get("RANK", 0)) == 0:
        text = f"{name} is the folder {os.path.abspath(name)}, not the model of the Hub."
        print(f"phi3_plugin: {text}", file=sys.stderr)


def run(o: Any) -> int:
    """Download a model of the Hub and print its folder."""
    if not REPOSITORY.fullmatch(o.name):
        raise MissingFileError(f"{o.name} is no name of the Hub's, such as {DEFAULT_BASE}.")
    folder = download(o.name, [*SMALL, *SAFETENSORS], o.output_dir)
    if o.output_dir is not None:  # adapters name their base by it, as after `tune download`
        text = json.dumps({"repo_id": o.name})
        (folder / "original_repo_id.json").write_text(text, "utf-8")
    print(folder)
    return 0
