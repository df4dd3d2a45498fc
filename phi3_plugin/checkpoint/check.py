"""What PEFT, vLLM and llama.cpp make of an adapter folder as it lies there, ours or anyone's.

Read from the sources of the runtimes, of which only PEFT is run in our tests:

    PEFT       0.21.2, tuners/lora, utils/save_and_load.py
    vLLM       main of 2026, lora/peft_helper.py, lora/lora_model.py, lora/utils.py,
               config/lora.py, models/phi3.py, models/llama.py; 0.32 was run for patterns,
               PiSSA and names without PEFT's prefix
    llama.cpp  0b03ada, convert_lora_to_gguf.py; src/llama-adapter.{h,cpp}, src/llama-graph.cpp
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from phi3_plugin.checkpoint.base import (
    MAGNITUDE,
    MODULE_NAMES,
    NEW_ROWS,
    PEFT_ENDINGS,
    PEFT_PREFIX,
    PEFT_ROWS,
    A,
    B,
    expected_shapes,
)
from phi3_plugin.checkpoint.equivalents import STARTS
from phi3_plugin.checkpoint.files import StoredTensor, stored_tensors
from phi3_plugin.checkpoint.mlx import is_mlx
from phi3_plugin.checkpoint.peft import CONFIG, WEIGHTS, folders_within, token_indices
from phi3_plugin.checkpoint.peft_config import (
    BASE_KEEPING_STARTS,
    PeftConfig,
    check_patterns,
    is_plain,
    matched,
    unsupported,
    wrong_values,
)
from phi3_plugin.config import Phi3Config, read_json_object
from phi3_plugin.errors import AdapterError, MissingFileError
from phi3_plugin.options import RUNTIMES

LOADS, MISSCALED, MISREAD, REJECTED = "loads", "mis-scaled", "mis-read", "rejected"
"""`MISSCALED` loads, and multiplies B A with a wrong number; `MISREAD` loads, and computes
something else; `REJECTED` ends with an error."""

WORST = [LOADS, MISSCALED, MISREAD, REJECTED]

VERDICTS: dict[str, tuple[str, str | None, str | None, str | None]] = {
    "no adapter": (
        "the file holds no adapter: no lora_A, no lora_B", REJECTED, REJECTED, REJECTED),
    "shape": ("{}", REJECTED, REJECTED, REJECTED),
    "rank of a target": ("{}", REJECTED, None, None),
    "rank": ("{}", MISREAD, MISREAD, MISREAD),
    "not finite": (
        "NaN or infinite numbers in {}: every answer would be", MISREAD, MISREAD, MISREAD),
    "target of nothing": (
        "target_modules names what a Phi-3 does not have: {}", LOADS, LOADS, LOADS),
    "start": ("init_lora_weights: it is for a base that {} has changed", MISREAD, MISREAD, MISREAD),
    "start that PEFT repeats": (
        "init_lora_weights: PEFT changes the base by {} again when it loads this; others do not",
        LOADS, MISREAD, MISREAD),
    "pissa": ("init_lora_weights: PiSSA is refused", None, REJECTED, None),
    "no target": ("no module of a Phi-3 is in target_modules", REJECTED, None, None),
    "not a target": (
        "not in target_modules or not in a Phi-3, so PEFT passes over their tensors silently: {}",
        MISREAD, None, None),
    "unknown name": ("PEFT passes over names that are not its own: {}", MISREAD, None, None),
    "neither A nor B": ("neither a lora_A nor a lora_B: {}", None, REJECTED, REJECTED),
    "no lora_alpha": ("lora_alpha is missing: PEFT takes 8", MISSCALED, REJECTED, REJECTED),
    "no r": ("adapter_config.json has no r", None, REJECTED, None),
    "no target_modules": ("adapter_config.json has no target_modules", None, REJECTED, None),
    "no task_type": (
        "task_type is missing: PeftModel loads it, AutoPeftModelForCausalLM does not",
        LOADS, None, None),
    "DoRA without magnitude": ("use_dora, but no magnitude for {}", MISREAD, None, None),
    "DoRA unsaid": (
        "magnitudes of DoRA are passed over, since use_dora is not true", MISREAD, None, None),
    "DoRA": ("DoRA is not supported", None, REJECTED, REJECTED),
    "modules_to_save": ("modules_to_save is not supported", None, REJECTED, None),
    "rows": ("rows of single tokens are not supported", None, REJECTED, REJECTED),
    "saved": ("the converter exits at modules_to_save: {}", None, None, REJECTED),
    "saved norm": ("trained norms are passed over: {}", None, None, MISREAD),
    "bias": ("adapters with a bias are not supported", None, REJECTED, None),
    "bias tensor": ("the converter exits at a bias: {}", None, None, REJECTED),
    "other layer": (
        "not a layer of its Phi-3: {}. It has the fused layers", None, REJECTED, REJECTED),
    "rank above vLLM's": ("rank above {}", None, REJECTED, None),
    "tied head": (
        "this base has no head of its own, so its adapter finds no tensor", None, None, REJECTED),
    "tied embedding": (
        "the head is the embedding's tensor, and would get its adapter too", None, None, MISREAD),
    "one scale": (
        "0.32 reads rank_pattern and alpha_pattern, but older versions ignored them: {}",
        None, LOADS, None),
    "alpha over rank": ("alpha_pattern and use_rslora are ignored: {}", None, None, MISSCALED),
}  # fmt: skip
"""What an adapter may be like: why that matters, and what PEFT, vLLM and llama.cpp then do; None
where it is nothing to them. A reason with `LOADS` is a remark. They are told in this order."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` takes; 16 if it is not given."""

