"""What torchtune's own recipes cannot do with our parts, said before the first step.

A recipe that is copied and changed is judged as well, so what it can do is read from its source.
"""

import functools
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchao import quantization

from phi3_plugin.config import checkpoint_folder, read_config
from phi3_plugin.data.vocabulary import first_difference, read_vocabulary
from phi3_plugin.errors import ConfigError
from phi3_plugin.settings import CHAT_DATASETS, LOSSES, PREFERENCE_DATASETS

_OPTIMIZER_ALONE = re.compile(r"load_from_full_optimizer_state_dict\(\s*optimizer,")
"""A call of torchtune's as it was before the model came first."""

Recipe = Callable[[DictConfig], Any]


MERGE = "get_merged_lora_ckpt"
"""What a recipe calls to merge an adapter for a checkpoint."""


def _unmerged(state_dict: Mapping[str, Any], **_: Any) -> dict[str, Any]:
    return {}


def checked(recipe_main: Recipe) -> Recipe:
    """Return a recipe's main function that refuses settings with which it would fail or mislead."""

    @functools.wraps(recipe_main)
    def main(cfg: DictConfig) -> Any:
        file = Path(recipe_main.__code__.co_filename)
        given = OmegaConf.to_container(cfg, resolve=False)
        if "phi3_plugin." in str(given) and file.is_file():
            source = file.read_text(encoding="utf-8")
            if found := problems(source, cfg):
                raise ConfigError("\n".join(f"{file.stem}: {problem}" for problem in found))
            if _is_ours(cfg, "checkpointer") and MERGE in recipe_main.__globals__:
                # Those of distillation merge whatever they are told: on a CPU into the weights that
                # are still being trained. Our checkpointer takes what was trained alone.
                recipe_main.__globals__[MERGE] = _unmerged
        return recipe_main(cfg)

    return main


def problems(source: str, cfg: Mapping[str, Any]) -> list[str]:
    """Return what a recipe would do wrong, one line each.

    Args:
        source: Of the recipe.
        cfg: Its settings.
    """
    found = []
    quantizer, model = cfg.get("quantizer"), cfg.get("model") or {}
    if "init_process_group(" in source and _lacks_counters(cfg.get("device")):
        found.append(
            "device: the recipe asks a GPU how much memory it uses, and ends with an error on a "
            "CPU. Use a recipe for a single device or, for several processes, phi3_lora_finetune."
        )
    is_int4 = str((quantizer or {}).get("_component_")).endswith(".Int4WeightOnlyQuantizer")
    if is_int4 and quantization.int4_weight_only.__module__.startswith("phi3_plugin."):  # our stub
        found.append(
            "quantizer: Int4WeightOnlyQuantizer needs torchao below 0.16. Use torchtune.training."
            "quantization.Int8DynActInt4WeightQuantizer, or `phi3-tune convert-base --to gguf`."
        )
    if _is_ours(cfg, "checkpointer"):
        merges = MERGE in source
        if merges and not cfg.get("save_adapter_weights_only", False):
            found.append(
                "save_adapter_weights_only is not True. The recipe then merges the adapter, on a "
                "CPU into the weights that are still being trained, and Phi3Checkpointer does not "
                "write merged weights. Add save_adapter_weights_only=True, and merge the saved "
                "adapter with `phi3-tune adapter merge`."
            )
        if "enable_async_checkpointing" in source and cfg.get("enable_async_checkpointing"):
            found.append(
                "enable_async_checkpointing: True would save folders that are no Hugging Face "
                "checkpoints, and that no resume finds. Set it to False."
            )
    for key in ("reward_checkpointer", "value_checkpointer"):
        if key in source and _is_ours(cfg, key) and cfg[key].get("model_type") != "REWARD":
            found.append(
                f"{key}.model_type: {cfg[key].get('model_type')!r}, but the recipe gives it a "
                "reward model. Set it to REWARD, and checkpoint_dir to the folder of a "
                "Phi3ForSequenceClassification."
            )
    folders = [
        str(cfg[key].get("output_dir"))
        for key in ("checkpointer", "value_checkpointer")
        if key in source and cfg.get(key)
    ]
    if "value_checkpointer" in source and len(folders) > len({*folders}):
        found.append(
            f"value_checkpointer.output_dir: {folders[0]} is that of the policy, and both models "
            "are saved as epoch_0. Give it another folder."
        )
    compares = 'version("lm-eval") < "0.4.5"' in source
    if compares and find_spec("lm_eval") and version("lm_eval") < "0.4.5":
        found.append(
            f"the recipe compares the version of lm_eval, {version('lm_eval')}, with 0.4.5 as a "
            "text and takes it for an older one. Use lm_eval by itself: docs/lm_eval.md."
        )
    exits = "early_exit_loss(" in source and cfg.get("early_exit_loss")
    if exits and cfg.get("fsdp_reshard_after_forward", True):
        found.append(
            "early_exit_loss: the recipe computes it from weights that are sharded again by then. "
            "Add fsdp_reshard_after_forward=False."
        )
    if cfg.get("resume_from_checkpoint") and _OPTIMIZER_ALONE.search(source):
        found.append(
            "resume_from_checkpoint: the recipe loads its optimizer without naming the model, and "
            "ends in a TypeError. Start anew with checkpoint_dir set to the newest epoch's folder."
        )
    name = str((cfg.get("dataset") or {}).get("_component_"))
    if "padded_collate_dpo" in source and name in CHAT_DATASETS:
        found.append(
            "dataset: phi3_plugin.data.chat_dataset gives one answer a row, but the recipe "
            "compares two. Use dataset._component_=phi3_plugin.data.preference_dataset."
        )
    if "value_checkpointer" in source and name in (*CHAT_DATASETS, *PREFERENCE_DATASETS):
        found.append(
            f"dataset: the rows of {name} end in answers, and the recipe wants prompts to answer. "
            "Use torchtune.datasets.text_completion_dataset with a column of prompts as the "
            "chat template writes them, and add_eos=False."
        )
    if "padded_collate_sft" in source and name in PREFERENCE_DATASETS:
        found.append(
            "dataset: phi3_plugin.data.preference_dataset gives two answers a row, and the recipe "
            "compares none. Use phi3_lora_finetune, or dataset._component_="
            "phi3_plugin.data.chat_dataset to learn the chosen ones."
        )
    found += _other_vocabulary(cfg) if "teacher_checkpointer" in source else []
    loss = str((cfg.get("loss") or {}).get("_component_"))
    if "instantiate(cfg.loss)" in source and loss.startswith(LOSSES):
        compares = "padded_collate_dpo" in source
        theirs = "rlhf.loss.DPOLoss" if compares else "modules.loss.CEWithChunkedOutputLoss"
        found.append(
            f"loss: the recipe takes torchtune's losses. Use torchtune.{theirs}, or "
            "phi3_lora_finetune."
        )
    adds = _is_ours(cfg, "tokenizer") and cfg["tokenizer"].get("add_tokens")
    if adds and "_setup_optimizer" in source:
        found.append(
            "tokenizer.add_tokens: the recipe trains and saves no rows for new tokens. Remove the "
            "key, or use phi3_lora_finetune."
        )
    if not _is_ours(cfg, "model"):
        return found
    trains_adapters = "get_adapter_params" in source
    if trains_adapters and model.get("use_dora") and "initialize_dora_magnitude" not in source:
        found.append(
            "model.use_dora: the recipe never sets the magnitudes, so that the model would start "
            "from zeros. Set it to False, or train DoRA with phi3_lora_finetune."
        )
    if "_setup_optimizer" in source and not trains_adapters and model.get("quantize_base"):
        found.append(
            "model.quantize_base: weights in NF4 cannot be trained, and the recipe trains all. Set "
            "it to False, or train adapters."
        )
    if "swap_lora_linear_with_qat" in source:
        found.append(
            "the recipe puts torchtune's QATLoRALinear in place of our layers, which torchao "
            "0.13 and later refuse to build. Use qat_distributed, or QLoRA with phi3_lora_finetune."
        )
    elif quantizer and "QAT" in str(quantizer.get("_component_")):
        found += _unquantized(quantizer, model)
    is_split = cfg.get("tensor_parallel_dim", 1) > 1 or "tensor_parallel_dim" not in source
    if "tensor_parallel_plan" in source and is_split:
        found.append(
            "tensor_parallel_plan: torchtune's plans split q_proj, k_proj and v_proj, which are "
            "one layer here, and pass over what they do not know. Use tensor_parallel_dim=1, or "
            "phi3_generate."
        )
    return found


