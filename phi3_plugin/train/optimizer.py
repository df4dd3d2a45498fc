"""Parameter groups, learning-rate schedules, and what a checkpoint keeps of an optimizer."""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchtune.utils import log_rank_zero

from phi3_plugin.checkpoint.base import NEW_ROWS
from phi3_plugin.device import computes_ahead
from phi3_plugin.errors import CheckpointError, ConfigError
from phi3_plugin.options import Kind, Seed, is_number, mistakes
from phi3_plugin.settings import component
from phi3_plugin.train.data import FEW_STEPS
from phi3_plugin.train.world import World

logger = logging.getLogger(__name__)


def parameter_groups(
    model: nn.Module, rate: float | None, lora_plus_ratio: float | None
) -> list[dict[str, Any]]:
    """Return what the optimizer gets; with LoRA+ the B matrices of linear layers learn faster.

    Those of the embedding do not: there A is the one that starts at zero. Rows of new tokens do not
    decay: many a step has none of them, and would only make them smaller.

    Args:
        model: Knows what is trained.
        rate: Learning rate.
        lora_plus_ratio: Multiple of it for the B matrices.

    Source: Hayou et al. 2024, LoRA+, section 4.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rows = [p for name, p in trained if name.endswith(NEW_ROWS)]
    undecayed = [{"params": rows, "weight_decay": 0.0}] if rows else []
    trained = [(name, p) for name, p in trained if not name.endswith(NEW_ROWS)]
    if not lora_plus_ratio or rate is None:
        return [{"params": [p for _, p in trained]}, *undecayed]
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    for name, parameter in trained:
        is_fast = name.endswith("lora_b.weight") and not name.startswith("tok_embeddings.")
        (fast if is_fast else slow).append(parameter)
    return [{"params": slow}, {"params": fast, "lr": rate * lora_plus_ratio}, *undecayed]


FUSABLE = (torch.optim.Adam, torch.optim.AdamW)
"""Those of torch whose step is one kernel, if asked, and can be left out by a number on a GPU."""


def for_gpu(section: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
    """Return what an optimizer is told beside its section: on CUDA to make a step in one kernel.

    On a CPU a step would have other bits than torch's default, and gain nothing.

    Args:
        section: Of the YAML; what it says of how a step is computed is left to it.
        groups: From :func:`parameter_groups`.
    """
    if component(section["_component_"]) not in FUSABLE or HOW_COMPUTED & section.keys():
        return {}
    parameters = [p for group in groups for p in group["params"]]
    return {"fused": True} if all(computes_ahead(p.device) for p in parameters) else {}


HOW_COMPUTED = {"fused", "foreach", "capturable", "differentiable"}
"""Arguments of torch's optimizers that exclude each other."""


def skips_by_itself(optimizer: Optimizer) -> bool:
    """Whether a GPU can decide if an optimizer moves its weights: the fused ones of torch can."""
    able = getattr(optimizer, "_step_supports_amp_scaling", False)
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return able and all(computes_ahead(p.device) for p in parameters)


def step_if(optimizer: Optimizer, wanted: Tensor) -> None:
    """Make a step if a number on the GPU is true; without waiting for it.

    Source: torch 2.13 ``GradScaler._maybe_opt_step``, from which fused optimizers have this.
    """
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = (~wanted).float()  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


Schedule = Callable[..., LambdaLR]
_Ratio = Annotated[float, Kind("a number from 0 to 1", partial(is_number, least=0, most=1))]


