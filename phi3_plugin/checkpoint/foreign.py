"""Read an adapter from whatever program wrote it: PEFT, torchtune, loralib, or this one."""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from phi3_plugin.checkpoint.adapter import MAGNITUDE, A, Adapter
from phi3_plugin.checkpoint.foreign_tensors import (
    Sorted,
    check_copies,
    check_tensors,
    sort_out,
)
from phi3_plugin.checkpoint.loralib_file import loralib_tensors
from phi3_plugin.checkpoint.loralib_groups import EnableLora, ungrouped
from phi3_plugin.checkpoint.modules import aliases, hf_name
from phi3_plugin.checkpoint.peft import CONFIG, ORIGIN, WEIGHTS
from phi3_plugin.checkpoint.peft_settings import (
    PeftSettings,
    is_alpha,
    read_object,
    read_settings,
)
from phi3_plugin.checkpoint.served import PATTERNS, served
from phi3_plugin.checkpoint.tensor_file import read_tensors, shown
from phi3_plugin.checkpoint.torchtune_file import torchtune_tensors
from phi3_plugin.checkpoint.written import as_written
from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import AdapterError, MissingFileError

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
