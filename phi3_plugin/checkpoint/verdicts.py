"""What each runtime makes of an adapter folder as it lies there.

Read from the sources of the runtimes, of which only PEFT is run in our tests:

    PEFT       0.21.2, tuners/lora, utils/save_and_load.py
    vLLM       main of 2026, lora/peft_helper.py, lora/lora_model.py, lora/utils.py, config/lora.py,
               models/phi3.py, models/llama.py
    llama.cpp  0b03ada, convert_lora_to_gguf.py; src/llama-adapter.{h,cpp}, src/llama-graph.cpp
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from phi3_plugin.checkpoint.names import EMBEDDING, HEAD
from phi3_plugin.checkpoint.peft_folder import (
    KINDS,
    PeftFolder,
    is_adaptable,
    listed,
    read_peft_folder,
)
from phi3_plugin.checkpoint.peft_settings import STARTS
from phi3_plugin.checkpoint.shapes import shape_problems
from phi3_plugin.config import Phi3Config

LOADS, MISSCALED, MISREAD, REJECTED = "loads", "mis-scaled", "mis-read", "rejected"
_WORST = [LOADS, MISSCALED, MISREAD, REJECTED]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` takes; 16 if it is not given."""

VLLM_MODULES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head")

REPEATABLE = ("pissa", "olora")
"""Starting points that change the base, as PEFT does once more when it loads the adapter."""

Finding = tuple[str, str]
"""A status and its reason; a reason with `LOADS` is a remark."""


@dataclass(frozen=True)
class Verdict:
    """What one runtime makes of an adapter."""

    runtime: str
    status: str
    """`LOADS`; `MISSCALED` loads, and multiplies B A with a wrong number; `MISREAD` loads, and
    computes something else; `REJECTED` ends with an error."""
    reasons: tuple[str, ...]
    """Why, and remarks where it loads."""
    use: str
    """What to pass, if it loads; else what to do."""


def verdicts(folder: str | Path, base: Phi3Config | None = None) -> list[Verdict]:
    """Say what PEFT, vLLM and llama.cpp make of an adapter folder, ours or anyone's.

    The header is read, and the values only to look for NaN.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors.
        base: Sizes of the base model, if it is at hand: shapes are then compared with it.

    Raises:
        AdapterError: The configuration is damaged, or is not that of a LoRA adapter.
        CheckpointError: The weights are damaged or cut short.
        MissingFileError: One of the two files is missing.
    """
    adapter = read_peft_folder(folder)
    everywhere, out = [*_broken(adapter, base)], []
    for name, find in RUNTIMES.items():
        found = [*everywhere, *_start(adapter, name), *find(adapter, base)]
        out.append(_verdict(name, found, str(folder), adapter))
    return out


def _verdict(runtime: str, found: list[Finding], folder: str, adapter: PeftFolder) -> Verdict:
    status = max((status for status, _ in found), key=_WORST.index, default=LOADS)
    reasons = tuple(dict.fromkeys(reason for _, reason in found))
    use = USE[runtime](folder, adapter) if status == LOADS else INSTEAD[runtime]
    return Verdict(runtime, status, reasons, use)


def _broken(adapter: PeftFolder, base: Phi3Config | None) -> Iterator[Finding]:
    """Yield what is wrong with the adapter itself, whoever reads it."""
    if not adapter.adapted and not adapter.with_kind("saved"):
        yield REJECTED, "the file holds no adapter: no lora_A, no lora_B"
    if wrong := _wrong_ranks(adapter):
        yield MISREAD, _ranks_differ(adapter, wrong)
    yield from ((REJECTED, problem) for problem in shape_problems(adapter, base))
    if broken := list(_not_finite(adapter)):
        yield MISREAD, f"NaN or infinite numbers in {listed(broken)}: every answer would be"
    if names := adapter.targets_of_nothing():
        yield LOADS, f"target_modules names what a Phi-3 does not have: {listed(names, 9)}"


