"""What the folder of a PEFT adapter says of itself, read without loading its weights.

adapter_config.json says which modules are adapted and how they are scaled, the header of
adapter_model.safetensors what is stored. Here both lie side by side, as they are.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from phi3_plugin.checkpoint.names import EMBEDDING, HEAD, NAMES, PEFT_PREFIX
from phi3_plugin.checkpoint.peft import CONFIG, WEIGHTS
from phi3_plugin.checkpoint.peft_settings import BRANCHES, OFF, PATTERNS, PLAIN, read_object
from phi3_plugin.checkpoint.stored import StoredTensor, stored_tensors
from phi3_plugin.errors import AdapterError, MissingFileError

KINDS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_B.bias": "bias",
    ".base_layer.weight": "base",
    ".bias": "bias",
    ".weight": "saved",
}
"""How names in a file of PEFT end, and what the tensors are; the first that fits counts."""

JUDGED = {"bias", "lora_bias"}
"""Of the features of PEFT that we do not compute, those whose fate in the runtimes is known."""

ADAPTABLE = [name for name in NAMES if not name.endswith("norm")]
"""The modules of a Phi-3 that can have an adapter; ``{}`` is the number of the layer."""

_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")

# Shapes: R rank


@dataclass(frozen=True)
class PeftFolder:
    """The folder of an adapter, as it lies there."""

    config: Mapping[str, Any]
    """adapter_config.json."""
    tensors: Mapping[str, Mapping[str, StoredTensor]]
    """Of each module, without PEFT's prefix, its tensors by kind; see `KINDS`."""
    unknown: tuple[str, ...]
    """Tensors of which nothing is known."""

    @cached_property
    def adapted(self) -> list[str]:
        """The modules with an A or a B."""
        return [m for m, kinds in self.tensors.items() if {"A", "B"} & kinds.keys()]

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of each adapted module that has a matrix A, as its tensor says."""
        shapes = {m: self.tensors[m]["A"].shape for m in self.adapted if "A" in self.tensors[m]}
        return {
            module: shape[0] for module, shape in shapes.items() if len(shape) == 2 and shape[0]
        }

    def with_kind(self, kind: str) -> list[str]:
        """Return the modules that have a tensor of this kind."""
        return [module for module, kinds in self.tensors.items() if kind in kinds]

    def said(self, key: str, module: str) -> Any:
        """Return what the configuration says for one module: ``r`` or ``lora_alpha``.

        Source: PEFT 0.21.2, get_pattern_key of utils/other.py: the first pattern that fits.
        """
        pattern = self.config.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]) or {}
        for name, value in pattern.items():
            if re.match(rf"(.*\.)?({name})$", module):
                return value
        return self.config.get(key, 8)

    def scale(self, module: str) -> float:
        """Return what PEFT multiplies B A with in one module."""
        rank, alpha = self.said("r", module), self.said("lora_alpha", module)
        root = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return float(alpha / root)

    def targeted(self, module: str) -> bool:
        """Whether PEFT puts an adapter into a module of this name.

        Source: PEFT 0.21.2, check_target_module_exists of tuners/tuners_utils.py.
        """
        targets = self.config.get("target_modules") or []
        if self._is_excluded(module):
            return False
        if targets == "all-linear":
            return module not in (EMBEDDING, HEAD)
        if isinstance(targets, str):  # one that takes long to match is believed
            return not is_plain(targets) or re.fullmatch(targets, module) is not None
        layers, layer = self.config.get("layers_to_transform"), _LAYER.search(module)
        layers = [layers] if isinstance(layers, int) else layers
        if layers and (layer is None or int(layer.group()) not in layers):
            return False
        return any(f".{module}".endswith(f".{target}") for target in targets)

    def _is_excluded(self, module: str) -> bool:
        names = self.config.get("exclude_modules") or []
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(f".{module}".endswith(f".{name}") for name in names)

    def targets_of_nothing(self) -> list[str]:
        """Return the names of target_modules that no module of a Phi-3 has."""
        targets = self.config.get("target_modules") or []
        if isinstance(targets, str):
            return []
        modules = [f".{name.format(0)}" for name in ADAPTABLE]
        return [
            target
            for target in targets
            if not any(module.endswith(f".{_LAYER.sub('0', target)}") for module in modules)
        ]


def read_peft_folder(folder: str | Path) -> PeftFolder:
    """Read configuration and header of an adapter folder, ours or anyone's.

    Raises:
        AdapterError: The configuration is damaged, or is not that of a LoRA adapter.
        CheckpointError: The weights are damaged or cut short.
        MissingFileError: One of the two files is missing.
    """
    folder = Path(folder)
    config = _config(folder)
    if not (folder / WEIGHTS).is_file():
        raise MissingFileError(_no_weights(folder))
    tensors: dict[str, dict[str, StoredTensor]] = {}
    unknown = []
    for name, tensor in stored_tensors(folder / WEIGHTS).items():
        module, kind = split_name(name)
        if kind is None:
            unknown.append(name)
        else:
            tensors.setdefault(module, {})[kind] = tensor
    return PeftFolder(config, tensors, tuple(unknown))


def split_name(name: str) -> tuple[str, str | None]:
    """Split the name of a tensor into module, without PEFT's prefix, and kind; None is unknown."""
    for ending, kind in KINDS.items():
        if name.startswith(PEFT_PREFIX) and name.endswith(ending):
            return name.removeprefix(PEFT_PREFIX).removesuffix(ending), kind
    return name, None


