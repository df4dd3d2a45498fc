"""Adapters in the layout of Hugging Face PEFT, written so that every runtime reads them alike."""

import json
import math
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from phi3_plugin.checkpoint.adapter import MODULES, A, Adapter, B, Served, original, served
from phi3_plugin.checkpoint.base import (
    EMBEDDING,
    HEAD,
    NAMES,
    PEFT_PREFIX,
    SAVED,
    expected_shapes,
    from_peft,
    known_hash,
    parts_of,
    row_norms,
    save_weights,
    to_hf,
    to_peft,
)
from phi3_plugin.checkpoint.files import StoredTensor, shown, stored_tensors
from phi3_plugin.config import Phi3Config, read_config
from phi3_plugin.errors import AdapterError, CheckpointError, MissingFileError

# What adapter_config.json says of an adapter that we write.

Number = TypeVar("Number", int, float)


def adapter_config(served: Served, adapter: Adapter, base: str, layers: int) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Targets and ranks are read off the tensors, since a recipe's list may name what is not there.

    Args:
        served: What the weights file holds.
        adapter: What it was made of.
        base: Repository id or folder of the base model.
        layers: How many the model has.
    """
    rank, rank_pattern = _pattern(served.ranks)
    alpha, alpha_pattern = _pattern(served.alphas)
    saved = sorted(_short(_hf(name.removesuffix(".weight"))) for name in adapter.saved)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": float(adapter.dropout),
        "target_modules": target_modules(served.ranks, layers),
        "bias": "none",
        "use_dora": adapter.is_dora,
        "use_rslora": served.rslora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "modules_to_save": saved or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "revision": None,
        "auto_mapping": None,
    }


def target_modules(modules: Iterable[str], layers: int) -> list[str]:
    """Return names by which PEFT finds these modules and no others.

    Args:
        modules: Our names.
        layers: How many the model has. A short name stands for all of them.
    """
    names = [_hf(module) for module in modules]
    counts = Counter(map(_short, names))
    everywhere = {short for short, n in counts.items() if n == (layers if "_proj" in short else 1)}
    return sorted({_short(name) if _short(name) in everywhere else name for name in names})


def _pattern(values: Mapping[str, Number]) -> tuple[Number, dict[str, Number]]:
    """Return the value that most modules have, and those of the others by name.

    PEFT takes a name in a pattern for a regular expression that the end of a module's name matches.
    """
    usual = Counter(values.values()).most_common(1)[0][0]
    kinds: dict[str, set[Number]] = defaultdict(set)
    for module, value in values.items():
        kinds[_short(_hf(module))].add(value)
    pattern = {}
    for module, value in values.items():
        short = _short(_hf(module))
        if value != usual:
            pattern[short if len(kinds[short]) == 1 else _hf(module)] = value
    return usual, pattern


def _hf(module: str) -> str:
    return to_hf(f"{module}.weight").removesuffix(".weight")


def _short(name: str) -> str:
    return name.rpartition(".")[2]


# What adapter_config.json of an adapter says, whoever wrote it; what we do not compute is refused.
#
# PEFT finds ranks and alphas of single modules by regular expressions. A stranger's are matched only
# if they are so plain that matching them takes no time.

CONFIG_BYTES = 16_000_000
PATTERNS = 2000
NOTE = "phi3_plugin"
LISTED = 20

PLAIN = re.compile(
    r"\^?(?:[\w.-]|\\\.|\\d\+?|\.\*|\[[\w-]+\]|\((?:[\w.]+\|)*[\w.]+\))+\$?", re.ASCII
)
"""Names, classes of characters, alternatives and wildcards."""

BRANCHES = 2
"""How many of the last two one pattern may hold: time grows with the power of it."""

OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "kasa_config": (),
    "layer_replication": (),
    "megatron_config": (),
    "monteclora_config": (),
    "target_parameters": (),
    "trainable_token_indices": (),
    "use_bdlora": (False,),
    "velora_config": (),
}
"""Features of PEFT that change what is computed, and what they must be besides absent or null."""

STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Starting points that leave the base as it is; after others, such as PiSSA, the adapter belongs to
a base that was changed."""

USED = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "base_model_name_or_path", "init_lora_weights", NOTE),
}