def _not_finite(adapter: PeftFolder) -> Iterator[str]:
    for module, kinds in adapter.tensors.items():
        for kind, tensor in kinds.items():
            if tensor.shape and not bool(torch.isfinite(tensor[:]).all()):
                yield f"{module} ({kind})"


def _start(adapter: PeftFolder, runtime: str) -> Iterator[Finding]:
    start = adapter.config.get("init_lora_weights", True)
    if not isinstance(start, str) or start in STARTS:
        return
    if runtime == "PEFT" and start in REPEATABLE:
        yield LOADS, f"init_lora_weights: PEFT changes the base by {start} again when it loads this"
    else:
        yield MISREAD, f"init_lora_weights: it is for a base that {start!r} has changed"


def _peft(adapter: PeftFolder, base: Phi3Config | None) -> Iterator[Finding]:
    reached = [m for m in adapter.adapted if adapter.targeted(m) and is_adaptable(m)]
    if adapter.adapted and not reached:
        yield REJECTED, "no module of a Phi-3 is in target_modules"
    elif lost := [m for m in adapter.adapted if m not in reached]:
        why = "not in target_modules or not in a Phi-3"
        yield MISREAD, f"{why}, so PEFT passes over their tensors silently: {listed(lost)}"
    if adapter.unknown:
        yield MISREAD, f"PEFT passes over names that are not its own: {listed(adapter.unknown)}"
    if set(wrong := _wrong_ranks(adapter)) & set(reached):
        yield REJECTED, _ranks_differ(adapter, wrong)
    if "lora_alpha" not in adapter.config:
        yield MISSCALED, "lora_alpha is missing: PEFT takes 8"
    yield from _dora(adapter)
    if not adapter.config.get("task_type"):
        yield LOADS, "task_type is missing: PeftModel loads it, AutoPeftModelForCausalLM does not"


def _wrong_ranks(adapter: PeftFolder) -> list[str]:
    return [m for m, rank in adapter.ranks.items() if adapter.said("r", m) != rank]


def _ranks_differ(adapter: PeftFolder, modules: list[str]) -> str:
    said, stored = adapter.said("r", modules[0]), adapter.ranks[modules[0]]
    return f"rank {said} in the configuration, {stored} in the file: {listed(modules)}"


def _no_lora(adapter: PeftFolder) -> Iterator[Finding]:
    endings = tuple(ending for ending, kind in KINDS.items() if kind in "AB")
    if names := [name for name in adapter.unknown if not name.endswith(endings)]:
        yield REJECTED, f"neither a lora_A nor a lora_B: {listed(names)}"


def _dora(adapter: PeftFolder) -> Iterator[Finding]:
    magnitudes = set(adapter.with_kind("magnitude"))
    if adapter.config.get("use_dora"):
        if missing := [m for m in adapter.adapted if m not in magnitudes]:
            yield MISREAD, f"use_dora, but no magnitude for {listed(missing)}"
    elif magnitudes:
        yield MISREAD, "magnitudes of DoRA are passed over, since use_dora is not true"


def _vllm(adapter: PeftFolder, base: Phi3Config | None) -> Iterator[Finding]:
    yield from _no_lora(adapter)
    missing = [k for k in ("r", "lora_alpha", "target_modules") if k not in adapter.config]
    if missing:
        yield REJECTED, f"adapter_config.json has no {', '.join(missing)}"
    if adapter.config.get("use_dora") or adapter.with_kind("magnitude"):
        yield REJECTED, "DoRA is not supported"
    if adapter.config.get("modules_to_save") or adapter.with_kind("saved"):
        yield REJECTED, "modules_to_save is not supported"
    if adapter.config.get("bias", "none") != "none" or adapter.with_kind("bias"):
        yield REJECTED, "adapters with a bias are not supported"
    if wrong := [m for m in adapter.adapted if m.rpartition(".")[2] not in VLLM_MODULES]:
        yield REJECTED, f"not a layer of its Phi-3: {listed(wrong)}. It has the fused layers"
    if max([adapter.config.get("r", 0), *adapter.ranks.values()]) > VLLM_RANKS[-1]:
        yield REJECTED, f"rank above {VLLM_RANKS[-1]}"
    if not missing:
        # One r and one lora_alpha for all modules; patterns are not among the keys it reads.
        root = adapter.config["r"] ** (0.5 if adapter.config.get("use_rslora") else 1)
        one = adapter.config["lora_alpha"] / root
        yield from _misscaled(adapter, dict.fromkeys(adapter.adapted, one), "patterns are ignored")


