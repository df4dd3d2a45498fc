"""How much memory and time it takes to load a checkpoint into a model, ours and the peers'.

    python benchmarks/load_memory.py FOLDER [--layers 32] [--rounds 2] [--cold] [--case NAME]...

FOLDER gets a random bf16 checkpoint of Phi-3-mini's width, 7.6 GB with all 32 layers, unless it
has one. Each case builds and fills a model in a process of its own; the cases take turns. With
--cold the system is asked to forget the files before each.

The peak is what the process had resident at most (VmHWM), less what it had after its imports.
Pages of a mapped file count too, although the system may take them back; anonymous memory does
not have them. Prints one row a case; asserts nothing. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from environments import setting, table
from safetensors.torch import save_file
from torch import nn

from phi3_plugin.settings import Settings
from phi3_plugin.train.checkpoints import LastCheckpoint
from phi3_plugin.train.world import World

CONFIG = {
    "architectures": ["Phi3ForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
LORA = {"apply_lora_to_mlp": True, "lora_rank": 16, "lora_alpha": 32}
MB = 1e6


def main() -> None:
    """Make the folder, run every case in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cold", action="store_true", help="read from the disk each time")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder)))
        return
    if not (options.folder / "config.json").exists():
        random_checkpoint(options.folder, options.layers)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.case or CASES}
    for _ in range(options.rounds):
        for name, results in found.items():
            results.append(in_own_process(name, options.folder, options.cold))
            print(name, results[-1], file=sys.stderr)
    print(setting() + (", cold files" if options.cold else ", cached files") + "\n")
    head = ["case", "model, MB", "peak, MB", "peak / model", "peak - model, MB", "seconds"]
    print(table(head, [row(name, results) for name, results in found.items()]))


def row(name: str, results: list[dict[str, float]]) -> list[str]:
    """Return the cells of a case: its highest peak and its quickest time."""
    size, peak = results[0]["size"], max(r["peak"] for r in results)
    seconds = min(r["seconds"] for r in results)
    cells = [f"{size / MB:.0f}", f"{peak / MB:.0f}", f"{peak / size:.2f}"]
    return [name, *cells, f"{(peak - size) / MB:.0f}", f"{seconds:.1f}"]


def in_own_process(name: str, folder: Path, cold: bool) -> dict[str, float]:
    """Measure one case in a new process."""
    for file in folder.glob("*.safetensors") if cold else ():
        with file.open("rb") as shard:
            os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, str(folder), "--measure", name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def measure(name: str, folder: Path) -> dict[str, float]:
    """Load a model here and return its size and the peak in bytes, and the seconds it took."""
    load = CASES[name]()
    before, started = peak(), time.monotonic()
    model = load(folder)
    seconds = time.monotonic() - started
    for parameter in model.parameters():  # transformers leaves the weights in mapped files
        for tensor in inside(parameter):
            tensor.detach().flatten().view(torch.uint8)[::4096].sum()
    size = sum(tensor.nbytes for p in model.parameters() for tensor in inside(p))
    return {"size": size, "peak": peak() - before, "seconds": seconds}


def peak() -> int:
    """Return what this process has had resident at most, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def inside(parameter: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that an NF4 parameter is made of, and any other one as it is."""
    flatten = getattr(parameter, "__tensor_flatten__", None)
    return [getattr(parameter, part) for part in flatten()[0]] if flatten else [parameter]


# A case does its imports and returns what loads a folder.


def ours(quantize_base: bool) -> Callable[[Path], nn.Module]:
    """Our recipe's way: it sets up its model, and nothing else."""
    from phi3_plugin.recipes.lora_finetune import Finetune

    def load(folder: Path) -> nn.Module:
        recipe: Any = Finetune.__new__(Finetune)
        recipe.world, recipe.last = World("cpu"), LastCheckpoint(None, [])
        recipe.s = settings(folder, quantize_base)
        recipe.setup_model()
        model: nn.Module = recipe.model
        return model

    return load


