"""What is wrong with the keys of a training YAML together."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from phi3_plugin.train.stock_keys import shown


def conflicts(given: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with keys that are right by themselves.

    Args:
        given: The whole configuration, resolved.
    """
    section, share = given.get("dataset_val"), given.get("val_fraction")
    problems = []
    if section and share:
        problems.append(f"val_fraction: {shown(share)} conflicts with dataset_val. Keep one.")
    if not section and not share:
        problems += [
            f"{key}: {shown(given[key])} needs validation data. Set dataset_val, or "
            "val_fraction=0.05 to split it off the training set."
            for key in ("run_val_every_n_steps", "early_stop_patience")
            if given.get(key) is not None
        ]
    groups = (_start, _memory_conflicts, _order_conflicts, _optimizer_conflicts)
    return problems + [problem for group in groups for problem in group(given)]


def _start(given: Mapping[str, Any]) -> list[str]:
    adapter, model = given.get("init_adapter"), given.get("model")
    if not isinstance(adapter, str) or not isinstance(model, dict):
        return []
    problems = []
    if not Path(adapter).exists():
        problems.append(f"init_adapter: {adapter!r} is not there. Give the folder of an adapter.")
    if (init := model.get("lora_init")) in ("gaussian", "pissa"):
        problems.append(f"init_adapter: {adapter!r} conflicts with lora_init: {init!r}. Keep one.")
    return problems


def _memory_conflicts(given: Mapping[str, Any]) -> list[str]:
    budget, every = given.get("memory_budget"), given.get("enable_activation_checkpointing")
    problems = []
    if budget is not None and every:
        problems.append(
            f"memory_budget: {shown(budget)} conflicts with enable_activation_checkpointing: "
            f"{shown(every)}. One decides which layers recompute: add "
            "enable_activation_checkpointing=False, or remove the budget."
        )
    if given.get("enable_activation_offloading") is not True:
        return problems
    if given.get("device") == "cpu" or not torch.cuda.is_available():
        problems.append(
            "enable_activation_offloading: True moves what layers keep from a GPU's memory to the "
            "CPU's, and this run is on the CPU. Set it to False."
        )
    if not every:
        problems.append(
            "enable_activation_offloading: True moves what recomputed layers keep; without "
            "recompute it is too much to move. Add enable_activation_checkpointing=True."
        )
    return problems


def _order_conflicts(given: Mapping[str, Any]) -> list[str]:
    if given.get("group_by_length") is not True:
        return []
    problems, dataset = [], given.get("dataset")
    if isinstance(dataset, dict) and dataset.get("packed"):
        problems.append(
            f"group_by_length: True conflicts with dataset.packed: {shown(dataset['packed'])}, "
            "whose packs are of one length. Keep one."
        )
    if given.get("shuffle") is False:
        problems.append("group_by_length: True conflicts with shuffle: False. Keep one.")
    return problems


def _optimizer_conflicts(given: Mapping[str, Any]) -> list[str]:
    ratio, optimizer = given.get("lora_plus_ratio"), given.get("optimizer")
    problems = []
    if not isinstance(optimizer, dict):
        return []  # already said
    if ratio and "lr" not in optimizer:
        problems.append(f"lora_plus_ratio: {shown(ratio)} multiplies optimizer.lr. Set that.")
    component, processes = optimizer.get("_component_"), int(os.environ.get("WORLD_SIZE", 1))
    if str(component).startswith("bitsandbytes.") and given.get("fsdp_replicas", 1) != processes:
        problems.append(
            f"optimizer._component_: {shown(component)} cannot update weights that processes "
            f"share. Set fsdp_replicas={processes}, or use torchao.optim.AdamW8bit."
        )
    return problems
