"""Runs torchtune's own recipes from the command line, as a user does."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch
import torchtune
from torch import Tensor
from torchtune._recipe_registry import get_all_recipes
from transformers import Phi3ForCausalLM

from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.models import phi3
from tests import warm
from tests.assets import assets_dir
from tests.oracles import MINI_4K, hf_model, save_checkpoint


def stock_module(name: str) -> ModuleType:
    """Return the module of torchtune's own recipe by its name, unmodified."""
    found = next(recipe for recipe in get_all_recipes() if recipe.name == name)
    root = torchtune.__file__.partition("torchtune/__init__")[0]
    spec = importlib.util.spec_from_file_location("stock", f"{root}recipes/{found.file_path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TUNE = Path(sys.executable).with_name("tune")
"""The real one, where its start is part of what is proven."""

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
}


def tiny_checkpoint(folder: Path, **sizes: int) -> Path:
    """Write a tiny random Phi-3-mini-4k with the published tokenizer."""
    sizes = {**SIZES, **sizes}
    save_checkpoint(hf_model(MINI_4K, **sizes), MINI_4K, folder, **sizes)
    for file in (assets_dir() / "models" / "phi3-mini-4k-instruct").iterdir():
        if file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(file, folder)
    return folder


def gsm8k(file: Path, rows: int) -> Path:
    """Write the first rows of GSM8K."""
    lines = (assets_dir() / "data" / "gsm8k_train.jsonl").read_text("utf-8").splitlines()[:rows]
    assert all(json.loads(line)["question"] for line in lines)
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def tune_run(
    *arguments: str, cwd: Path, recipe: str = "lora_finetune_single_device"
) -> subprocess.CompletedProcess:
    """Run ``tune run`` with a recipe for one process and the given rest of the command."""
    return warm.run("tune", "run", recipe, *arguments, cwd=cwd)


def torchrun_stock(
    *arguments: str, cwd: Path, recipe: str = "lora_finetune_distributed"
) -> subprocess.CompletedProcess:
    """Run one of torchtune's distributed recipes in two processes on the CPU."""
    driver = Path(__file__).with_name("stock_distributed.py")
    launch = ("--standalone", "--nproc_per_node", "2", driver, recipe)
    return warm.run("torchrun", *launch, *arguments, cwd=cwd)


def check_checkpoint(folder: Path, base: Path, batch: Tensor, moved: float = 1e-2) -> None:
    """Transformers reads it and computes what we do, and it is not the base any more."""
    theirs, report = Phi3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    ours = phi3(folder).eval()
    ours.load_state_dict(load_base_weights(folder))
    with torch.no_grad():
        logits = ours(batch)
        torch.testing.assert_close(logits, theirs(input_ids=batch).logits, rtol=0, atol=1e-5)
        ours.load_state_dict(load_base_weights(base))
        assert (ours(batch) - logits).abs().max() > moved