def _llama_cpp(adapter: PeftFolder, base: Phi3Config | None) -> Iterator[Finding]:
    if "lora_alpha" not in adapter.config:
        yield REJECTED, "adapter_config.json has no lora_alpha"
        return
    yield from _no_lora(adapter)
    for kind, what in (("magnitude", "DoRA"), ("saved", "modules_to_save"), ("bias", "a bias")):
        if modules := [m for m in adapter.with_kind(kind) if not m.endswith("norm")]:
            yield REJECTED, f"the converter exits at {what}: {listed(modules)}"
    if norms := [m for m in adapter.with_kind("saved") if m.endswith("norm")]:
        yield MISREAD, f"trained norms are passed over: {listed(norms)}"
    if wrong := [m for m in adapter.adapted if not is_adaptable(m)]:
        yield REJECTED, f"not a tensor of its Phi-3: {listed(wrong)}. It has the fused layers"
    if base is not None and base.tie_word_embeddings:
        if HEAD in adapter.adapted:
            yield REJECTED, "this base has no head of its own, so its adapter finds no tensor"
        if EMBEDDING in adapter.adapted:
            yield MISREAD, "the head is the embedding's tensor, and would get its adapter too"
    alpha = adapter.config["lora_alpha"]
    theirs = {module: alpha / rank for module, rank in adapter.ranks.items()}
    yield from _misscaled(adapter, theirs, "alpha_pattern and use_rslora are ignored")


def _misscaled(adapter: PeftFolder, theirs: Mapping[str, float], why: str) -> Iterator[Finding]:
    factors = {m: theirs[m] / adapter.scale(m) for m in adapter.adapted if m in theirs}
    wrong = {m: factor for m, factor in factors.items() if abs(factor - 1) > 1e-6}
    if wrong:
        first, factor = next(iter(wrong.items()))
        yield MISSCALED, f"{why}: {first} would count {factor:.4g} times, {len(wrong)} modules so"


RUNTIMES: dict[str, Callable[[PeftFolder, Phi3Config | None], Iterator[Finding]]] = {
    "PEFT": _peft,
    "vLLM": _vllm,
    "llama.cpp": _llama_cpp,
}
"""Each runtime, and what it makes of an adapter beyond what is wrong with it for all."""


def _vllm_flags(folder: str, adapter: PeftFolder) -> str:
    rank = max([adapter.config["r"], *adapter.ranks.values()])
    least = next(size for size in VLLM_RANKS if size >= rank)
    return f"--enable-lora --max-lora-rank {least} --lora-modules NAME={folder}"


USE: dict[str, Callable[[str, PeftFolder], str]] = {
    "PEFT": lambda folder, _: f"PeftModel.from_pretrained(base, {folder!r})",
    "vLLM": _vllm_flags,
    "llama.cpp": lambda folder, _: f"convert_lora_to_gguf.py --base BASE {folder}, then --lora",
}
"""What to pass to a runtime that loads the adapter."""

INSTEAD = {
    "PEFT": "phi3-tune adapter convert --to peft, or correct what is named",
    "vLLM": "phi3-tune adapter convert --to peft; where that keeps what is named, merge",
    "llama.cpp": "phi3-tune adapter convert --to gguf; where that cannot, merge",
}
"""What to do where a runtime does not load the adapter as it is."""
