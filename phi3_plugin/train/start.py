"""What training starts from: an adapter that is drawn, split off the base, somebody's, or its own.

    kaiming, gaussian   A drawn, B zero                     base W             starts as W
    pissa               B A the largest directions of W     base W - s B A     starts as W
    loftq               B A those of W - NF4(W)             base NF4(W)        nearer to W than that

An adapter of PiSSA belongs to what is left of the weights. It is saved as one of twice the rank
that belongs to the original ones, so it serves like any other; a resume keeps both halves.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phi3_plugin.checkpoint.adapter import Adapter, Origin
from phi3_plugin.checkpoint.base import (
    MAGNITUDE,
    NEW_ROWS,
    A,
    B,
    known_hash,
    open_weights,
    other_base,
)
from phi3_plugin.checkpoint.equivalents import for_original_base, nearest
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.peft import check_same, check_trained
from phi3_plugin.config import read_config
from phi3_plugin.data.added_tokens import NewToken, asked_as, pieces_of
from phi3_plugin.errors import AdapterError, CheckpointError, ConfigError
from phi3_plugin.models.lora import LoRALinear, draw, local_rows
from phi3_plugin.models.lora_settings import FROM_BASE, keys_of, keys_of_model
from phi3_plugin.models.new_tokens import starting_rows, with_rows
from phi3_plugin.models.nf4 import Rows, is_nf4, nearest_nf4
from phi3_plugin.settings import Settings
from phi3_plugin.train.checkpoints import going_on
from phi3_plugin.train.model import is_adapted, trained_parameters
from phi3_plugin.train.world import World, exact

# Shapes: R rank

Tensors = Mapping[str, Tensor]


def starting_weights(
    world: World,
    model: nn.Module,
    settings: Settings,
    folder: Path | None,
    state: Mapping[str, Any] | None,
    new_tokens: Mapping[int, NewToken],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a value for every parameter of a model, and the A and B that PiSSA took off the base.

    Args:
        world: Its processes share the work.
        model: Built, sharded, and not filled yet.
        settings: Of the run.
        folder: The checkpoint to go on from; None starts anew.
        state: Of that checkpoint.
        new_tokens: By id, those whose rows are trained.

    Raises:
        AdapterError: The adapter to start from does not fit the model.
        CheckpointError: Base weights or checkpoint are damaged, or are another model's.
        ConfigError: Base weights in NF4 would have to be trained.
    """
    if not is_adapted(model):
        if settings.init_adapter:
            raise AdapterError(
                f"init_adapter: {settings.init_adapter} needs a model with adapters. Set "
                "model._component_=phi3_plugin.models.lora_phi3, or remove it."
            )
        if _is_quantized(model):
            raise ConfigError("model.quantize_base: NF4 weights cannot be trained. Use lora_phi3.")
        weights: dict[str, Any] = {**open_weights(folder or settings.checkpoint_dir)}
        if not folder:
            weights |= with_rows(weights, starting_rows(weights, pieces_of(new_tokens)))
        return weights, {}
    weights = {**open_weights(settings.checkpoint_dir)}
    rows = starting_rows(weights, pieces_of(new_tokens))
    weights |= with_rows(weights, rows)
    known_hash(settings.checkpoint_dir)  # for what is saved, so that no step waits for reading it
    pissa = [name for name in split_names(model) if model.get_submodule(name).init == "pissa"]
    first: dict[str, Tensor] = {}
    if folder and state:
        with going_on(folder):
            check_adapter_state(folder, state, model)
            values, first = state["adapter"]["trained"], state["adapter"]["first"]
    elif settings.init_adapter:
        values = fitting_tensors(settings.init_adapter, settings.checkpoint_dir, model, new_tokens)
    else:
        values = {**initial_adapter(model, settings.seed), **_split_all(world, model, weights)}
        first = {name + part: values[name + part] for name in pissa for part in (A, B)}
    for name in pissa:
        scaling = float(model.get_submodule(name).scaling)  # type: ignore[arg-type]
        base = weights[f"{name}.weight"]
        weights[f"{name}.weight"] = Residual(base, first[name + A], first[name + B], scaling)
    return {**weights, **own_rows(model, rows), **values}, first


def own_rows(model: nn.Module, rows: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Tensor]:
    """Return the rows that are parameters of their own in a model, by name, ``[N, D]``."""
    return {
        module + NEW_ROWS: torch.stack([*own.values()])
        for module, own in rows.items()
        if hasattr(model.get_submodule(module), "new_rows")
    }


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
        if not hasattr(module, "lora_a"):
            continue
        for part, parameter in module.named_parameters(prefix=name):
            if part.removeprefix(name) in (A, B, MAGNITUDE):
                values[part] = torch.zeros(parameter.shape)
        drawn = B if isinstance(module, nn.Embedding) else A
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32((name + drawn).encode()))
        if drawn == B:
            values[name + B].normal_(generator=generator)
        else:
            draw(values[name + A], module.init, generator)
    return values


