"""Pages that are one file each, run no script and fetch nothing: a run, a data set, an evaluation.

All extend ``shell.html.j2``, which has the style and what stands at the top of each. Whatever a
page shows may come from anywhere, so every text is escaped and made harmless on its way into it.
"""

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phi3_plugin.errors import OutputError
from phi3_plugin.terminal import harmless


def render(template: str, **values: Any) -> str:
    """Return a page.

    Args:
        template: Name of a file in this folder.
        **values: What it shows.
    """
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: harmless(value) if type(value) is str else value,
    )
    return environment.get_template(template).render(values, columns=_columns)


def _columns(tiles: int, most: int = 5) -> int:
    """Return how many tiles a row has, so that the rows are about equally full."""
    return -(-tiles // -(-max(1, tiles) // most)) or 1


def dotted(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting with its dotted name, as it would stand in YAML.

    Args:
        value: Settings, or one of them; what is not for everybody's eyes is redacted.
        name: Of this one.
    """
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        items = list(enumerate(value))
    for key, item in items:
        yield from dotted(item, f"{name}.{key}" if name else str(key))
    if name and not items:
        yield name, _as_yaml(value)


def _as_yaml(value: Any) -> str:
    if isinstance(value, list | tuple) and value:
        return ", ".join(map(_as_yaml, value))
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def versions(*packages: str) -> dict[str, str]:
    """Return the versions that every number depends on, with those of more packages."""
    names = ("phi3-plugin", "torch", "torchtune", *packages)
    return {**{name: version(name) for name in names}, "python": platform.python_version()}


def write_files(folder: str | Path, contents: Mapping[str, str | bytes], advice: str) -> None:
    """Write files whole; none gets its name before all are on the disk.

    Args:
        folder: Where to; created if missing.
        contents: What each is to hold, by name, in the order in which they get their names.
        advice: What the user can do if that fails.

    Raises:
        OutputError: One cannot be written; earlier ones are untouched.
    """
    aside = {name: Path(folder) / f".partial-{os.getpid()}-{name}" for name in contents}
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            path = Path(folder) / name
            with aside[name].open("wb") as file:
                # A text cut in the middle of an emoji holds what UTF-8 cannot
                data = content.encode("utf-8", "replace") if isinstance(content, str) else content
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name in contents:
            path = Path(folder) / name
            os.replace(aside[name], path)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error}. {advice}") from error
    finally:
        for left in aside.values():
            with suppress(OSError):
                left.unlink()
