"""Sort the tensors of an adapter file, whoever wrote it, under our names, and check each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from phi3_plugin.checkpoint.adapter import MAGNITUDE, A, B
from phi3_plugin.checkpoint.hf import open_weights
from phi3_plugin.checkpoint.modules import aliases, module_sizes, unwrapped
from phi3_plugin.checkpoint.split import fused_name
from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import AdapterError

Kind = Literal["peft", "torchtune", "loralib"]

ENDINGS: dict[str, tuple[Kind, str]] = {
    ".lora_A.weight": ("peft", A),
    ".lora_B.weight": ("peft", B),
    ".lora_magnitude_vector": ("peft", MAGNITUDE),
    ".lora_magnitude_vector.weight": ("peft", MAGNITUDE),
    ".lora_embedding_A": ("peft", A),
    ".lora_embedding_B": ("peft", B),
    ".lora_a.weight": ("torchtune", A),
    ".lora_b.weight": ("torchtune", B),
    ".magnitude": ("torchtune", MAGNITUDE),
    ".lora_A": ("loralib", A),
    ".lora_B": ("loralib", B),
}
"""How names end, in which program's files, and with us."""

WHOLE, COPY = ".weight", ".base_layer.weight"
"""Of a module that is trained whole; and of the copy of the base that PEFT puts beside adapters on
embedding and head."""

WHOLES = ("tok_embeddings", "output")
LISTED = 8
ROWS = 4096
"""Of the base, read at a time."""

# Shapes: R rank


@dataclass(frozen=True)
class Sorted:
    """Tensors under our names, not checked yet."""

    kind: Kind
    tensors: dict[str, Tensor]
    saved: dict[str, Tensor]
    copies: dict[str, Tensor]
    """Of the base's weights, beside adapters on them."""


def sort_out(tensors: Mapping[str, Tensor], config: Phi3Config, source: object) -> Sorted:
    """Give every tensor its name.

    Args:
        tensors: Names as they are in the file.
        config: Of the base model.
        source: How errors call the file.

    Raises:
        AdapterError: Names are not those of an adapter of this base, or one stands for another.
    """
    known, kinds, problems = aliases(config), set[Kind](), list[str]()
    low, saved, copies = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for name, value in tensors.items():
        module, ending = _split(_plain(name), known)
        into = {COPY: copies, WHOLE: saved}.get(ending, low)
        if not module or (into is copies and module not in WHOLES):
            problems.append(f"{name[:120]!r} is no part of an adapter of this base")
            continue
        kind, own = ENDINGS.get(ending, (None, WHOLE))
        kinds |= {kind} if kind else set()
        problems += [f"{name!r}: {module + own} is there twice"] * (module + own in into)
        into[module + own] = value
    _stop(problems, source)
    if len(kinds) != 1:
        said = f"names of {' and '.join(sorted(kinds))}" if kinds else "no low-rank adapter"
        raise AdapterError(f"{source} has {said}, expected those of one program.")
    return Sorted(kinds.pop(), low, saved, copies)


def _split(plain: str, known: Mapping[str, str]) -> tuple[str, str]:
    """Return our name of a tensor's module, or nothing, and how its name ends."""
    for ending in sorted((*ENDINGS, COPY, WHOLE), key=len, reverse=True):
        if plain.endswith(ending):
            return known.get(plain.removesuffix(ending), ""), ending
    return "", ""


def _plain(name: str) -> str:
    """Return a name without wrappers and without PEFT's name of the adapter."""
    plain = unwrapped(name)
    for written in (".modules_to_save.default", ".modules_to_save", ".default"):
        if plain.endswith((written, f"{written}.weight")):
            head, _, tail = plain.rpartition(written)
            return head + tail
    return plain