IRRELEVANT = {
    *("task_type", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "inference_mode", "revision", "auto_mapping", "peft_version"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "runtime_config", "ensure_weight_tying"),
}
"""What the tensors say themselves, or what only training reads."""


@dataclass(frozen=True)
class PeftSettings:
    """The scale of every module, and what else is kept."""

    file: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    dropout: float
    base: str
    note: object = None
    """What this package noted of the original, where the weights file has no place for it."""

    def scale(self, module: str, rank: int) -> float:
        """Return what B A is multiplied with.

        Args:
            module: Hugging Face's name.
            rank: Of its tensors.

        Raises:
            AdapterError: The file says another rank.
        """
        said = _match(self.rank_pattern, module, self.rank)
        if said != rank:
            raise AdapterError(
                f"{self.file}: {module} is said to have rank {shown(said)}, but its tensors have "
                f"{rank}. Correct r or rank_pattern."
            )
        alpha = float(_match(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_settings(file: Path) -> PeftSettings:
    """Read adapter_config.json.

    Raises:
        AdapterError: It is broken, or the adapter needs what we do not compute; each is listed, up
            to a limit.
    """
    keys = read_object(file)
    problems = [*_refused(keys), *_wrong(keys)]
    if problems:
        more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        listed = "\n  ".join(problems[:LISTED])
        raise AdapterError(f"{file} cannot be used:\n  {listed}{more}")
    return PeftSettings(
        file,
        rank=keys["r"],
        alpha=keys["lora_alpha"],
        rank_pattern=keys.get("rank_pattern") or {},
        alpha_pattern=keys.get("alpha_pattern") or {},
        rslora=bool(keys.get("use_rslora")),
        dora=bool(keys.get("use_dora")),
        dropout=float(keys.get("lora_dropout") or 0.0),
        base=str(keys.get("base_model_name_or_path") or ""),
        note=keys.get(NOTE),
    )


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        AdapterError: There is none, or it is too large to be a configuration.
    """
    if file.stat().st_size > CONFIG_BYTES:
        raise AdapterError(f"{file} has {file.stat().st_size} bytes: that is no configuration.")
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is not valid JSON: {error}. Copy it again.") from error
    if not isinstance(keys, dict):
        raise AdapterError(f"{file} must hold a JSON object, not {type(keys).__name__}.")
    return keys


def _refused(keys: Mapping[str, Any]) -> list[str]:
    problems = []
    if keys.get("peft_type", "LORA") != "LORA":
        problems.append(f"peft_type: {shown(keys['peft_type'])}, only LORA adapters are computed.")
    for key, allowed in OFF.items():
        value = keys.get(key)
        if value is not None and value not in allowed and value not in ({}, []):
            problems.append(f"{key}: {shown(value)} is a feature that is not computed here.")
    if (start := keys.get("init_lora_weights", True)) not in STARTS and start is not None:
        problems.append(
            f"init_lora_weights: {shown(start)} changes the base that the adapter is for. Save it "
            "with path_initial_model_for_weight_conversion, for the original base."
        )
    known = USED | IRRELEVANT | OFF.keys()
    for key in sorted(map(str, keys.keys() - known)):
        if keys[key] not in (None, False, {}, []):
            unknown = f"{shown(key)}: {shown(keys[key])}"
            problems.append(f"{unknown} is an unknown key. Remove it if it is harmless.")
    return problems


def _wrong(keys: Mapping[str, Any]) -> list[str]:
    problems = []
    if not _is_rank(keys.get("r")):
        problems.append(f"r: {shown(keys.get('r'))} must be a whole number above 0.")
    if not is_alpha(keys.get("lora_alpha")):
        problems.append(f"lora_alpha: {shown(keys.get('lora_alpha'))} must be a number above 0.")
    dropout = keys.get("lora_dropout") or 0.0
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout: {shown(dropout)} must be at least 0 and below 1.")
    for key in ("use_dora", "use_rslora"):
        if not isinstance(keys.get(key) or False, bool):
            problems.append(f"{key}: {shown(keys[key])} must be true or false.")
    if not isinstance(base := keys.get("base_model_name_or_path") or "", str):
        problems.append(f"base_model_name_or_path: {shown(base)} must be text.")
    for key, good in (("rank_pattern", _is_rank), ("alpha_pattern", is_alpha)):
        pattern = keys.get(key) or {}
        if not isinstance(pattern, dict) or len(pattern) > PATTERNS:
            problems.append(f"{key}: must be an object of at most {PATTERNS} names.")
            continue
        for name, value in pattern.items():
            if not good(value) or not _is_plain(name):
                problems.append(
                    f"{key}: {shown(name)}: {shown(value)} is not read. Use modules' names, and "
                    "numbers above 0."
                )
    return problems


def _is_plain(name: str) -> bool:
    if len(name) > 300 or sum(map(name.count, "*+(")) > BRANCHES or not PLAIN.fullmatch(name):
        return False
    try:
        return bool(re.compile(name))
    except re.error:
        return False


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_alpha(value: object) -> bool:
    """Whether a value can be an alpha: a number that leaves a scale above 0 and not infinite."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 1e-30 < value < 1e30  # type: ignore[operator]


def _match(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that PEFT would take for this module."""
    for pattern, value in patterns.items():
        if _compiled(pattern).match(module):
            return value
    return otherwise


@lru_cache(2 * PATTERNS)  # re itself remembers 512, fewer than a file may hold
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


# Adapters in the layout of Hugging Face PEFT, written so that every runtime reads them alike.

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ORIGIN = "phi3_plugin"
"""Key in the weights file's metadata: what the adapter was before it was made uniform."""


def save_adapter(folder: Path, served: Served, adapter: Adapter, base: str, layers: int) -> None:
    """Write adapter_model.safetensors and adapter_config.json.

    Args:
        folder: An existing folder.
        served: What goes into the files.
        adapter: What it was made of, for what is written as it is.
        base: Repository id or folder of the base model.
        layers: How many the model has.
    """
    values = {**served.tensors, **adapter.saved}
    tensors = {to_peft(name): value.contiguous() for name, value in values.items()}
    config = adapter_config(served, adapter, base, layers)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    metadata = {"format": "pt", ORIGIN: json.dumps(served.note)}
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    # safetensors makes files that only their owner may read; a server runs as another user.
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """Read the adapter tensors of a folder under our names.

    Raises:
        CheckpointError: A tensor is not part of a Phi-3 adapter, or the file is damaged.
        MissingFileError: There is no adapter in the folder.
    """
    with _opened(folder) as file:
        return {from_peft(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def load_origin(folder: Path) -> dict[str, Any]:
    """Read what :func:`save_adapter` noted about the adapter; empty for other people's files.

    Raises:
        CheckpointError: The file is damaged.
        MissingFileError: There is no adapter in the folder.
    """
    with _opened(folder) as file:
        try:
            origin = json.loads((file.metadata() or {}).get(ORIGIN, "{}"))
        except (ValueError, RecursionError):
            origin = None
    return origin if isinstance(origin, dict) else {}


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    if not (folder / WEIGHTS).is_file():
        raise MissingFileError(f"{folder} has no {WEIGHTS}: it is not an adapter folder.")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{folder / WEIGHTS} is damaged or cut short: {error}. Copy it again, or move {folder} "
            "away to go on from the checkpoint before it."
        ) from error


def targets_of(adapter: Iterable[str]) -> list[str]:
    """Return the modules that carry an adapter, told by our tensor names, without their place."""
    trained = (name for name in adapter if name not in SAVED)
    modules = (name.partition(".lora_")[0].removesuffix(".magnitude") for name in trained)
    return sorted({module.rpartition(".")[2] for module in modules})


def check_same(folder: Path, saved: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    """Refuse to go on with an adapter that is not the model's.

    Args:
        folder: Where it was saved.
        saved: What is there, our names.
        model: What the model has.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    shapes = [{name: value.shape for name, value in one.items()} for one in (saved, model)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(
            f"resume: {folder} holds {_summary(saved)}, but the model has {_summary(model)}. "
            "Resume with the model settings the run was started with, or set another output_dir."
        )


def _summary(adapter: Mapping[str, Tensor]) -> str:
    kind = "DoRA" if any(name.endswith(".magnitude") for name in adapter) else "LoRA"
    ranks = {str(value.shape[0]) for name, value in adapter.items() if name.endswith(A)}
    return f"{kind} of rank {', '.join(sorted(ranks))} on {', '.join(targets_of(adapter))}"


def check_trained(adapter: dict[str, Tensor], *, may_be_identity: bool = False) -> None:
    """Refuse an adapter that would serve nothing, or nonsense.

    Args:
        adapter: Our names.
        may_be_identity: Whether it may still be what it was at the start.

    Raises:
        AdapterError: It is empty, still the identity, or not finite.
    """
    if not adapter:
        raise AdapterError("The model has no adapter to save. Use a LoRA model builder.")
    if broken := [name for name, value in adapter.items() if not torch.isfinite(value).all()]:
        raise AdapterError(
            f"{len(broken)} of {len(adapter)} adapter tensors hold NaN or infinite numbers, "
            f"first {broken[0]}. Nothing was saved. Lower the learning rate or set clip_grad_norm."
        )
    # Either may be what starts at zero: B, or the A of an embedding.
    modules = [name.removesuffix(A) for name in adapter if name.endswith(A)]
    moved = any(adapter[m + A].any() and adapter[m + B].any() for m in modules)
    if not moved and not may_be_identity:
        raise AdapterError(
            "The adapter is still what it was at the start, so nothing was saved: no optimizer "
            "step with a learning rate above 0 was made. Give more rows than batch_size * "
            "gradient_accumulation_steps, more epochs, or fewer warm-up steps."
        )


# What the folder of a PEFT adapter says of itself, read without loading its weights.
#
# adapter_config.json says which modules are adapted and how they are scaled, the header of
# adapter_model.safetensors what is stored. Here both lie side by side, as they are.

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


# Whether the tensors of an adapter fit each other and their base.

# Shapes: R rank


def shape_problems(adapter: PeftFolder, base: Phi3Config | None) -> Iterator[str]:
    """Say which tensors are missing or do not fit.

    Args:
        adapter: Of any origin.
        base: Sizes of the base model; without them tensors are compared with each other alone.
    """
    if alone := [m for m in adapter.adapted if not {"A", "B"} <= adapter.tensors[m].keys()]:
        yield f"A or B is missing: {listed(alone)}"
    whole = {m: adapter.tensors[m] for m in adapter.adapted if m not in alone}
    if wrong := [m for m, kinds in whole.items() if not _are_a_pair(kinds)]:
        shapes = [list(whole[wrong[0]][kind].shape) for kind in "AB"]
        yield f"A {shapes[0]} and B {shapes[1]} do not multiply: {listed(wrong)}"
    if base is not None:
        sizes = expected_shapes(base)
        for module, kinds in whole.items():
            if module not in wrong and (problem := _beside(module, kinds, sizes)):
                yield problem


def _are_a_pair(kinds: Mapping[str, StoredTensor]) -> bool:
    a, b = kinds["A"].shape, kinds["B"].shape
    return len(a) == len(b) == 2 and 0 < a[0] == b[1]


def _beside(
    module: str, kinds: Mapping[str, StoredTensor], sizes: Mapping[str, tuple[int, ...]]
) -> str | None:
    layer = sizes.get(f"{module}.weight")
    if layer is None:
        return None  # another's name; what becomes of it is for the runtimes to say
    adapts = kinds["B"].shape[0], kinds["A"].shape[1]
    if module == EMBEDDING:
        adapts = adapts[1], adapts[0]
    if adapts == layer:
        return None
    return f"{module} is {list(layer)} in this base, the adapter is for {list(adapts)}"


# The README.md that lies beside an adapter.

CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- phi3
- torchtune
---

# {kind} adapter for {base}

{kind} of rank {r}, alpha {lora_alpha}, dropout {lora_dropout}, on {targets}.

{table}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, ADAPTER)  # ADAPTER: this folder or its repository
tokenizer = AutoTokenizer.from_pretrained(ADAPTER)
```

The prompt must follow the chat template in tokenizer_config.json, as
`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` does.
Generation must stop at the ids in generation_config.json.
"""


def model_card(folder: Path, base: str, rows: Mapping[str, Any]) -> str:
    """Return the model card of the adapter in ``folder``.

    Args:
        folder: Holds adapter_config.json.
        base: Repository id or folder of the base model.
        rows: What the adapter was trained on and how, one row of the table each.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    targets = ", ".join(config["target_modules"])
    return CARD.format(
        **{
            **config,
            "base": base,
            "kind": "DoRA" if config["use_dora"] else "LoRA",
            "table": table("training", rows),
            "targets": targets,
        }
    )


def table(title: str, rows: Mapping[str, Any]) -> str:
    """Return rows of names and values in Markdown."""
    lines = (f"| {key} | {_cell(value)} |" for key, value in rows.items())
    return "\n".join([f"| {title} | |", "|---|---|", *lines])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


# Write the folder that serves: adapter, tokenizer, model card; and read the adapter back.

TOKENIZER_FILES = (
    "config.json",  # without it transformers picks the wrong tokenizer class
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def export_adapter(
    folder: Path,
    adapter: Adapter,
    *,
    checkpoint_dir: Path,
    card: Mapping[str, Any],
    patterns: bool = False,
) -> None:
    """Write a PEFT adapter with its tokenizer and model card into a folder.

    Args:
        folder: An existing folder.
        adapter: Names of our model or of torchtune's split one; parts are made whole. Which base
            weights it was made for goes into the file: what it says itself, else those of
            ``checkpoint_dir``.
        checkpoint_dir: Folder of the base model.
        card: Rows of the model card's table.
        patterns: Leave ranks and scales as they are, said by rank_pattern and alpha_pattern, which
            PEFT reads, but vLLM and llama.cpp do not. Otherwise all modules get one of each.

    Raises:
        AdapterError: The adapter is empty, or no file of PEFT's can hold it.
    """
    base, config = base_name(checkpoint_dir), read_config(checkpoint_dir)
    # Somebody else's says nothing, so it is for the base that its user names.
    adapter = replace(adapter, base_hash=adapter.base_hash or known_hash(checkpoint_dir))
    if parts_of(adapter.tensors):
        ranks = " or ".join(map(str, sorted(set(adapter.ranks.values()))))
        names = ", ".join(targets_of(adapter.tensors))
        card = {**card, "trained": f"{names}, each of rank {ranks}"}
    norms = partial(row_norms, checkpoint_dir)
    held = served(adapter, config, norms, patterns=patterns)
    save_adapter(folder, held, adapter, base, config.num_hidden_layers)
    copy_tokenizer(checkpoint_dir, folder)
    (folder / "README.md").write_text(model_card(folder, base, card), encoding="utf-8")


def load_trained(
    folder: Path, checkpoint_dir: Path, model: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Read an adapter as it was trained: what :func:`export_adapter` was given, bit for bit.

    Args:
        folder: What it wrote.
        checkpoint_dir: Folder of the base model.
        model: The adapter of the model that it is for, if that is known by now.

    Returns:
        The low-rank tensors and those that were trained whole.

    Raises:
        AdapterError: The file's metadata do not fit its tensors.
        CheckpointError: A tensor is not part of a Phi-3 adapter, or of the model's.
        MissingFileError: There is no adapter in the folder.
    """
    adapter, origin = load_adapter(folder), load_origin(folder)
    if MODULES in origin:
        tensors, _ = original(adapter, origin, read_config(checkpoint_dir))
        adapter = {**tensors, **{n: v for n, v in adapter.items() if n in SAVED}}
    if model is not None:
        check_same(folder, adapter, model)
    return adapter


def export_model(folder: Path, weights: dict[str, Tensor], checkpoint_dir: Path) -> None:
    """Write a fully trained model as a Hugging Face checkpoint folder.

    Args:
        folder: An existing folder.
        weights: All of the model, our names.
        checkpoint_dir: Folder of the base model, for tokenizer and configuration.
    """
    save_weights(folder, weights)
    copy_tokenizer(checkpoint_dir, folder)


def base_name(checkpoint_dir: Path) -> str:
    """Return how an adapter names its base: the repository it came from, else the folder.

    ``tune download`` leaves original_repo_id.json beside the weights.
    """
    file = checkpoint_dir / "original_repo_id.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["repo_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(checkpoint_dir.resolve())


def copy_tokenizer(checkpoint_dir: Path, folder: Path) -> None:
    """Copy the tokenizer's files, and the configuration without which they are misread."""
    for name in TOKENIZER_FILES:
        if (checkpoint_dir / name).is_file():
            shutil.copyfile(checkpoint_dir / name, folder / name)
