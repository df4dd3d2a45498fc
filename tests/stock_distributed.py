"""Runs torchtune's unmodified distributed recipes where there is no GPU.

They ask for NCCL by name and for CUDA's memory counters; only these are swapped.
Start it with torchrun, with the name and the arguments of the recipe.
"""

import runpy
import sys

import torch.distributed
from torchtune import training
from torchtune._recipe_registry import get_all_recipes


def main() -> None:
    """Swap what needs CUDA, and run the recipe's file as a script."""
    init = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda *_, **__: init("gloo")
    training.get_memory_stats = lambda device: {}
    training.log_memory_stats = lambda stats, **_: None
    torch.cpu.empty_cache = torch.cpu.reset_peak_memory_stats = lambda: None
    name = sys.argv.pop(1)
    recipe = next(r for r in get_all_recipes() if r.name == name)
    root = training.__file__.partition("torchtune/training")[0]
    runpy.run_path(f"{root}recipes/{recipe.file_path}", run_name="__main__")


if __name__ == "__main__":
    main()
