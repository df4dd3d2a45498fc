"""Whether the layers of a run are compiled, where its settings leave that to the machine.

A compiled layer makes a few kernels of dozens that wait for memory, and takes up to a minute to
start. That is worth it on a GPU and for a long run, and needs Triton and a C compiler, which a new
machine often lacks: so something small is compiled first.
"""

import torch
from torch import Tensor

from phi3_plugin.settings import Settings
from phi3_plugin.train.world import World

WORTH = 1000
"""Micro-batches of a process from which on a run gains more than compiling takes.

A compiled one takes a GPU some tenths of a second less.
"""


def compiles(s: Settings, world: World, micro_batches: int) -> tuple[bool, str | None]:
    """Return whether layers are compiled, the same in all processes, and what is said of it.

    Args:
        s: Of the run.
        world: All processes.
        micro_batches: Of the whole run, of one process.
    """
    if s.compile is not None or world.device.type != "cuda":
        return bool(s.compile), None
    if micro_batches < WORTH:
        return False, None
    if s.memory_budget is not None:
        return False, (
            "compile: layers are not compiled, since memory_budget counts what uncompiled ones "
            "keep. compile=True compiles them anyhow."
        )
    problem = trial(world.device)
    if world.totals(problem is not None)[0]:
        return False, (
            "compile: layers are not compiled, so that steps are slower: "
            f"{problem or 'another process cannot'}. Install a C compiler, Python's headers and "
            "Triton, or set compile=False."
        )
    return True, (
        "compile: layers are compiled, so that the first steps take up to a minute longer. "
        "compile=False leaves it out."
    )


def trial(device: torch.device) -> str | None:
    """Compile something small; return why that failed, or None if it did not."""
    try:
        torch.compile(_doubled)(torch.ones(64, device=device))
    except Exception as error:  # of a compiler, a linker, a cache's folder or a driver
        lines = str(error).strip().splitlines()
        return lines[0].rstrip(".") if lines else type(error).__name__
    return None


def _doubled(x: Tensor) -> Tensor:
    return 2 * x
