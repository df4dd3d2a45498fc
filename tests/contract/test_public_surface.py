"""What users hold on to: names, arguments, keys, commands, flags and configs, written down once.

Nothing here is read from the package: a name that goes, or is spelled otherwise, fails. What was
taken out on purpose is in CHANGELOG.md with its migration, and not here.
"""

import importlib
import inspect
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from phi3_plugin import cli
from phi3_plugin.options import EvaluateOptions, GenerateOptions, InspectOptions, Sampling
from phi3_plugin.settings import STOCK_KEYS, Settings

CONFIGS = Path(__file__).parents[2] / "configs"


def words(text: str) -> list[str]:
    return text.split()


LORA = words(
    "lora_attn_modules apply_lora_to_mlp apply_lora_to_output lora_rank lora_alpha lora_dropout "
    "use_dora quantize_base"
)
LORA_OF_A_CHECKPOINT = words(
    "checkpoint_dir use_rslora rank_pattern alpha_pattern layers_to_transform lora_init "
    "apply_lora_to_embedding modules_to_save rope_factors"
)
SCHEDULE = words("optimizer num_training_steps num_warmup_steps warmup_ratio last_epoch")
CALLS = {
    "models.phi3": words("checkpoint_dir rope_factors quantize_base"),
    "models.lora_phi3": LORA + LORA_OF_A_CHECKPOINT,
    "models.qlora_phi3": LORA + LORA_OF_A_CHECKPOINT,
    "models.phi3_mini": [],
    "models.phi3_reward": words("checkpoint_dir rope_factors"),
    "models.lora_phi3_mini": LORA,
    "models.qlora_phi3_mini": LORA,
    "models.loralib.mark_only_lora_as_trainable": words("model bias"),
    "models.loralib.lora_state_dict": words("model bias"),
    "models.loralib.load_lora_state_dict": [],
    "models.loralib.layers": [],
    "models.loralib.Conv2d": [],
    "data.phi3_tokenizer": words("path max_seq_len pad special_in_text dropped add_tokens"),
    "data.chat_dataset": words(
        "tokenizer source format columns split subset streaming filter max_samples tool_calls "
        "system_prompt train_on truncate add_eos bad_rows group_by held_out part seed packed "
        "split_documents cache_dir"
    ),
    "data.preference_dataset": words(
        "tokenizer source format columns prompt split subset streaming filter max_samples roles "
        "tool_calls thoughts system_prompt truncate add_eos bad_rows group_by held_out part seed "
        "packed cache_dir"
    ),
    "data.text_dataset": words(
        "tokenizer source column split subset streaming filter max_samples overlap special_in_text "
        "group_by bad_rows held_out part seed packed cache_dir"
    ),
    "data.ChatDataset": [],
    "data.Phi3Tokenizer": [],
    "data.collate.concatenate": words("batch padding_idx"),
    "data.collate.pad_right": words("batch padding_idx ignore_idx"),
    "data.collate.pad_left": words("batch padding_idx ignore_idx"),
    "checkpoint.Phi3Checkpointer": words(
        "checkpoint_dir output_dir layout lora_attn_modules lora_dropout card "
        "save_adapter_weights_only should_load_recipe_state model_type"
    ),
    "train.cosine_with_warmup": SCHEDULE,
    "train.linear_with_warmup": SCHEDULE,
    "train.constant_with_warmup": SCHEDULE,
    "train.DiskLogger": words("output_dir"),
    "train.losses.sft": words("label_smoothing"),
    "train.losses.distill": words("kd_ratio temperature"),
    "train.losses.dpo": words("beta form label_smoothing rpo_alpha"),
    "train.losses.simpo": words("beta gamma label_smoothing"),
    "train.losses.orpo": words("beta"),
    "train.losses.kto": words("beta desirable_weight undesirable_weight"),
    "load.load": words("checkpoint_dir adapter dtype device quantize check_base sharing"),
}
"""Names within phi3_plugin that a YAML or a program says, and arguments that it passes by name."""

FORMATS = words(
    "messages sharegpt preference alpaca question_answer query_response prompt_response "
    "prompt_completion instruction_response input_output text"
)
"""Of ``dataset.format``."""

