"""What `phi3-tune import-config` does: Microsoft's two dictionaries into a YAML for our recipe."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from phi3_plugin.errors import AdapterError, ConfigError, MissingFileError, OutputError
from phi3_plugin.models.settings import LoRASettings
from phi3_plugin.train.sample_config import translate

CHECKPOINT = "checkpoint_dir"
"""The key of a model that is no setting of its adapter."""

HEADER = """# {sample} as a YAML for our recipe; --targets {targets}.
#   tune run phi3_lora_finetune --config {output} \\
#     checkpoint_dir=PATH dataset.source=DATA
"""


def run(options: Mapping[str, str]) -> int:
    """Write the YAML, print what the user should know, and return the exit code.

    Args:
        options: ``sample``, ``output`` and ``targets``.

    Raises:
        ConfigError: The file is not JSON, or asks for what our recipe does not do.
        MissingFileError: There is no such file.
        OutputError: The YAML is there already, or cannot be written.
    """
    sample, output, targets = (options[key] for key in ("sample", "output", "targets"))
    out = translate(_read(Path(sample)), targets)
    _check_adapter(out.yaml["model"])
    header = HEADER.format(sample=Path(sample).name, targets=targets, output=output)
    notes = "".join(f"# {note}\n" for note in out.notes)
    text = yaml.safe_dump(out.yaml, sort_keys=False, allow_unicode=True)
    _write(Path(output), header + notes + text)
    print("\n".join([*out.notes, f"Wrote {output}."]))
    return 0


def _check_adapter(model: Mapping[str, Any]) -> None:
    """Refuse now what building the model would refuse, where that needs no checkpoint."""
    keys = {key: value for key, value in model.items() if key not in ("_component_", CHECKPOINT)}
    is_nf4 = model["_component_"].endswith(".qlora_phi3")
    try:
        LoRASettings(**{"use_dora": False, "quantize_base": is_nf4, **keys})
    except AdapterError as error:
        raise ConfigError(str(error)) from error


def _write(file: Path, text: str) -> None:
    """Write a file that is not there yet, whole or not at all."""
    try:
        with file.open("x", encoding="utf-8") as opened:
            try:
                opened.write(text)
                opened.flush()
            except OSError:
                file.unlink()
                raise
    except FileExistsError as error:
        raise OutputError(f"{file} exists and would be overwritten. Choose another.") from error
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror or error}.") from error


def _read(file: Path) -> dict[str, object]:
    if not file.is_file():
        raise MissingFileError(f"{file} is not there. Name a JSON file with both dictionaries.")
    try:
        sample = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}.") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from error
    if not isinstance(sample, dict):
        raise ConfigError(f"{file} must hold an object, not a {type(sample).__name__}.")
    return sample


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object of which no key is there twice, since only the last would count."""
    names = [name for name, _ in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{', '.join(map(repr, twice))} is there twice")
    return dict(pairs)
