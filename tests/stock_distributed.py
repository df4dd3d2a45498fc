"""Runs torchtune's unmodified distributed LoRA recipe where there is no GPU.

The recipe asks for NCCL by name and for CUDA's memory counters; only these are swapped.
Start it with torchrun, with the arguments of the recipe.
"""

import runpy

import torch.distributed
from torchtune import training
from torchtune._recipe_registry import get_all_recipes


def main() -> None:
    """Swap what needs CUDA, and run the recipe's file as a script."""
    init = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend: init("gloo")
    training.get_memory_stats = lambda device: {}
    training.log_memory_stats = lambda stats: None
    training.cleanup_before_training = lambda: None
    recipe = next(r for r in get_all_recipes() if r.name == "lora_finetune_distributed")
    root = training.__file__.partition("torchtune/training")[0]
    runpy.run_path(f"{root}recipes/{recipe.file_path}", run_name="__main__")


if __name__ == "__main__":
    main()
