"""Where a run starts or goes on, and what it has made."""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phi3_plugin.checkpoint.adapter import MODULES, Adapter
from phi3_plugin.checkpoint.base import known_hash, open_weights
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.peft import check_same, load_origin, load_trained
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError, CheckpointError, ConfigError
from phi3_plugin.models.lora import LoRALinear, draw, local_rows
from phi3_plugin.models.lora_settings import FROM_BASE, keys_of, keys_of_model
from phi3_plugin.models.nf4 import Rows, is_nf4, nearest_nf4
from phi3_plugin.settings import Settings
from phi3_plugin.train.prepare import is_adapted
from phi3_plugin.train.world import World

# Where training starts: adapters that are drawn, or that are split off the base weight.
#
# pissa    B A = the largest directions of W     base W - s B A     starts as W
# loftq    B A = those of W - NF4(W)             base NF4(W)        starts nearer to W than NF4(W)

A, B = "lora_a.weight", "lora_b.weight"


# Shapes: R rank
def initial_adapter(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return the adapter's starting values, whole and in fp32, by parameter name.

    They depend on seed and name alone, not on how many processes share the model or on what else
    was drawn before. A magnitude of zero asks ``initialize_dora_magnitude`` to set it.

    Args:
        model: May be on the meta device, or sharded.
        seed: Of the run.
    """
    values: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_a"):
            drawn = B if isinstance(module, nn.Embedding) else A
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(f"{name}.{drawn}".encode()))
            value = torch.empty(module.get_parameter(drawn).shape)
            if drawn == B:
                value.normal_(generator=generator)
            else:
                draw(value, module.init, generator)
            names = [n for n in (A, B, "magnitude") if n in dict(module.named_parameters())]
            shapes = {n: module.get_parameter(n).shape for n in names}
            values |= {f"{name}.{n}": torch.zeros(shape) for n, shape in shapes.items()}
            values[f"{name}.{drawn}"] = value
    return values


def split_names(model: nn.Module) -> list[str]:
    """Return the modules whose adapter is split off the base weight, in an order of their own."""
    return [n for n, m in model.named_modules() if getattr(m, "init", None) in FROM_BASE]


@torch.no_grad()
def split(module: LoRALinear, weight: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return A ``[R, in]`` and B ``[out, R]``, as the adapter's precision holds them, in fp32.

    Args:
        module: With ``lora_init`` pissa or loftq; may be on the meta device.
        weight: Its base weight ``[out, in]``, whole.
        device: Where to compute.

    Raises:
        AdapterError: The rank is larger than the weight is wide.

    Source: Meng et al. 2024, PiSSA, section 3; Li et al. 2023, LoftQ, algorithm 1 with T = 1.
    """
    whole = weight[0 : weight.shape[0]].to(device)
    target = whole.float()
    if module.init == "loftq":
        target = target - nearest_nf4(whole)
    a, b = nearest(target.double() / module.scaling, module.rank)
    dtype = module.lora_a.weight.dtype
    return tuple(value.to(dtype).float().cpu() for value in (a, b))  # type: ignore[return-value]


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
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    right = torch.linalg.eigh(tall.T @ tall).eigenvectors[:, -rank:].flip(1)
    # A vector and its negative serve alike: let the largest element be positive.
    largest = right.gather(0, right.abs().argmax(0, keepdim=True))
    right = right * torch.where(largest < 0, -1.0, 1.0)
    left = tall @ right
    root = left.norm(dim=0).clamp_min(torch.finfo(weight.dtype).tiny).sqrt()
    left, right = left / root, right * root
    b, a = (left, right) if tall is weight else (right, left)
    return a.T.contiguous(), b.contiguous()


@dataclass(frozen=True)
class Residual:
    """What PiSSA leaves of a base weight, ``W - s B A``, worked out when rows are read."""

    weight: Rows
    a: Tensor
    b: Tensor
    scaling: float

    @property
    def dtype(self) -> torch.dtype:
        """In which the rows are given."""
        return torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return tuple(self.weight.shape)

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Return consecutive rows."""
        return self.weight[rows].float() - self.scaling * (self.b[rows] @ self.a)


def for_original_base(adapter: dict[str, Tensor], first: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter of twice the rank that computes the same over the original weights.

    ``W - s B0 A0 + s B A`` is W and an adapter ``[B, B0] [A; -A0]`` of the same scale.

    Args:
        adapter: By parameter name, over what PiSSA left of the weights.
        first: A0 and B0, by the same names.
    """
    joined = dict(adapter)
    for name, value in first.items():
        own = adapter[name]
        start = value.to(own.dtype)
        both = [own, -start] if name.endswith(A) else [own, start]
        joined[name] = torch.cat(both, dim=0 if name.endswith(A) else 1)
    return joined


def halves(
    joined: dict[str, Tensor], modules: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Undo :func:`for_original_base` bit for bit.

    Args:
        joined: What it returned.
        modules: Those that PiSSA started.

    Returns:
        The adapter, and A0 and B0.
    """
    adapter, first = dict(joined), dict[str, Tensor]()
    for name in (f"{module}.{part}" for module in modules for part in (A, B)):
        if name in joined:  # what is missing is for the caller to find
            own, start = joined[name].chunk(2, dim=0 if name.endswith(A) else 1)
            adapter[name] = own.contiguous()
            first[name] = (-start if name.endswith(A) else start).float().contiguous()
    return adapter, first


def adapter_scales(model: nn.Module) -> dict[str, float]:
    """Return by module what B A is multiplied with."""
    return {n: float(m.scaling) for n, m in model.named_modules() if hasattr(m, "lora_a")}


# Where a run of `phi3_plugin.recipes.lora_finetune` starts or goes on, and what it has made.

NF4_BASE = (
    "the base weights in NF4, as in training: merge this adapter onto the dequantized NF4 base; "
    "over the original weights it computes something else"
)
"""What an adapter of LoftQ belongs to."""


def starting_weights(
    world: World, model: nn.Module, s: Settings, folder: Path | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a value for every parameter of a model, and what PiSSA took off the base.

    Args:
        world: Its processes share the work.
        model: Built, sharded, and not filled yet.
        s: Of the run.
        folder: The checkpoint to go on from; None starts anew.

    Raises:
        AdapterError: The adapter to start from does not fit the model.
        CheckpointError: Base weights or checkpoint are damaged, or are another model's.
        ConfigError: Base weights in NF4 would have to be trained.
    """
    if not is_adapted(model):
        if s.init_adapter:
            raise AdapterError(
                f"init_adapter: {s.init_adapter} needs a model with adapters. Set "
                "model._component_=phi3_plugin.models.lora_phi3, or remove it."
            )
        if any(is_nf4(p) for p in map(local_rows, model.parameters())):
            raise ConfigError("model.quantize_base: NF4 weights cannot be trained. Use lora_phi3.")
        return {**open_weights(folder or s.checkpoint_dir)}, {}
    weights: dict[str, Any] = {**open_weights(s.checkpoint_dir)}
    known_hash(s.checkpoint_dir)  # for what is saved, so that no step waits for reading it
    pissa = [n for n in split_names(model) if model.get_submodule(n).init == "pissa"]
    first: dict[str, Tensor] = {}
    if folder:
        _check_start(folder, _notes(model))  # first, since halves are PiSSA's alone
        values, first = halves(load_trained(folder, s.checkpoint_dir), pissa)
        check_same(folder, values, trained(model))
        _check_scales(folder, adapter_scales(model))
    elif s.init_adapter:
        values = adapter_of(s.init_adapter, s.checkpoint_dir, model)
    else:
        values = {**initial_adapter(model, s.seed), **_split(world, model, weights)}
        first = {name: values[name] for module in pissa for name in _names(module)}
    for name in pissa:
        a, b = (first[n] for n in _names(name))
        scaling = float(model.get_submodule(name).scaling)  # type: ignore[arg-type]
        weights[f"{name}.weight"] = Residual(weights[f"{name}.weight"], a, b, scaling)
    return {**weights, **values}, first


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def made(
    model: nn.Module, values: dict[str, Tensor], first: dict[str, Tensor], dropout: float
) -> Adapter:
    """Return what was trained as an adapter of the original base, but for LoftQ's.

    Args:
        model: Knows the scales.
        values: All that is trained, whole.
        first: From :func:`starting_weights`.
        dropout: What it was trained with.
    """
    scales = adapter_scales(model)
    names = {f"{m}.{part}" for m in scales for part in (A, B, "magnitude")}
    tensors = {name: value for name, value in values.items() if name in names}
    saved = {name: value for name, value in values.items() if name not in names}
    tensors = for_original_base(tensors, first)
    return Adapter(tensors, scales, saved, dropout, origin={"layout": "fused", **_notes(model)})


def adapter_of(folder: Path, checkpoint_dir: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the values of somebody's adapter for a model that has its ranks and scales.

    Args:
        folder: Any that :func:`phi3_plugin.checkpoint.foreign.read_adapter` reads.
        checkpoint_dir: Of the base model.
        model: Knows what is trained.

    Raises:
        AdapterError: The model's keys are others; those that would fit are listed.
    """
    config = read_config(checkpoint_dir)
    adapter = read_adapter(folder, config=config, base=checkpoint_dir)
    ours, rslora = keys_of_model(model), "rslora" in _notes(model)
    kind = {"use_dora": adapter.is_dora, "use_rslora": rslora, "layers": config.num_hidden_layers}
    theirs = keys_of(adapter.ranks, adapter.scales, set(adapter.saved), **kind)
    ours["lora_init"], theirs["lora_init"] = (
        "loftq" if one.get("lora_init") == "loftq" else "kaiming"  # the rest serves any base
        for one in (_notes(model), adapter.origin)
    )
    if wrong := [f"model.{key}={_shown(v)}" for key, v in theirs.items() if ours[key] != v]:
        raise AdapterError(
            f"init_adapter: {folder} does not fit the model's keys. These would fit:\n  "
            + "\n  ".join([*wrong, *_left_over(ours, theirs)])
        )
    return {**adapter.tensors, **adapter.saved}


def _left_over(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Say that a pattern of the YAML must go, where the command line would only add to it."""
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if theirs[key]]
    if names := [f"{key}.{n}" for key in patterns for n in {*ours[key]} - {*theirs[key]}]:
        return [f"and remove from the YAML what is not there: {', '.join(sorted(names))}"]
    return []


def _check_start(folder: Path, model: Mapping[str, Any]) -> None:
    """Refuse to go on as if the run had started elsewhere, on what would be another base."""
    saved, given = (n.get("lora_init", "kaiming") for n in (load_origin(folder), model))
    if saved != given:
        words = (init if init in FROM_BASE else "kaiming or gaussian" for init in (saved, given))
        raise CheckpointError(
            "resume: {} was started with lora_init: {}, but the model has {}. Resume with the "
            "lora_init that the run was started with.".format(folder, *words)
        )


def check_base(before: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse to go on over a base in another precision, which no adapter's file tells.

    Args:
        before: The section ``model`` that the run was started with.
        model: That is to go on.
    """
    was = "qlora" in str(before.get("_component_")) or bool(before.get("quantize_base"))
    now = any(is_nf4(p) for p in map(local_rows, model.parameters()))
    if was != now:
        raise CheckpointError(
            f"resume: the run was started over base weights {'' if was else 'not '}in NF4, but "
            f"now they are{'' if now else ' not'}. Resume with model._component_="
            f"{before.get('_component_')} and the quantize_base the run was started with."
        )


def _check_scales(folder: Path, model: Mapping[str, float]) -> None:
    """Refuse to go on with other scales, which no shape tells."""
    modules: Mapping[str, Any] = load_origin(folder).get(MODULES, {})
    for name, (_, scale, *_) in modules.items():
        if scale != model.get(name):
            raise CheckpointError(
                f"resume: {folder} was trained with the scale {scale:g} on {name}, but the model "
                f"has {model.get(name):g}. Resume with the lora_alpha, alpha_pattern and "
                "use_rslora that the run was started with."
            )


def _notes(model: nn.Module) -> dict[str, Any]:
    """Return what a file notes of the adapters' kind, where it is not the usual one."""
    notes: dict[str, Any] = {}
    for module in model.modules():
        if getattr(module, "use_rslora", False):
            notes["rslora"] = True
        if (init := getattr(module, "init", "kaiming")) in FROM_BASE:
            notes["lora_init"] = init
    return notes


def _split(world: World, model: nn.Module, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return adapters split off the base weights; each process works some of them out."""
    own: dict[str, Tensor] = {}
    for name in split_names(model)[world.rank :: world.size]:
        module: Any = model.get_submodule(name)
        factors = split(module, weights[f"{name}.weight"], world.device)
        own |= dict(zip(_names(name), factors, strict=True))
    return {name: value for part in world.gather(own) for name, value in part.items()}


def _names(module: str) -> tuple[str, str]:
    return f"{module}.{A}", f"{module}.{B}"


def _shown(value: object) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, dict) and value:  # an empty one would leave that of the YAML
        return "'{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}'"
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return "null" if value in (None, {}) else str(value)
