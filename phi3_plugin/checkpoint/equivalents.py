"""Adapters that are a plain LoRA in another form, as the LoRA that computes the same.

AdaLoRA computes ``alpha / r0 B diag(E) A``: E goes into A. PiSSA and OLoRA compute over what their
start leaves of the base, ``W - s B0 A0 + s B A``: B0 and A0, which PEFT takes from the base anew
whenever it loads such an adapter, become as many ranks more.

Source: PEFT 0.21.2, tuners/adalora/{layer,model}.py, tuners/lora/layer.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi3_plugin.checkpoint.adapter import Adapter, Origin
from phi3_plugin.checkpoint.base import (
    OUTPUT,
    TOK_EMBEDDINGS,
    A,
    B,
    fused_name,
    open_weights,
    part_rows,
)
from phi3_plugin.checkpoint.files import quoted
from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import AdapterError
from phi3_plugin.options import is_number, is_whole

# Shapes: R rank

ADALORA = "ADALORA"
RANKNUM = 1e-5
"""What PEFT adds to the rank by which it divides."""

E_ENDING = ".lora_E"

ADALORA_KEYS = (
    *("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step"),
    "orth_reg_weight",
)
LARGEST_RANK = 1_000_000
"""Beyond any rank."""
NOT_ADALORA = ("use_dora", "use_rslora", "init_lora_weights")


def adalora_tensors(
    tensors: Mapping[str, Tensor], keys: Mapping[str, Any], file: Path
) -> dict[str, Tensor]:
    """Return the tensors of an AdaLoRA as those of a LoRA, in PEFT's names and in fp32.

    Modules of which no rank is left are left out.

    Args:
        tensors: ``lora_A [R, in]``, ``lora_B [out, R]`` and ``lora_E [R, 1]``, and others.
        keys: Of adapter_config.json.
        file: For errors.

    Raises:
        AdapterError: One of the three is missing, or they do not multiply.
    """
    first = first_rank(keys, file)
    found = {n: v for n, v in tensors.items() if not n.endswith((".lora_A", ".lora_B", E_ENDING))}
    for module in dict.fromkeys(n.rpartition(".")[0] for n in tensors.keys() - found.keys()):
        a, b, e = (tensors.get(f"{module}.lora_{letter}") for letter in "ABE")
        if a is None or b is None or e is None:
            raise AdapterError(f"{file}: {module} has not all of lora_A, lora_B and lora_E.")
        if not a.ndim == b.ndim == e.ndim == 2 or e.shape != (len(a), 1) or b.shape[1] != len(a):
            shapes = f"A {[*a.shape]}, B {[*b.shape]} and E {[*e.shape]}"
            raise AdapterError(f"{file}: {module}: {shapes} do not multiply.")
        if len(a):
            rows = a.double() * e.double() * (first / (first + RANKNUM))
            found[f"{module}.lora_A.weight"] = rows.float()
            found[f"{module}.lora_B.weight"] = b.float()
    return found


def adalora_keys(keys: Mapping[str, Any], ranks: Mapping[str, int], file: Path) -> dict[str, Any]:
    """Return what adapter_config.json of an AdaLoRA would say for a LoRA.

    PEFT passes over what else a LoRA may say: alpha patterns, DoRA, rsLoRA and starts.

    Args:
        keys: What it says.
        ranks: That are left of each module, by Hugging Face's names.
        file: For errors.

    Raises:
        AdapterError: It does not say its first rank, or says that other ranks are left.
    """
    first, said = first_rank(keys, file), keys.get("rank_pattern") or {}
    if not isinstance(said, dict):
        raise AdapterError(f"{file}: rank_pattern: must be an object of modules.")
    for name, left in said.items():
        module = name.removesuffix(".default").removesuffix(E_ENDING)
        if not isinstance(left, list) or sum(map(bool, left)) != ranks.get(module, 0):
            raise AdapterError(
                f"{file}: rank_pattern: {quoted(name)} leaves other ranks than the file holds."
            )
    kept = {key: value for key, value in keys.items() if key not in {*ADALORA_KEYS, *NOT_ADALORA}}
    left = {module: rank for module, rank in ranks.items() if rank != first}
    alpha = keys.get("lora_alpha")
    # The scale stays that of the first rank; an alpha that is none is told later
    alphas = {m: alpha * rank / first for m, rank in left.items()} if is_number(alpha) else {}
    own = {"r": first, "rank_pattern": left, "alpha_pattern": alphas}
    return {**kept, "peft_type": "LORA", **own}


def first_rank(keys: Mapping[str, Any], file: Path) -> int:
    """Return the rank of an AdaLoRA before any was taken away: PEFT divides alpha by it.

    Raises:
        AdapterError: It is no rank.
    """
    first = keys.get("init_r", 12)
    if not is_whole(first, least=1) or first > LARGEST_RANK:
        raise AdapterError(f"{file}: init_r: {quoted(first)} must be a whole number above 0.")
    return int(first)


STARTS = ("pissa", "olora")
"""Starting points that change the base, as PEFT does once more when it loads the adapter."""


def first_factors(
    adapter: Adapter, start: str, base: Path, config: Phi3Config
) -> dict[str, Tensor]:
    """Return the A0 ``[R, in]`` and B0 ``[out, R]`` that a start took off the base, in fp32.

    Args:
        adapter: Over what the start left of the base.
        start: One of `STARTS`.
        base: Folder of the base model.
        config: Of it.

    Returns:
        By the names of the adapter's own; PEFT gives an embedding the usual start.

    Raises:
        AdapterError: The start changed what two layers share.
    """
    if config.tie_word_embeddings and OUTPUT in adapter.ranks:
        raise AdapterError(
            f"init_lora_weights: {start!r} of lm_head changes the embedding too, which this base "
            "shares. PEFT alone computes that."
        )
    weights, first = open_weights(base), dict[str, Tensor]()
    for module in [name for name in adapter.ranks if name != TOK_EMBEDDINGS]:
        whole = fused_name(module)
        weight = weights[f"{whole}.weight"][part_rows(whole, config).get(module, slice(None))]
        rank = adapter.ranks[module]
        if start == "pissa":
            a, b = nearest(weight.double() / adapter.scales[module], rank)
        else:
            q, r = torch.linalg.qr(weight.float())
            a, b = r[:rank], q[:, :rank]
        first |= {module + A: a.float(), module + B: b.float()}
    return first


def over_base(adapter: Adapter, first: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter of twice the rank that computes over the base as it is, in fp32.

    Args:
        adapter: Over what its start left of the base.
        first: What the start took.
    """
    exact = {name: value.float() for name, value in adapter.tensors.items()}
    return replace(adapter, tensors=for_original_base(exact, first), origin=Origin())


