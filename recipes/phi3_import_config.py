"""What `phi3-tune import-config` does: Microsoft's two dictionaries into a YAML for our recipe."""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from phi3_plugin.errors import ConfigError, MissingFileError, OutputError
from phi3_plugin.train.sample_config import translate

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
    header = HEADER.format(sample=Path(sample).name, targets=targets, output=output)
    notes = "".join(f"# {note}\n" for note in out.notes)
    text = yaml.safe_dump(out.yaml, sort_keys=False, allow_unicode=True)
    try:
        with Path(output).open("x", encoding="utf-8") as file:
            file.write(header + notes + text)
    except FileExistsError as error:
        raise OutputError(f"{output} exists and would be overwritten. Choose another.") from error
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}.") from error
    print("\n".join([*out.notes, f"Wrote {output}."]))
    return 0


def _read(file: Path) -> dict[str, object]:
    if not file.is_file():
        raise MissingFileError(f"{file} is not there. Name a JSON file with both dictionaries.")
    try:
        sample = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}.") from error
    if not isinstance(sample, dict):
        raise ConfigError(f"{file} must hold an object, not a {type(sample).__name__}.")
    return sample