def settings(folder: Path, quantize_base: bool) -> Settings:
    """Return the settings that the model needs."""
    model = {"_component_": "phi3_plugin.models.lora_phi3", "checkpoint_dir": str(folder)}
    model |= {"lora_attn_modules": TARGETS, "quantize_base": quantize_base, **LORA}
    sections = {key: {} for key in ("tokenizer", "dataset", "optimizer")}
    unused = {"output_dir": folder, "batch_size": 1, **sections}
    precision = {"dtype": "bf16", "adapter_dtype": "fp32"}
    return Settings(model=model, checkpoint_dir=folder, **precision, **unused)


def stock(quantize_base: bool) -> Callable[[Path], nn.Module]:
    """The way of torchtune's recipes, with our model and our checkpointer."""
    from torchtune.training import set_default_dtype

    from phi3_plugin.checkpoint import Phi3Checkpointer
    from phi3_plugin.models import lora_phi3

    def load(folder: Path) -> nn.Module:
        with set_default_dtype(torch.bfloat16):
            model = lora_phi3(folder, TARGETS, quantize_base=quantize_base, **LORA)
        weights = Phi3Checkpointer(folder, folder.parent / "out").load_checkpoint()["model"]
        model.load_state_dict(weights, strict=False)
        return model

    return load


def torchtune() -> Callable[[Path], nn.Module]:
    """The same with torchtune's own model and checkpointer, split in q, k, v."""
    from torchtune.models.phi3 import lora_phi3_mini
    from torchtune.training import FullModelHFCheckpointer, set_default_dtype

    def load(folder: Path) -> nn.Module:
        with set_default_dtype(torch.bfloat16):
            model = lora_phi3_mini(["q_proj", "k_proj", "v_proj", "output_proj"], **LORA)
        files = sorted(file.name for file in folder.glob("*.safetensors"))
        out = str(folder.parent / "out")
        checkpointer = FullModelHFCheckpointer(str(folder), files, "PHI3_MINI", out)
        model.load_state_dict(checkpointer.load_checkpoint()["model"], strict=False)
        return model

    return load


def transformers() -> Callable[[Path], nn.Module]:
    """The way of transformers, without adapters."""
    from transformers import AutoModelForCausalLM

    # A lazy module: without this the model's code would count as loading.
    from transformers.models.phi3 import modeling_phi3  # noqa: F401

    def load(folder: Path) -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model

    return load


CASES: dict[str, Callable[[], Callable[[Path], nn.Module]]] = {
    "our recipe, LoRA over bf16": lambda: ours(False),
    "our recipe, LoRA over NF4": lambda: ours(True),
    "torchtune's recipe with our parts, LoRA over bf16": lambda: stock(False),
    "torchtune's recipe with our parts, LoRA over NF4": lambda: stock(True),
    "torchtune's recipe and parts, LoRA over bf16": torchtune,
    "transformers, bf16": transformers,
}


def random_checkpoint(folder: Path, layers: int) -> None:
    """Write a checkpoint shard by shard, so that it is never in memory whole."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    weight_map = {}
    for number, shapes in enumerate(shards(layers)):
        file = f"model-{number:05}.safetensors"
        empty = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        tensors = {name: tensor.normal_(std=0.02) for name, tensor in empty.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    # Last: a folder with it is a whole one.
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))


def shards(layers: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the names and shapes of each file."""
    from phi3_plugin.checkpoint.base import expected_shapes
    from phi3_plugin.config import parse_config

    shapes = expected_shapes(parse_config({**CONFIG, "num_hidden_layers": layers}))
    names = sorted(shapes, key=lambda name: [int(w) for w in name.split(".") if w.isdigit()])
    step = 6 * 8  # a layer has six tensors
    for i in range(0, len(names), step):
        yield {name: shapes[name] for name in names[i : i + step]}


if __name__ == "__main__":
    main()
