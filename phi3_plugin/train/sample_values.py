"""What values a sample may have: a wrong one is told under the name that it has there."""

from collections.abc import Mapping
from math import inf
from typing import Annotated, Any

from phi3_plugin.train.kinds import (
    REAL,
    Count,
    Kind,
    Positive,
    Section,
    Seed,
    Share,
    Switch,
    Text,
    Texts,
    kinds_of,
)
from phi3_plugin.train.stock_keys import shown

Whole = Annotated[int, Kind("a whole number", lambda v: type(v) is int)]
FromZero = Annotated[float, Kind("a number from 0 on", lambda v: type(v) in REAL and 0 <= v < inf)]
Ratio = Annotated[float, Kind("from 0 to 1", lambda v: type(v) in REAL and 0 <= v <= 1)]
Layers = Annotated[
    list[int],
    Kind(
        "a list of layer numbers, as in [0, 1]",
        lambda v: isinstance(v, list) and all(type(n) is int and n >= 0 for n in v),
    ),
]
# What OmegaConf would replace by a variable of the environment, or take as not set.
Folder = Annotated[
    str, Kind("text without ${ or ???", lambda v: isinstance(v, str) and not _is_special(v))
]

TRAINING: dict[str, Any] = {
    **dict.fromkeys(("bf16", "group_by_length", "gradient_checkpointing", "packing"), Switch),
    **dict.fromkeys(("do_eval", "load_best_model_at_end"), Switch),
    **dict.fromkeys(("max_seq_length", "max_length", "save_steps", "eval_steps"), Count | None),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), Count),
    **dict.fromkeys(("lr_scheduler_type", "optim", "save_strategy"), Text),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), Text),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Share),
    **dict.fromkeys(("weight_decay", "warmup_steps"), FromZero),
    **dict.fromkeys(("learning_rate", "adam_epsilon", "num_train_epochs"), Positive),
    "output_dir": Folder,
    "max_grad_norm": FromZero | None,
    "save_total_limit": Seed | None,
    "logging_steps": Count,
    "max_steps": Whole,
    "seed": Seed,
    "warmup_ratio": Ratio,
    "greater_is_better": Switch | None,
}
PEFT: dict[str, Any] = {
    **dict.fromkeys(("r", "lora_alpha"), Count),
    **dict.fromkeys(("use_rslora", "use_dora"), Switch),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), Section | None),
    "lora_dropout": Share,
    "modules_to_save": Texts | None,
    "target_modules": Text | Texts | None,
    "layers_to_transform": Layers | Seed | None,
    "init_lora_weights": Switch | Text,
}


def wrong_values(given: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, str]:
    """Return the problem of each value that is of no kind that its key allows.

    Args:
        given: What transformers or PEFT take.
        hints: `TRAINING` or `PEFT`; keys that are not there may have any value.
    """
    return {
        key: f"{key}: {shown(value)} must be {' or '.join(kind.words for kind in kinds)}."
        for key, value in given.items()
        if (kinds := kinds_of(hints.get(key, ())))
        and not any(kind.accepts(value) for kind in kinds)
    }


def _is_special(text: str) -> bool:
    return "${" in text or text == "???"