def _lacks_counters(device: str | None) -> bool:
    is_cpu = device == "cpu" or not torch.accelerator.is_available()
    return is_cpu and not hasattr(torch.cpu, "empty_cache")


def _other_vocabulary(cfg: Mapping[str, Any]) -> list[str]:
    """Say that what student and teacher predict cannot be compared."""
    sections = [cfg.get(key) or {} for key in ("checkpointer", "teacher_checkpointer")]
    folders = [section.get("checkpoint_dir") for section in sections]
    if not all(_is_ours(cfg, key) for key in ("checkpointer", "teacher_checkpointer")):
        return []
    if None in folders:
        return []  # which the checkpointer refuses
    folders = [checkpoint_folder(folder) for folder in folders]
    sizes = [read_config(folder).vocab_size for folder in folders]
    ours, theirs = (read_vocabulary(folder).backend.get_vocab() for folder in folders)
    difference = first_difference(ours, theirs)
    if sizes[0] != sizes[1]:
        difference = f"the student predicts {sizes[0]:,} tokens and the teacher {sizes[1]:,}"
    if difference is None:
        return []
    return [
        f"teacher_checkpointer.checkpoint_dir: {folders[1]} has another vocabulary: {difference}. "
        "Use a teacher with the student's."
    ]


def _is_ours(cfg: Mapping[str, Any], key: str) -> bool:
    return str((cfg.get(key) or {}).get("_component_")).startswith("phi3_plugin.")


def _unquantized(quantizer: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """Say that torchao would pass over layers whose width its groups do not divide."""
    group, folder = quantizer.get("groupsize", 256), model.get("checkpoint_dir")
    if folder is None or quantizer.get("padding_allowed"):
        return []
    config = read_config(folder)
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    return [
        f"quantizer.groupsize: {group} does not divide {name} {size} of {folder}: the layers of "
        "that width would not be quantized, without a word. Use a smaller one."
        for name, size in sizes.items()
        if size % group
    ]