SAMPLING = words(
    "max_new_tokens temperature top_k top_p min_p repetition_penalty seed max_time stop"
)
KEYS = {
    Settings: words(
        "checkpoint_dir output_dir model tokenizer dataset dataset_val val_fraction batch_size "
        "gradient_accumulation_steps collate_fn shuffle group_by_length seed init_adapter epochs "
        "max_steps optimizer lr_scheduler lora_plus_ratio clip_grad_norm max_nonfinite_steps "
        "dtype adapter_dtype device compile enable_activation_checkpointing memory_budget "
        "enable_activation_offloading fsdp_cpu_offload fsdp_reshard_after_forward fsdp_replicas "
        "save_every_n_steps save_every_epoch save_total_limit save_in_background resume "
        "checkpointer run_val_every_n_steps early_stop_patience keep_best metric_logger "
        "log_every_n_steps sample_prompts sample_max_new_tokens plan report prove "
        "push_to_hub loss reference neftune_alpha teacher_dir teacher_adapter teacher_quantized"
    ),
    EvaluateOptions: words(
        "adapter check_base answers generation generation_batch_size max_samples worst overwrite"
    ),
    InspectOptions: words("samples processes compare"),
    GenerateOptions: words(
        "checkpoint_dir adapter dtype device quantize system prompts output overwrite raw "
        "batch_size dropped hide_thoughts"
    )
    + SAMPLING,
    Sampling: SAMPLING,
}
"""Keys of YAMLs, by the dataclass that reads them; ``generation`` holds those of Sampling."""

OF_TORCHTUNE = words(
    "max_steps_per_epoch resume_from_checkpoint save_adapter_weights_only optimizer_in_bwd "
    "log_peak_memory_stats low_cpu_ram cudnn_deterministic_mode custom_sharded_layers"
)
"""Keys of torchtune's recipes that ours takes where they mean nothing."""

ANSWERED = words(
    "--base --checkpoint-dir --adapter --dtype --device --quantize --system --max-new-tokens "
    "--temperature --top-k --top-p --min-p --repetition-penalty --seed --max-time --stop "
    "--hide-thoughts"
)
MADE = words("adapter --base --checkpoint-dir -o --output --alpha --enable-lora")
COMMANDS = {
    "generate": ANSWERED
    + words("prompt --file --prompts -o --output --overwrite --raw --batch-size --dropped"),
    "chat": ANSWERED,
    "adapter check": words("adapter --base --checkpoint-dir --runtime --json --dtype"),
    "adapter convert": [*MADE, *words("--to --merged-linear")],
    "adapter merge": [*MADE, *words("--onto --dtype --to --type")],
    "adapter import": [*MADE, "--rank"],
    "convert-base": words("checkpoint_dir --to --type -o --output"),
    "import-config": words("sample -o --output --targets"),
    "train": words(
        "source keys --base --checkpoint-dir -o --output --epochs --lr --qlora --config "
        "--print-config --nproc-per-node"
    ),
    "download": words("name -o --output --output-dir"),
    "push": words("folder name --private"),
}
"""`phi3-tune`: what is typed by its place or as a flag."""

CHOICES = {
    ("adapter check", "runtime"): words("PEFT vLLM llama.cpp"),
    ("adapter check", "dtype"): words("bf16 fp32"),
    ("adapter convert", "to"): words("peft peft-patterns torchtune loralib gguf mlx onnx"),
    ("adapter merge", "onto"): words("original nf4"),
    ("adapter merge", "dtype"): words("bf16 fp32"),
    ("adapter merge", "to"): words("hf gguf onnx"),
    ("adapter merge", "type"): words("f16 bf16 q8_0 q4_0"),
    ("convert-base", "to"): words("gguf onnx"),
    ("convert-base", "type"): words("f16 bf16 q8_0 q4_0"),
    ("import-config", "targets"): words("as-published as-intended as-intended-parts"),
    ("generate", "dtype"): words("bf16 fp16 fp32"),
    ("generate", "dropped"): words("error warn"),
}

VERBS = words("download ls cp run validate cat inspect-data evaluate")
"""The others of `phi3-tune`."""

RECIPES = words("phi3_lora_finetune phi3_evaluate phi3_generate phi3_adapter phi3_inspect_data")
"""Names for `tune run`."""

