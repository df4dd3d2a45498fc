"""Which keys of a recipe make a model that an adapter fits."""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from phi3_plugin.errors import AdapterError
from phi3_plugin.models.targets import ALIASES, EMBEDDING, FUSED, HEAD, MLP_TARGETS, TARGETS

Place = tuple[int | None, str]
"""Number of the layer, which head and embedding have not, and target."""


def keys_of(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    whole: Collection[str],
    *,
    layers: int,
    use_dora: bool,
    use_rslora: bool,
) -> dict[str, Any]:
    """Return the keys of ``lora_phi3`` that give these adapters; equal adapters, equal keys.

    Args:
        ranks: By module, our names.
        scales: What B A is multiplied with, likewise.
        whole: Tensors that are trained whole.
        layers: How many the model has.
        use_dora: Whether they have magnitudes.
        use_rslora: How the keys are to say the scale.

    Raises:
        AdapterError: No keys say that a layer has adapters on other targets than the next one.
    """
    places = {module: _place(module) for module in ranks}
    used = {target for _, target in places.values()}
    targets = [t for t in (*TARGETS, *FUSED) if t in used]
    rank, rank_pattern = _pattern({place: ranks[m] for m, place in places.items()})
    alphas = {
        place: _tidy(scales[m] * (math.sqrt(ranks[m]) if use_rslora else ranks[m]))
        for m, place in places.items()
    }
    alpha, alpha_pattern = _pattern(alphas)
    return {
        "lora_attn_modules": targets,
        "apply_lora_to_mlp": any(FUSED.get(t, t) in MLP_TARGETS for t in targets),
        "apply_lora_to_output": HEAD in used,
        "apply_lora_to_embedding": EMBEDDING in used,
        "lora_rank": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "layers_to_transform": _layers(places.values(), targets, layers),
        "use_dora": use_dora,
        "use_rslora": use_rslora,
        "modules_to_save": sorted(ALIASES[n.removesuffix(".weight")] for n in whole) or None,
    }


def keys_of_model(model: nn.Module) -> dict[str, Any]:
    """Return the keys that gave a model its adapters, as :func:`keys_of` says them.

    Args:
        model: torchtune's decoder; knows what is trained.
    """
    adapted: dict[str, Any] = {n: m for n, m in model.named_modules() if hasattr(m, "lora_a")}
    whole = [n for n in (f"{module}.weight" for module in ALIASES) if _is_trained(model, n)]
    return keys_of(
        {name: module.rank for name, module in adapted.items()},
        {name: module.scaling for name, module in adapted.items()},
        whole,
        layers=len(model.layers),  # type: ignore[arg-type]
        use_dora=any(hasattr(module, "magnitude") for module in adapted.values()),
        use_rslora=any(module.use_rslora for module in adapted.values()),
    )


def _is_trained(model: nn.Module, name: str) -> bool:
    return any(n == name and p.requires_grad for n, p in model.named_parameters())


def _place(module: str) -> Place:
    words = module.split(".")
    layer = int(words[1]) if words[0] == "layers" else None
    return layer, ALIASES.get(words[-1], words[-1])


def _layers(places: Collection[Place], targets: list[str], layers: int) -> list[int] | None:
    """Return the layers that have adapters, or None for all."""
    at = {t: sorted(n for n, other in places if other == t and n is not None) for t in targets}
    numbers: list[int] = next(iter(at.values()), [])
    if odd := [f"{t} in {own}" for t, own in at.items() if own != numbers]:
        raise AdapterError(
            f"{targets[0]} is adapted in the layers {numbers}, but {' and '.join(odd)}. "
            "layers_to_transform is for all targets alike."
        )
    return numbers if numbers and numbers != list(range(layers)) else None


def _pattern(values: Mapping[Place, float]) -> tuple[int, dict[str, float]]:
    """Return the commonest whole number, and what differs, by target or layer and target."""
    whole = Counter(value for value in values.values() if value == int(value))
    # Of several as common the smallest, so that the order of the modules decides nothing.
    usual = int(min(whole, key=lambda value: (-whole[value], value))) if whole else 1
    pattern: dict[str, float] = {}
    for target in dict.fromkeys(target for _, target in values):
        own = {layer: value for (layer, name), value in values.items() if name == target}
        alike = len(set(own.values())) == 1
        for layer, value in own.items():
            if value != usual:
                pattern[target if alike else f"{layer}.{target}"] = value
    return usual, pattern


def _tidy(alpha: float) -> float:
    """Return the whole number that rounding hid, if there is one."""
    whole = round(alpha)
    return whole if math.isclose(alpha, whole, rel_tol=1e-9) else alpha
