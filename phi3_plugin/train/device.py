"""Which device a process trains on."""

import torch

from phi3_plugin.errors import ConfigError


def pick_device(name: str | None, local_rank: int) -> torch.device:
    """Return the device of one process, and make it torch's own if it is a GPU.

    Args:
        name: ``cpu`` or ``cuda``; None takes what the machine has.
        local_rank: Number of the process among those of its machine.

    Raises:
        ConfigError: The device is not there.
    """
    available = torch.cuda.device_count()
    if name not in (None, "cpu", "cuda"):
        raise ConfigError(f"device: {name!r} must be 'cpu', 'cuda' or null for what is there.")
    if name == "cuda" and not available:
        raise ConfigError("device: 'cuda' was asked for, but torch sees no GPU. Use null or 'cpu'.")
    if name == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= available:
        raise ConfigError(
            f"--nproc_per_node: process {local_rank} has no GPU of its own, there are {available}."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
