"""Folders of a run on the Hugging Face Hub: `phi3-tune push my_adapter/final user/name`.

HF_TOKEN, or what `hf auth login` keeps, says who uploads; HF_ENDPOINT says where to.
"""

import json
from pathlib import Path

from phi3_plugin.checkpoint.peft import CONFIG
from phi3_plugin.errors import ConfigError, MissingFileError, OutputError
from phi3_plugin.hub import REPOSITORY, has_token
from phi3_plugin.options import PushOptions

STAYS = "resume"
"""What only going on with a run needs: state of the optimizer, paths of this machine."""


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Upload a folder as a model of the Hub, made if there is none, and return its address.

    Args:
        folder: An adapter, or a whole model, as `phi3-tune train` and `adapter merge` leave them.
        name: USER/NAME.
        private: Whether a repository that is made is seen by its owner alone.

    Raises:
        ConfigError: The name is none of the Hub's.
        MissingFileError: The folder holds no adapter and no model.
        OutputError: It cannot be uploaded; why, and what to do.
    """
    if REPOSITORY.fullmatch(name) is None:
        raise ConfigError(f"{name!r} is no name of the Hub's. Give USER/NAME.")
    if not any((folder / file).is_file() for file in (CONFIG, "config.json")):
        raise MissingFileError(
            f"{folder} holds neither an adapter nor a model. Give one such as my_adapter/final."
        )
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    files = {file: CommitOperationAdd(file, content) for file, content in contents(folder).items()}
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(name, [*files.values()], commit_message=f"Upload {folder.name}")
    except Exception as error:
        # Connections break in many ways, and none of them is a fault of this program
        raise OutputError(f"{folder} is not at {api.endpoint}/{name}: {_reason(error)}") from error
    return f"{api.endpoint}/{name}"


def contents(folder: Path) -> dict[str, Path | bytes]:
    """Return what goes up, by its path: files, or the bytes of those that differ.

    A base that is a folder of this machine is called by that folder's name alone.
    """
    found: dict[str, Path | bytes] = {}
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in place.parts)
        if file.is_file() and not is_hidden and place.parts[0] != STAYS:
            found[place.as_posix()] = file
    base = _base(folder)
    if base and Path(base).is_absolute():
        for name in (CONFIG, "README.md"):
            if name in found:
                text = (folder / name).read_text("utf-8")
                found[name] = text.replace(base, Path(base).name).encode()
    return found


def _base(folder: Path) -> str | None:
    try:
        name = json.loads((folder / CONFIG).read_text("utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):  # a whole model; or it is broken
        return None
    return name if isinstance(name, str) else None


def _reason(error: Exception) -> str:
    """Say why a folder is not there, and what to do."""
    from huggingface_hub import constants

    status = getattr(getattr(error, "response", None), "status_code", None)
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set. Take it away to upload."
    if status in (401, 403) and not has_token():
        return "there is no token. Give one that may write as HF_TOKEN, or run 'hf auth login'."
    if status in (401, 403):
        return f"the token may not write there ({status}). Give one that may as HF_TOKEN."
    if status in (409, 412):
        return f"somebody else changes it at the same time ({status}). Repeat the command."
    text = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    if status is not None and status < 500:
        return f"the Hub refuses it ({status}): {text[-200:]}"
    return f"it cannot be reached or broke off ({text[:200]}). Repeat the command."


def run(o: PushOptions) -> int:
    """Upload a folder and print where it is."""
    print(push(o.folder, o.name, private=o.private))
    return 0