def check_tensors(
    tensors: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
    config: Phi3Config,
    source: object,
) -> None:
    """Check that tensors make an adapter of the base.

    Args:
        tensors: Our names; ``lora_a [R, in]``, ``lora_b [out, R]``, ``magnitude [out]``.
        saved: Weights trained whole.
        config: Of the base model.
        source: How errors call the file.

    Raises:
        AdapterError: Halves of pairs are missing, shapes are wrong, modules are adapted twice, or
            there are numbers that are none; the first few are listed.
    """
    sizes, problems = module_sizes(config), list[str]()
    modules = dict.fromkeys(_module(name) for name in tensors)
    for module in modules:
        problems += _misfits(module, tensors, sizes[module])
    wholes = {name.removesuffix(WHOLE): value for name, value in saved.items()}
    for module, value in wholes.items():
        size = sizes[module] if module == "output" else sizes[module][::-1]
        if module not in WHOLES:
            problems.append(f"{module}: base weights; only {' and '.join(WHOLES)} are read whole")
        elif tuple(value.shape) != size:
            problems.append(f"{module}: its weight is {list(value.shape)}, expected {list(size)}")
    twice = [m for m in modules if m in wholes or (fused_name(m) != m and fused_name(m) in modules)]
    problems += [f"{module}: adapted twice, also in {fused_name(module)}" for module in twice]
    problems += [
        f"{name}: holds NaN or infinite numbers"
        for name, value in {**tensors, **saved}.items()
        if not problems and not torch.isfinite(value).all()
    ]
    _stop(problems, source)


def check_copies(
    copies: Mapping[str, Tensor], config: Phi3Config, base: Path | None, source: object
) -> None:
    """Check that what a file repeats of the base is the base's.

    PEFT loads it in the base's place, as after new tokens were trained into an embedding, and
    then the adapter is for that. Rounded to another dtype it still counts as the same.

    Args:
        copies: Our names.
        config: Of the base model.
        base: Its folder; without one, only shapes are compared.
        source: How errors call the file.

    Raises:
        AdapterError: It is not.
    """
    sizes = {"tok_embeddings.weight": (config.vocab_size, config.hidden_size)}
    sizes["output.weight"] = sizes["tok_embeddings.weight"]
    wrong = [n for n, value in copies.items() if tuple(value.shape) != sizes[n]]
    if copies and base is not None and not wrong:
        weights = open_weights(base)
        for name, value in copies.items():
            own = weights.get(name, weights["tok_embeddings.weight"])  # a tied head has none
            for start in range(0, own.shape[0], ROWS):
                one, other = (t[start : start + ROWS].float() for t in (value, own))
                if not torch.allclose(one, other, rtol=1e-2, atol=1e-6):
                    wrong.append(name)
                    break
    if wrong:
        raise AdapterError(
            f"{source} holds a copy of {', '.join(wrong)} that differs from the base's, and its "
            "adapter is for that one. Give the base that it was trained on; or merge it with "
            "PEFT, which loads the copy."
        )


def _misfits(module: str, tensors: Mapping[str, Tensor], size: tuple[int, int]) -> Iterable[str]:
    a, b, magnitude = (tensors.get(module + ending) for ending in (A, B, MAGNITUDE))
    if a is None or b is None:
        yield f"{module}: has no {'B' if b is None else 'A'}"
        return
    out, into = size
    rank = a.shape[0] if a.ndim == 2 else 0
    if not rank or a.shape != (rank, into) or b.shape != (out, rank):
        yield (
            f"{module}: A is {list(a.shape)} and B {list(b.shape)}, expected [R, {into}] and "
            f"[{out}, R]"
        )
    if magnitude is not None and magnitude.shape != (out,):
        yield f"{module}: its magnitude is {list(magnitude.shape)}, expected [{out}]"
    if magnitude is not None and module == "tok_embeddings":
        yield f"{module}: DoRA on an embedding is not computed here"


def _module(name: str) -> str:
    return next(name.removesuffix(e) for e in (A, B, MAGNITUDE) if name.endswith(e))


def _stop(problems: list[str], source: object) -> None:
    if problems:
        more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        listed = "\n  ".join(problems[:LISTED])
        raise AdapterError(
            f"{source} is not an adapter of this base:\n  {listed}{more}\n"
            "Give the base that it was trained on, or a file that is whole."
        )