INSTEAD = {
    "PEFT": "phi3-tune adapter convert --to peft, or correct what is named",
    "vLLM": "phi3-tune adapter convert --to peft; where that keeps what is named, merge",
    "llama.cpp": "phi3-tune adapter convert --to gguf; where that cannot, merge",
}
"""What to do where a runtime does not load the adapter as it is."""


@dataclass(frozen=True)
class Verdict:
    """What one runtime makes of an adapter."""

    runtime: str
    status: str
    """One of `WORST`."""
    reasons: tuple[str, ...]
    """Why, and remarks where it loads."""
    use: str
    """What to pass, if it loads; else what to do."""


def verdicts(folder: str | Path, base: Phi3Config | None = None) -> list[Verdict]:
    """Say what PEFT, vLLM and llama.cpp make of an adapter folder, ours or anyone's.

    The header is read, and the values only to look for NaN.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors.
        base: Sizes of the base model, if it is at hand: shapes are then compared with it.

    Raises:
        AdapterError: The configuration is damaged, or is not that of a LoRA adapter.
        CheckpointError: The weights are damaged or cut short.
        MissingFileError: One of the two files is missing.
    """
    adapter = read_peft_folder(folder)
    properties = sorted(_properties(adapter, base), key=lambda found: [*VERDICTS].index(found[0]))
    ranks = [adapter.config.keys.get("r", 8), *adapter.ranks.values()]
    least = next((size for size in VLLM_RANKS if size >= max(ranks)), 0)
    ids = [i for of_module in token_indices(adapter.config.keys).values() for i in of_module]
    grow = ""
    if base and ids and max(ids) >= base.vocab_size:
        grow = f"base.resize_token_embeddings({max(ids) + 1}), then "
    use = {
        "PEFT": f"{grow}PeftModel.from_pretrained(base, {str(folder)!r})",
        "vLLM": f"--enable-lora --max-lora-rank {least} --lora-modules NAME={folder}",
        "llama.cpp": f"convert_lora_to_gguf.py --base BASE {folder}, then --lora",
    }
    judged = []
    for runtime in RUNTIMES:
        status, reasons = LOADS, list[str]()
        for name, detail in properties:
            reason, *statuses = VERDICTS[name]
            own = statuses[RUNTIMES.index(runtime)]
            if own is not None:
                status = max(status, own, key=WORST.index)
                reasons.append(reason.format(detail))
        advice = use[runtime] if status == LOADS else INSTEAD[runtime]
        judged.append(Verdict(runtime, status, tuple(dict.fromkeys(reasons)), advice))
    return judged


def served_by(folder: Path) -> str:
    """Return one line: what each runtime makes of an adapter that was just saved.

    Args:
        folder: Whole and in its place.
    """
    words = []
    for verdict in verdicts(folder):
        why = "" if verdict.status == LOADS else f" ({verdict.reasons[0]})"
        words.append(f"{verdict.runtime} {verdict.status}{why}")
    return f"{folder.name}: {', '.join(words)}."


