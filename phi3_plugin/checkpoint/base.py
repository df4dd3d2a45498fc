"""Base weights: Hugging Face's shards, and the one table between their names and ours."""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from phi3_plugin.checkpoint.files import DTYPES, StoredTensor, equal, stored_tensors
from phi3_plugin.config import Phi3Config, checkpoint_folder, read_config
from phi3_plugin.errors import (
    AdapterError,
    CheckpointError,
    MissingFileError,
    OutputError,
    Phi3Error,
)

# The one table between Hugging Face's tensor names and ours, read both ways.

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

NAMES = {
    EMBEDDING: "tok_embeddings",
    "model.layers.{}.input_layernorm": "layers.{}.sa_norm",
    "model.layers.{}.self_attn.qkv_proj": "layers.{}.attn.qkv_proj",
    "model.layers.{}.self_attn.o_proj": "layers.{}.attn.o_proj",
    "model.layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
    "model.layers.{}.mlp.gate_up_proj": "layers.{}.mlp.gate_up_proj",
    "model.layers.{}.mlp.down_proj": "layers.{}.mlp.down_proj",
    "model.norm": "norm",
    HEAD: "output",
}
"""Module names; ``{}`` is the number of the layer."""

PARAMETERS = {
    "lora_A.weight": "lora_a.weight",
    "lora_B.weight": "lora_b.weight",
    "lora_magnitude_vector": "magnitude",
}
"""Parameter names in an adapter file of PEFT, and ours."""

EMBEDDING_PARAMETERS = {
    "lora_embedding_A": "lora_a.weight",
    "lora_embedding_B": "lora_b.weight",
}
"""The same of an embedding."""

SAVED = ("output.weight", "tok_embeddings.weight")
"""Base tensors that an adapter may replace, PEFT's modules_to_save."""

PEFT_PREFIX = "base_model.model."

_TO_HF = {ours: hf for hf, ours in NAMES.items()}
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def to_ours(name: str) -> str:
    """Return our name of a tensor in a Hugging Face checkpoint."""
    module, _, parameter = name.rpartition(".")
    ours = _rename(module, NAMES)
    return f"{ours}.{'scale' if ours.endswith('norm') else parameter}"


def to_hf(name: str) -> str:
    """Return Hugging Face's name of one of our base tensors."""
    module, _, _ = name.rpartition(".")
    return f"{_rename(module, _TO_HF)}.weight"


def to_peft(name: str) -> str:
    """Return the name under which PEFT stores one of our adapter tensors."""
    if name in SAVED:
        return f"{PEFT_PREFIX}{to_hf(name)}"
    table = EMBEDDING_PARAMETERS if name.startswith("tok_embeddings.") else PARAMETERS
    for theirs, ours in table.items():
        if name.endswith(f".{ours}"):
            return f"{PEFT_PREFIX}{_rename(name.removesuffix(f'.{ours}'), _TO_HF)}.{theirs}"
    raise CheckpointError(f"{name!r} is not an adapter tensor of this model.")


def from_peft(name: str) -> str:
    """Return our name of a tensor in an adapter file of PEFT."""
    inside = name.removeprefix(PEFT_PREFIX)
    for theirs, ours in {**PARAMETERS, **EMBEDDING_PARAMETERS}.items():
        if inside != name and name.endswith(f".{theirs}"):
            return f"{_rename(inside.removesuffix(f'.{theirs}'), NAMES)}.{ours}"
    if inside in (f"{EMBEDDING}.weight", f"{HEAD}.weight") and inside != name:
        return to_ours(inside)
    raise CheckpointError(f"{name!r} is not an adapter tensor of Phi-3.")