def with_warmup(shape: Callable[[int, int], float]) -> Schedule:
    """Return a schedule that rises from 0 over its warm-up and falls as a shape says.

    torchtune's recipes resume with ``last_epoch=-1`` unless ``max_steps_per_epoch`` cuts the epoch
    short, and so would repeat the warm-up. The restored optimizer knows better.

    Args:
        shape: (steps since the warm-up, steps after the warm-up in all) -> factor of the rate.

    Returns:
        What a recipe hands the optimizer, new or restored from a checkpoint, and the steps of the
        whole run. The warm-up is a number of steps or a share of all, rounded up; a run of fewer
        than `FEW_STEPS` has none of a share. ``last_epoch`` is the number of steps made, less one,
        if the recipe knows.
    """

    def schedule(
        optimizer: Optimizer,
        num_training_steps: int,
        num_warmup_steps: Seed | None = None,
        warmup_ratio: _Ratio = 0.0,
        last_epoch: int = -1,
    ) -> LambdaLR:
        wrong = mistakes("lr_scheduler.warmup_ratio", warmup_ratio, _Ratio)
        wrong += mistakes("lr_scheduler.num_warmup_steps", num_warmup_steps, Seed | None)
        if wrong:
            raise ConfigError("\n".join(wrong))
        share = math.ceil(num_training_steps * warmup_ratio)
        # The first step of a warm-up has a rate of 0, in transformers too, with whose rates ours
        # agree. Of few steps none is to spare.
        share = 0 if num_training_steps < FEW_STEPS else min(share, num_training_steps - 1)
        warmup = share if num_warmup_steps is None else num_warmup_steps
        # Here, since torchtune's recipes tell nobody else how many steps they make
        if warmup >= num_training_steps:
            message = (
                f"lr_scheduler.num_warmup_steps: {warmup} is not less than the "
                f"{num_training_steps} steps of the run, so that the rate never comes to "
                "optimizer.lr. Lower it."
            )
            log_rank_zero(logger, message, logging.WARNING)
        if num_training_steps < FEW_STEPS:
            message = (
                f"The whole run makes {num_training_steps} steps. Lower batch_size or "
                "gradient_accumulation_steps, or raise epochs."
            )
            log_rank_zero(logger, message, logging.WARNING)

        def factor(step: int) -> float:
            if step < warmup:
                return step / warmup
            return shape(step - warmup, num_training_steps - warmup)

        made = max((int(state.get("step", 0)) for state in optimizer.state.values()), default=0)
        return LambdaLR(optimizer, factor, max(last_epoch, made - 1))

    schedule.__name__ = schedule.__qualname__ = shape.__name__  # torchtune and pickle ask
    schedule.__doc__ = shape.__doc__
    return schedule


@with_warmup
def cosine_with_warmup(step: int, steps: int) -> float:
    """Let the rate fall to 0 along half a cosine, as torchtune's schedule does."""
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step / max(1, steps)))))


@with_warmup
def linear_with_warmup(step: int, steps: int) -> float:
    """Let the rate fall to 0 in a line.

    Source: transformers 5.23 ``get_linear_schedule_with_warmup``.
    """
    return max(0, steps - step) / max(1, steps)


@with_warmup
def constant_with_warmup(step: int, steps: int) -> float:
    """Let the rate stay where its warm-up ends."""
    return 1.0


def replay(schedule: LRScheduler, steps: int) -> None:
    """Bring a new schedule, and the rates that it sets, to where so many steps leave them.

    So a run goes on in the same bits, and one whose settings changed at the rate that they give.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects steps of the optimizer in between
        for _ in range(steps):
            schedule.step()


# The state by parameter name, whole, whatever the number of processes. 8-bit optimizers keep
# tensors that are made of others: codes, scales and a table. Those are shared out, gathered and
# copied part by part here, since they know few of torch's functions.

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2")
"""What optimizers keep of each value of a parameter: torch's and torchao's, and bitsandbytes'."""