def _properties(adapter: "PeftFolder", base: Phi3Config | None) -> Iterator[tuple[str, str]]:
    """Yield what of `VERDICTS` an adapter is like, and the modules or numbers concerned."""
    keys, config, adapted = adapter.config.keys, adapter.config, adapter.adapted
    targets = [module for module in adapted if adapter.targeted(module) and is_adaptable(module)]
    saved, magnitudes = adapter.with_kind("saved"), adapter.with_kind(MAGNITUDE)
    biased, dora = adapter.with_kind("bias"), keys.get("use_dora")
    tied = base is not None and base.tie_word_embeddings
    holds = {
        "no adapter": not adapted and not saved,
        "no target": adapted and not targets,
        "DoRA unsaid": magnitudes and not dora,
        "DoRA": magnitudes or dora,
        "rows": adapter.with_kind(NEW_ROWS),
        "modules_to_save": saved or keys.get("modules_to_save"),
        "bias": biased or keys.get("bias", "none") != "none",
        "tied head": tied and "lm_head" in adapted,
        "tied embedding": tied and "model.embed_tokens" in adapted,
    }
    for key in ("lora_alpha", "r", "target_modules", "task_type"):
        holds[f"no {key}"] = keys.get(key) is None
    low = tuple(ending for ending, kind in PEFT_ENDINGS.items() if kind in (A, B))
    concerned = {
        "not finite": [*_not_finite(adapter)],
        "not a target": [module for module in adapted if targets and module not in targets],
        "unknown name": [*adapter.unknown],
        "neither A nor B": [name for name in adapter.unknown if not name.endswith(low)],
        "DoRA without magnitude": [m for m in adapted if dora and m not in magnitudes],
        "saved": [module for module in saved if not module.endswith("norm")],
        "saved norm": [module for module in saved if module.endswith("norm")],
        "bias tensor": [module for module in biased if not module.endswith("norm")],
        "other layer": [module for module in adapted if not is_adaptable(module)],
    }
    yield from ((name, "") for name, is_so in holds.items() if is_so)
    yield from ((name, listed(modules)) for name, modules in concerned.items() if modules)
    if names := adapter.targets_of_nothing():
        yield "target of nothing", listed(names, 9)
    yield from (("shape", problem) for problem in _shape_problems(adapter, base))
    if wrong := [module for module, rank in adapter.ranks.items() if config.rank(module) != rank]:
        ranks = f"{config.rank(wrong[0])} in the configuration, {adapter.ranks[wrong[0]]}"
        text = f"rank {ranks} in the file: {listed(wrong)}"
        yield "rank", text
        if set(wrong) & set(targets):
            yield "rank of a target", text
    start = keys.get("init_lora_weights", True)
    if isinstance(start, str) and start not in BASE_KEEPING_STARTS:
        yield "start that PEFT repeats" if start in STARTS else "start", repr(start)
        if start.startswith("pissa"):
            yield "pissa", ""
    if max([keys.get("r", 0), *adapter.ranks.values()]) > VLLM_RANKS[-1]:
        yield "rank above vLLM's", str(VLLM_RANKS[-1])
    alpha = keys.get("lora_alpha")
    if alpha is not None:
        if rank := keys.get("r"):  # vLLM has one r and one lora_alpha for all modules
            scale = alpha / (rank**0.5 if keys.get("use_rslora") else rank)
            yield from _misscaled("one scale", adapter, dict.fromkeys(adapted, scale))
        own = {module: alpha / rank for module, rank in adapter.ranks.items()}
        yield from _misscaled("alpha over rank", adapter, own)


def _misscaled(
    name: str, adapter: "PeftFolder", scales: Mapping[str, float]
) -> Iterator[tuple[str, str]]:
    factors = {module: scale / adapter.config.scale(module) for module, scale in scales.items()}
    wrong = {module: factor for module, factor in factors.items() if abs(factor - 1) > 1e-6}
    if wrong:
        first, factor = next(iter(wrong.items()))
        yield name, f"{first} would count {factor:.4g} times, {len(wrong)} modules so"


