"""Load what we wrote with the libraries that will serve it.

The only module that imports transformers and peft; both come with ``phi3-plugin[hf]``.
"""

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
