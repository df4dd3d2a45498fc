"""Read an adapter from whatever program wrote it: PEFT, torchtune, loralib, or this one."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from phi3_plugin.checkpoint.adapter import (
    BASE_HASH,
    MAGNITUDE,
    MODULES,
    PATTERNS,
    ROUNDED,
    A,
    Adapter,
    B,
    original,
    served,
)
from phi3_plugin.checkpoint.base import (
    aliases,
    fused_name,
    hf_name,
    module_sizes,
    open_weights,
    unwrapped,
)
from phi3_plugin.checkpoint.files import read_tensors, shown
from phi3_plugin.checkpoint.loralib import EnableLora, loralib_tensors, ungrouped
from phi3_plugin.checkpoint.peft import (
    CONFIG,
    ORIGIN,
    WEIGHTS,
    PeftSettings,
    is_alpha,
    read_object,
    read_settings,
)
from phi3_plugin.checkpoint.torchtune import torchtune_tensors
from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import AdapterError, CheckpointError, MissingFileError

# Whether a file is still what its note says, so that its original can be given back.

NOT_KEPT = (MODULES, ROUNDED, PATTERNS, BASE_HASH)
"""What of a note is not the adapter's origin, but how the file was written and for what."""

Write = Callable[[Adapter], Adapter]
"""Gives what the file would hold for an adapter."""


def as_written(found: Adapter, note: object, config: Phi3Config, write: Write) -> Adapter:
    """Return the adapter that a file was made of, or what it holds if it was changed since.

    A note is believed only if writing the adapter that it describes would give the very tensors
    and scales that were found.

    Args:
        found: What the file holds, checked.
        note: What it says of its original, if anything.
        config: Sizes of the model.
        write: How its kind of file is written.
    """
    found = replace(found, base_hash=_base_hash(note))
    if (ours := _checked(note, config)) is None:
        return found
    try:
        tensors, scales = original(found.tensors, ours, config)
        kept = {k: v for k, v in ours.items() if k not in NOT_KEPT}
        adapter = replace(found, tensors=tensors, scales=scales, origin=kept)
        again = write(adapter)
    except (AdapterError, CheckpointError, ArithmeticError, RuntimeError):
        return found
    return adapter if _same(again, found) else found


def _checked(note: object, config: Phi3Config) -> dict[str, Any] | None:
    """Return a note with our names of modules, or None if it is none."""
    if not isinstance(note, dict) or not isinstance(note.get(MODULES), dict):
        return None
    known, rounded = aliases(config), note.get(ROUNDED, {})
    values = note[MODULES].values()
    if not all(
        isinstance(v, list) and len(v) in (2, 3) and all(map(_is_number, v)) for v in values
    ):
        return None
    texts = isinstance(rounded, dict) and all(isinstance(text, str) for text in rounded.values())
    if not texts or not (rounded.keys() | note[MODULES].keys()) <= known.keys():
        return None
    modules = {known[name]: value for name, value in note[MODULES].items()}
    return {**note, MODULES: modules, ROUNDED: {known[n]: text for n, text in rounded.items()}}


def _base_hash(note: object) -> str:
    """Return what a note says of the base; it holds for a file whose numbers were changed too."""
    said = note.get(BASE_HASH) if isinstance(note, dict) else None
    return said if isinstance(said, str) else ""


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 < value < 1e30  # type: ignore[arg-type, operator]


def _same(one: Adapter, other: Adapter) -> bool:
    return one.scales == other.scales and _equal(one.tensors, other.tensors)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name])
        for name, value in one.items()
    )


# Sort the tensors of an adapter file, whoever wrote it, under our names, and check each.

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


FILES = (WEIGHTS, "adapter_model.pt", "adapter_model.bin")
"""What is looked for in a folder, the first that is there."""