def _not_finite(adapter: "PeftFolder") -> Iterator[str]:
    for module, kinds in adapter.tensors.items():
        for kind, tensor in kinds.items():
            if tensor.shape and not bool(torch.isfinite(tensor[:]).all()):
                yield f"{module} ({kind.removeprefix('.')})"


def _shape_problems(adapter: "PeftFolder", base: Phi3Config | None) -> Iterator[str]:
    """Yield which tensors are missing or fit neither each other nor the base."""
    sizes = expected_shapes(base) if base else {}
    alone, wrong = list[str](), list[str]()
    for module in adapter.adapted:
        a, b = (adapter.tensors[module].get(kind) for kind in (A, B))
        if a is None or b is None:
            alone.append(module)
        elif not len(a.shape) == len(b.shape) == 2 or not 0 < a.shape[0] == b.shape[1]:
            wrong.append(f"A {list(a.shape)} and B {list(b.shape)} do not multiply: {module}")
        else:
            layer = sizes.get(f"{module}.weight")  # none: another's name, of which runtimes judge
            size = (b.shape[0], a.shape[1])
            size = size[::-1] if module == "model.embed_tokens" else size
            if layer is not None and size != layer:
                here = f"{module} is {list(layer)} in this base"
                yield f"{here}, the adapter is for {list(size)}"
    for module in adapter.with_kind("saved"):
        own = sizes.get(f"{module}.weight", sizes.get("model.embed_tokens.weight"))
        stored = adapter.tensors[module]["saved"].shape
        if module in ("model.embed_tokens", "lm_head") and own not in (None, stored):
            yield f"{module} is {list(own or ())} in this base, and {list(stored)} in the file"
    if alone:
        yield f"A or B is missing: {listed(alone)}"
    if wrong:
        yield listed(wrong)


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return the first names in a sentence, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# The folder of a PEFT adapter, as it lies there: its configuration and the header of its weights

TENSOR_KINDS = {
    **PEFT_ENDINGS,
    ".lora_B.bias": "bias",
    PEFT_ROWS: NEW_ROWS,
    ".base_layer.weight": "base",
    ".bias": "bias",
    ".weight": "saved",
}
"""How names in a file of PEFT end, and what the tensors are; the first that fits counts."""

JUDGED = {"bias", "lora_bias"}
"""Of the features of PEFT that we do not compute, those whose fate in the runtimes is known."""

ADAPTABLE = [name for name in MODULE_NAMES if not name.endswith("norm")]
"""The modules of a Phi-3 that can have an adapter; ``{}`` is the number of the layer."""

_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")

# Shapes: R rank


