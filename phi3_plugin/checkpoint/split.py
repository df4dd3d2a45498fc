"""Adapters on parts of a fused layer, to and from the one adapter that PEFT has for the whole.

The parts are layers in torchtune's own split Phi-3 (q, k, v, w1, w2, w3), and rows of one layer in
our model. A fused layer stacks its parts' rows, so adapters on parts are one adapter on the whole::

    parts  q: B_q A_q    v: B_v A_v          (k has none)
    fused  A = [A_q]     B = [B_q   0 ]      rank 2 r, the same scale
               [A_v]         [ 0    0 ]
                             [ 0   B_v]
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import CheckpointError

PARTS = {
    "attn.qkv_proj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "attn.o_proj": ("attn.output_proj",),
    "mlp.gate_up_proj": ("mlp.w1", "mlp.w3"),
    "mlp.down_proj": ("mlp.w2",),
}
"""Fused module and its parts in the order of their rows; w1 is the gate, w3 up, w2 down."""

INNER = {
    "attn.qkv_proj.q_proj": "attn.q_proj",
    "attn.qkv_proj.k_proj": "attn.k_proj",
    "attn.qkv_proj.v_proj": "attn.v_proj",
    "mlp.gate_up_proj.gate_proj": "mlp.w1",
    "mlp.gate_up_proj.up_proj": "mlp.w3",
}
"""A part within our fused module, and the same part in the split model."""

_FUSED_OF = {part: fused for fused, parts in PARTS.items() for part in parts}

# Shapes: R rank of one part, P number of parts with an adapter
Adapter = dict[str, Tensor]


def is_split(adapter: Iterable[str]) -> bool:
    """Whether adapter names are those of the split model."""
    return any(_module(name)[1] in _FUSED_OF for name in adapter)


def split_weights(weights: dict[str, Tensor], config: Phi3Config) -> dict[str, Tensor]:
    """Cut fused base weights into views under the split model's names."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        layer, module, parameter = _module(name)
        if module not in PARTS:
            out[name] = value
            continue
        for part, rows in part_rows(module, config).items():
            out[f"{layer}{part}.{parameter}"] = value[rows]
    return out


