"""Adapters of mlx-lm, which computes on Apple's GPUs: the folder that it loads, read and written.

Its Phi-3 has Hugging Face's fused layers, so names are the same; A and B lie the other way round::

    adapters.safetensors   model.layers.3.self_attn.qkv_proj.lora_a [in, R], .lora_b [R, out],
                           and .m [out], the magnitude of DoRA
                           model.embed_tokens.lora_a [V, R], .lora_b [R, D]
    adapter_config.json    fine_tune_type: lora, dora or full
                           num_layers: how many of the last layers have an adapter
                           lora_parameters: rank, scale, dropout, and the keys of the modules

All modules have one rank and one scale, which may be any number and is what B A is multiplied with,
not alpha. A head that is tied to the embedding gets the embedding's adapter too.

Source: mlx-lm 0.32.0, tuner/utils.py, tuner/lora.py, tuner/dora.py and models/phi3.py.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi3_plugin.checkpoint.adapter import (
    Adapter,
    FileContent,
    alpha_of,
    check_writable_adapter,
    fuse,
    fused_ranks,
    is_shift,
    level_scales,
    pad,
    split_ending,
)
from phi3_plugin.checkpoint.base import (
    MAGNITUDE,
    OUTPUT,
    TOK_EMBEDDINGS,
    A,
    B,
    hf_name,
    known_hash,
    module_sizes,
    stored_row_norms,
)
from phi3_plugin.checkpoint.files import quoted, save_tensors
from phi3_plugin.checkpoint.peft import CONFIG, NOTE, base_name, parsed_object
from phi3_plugin.checkpoint.peft_config import VALUES, is_alpha, problem_list
from phi3_plugin.config import Phi3Config, read_config, read_json_object
from phi3_plugin.errors import AdapterError
from phi3_plugin.options import Kind

MLX_WEIGHTS = "adapters.safetensors"

MLX_ENDINGS = {A: ".lora_a", B: ".lora_b", MAGNITUDE: ".m"}

# Shapes: R rank, D width of the model, V vocabulary


@dataclass(frozen=True)
class MlxContent(FileContent):
    """What a folder of mlx-lm holds; its one scale is said as it is, and need be no alpha / R."""

    scale: float = 1.0

    @property
    def scales(self) -> dict[str, float]:
        """What B A is multiplied with, by module."""
        return dict.fromkeys(self.ranks, self.scale)


def mlx_content(
    adapter: Adapter, config: Phi3Config, row_norms: Callable[[str], Tensor]
) -> MlxContent:
    """Make parts whole, and give all modules one rank and one scale.

    The scale is that of most modules, which are then written as they are.

    Args:
        adapter: What to write.
        config: Sizes of the model.
        row_norms: See :func:`fuse`.

    Raises:
        AdapterError: It is empty, or no file can hold it.
    """
    check_writable_adapter(adapter)
    ranks, counts = fused_ranks(adapter), Counter(adapter.scales.values())
    exact = {s: sum(n for other, n in counts.items() if is_shift(other, s)) for s in counts}
    rank, scale = max(ranks.values()), max(counts, key=lambda s: (exact[s], s))
    scaled, note = level_scales(adapter, dict.fromkeys(ranks, scale))
    tensors = pad(fuse(scaled, config, row_norms), rank)
    alphas = dict.fromkeys(ranks, alpha_of(scale, rank))
    return MlxContent(tensors, dict.fromkeys(ranks, rank), alphas, note, scale=scale)


def write_mlx(folder: Path, adapter: Adapter, checkpoint_dir: Path) -> None:
    """Write an adapter for mlx-lm into a folder.

    Args:
        folder: An existing folder.
        adapter: Our names; parts are made whole.
        checkpoint_dir: The base it is for.

    Raises:
        AdapterError: mlx-lm cannot compute it, or no file can hold it.
    """
    config = read_config(checkpoint_dir)
    adapter = replace(adapter, base_hash=adapter.base_hash or known_hash(checkpoint_dir))
    content = mlx_content(adapter, config, partial(stored_row_norms, checkpoint_dir))
    tensors = dict(content.tensors)
    if problems := list(_unfit(adapter, tensors, config)):
        raise AdapterError("mlx-lm cannot use this adapter:\n" + problem_list(problems, 8))
    if config.tie_word_embeddings:
        tensors = {name: t for name, t in tensors.items() if split_ending(name)[0] != OUTPUT}
    modules = {split_ending(name)[0] for name in tensors}
    layers, keys = _placed(map(hf_name, modules), config.num_hidden_layers)
    settings = {
        "fine_tune_type": "dora" if adapter.is_dora else "lora",
        "model": base_name(checkpoint_dir),
        "num_layers": layers,
        "lora_parameters": {
            "rank": max(content.ranks.values()),
            "scale": content.scale,
            "dropout": float(adapter.dropout),
            "keys": keys,
        },
    }
    text = json.dumps(settings, indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    theirs = {}
    for name, value in tensors.items():
        module, ending = split_ending(name)
        theirs[hf_name(module) + MLX_ENDINGS[ending]] = _turned(value)
    save_tensors(folder / MLX_WEIGHTS, theirs, {NOTE: json.dumps(content.note)})


def _turned(value: Tensor) -> Tensor:
    """Exchange the two sides of a matrix; a magnitude stays."""
    return value.T if value.ndim == 2 else value


def _unfit(adapter: Adapter, tensors: Mapping[str, Tensor], config: Phi3Config) -> Iterator[str]:
    """Yield what mlx-lm cannot compute, and what to do instead."""
    merge = "Merge it into the base: mlx-lm loads what `phi3-tune adapter merge` writes"
    if whole := {**adapter.saved, **adapter.rows}:
        yield f"{', '.join(sorted(whole))}: it replaces no whole weights or rows. {merge}."
    tied = {TOK_EMBEDDINGS, OUTPUT} & adapter.ranks.keys()
    if not config.tie_word_embeddings or not tied:
        return
    head = _of_tied_head(tensors) if TOK_EMBEDDINGS in tied else {}
    alike = OUTPUT in tied and all(torch.equal(tensors[name], t) for name, t in head.items())
    if not (head and alike):
        yield (
            f"{', '.join(sorted(tied))}: in this base one tensor is embedding and head, and it "
            f"would change both alike. {merge}."
        )


def _of_tied_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter that a tied head has: the change of the embedding's rows, ``[V, D]``."""
    a, b = (tensors[TOK_EMBEDDINGS + ending] for ending in (A, B))
    return {OUTPUT + A: b.T.contiguous(), OUTPUT + B: a.T.contiguous()}


