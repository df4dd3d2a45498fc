"""Every recipe that torchtune lists, with our parts: it ends in what a user needs, or in one line.

They run unmodified in this process, distributed ones as a group of one. In two processes, as a
user starts them, they are `exhaustive`.
"""

import json
import os
import re
import sys
from fnmatch import fnmatch
from importlib import metadata
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from omegaconf import OmegaConf
from torchtune import training
from torchtune._recipe_registry import get_all_recipes
from torchtune.modules.peft import LoRALinear, QATLoRALinear
from torchtune.training.quantization import (
    Int8DynActInt4WeightQATQuantizer,
    Int8DynActInt4WeightQuantizer,
)
from transformers import AutoConfig, Phi3ForCausalLM, Phi3ForSequenceClassification

from phi3_plugin.checkpoint import Phi3Checkpointer
from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.errors import CheckpointError, ConfigError
from phi3_plugin.models import phi3, phi3_reward
from phi3_plugin.models.lora_settings import TARGETS
from phi3_plugin.train import stock_recipes
from tests.adapters import load_adapter
from tests.chosen import EVERYTHING
from tests.oracles import MINI_4K, hf_model, save_checkpoint, tiny_phi4_mini
from tests.own import BATCH, WORDS, peft_agrees, same_weights
from tests.stock import check_checkpoint, stock_module, torchrun_stock

PAGE = Path(__file__).parents[2] / "docs" / "torchtune.md"
PPO_RECIPE = "ppo_full_finetune_single_device"
EARLY_EXIT_RECIPE = "dev/early_exit_finetune_distributed"
QUESTION = "Add: one plus two"

