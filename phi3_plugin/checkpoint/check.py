"""Load what we wrote with the libraries that will serve it.

The only module that imports transformers and peft; both come with ``phi3-plugin[hf]``.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi3_plugin.errors import AdapterError

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
    ours: Callable[[Tensor], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int] = (2, 17),
    seed: int = 0,
) -> Proof:
    """Load base and adapter in transformers + PEFT, and compare its logits with another model's.

    One model after the other is in memory, if ``ours`` makes its own when it is called.

    Args:
        checkpoint_dir: Folder of the base model.
        adapter_dir: Folder with adapter_config.json and adapter_model.safetensors.
        ours: Maps tokens ``[B, S]`` to logits ``[B, S, V]``.
        dtype: What PEFT computes in.
        shape: B and S of the random tokens.
        seed: Of the tokens.

    Raises:
        NotLoadedError: PEFT does not load the adapter, or not all of it.
    """
    theirs, base, tokens = _peft_logits(checkpoint_dir, adapter_dir, dtype, shape, seed)
    with torch.no_grad():
        difference = (ours(tokens).float() - theirs).abs().max()
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


def hf_ids(
    checkpoint_dir: str | Path, conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> list[tuple[list[int], list[bool]]]:
    """Return what ``transformers`` makes of conversations: ids, and which of them are trained on.

    It has no mask for templates such as Phi-3's, so that is worked out from its own texts: rendered
    once more with another text in its place, a conversation differs only where the message speaks.
    What stands there counts with the added token that follows.

    Args:
        checkpoint_dir: Folder with the tokenizer and its template.
        conversations: Messages with ``role`` and ``content``; ``trained`` where they are to count.
    """
    tokenizer = hf_tokenizer(checkpoint_dir)
    return [_hf_tokens(tokenizer, messages) for messages in conversations]


def _hf_tokens(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]]
) -> tuple[list[int], list[bool]]:
    plain = [{k: v for k, v in message.items() if k != "trained"} for message in messages]
    text = tokenizer.apply_chat_template(plain, tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    added = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
    ends = re.compile(rf"\s*({'|'.join(map(re.escape, added))})")
    spans = list[tuple[int, int]]()
    for i in (i for i, message in enumerate(messages) if message.get("trained")):
        for first, said in _said(tokenizer, plain, i, text):
            end = ends.match(text, said)
            spans.append((first, end.end() if end else said))
    starts = [start for start, _ in tokens["offset_mapping"]]
    trained = [any(first <= start < last for first, last in spans) for start in starts]
    ids = tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False)
    return list(ids), trained


def _said(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], i: int, text: str
) -> Iterator[tuple[int, int]]:
    """Yield where a message's texts stand in the rendered text; nothing for one left out."""
    mark = "Qz"
    while mark in text:
        mark += "z"
    for field in {"content", "tools"} & messages[i].keys():
        changed = [*messages[:i], {**messages[i], field: mark}, *messages[i + 1 :]]
        rendered = tokenizer.apply_chat_template(changed, tokenize=False)
        before, found, after = rendered.partition(mark)
        first, last = len(before), len(text) - len(after)
        if found and first <= last and text.startswith(before) and text.endswith(after):
            yield first, last