def _placed(modules: Iterable[str], layers: int) -> tuple[int, list[str]]:
    """Return by what mlx-lm finds these modules and no others: num_layers, and the keys.

    A key is the name of a module within each of the last ``num_layers`` layers, or its whole name.

    Args:
        modules: Hugging Face's names.
        layers: How many the model has.
    """
    within, others = defaultdict(set), set()
    for module in modules:
        _, found, inner = module.partition("model.layers.")
        if found:
            number, _, name = inner.partition(".")
            within[int(number)].add(name)
        else:
            others.add(module)
    first = min(within, default=0)
    same = within[first]
    if all(within[number] == same for number in range(first, layers)):
        return layers - first, sorted(same | others)
    names = {f"model.layers.{n}.{name}" for n, inside in within.items() for name in inside}
    return layers, sorted(names | others)


def mlx_differs(checkpoint_dir: Path) -> Iterator[str]:
    """Yield where mlx-lm computes something else with this base than was trained, a line each."""
    config, keys = read_config(checkpoint_dir), read_json_object(checkpoint_dir / "config.json")
    scaling = config.rope.scaling
    if keys.get("rope_parameters"):
        yield (
            "mlx-lm 0.32 does not read rope_parameters, as transformers 5 writes them: give its "
            "config.json the base's own rope_theta, rope_scaling and partial_rotary_factor."
        )
    if scaling:
        yield (
            "mlx-lm turns by LongRoPE's long factors whatever the length: up to "
            f"{scaling.original_max_position_embeddings} tokens it answers as trained only if "
            "that was with model.rope_factors=long."
        )
    if config.sliding_window and config.sliding_window < config.max_position_embeddings:
        yield (
            "mlx-lm has no sliding window: beyond "
            f"{config.sliding_window} tokens it attends to more than training did."
        )


# Reading


def is_mlx(config_file: Path) -> bool:
    """Whether an adapter_config.json is one of mlx-lm.

    Raises:
        AdapterError: It is no JSON object.
    """
    if not config_file.is_file():
        return False
    keys = read_json_object(config_file, AdapterError)
    return "peft_type" not in keys and ("lora_parameters" in keys or "fine_tune_type" in keys)


