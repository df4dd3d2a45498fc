"""The forms that `phi3_plugin.recipes.phi3_adapter` writes an adapter in."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.export import export_adapter
from phi3_plugin.checkpoint.folder import whole_folder
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.gguf_file import write_gguf
from phi3_plugin.checkpoint.identity import other_base
from phi3_plugin.checkpoint.loralib_file import write_loralib
from phi3_plugin.checkpoint.torchtune_file import write_torchtune
from phi3_plugin.config import Phi3Config, read_config
from phi3_plugin.errors import ConfigError

Options = Mapping[str, Any]


def read(path: Path, sizes: Phi3Config, o: Options) -> Adapter:
    """Read an adapter of any origin."""
    given = {key: o[key] for key in ("alpha", "rank") if key in o}
    if (enabled := o.get("enable_lora")) is not None:
        words = enabled.split(",") if isinstance(enabled, str) else enabled
        given["enable_lora"] = [_is_on(str(word).strip().lower()) for word in words]
    if "checkpoint_dir" in o:
        given["base"] = Path(o["checkpoint_dir"])
    return read_adapter(path, config=sizes, **given)


def read_from_base(o: Options) -> Adapter:
    """Read the adapter of a verb that needs the base, and warn where it is for another one."""
    base = Path(o["checkpoint_dir"])
    adapter = read(Path(o["adapter"]), read_config(base), o)
    if hashes := other_base(adapter.base_hash, base):
        print(f"Warning: the adapter was made for weights with the hash {hashes}.", file=sys.stderr)
    return adapter


def to_peft(o: Options, base: Path, out: Path, *, patterns: bool = False) -> None:
    """Write a PEFT folder."""
    adapter, card = read_from_base(o), {"made from": Path(o["adapter"]).name}
    with whole_folder(out) as folder:
        export_adapter(folder, adapter, checkpoint_dir=base, card=card, patterns=patterns)


def to_torchtune(o: Options, base: Path, out: Path) -> None:
    """Write a folder with adapter_model.pt, for torchtune's own Phi-3."""
    adapter = read_from_base(o)
    with whole_folder(out) as folder:
        write_torchtune(folder / "adapter_model.pt", adapter, read_config(base))


def to_loralib(o: Options, base: Path, out: Path) -> None:
    """Write what a loralib-built Phi-3 takes."""
    _check_suffix(out, (".pt", ".safetensors"))
    merged_linear = bool(o.get("merged_linear"))
    write_loralib(out, read_from_base(o), read_config(base), merged_linear=merged_linear)


def to_gguf(o: Options, base: Path, out: Path) -> None:
    """Write a file for llama.cpp."""
    _check_suffix(out, (".gguf",))
    write_gguf(out, read_from_base(o), base)


def _check_suffix(out: Path, suffixes: Sequence[str]) -> None:
    if out.suffix not in suffixes:
        raise ConfigError(f"output_dir: {out} must be a file that ends in {' or '.join(suffixes)}.")
    if not out.parent.is_dir():
        raise ConfigError(f"output_dir: {out.parent} is no folder. Make it first.")


def _is_on(word: str) -> bool:
    if word not in ("true", "false", "1", "0"):
        raise ConfigError(f"enable_lora: {word!r} must be true or false, one for each group.")
    return word in ("true", "1")


FORMS: dict[str, Callable[[Options, Path, Path], None]] = {
    "peft": to_peft,
    "peft-patterns": partial(to_peft, patterns=True),
    "torchtune": to_torchtune,
    "loralib": to_loralib,
    "gguf": to_gguf,
}
"""Of `convert`, by what --to calls them."""
