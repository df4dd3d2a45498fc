"""What serves an adapter: each runtime's verdict, and a proof by loading it."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi3_plugin.checkpoint.base import EMBEDDING, HEAD, open_weights
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.peft import (
    KINDS,
    STARTS,
    PeftFolder,
    is_adaptable,
    listed,
    load_origin,
    read_peft_folder,
    shape_problems,
)
from phi3_plugin.config import Phi3Config, read_config
from phi3_plugin.errors import AdapterError, Phi3Error
from phi3_plugin.load import assembled
from phi3_plugin.train.model import DTYPES

# Load what we wrote with the libraries that will serve it.
#
# The only module that imports transformers and peft; both come with ``phi3-plugin[hf]``.

# Shapes: B batch, S sequence, V vocabulary


class NotLoadedError(AdapterError):
    """PEFT refuses an adapter, or does not find a place for every tensor."""


@dataclass(frozen=True)
class Proof:
    """What an adapter computes in PEFT and in another model."""

    difference: float
    """The largest distance of two logits."""
    effect: float
    """How far the adapter moves a logit at most, in PEFT."""
    largest: float
    """The largest logit."""


def prove(
    checkpoint_dir: str | Path,
    adapter_dir: str | Path,
    dtype: str = "fp32",
    *,
    shape: tuple[int, int] = (2, 17),
    seed: int = 0,
) -> Proof:
    """Load base and adapter in transformers + PEFT, and compare its logits with our model's.

    One model after the other is in memory.

    Args:
        checkpoint_dir: Folder of the base model.
        adapter_dir: Folder with adapter_config.json and adapter_model.safetensors.
        dtype: What both compute in, bf16 or fp32.
        shape: B and S of the random tokens.
        seed: Of the tokens.

    Raises:
        NotLoadedError: PEFT does not load the adapter, or not all of it.
    """
    theirs, base, tokens = _peft_logits(checkpoint_dir, adapter_dir, DTYPES[dtype], shape, seed)
    with torch.no_grad():
        ours = logits(Path(checkpoint_dir), Path(adapter_dir), dtype, tokens)
        difference = (ours.float() - theirs).abs().max()
    effect = (theirs - base).abs().max()
    return Proof(float(difference), float(effect), float(theirs.abs().max()))


def _peft_logits(
    checkpoint_dir: str | Path,
    adapter_dir: str | Path,
    dtype: torch.dtype,
    shape: tuple[int, int],
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits with and without the adapter, and the tokens; the model is let go of."""
    model = load_with_peft(checkpoint_dir, adapter_dir, dtype)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    with torch.no_grad():
        theirs = model(input_ids=tokens, use_cache=False).logits.float()
        with model.disable_adapter():
            base = model(input_ids=tokens, use_cache=False).logits.float()
    return theirs, base, tokens


def load_base_with_hf(checkpoint_dir: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return the base model as ``transformers`` loads it, on the CPU, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=dtype).eval()


def hf_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer as ``transformers`` loads it from a checkpoint or adapter folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def load_with_peft(
    checkpoint_dir: str | Path, adapter_dir: str | Path, dtype: torch.dtype = torch.float32
) -> Any:
    """Return base and adapter as PEFT loads them, after checking that every tensor found a place.

    PEFT itself passes over tensors that match nothing.

    Args:
        checkpoint_dir: Folder of the base model.
        adapter_dir: Folder with adapter_config.json and adapter_model.safetensors.
        dtype: What the base weights are cast to.

    Returns:
        A ``PeftModel`` on the CPU, in evaluation mode.

    Raises:
        NotLoadedError: PEFT refuses it, or keys are missing or unexpected; the first are listed.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    model = _in_peft(load_base_with_hf(checkpoint_dir, dtype), adapter_dir)
    places = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    names = load_peft_weights(str(adapter_dir), device="cpu")
    # Beside an adapter of the embedding or the head PEFT also keeps the base's own weight.
    stored = {name for name in names if not name.endswith(".base_layer.weight")}
    if places != stored:
        missing, unexpected = (_first(names) for names in (places - stored, stored - places))
        raise NotLoadedError(
            f"PEFT does not load {adapter_dir} completely: missing {missing}, unexpected "
            f"{unexpected}."
        )
    return model.eval()


def _in_peft(base: Any, adapter_dir: str | Path) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, str(adapter_dir))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {str(error).strip()[:500]}"
        raise NotLoadedError(f"PEFT does not load {adapter_dir}. It says {why}") from error


def _first(names: set[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{sorted(names)[:most]}{more}"


# What each runtime makes of an adapter folder as it lies there.
#
# Read from the sources of the runtimes, of which only PEFT is run in our tests:
#
#     PEFT       0.21.2, tuners/lora, utils/save_and_load.py
#     vLLM       main of 2026, lora/peft_helper.py, lora/lora_model.py, lora/utils.py, config/lora.py,
#                models/phi3.py, models/llama.py
#     llama.cpp  0b03ada, convert_lora_to_gguf.py; src/llama-adapter.{h,cpp}, src/llama-graph.cpp

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


# The proof in words, for people and for a run that has just saved an adapter.

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""How far logits may be apart, as a part of the largest, before the proof fails: the order of
sums differs. Tiny models agree to 1e-6 in fp32."""


