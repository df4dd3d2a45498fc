"""Adapters of every kind on tiny models, and what PEFT and a merged model compute with them."""

import torch
from safetensors.torch import load_file
from torchtune.models.phi3 import lora_phi3 as torchtune_lora_phi3
from transformers import Phi3ForCausalLM

from phi3_plugin.checkpoint.adapter import MAGNITUDE, A, Adapter, B, original
from phi3_plugin.checkpoint.base import (
    SAVED_WEIGHTS,
    from_peft,
    fused_name,
    load_base_weights,
    module_sizes,
    part_rows,
    split_weights,
    to_hf,
)
from phi3_plugin.checkpoint.peft import WEIGHTS, check_same, load_note
from phi3_plugin.config import read_config
from tests.oracles import (
    MEDIUM_4K,
    MINI_4K,
    TINY_GQA,
    TINY_MHA,
    hf_logits,
    hf_model,
    save_checkpoint,
)

TIED = {**TINY_GQA, "tie_word_embeddings": True}
BASES = {"mini": (MINI_4K, TINY_MHA), "gqa": (MEDIUM_4K, TINY_GQA), "tied": (MEDIUM_4K, TIED)}
WHOLE = ("attn.qkv_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
PARTS = ("attn.qkv_proj.q_proj", "attn.qkv_proj.v_proj", "attn.o_proj", "mlp.gate_up_proj.up_proj")
LAYERS = range(3)


def adapter(config, inner, ranks=(4,), scales=(3.0,), dora=False, dtype=torch.float32, **keys):
    """Return random numbers; ranks and scales are dealt out in turn.

    Args:
        config: Sizes of the model.
        inner: Modules of every layer in ``layers``; others by their whole names.
        ranks: See above.
        scales: See above.
        dora: With magnitudes.
        dtype: Of the tensors.
        keys: ``layers``, and fields of Adapter.
    """
    torch.manual_seed(3)
    layers, sizes = keys.pop("layers", LAYERS), module_sizes(config)
    blocks = [name for name in inner if "." in name]
    modules = [f"layers.{n}.{name}" for n in layers for name in blocks]
    modules += [name for name in inner if "." not in name]
    tensors, own = {}, {}
    for i, module in enumerate(modules):
        (out, into), rank = sizes[module], ranks[i % len(ranks)]
        tensors[module + A] = torch.randn(rank, into, dtype=dtype) * 0.1
        tensors[module + B] = torch.randn(out, rank, dtype=dtype) * 0.1
        if dora:
            tensors[module + MAGNITUDE] = (torch.rand(out) + 0.5).to(dtype)
        own[module] = scales[i % len(scales)]
    return Adapter(tensors, own, **keys)


def merged_logits(base, adapter, config, tokens):
    """Return transformers' logits of the base with the adapter put into its weights by formula."""
    touched = {*adapter.scales, *(name.removesuffix(".weight") for name in adapter.saved)}
    model = Phi3ForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if config.tie_word_embeddings and touched & {"output", "tok_embeddings"}:  # as PEFT unties them
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in adapter.saved.items():
            weights[to_hf(name)].copy_(value)
        for module, scale in adapter.scales.items():
            _add(weights, module, adapter.tensors, scale, config)
    return hf_logits(model, tokens)


def _add(weights, module, tensors, scale, config):
    whole = fused_name(module)
    rows = part_rows(whole, config).get(module, slice(None))
    delta = scale * tensors[module + B].float() @ tensors[module + A].float()
    weight = weights[to_hf(f"{whole}.weight")]
    new = weight[rows] + (delta.T if module == "tok_embeddings" else delta)
    if module + MAGNITUDE in tensors:
        new = new * (tensors[module + MAGNITUDE].float() / new.norm(dim=1))[:, None]
    weight[rows] = new


def same(one, other):
    """Whether two adapters are the same in every bit."""
    for ours, theirs in ((one.tensors, other.tensors), (one.saved, other.saved)):
        if ours.keys() != theirs.keys():
            return False
        for name, value in ours.items():
            if value.dtype != theirs[name].dtype or not torch.equal(value, theirs[name]):
                return False
    return dict(one.scales) == dict(other.scales) and one.dropout == other.dropout


def base_folder(name, folder):
    """Write one of `BASES`."""
    published, sizes = BASES[name]
    return save_checkpoint(hf_model(published, **sizes), published, folder, **sizes)


def split_model(base, attention, mlp=False, output=False, alpha=12, rank=4, **keys):
    config = read_config(base)
    model = torchtune_lora_phi3(
        list(attention),
        mlp,
        output,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        embed_dim=config.hidden_size,
        intermediate_dim=config.intermediate_size,
        max_seq_len=64,
        norm_eps=config.rms_norm_eps,
        lora_rank=rank,
        lora_alpha=alpha,
        **keys,
    )
    weights = split_weights(load_base_weights(base), config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("lora" in n or "magnitude" in n for n in missing)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
            module.magnitude.data *= torch.rand_like(module.magnitude) + 0.5
    return model.eval()


def adapter_of(model):
    return {n: v for n, v in model.state_dict().items() if "lora" in n or "magnitude" in n}


def load_adapter(folder):
    """Read the tensors of an adapter folder under our names."""
    return {from_peft(name): value for name, value in load_file(folder / WEIGHTS).items()}


def load_trained(folder, checkpoint_dir, model=None):
    """Read an adapter as it was trained: what `export_adapter` was given, bit for bit.

    Args:
        folder: What it wrote.
        checkpoint_dir: Folder of the base model.
        model: The adapter of the model that it is for, if that is known by now.

    """
    adapter, origin = load_adapter(folder), load_note(folder)
    if "modules" in origin:
        tensors, _ = original(adapter, origin, read_config(checkpoint_dir))
        adapter = {**tensors, **{n: v for n, v in adapter.items() if n in SAVED_WEIGHTS}}
    if model is not None:
        check_same(folder, adapter, model)
    return adapter
