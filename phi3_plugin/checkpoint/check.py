"""Load what we wrote with the libraries that will serve it.

The only module that imports transformers and peft; both come with ``phi3-plugin[hf]``.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from phi3_plugin.errors import AdapterError


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
        AdapterError: Keys are missing or unexpected; they are listed.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    base = load_base_with_hf(checkpoint_dir, dtype)
    model = PeftModel.from_pretrained(base, str(adapter_dir))
    places = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    stored = load_peft_weights(str(adapter_dir), device="cpu").keys()
    if places != stored:
        raise AdapterError(
            f"PEFT does not load {adapter_dir} completely: missing {sorted(places - stored)}, "
            f"unexpected {sorted(stored - places)}."
        )
    return model.eval()


def hf_ids(
    checkpoint_dir: str | Path, conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> list[tuple[list[int], list[bool]]]:
    """Return what ``transformers`` makes of conversations: ids, and which of them are trained on.

    It has no mask for templates such as Phi-3's, so that is worked out from its own texts: what a
    message says stands behind the text of those before it with an open header, and counts with
    the added token that follows.

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
    for i, message in enumerate(messages):
        if message.get("trained"):
            asked = tokenizer.apply_chat_template(
                plain[:i], tokenize=False, add_generation_prompt=True
            )
            said = len(asked) + len(message["content"])
            end = ends.match(text, said)
            spans.append((len(asked), end.end() if end else said))
    starts = [start for start, _ in tokens["offset_mapping"]]
    trained = [any(first <= start < last for first, last in spans) for start in starts]
    ids = tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False)
    return list(ids), trained
