"""What PEFT, vLLM and llama.cpp make of an adapter folder as it lies there, ours or anyone's.

Which properties of an adapter matter is said here, what each runtime does with such an adapter in
verdicts.json: what came of running one (``python -m benchmarks.runtimes --verdicts``).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
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
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.mlx import is_mlx
from phi3_plugin.checkpoint.peft import CONFIG, WEIGHTS, folders_within, token_indices
from phi3_plugin.checkpoint.peft_config import (
    BASE_KEEPING_STARTS,
    PeftConfig,
    check_patterns,
    matched,
    unsupported,
    wrong_values,
)
from phi3_plugin.config import Phi3Config, read_json_object
from phi3_plugin.errors import AdapterError, CheckpointError, MissingFileError
from phi3_plugin.options import RUNTIMES

LOADS, MISSCALED, MISREAD, REJECTED = "loads", "mis-scaled", "mis-read", "rejected"
"""`MISSCALED` loads, and multiplies B A with a wrong number; `MISREAD` loads, and computes
something else; `REJECTED` ends with an error."""

WORST = [LOADS, MISSCALED, MISREAD, REJECTED]

REASONS = {
    "no adapter": "the file holds no adapter: no lora_A, no lora_B",
    "shape": "{}",
    "rank of a target": "{}",
    "rank": "{}",
    "not finite": "NaN or infinite numbers in {}: every answer would be",
    "target of nothing": "target_modules names what a Phi-3 does not have: {}",
    "start": "init_lora_weights: it is for a base that {} has changed",
    "start by gradients": "init_lora_weights: it is for a base that {} has changed",
    "start that PEFT repeats": (
        "init_lora_weights: PEFT changes the base by {} again when it loads this; others do not"
    ),
    "pissa": "init_lora_weights: PiSSA is refused",
    "no target": "no module of a Phi-3 is in target_modules",
    "not a target": (
        "not in target_modules or not in a Phi-3, so PEFT passes over their tensors silently: {}"
    ),
    "no prefix": "PEFT passes over names that do not begin with base_model.model: {}",
    "unknown name": "names that are no module's of a Phi-3: {}",
    "neither A nor B": "neither a lora_A nor a lora_B: {}",
    "no lora_alpha": "lora_alpha is missing: PEFT takes 8",
    "no r": "adapter_config.json has no r: PEFT takes 8",
    "no target_modules": "adapter_config.json has no target_modules",
    "no task_type": ("task_type is missing: PeftModel loads it, AutoPeftModelForCausalLM does not"),
    "config.json": (
        "config.json is there, but no weights of a model: PeftModel loads the folder, "
        "AutoModelForCausalLM and pipeline of transformers 5 take it for a whole model and fail. "
        "Remove config.json"
    ),
    "DoRA without magnitude": "use_dora, but no magnitude for {}",
    "DoRA unsaid": "magnitudes of DoRA are passed over, since use_dora is not true",
    "DoRA": "DoRA is not supported",
    "rows": "rows of single tokens are not supported: {}",
    "modules_to_save": "modules_to_save is not supported",
    "vocabulary": "the embedding and head of a resized vocabulary are not supported: {}",
    "saved norm": "trained norms: {}",
    "bias": "adapters with a bias are not supported",
    "bias tensor": "biases of the adapter's own are not supported: {}",
    "other layer": "not a layer of its Phi-3: {}. It has the fused layers",
    "rank above vLLM's": "rank above {}",
    "tied head": "this base has no head of its own, so its adapter finds no tensor",
    "tied embedding": "the head is the embedding's tensor, which its adapter does not fit",
    "tied by PEFT": "ensure_weight_tying: embedding and head are to share an adapter",
    "one scale": "rank_pattern and alpha_pattern are ignored: {}",
    "alpha over rank": "alpha_pattern and use_rslora are ignored: {}",
}
"""What an adapter may be like, and why that matters. They are told in this order."""

REMARKS = {
    ("target of nothing", "PEFT"),
    ("target of nothing", "vLLM"),
    ("target of nothing", "llama.cpp"),
    ("start that PEFT repeats", "PEFT"),
    ("no task_type", "PEFT"),
    ("config.json", "PEFT"),
}
"""What is told although the runtime loads it."""


@cache
def known_verdicts() -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Return by property and runtime each version and what it does, that which was run first."""
    known: dict[tuple[str, str], list[tuple[str, str]]] = {}
    text = Path(__file__).with_name("verdicts.json").read_text("utf-8")
    for row in json.loads(text):
        key, said = (row["property"], row["runtime"]), (row["version"], row["verdict"])
        known.setdefault(key, []).append(said)
    return known