def read_adapter(
    path: Path,
    *,
    config: Phi3Config,
    base: Path | None = None,
    alpha: float | None = None,
    enable_lora: EnableLora | None = None,
    rank: int | None = None,
) -> Adapter:
    """Return the adapter of a folder or file, as it computes.

    Parts of fused layers stay parts, and ranks and scales of modules may differ. A file that this
    package wrote gives what was saved, bit for bit, unless it was changed since.

    Args:
        path: A folder of PEFT or torchtune; or a .safetensors, .pt or .bin file of theirs, or of
            loralib's ``lora_state_dict``.
        config: Of the base model.
        base: Its folder. With it, what the file repeats of the base's weights is compared.
        alpha: What the file does not say: loralib's never do, nor do torchtune's of Phi-3. The
            scale is alpha / rank.
        enable_lora: For loralib's MergedLinear: which of its equal groups of rows have an adapter;
            of qkv_proj, or by the last word of a module's name.
        rank: Makes sure that every module has it.

    Raises:
        AdapterError: The file is broken, is not for this base, needs what we do not compute, or
            its scale is not known.
        MissingFileError: There is no adapter.
    """
    file = _file_of(Path(path))
    tensors, metadata = read_tensors(file)
    _refuse_merged(tensors, file)
    found = sort_out(tensors, config, file)
    check_copies(found.copies, config, base, file)
    if found.kind == "loralib":
        adapter = _of_loralib(found, file, metadata, alpha, enable_lora, config)
    elif enable_lora is not None:
        raise AdapterError(f"enable_lora: is for files of loralib, but {file} is {found.kind}'s.")
    else:
        adapter = _of_peft(found, file, metadata, alpha, config)
    if wrong := [m for m, r in adapter.ranks.items() if rank not in (None, r)]:
        raise AdapterError(f"rank: {rank}, but {wrong[0]} of {file} has {adapter.ranks[wrong[0]]}.")
    return adapter


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise MissingFileError(f"{path} has none of {', '.join(FILES)}: it is not an adapter folder.")