def proven(base: Path, folder: Path, dtype: str) -> tuple[Proof | None, bool, str]:
    """Return the proof, whether it fails, and a sentence on it."""
    try:
        proof, reason = try_proof(base, folder, dtype)
    except NotLoadedError as error:
        return None, True, f"Proof failed: {error}"
    if proof is None:
        return None, False, f"No proof: {reason}"
    limit = TOLERANCE[dtype] * proof.largest
    numbers = (
        f"logits in PEFT and here differ by {proof.difference:.2e} at most. The adapter moves them "
        f"by up to {proof.effect:.2e}; the largest is {proof.largest:.3g}."
    )
    if not proof.difference <= limit:  # NaN fails too
        return proof, True, f"Proof failed: {numbers} Rounding in {dtype} allows {limit:.2e}."
    if proof.effect <= limit:
        hides = f"Rounding in {dtype} could hide that: {limit:.2e}."
        return proof, False, f"No proof: {numbers} {hides}"
    return proof, False, f"Proof: {numbers}"


def try_proof(base: Path, folder: Path, dtype: str) -> tuple[Proof | None, str]:
    """Return the proof, or why there is none.

    Raises:
        NotLoadedError: PEFT does not load the adapter.
    """
    if not all(importlib.util.find_spec(name) for name in ("transformers", "peft")):
        return None, "transformers and PEFT are not installed: pip install 'phi3-plugin[hf]'"
    try:
        open_weights(base)  # else transformers would say, in its own way, that there are none
        return prove(base, folder, dtype), ""
    except NotLoadedError:
        raise
    except Phi3Error as error:
        return None, str(error)


def logits(base: Path, folder: Path, dtype: str, tokens: Tensor) -> Tensor:
    """Return what our own model with the adapter makes of ``tokens [B, S]``: ``[B, S, V]``."""
    adapter = read_adapter(folder, config=read_config(base))
    model = assembled(open_weights(base), base, adapter, dtype, torch.device("cpu"))
    out: Tensor = model(tokens)
    return out


MEMINFO = Path("/proc/meminfo")


def served_by(folder: Path) -> str:
    """Return one line: what each runtime makes of an adapter that was just saved.

    Args:
        folder: Whole and in its place.
    """
    words = []
    for verdict in verdicts(folder):
        why = "" if verdict.status == LOADS else f" ({verdict.reasons[0]})"
        words.append(f"{verdict.runtime} {verdict.status}{why}")
    return f"{folder.name}: {', '.join(words)}."


def proof(folder: Path, checkpoint_dir: Path) -> str:
    """Return one line: how far PEFT's logits are from ours; or why that cannot be said.

    It takes the base model twice, one after the other, in fp32 and on the CPU. So it is left to
    the user where memory might not suffice; whatever goes wrong, the adapter is saved.

    Args:
        folder: Of the adapter.
        checkpoint_dir: Of its base.
    """
    command = f"phi3-tune adapter check {folder} --base {checkpoint_dir}"
    if load_origin(folder).get("lora_init") == "loftq":
        return "No proof: the adapter belongs to the NF4 base it was trained over."
    needed, free = memory_needed(checkpoint_dir), memory_free()
    if free is not None and free < needed:
        return f"No proof: PEFT would take {needed / 1e9:.0f} GB of memory: {command}"
    try:
        return proven(checkpoint_dir, folder, "fp32")[2]
    except Exception as error:  # of transformers and PEFT, whose models may be newer than they
        return f"No proof: {type(error).__name__}: {error}"


def memory_needed(checkpoint_dir: Path) -> int:
    """Return how many bytes a model takes in fp32, with the files that are read meanwhile."""
    stored = sum(file.stat().st_size for file in checkpoint_dir.glob("*.safetensors"))
    return 3 * stored  # bf16 becomes fp32, beside pages of the files


def memory_free() -> int | None:
    """Return how many bytes can be taken, where the system says so."""
    if not MEMINFO.is_file():
        return None
    lines = MEMINFO.read_text(encoding="ascii").splitlines()
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(kilobytes[0]) if kilobytes else None