def is_adaptable(module: str) -> bool:
    """Whether a Phi-3 has a module of this name that can have an adapter."""
    return _LAYER.sub("{}", module, count=1) in ADAPTABLE


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return the first names in a sentence, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        lacks = f"has no {CONFIG}" if folder.is_dir() else "is no folder"
        raise MissingFileError(
            f"{folder} {lacks}: it is not an adapter folder of PEFT. `phi3-tune adapter "
            "import` makes one of files of torchtune's and loralib's."
        )
    config = read_object(file)
    if problems := list(_wrong_values(config)):
        raise AdapterError("\n".join(f"{file}: {problem}" for problem in problems))
    return config


def _wrong_values(config: Mapping[str, Any]) -> Iterable[str]:
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        yield f"peft_type: {kind!r} is not a LoRA adapter, which is all that is judged here."
    for key in OFF.keys() - JUDGED:
        if config.get(key) not in (None, False, {}, []):
            yield f"{key}: a feature of PEFT that is not judged here."
    patterns = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    wrong = [k for k, p in patterns.items() if not isinstance(p, dict) or len(p) > PATTERNS]
    yield from (f"{key}: must be an object of at most {PATTERNS} names." for key in wrong)
    numbers = {key: config[key] for key in ("r", "lora_alpha") if key in config}
    for name, pattern in patterns.items():
        if name not in wrong:
            numbers |= {f"{name}.{key}": value for key, value in pattern.items()}
            yield from (f"{name}: {key!r} is not read." for key in pattern if not is_plain(key))
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            yield f"{key}: {value!r} must be a number above 0."
    yield from _wrong_names(config)


def _wrong_names(config: Mapping[str, Any]) -> Iterable[str]:
    """Yield what is wrong with the keys that say which modules are meant."""
    for key in ("target_modules", "exclude_modules"):
        names = config.get(key) or []
        if not isinstance(names, str | list) or not all(isinstance(name, str) for name in names):
            yield f"{key}: {names!r} must be a name or a list of names."
        elif key == "exclude_modules" and isinstance(names, str) and not is_plain(names):
            yield f"{key}: {names!r} is not read."
    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(type(number) is int for number in numbers):
        yield f"layers_to_transform: {layers!r} must be a number or a list of numbers."
    if (pattern := config.get("layers_pattern") or "layers") not in ("layers", ["layers"]):
        yield f"layers_pattern: {pattern!r} is not where a Phi-3 has its layers."


def is_plain(pattern: str) -> bool:
    """Whether a stranger's pattern is so plain that matching it takes no time."""
    if len(pattern) > 300 or sum(map(pattern.count, "*+(")) > BRANCHES + 1:
        return False
    try:
        return bool(PLAIN.fullmatch(pattern) and re.compile(pattern))
    except re.error:
        return False


def _no_weights(folder: Path) -> str:
    files = sorted(folder.glob("adapter_model.*"))
    if pickled := [file.name for file in files if file.suffix in (".bin", ".pt")]:
        return (
            f"{folder} has {', '.join(pickled)}, but no {WEIGHTS}. A pickle is not opened here: "
            "`phi3-tune adapter import` reads its tensors alone, and writes a folder that can be "
            "checked."
        )
    return f"{folder} has no {WEIGHTS}: it is not an adapter folder of PEFT."
