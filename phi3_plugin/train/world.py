"""One process or many: everything that differs between them, in one place.

The only user of ``torch.distributed`` in training. With one process each method is the identity,
so a recipe reads the same for a laptop and for a cluster.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torchtune.training import set_default_dtype

from phi3_plugin.errors import CheckpointError, ConfigError
from phi3_plugin.models.nf4 import rows_of

_T = TypeVar("_T")

PR_SET_PDEATHSIG = 1
"""From Linux's <sys/prctl.h>."""


class World:
    """The processes of one run, and this one's place among them."""

    def __init__(self, device: str | None = None, replicas: int = 1) -> None:
        """Join the processes that torchrun started, or be alone.

        Args:
            device: See :func:`pick_device`.
            replicas: Whole copies of the model, each sharded over as many processes.

        Raises:
            ConfigError: The device is not there, there are more processes than devices, they
                cannot be divided into that many copies, or no launcher started them.
        """
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
        if self.size % replicas:
            raise ConfigError(
                f"fsdp_replicas: {replicas} copies cannot be shared out evenly over {self.size} "
                "processes. Use a divisor of their number."
            )
        self.shards = self.size // replicas
        """Processes that share one copy of the model."""
        self.mesh: DeviceMesh | None = None
        if self.size > 1:
            end_with_launcher()
            try:
                dist.init_process_group(BACKENDS.get(self.device.type))
            except ValueError as error:
                raise ConfigError(
                    f"WORLD_SIZE is {self.size} in the environment, and a launcher sets more: "
                    f"{error}. Start with tune run --nproc_per_node {self.size}, or unset "
                    "WORLD_SIZE to train in one process."
                ) from error
        if self.shards > 1 and replicas == 1:
            self.mesh = init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("shard",))
        elif self.shards > 1:
            self.mesh = init_device_mesh(
                self.device.type, (replicas, self.shards), mesh_dim_names=("replicate", "shard")
            )

    @property
    def is_main(self) -> bool:
        """Whether this process talks and writes for all."""
        return self.rank == 0

    @property
    def shard(self) -> int:
        """Which shard is this process's; neighbours share a copy, so that it is on one node."""
        return self.rank % self.shards

    def build(
        self,
        make: Callable[[], nn.Module],
        dtype: torch.dtype,
        *,
        offload: bool = False,
        reshard: bool = True,
        keep_head: bool = False,
    ) -> nn.Module:
        """Build the model: on the device, or without memory and ready to be sharded.

        Args:
            make: Returns the model, prepared for recompute and compilation.
            dtype: Of its parameters.
            offload: Keep shards in the CPU's memory.
            reshard: Free a layer's gathered weights after its forward pass.
            keep_head: Keep gathered what belongs to no layer once it was, so that the head may be
                called by itself.

        Raises:
            ConfigError: There is nothing to offload, because nothing is sharded.
        """
        if offload and not self.mesh:
            raise ConfigError(
                "fsdp_cpu_offload: True needs a model that several processes share. Set it to "
                "False, start more processes, or lower fsdp_replicas."
            )
        with set_default_dtype(dtype), torch.device("meta" if self.mesh else self.device):
            model = make()
        if self.mesh:
            options: dict[str, Any] = {"mesh": self.mesh, "reshard_after_forward": reshard}
            if offload:
                options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            layers: Any = model.layers
            for layer in layers:
                fully_shard(layer, **options)
            fully_shard(model, **{**options, "reshard_after_forward": reshard and not keep_head})
        return model

    def load(self, model: nn.Module, weights: Mapping[str, Any], *, offload: bool = False) -> None:
        """Fill one parameter after the other; a process reads and keeps its own rows only.

        Args:
            model: From :meth:`build`.
            weights: For every parameter a whole tensor, or what reads rows when it is sliced.
            offload: As for :meth:`build`.

        Raises:
            CheckpointError: Names or shapes are not those of the model; all are listed.
        """
        check_weights(model, weights)
        device = torch.device("cpu") if offload else self.device
        state: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            local = getattr(parameter, "_local_tensor", parameter).detach()
            rows = rows_of(weights[name], local, self.shard, self.shards, device)
            if self.mesh:  # else they are in their place by now
                state[name] = _as_shard(rows, parameter)
        if self.mesh:
            model.load_state_dict(state, assign=True)
        modules: Iterable[Any] = model.modules()
        for module in modules:
            if self.mesh and hasattr(module, "rope_init"):
                module.rope_init(self.device)
            if hasattr(module, "initialize_dora_magnitude"):
                module.initialize_dora_magnitude()  # where it is zero: see its docstring

    def random_state(self) -> list[Tensor]:
        """Return this process's random number states: CPU, and GPU if it has one."""
        cuda = [torch.cuda.get_rng_state()] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def set_random_state(self, states: list[list[Tensor]], seed: int) -> None:
        """Go on with this process's random numbers, or draw others if the processes changed.

        Args:
            states: By rank, from :meth:`random_state`.
            seed: To draw from where ``states`` are those of other processes.
        """
        if len(states) != self.size or len(states[self.rank]) != len(self.random_state()):
            torch.manual_seed(seed + self.rank)
            return
        torch.set_rng_state(states[self.rank][0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[self.rank][1])

    def before_backward(self, model: nn.Module, *, last: bool) -> None:
        """Let sharded gradients travel with the last micro-batch of a step only."""
        if self.mesh:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]

    def average_gradients(self, trained: Iterable[Tensor]) -> None:
        """Average over whole copies of the model, as FSDP has done over shards by now."""
        if self.mesh or self.size == 1:
            return
        gradients = [p.grad for p in trained if p.grad is not None]
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()
        for gradient in gradients:
            gradient /= self.size

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def totals(self, *numbers: int) -> list[int]:
        """Return the sums of some numbers over all processes.

        They are known to Python, and so is the answer: processes talk over the CPU, and no device
        is waited for.
        """
        if self.size == 1:
            return list(numbers)
        return [int(number) for number in self.sum(torch.tensor(numbers)).tolist()]

    def whole(self, value: Tensor) -> Tensor:
        """Return a sharded tensor, gathered; every process must ask for it."""
        return value.full_tensor() if isinstance(value, DTensor) else value

    def gather(self, value: _T) -> list[_T]:
        """Return every process's object, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def same(self, key: str, value: _T) -> _T:
        """Return a value that all processes must have read alike from the file system.

        Args:
            key: The setting it comes from.
            value: What this process read.

        Raises:
            ConfigError: They differ, as on nodes that do not share their storage.
        """
        values = self.gather(value)
        if any(other != value for other in values):
            raise ConfigError(
                f"{key}: the nodes do not see the same files: {values}. Use storage "
                "that all of them share."
            )
        return value

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            dist.destroy_process_group()


def end_with_launcher() -> None:
    """Ask this process to stop, as SIGTERM does, when the launcher that started it has died.

    Workers of torchrun have a session of their own, so that nothing else would tell them: they
    would train on, and write among what a restarted run writes. On Linux the kernel sends the
    signal; elsewhere a thread looks whether the parent is still the same.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return  # started by something else, which need not outlive us
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # it died before that
            os.kill(os.getpid(), signal.SIGTERM)
    else:
        threading.Thread(target=watch, daemon=True).start()


BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}
"""What processes talk by: objects and barriers over the CPU, gradients over the device."""

DEVICES = (*BACKENDS, "mps")


def pick_device(name: str | None, local_rank: int) -> torch.device:
    """Return the device of one process, and make it torch's own if it is a GPU.

    Args:
        name: ``cpu``, ``cuda``, which is AMD's too, ``xpu`` or ``mps``; None is a GPU of the second
            kind where there is one, else the CPU.
        local_rank: Number of the process among those of its machine.

    Raises:
        ConfigError: The device is not there.
    """
    if name not in (None, *DEVICES):
        known = ", ".join(map(repr, DEVICES))
        raise ConfigError(f"device: {name!r} must be one of {known}, or null for what is there.")
    kind = name or ("cuda" if torch.cuda.device_count() else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    available = torch.get_device_module(kind).device_count()
    if not available:
        raise ConfigError(f"device: {kind!r} was asked for, but torch sees none. Use 'cpu'.")
    if local_rank >= available:
        raise ConfigError(
            f"--nproc_per_node: process {local_rank} has no GPU of its own, there are {available}."
        )
    torch.accelerator.set_device_index(local_rank)
    return torch.device(kind, local_rank)


def exact(device: torch.device) -> torch.dtype:
    """Return the most exact floats that a device has, for sums of many losses."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Check that weights are those of the model, before the first is read.

    Args:
        model: May be on the meta device, or sharded.
        weights: Anything with a shape, by parameter name.

    Raises:
        CheckpointError: Names or shapes differ; all are listed.
    """
    ours = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    theirs = {name: tuple(weight.shape) for name, weight in weights.items()}
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differing:
        lines = [f"{n}: the model has {ours.get(n)}, given is {theirs.get(n)}" for n in differing]
        raise CheckpointError("The weights do not fit the model:\n  " + "\n  ".join(lines))


def _as_shard(rows: Tensor, parameter: Tensor) -> nn.Parameter:
    # DTensor.from_local needs views, which NF4 does not have; torchtune builds shards the same way.
    sharded = DTensor(rows, parameter._spec, requires_grad=parameter.requires_grad)  # type: ignore[attr-defined]
    return nn.Parameter(sharded, requires_grad=parameter.requires_grad)
