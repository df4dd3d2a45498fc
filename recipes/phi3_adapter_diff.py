"""How `phi3_plugin.recipes.phi3_adapter` compares two adapters."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from phi3_plugin.recipes.phi3_adapter_forms import read
from torch import Tensor

from phi3_plugin.checkpoint.difference import Difference, differences
from phi3_plugin.checkpoint.hf import row_norms
from phi3_plugin.config import Phi3Config, read_config
from phi3_plugin.errors import ConfigError, MissingFileError


def diff(o: Mapping[str, Any]) -> int:
    """Print how far apart two adapters are; 1 if they are not the same."""
    sizes = sizes_for(o)
    one, other = (read(Path(o[key]), sizes, {}) for key in ("adapter", "other"))
    norms = partial(row_norms, Path(o["checkpoint_dir"])) if "checkpoint_dir" in o else no_norms
    found = differences(one, other, sizes, norms)
    if o.get("json"):
        print(json.dumps([difference.__dict__ for difference in found], indent=2))
    else:
        print("\n".join(lines(found, (o["adapter"], o["other"]))))
    return int(any(map(is_one, found)))


def is_one(found: Difference) -> bool:
    """Whether it is a difference at all."""
    return found.relative != 0 or bool(found.magnitude)


def lines(found: Sequence[Difference], names: tuple[str, str]) -> Iterator[str]:
    """Yield one line a module, and how many differ."""
    for d in found:
        apart = f"{d.relative:.3e}" if d.only_in is None else f"only in {names[d.only_in]}"
        more = "" if d.magnitude is None else f"  magnitude {d.magnitude:.3e}"
        yield f"{d.module:<32} {apart}{more}"
    count = sum(map(is_one, found))
    yield f"{count} of {len(found)} differ." if count else "The same."


def sizes_for(o: Mapping[str, Any]) -> Phi3Config:
    """Read config.json of the base, or of the adapter's folder, where ours have a copy."""
    folders = [o.get("checkpoint_dir"), o["adapter"], o["other"]]
    for folder in map(Path, filter(None, folders)):
        beside = folder.parent if folder.is_file() else folder
        if (beside / "config.json").is_file():
            return read_config(beside)
    raise MissingFileError("There is no config.json beside the adapters. Name their base.")


def no_norms(module: str) -> Tensor:
    """Refuse DoRA on parts of a layer, which needs the base."""
    raise ConfigError(f"{module}: DoRA on a part of it can be compared only with the base.")
