"""What adapter_config.json says of an adapter that we write."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.names import to_hf
from phi3_plugin.checkpoint.served import Served

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