@dataclass(frozen=True)
class PeftFolder:
    """The folder of an adapter, as it lies there; modules have Hugging Face's names."""

    config: PeftConfig
    tensors: Mapping[str, Mapping[str, StoredTensor]]
    """Of each module, without PEFT's prefix, its tensors by kind; see `TENSOR_KINDS`."""
    unknown: tuple[str, ...]
    """Tensors of which nothing is known."""

    @cached_property
    def adapted(self) -> list[str]:
        """The modules with an A or a B."""
        return [module for module, kinds in self.tensors.items() if {A, B} & kinds.keys()]

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of each adapted module that has a matrix A, as its tensor says."""
        shapes = {m: self.tensors[m][A].shape for m in self.with_kind(A)}
        return {m: shape[0] for m, shape in shapes.items() if len(shape) == 2 and shape[0]}

    def with_kind(self, kind: str) -> list[str]:
        """Return the modules that have a tensor of this kind."""
        return [module for module, kinds in self.tensors.items() if kind in kinds]

    def targeted(self, module: str) -> bool:
        """Whether PEFT puts an adapter into a module of this name.

        Source: PEFT 0.21.2, check_target_module_exists of tuners/tuners_utils.py.
        """
        keys = self.config.keys
        excluded, targets = keys.get("exclude_modules") or [], keys.get("target_modules") or []
        if isinstance(excluded, str):
            if re.fullmatch(excluded, module):
                return False
        elif any(f".{module}".endswith(f".{name}") for name in excluded):
            return False
        if targets == "all-linear":
            return module not in ("model.embed_tokens", "lm_head")
        if isinstance(targets, str):
            names = tuple(self.tensors)
            return module in matched(targets, names if module in self.tensors else (module,))
        layers, layer = keys.get("layers_to_transform"), _LAYER.search(module)
        layers = [layers] if isinstance(layers, int) else layers
        if layers and (layer is None or int(layer.group()) not in layers):
            return False
        return any(f".{module}".endswith(f".{target}") for target in targets)

    def targets_of_nothing(self) -> list[str]:
        """Return the names of target_modules that no module of a Phi-3 has."""
        targets = self.config.keys.get("target_modules") or []
        if isinstance(targets, str):
            return []
        modules = [f".{name.format(0)}" for name in ADAPTABLE]
        return [
            target
            for target in targets
            if not any(module.endswith(f".{_LAYER.sub('0', target)}") for module in modules)
        ]


def is_adaptable(module: str) -> bool:
    """Whether a Phi-3 has a module of this name that can have an adapter."""
    return _LAYER.sub("{}", module, count=1) in ADAPTABLE


def read_peft_folder(folder: str | Path) -> PeftFolder:
    """Read configuration and header of an adapter folder, ours or anyone's.

    Raises:
        AdapterError: The configuration is damaged, or is not that of a LoRA adapter.
        CheckpointError: The weights are damaged or cut short.
        MissingFileError: One of the two files is missing.
    """
    folder = Path(folder)
    file, weights = folder / CONFIG, folder / WEIGHTS
    if not file.is_file():
        lacks = f"has no {CONFIG}" if folder.is_dir() else "is no folder"
        within = folders_within(folder)
        advice = " `phi3-tune adapter import` makes one of files of torchtune's and loralib's."
        raise MissingFileError(
            f"{folder} {lacks}: it is not an adapter folder of PEFT.{within or advice}"
        )
    if is_mlx(file):
        raise AdapterError(
            f"{folder} is an adapter of mlx-lm, which alone loads it as it is. `phi3-tune adapter "
            "import` makes a folder of it that can be checked."
        )
    keys = read_json_object(file, AdapterError)
    if problems := [*unsupported(keys, JUDGED), *wrong_values(keys), *_wrong_names(keys)]:
        raise AdapterError("\n".join(f"{file}: {problem}" for problem in problems))
    if not weights.is_file():
        pickled = [path.name for path in sorted(folder.glob("adapter_model.*"))]
        if pickled := [name for name in pickled if name.endswith((".bin", ".pt"))]:
            raise MissingFileError(
                f"{folder} has {', '.join(pickled)}, but no {WEIGHTS}. A pickle is not opened "
                "here: `phi3-tune adapter import` reads its tensors alone, and writes a folder "
                "that can be checked."
            )
        raise MissingFileError(f"{folder} has no {WEIGHTS}: it is not an adapter folder of PEFT.")
    tensors: dict[str, dict[str, StoredTensor]] = {}
    unknown = []
    for name, tensor in stored_tensors(weights).items():
        ending = next((ending for ending in TENSOR_KINDS if name.endswith(ending)), None)
        if ending is None or not name.startswith(PEFT_PREFIX):
            unknown.append(name)
        module = name.removeprefix(PEFT_PREFIX).removesuffix(ending or "")
        # vLLM and llama.cpp read names without PEFT's prefix, too
        if ending is not None and (name.startswith(PEFT_PREFIX) or is_adaptable(module)):
            tensors.setdefault(module, {})[TENSOR_KINDS[ending]] = tensor
    check_patterns(file, tensors)
    return PeftFolder(PeftConfig(file, keys, tuple(tensors)), tensors, tuple(unknown))


def _wrong_names(keys: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the keys that say which modules are meant."""
    for key in ("target_modules", "exclude_modules"):
        names = keys.get(key) or []
        if not isinstance(names, str | list) or not all(isinstance(name, str) for name in names):
            yield f"{key}: {names!r} must be a name or a list of names."
        elif key == "exclude_modules" and isinstance(names, str) and not is_plain(names, 3):
            yield f"{key}: {names!r} is not read."
    layers = keys.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(type(number) is int for number in numbers):
        yield f"layers_to_transform: {layers!r} must be a number or a list of numbers."
    if (pattern := keys.get("layers_pattern") or "layers") not in ("layers", ["layers"]):
        yield f"layers_pattern: {pattern!r} is not where a Phi-3 has its layers."
