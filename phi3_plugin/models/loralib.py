"""loralib's functions for our models: what is trained, and its state dicts, out and in.

A loralib-built Phi-3 is that of Hugging Face with some layers replaced: ``loralib.Linear`` for a
layer with one adapter, ``loralib.Embedding``, and ``loralib.MergedLinear`` where parts of a layer
have adapters. `layers` says how to build it; then `lora_state_dict` fits it with
``load_state_dict(strict=False)``, and `load_lora_state_dict` takes back what it gives. The files
carry neither rank nor alpha, and loralib's default for alpha is 1: build with those of `layers`.

Source: loralib 0.1.2, layers.py and utils.py; Hu et al. 2021, LoRA, section 4.1.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from phi3_plugin.errors import AdapterError
from phi3_plugin.models.lora import MergedLoRALinear, WholeEmbedding, WholeLinear
from phi3_plugin.models.lora_settings import ALIASES, EMBEDDING, HEAD

BIASES = ("none", "all", "lora_only")

# Shapes: R rank, G groups of a MergedLinear, E those with an adapter


@dataclass(frozen=True)
class LoralibLayer:
    """How loralib builds the counterpart of one of our layers."""

    kind: str
    """``Linear``, ``MergedLinear`` or ``Embedding``."""
    r: int
    lora_alpha: float
    enable_lora: tuple[bool, ...] = ()
    """Of a MergedLinear, whose groups are of equal size: where the parts are not, a part has
    several, which share its A."""
    groups: Mapping[str, range] | None = None
    """Of a MergedLinear: which groups each adapted part has."""


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze all parameters without ``lora_`` in their names, but for biases as asked.

    Args:
        model: Any module, ours or not.
        bias: ``none``; ``all`` to train every bias; ``lora_only`` to train those of layers with
            an adapter. A Phi-3 has no biases.

    Raises:
        AdapterError: There is no such choice, or the model has what loralib's files cannot hold.
    """
    _check(model, bias)
    owners = {name.partition("lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad = False
        if bias == "all" and "bias" in name:
            parameter.requires_grad = True
        if bias == "lora_only" and name.endswith("bias") and name[:-4] in owners:
            parameter.requires_grad = True


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """Return the adapters under the names and in the shapes of a loralib-built Phi-3.

    Args:
        model: One of ours. Tensors share its memory, but for those of parts.
        bias: Which biases to add, as in `mark_only_lora_as_trainable`; a Phi-3 has none.

    Returns:
        ``<module>.lora_A`` and ``<module>.lora_B``: ``[R, in]`` and ``[out, R]``; of parts
        ``[E R, in]`` and ``[E out / G, R]``; of the embedding ``[R, V]`` and ``[D, R]``.

    Raises:
        AdapterError: There is no such choice, or the model has what loralib's files cannot hold.
    """
    _check(model, bias, is_kept=True)
    out: dict[str, Tensor] = {}
    for name, module in _adapted(model):
        groups = _layer(name, module).groups
        if groups:  # a part of several groups repeats its A
            own = {part: _factors(getattr(module, part)) for part in groups}
            a = torch.cat([own[part][0] for part, group in groups.items() for _ in group])
            b = torch.cat([b for _, b in own.values()])
        else:
            a, b = _factors(module)
        out |= {f"{_hf_name(name)}.lora_A": a, f"{_hf_name(name)}.lora_B": b}
    return out


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what ``loralib.lora_state_dict`` returns for a Phi-3 into one of our models.

    Args:
        model: With adapters on the same layers, of the same ranks.
        state: Under loralib's names. Its scale is not in it: the model's alpha must be right.

    Raises:
        AdapterError: Tensors are missing, unexpected, of another shape or not finite; all are
            listed. Nothing has been copied then.
    """
    expected = {name: value.shape for name, value in lora_state_dict(model).items()}
    problems = [f"missing: {name}" for name in expected if name not in state]
    for name in state:
        if name not in expected:
            kind = (
                ", a bias, which a Phi-3 has not" if name.endswith("bias") else ", not an adapter"
            )
            problems.append(f"unexpected: {name}{'' if 'lora_' in name else kind}")
    for name, shape in expected.items():
        problems += _wrong(name, state[name], shape) if name in state else []
    values: list[tuple[Tensor, Tensor]] = []
    for name, module in _adapted(model) if not problems else ():
        a, b = (state[f"{_hf_name(name)}.lora_{kind}"] for kind in "AB")
        groups = _layer(name, module).groups
        if not groups:
            values += zip(_factors(module), (a, b), strict=True)
            continue
        rows = b.split([module.rows[part] for part in groups])
        stacked, taken = a.chunk(sum(map(len, groups.values()))), 0
        for (part, group), b_of_part in zip(groups.items(), rows, strict=True):
            first, *others = stacked[taken : taken + len(group)]
            taken += len(group)
            if any(not torch.equal(other, first) for other in others):
                problems.append(
                    f"{_hf_name(name)}.lora_A: the groups of {part} differ, but it has one A"
                )
            values += zip(_factors(getattr(module, part)), (first, b_of_part), strict=True)
    if problems:
        raise AdapterError(
            "The state dict is not that of loralib for this model:\n  " + "\n  ".join(problems)
        )
    for parameter, value in values:
        parameter.copy_(value)


def _wrong(name: str, value: Any, shape: torch.Size) -> list[str]:
    """Say what is wrong with a tensor of a state dict, if anything is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return [f"not a tensor of floats: {name}"]
    if value.shape != shape:
        return [f"wrong shape: {name} is {list(value.shape)}, the model's {list(shape)}"]
    return [] if value.isfinite().all() else [f"not finite: {name}"]


def layers(model: nn.Module) -> dict[str, LoralibLayer]:
    """Say how to build the same model with loralib.

    Args:
        model: One of ours.

    Returns:
        Hugging Face's name of each adapted module, and what takes its place.

    Raises:
        AdapterError: The model has what loralib cannot build.
    """
    _check(model, "none", is_kept=True)
    return {_hf_name(name): _layer(name, module) for name, module in _adapted(model)}


def Conv2d(*_: Any, **__: Any) -> NoReturn:
    """Refuse loralib's layer of this name.

    Raises:
        AdapterError: Always.
    """
    raise AdapterError(
        "loralib.Conv2d has no counterpart here: a Phi-3 language model has no convolution. For "
        "the vision models use loralib itself."
    )


def _check(model: nn.Module, bias: str, *, is_kept: bool = False) -> None:
    """Refuse what loralib lacks, and what a state dict, if it is to be kept, would not hold."""
    if bias not in BIASES:
        raise AdapterError(f"bias: {bias!r} must be one of {', '.join(BIASES)}.")
    for name, module in model.named_modules():
        if hasattr(module, "magnitude"):
            raise AdapterError(f"{name} has a magnitude, but loralib has no DoRA. Use plain LoRA.")
        if hasattr(module, "conv") and any("lora_" in key for key in module._parameters):
            Conv2d()
        is_whole = isinstance(module, WholeEmbedding | WholeLinear) and module.weight.requires_grad
        if is_kept and is_whole:
            raise AdapterError(f"{name} is trained whole, but a file of loralib has adapters only.")
    if is_kept and not any(True for _ in _adapted(model)):
        raise AdapterError("The model has no adapters of this package: build it with lora_phi3.")


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules with an adapter of their own or of their parts."""
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        is_part = isinstance(parent, MergedLoRALinear)
        if isinstance(module, MergedLoRALinear) or (hasattr(module, "lora_a") and not is_part):
            yield name, module


def _layer(name: str, module: Any) -> LoralibLayer:
    if not isinstance(module, MergedLoRALinear):
        kind = "Embedding" if isinstance(module, nn.Embedding) else "Linear"
        return LoralibLayer(kind, module.rank, _alpha(module))
    parts = {part: getattr(module, part) for part in module.adapters}
    if len({(part.rank, part.scaling) for part in parts.values()}) > 1:
        raise AdapterError(
            f"{name}: its parts have ranks or scales that differ, but a MergedLinear of loralib "
            "has one. Convert the adapter with --to peft."
        )
    size, start, groups = gcd(*module.rows.values()), 0, {}
    for part, rows in module.rows.items():
        groups[part] = range(start, start + rows // size)
        start += rows // size
    enabled = tuple(part in parts for part, group in groups.items() for _ in group)
    first = parts[module.adapters[0]]
    adapted = {part: groups[part] for part in parts}
    return LoralibLayer("MergedLinear", first.rank, _alpha(first), enabled, adapted)


def _alpha(module: Any) -> float:
    """Return the alpha with which loralib, which divides by r, has the scale of the module."""
    alpha = float(module.scaling * module.rank)
    return int(alpha) if alpha.is_integer() else alpha


def _factors(module: Any) -> tuple[Tensor, Tensor]:
    return module.lora_a.weight.detach(), module.lora_b.weight.detach()


def _hf_name(module: str) -> str:
    """Return Hugging Face's name of one of our modules."""
    if module in ALIASES:
        return {HEAD: HEAD, EMBEDDING: f"model.{EMBEDDING}"}[ALIASES[module]]
    return f"model.{module.replace('.attn.', '.self_attn.')}"