def expected_shapes(config: Phi3Config) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a checkpoint of this size holds.

    A head that is tied to the embedding has none of its own.
    """
    d, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (vocab, d),
        "model.layers.{}.input_layernorm": (d,),
        "model.layers.{}.self_attn.qkv_proj": (config.qkv_size, d),
        "model.layers.{}.self_attn.o_proj": (d, d),
        "model.layers.{}.post_attention_layernorm": (d,),
        "model.layers.{}.mlp.gate_up_proj": (2 * inner, d),
        "model.layers.{}.mlp.down_proj": (d, inner),
        "model.norm": (d,),
        HEAD: (vocab, d),
    }
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return {
        f"{module.format(layer)}.weight": shape
        for module, shape in shapes.items()
        for layer in (range(config.num_hidden_layers) if "{}" in module else ("",))
    }


def _rename(module: str, table: dict[str, str]) -> str:
    layer = _LAYER.search(module)
    key = _LAYER.sub("{}", module, count=1)
    if key not in table:
        raise CheckpointError(f"{module!r} is not a module of Phi-3. Known: {', '.join(table)}.")
    return table[key].format(layer.group() if layer else "")


# Adapters on parts of a fused layer, to and from the one adapter that PEFT has for the whole.
#
# The parts are layers in torchtune's own split Phi-3 (q, k, v, w1, w2, w3), and rows of one layer in
# our model. A fused layer stacks its parts' rows, so adapters on parts are one adapter on the whole::
#
#     parts  q: B_q A_q    v: B_v A_v          (k has none)
#     fused  A = [A_q]     B = [B_q   0 ]      rank 2 r, the same scale
#                [A_v]         [ 0    0 ]
#                              [ 0   B_v]

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
Tensors = dict[str, Tensor]


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
    adapter: Tensors, config: Phi3Config, row_norms: Callable[[str], Tensor]
) -> Tensors:
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
    out: Tensors = {}
    for name, value in adapter.items():
        layer, module, parameter = _module(name)
        if module not in _FUSED_OF:
            out[name] = value
        elif parameter == "lora_a.weight":
            fused = _FUSED_OF[module]
            whole = _fuse_layer(adapter, layer, fused, config, row_norms)
            out.update({f"{layer}{fused}.{key}": tensor for key, tensor in whole.items()})
    return out


def unfuse_adapter(adapter: Tensors, ranks: Mapping[str, int], config: Phi3Config) -> Tensors:
    """Undo :func:`fuse_adapter` bit for bit.

    Args:
        adapter: Fused names, possibly padded with zeros to a larger rank.
        ranks: Every module that had an adapter, under its own name, and its rank.
        config: Sizes of the model.

    Raises:
        CheckpointError: The adapter has no tensors for one of them.
    """
    out: Tensors = {}
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
    adapter: Tensors,
    layer: str,
    fused: str,
    config: Phi3Config,
    row_norms: Callable[[str], Tensor],
) -> Tensors:
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


def _of(adapter: Tensors, layer: str, parts: list[str], key: str) -> list[Tensor]:
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


# Every module of a Phi-3 that can have an adapter: its size, and what other programs call it.

WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.")
"""What PEFT, DDP, torch.compile and FSDP put before names."""


def module_sizes(config: Phi3Config) -> dict[str, tuple[int, int]]:
    """Return our name of every module and part, and what its adapter maps: (out, in).

    An embedding maps a token, one of the vocabulary, to a row: out is the model's width.
    """
    d, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    sizes = {
        "attn.qkv_proj": (config.qkv_size, d),
        "attn.o_proj": (d, d),
        "mlp.gate_up_proj": (2 * inner, d),
        "mlp.down_proj": (d, inner),
    }
    for part, split in INNER.items():
        rows = part_rows(part.rpartition(".")[0], config)[split]
        sizes[part] = rows.stop - rows.start, d
    layers = range(config.num_hidden_layers)
    out = {f"layers.{n}.{name}": size for n in layers for name, size in sizes.items()}
    return {**out, "tok_embeddings": (d, vocab), "output": (vocab, d)}


def aliases(config: Phi3Config) -> dict[str, str]:
    """Return every name under which a module may come, and ours.

    These are Hugging Face's, with and without ``model.``, with the parts as Llama names them;
    torchtune's; and ours.
    """
    out = {}
    for ours in module_sizes(config):
        for name in (ours, hf_name(ours), torchtune_name(ours)):
            out[name] = out[name.removeprefix("model.")] = ours
    return out


def hf_name(module: str) -> str:
    """Return Hugging Face's name of one of our modules, or Llama's of a part."""
    if module in ("tok_embeddings", "output"):
        return EMBEDDING if module == "tok_embeddings" else HEAD
    _, layer, block, *inner = module.split(".")
    fused = f"model.layers.{layer}.{HF_BLOCKS[block]}"
    return f"{fused}.{inner[-1]}"


HF_BLOCKS = {
    ours.split(".")[2]: hf.split(".")[3]
    for hf, ours in NAMES.items()
    if ours.startswith("layers.") and len(ours.split(".")) == 4
}
"""attn and mlp, as Hugging Face names them."""


def torchtune_name(module: str) -> str:
    """Return torchtune's name of one of our modules; it has none for whole qkv and gate_up."""
    layer, inner = layer_of(module)
    return f"{layer}{TORCHTUNE.get(inner, inner)}"