PHI3 = {"_component_": "phi3_plugin.models.phi3", "checkpoint_dir": "base"}
LORA = {
    "_component_": "phi3_plugin.models.lora_phi3",
    "checkpoint_dir": "base",
    "lora_attn_modules": [*TARGETS],
    "apply_lora_to_mlp": True,
    "lora_rank": 16,
    "lora_alpha": 32,
}
CHECKPOINTER = {
    "_component_": "phi3_plugin.checkpoint.Phi3Checkpointer",
    "checkpoint_dir": "base",
    "output_dir": "out",
    "model_type": "PHI3_MINI",
}
TRAIN = {
    "output_dir": "out",
    "model": PHI3,
    "tokenizer": {
        "_component_": "phi3_plugin.data.phi3_tokenizer",
        "path": "base",
        "max_seq_len": 96,
    },
    "dataset": {"_component_": "phi3_plugin.data.chat_dataset", "source": "rows.jsonl"},
    "checkpointer": CHECKPOINTER,
    "resume_from_checkpoint": False,
    "save_adapter_weights_only": True,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "epochs": 2,
    "max_steps_per_epoch": 2,
    "shuffle": True,
    "seed": 0,
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 5e-3},
    "optimizer_in_bwd": False,
    "lr_scheduler": {
        "_component_": "phi3_plugin.train.cosine_with_warmup",
        "num_warmup_steps": 1,
    },
    "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
    "clip_grad_norm": None,
    "device": "cpu",
    "dtype": "fp32",
    "compile": False,
    "metric_logger": {"_component_": "phi3_plugin.train.DiskLogger", "output_dir": "out"},
    "log_every_n_steps": 1,
    "log_peak_memory_stats": False,
    "enable_activation_checkpointing": True,
    "enable_activation_offloading": False,
    "custom_sharded_layers": None,
}
PAIRS = {
    "dataset": {"_component_": "phi3_plugin.data.preference_dataset", "source": "pairs.jsonl"},
    "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1},
}
QAT = {
    "quantizer": {
        "_component_": "torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer",
        "groupsize": 32,
    }
}
(WRITTEN,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
NAMES = {"Phi-3-mini-4k": "base", "my_reward": "reward", "my_prompts": "prompts", "512": "96"}
PPO = {
    **yaml.safe_load(re.sub("|".join(NAMES), lambda name: NAMES[name[0]], WRITTEN)),
    "model": None,
    "loss": {
        "_component_": "torchtune.rlhf.loss.PPOLoss",
        "epsilon": 0.2,
        "value_coeff": 0.1,
        "value_clip_range": 0.2,
    },
    "batch_size": 4,
    "num_steps": 16,
    "ppo_epochs": 1,
    "ppo_batch_size": 4,
    "forward_batch_size": 2,
    "max_generated_tokens": 8,
    "temperature": 0.7,
    "top_k": None,
    "enable_kv_cache": True,
    "min_response_length": 2,
    "penalise_no_eos": True,
    "reward_penalty": -3,
    "whiten_rewards": False,
    "gamma": 1,
    "lmbda": 0.95,
    "kl_coeff": 0.01,
}
EARLY_EXIT = {
    "loss": {"_component_": "torch.nn.CrossEntropyLoss"},
    "early_exit_loss": {
        "scale": 0.5,
        "curriculum": "torchtune.modules.early_exit_loss.RotationalEarlyExitCurriculum",
    },
    "layer_dropout": {"prob": 0.3, "layers": ":"},
    "fsdp_reshard_after_forward": False,
}
SEVERAL_SETS = {
    "dataloader": {
        "shuffle": True,
        "collate_fn": "torchtune.data.padded_collate_sft",
        "num_workers": 0,
        "pin_memory": False,
    },
    "datasets": [
        {
            "source": "json",
            "data_files": "rows.jsonl",
            "split": "train",
            "transform": {"_component_": "torchtune.data.OpenAIToMessages"},
            "weight": weight,
        }
        for weight in (0.7, 0.3)
    ],
}
ANSWER = {
    "prompt": {"system": None, "user": QUESTION},
    "max_new_tokens": 12,
    "temperature": 1.0,
    "top_k": 1,
    "enable_kv_cache": True,
    "quantizer": None,
    "log_level": "INFO",
}
INT8_INT4 = {
    "quantizer": {
        "_component_": "torchtune.training.quantization.Int8DynActInt4WeightQuantizer",
        "groupsize": 32,
    }
}
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
TENSOR_PARALLEL = {
    **ANSWER,
    "tensor_parallel_plan": {"_component_": "torchtune.models.llama3.base_llama_tp_plan"},
}

ADAPTERS = {
    "lora_finetune_single_device": {"model": LORA},
    "lora_finetune_distributed": {"model": LORA},
    "lora_dpo_single_device": {"model": LORA, **PAIRS},
    "lora_dpo_distributed": {"model": LORA, **PAIRS},
    "dev/lora_finetune_distributed_multi_dataset": {"model": LORA, **SEVERAL_SETS},
}
"""End in a folder that PEFT loads."""

WHOLE = {
    "full_finetune_single_device": {},
    "full_finetune_distributed": {},
    "full_dpo_distributed": {**PAIRS, "ref_checkpointer": CHECKPOINTER},
    "qat_distributed": QAT,
    EARLY_EXIT_RECIPE: EARLY_EXIT,
    PPO_RECIPE: PPO,
}
"""End in a folder that transformers loads."""

REFUSED = {
    "qat_lora_finetune_distributed": ({"model": LORA, **QAT}, "Use qat_distributed, or QLoRA"),
    "dev/generate_v2_distributed": (TENSOR_PARALLEL, "or phi3_generate"),
}
"""Cannot work; what is refused, and what is said of it."""

ANSWERING = {"generate", "dev/generate_v2"}
WITH_TESTS_BELOW = {"quantize", "eleuther_eval"}
ELSEWHERE = {"knowledge_distillation_single_device", "knowledge_distillation_distributed"}
"""Tested with the loss of distillation, in test_distillation.py."""

NO_RESUME = {EARLY_EXIT_RECIPE, PPO_RECIPE}
"""One cannot, the other is resumed with its value model below."""

DISTRIBUTED = [name for name in (*ADAPTERS, *WHOLE) if "distributed" in name]


def save_reward(base, folder):
    """Write a random reward model with the base's sizes, as transformers saves one."""
    config = AutoConfig.from_pretrained(base)
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = Phi3ForSequenceClassification(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(base / name)
    return folder


@pytest.fixture(scope="module")
def reward(inputs, tmp_path_factory):
    return save_reward(inputs / "base", tmp_path_factory.mktemp("trl") / "reward")


@pytest.fixture(scope="module")
def tied(inputs, tmp_path_factory):
    """A tiny Phi-4-mini, whose head is its embedding, and a reward model of its sizes."""
    folder = tmp_path_factory.mktemp("tied")
    others = {"vocab_size": 448, "intermediate_size": 512, "num_hidden_layers": 2}
    positions = {"max_position_embeddings": 256, "original_max_position_embeddings": 128}
    sizes = {**tiny_phi4_mini(256, 12), **others, **positions}
    save_checkpoint(hf_model(MINI_4K, **sizes), MINI_4K, folder / "base", **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / "base" / name).write_bytes((inputs / "base" / name).read_bytes())
    save_reward(folder / "base", folder / "reward")
    return folder


@pytest.fixture
def cwd(cwd, reward, monkeypatch):
    """A folder with base, reward model, chats, pairs and prompts, and this process in it."""
    (cwd / "reward").symlink_to(reward)
    questions = [f"Add: {one} plus {two}" for one in WORDS[2:] for two in WORDS[2:5]]
    written = {
        "pairs.jsonl": [{"prompt": q, "chosen": "two", "rejected": "one six"} for q in questions],
        "prompts.jsonl": [
            {"prompt": f"<|user|>\n{q}<|end|>\n<|assistant|>\n"} for q in questions[:8]
        ],
    }
    for name, rows in written.items():
        (cwd / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    monkeypatch.chdir(cwd)
    return cwd


@pytest.fixture
def run(cwd, monkeypatch):
    """Run a recipe in this process, in that folder."""
    # A CPU has no counters of memory, and torchtune asks it
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cpu, name, lambda: None, raising=False)
    monkeypatch.setattr(training, "get_memory_stats", lambda device: {})
    monkeypatch.setattr(training, "log_memory_stats", lambda stats: None)
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "-", "MASTER_PORT": 1}

    def run(recipe: str, keys: dict) -> None:
        module = stock_module(recipe)
        if "distributed" in recipe:
            for name, value in alone.items():
                monkeypatch.setenv(name, str(value))
            store = dist.FileStore(str(cwd / "store"), 1)
            init = dist.init_process_group
            monkeypatch.setattr(
                module,
                "init_process_group",
                lambda *_, **__: init("gloo", store=store, rank=0, world_size=1),
                raising=False,
            )
        write(cwd, keys)
        monkeypatch.setattr(sys, "argv", [recipe, "--config", "recipe.yaml"])
        main = getattr(module, "recipe_main", None) or module.main
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        assert not ended.value.code

    return run


def write(cwd, keys):
    OmegaConf.save(OmegaConf.create({**TRAIN, **keys}), cwd / "recipe.yaml")


def of_torchtune():
    return {r.name: r for r in get_all_recipes() if not os.path.isabs(r.file_path)}


def test_the_lists_here_and_in_the_documentation_are_torchtunes():
    here = {*ADAPTERS, *WHOLE, *REFUSED, *ANSWERING, *WITH_TESTS_BELOW, *ELSEWHERE}
    assert here == of_torchtune().keys()
    (table,) = re.findall(r"^\| recipe \|.*?\n\n", PAGE.read_text("utf-8"), re.M | re.S)
    firsts = [line.split("|")[1] for line in table.split("\n")[2:] if line]
    patterns = re.findall(r"`(.+?)`", "".join(firsts))
    documented = [name for name in here for pattern in patterns if fnmatch(name, pattern)]
    assert sorted(documented) == sorted(here)  # each in one row
    assert all(any(fnmatch(name, pattern) for name in here) for pattern in patterns)


@pytest.mark.parametrize("recipe", ADAPTERS)
def test_it_ends_in_an_adapter_that_peft_loads(run, cwd, recipe):
    run(recipe, ADAPTERS[recipe])
    assert peft_agrees(cwd, cwd / "out" / "epoch_1") > 1e-3


@pytest.mark.parametrize("recipe", WHOLE)
def test_it_ends_in_a_model_that_transformers_loads(run, cwd, recipe):
    run(recipe, WHOLE[recipe])
    folders = sorted(path.name for path in (cwd / "out").glob("epoch_*"))
    check_checkpoint(cwd / "out" / folders[-1], cwd / "base", BATCH, moved=1e-3)
    assert folders == ["epoch_0", "epoch_1"]


def check_end(cwd, recipe):
    """Check that a run has trained, and ended in what others compute the same of."""
    if recipe in ADAPTERS:
        assert peft_agrees(cwd, cwd / "out" / "epoch_1") > 1e-3
    else:
        check_checkpoint(cwd / "out" / "epoch_1", cwd / "base", BATCH, moved=1e-3)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", [*ADAPTERS, *WHOLE])
def test_it_does_so_with_a_tied_head(run, cwd, tied, recipe):
    for name in ("base", "reward"):
        (cwd / name).unlink()
        (cwd / name).symlink_to(tied / name)
    run(recipe, {**ADAPTERS, **WHOLE}[recipe])
    check_end(cwd, recipe)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", [name for name in (*ADAPTERS, *WHOLE) if name not in NO_RESUME])
def test_it_goes_on_from_an_epoch(run, cwd, recipe):
    keys = {**ADAPTERS, **WHOLE}[recipe]
    run(recipe, keys)
    (cwd / "out").rename(cwd / "first")
    (cwd / "out").mkdir()
    (cwd / "first" / "epoch_0").rename(cwd / "out" / "epoch_0")
    run(recipe, {**keys, "resume_from_checkpoint": True})
    load = load_adapter if recipe in ADAPTERS else load_base_weights
    again, whole = (load(cwd / name / "epoch_1") for name in ("out", "first"))
    if "multi_dataset" in recipe:  # it begins the data anew
        assert again.keys() == whole.keys()
    else:
        same_weights(again, whole)


def test_a_resume_that_torchtune_cannot_do_is_refused(run, cwd):
    with pytest.raises(ConfigError, match="ends in a TypeError"):
        run(EARLY_EXIT_RECIPE, {**EARLY_EXIT, "resume_from_checkpoint": True})


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", ["full_finetune_single_device", PPO_RECIPE])
def test_the_optimizer_in_the_backward_pass(run, cwd, recipe):
    run(recipe, {**WHOLE[recipe], "optimizer_in_bwd": True, "lr_scheduler": None})
    check_checkpoint(cwd / "out" / "epoch_1", cwd / "base", BATCH, moved=1e-3)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "recipe", [name for name in (*ADAPTERS, *WHOLE) if name != "qat_distributed"]
)
def test_compiled(run, cwd, recipe, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    run(recipe, {**ADAPTERS, **WHOLE}[recipe] | {"compile": True})
    check_end(cwd, recipe)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", DISTRIBUTED)
def test_it_does_so_in_two_processes(cwd, recipe):
    write(cwd, {**ADAPTERS, **WHOLE}[recipe])
    done = torchrun_stock("--config", "recipe.yaml", cwd=cwd, recipe=recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    check_end(cwd, recipe)


@pytest.mark.parametrize("recipe", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(run, cwd, recipe):
    keys, advice = REFUSED[recipe]
    with pytest.raises(ConfigError) as error:
        run(recipe, keys)
    assert advice in str(error.value) and "\n" not in str(error.value)
    assert not (cwd / "out").exists()


def test_torchtune_cannot_build_its_own_layer_for_qat_with_lora():
    settings = Int8DynActInt4WeightQATQuantizer(groupsize=32)
    fakes = [
        settings.get_activation_fake_quantize_config(),
        settings.get_weight_fake_quantize_config(),
    ]
    with pytest.raises((AssertionError, TypeError, ValueError)):
        QATLoRALinear.from_lora_linear(LoRALinear(32, 32, 4, 8), *fakes)


@pytest.mark.parametrize("recipe", DISTRIBUTED)
def test_a_distributed_recipe_on_a_cpu_is_refused_before_it_fails(run, cwd, recipe, monkeypatch):
    monkeypatch.delattr(torch.cpu, "empty_cache")
    with pytest.raises(ConfigError, match="phi3_lora_finetune"):
        run(recipe, {**ADAPTERS, **WHOLE}[recipe])


def greedy(base, tokens, count):
    """Return the answer of transformers."""
    theirs = Phi3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = theirs.generate(torch.tensor([tokens]), max_new_tokens=count, do_sample=False)
    return ids[0].tolist()


@pytest.mark.parametrize("recipe", sorted(ANSWERING))
def test_an_answer_is_that_of_transformers(run, cwd, recipe, caplog):
    tokenizer = phi3_tokenizer(cwd / "base")
    tokens = tokenizer.encode(f"<|user|>\n{QUESTION}<|end|>\n<|assistant|>\n")
    ids = greedy(cwd / "base", tokens, ANSWER["max_new_tokens"])
    with caplog.at_level("INFO"):
        run(recipe, ANSWER)
    said = tokenizer.decode(ids if recipe == "generate" else ids[len(tokens) :])
    assert said in caplog.text


def test_ppo_loads_scores_trains_and_resumes_a_reward_model(run, cwd):
    def scores(folder):
        theirs = Phi3ForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        ours = phi3_reward(folder).eval()
        ours.load_state_dict(load_base_weights(folder, is_reward=True))
        with torch.no_grad():
            expected = torch.cat([theirs.eval()(row[None]).logits for row in BATCH])
            torch.testing.assert_close(ours(BATCH)[:, -1], expected, rtol=0, atol=1e-5)
        return expected

    run(PPO_RECIPE, PPO)
    trained = scores(cwd / "out" / "value" / "epoch_1")
    assert (trained - scores(cwd / "reward")).abs().max() > 1e-3

    whole = load_base_weights(cwd / "out" / "epoch_1")
    (cwd / "out").rename(cwd / "first")
    (cwd / "out").mkdir()
    (cwd / "first" / "epoch_0").rename(cwd / "out" / "epoch_0")
    value = {**PPO["reward_checkpointer"], "checkpoint_dir": "first/value/epoch_0"}
    run(
        PPO_RECIPE,
        {**PPO, "value_checkpointer": value, "resume_from_checkpoint": True},
    )
    # Not to the bit: of the generator that orders a batch's answers the recipe saves nothing
    same_weights(load_base_weights(cwd / "out" / "epoch_1"), whole)


def test_a_folder_of_another_kind_is_refused(cwd):
    keys = {"output_dir": "out", "model_type": "REWARD"}
    with pytest.raises(CheckpointError, match=r"(?s)missing: score\.weight.*unexpected: lm_head"):
        Phi3Checkpointer("base", **keys).load_checkpoint()
    with pytest.raises(CheckpointError, match=r"(?s)missing: lm_head.*unexpected: score\.weight"):
        Phi3Checkpointer("reward", "out").load_checkpoint()
    with pytest.raises(ConfigError, match="no reward model"):
        Phi3Checkpointer("reward", layout="split", **keys)
    config = AutoConfig.from_pretrained("base")
    Phi3ForSequenceClassification(config).save_pretrained("two_labels")
    with pytest.raises(CheckpointError, match=r"score\.weight is \[2, 256\], expected \[1, 256\]"):
        Phi3Checkpointer("two_labels", **keys).load_checkpoint()


@pytest.mark.parametrize("quantizer", [INT8_INT4, QAT], ids=["after training", "in training"])
def test_a_quantized_model_is_that_of_torchao_and_answers(run, cwd, quantizer, caplog, monkeypatch):
    run("quantize", {**quantizer, "checkpointer": {**CHECKPOINTER, "checkpoint_files": SHARDS}})
    (file,) = (cwd / "out").iterdir()
    weights = load_base_weights(cwd / "base")
    exact, converted = phi3(cwd / "base"), phi3(cwd / "base")
    for model in (exact, converted):
        model.load_state_dict(weights)
    torchao = Int8DynActInt4WeightQATQuantizer(groupsize=32)
    converted = torchao.convert(torchao.prepare(converted))
    loaded = phi3(cwd / "base")
    if quantizer is QAT:
        loaded = torchao.convert(torchao.prepare(loaded))
    else:
        loaded = Int8DynActInt4WeightQuantizer(groupsize=32).quantize(loaded)
    loaded.load_state_dict(torch.load(file, weights_only=False), assign=True)
    with torch.no_grad():
        torch.testing.assert_close(loaded(BATCH), converted(BATCH), rtol=0, atol=1e-5)
        assert (loaded(BATCH) - exact(BATCH)).abs().max() > 1e-2
    if quantizer is QAT:  # torchtune's recipe refuses to answer with these
        return
    if not EVERYTHING:  # compiled it takes a minute
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    tuned = {
        **CHECKPOINTER,
        "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
        "checkpoint_dir": "out",
        "checkpoint_files": [file.name],
        "output_dir": "elsewhere",
    }
    with caplog.at_level("INFO"):
        run("generate", {**ANSWER, **quantizer, "checkpointer": tuned})
    assert QUESTION in caplog.text


def test_int4_weights_alone_are_refused_where_torchao_has_them_no_more(run, cwd):
    from torchao import quantization

    if quantization.int4_weight_only.__module__ != "phi3_plugin.hook":
        pytest.skip("this torchao has them")
    keys = {"_component_": "torchtune.training.quantization.Int4WeightOnlyQuantizer"}
    with pytest.raises(ConfigError, match=r"torchao below 0\.16"):
        run("quantize", {"quantizer": keys})


def test_lm_eval_measures_what_it_measures_by_transformers(run, cwd, caplog, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'phi3-plugin[lm_eval]'")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # torchtune's recipe downloads GPT-2, which it never asks anything
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 512}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained("gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (cwd / "gpt2" / name).symlink_to(cwd / "base" / name)
    (cwd / "tasks").mkdir()
    task = {
        "task": "my_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "tasks/sums.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    OmegaConf.save(OmegaConf.create(task), cwd / "tasks" / "sums.yaml")
    rows = [
        {"question": f"{one} plus {two} =", "choices": [" three", " four"], "answer": number % 2}
        for number, (one, two) in enumerate(pairwise(WORDS[2:]))
    ]
    (cwd / "tasks" / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    theirs = simple_evaluate(
        HFLM(pretrained="base", dtype="float32", device="cpu"),
        tasks=["my_sums"],
        task_manager=TaskManager(include_path="tasks"),
    )
    expected = theirs["results"]["my_sums"]["acc,none"]
    keys = {"tasks": ["my_sums"], "include_path": "tasks", "limit": None, "max_seq_length": 96}
    if version("lm_eval") < "0.4.5":  # the recipe takes 0.4.13 for an older one
        with pytest.raises(ConfigError, match="Use lm_eval by itself"):
            run("eleuther_eval", {**ANSWER, **keys})
        for module in (metadata, stock_recipes):
            monkeypatch.setattr(module, "version", lambda name: "0.4.9")
    with caplog.at_level("INFO"):
        run("eleuther_eval", {**ANSWER, **keys})
    (measured,) = re.findall(r"\|acc *\|. *\|([\d.]+)\|", re.sub(r" +", " ", caplog.text))
    assert float(measured) == pytest.approx(expected, abs=1e-4)