OF_ALL_RUNS = words(
    "checkpoint_dir output_dir dataset._component_ dataset.source model._component_ "
    "model.checkpoint_dir tokenizer._component_ tokenizer.max_seq_len tokenizer.path batch_size "
    "gradient_accumulation_steps epochs shuffle seed optimizer._component_ optimizer.lr "
    "optimizer.weight_decay lr_scheduler._component_ clip_grad_norm device dtype compile"
)
OF_LORA = words(
    "model.lora_attn_modules model.apply_lora_to_mlp model.apply_lora_to_output model.lora_rank "
    "model.lora_alpha model.lora_dropout"
)
OF_STOCK = words(
    "checkpointer._component_ checkpointer.checkpoint_dir checkpointer.output_dir "
    "checkpointer.lora_dropout checkpointer.save_adapter_weights_only save_adapter_weights_only "
    "resume_from_checkpoint max_steps_per_epoch loss._component_ metric_logger._component_ "
    "metric_logger.output_dir"
)
OF_REAL_RUNS = words("optimizer.fused lr_scheduler.warmup_ratio enable_activation_checkpointing")
FOR_TUNE = (
    OF_ALL_RUNS
    + OF_LORA
    + OF_STOCK
    + OF_REAL_RUNS
    + words("checkpointer.card checkpointer.model_type log_peak_memory_stats")
)
FOR_OURS = OF_ALL_RUNS + OF_REAL_RUNS
SINGLE = FOR_OURS + OF_LORA
FOR_LONG = [*FOR_TUNE, "model.rope_factors"]
MANY = [*SINGLE, "fsdp_replicas"]
FILES = {
    **dict.fromkeys(
        words(
            "phi3_mini_lora phi3_mini_qlora phi3_medium_4k_lora phi3_medium_4k_qlora phi4_lora "
            "phi4_qlora"
        ),
        FOR_TUNE,
    ),
    **dict.fromkeys(
        words(
            "phi3_mini_128k_lora phi3_mini_128k_qlora phi3_medium_128k_lora "
            "phi3_medium_128k_qlora phi3_5_mini_lora phi3_5_mini_qlora phi4_mini_lora "
            "phi4_mini_qlora"
        ),
        FOR_LONG,
    ),
    **dict.fromkeys(words("phi3_mini_lora_1gpu phi3_mini_qlora_1gpu"), SINGLE),
    **dict.fromkeys(words("phi3_mini_lora_8gpu phi3_mini_qlora_8gpu"), MANY),
    "phi3_mini_full_8gpu": FOR_OURS,
    "phi3_mini_text": [*FOR_OURS, *words("tokenizer.max_seq_len dataset.overlap dataset.packed")],
    "phi3_mini_dpo": [*FOR_TUNE, "loss.beta"],
    "phi3_mini_distill": FOR_TUNE
    + words(
        "teacher_dir teacher_quantized teacher_model.checkpoint_dir "
        "teacher_checkpointer.checkpoint_dir kd_loss._component_ kd_ratio"
    ),
    "phi3_demo": [*OF_ALL_RUNS, *OF_LORA, *OF_STOCK, "lr_scheduler.num_warmup_steps"],
    "phi3_generate": KEYS[GenerateOptions],
    "phi3_adapter": words(
        "verb adapter checkpoint_dir output_dir to merged_linear runtime json dtype onto alpha "
        "enable_lora rank type"
    ),
}
"""Configs by the stem of their file, and the keys that each has."""


@pytest.mark.parametrize("name", CALLS)
def test_names_and_arguments(name):
    module, _, attribute = name.rpartition(".")
    component = getattr(importlib.import_module(f"phi3_plugin.{module}"), attribute)
    parameters = inspect.signature(component).parameters
    assert set(CALLS[name]) <= set(parameters)


def test_formats_of_rows():
    from phi3_plugin.data.formats import FORMATS as ours

    assert set(FORMATS) <= set(ours)


@pytest.mark.parametrize("reader", KEYS, ids=lambda reader: reader.__name__)
def test_keys(reader):
    assert is_dataclass(reader)
    assert set(KEYS[reader]) <= {field.name for field in fields(reader)}


def test_keys_of_torchtune():
    assert set(OF_TORCHTUNE) <= set(STOCK_KEYS)


def test_commands_and_flags():
    top, verbs = cli.parsers()
    for command, typed in COMMANDS.items():
        actions = verbs[command]._actions
        known = {flag for action in actions for flag in action.option_strings or [action.dest]}
        assert set(typed) <= known, command
    for (command, key), choices in CHOICES.items():
        (action,) = (action for action in verbs[command]._actions if action.dest == key)
        assert set(choices) <= set(action.choices), (command, key)
    listed = top.format_help()
    assert all(f"    {verb}" in listed for verb in VERBS)


def test_recipes():
    from torchtune._recipe_registry import get_all_recipes

    assert set(RECIPES) <= {recipe.name for recipe in get_all_recipes()}


@pytest.mark.parametrize("name", FILES)
def test_configs_and_their_keys(name):
    given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text("utf-8"))
    sections = {key: value for key, value in given.items() if isinstance(value, dict)}
    nested = {f"{key}.{inner}" for key, section in sections.items() for inner in section}
    assert set(FILES[name]) <= {*given, *nested}