TORCHTUNE = {**INNER, **{fused: parts[0] for fused, parts in PARTS.items() if len(parts) == 1}}


def layer_of(module: str) -> tuple[str, str]:
    """Split ``layers.3.attn.o_proj`` into ``layers.3.`` and the rest."""
    words = module.split(".", 2)
    return (f"layers.{words[1]}.", words[2]) if words[0] == "layers" else ("", module)


def unwrapped(name: str) -> str:
    """Return a name without what other programs put before it."""
    while prefix := next((p for p in WRAPPERS if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


# Read the weights of a checkpoint folder in Hugging Face layout.

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def load_base_weights(checkpoint_dir: str | Path | None) -> dict[str, Tensor]:
    """Map every base weight of a checkpoint folder, for what needs a state dict.

    Pages are read when they are used, and count as this process's memory for as long as the
    tensors live; :func:`open_weights` has no such cost.

    Args:
        checkpoint_dir: See :func:`open_weights`, as for what is raised.

    Returns:
        Our tensor names and their values, in the files' dtype.
    """
    stored = open_weights(checkpoint_dir)
    files = sorted({tensor.file for tensor in stored.values()})
    weights = {to_ours(name): value for file in files for name, value in _mapped(file).items()}
    return {name: weights[name] for name in stored}


def open_weights(checkpoint_dir: str | Path | None) -> dict[str, StoredTensor]:
    """Find every base weight of a checkpoint folder; values are read when they are sliced.

    Args:
        checkpoint_dir: Folder with config.json and the shards.

    Returns:
        Our tensor names and where the values are, in the files' dtype.

    Raises:
        CheckpointError: Shards are damaged, or tensors are missing, unexpected or of the wrong
            shape; all are listed.
        MissingFileError: The folder, config.json, or shards that the index names are missing.
    """
    folder = checkpoint_folder(checkpoint_dir)
    config = read_config(folder)
    expected, weight_map = expected_shapes(config), _weight_map(folder)
    found = {file: stored_tensors(folder / file) for file in sorted(set(weight_map.values()))}
    stored = {name: tensor for file in found.values() for name, tensor in file.items()}
    problems = _wrong_head(stored) if config.tie_word_embeddings else []
    problems += _differences(expected, stored) + _misplaced(weight_map, found)
    if problems:
        raise CheckpointError(
            f"{folder} does not hold the weights that its config.json describes:\n  "
            + "\n  ".join(problems)
            + "\nDownload the checkpoint again, or correct config.json."
        )
    return {to_ours(name): tensor for name, tensor in stored.items()}


def save_weights(folder: Path, weights: dict[str, Tensor], shard_bytes: int = 4 << 30) -> None:
    """Write weights as shards with an index, under Hugging Face's names.

    Args:
        folder: An existing folder.
        weights: Our names.
        shard_bytes: A shard is closed before it grows beyond this.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in weights.items():
        if size + value.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][to_hf(name)] = value.contiguous()
        size += value.nbytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def row_norms(checkpoint_dir: Path, name: str) -> Tensor:
    """Return the fp32 norm of each row of one base weight.

    Args:
        checkpoint_dir: A folder that :func:`load_base_weights` reads.
        name: Our name of the module.
    """
    hf_name = to_hf(f"{name}.weight")
    file = checkpoint_dir / _weight_map(checkpoint_dir)[hf_name]
    norms: Tensor = stored_tensors(file)[hf_name][:].float().norm(dim=1)
    return norms


def _weight_map(folder: Path) -> dict[str, str]:
    """Return tensor name -> file, from the index or from the single file."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise MissingFileError(_no_weights(folder))
        return dict.fromkeys(stored_tensors(folder / SINGLE), SINGLE)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a shard index: {error!r}. Download it.") from error
    if paths := sorted(name for name in files if not _is_plain_name(name)):
        raise CheckpointError(f"{index} names files outside its folder: {paths}.")
    _check_files(folder, files)
    return dict(weight_map)


def _check_files(folder: Path, named: set[str]) -> None:
    present = {path.name for path in folder.glob("*.safetensors")}
    if missing := sorted(named - present):
        raise MissingFileError(
            f"{folder}: {INDEX} names shards that are not there: {', '.join(missing)}. "
            "Download them; an interrupted download can be continued."
        )
    extra = sorted(name for name in present - named if name.startswith("model-"))
    if extra:
        raise CheckpointError(
            f"{folder}: shards that {INDEX} does not name: {', '.join(extra)}. They belong to "
            "another version of the checkpoint: remove them or download the folder again."
        )


def _mapped(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as shard:
        return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118


def _differences(
    expected: dict[str, tuple[int, ...]], stored: dict[str, StoredTensor]
) -> list[str]:
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    return (
        [f"missing: {name} {list(expected[name])}" for name in expected if name not in shapes]
        + [f"unexpected: {name} {list(shapes[name])}" for name in shapes if name not in expected]
        + [
            f"wrong shape: {name} is {list(shapes[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ]
    )


def _misplaced(weight_map: dict[str, str], found: dict[str, dict[str, StoredTensor]]) -> list[str]:
    return [
        f"misplaced: {name} is not in {file}, where {INDEX} says it is"
        for name, file in weight_map.items()
        if name not in found[file] and any(name in header for header in found.values())
    ]


def _wrong_head(stored: dict[str, StoredTensor]) -> list[str]:
    """Take out the copy of a tied embedding that some files hold, and say if it is none."""
    embedding, head = f"{EMBEDDING}.weight", f"{HEAD}.weight"
    copy = stored.pop(head, None)
    if copy is None or embedding not in stored or equal(copy, stored[embedding]):
        return []
    return [f"not tied: {head} differs from {embedding}, but tie_word_embeddings is true"]


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    hint = (
        f"It has {', '.join(pickled)}, which are pickles: convert them to safetensors first."
        if pickled
        else "Download the checkpoint's *.safetensors files."
    )
    return f"{folder} has neither {INDEX} nor {SINGLE}. {hint}"


# Write safetensors files piece by piece, for weights that are never in memory whole.
#
# Source: the safetensors format: a little-endian uint64, that many bytes of JSON, the data.

SHARD_BYTES = 5_000_000_000
CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 8
"""The data begins at a multiple of it, as safetensors' own files do."""


@dataclass(frozen=True)
class Entry:
    """A tensor that is made while it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]
    """Its rows in order, some at a time, in its dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path, entries: Mapping[str, Entry], shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write tensors as shards with an index and return the shards.

    Args:
        folder: An existing folder.
        entries: Hugging Face's names.
        shard_bytes: A shard is closed before it grows beyond this.

    Raises:
        OutputError: The disk has not enough room.
    """
    total = sum(entry.nbytes for entry in entries.values())
    _check_room(folder, total)
    shards, weight_map = _shards(entries, shard_bytes), dict[str, str]()
    files = [
        folder / f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    for file, shard in zip(files, shards, strict=True):
        write_tensors(file, shard)
        weight_map.update(dict.fromkeys(shard, file.name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return files


def write_tensors(file: Path, entries: Mapping[str, Entry]) -> None:
    """Write one file, a piece at a time.

    Raises:
        ValueError: The pieces of a tensor are not what its entry says.
    """
    # Wide numbers first: then every tensor begins at a multiple of its numbers' width.
    ordered = sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in ordered:
        header[name] = _header(entry, offset)
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, entry in ordered:
            written = sum(out.write(_bytes(piece, entry)) for piece in entry.pieces())
            if written != entry.nbytes:
                raise ValueError(f"{name}: {written} bytes were made, not {entry.nbytes}.")


def _header(entry: Entry, offset: int) -> dict[str, object]:
    ends = [offset, offset + entry.nbytes]
    return {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": ends}


def _bytes(piece: Tensor, entry: Entry) -> memoryview:
    if piece.dtype != entry.dtype:
        raise ValueError(f"A piece is in {piece.dtype}, its tensor in {entry.dtype}.")
    return piece.contiguous().flatten().view(torch.uint8).numpy().data  # the same memory


def _shards(entries: Mapping[str, Entry], shard_bytes: int) -> list[dict[str, Entry]]:
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if size + entry.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.nbytes
    return shards


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder.parent} has {free / 1e9:.1f} GB left, but the weights take "
            f"{needed / 1e9:.1f} GB. Make room, or choose a folder on another disk."
        )


# Which base weights an adapter was made for, told by a hash that takes no time.
#
# A repository's name says little: a folder may hold a revision, a model that was merged or trained
# on, or another one altogether, whose shapes are the same and with which an adapter computes
# nonsense.

PLACES = (0, 5 / 8, 3 / 4, 1)
"""Of the rows that are read: each of q, k, v, gate and up has one, however many heads there are."""

METHOD = "rows4:"
"""What a hash begins with, so that one of another kind is never taken for another base."""


def base_hash(checkpoint_dir: Path) -> str:
    """Return what tells the weights of one base model from those of another.

    It is that of four rows of every tensor, and of norms whole: of 7.6 GB some 5 MB are read.
    Weights in bf16 and the same ones stored in fp32 have one hash, however they are sharded.

    Args:
        checkpoint_dir: Folder in Hugging Face layout.

    Raises:
        CheckpointError: The weights are damaged or not those of config.json.
        MissingFileError: Files are missing.
    """
    folder = checkpoint_dir.resolve()
    files = [file for file in folder.glob("*.safetensors") if file.exists()]  # no broken links
    return _hash_of(folder, tuple(sorted(map(_stamp, files))))


def known_hash(checkpoint_dir: Path) -> str:
    """Return the same, or nothing where the weights cannot be read.

    Saving an adapter does not need them: nothing that was trained is to be lost over a hash.
    """
    try:
        return base_hash(checkpoint_dir)
    except (Phi3Error, OSError):
        return ""


def other_base(recorded: str, checkpoint_dir: Path) -> str | None:
    """Say in words that a hash is not that of a base; None if it is, or if nothing is known.

    Args:
        recorded: What an adapter's file says; empty if it is not ours.
        checkpoint_dir: Of the base at hand.
    """
    if not recorded.startswith(METHOD):
        return None
    own = known_hash(checkpoint_dir)
    return None if own in (recorded, "") else f"{short(recorded)}, but those here have {short(own)}"


def refuse_other_base(adapter: Path, recorded: str, base: str, checkpoint_dir: Path) -> None:
    """Refuse an adapter that was made for other weights.

    Args:
        adapter: For the message.
        recorded: See :func:`other_base`.
        base: What the adapter calls its base, if anything.
        checkpoint_dir: Of the base at hand.

    Raises:
        AdapterError: It was.
    """
    if hashes := other_base(recorded, checkpoint_dir):
        raise AdapterError(
            f"{adapter} was made for other weights than those of {checkpoint_dir}: for some with "
            f"the hash {hashes}. It names {base or 'no base'}: give that, or allow it with "
            "check_base=False if you know that the two belong together."
        )


def short(value: str) -> str:
    """Return what of a hash is shown."""
    return value.removeprefix(METHOD)[:12]


def _stamp(file: Path) -> tuple[str, int, int]:
    about = file.stat()
    return file.name, about.st_size, about.st_mtime_ns


# A run saves often, and reads nothing again for it while the files are the same.
@lru_cache(maxsize=8)
def _hash_of(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    return hash_of(open_weights(folder))


def hash_of(weights: Mapping[str, StoredTensor]) -> str:
    """Return the hash of weights that are open.

    Args:
        weights: By our names.
    """
    found = hashlib.sha256()
    for name, stored in sorted((to_hf(name), stored) for name, stored in weights.items()):
        found.update(f"{name} {list(stored.shape)}\n".encode())
        for rows in _rows(stored):
            values = stored[rows].to(torch.float32).numpy()
            found.update(values.astype("<f4", copy=False).tobytes())
    return METHOD + found.hexdigest()


def _rows(stored: StoredTensor) -> list[slice]:
    if len(stored.shape) == 1:
        return [slice(None)]
    last = stored.shape[0] - 1
    return [slice(int(place * last), int(place * last) + 1) for place in PLACES]
