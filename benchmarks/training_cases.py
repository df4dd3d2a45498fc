"""What training.py compares: equal weights, adapters and samples, each trained its own way.

Ours and torchtune; what rests on transformers is in training_peft.py.

Base weights are shared: every contestant computes with the same memory, or with views of it.
Adapters start alike and not as the identity, so that the first loss depends on them; torchtune's,
on q, k, v, gate and up apart, get a copy of A each and their rows of B.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from load_memory import CONFIG, TARGETS
from torch import Tensor, nn
from torchtune.data import padded_collate_packed, padded_collate_sft

from phi3_plugin.checkpoint.base import expected_shapes, to_hf
from phi3_plugin.config import parse_config
from phi3_plugin.data.collate import IGNORED, concatenate
from phi3_plugin.models.lora_settings import LoRASettings
from phi3_plugin.models.nf4 import is_nf4, rows_of
from phi3_plugin.models.phi3 import PRECISIONS, Phi3MLP, RMSNorm, adapted
from phi3_plugin.train.losses import SFT
from phi3_plugin.train.model import prepare
from phi3_plugin.train.step import train_step
from phi3_plugin.train.world import World

RANK, ALPHA, STD = 16, 32, 0.02
ADAPTERS = LoRASettings(TARGETS, True, lora_rank=RANK, lora_alpha=ALPHA)
Samples = Sequence[Mapping[str, Sequence[int]]]
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
PRESETS = {
    "mini2": (3072, 8192, 32, 2),
    "small": (1024, 2816, 16, 4),
    "full": (3072, 8192, 32, 32),
    "tiny": (256, 512, 4, 2),
}
"""The values of `SIZES`; all else is Phi-3-mini-4k's, the vocabulary too."""


def sized(preset: str, layers: int | None) -> dict[str, Any]:
    """Return the config.json of a preset, with another number of layers if that is given."""
    sizes = dict(zip(SIZES, PRESETS[preset], strict=True))
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    return {**CONFIG, **sizes, "num_key_value_heads": sizes["num_attention_heads"]}


class Skipped(Exception):
    """This case cannot run here; says why."""


class Case(NamedTuple):
    """A model that is trained, and how."""

    model: nn.Module
    step: Callable[[Samples], float]
    """Trains on some samples and returns their mean loss before the update."""


@dataclass(frozen=True)
class Setup:
    """What the contestants have in common."""

    preset: str
    layers: int | None
    folder: Path
    """Of the tokenizer."""
    device: torch.device
    dtype: str
    """Of the base weights and of what is computed."""
    adapter_dtype: str
    recompute: bool
    quantize: bool
    compiled: bool
    liger: bool
    pad: int
    size: int | None
    """Of a pack; None is as long as its documents."""

    @cached_property
    def keys(self) -> dict[str, Any]:
        """The model's config.json."""
        return sized(self.preset, self.layers)

    @cached_property
    def base(self) -> dict[str, Tensor]:
        """Random weights by Hugging Face's names."""
        torch.manual_seed(0)
        shapes = expected_shapes(parse_config(self.keys))
        dtype = PRECISIONS[self.dtype]
        with self.device:
            empty = {n: torch.empty(shape, dtype=dtype) for n, shape in shapes.items()}
        norm = "norm.weight"
        return {n: t.fill_(1) if n.endswith(norm) else t.normal_(std=STD) for n, t in empty.items()}

    @cached_property
    def adapter(self) -> dict[str, Tensor]:
        """A and B of every linear layer of the blocks by our names, fp32."""
        generator, tensors = torch.Generator().manual_seed(1), dict[str, Tensor]()
        for name, parameter in our_model(self).named_parameters():
            if ".lora_" in name:
                std = STD if name.endswith("lora_b.weight") else 1 / math.sqrt(parameter.shape[1])
                tensors[name] = torch.empty(parameter.shape).normal_(std=std, generator=generator)
        return tensors


def our_model(setup: Setup) -> nn.Module:
    """Return our model without memory: it knows names and shapes."""
    with torch.device("meta"):
        return adapted(parse_config(setup.keys), ADAPTERS)


def ours(setup: Setup) -> Case:
    """The steps of our recipe."""
    settings = replace(ADAPTERS, quantize_base=setup.quantize)
    world, config = World(setup.device.type), parse_config(setup.keys)
    choices: dict[str, Any] = {
        "adapter_dtype": setup.adapter_dtype,
        "recompute_every": int(setup.recompute),
        "compiled": setup.compiled,
    }
    make = partial(adapted, config, settings)
    model = world.build(lambda: prepare(make(), **choices), PRECISIONS[setup.dtype])
    fill(model, lambda name: setup.adapter.get(name), lambda name: setup.base[to_hf(name)])
    optimizer = adamw(model.train().parameters())

    def step(samples: Samples) -> float:
        batches = [concatenate(samples)]
        return train_step(world, model, optimizer, SFT(), batches, None).loss

    return Case(model, step)


