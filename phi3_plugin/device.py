"""A GPU computes while Python goes on: copies to and from it that nobody waits for."""

import torch
from torch import Tensor


def computes_ahead(device: torch.device) -> bool:
    """Whether Python goes on while a device computes, and this package knows how to use it."""
    return device.type == "cuda"


def sent(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device, without waiting for what that is computing.

    Memory that is pinned is copied by the GPU itself; any other is first copied by the CPU.
    """
    return pinned(value, device).to(device, non_blocking=True)


def pinned(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU in memory that a device can copy by itself."""
    return value.pin_memory() if computes_ahead(device) and value.is_cpu else value


class Received:
    """Numbers on their way from a device."""

    def __init__(self, numbers: Tensor) -> None:
        """Ask for numbers ``[N]``; on a GPU they are there when what came before is computed."""
        self._event: torch.Event | None = None
        if computes_ahead(numbers.device):
            self._numbers = numbers.to("cpu", non_blocking=True)  # into pinned memory
            self._event = torch.Event(numbers.device)
            self._event.record()
        else:
            self._numbers = numbers.cpu()

    def read(self) -> list[float]:
        """Return them, and wait for as long as they are not there."""
        if self._event is not None:
            self._event.synchronize()
        return list(self._numbers.tolist())

    def __eq__(self, other: object) -> bool:
        """Whether they are the same numbers."""
        return isinstance(other, Received) and self.read() == other.read()