def split_names(model: nn.Module) -> list[str]:
    """Return the modules whose adapter is split off the base weight."""
    return [n for n, m in model.named_modules() if getattr(m, "init", None) in FROM_BASE]


def _split_all(world: World, model: nn.Module, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the adapters split off the base weights; each process works some of them out."""
    own: dict[str, Tensor] = {}
    for name in split_names(model)[world.rank :: world.size]:
        module: Any = model.get_submodule(name)
        a, b = split(module, weights[f"{name}.weight"], world.device)
        own |= {name + A: a, name + B: b}
    return {name: value for part in world.gather(own) for name, value in part.items()}


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
    whole = weight[0 : weight.shape[0]].to(device if exact(device) is torch.float64 else "cpu")
    target = whole.float()
    if module.init == "loftq":
        target = target - nearest_nf4(whole)
    a, b = nearest(target.double() / module.scaling, module.rank)
    dtype = module.lora_a.weight.dtype
    return a.to(dtype).float().cpu(), b.to(dtype).float().cpu()


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


def fitting_tensors(
    path: Path, checkpoint_dir: Path, model: nn.Module, new_tokens: Mapping[int, NewToken]
) -> dict[str, Tensor]:
    """Return the tensors of somebody's adapter for a model that has its ranks and scales.

    Args:
        path: Anything that :func:`phi3_plugin.checkpoint.foreign.read_adapter` reads.
        checkpoint_dir: Of the base model.
        model: Knows what is trained.
        new_tokens: By id, those whose rows are trained.

    Raises:
        AdapterError: It was made for other base weights, or the model's keys are others; those
            that would fit are listed.
    """
    adapter = read_adapter(path, config=read_config(checkpoint_dir), base=checkpoint_dir)
    if hashes := other_base(adapter.base_hash, checkpoint_dir):
        raise AdapterError(
            f"init_adapter: {path} was made for other weights than those of {checkpoint_dir}: for "
            f"some with the hash {hashes}. It names {adapter.base or 'no base'}: give that as "
            "checkpoint_dir, or merge the adapter into it and train on from what that writes."
        )
    return fitted(adapter, path, model, new_tokens)


def fitted(
    adapter: Adapter, path: Path, model: nn.Module, new_tokens: Mapping[int, NewToken]
) -> dict[str, Tensor]:
    """Return the tensors of an adapter by the names of a model's parameters.

    Arguments and errors are those of :func:`fitting_tensors`.
    """
    own = {i: str(token.entry["content"]) for i, token in new_tokens.items()}
    trained = {int(token["id"]): str(token["content"]) for token in adapter.new_tokens}
    strange = {i for rows in adapter.rows.values() for i in rows} - own.keys()
    if strange or (trained and trained != own):
        asked = [*map(asked_as, adapter.new_tokens)]
        instead = f"Set tokenizer.add_tokens={asked}, or merge" if asked else "Merge"
        raise AdapterError(
            f"init_adapter: {path} has rows of the tokens {trained or sorted(strange)}, but the "
            f"run trains those of {own}. {instead} the adapter and train on from what that writes."
        )
    ours = keys_of_model(model)
    theirs = keys_of(
        adapter.ranks,
        adapter.scales,
        set(adapter.saved),
        layers=len(model.layers),  # type: ignore[arg-type]
        use_dora=adapter.is_dora,
        use_rslora="rslora" in _notes(model),
    )
    for keys, origin in ((ours, _notes(model)), (theirs, adapter.origin)):
        is_loftq = origin.get("lora_init") == "loftq"  # all others serve the original base
        keys["lora_init"] = "loftq" if is_loftq else "kaiming"
    wrong = [f"model.{key}={_typed(v)}" for key, v in theirs.items() if ours[key] != v]
    if wrong:
        # The command line only adds to a pattern of the YAML: what is too much must go there.
        extra = [
            f"{key}.{name}"
            for key in ("rank_pattern", "alpha_pattern")
            if theirs[key]
            for name in {*ours[key]} - {*theirs[key]}
        ]
        if extra:
            wrong.append(f"and remove from the YAML what is not there: {', '.join(sorted(extra))}")
        raise AdapterError(
            f"init_adapter: {path} does not fit the model's keys. These would fit:\n  "
            + "\n  ".join(wrong)
        )
    values = {**adapter.tensors, **adapter.saved, **own_rows(model, adapter.rows)}
    for name, parameter in model.named_parameters():
        if name in values and values[name].shape != parameter.shape:
            raise AdapterError(
                f"init_adapter: {name} of {path} is {[*values[name].shape]}, but the run's "
                f"{[*parameter.shape]}. Merge the adapter and train on from what that writes."
            )
    return values


def _typed(value: object) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, dict) and value:  # an empty one would leave that of the YAML
        return "'{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}'"
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return "null" if value in (None, {}) else str(value)


def adapter_scales(model: nn.Module) -> dict[str, float]:
    """Return by module what B A is multiplied with."""
    return {n: float(m.scaling) for n, m in model.named_modules() if hasattr(m, "lora_a")}


def adapter_state(model: nn.Module, trained: Tensors, first: Tensors) -> dict[str, Any]:
    """Return what a resumed run needs of the adapter, and what it must have been started with.

    Args:
        model: Knows the scales.
        trained: All that is trained, whole.
        first: From :func:`starting_weights`.
    """
    return {
        "trained": dict(trained),
        "first": dict(first),
        "lora_init": _notes(model).get("lora_init"),
        "scales": adapter_scales(model),
        "quantized": _is_quantized(model),
    }


def check_adapter_state(folder: Path, state: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse to go on as if the run had been started otherwise: no shape would tell.

    Args:
        folder: Of the checkpoint.
        state: Its state, of which ``adapter`` is from :func:`adapter_state`.
        model: That is to go on.

    Raises:
        CheckpointError: Start, shapes, scales or the precision of the base are others.
    """
    if "adapter" not in state:
        raise CheckpointError(
            f"resume: {folder} holds a whole model, but the model has adapters. Resume with the "
            "model settings the run was started with, or set another output_dir."
        )
    saved, section = state["adapter"], state["settings"]["model"]
    before, now = saved["lora_init"], _notes(model).get("lora_init")
    if before != now:
        raise CheckpointError(
            f"resume: {folder} was started with lora_init: {before or 'kaiming or gaussian'}, but "
            f"the model has {now or 'kaiming or gaussian'}. Resume with the lora_init that the "
            "run was started with."
        )
    check_same(folder, saved["trained"], trained_parameters(model))
    scales = adapter_scales(model)
    for name, scale in saved["scales"].items():
        if scale != scales[name]:
            raise CheckpointError(
                f"resume: {folder} was trained with the scale {scale:g} on {name}, but the model "
                f"has {scales[name]:g}. Resume with the lora_alpha, alpha_pattern and "
                "use_rslora that the run was started with."
            )
    if saved["quantized"] != _is_quantized(model):
        raise CheckpointError(
            f"resume: the run was started over base weights {'' if saved['quantized'] else 'not '}"
            f"in NF4, but now they are{' not' if saved['quantized'] else ''}. Resume with "
            f"model._component_={section['_component_']} and the quantize_base the run was "
            "started with."
        )


NF4_BASE = (
    "the base weights in NF4, as in training: merge this adapter onto the dequantized NF4 base; "
    "over the original weights it computes something else"
)
"""What an adapter of LoftQ belongs to."""


def trained_adapter(
    model: nn.Module,
    trained: Tensors,
    first: Tensors,
    new_tokens: Mapping[int, NewToken],
    *,
    may_be_identity: bool,
) -> Adapter:
    """Return what was trained as an adapter of the original base, but for LoftQ's.

    Args:
        model: Knows scales and dropout.
        trained: All that is trained, whole.
        first: From :func:`starting_weights`.
        new_tokens: By id, those whose rows are trained.
        may_be_identity: Whether it may still be what it was at the start.

    Raises:
        AdapterError: It is not finite, or nothing was trained.
    """
    moved = {name: trained[name] - start for name, start in first.items()}
    check_trained({**trained, **moved}, may_be_identity=may_be_identity)
    scales = adapter_scales(model)
    names = {module + part for module in scales for part in (A, B, MAGNITUDE)}
    rows = {n.removesuffix(NEW_ROWS): v for n, v in trained.items() if n.endswith(NEW_ROWS)}
    return Adapter(
        for_original_base({n: v for n, v in trained.items() if n in names}, first),
        scales,
        {n: v for n, v in trained.items() if n not in names and not n.endswith(NEW_ROWS)},
        {module: dict(zip(new_tokens, values, strict=True)) for module, values in rows.items()},
        [token.entry for token in new_tokens.values()],
        next((m.p for m in model.modules() if isinstance(m, nn.Dropout)), 0.0),
        origin={"layout": "fused", **_notes(model)},
    )


def _is_quantized(model: nn.Module) -> bool:
    return any(is_nf4(local_rows(parameter)) for parameter in model.parameters())


def _notes(model: nn.Module) -> Origin:
    """Return what a file notes of the adapters' kind, where it is not the usual one."""
    notes: Origin = {}
    for module in model.modules():
        if getattr(module, "use_rslora", False):
            notes["rslora"] = True
        if (init := getattr(module, "init", "kaiming")) in FROM_BASE:
            notes["lora_init"] = init
    return notes