def optimizer_state(world: World, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return a copy of what the optimizer keeps by parameter name, whole, for the main process."""
    if not optimizer.state:  # torch would make a step to have something to return
        return {"kind": _kind(optimizer), "state": {}}
    state = get_optimizer_state_dict(model, optimizer)["state"]
    return {"kind": _kind(optimizer), "state": _copied(state, world)}


def load_optimizer_state(
    world: World, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]
) -> None:
    """Give every process its part of a whole state from :func:`optimizer_state`.

    Raises:
        CheckpointError: It is that of another kind of optimizer, or of another model.
    """
    _check_state(optimizer, dict(model.named_parameters()), state)
    if state["state"]:
        # Rates, betas and the like stay as they are: the settings and the schedule have set them
        fresh = get_optimizer_state_dict(model, optimizer)
        mine = {**fresh, "state": _filled(fresh["state"], state["state"], world)}
        set_optimizer_state_dict(model, optimizer, mine)


def _copied(value: Any, world: World) -> Any:
    """Copy a state to the CPU of the main process; all others help to gather, and keep nothing."""
    if isinstance(value, dict):
        return {key: _copied(part, world) for key, part in value.items()}
    if isinstance(value, list):
        return [_copied(part, world) for part in value]
    if not isinstance(value, Tensor):
        return value
    whole: Any = world.whole(value)
    if not hasattr(whole, "__tensor_flatten__"):
        copy = whole.to("cpu", copy=True)
    else:
        names, rest = whole.__tensor_flatten__()
        # Gathered parts may still be on their way, and their copies wait for them.
        parts = {name: getattr(whole, name).to("cpu", copy=True) for name in names}
        copy = whole.__tensor_unflatten__(parts, rest, whole.shape, whole.stride())
    return copy if world.is_main else None


def _filled(shards: Any, saved: Any, world: World) -> Any:
    """Put a saved state, a part of it or one value into the shards that this process made."""
    if isinstance(saved, dict):
        return {key: _filled(shards.get(key), value, world) for key, value in saved.items()}
    if not isinstance(shards, DTensor):
        return saved
    rows = -(-len(shards) // world.shards)
    first = world.shard * rows
    shards.to_local().copy_(saved[first : first + rows])
    return shards


def _kind(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _check_state(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Refuse a state that another kind of optimizer left, or another model: steps would crash."""
    advice = "Use the {} the run was started with, or start anew in another output_dir."
    if state["kind"] != _kind(optimizer):
        raise CheckpointError(
            f"resume: the optimizer would change from {state['kind']} to {_kind(optimizer)}. "
            + advice.format("one")
        )
    for name, moments in state["state"].items():
        shape = parameters[name].shape if name in parameters else None
        for value in (moments[key] for key in MOMENTS if key in moments):
            if value.shape != shape:
                raise CheckpointError(
                    f"resume: the optimizer's state of {name} is {tuple(value.shape)}, but the "
                    f"model has {shape and tuple(shape)}. " + advice.format("model settings")
                )


SMALLEST = 4096
"""Values that one process must have of a tensor for torchao to quantize what belongs to it."""


def check_shards(
    optimizer: Optimizer, parameters: Iterable[tuple[str, Tensor]], shards: int
) -> None:
    """Refuse low-bit states that torchao cannot share out, before anything is trained.

    Args:
        optimizer: Of any kind; torchao's have a block size.
        parameters: With their names; ``[rows, ...]``.
        shards: Processes that share the rows.

    Raises:
        ConfigError: They would have different numbers of them, or of another precision than fp32.
    """
    if shards == 1 or not hasattr(optimizer, "block_size"):
        return
    for name, parameter in parameters:
        rows = parameter.shape[0]
        largest = -(-rows // shards) * (parameter.numel() // rows)
        if not parameter.requires_grad or largest < SMALLEST:
            continue
        if rows % shards:
            key = "number of add_tokens" if name.endswith(NEW_ROWS) else "lora_rank"
            problem = f"has {rows} rows. Choose a {key} that is a multiple"
        elif parameter.dtype != torch.float32:
            # torch compiles no step: the shards' states call themselves fp32, the whole do not.
            problem = f"is {parameter.dtype}. Set adapter_dtype=fp32 or dtype=fp32"
        else:
            continue
        raise ConfigError(
            f"optimizer._component_: {_kind(optimizer)} cannot share its states out over "
            f"{shards} processes: {name} {problem}, set fsdp_replicas={shards}, or use "
            "torch.optim.AdamW."
        )