def verdict_of(name: str, detail: str, runtime: str) -> tuple[str, str | None]:
    """Return what a runtime makes of a property, and the reason, where there is one to tell."""
    (_, verdict), *others = known_verdicts().get((name, runtime), [("", LOADS)])
    reason = REASONS[name].format(detail)
    if older := [f"{version}: {other}" for version, other in others if other != verdict]:
        return verdict, f"{', '.join(older)}, since {reason}"
    said = verdict != LOADS or (name, runtime) in REMARKS
    return verdict, reason if said else None


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` takes; 16 if it is not given."""


REFUSED = "correct what is named; convert and merge refuse it, too"
"""What to do where nothing here reads an adapter either."""


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
    properties = sorted(_properties(adapter, base), key=lambda found: [*REASONS].index(found[0]))
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
    instead, judged = _instead(adapter, base), list[Verdict]()
    for runtime in RUNTIMES:
        status, reasons = LOADS, list[str]()
        for name, detail in properties:
            verdict, reason = verdict_of(name, detail, runtime)
            status = max(status, verdict, key=WORST.index)
            if reason is not None:
                reasons.append(reason)
        advice = use[runtime] if status == LOADS else instead[runtime]
        if advice == REFUSED and judged and judged[0].status == LOADS:
            advice = "only PEFT computes it; convert and merge refuse it, too"
        judged.append(Verdict(runtime, status, tuple(dict.fromkeys(reasons)), advice))
    return judged


def _instead(adapter: "PeftFolder", base: Phi3Config | None) -> dict[str, str]:
    """Return by runtime what to do where it does not load the adapter as it is.

    Converting and merging are named where they can help: with the base at hand it is tried whether
    this package reads the adapter, else whether it knows all of its features.
    """
    problems = [*unsupported(adapter.config.keys), *(_not_finite(adapter))]
    if base and not problems:
        try:
            read_adapter(adapter.config.file.parent, config=base)
        except (AdapterError, CheckpointError) as error:
            problems = [str(error)]
    if problems:
        return dict.fromkeys(RUNTIMES, REFUSED)
    tied = base is None or base.tie_word_embeddings
    whole = any(adapter.with_kind(kind) for kind in (MAGNITUDE, NEW_ROWS, "saved"))
    of_tied = tied and {"lm_head", "model.embed_tokens"} & {*adapter.adapted}
    to = {
        "PEFT": "convert --to peft",
        "vLLM": "merge" if whole else "convert --to peft",
        "llama.cpp": "merge --to gguf" if whole or of_tied else "convert --to gguf",
    }
    return {runtime: f"phi3-tune adapter {verb}" for runtime, verb in to.items()}


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
    """Yield what of `REASONS` an adapter is like, and the modules or numbers concerned."""
    keys, config, adapted = adapter.config.keys, adapter.config, adapter.adapted
    targets = [module for module in adapted if adapter.targeted(module) and is_adaptable(module)]
    kept = (m for m in adapter.with_kind("saved") if not m.endswith(ORIGINAL))
    saved = sorted({module.removesuffix(COPY) for module in kept})
    magnitudes = adapter.with_kind(MAGNITUDE)
    biased, dora = adapter.with_kind("bias"), keys.get("use_dora")
    tied = base is not None and base.tie_word_embeddings
    shared, norms = keys.get("ensure_weight_tying"), [m for m in saved if m.endswith("norm")]
    holds = {
        "no adapter": not adapted and not saved,
        "no target": adapted and not targets,
        "config.json": looks_whole(config.file.parent),
        "DoRA unsaid": magnitudes and not dora,
        "DoRA": magnitudes or dora,
        "modules_to_save": keys.get("modules_to_save") and not norms,
        "bias": keys.get("bias", "none") != "none",
        "tied by PEFT": tied and shared and {"lm_head", "model.embed_tokens"} & {*adapted},
        "tied head": tied and not shared and "lm_head" in adapted,
        "tied embedding": tied and not shared and "model.embed_tokens" in adapted,
    }
    for key in ("lora_alpha", "r", "target_modules", "task_type"):
        holds[f"no {key}"] = keys.get(key) is None
    low = tuple(ending for ending, kind in PEFT_ENDINGS.items() if kind in (A, B))
    others = [name for name in adapter.unknown if _named(name)[0] not in adapter.tensors]
    concerned = {
        "not finite": [*_not_finite(adapter)],
        "not a target": [module for module in adapted if targets and module not in targets],
        "no prefix": [name for name in adapter.unknown if name not in others],
        "unknown name": [name for name in others if name.endswith(low)],
        "neither A nor B": [name for name in others if not name.endswith(low)],
        "DoRA without magnitude": [m for m in adapted if dora and m not in magnitudes],
        "rows": adapter.with_kind(NEW_ROWS),
        "vocabulary": [module for module in saved if not keys.get("modules_to_save")],
        "saved norm": norms,
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
        kind = "start that PEFT repeats" if start in STARTS else "start"
        yield "start by gradients" if start == "lora_ga" else kind, repr(start)
        if start.startswith("pissa"):
            yield "pissa", ""
    if max([keys.get("r", 0), *adapter.ranks.values()]) > VLLM_RANKS[-1]:
        yield "rank above vLLM's", str(VLLM_RANKS[-1])
    alpha = keys.get("lora_alpha")
    if alpha is not None:
        if rank := keys.get("r"):  # vLLM has one r and one lora_alpha for all modules
            scale = alpha / (rank**0.5 if keys.get("use_rslora") else rank)
            yield from _misscaled("one scale", adapter, dict.fromkeys(adapted, scale))
        right = {m: rank for m, rank in adapter.ranks.items() if config.rank(m) == rank}
        own = {module: alpha / rank for module, rank in right.items()}
        yield from _misscaled("alpha over rank", adapter, own)


def looks_whole(folder: Path) -> bool:
    """Whether a folder of an adapter has a model's config.json without a model's weights."""
    weights = (*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin"))
    return (folder / "config.json").is_file() and not weights


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

COPY, ORIGINAL = ".modules_to_save", ".original_module"
"""End the second and third name of a module that was trained whole."""

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
        names = tuple(self.tensors) if module in self.tensors else (module,)
        if isinstance(excluded, str):
            if module in matched(excluded, names):
                return False
        elif any(f".{module}".endswith(f".{name}") for name in excluded):
            return False
        if targets == "all-linear":
            return module not in ("model.embed_tokens", "lm_head")
        if isinstance(targets, str):
            return module in matched(targets, names)
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
        module, ending = _named(name)
        if ending is None or not name.startswith(PEFT_PREFIX):
            unknown.append(name)
        # vLLM and llama.cpp read names without PEFT's prefix, too
        if ending is not None and (name.startswith(PEFT_PREFIX) or is_adaptable(module)):
            tensors.setdefault(module, {})[TENSOR_KINDS[ending]] = tensor
    check_patterns(file, tensors)
    return PeftFolder(PeftConfig(file, keys, tuple(tensors)), tensors, tuple(unknown))


def _named(name: str) -> tuple[str, str | None]:
    """Return the module of a tensor, and the ending that says which kind of tensor it is."""
    ending = next((ending for ending in TENSOR_KINDS if name.endswith(ending)), None)
    return name.removeprefix(PEFT_PREFIX).removesuffix(ending or ""), ending


def _wrong_names(keys: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the keys that say which modules are meant."""
    for key in ("target_modules", "exclude_modules"):
        names = keys.get(key) or []
        if not isinstance(names, str | list) or not all(isinstance(name, str) for name in names):
            yield f"{key}: {names!r} must be a name or a list of names."
    layers = keys.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(type(number) is int for number in numbers):
        yield f"layers_to_transform: {layers!r} must be a number or a list of numbers."
    if (pattern := keys.get("layers_pattern") or "layers") not in ("layers", ["layers"]):
        yield f"layers_pattern: {pattern!r} is not where a Phi-3 has its layers."
