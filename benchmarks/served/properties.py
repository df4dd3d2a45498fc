"""What an adapter may be like, of those that check.py tells apart, and adapters that are like that.

PEFT makes each and saves it; most are then changed as other programs, or people, write or damage
them. What they are compared with is what the adapter computed when it was made.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import AutoModelForCausalLM

from benchmarks.served.jobs import Answer
from benchmarks.served.models import FOUR, Model, Prepare, prompt_of, reference, save_adapter

Config, Tensors = dict[str, Any], dict[str, torch.Tensor]
Change = Callable[[Config, Tensors], object]

FIRST = "base_model.model.model.layers.0.self_attn.qkv_proj"
EVERYONE = ("PEFT", "vLLM", "llama.cpp")
OLDER = {"vLLM 0.31": ("one scale",)}
"""Older versions that are told as well, and the properties of which they make something else."""


@dataclass(frozen=True)
class Case:
    """An adapter with one property."""

    keys: dict[str, Any] = field(default_factory=dict)
    """For LoraConfig; the four fused layers are its targets if it does not say."""
    change: Change | None = None
    """Alters what PEFT saved."""
    misread: Change | None = None
    """Makes of the folder one that says in full what a runtime takes that gets the scale wrong."""
    base: str = "mini-4k"
    rows: int = 0
    """To which the vocabulary is resized before."""
    prepare: Prepare | None = None
    """Alters the model before PEFT starts an adapter on it."""
    beside: str = ""
    """A file of the base that lies in the folder, too."""
    runtimes: tuple[str, ...] = EVERYONE
    """To which the property means something."""


def put(**keys: Any) -> Change:
    """Return a change of keys in adapter_config.json."""
    return lambda config, _: config.update(keys)


def drop(key: str) -> Change:
    """Return a change that leaves out a key of adapter_config.json."""
    return lambda config, _: config.pop(key)


def rename(old: str, new: str) -> Change:
    """Return a change of the names of tensors."""

    def change(_: Config, tensors: Tensors) -> None:
        for name in [*tensors]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def without(name: str) -> Change:
    """Return a change that leaves out a tensor."""
    return lambda _, tensors: tensors.pop(name)


def nothing_low(_: Config, tensors: Tensors) -> None:
    """Leave a tensor that is not of an adapter."""
    tensors.clear()
    tensors["base_model.model.model.rotary.inv_freq"] = torch.ones(4)


def put_nan(_: Config, tensors: Tensors) -> None:
    """Break one number."""
    tensors[f"{FIRST}.lora_A.weight"][0, 0] = float("nan")


def transpose(_: Config, tensors: Tensors) -> None:
    """Turn a matrix."""
    tensors[f"{FIRST}.lora_A.weight"] = tensors[f"{FIRST}.lora_A.weight"].T


def patterns(**keys: Any) -> dict[str, Any]:
    """Return keys with patterns of ranks and alphas, and others."""
    return {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"down_proj": 3}, **keys}


def targets(model: torch.nn.Module, config: LoraConfig) -> Iterator[torch.nn.Linear]:
    """Yield the layers that get an adapter."""
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] in config.target_modules:
            yield layer


@torch.no_grad()
def take_apart(model: torch.nn.Module, config: LoraConfig) -> None:
    """Give CorDA what it finds where all that comes into a layer is independent."""
    for layer in targets(model, config):
        u, s, vh = torch.linalg.svd(layer.weight, full_matrices=False)
        rank = config.r
        layer.eigens = SimpleNamespace(U_WC=u[:, :rank], S_WC=s[:rank], V_WC=vh[:rank].T)


def learn(model: torch.nn.Module, config: LoraConfig) -> None:
    """Let LoRA-GA see the gradients of each layer."""
    ids = torch.arange(3, 300)[None]
    preprocess_loraga(model, config, lambda: model(input_ids=ids, labels=ids).loss.backward())


@torch.no_grad()
def round_weights(model: torch.nn.Module, config: LoraConfig) -> None:
    """Leave of the weights what LoftQ would: those of few bits."""
    for layer in targets(model, config):
        layer.weight.copy_((layer.weight * 64).round() / 64)


TIED = "Phi-4-mini"

PROPERTIES: dict[str, tuple[Case, ...]] = {
    "plain": (Case(), Case({"target_modules": "all-linear"})),
    "no adapter": (Case(change=nothing_low),),
    "shape": (Case(change=without(f"{FIRST}.lora_B.weight")), Case(change=transpose)),
    "rank of a target": (Case(change=put(r=8), runtimes=("PEFT",)),),
    "rank": (Case(change=put(r=8), misread=put(lora_alpha=4), runtimes=("vLLM", "llama.cpp")),),
    "target of nothing": (Case({"target_modules": ["q_proj", "o_proj", "down_proj"]}),),
    "start": (
        Case({"init_lora_weights": "corda", "corda_config": CordaConfig()}, prepare=take_apart),
        Case(prepare=round_weights, change=put(init_lora_weights="loftq")),  # it needs a GPU
    ),
    "start by gradients": (
        Case({"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}, prepare=learn),
    ),
    "start that PEFT repeats": (Case({"init_lora_weights": "olora"}),),
    "pissa": (Case({"init_lora_weights": "pissa"}, runtimes=("vLLM",)),),
    "no target": (Case(change=put(target_modules=["w1"])),),
    "not a target": (Case(change=put(target_modules=["o_proj"])),),
    "no prefix": (Case(change=rename("base_model.model.", "")),),
    "unknown name": (Case(change=rename(FIRST, "transformer.h.0.attn")),),
    "neither A nor B": (Case(change=rename(f"{FIRST}.lora_A", f"{FIRST}.lora_down")),),
    "no lora_alpha": (Case({"lora_alpha": 12}, drop("lora_alpha"), misread=put(lora_alpha=8)),),
    "no r": (Case(change=drop("r")),),
    "no target_modules": (Case(change=drop("target_modules")),),
    "no task_type": (Case(change=drop("task_type")),),
    "config.json": (Case(beside="config.json"),),
    "DoRA without magnitude": (
        Case({"use_dora": True}, without(f"{FIRST}.lora_magnitude_vector")),
    ),
    "DoRA unsaid": (Case({"use_dora": True}, put(use_dora=False)),),
    "DoRA": (Case({"use_dora": True}),),
    "modules_to_save": (Case({"modules_to_save": ["lm_head"]}),),
    "rows": (Case({"trainable_token_indices": {"embed_tokens": [40, 77]}}),),
    "vocabulary": (Case(rows=400),),
    "saved norm": (Case({"modules_to_save": ["norm"]}),),
    "bias": (Case({"bias": "all"}),),
    "bias tensor": (Case({"lora_bias": True}),),
    "other layer": (Case(change=rename(FIRST, FIRST.replace("qkv_proj", "q_proj"))),),
    "rank above vLLM's": (Case({"r": 520}),),
    "head": (Case({"target_modules": [*FOUR, "lm_head"]}),),
    "embedding": (Case({"target_modules": [*FOUR, "embed_tokens"]}),),
    "tied head": (Case({"target_modules": [*FOUR, "lm_head"]}, base=TIED),),
    "tied embedding": (Case({"target_modules": [*FOUR, "embed_tokens"]}, base=TIED),),
    "tied by PEFT": (
        Case({"target_modules": [*FOUR, "embed_tokens"], "ensure_weight_tying": True}, base=TIED),
    ),
    "one scale": (
        Case(patterns(), misread=put(alpha_pattern={"o_proj": 4}), runtimes=("PEFT", "vLLM")),
    ),
    "alpha over rank": tuple(
        Case(keys, misread=put(alpha_pattern={}, use_rslora=False), runtimes=("PEFT", "llama.cpp"))
        for keys in (patterns(), {"alpha_pattern": {"o_proj": 3}}, {"use_rslora": True})
    ),
    "rank_pattern": (Case({"rank_pattern": {"o_proj": 2}}),),
    "rsLoRA": (Case({"use_rslora": True}, runtimes=("PEFT", "vLLM")),),
    "not finite": (Case(change=put_nan),),  # last, since NaN stays in the cache of vLLM
}
"""Names are those of check.py; it has none for what every runtime loads, such as ``plain``."""


def resized(base: Path, folder: Path, rows: int) -> Path:
    """Write a base with more rows in its embedding and head."""
    shutil.copytree(base, folder)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder)
    keys = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**keys, "vocab_size": rows}, indent=2))
    return folder


def make(case: Case, folder: Path, base: Path) -> tuple[Model, Answer | None]:
    """Return an adapter that is like that, and what a runtime computes that gets its scale wrong.

    Args:
        case: Of `PROPERTIES`.
        folder: To create, and others beside it.
        base: The one that the case names.
    """
    prompt, keys = prompt_of(case.base), {"target_modules": FOUR, **case.keys}
    wrong = None
    if case.misread:
        aside = folder.with_name(f"{folder.name}-misread")
        save_adapter(aside, base, prompt, case.misread, **keys)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        wrong = reference(PeftModel.from_pretrained(model, aside).eval(), prompt)
    told = {"rows": case.rows, "prepare": case.prepare}
    model = save_adapter(folder, base, prompt, case.change, **told, **keys)
    if case.beside:
        shutil.copy(base / case.beside, folder)
    if case.rows:
        model.base = resized(base, folder.with_name(f"{folder.name}-base"), case.rows)
    return model, wrong