def nearest(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A ``[R, in]`` and B ``[out, R]`` whose product B A is nearest to a weight.

    B has the left singular vectors and A the right ones, each times the root of the value. They
    come from the smaller Gram matrix: in fp64 that loses nothing that fp32 can hold, takes a
    fraction of the time, and gives all processes the same.

    Args:
        weight: ``[out, in]`` in fp64.
        rank: R.

    Raises:
        AdapterError: The weight has no so many singular values.
    """
    if rank > min(weight.shape):
        raise AdapterError(
            f"lora_rank: {rank} is more than a weight of {' x '.join(map(str, weight.shape))} "
            "has singular values. Use a smaller one, or lora_init: kaiming."
        )
    is_tall = weight.shape[0] >= weight.shape[1]
    tall = weight if is_tall else weight.T
    right = torch.linalg.eigh(tall.T @ tall).eigenvectors[:, -rank:].flip(1)
    # A vector and its negative serve alike: let the largest element be positive.
    largest = right.gather(0, right.abs().argmax(0, keepdim=True))
    right = right * torch.where(largest < 0, -1.0, 1.0)
    left = tall @ right
    root = left.norm(dim=0).clamp_min(torch.finfo(weight.dtype).tiny).sqrt()
    left, right = left / root, right * root
    if is_tall:
        return right.T.contiguous(), left.contiguous()
    return left.T.contiguous(), right.contiguous()


def for_original_base(
    adapter: Mapping[str, Tensor], first: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the adapter of twice the rank that computes the same over the original weights.

    ``W - s B0 A0 + s B A`` is W and an adapter ``[B, B0] [A; -A0]`` of the same scale.

    Args:
        adapter: By parameter name, over what the start left of the weights.
        first: A0 and B0, by the same names.
    """
    joined = dict(adapter)
    for name, value in first.items():
        own = adapter[name]
        start = value.to(own.dtype)
        joined[name] = torch.cat([own, -start]) if name.endswith(A) else torch.cat([own, start], 1)
    return joined