def part_rows(fused: str, config: Phi3Config) -> dict[str, slice]:
    """Return which rows of a fused weight each part holds."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    sizes = {
        "attn.q_proj": heads * config.head_dim,
        "attn.k_proj": kv_heads * config.head_dim,
        "attn.v_proj": kv_heads * config.head_dim,
        "mlp.w1": config.intermediate_size,
        "mlp.w3": config.intermediate_size,
    }
    rows, start = {}, 0
    for part in PARTS[fused]:
        stop = start + sizes.get(part, config.hidden_size)
        rows[part], start = slice(start, stop), stop
    return rows


def fuse_adapter(
    adapter: Adapter, config: Phi3Config, row_norms: Callable[[str], Tensor]
) -> Adapter:
    """Turn adapters on parts into the one adapter on each fused layer that computes the same.

    Args:
        adapter: Names of the split model or of parts within ours; ``lora_a [R, in]``,
            ``lora_b [rows, R]``, and for DoRA ``magnitude [rows]``.
        config: Sizes of the model.
        row_norms: Gives the norms of the rows of a fused base weight, told its name. Rows of a
            part without DoRA keep them as their magnitude.

    Returns:
        Fused names, ``lora_a [P R, in]``, ``lora_b [all rows, P R]``.
    """
    adapter = {_as_split(name): value for name, value in adapter.items()}
    out: Adapter = {}
    for name, value in adapter.items():
        layer, module, parameter = _module(name)
        if module not in _FUSED_OF:
            out[name] = value
        elif parameter == "lora_a.weight":
            fused = _FUSED_OF[module]
            whole = _fuse_layer(adapter, layer, fused, config, row_norms)
            out.update({f"{layer}{fused}.{key}": tensor for key, tensor in whole.items()})
    return out


def unfuse_adapter(adapter: Adapter, ranks: Mapping[str, int], config: Phi3Config) -> Adapter:
    """Undo :func:`fuse_adapter` bit for bit.

    Args:
        adapter: Fused names, possibly padded with zeros to a larger rank.
        ranks: Every module that had an adapter, under its own name, and its rank.
        config: Sizes of the model.

    Raises:
        CheckpointError: The adapter has no tensors for one of them.
    """
    out: Adapter = {}
    for module, (whole, rows, columns) in _places(ranks, config).items():
        cut = {"lora_a.weight": (columns,), "lora_b.weight": (rows, columns), "magnitude": (rows,)}
        for parameter, at in cut.items():
            if (value := adapter.get(f"{whole}.{parameter}")) is not None:
                out[f"{module}.{parameter}"] = value[at].clone()
            elif parameter != "magnitude":
                raise CheckpointError(f"The adapter is incomplete: {whole}.{parameter} is missing.")
    return out


def fused_name(module: str) -> str:
    """Return the module that holds this one, which may be itself."""
    layer, inner, _ = _module(f"{module}.lora_a.weight")
    return f"{layer}{_FUSED_OF.get(INNER.get(inner, inner), inner)}"


def _places(ranks: Mapping[str, int], config: Phi3Config) -> dict[str, tuple[str, slice, slice]]:
    """Return where in which fused adapter each module is: its name, rows of B and columns of B."""
    order = [part for parts in PARTS.values() for part in parts]
    inner = {name: _module(f"{name}.lora_a.weight")[1] for name in ranks}
    split = {name: INNER.get(module, module) for name, module in inner.items()}
    used: dict[str, int] = {}
    out = {}
    for name in sorted(ranks, key=lambda n: order.index(split[n]) if split[n] in order else -1):
        whole, part = fused_name(name), split[name]
        fused = _FUSED_OF.get(part)
        rows = part_rows(fused, config)[part] if fused else slice(None)
        start = used.get(whole, 0)
        used[whole] = start + ranks[name]
        out[name] = whole, rows, slice(start, used[whole])
    return {name: out[name] for name in ranks}


def parts_of(adapter: Iterable[str]) -> list[str]:
    """Return the parts that carry an adapter, as they are named within a layer."""
    known = _FUSED_OF.keys() | INNER.keys()
    return sorted({_module(name)[1] for name in adapter} & known)


def _fuse_layer(
    adapter: Adapter,
    layer: str,
    fused: str,
    config: Phi3Config,
    row_norms: Callable[[str], Tensor],
) -> Adapter:
    rows = part_rows(fused, config)
    present = [part for part in rows if f"{layer}{part}.lora_a.weight" in adapter]
    tensors = {key: _of(adapter, layer, present, key) for key in ("lora_a.weight", "lora_b.weight")}
    b = torch.block_diag(*tensors["lora_b.weight"])
    whole_b = b.new_zeros(max(r.stop for r in rows.values()), b.shape[1])
    at = torch.cat([torch.arange(rows[part].start, rows[part].stop) for part in present])
    whole_b[at] = b
    whole = {"lora_a.weight": torch.cat(tensors["lora_a.weight"]), "lora_b.weight": whole_b}
    if f"{layer}{present[0]}.magnitude" in adapter:
        magnitude = torch.cat(_of(adapter, layer, present, "magnitude"))
        if len(present) < len(rows):
            magnitude = row_norms(f"{layer}{fused}").to(magnitude).index_copy(0, at, magnitude)
        whole["magnitude"] = magnitude
    return whole


def _of(adapter: Adapter, layer: str, parts: list[str], key: str) -> list[Tensor]:
    try:
        return [adapter[f"{layer}{part}.{key}"] for part in parts]
    except KeyError as error:
        raise CheckpointError(f"The adapter is incomplete: {error} is missing.") from error


def _as_split(name: str) -> str:
    layer, module, parameter = _module(name)
    return f"{layer}{INNER[module]}.{parameter}" if module in INNER else name


def _module(name: str) -> tuple[str, str, str]:
    """Split ``layers.3.attn.q_proj.lora_a.weight`` into layer, module and parameter."""
    for parameter in ("lora_a.weight", "lora_b.weight", "magnitude", "weight", "scale"):
        if name.endswith(f".{parameter}"):
            module = name.removesuffix(f".{parameter}")
            head, _, rest = module.partition("layers.")
            number, _, inner = rest.partition(".")
            layer = f"{head}layers.{number}." if inner else ""
            return layer, inner or module, parameter
    return "", name, ""