def of_mlx(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    config_file: Path,
    alpha: float | None,
    config: Phi3Config,
) -> tuple[Adapter, object, Callable[[Adapter], FileContent]]:
    """Return what a folder of mlx-lm holds, its note, and how it is written.

    Args:
        tensors: Of the file, under mlx-lm's names.
        metadata: Of the file.
        config_file: The adapter_config.json beside it.
        alpha: What the configuration does not say: the scale is alpha / rank.
        config: Of the base model.

    Raises:
        AdapterError: The configuration does not say how the adapter computes, or names are not
            those of an adapter of this base. Shapes are not looked at.
    """
    keys = read_json_object(config_file, AdapterError)
    parameters = keys.get("lora_parameters")
    if keys.get("fine_tune_type", "lora") == "full" or not isinstance(parameters, dict):
        raise AdapterError(
            f"{config_file}: fine_tune_type {quoted(keys.get('fine_tune_type'))} holds whole "
            "weights and no adapter. `mlx_lm.fuse` makes a checkpoint of it."
        )
    scale = _scale(parameters, keys, config_file, alpha)
    known = {hf_name(module): module for module in module_sizes(config)}
    if config.tie_word_embeddings:
        del known[hf_name(OUTPUT)]
    ours, problems = dict[str, Tensor](), list[str]()
    for name, value in tensors.items():
        module, _, word = name.rpartition(".")
        ending = {theirs: own for own, theirs in MLX_ENDINGS.items()}.get(f".{word}")
        if ending is None or module not in known:
            problems.append(f"{quoted(name)} is no part of an adapter of this base")
        else:
            ours[known[module] + ending] = _turned(value).contiguous()
    adapter = Adapter(ours, {})
    for module, rank in adapter.ranks.items():
        if rank != parameters["rank"]:
            said = f"lora_parameters.rank is {parameters['rank']}"
            problems.append(f"{hf_name(module)}: its rank is {rank}, but {said}")
    dora = keys.get("fine_tune_type") == "dora"
    has = {module + MAGNITUDE in ours for module in adapter.ranks}
    if has not in ({dora}, set()):
        have = "some modules have" if len(has) > 1 else "no module has" if dora else "modules have"
        kind = quoted(keys.get("fine_tune_type", "lora"))
        problems.append(f"fine_tune_type is {kind}, but {have} a magnitude, .m")
    if not ours and not problems:
        problems.append("it holds no adapter")
    if problems:
        raise AdapterError(
            f"{config_file.parent} is not an adapter of this base:\n{problem_list(problems, 8)}\n"
            "Give the base that it was trained on, or a folder that is whole."
        )
    if config.tie_word_embeddings and {TOK_EMBEDDINGS + A, TOK_EMBEDDINGS + B} <= ours.keys():
        ours |= _of_tied_head(ours)
    model = keys.get("model")
    adapter = Adapter(
        ours,
        dict.fromkeys(Adapter(ours, {}).ranks, scale),
        dropout=float(parameters.get("dropout") or 0.0),
        base=model if isinstance(model, str) else "",
    )

    def row_norms(module: str) -> Tensor:
        """Rows of parts without an adapter have the base's norms, which only the file knows."""
        return ours[module + MAGNITUDE].clone()

    note = parsed_object(metadata.get(NOTE, "{}"))
    return adapter, note, partial(mlx_content, config=config, row_norms=row_norms)


def _scale(
    parameters: Mapping[str, Any], keys: Mapping[str, Any], file: Path, alpha: float | None
) -> float:
    """Return what B A is multiplied with.

    Until the summer of 2024 it was ``scale * alpha / rank``. The configurations of then have
    ``lora_layers``; later ones may still name an alpha, which mlx-lm passes over.
    """
    kinds = {
        "rank": VALUES["r"],
        "scale": Kind("a number above 0", is_alpha),
        "dropout": VALUES["lora_dropout"],
    }
    problems = [
        f"lora_parameters.{key}: {quoted(parameters[key])} must be {kind.words}."
        for key, kind in kinds.items()
        if key in parameters and not kind.accepts(parameters[key])
    ]
    if "rank" not in parameters:
        problems.append("lora_parameters.rank: is missing.")
    if problems:
        raise AdapterError(f"{file} cannot be used:\n{problem_list(problems, 8)}")
    unclear = "scale" not in parameters or ("lora_layers" in keys and "alpha" in parameters)
    if unclear and alpha is None:
        raise AdapterError(
            f"{file} does not say for certain what B A is multiplied with: mlx-lm of before "
            "num_layers took scale * alpha / rank, or the scale alone. Give alpha, which is that "
            "number times the rank."
        )
    scale = float(parameters["scale"]) if alpha is None else alpha / parameters["rank"]
    if not is_alpha(scale):
        raise AdapterError(f"alpha: {quoted(alpha)} must be a number above 0.")
    if not unclear and scale != parameters["scale"]:
        said = parameters["scale"]
        raise AdapterError(f"alpha: {alpha}, but {file} says the scale {said}. Leave it out.")
    return scale