def _refuse_merged(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Refuse what a loralib model's ``state_dict`` gives instead of ``lora_state_dict``.

    Whether its weights are merged cannot be told without the base, so any base weight counts.
    """
    base = [n for n in tensors if n.endswith((".weight", ".bias"))]
    if base and any(name.endswith(".lora_A") for name in tensors):
        raise AdapterError(
            f"{file} holds {len(base)} weights of the base, first {base[0][:120]!r}. loralib's "
            "eval() adds the adapter to them in place, and the file does not say whether it did: "
            "the adapter might count twice. Save loralib.lora_state_dict(model, bias='none')."
        )


def _of_peft(
    found: Sorted,
    file: Path,
    metadata: Mapping[str, str],
    alpha: float | None,
    config: Phi3Config,
) -> Adapter:
    """Return the adapter of a file of PEFT's or torchtune's."""
    check_tensors(found.tensors, found.saved, config, file)
    beside = file.with_name(CONFIG)
    settings = read_settings(beside) if beside.is_file() else None
    ranks = {n.removesuffix(A): v.shape[0] for n, v in found.tensors.items() if n.endswith(A)}
    if settings is None:
        return Adapter(found.tensors, _scales(ranks, alpha, file), found.saved)
    if alpha is not None and alpha != settings.alpha:
        raise AdapterError(f"alpha: {alpha}, but {beside} says {settings.alpha}. Leave it out.")
    adapter = Adapter(
        found.tensors,
        {module: settings.scale(hf_name(module), rank) for module, rank in ranks.items()},
        found.saved,
        settings.dropout,
        settings.base,
        {"rslora": True} if settings.rslora else {},
    )
    _check_dora(adapter, settings, found.kind)
    if found.kind == "torchtune":
        return as_written(adapter, settings.note, config, partial(_torchtune, config=config))
    note = _parsed(metadata.get(ORIGIN, "{}"))
    patterns = isinstance(note, dict) and bool(note.get(PATTERNS))
    write = partial(_peft, config=config, found=adapter, patterns=patterns)
    return as_written(adapter, note, config, write)


def _check_dora(adapter: Adapter, settings: PeftSettings, kind: str) -> None:
    have = {m + MAGNITUDE in adapter.tensors for m in adapter.ranks}
    if len(have) > 1 or (kind == "peft" and have != {settings.dora}):
        raise AdapterError(
            f"{settings.file}: use_dora is {settings.dora}, but "
            f"{'some' if len(have) > 1 else 'all' if True in have else 'no'} modules have "
            "magnitudes. PEFT would compute something else than was trained: save it again."
        )


def _of_loralib(
    found: Sorted,
    file: Path,
    metadata: Mapping[str, str],
    alpha: float | None,
    enable_lora: EnableLora | None,
    config: Phi3Config,
) -> Adapter:
    beside = file.with_suffix(".json")
    about = _parsed(metadata.get(ORIGIN, "{}"))
    if not about and file.suffix == ".pt" and beside.is_file():
        about = read_object(beside)
    about = about if isinstance(about, dict) else {}
    given = about.get("alpha") if alpha is None else alpha
    enabled = about.get("enable_lora") if enable_lora is None else enable_lora
    _need(given, file)
    tensors, divisors = ungrouped(found.tensors, enabled, config)
    check_tensors(tensors, found.saved, config, file)
    adapter = Adapter(tensors, _scales(divisors, given, file, aliases(config)))
    write = partial(_loralib, config=config, merged_linear=bool(about.get("merged_linear")))
    written = as_written(adapter, about.get(ORIGIN), config, write)
    return written if alpha is None and enable_lora is None else adapter


def _scales(
    ranks: Mapping[str, int], alpha: Any, file: Path, known: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Return alpha / rank of every module; alpha may be given for each, by any of its names."""
    _need(alpha, file)
    named = alpha if isinstance(alpha, dict) else {}
    each = {(known or {}).get(name, name): value for name, value in named.items()}
    alphas: dict[str, Any] = dict.fromkeys(ranks, alpha)
    if named:
        alphas = {m: each.get(m, each.get(m.rpartition(".")[0])) for m in ranks}
    for module, value in alphas.items():
        if not is_alpha(value):
            raise AdapterError(f"alpha: {shown(value)} for {module} must be a number above 0.")
    return {module: alphas[module] / rank for module, rank in ranks.items()}


def _need(alpha: object, file: Path) -> None:
    if alpha is None:
        raise AdapterError(
            f"{file} does not say its alpha, and there is no {CONFIG} beside it. Give the alpha it "
            "was trained with; loralib's own default is 1."
        )


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {}


def _peft(adapter: Adapter, config: Phi3Config, found: Adapter, patterns: bool) -> Adapter:
    """Return what a file of PEFT's would hold."""
    # Rows of parts without an adapter have the base's norms, which only the file knows.
    norms = partial(_magnitude, found)
    held = served(adapter, config, norms, patterns=patterns)
    divisors = {m: math.sqrt(r) if held.rslora else r for m, r in held.ranks.items()}
    return Adapter(held.tensors, {m: a / divisors[m] for m, a in held.alphas.items()})


def _magnitude(found: Adapter, module: str) -> Tensor:
    return found.tensors[module + MAGNITUDE].clone()


def _torchtune(adapter: Adapter, config: Phi3Config) -> Adapter:
    held, rank, alpha, _ = torchtune_tensors(adapter, config)
    return Adapter.of(held, alpha / rank)


def _loralib(adapter: Adapter, config: Phi3Config, merged_linear: bool) -> Adapter:
    held, alphas, enabled, _ = loralib_tensors(adapter, config, merged_linear=merged_linear)
    tensors, divisors = ungrouped(held, enabled, config)
    scales = {}
    for module, rank in divisors.items():
        whole = module if module in alphas else module.rpartition(".")[0]
        scales[module] = alphas[whole] / rank
    return Adapter(tensors, scales)