def ours_liger(setup: Setup) -> Case:
    """The steps of our recipe with Liger's kernels for norm and SwiGLU, which compiling rivals.

    Its rotation takes queries and keys apart, which ours turns in place, where they were computed.
    """
    if setup.device.type != "cuda":
        raise Skipped("Liger's kernels need a GPU")
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction
    except ImportError as error:
        raise Skipped(str(error)) from error

    def norm(module: RMSNorm, x: Tensor) -> Tensor:
        return LigerRMSNormFunction.apply(x, module.scale, module.eps, 0.0, "llama", False)

    def mlp(module: Phi3MLP, x: Tensor) -> Tensor:
        return module.down_proj(LigerFusedGateUpSiLUMulFunction.apply(module.gate_up_proj(x)))

    case = ours(replace(setup, compiled=False))
    for module in case.model.modules():
        if isinstance(module, RMSNorm):
            module.forward = partial(norm, module)
        elif isinstance(module, Phi3MLP):
            module.forward = partial(mlp, module)
    return case


def fill(model: nn.Module, adapter: Callable[[str], Any], base: Callable[[str], Tensor]) -> None:
    """Copy the adapter into a model and let it share the base weights; NF4 is made of them."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(adapter(name))
        elif is_nf4(parameter):
            rows_of(base(name), parameter.detach(), 0, 1, parameter.device)
        else:
            parameter.data = base(name)


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return what all train with."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=2e-4, fused=True)


PARTS = {
    "q_proj": ("qkv_proj", 0, 3),
    "k_proj": ("qkv_proj", 1, 3),
    "v_proj": ("qkv_proj", 2, 3),
    "output_proj": ("o_proj", 0, 1),
    "w1": ("gate_up_proj", 0, 2),
    "w3": ("gate_up_proj", 1, 2),
    "w2": ("down_proj", 0, 1),
}
"""torchtune's layer -> ours, and which part of how many it is of its rows."""


def torchtune(setup: Setup, packed: bool = False) -> Case:
    """Stock torchtune: its model, its recipe's step and its configs' loss."""
    from torchtune import training
    from torchtune.models.phi3._convert_weights import phi3_hf_to_tune
    from torchtune.modules import TransformerSelfAttentionLayer
    from torchtune.modules.loss import CEWithChunkedOutputLoss

    keys, loss_of = setup.keys, CEWithChunkedOutputLoss()
    with training.set_default_dtype(PRECISIONS[setup.dtype]), setup.device:
        model = stock_model(setup)
    heads = keys["num_attention_heads"]
    base = phi3_hf_to_tune(setup.base, heads, heads, keys["hidden_size"])
    fill(model, partial(part, setup.adapter), base.__getitem__)
    optimizer = adamw(model.train().parameters())
    model.set_num_output_chunks(loss_of.num_output_chunks)
    if setup.compiled:
        training.compile_model(model)
        training.compile_loss(loss_of)
    if setup.recompute:
        training.set_activation_checkpointing(model, {TransformerSelfAttentionLayer})

    def step(samples: Samples) -> float:
        packs = [pack(samples, setup.size, setup.pad)] if packed else []
        batch = padded_collate_packed(packs) if packed else padded_collate_sft(samples, setup.pad)
        batch = {key: value.to(setup.device) for key, value in batch.items()}
        labels = batch.pop("labels")
        count = (labels != IGNORED).sum()
        logits = model(**batch)
        loss = loss_of(logits, nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)) * count
        del logits
        loss.backward()
        training.scale_grads(model, 1 / count)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return (loss.detach() / count).item()

    return Case(model, step)


def stock_model(setup: Setup) -> nn.Module:
    """Return torchtune's own Phi-3 with adapters on every linear layer of the blocks."""
    from torchtune.models.phi3._component_builders import lora_phi3
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    keys = setup.keys
    model = lora_phi3(
        ["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        vocab_size=keys["vocab_size"],
        num_layers=keys["num_hidden_layers"],
        num_heads=keys["num_attention_heads"],
        num_kv_heads=keys["num_key_value_heads"],
        embed_dim=keys["hidden_size"],
        intermediate_dim=keys["intermediate_size"],
        max_seq_len=keys["max_position_embeddings"],
        lora_rank=RANK,
        lora_alpha=ALPHA,
        quantize_base=setup.quantize,
    )
    set_trainable_params(model, get_adapter_params(model))
    return model


def part(adapter: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the values of one of torchtune's adapter tensors."""
    block, layer, factor = name.rsplit(".", 3)[0], *name.split(".")[-3:-1]
    ours, number, count = PARTS[layer]
    value = adapter[f"{block}.{ours}.{factor}.weight"]
    return value if factor == "lora_a" else value.chunk(count)[number]


def pack(samples: Samples, size: int | None, padding: int) -> dict[str, Any]:
    """Return samples as one of torchtune's packs, filled up with one more document."""
    row = concatenate(samples)
    missing = max((size or 0) - sum(row["lengths"]), 0)
    fills = {
        "tokens": torch.full((missing,), padding),
        "labels": torch.full((missing,), IGNORED),
        "input_pos": torch.arange(missing),
    }
    columns = {key: torch.cat((row[key][0], fill)) for key, fill in fills.items()}
    return {**columns, "seq_lens": torch.tensor(row["lengths"] + [missing] * bool(missing))}
