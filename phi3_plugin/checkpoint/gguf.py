"""An adapter as llama.cpp reads it: one GGUF file, as its convert_lora_to_gguf.py makes it.

Needs llama.cpp's own ``gguf`` package, which comes with ``phi3-plugin[gguf]``. llama.cpp keeps
Phi-3's layers fused, so nothing is split or permuted::

    model.layers.3.self_attn.qkv_proj    blk.3.attn_qkv.weight.lora_a [R, in], .lora_b [out, R]
    model.layers.3.self_attn.o_proj      blk.3.attn_output.weight.…
    model.layers.3.mlp.gate_up_proj      blk.3.ffn_up.weight.…
    model.layers.3.mlp.down_proj         blk.3.ffn_down.weight.…
    lm_head                              output.weight.…
    model.embed_tokens                   token_embd.weight.lora_a [V, R], .lora_b [D, R]

It multiplies each pair with ``adapter.lora.alpha``, one number for all, over the rank of its B.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from phi3_plugin.checkpoint.adapter import Adapter, uniform_content
from phi3_plugin.checkpoint.base import OUTPUT, TOK_EMBEDDINGS, A, B, hf_name
from phi3_plugin.checkpoint.files import whole_files
from phi3_plugin.config import Phi3Config, read_config
from phi3_plugin.errors import AdapterError, MissingFileError


def write_gguf(file: Path, adapter: Adapter, checkpoint_dir: Path) -> None:
    """Write an adapter for llama.cpp; fp32, with one rank and an integer alpha.

    Args:
        file: The file to create.
        adapter: Our names; parts are made whole, and rsLoRA's scale becomes part of B.
        checkpoint_dir: The base it is for.

    Raises:
        AdapterError: llama.cpp cannot compute it.
        MissingFileError: The package is not installed.
        OutputError: The file exists or cannot be written.
    """
    config = read_config(checkpoint_dir)
    if problems := list(_unfit(adapter, config)):
        raise AdapterError("llama.cpp cannot use this adapter:\n  " + "\n  ".join(problems))
    gguf = gguf_package()
    content = uniform_content(adapter, config, lambda _: torch.empty(0))  # norms are DoRA's alone
    with whole_files(file) as (partial,):
        partial.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(partial, "phi3")
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_name(file.stem)
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, next(iter(content.alphas.values())))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, config.num_hidden_layers)
        for module in sorted(content.ranks, key=hf_name):  # the order in which PEFT's file has it
            name = f"{names.get_name(hf_name(module))}.weight"
            a, b = content.tensors[module + A], content.tensors[module + B]
            a = a.T if module == TOK_EMBEDDINGS else a
            for ending, value in (("lora_a", a), ("lora_b", b)):
                writer.add_tensor(f"{name}.{ending}", value.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def gguf_package() -> Any:
    """Return llama.cpp's package.

    Raises:
        MissingFileError: It is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise MissingFileError(
            "A GGUF file is written by llama.cpp's gguf package, which is not installed. "
            "Install it: pip install 'phi3-plugin[gguf]'"
        ) from error


def _unfit(adapter: Adapter, config: Phi3Config) -> Iterator[str]:
    """Yield what llama.cpp cannot compute, and what to do instead."""
    merge = "Write a model instead: `adapter merge --to gguf`"
    if adapter.is_dora:
        yield f"magnitude: it knows no DoRA. {merge}."
    if whole := {**adapter.saved, **adapter.rows}:
        yield f"{', '.join(sorted(whole))}: it replaces no whole weights or rows. {merge}."
    if config.tie_word_embeddings and (tied := {TOK_EMBEDDINGS, OUTPUT} & adapter.ranks.keys()):
        yield (
            f"{', '.join(sorted(tied))}: in this base one tensor is embedding and head, and it "
            f"would change both or none. {merge}."
        )
