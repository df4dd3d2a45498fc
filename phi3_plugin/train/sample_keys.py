"""What the keys of transformers' TrainingArguments are here, or why not.

Source: transformers 5.23 TrainingArguments.
"""

from collections.abc import Mapping
from typing import Any

SAME = {
    "output_dir": "output_dir",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "clip_grad_norm",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "seed": "seed",
    "save_total_limit": "save_total_limit",
    "group_by_length": "group_by_length",
    "gradient_checkpointing": "enable_activation_checkpointing",
    "logging_steps": "log_every_n_steps",
    "max_seq_length": "tokenizer.max_seq_len",
    "max_length": "tokenizer.max_seq_len",
    "packing": "dataset.packed",
}
"""Keys whose value is the value of ours."""

ZERO_IS_NULL = ("max_grad_norm", "save_total_limit")
"""Of those the ones where 0 is no limit, which is null here."""

NO_EFFECT = {
    **dict.fromkeys(("log_level", "disable_tqdm", "logging_dir", "run_name"), "it is for the log"),
    **dict.fromkeys(("dataset_text_field", "remove_unused_columns"), "dataset.* chooses columns"),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_pin_memory"), "data is tokenized first"),
    "per_device_eval_batch_size": "validation takes batch_size; its loss is the same",
    "overwrite_output_dir": "a run that is there is never overwritten: name another output_dir",
    "logging_first_step": "every step is logged",
    "data_seed": "seed orders the data",
    "do_train": "the recipe is for training",
}
"""Keys that change nothing of the result here, and why."""

ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "fp16": ((False,), "Its gradients underflow. Use bf16, or fp32 over bnb_config's NF4 base."),
    "tf32": ((False, None), "Remove it."),
    "logging_strategy": (("steps",), 'Use "steps".'),
    "gradient_checkpointing_kwargs": (({"use_reentrant": False}, None), "Use use_reentrant False."),
    "push_to_hub": ((False,), "Push the folder output_dir/final after the run."),
    "deepspeed": ((None,), "Remove it: `tune run --nproc_per_node N` shards the model."),
    "fsdp": ((None, "", []), "Remove it: `tune run --nproc_per_node N` shards the model."),
    "auto_find_batch_size": ((False,), "Set per_device_train_batch_size."),
    "resume_from_checkpoint": ((None, False), "Add resume=auto to the command instead."),
    "neftune_noise_alpha": ((None,), "Remove it."),
    "label_smoothing_factor": ((0, 0.0), "Remove it."),
}
"""Keys that must have one of these values, and what to do about another."""

SCHEDULES = {
    "cosine": "cosine_with_warmup",
    "linear": "linear_with_warmup",
    "constant_with_warmup": "constant_with_warmup",
}

ADAM = {"_component_": "torch.optim.AdamW", "fused": True}
ADAM_8BIT = {"_component_": "torchao.optim.AdamW8bit"}
OPTIMIZERS: dict[str, Mapping[str, Any]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "paged_adamw_32bit"), ADAM),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), ADAM_8BIT),
}

HANDLED = (
    *("bf16", "max_steps", "num_train_epochs", "lr_scheduler_type", "warmup_ratio", "warmup_steps"),
    *("optim", "adam_beta1", "adam_beta2", "save_steps", "save_strategy", "report_to"),
    *("do_eval", "eval_steps", "eval_strategy", "evaluation_strategy"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)
"""Keys that decide together with others."""
