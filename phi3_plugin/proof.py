"""A proof that an adapter serves: its logits in transformers + PEFT beside those of our own model.

Only here are transformers and peft imported to load models; both come with ``phi3-plugin[hf]``.
"""

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi3_plugin.checkpoint.base import open_weights
from phi3_plugin.checkpoint.check import listed
from phi3_plugin.checkpoint.files import stored_tensors
from phi3_plugin.checkpoint.peft import CONFIG, WEIGHTS, load_note, token_indices
from phi3_plugin.checkpoint.peft_config import check_patterns
from phi3_plugin.config import read_json_object
from phi3_plugin.errors import AdapterError, Phi3Error
from phi3_plugin.load import load_model
from phi3_plugin.models.phi3 import PRECISIONS
from phi3_plugin.train.plan import memory_free

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""How far logits may be apart, as a part of the largest, before the proof fails: the order of
sums differs. Tiny models agree to 1e-6 in fp32."""

TWICE = ".modules_to_save.weight"
"""How PEFT ends the second name of a weight that was trained whole."""

# Shapes: B batch, S sequence, V vocabulary


class NotLoadedError(AdapterError):
    """PEFT refuses an adapter, or does not find a place for every tensor."""


@dataclass(frozen=True)
class Proof:
    """What an adapter computes in PEFT and in our model."""

    difference: float
    """The largest distance of two logits."""
    effect: float
    """How far the adapter moves a logit at most, in PEFT."""
    largest: float
    """The largest logit."""


PROVEN, UNPROVEN, FAILED = "Proof", "No proof", "Proof failed"


@dataclass(frozen=True)
class ProofResult:
    """How an attempt at a proof ended."""

    status: str
    """`PROVEN`, `UNPROVEN` or `FAILED`."""
    reason: str
    """A sentence or two."""
    proof: Proof | None = None
    """The numbers, if it came so far."""

    def __str__(self) -> str:
        """Return both in one line."""
        return f"{self.status}: {self.reason}"


def proof_of_run(folder: Path, checkpoint_dir: Path) -> ProofResult:
    """Prove an adapter that was just saved, or say why that cannot be done.

    It takes the base model twice, one after the other, in fp32 and on the CPU. So it is left to
    the user where memory might not suffice; whatever goes wrong, the adapter is saved.

    Args:
        folder: Of the adapter.
        checkpoint_dir: Of its base.
    """
    if load_note(folder).get("lora_init") == "loftq":
        reason = "the adapter belongs to the NF4 base it was trained over."
        return ProofResult(UNPROVEN, reason)
    # bf16 becomes fp32, beside pages of the files
    needed = 3 * sum(file.stat().st_size for file in checkpoint_dir.glob("*.safetensors"))
    free = memory_free()
    if free is not None and free < needed:
        command = f"phi3-tune adapter check {folder} --base {checkpoint_dir}"
        reason = f"PEFT would take {needed / 1e9:.0f} GB of memory: {command}"
        return ProofResult(UNPROVEN, reason)
    try:
        return proven(checkpoint_dir, folder, "fp32")
    except Exception as error:  # of transformers and PEFT, whose models may be newer than they
        return ProofResult(UNPROVEN, f"{type(error).__name__}: {error}")


def proven(base: Path, folder: Path, dtype: str) -> ProofResult:
    """Prove an adapter: what its logits in PEFT and here are, and whether rounding explains that.

    Args:
        base: Folder of the base model.
        folder: Of the adapter.
        dtype: What both models compute in, bf16 or fp32.
    """
    if not all(importlib.util.find_spec(name) for name in ("transformers", "peft")):
        reason = "transformers and PEFT are not installed: pip install 'phi3-plugin[hf]'"
        return ProofResult(UNPROVEN, reason)
    try:
        open_weights(base)  # else transformers would say, in its own way, that there are none
        proof = prove(base, folder, dtype)
    except NotLoadedError as error:
        return ProofResult(FAILED, str(error))
    except Phi3Error as error:
        return ProofResult(UNPROVEN, str(error))
    limit = TOLERANCE[dtype] * proof.largest
    numbers = (
        f"logits in PEFT and here differ by {proof.difference:.2e} at most. The adapter moves them "
        f"by up to {proof.effect:.3g}; the largest is {proof.largest:.3g}."
    )
    if not proof.difference <= limit:  # NaN fails too
        reason = f"{numbers} Rounding in {dtype} allows {limit:.2e}."
        return ProofResult(FAILED, reason, proof)
    if proof.effect <= limit:
        reason = f"{numbers} Rounding in {dtype} could hide that: {limit:.2e}."
        return ProofResult(UNPROVEN, reason, proof)
    return ProofResult(PROVEN, numbers, proof)


def prove(base: Path, folder: Path, dtype: str) -> Proof:
    """Load base and adapter in transformers + PEFT, and compare its logits with our model's.

    One model after the other is in memory.

    Args:
        base: Folder of the base model.
        folder: Of the adapter.
        dtype: What both models compute in, bf16 or fp32.

    Raises:
        NotLoadedError: PEFT does not load the adapter, or not all of it.
    """
    model = load_with_peft(base, folder, PRECISIONS[dtype])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (2, 17), generator=generator)
    for ids in token_indices(read_json_object(folder / CONFIG)).values():
        places = torch.randperm(tokens.numel(), generator=generator)[: min(len(ids), 8)]
        tokens.view(-1)[places] = torch.tensor(ids[: len(places)])
    with torch.no_grad():
        theirs = model(input_ids=tokens, use_cache=False).logits.float()
        with model.disable_adapter():
            without = model(input_ids=tokens, use_cache=False).logits.float()
        del model
        ours = logits(base, folder, dtype, tokens).float()
    return Proof(
        difference=float((ours - theirs).abs().max()),
        effect=float((theirs - without).abs().max()),
        largest=float(theirs.abs().max()),
    )


def logits(base: Path, folder: Path, dtype: str, tokens: Tensor) -> Tensor:
    """Return what our own model with the adapter makes of ``tokens [B, S]``: ``[B, S, V]``."""
    out: Tensor = load_model(base, folder, dtype=dtype, device="cpu", check_base=False)(tokens)
    return out


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
        AdapterError: A pattern in adapter_config.json takes too long.
        NotLoadedError: PEFT refuses it, or keys are missing or unexpected; the first are listed.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    base = load_base_with_hf(checkpoint_dir, dtype)
    check_patterns(Path(adapter_dir) / CONFIG, [name for name, _ in base.named_modules()])
    if (rows := _rows_of(Path(adapter_dir))) > base.config.vocab_size:
        base.resize_token_embeddings(rows, mean_resizing=False)
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers for what is to be renamed, which is no concern of our users
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            model = PeftModel.from_pretrained(base, str(adapter_dir))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {str(error).strip()[:500]}"
        raise NotLoadedError(f"PEFT does not load {adapter_dir}. It says {why}") from error
    places = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    names = load_peft_weights(str(adapter_dir), device="cpu")
    # Of embedding and head PEFT also keeps the base's own weight beside an adapter, and where the
    # vocabulary was resized the weights themselves; one that is trained whole is then there twice.
    weights = set(model.state_dict())
    stored = {
        name
        for name in names
        if not name.endswith(".base_layer.weight")
        and name not in weights
        and not (name.endswith(TWICE) and name.replace(TWICE, ".weight") in names)
    }
    if places != stored:
        missing, unexpected = sorted(places - stored), sorted(stored - places)
        raise NotLoadedError(
            f"PEFT does not load {adapter_dir} completely: missing {listed(missing, 4) or 'none'}, "
            f"unexpected {listed(unexpected, 4) or 'none'}."
        )
    return model.eval()


def _rows_of(folder: Path) -> int:
    """Return how many rows of embedding and head an adapter needs at least."""
    keys, ends = read_json_object(folder / CONFIG), ("embed_tokens.weight", "lm_head.weight")
    wanted = [i + 1 for ids in token_indices(keys).values() for i in ids]
    wanted += [t.shape[0] for n, t in stored_tensors(folder / WEIGHTS).items() if n.endswith(ends)]
    return max(wanted, default=0)


def load_base_with_hf(checkpoint_dir: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return the base model as ``transformers`` loads it, on the CPU, in evaluation mode."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    # A bar of theirs would stand between lines of ours
    shows_bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=dtype).eval()
    finally:
        if shows_bars:
            hf_logging.enable_progress_bar()
