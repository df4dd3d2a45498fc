"""Base weights: Hugging Face's shards, and the one table between their names and ours."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from phi3_plugin.checkpoint.files import StoredTensor, quoted, save_tensors, stored_tensors
from phi3_plugin.config import Phi3Config, checkpoint_folder, read_config, read_json_object
from phi3_plugin.errors import (
    AdapterError,
    CheckpointError,
    MissingFileError,
    OutputError,
    Phi3Error,
)
from phi3_plugin.hub import INDEX

# Names. ``{}`` is the number of the layer.

TOK_EMBEDDINGS, OUTPUT = "tok_embeddings", "output"

MODULE_NAMES = {
    "model.embed_tokens": TOK_EMBEDDINGS,
    "model.layers.{}.input_layernorm": "layers.{}.sa_norm",
    "model.layers.{}.self_attn.qkv_proj": "layers.{}.attn.qkv_proj",
    "model.layers.{}.self_attn.o_proj": "layers.{}.attn.o_proj",
    "model.layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
    "model.layers.{}.mlp.gate_up_proj": "layers.{}.mlp.gate_up_proj",
    "model.layers.{}.mlp.down_proj": "layers.{}.mlp.down_proj",
    "model.norm": "norm",
    "lm_head": OUTPUT,
}
"""Modules as Hugging Face names them, and we."""

SCORE = "score"
"""What a Phi3ForSequenceClassification, such as a reward model, has in the place of ``lm_head``."""

INNER = {
    "attn.qkv_proj.q_proj": "attn.q_proj",
    "attn.qkv_proj.k_proj": "attn.k_proj",
    "attn.qkv_proj.v_proj": "attn.v_proj",
    "mlp.gate_up_proj.gate_proj": "mlp.w1",
    "mlp.gate_up_proj.up_proj": "mlp.w3",
}
"""Parts of our fused modules in the order of their rows, and the layers that they are in
torchtune's own Phi-3."""

TORCHTUNE_LAYERS = {
    "attn.qkv_proj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "attn.o_proj": ("attn.output_proj",),
    "mlp.gate_up_proj": ("mlp.w1", "mlp.w3"),
    "mlp.down_proj": ("mlp.w2",),
}
"""Our modules, and torchtune's layers that hold their rows."""

A, B, MAGNITUDE = ".lora_a.weight", ".lora_b.weight", ".magnitude"
"""How the tensors of an adapted module end with us."""

PEFT_ENDINGS = {
    ".lora_A.weight": A,
    ".lora_B.weight": B,
    ".lora_embedding_A": A,
    ".lora_embedding_B": B,
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
}
"""How they end in a file of PEFT."""

NEW_ROWS, PEFT_ROWS = ".new_rows", ".token_adapter.trainable_tokens_delta"
"""How the rows of single tokens end with us and in a file of PEFT."""

PEFT_PREFIX = "base_model.model."

SAVED_WEIGHTS = (f"{OUTPUT}.weight", f"{TOK_EMBEDDINGS}.weight")
"""Base tensors that an adapter may replace, PEFT's modules_to_save."""

_TO_HF = {ours: hf for hf, ours in MODULE_NAMES.items()}
_TORCHTUNE = {
    **INNER,
    **{ours: layers[0] for ours, layers in TORCHTUNE_LAYERS.items() if len(layers) == 1},
}
_FROM_TORCHTUNE = {theirs: ours for ours, theirs in _TORCHTUNE.items()}
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def to_ours(name: str) -> str:
    """Return our name of a tensor in a Hugging Face checkpoint."""
    module, _, parameter = name.rpartition(".")
    ours = _renamed(module, MODULE_NAMES)
    return f"{ours}.{'scale' if ours.endswith('norm') else parameter}"


def to_hf(name: str) -> str:
    """Return Hugging Face's name of one of our base tensors."""
    return f"{_renamed(name.rpartition('.')[0], _TO_HF)}.weight"


def to_hf_reward(name: str) -> str:
    """Return Hugging Face's name of one of our tensors of a reward model."""
    return f"{SCORE}.weight" if name == f"{OUTPUT}.weight" else to_hf(name)


def to_peft(name: str) -> str:
    """Return the name under which PEFT stores one of our adapter tensors."""
    if name in SAVED_WEIGHTS:
        return f"{PEFT_PREFIX}{to_hf(name)}"
    if (module := name.removesuffix(NEW_ROWS)) != name:
        return f"{PEFT_PREFIX}{_renamed(module, _TO_HF)}{PEFT_ROWS}"
    for theirs, ours in PEFT_ENDINGS.items():
        module = name.removesuffix(ours)
        if module != name and ("embedding" in theirs) == (module == TOK_EMBEDDINGS):
            return f"{PEFT_PREFIX}{_renamed(module, _TO_HF)}{theirs}"
    raise CheckpointError(f"{name!r} is not an adapter tensor of this model.")


def from_peft(name: str) -> str:
    """Return our name of a tensor in an adapter file of PEFT."""
    inside = name.removeprefix(PEFT_PREFIX)
    if inside != name and name.endswith(PEFT_ROWS):
        return f"{_renamed(inside.removesuffix(PEFT_ROWS), MODULE_NAMES)}{NEW_ROWS}"
    for theirs, ours in PEFT_ENDINGS.items():
        if inside != name and name.endswith(theirs):
            return f"{_renamed(inside.removesuffix(theirs), MODULE_NAMES)}{ours}"
    if inside != name and inside in map(to_hf, SAVED_WEIGHTS):
        return to_ours(inside)
    raise CheckpointError(f"{name!r} is not an adapter tensor of Phi-3.")


def hf_name(module: str) -> str:
    """Return Hugging Face's name of one of our modules, or of a part as Llama names it."""
    whole, _, part = module.rpartition(".")
    if fused_name(module) == whole:
        return f"{_renamed(whole, _TO_HF).rpartition('.')[0]}.{part}"
    return _renamed(module, _TO_HF)


def torchtune_name(name: str) -> str:
    """Return torchtune's name of one of our modules or tensors, or of a part."""
    return _exchanged(name, _TORCHTUNE)


def from_torchtune(name: str) -> str:
    """Return our name of a module or tensor of torchtune's own Phi-3; ours stay as they are."""
    return _exchanged(name, _FROM_TORCHTUNE)


def _exchanged(name: str, table: Mapping[str, str]) -> str:
    layer, inner = layer_of(name)
    for old, new in table.items():
        if inner == old or inner.startswith(f"{old}."):
            return f"{layer}{new}{inner.removeprefix(old)}"
    return name


def _renamed(module: str, table: Mapping[str, str]) -> str:
    layer = _LAYER.search(module)
    key = _LAYER.sub("{}", module, count=1)
    if key not in table:
        raise CheckpointError(f"{module!r} is not a module of Phi-3. Known: {', '.join(table)}.")
    return table[key].format(layer.group() if layer else "")


def layer_of(module: str) -> tuple[str, str]:
    """Split ``layers.3.attn.o_proj`` into ``layers.3.`` and the rest."""
    words = module.split(".", 2)
    return (f"layers.{words[1]}.", words[2]) if words[0] == "layers" else ("", module)


def fused_name(module: str) -> str:
    """Return the module that holds this part of one; any other is its own."""
    return module.rpartition(".")[0] if layer_of(module)[1] in INNER else module


# Sizes


def expected_shapes(config: Phi3Config, *, is_reward: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a checkpoint of this size holds.

    A head that is tied to the embedding has none of its own; that of a reward model is one row.
    """
    d, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (vocab, d),
        "model.layers.{}.input_layernorm": (d,),
        "model.layers.{}.self_attn.qkv_proj": (config.qkv_size, d),
        "model.layers.{}.self_attn.o_proj": (d, d),
        "model.layers.{}.post_attention_layernorm": (d,),
        "model.layers.{}.mlp.gate_up_proj": (2 * inner, d),
        "model.layers.{}.mlp.down_proj": (d, inner),
        "model.norm": (d,),
        "lm_head": (vocab, d),
    }
    if config.tie_word_embeddings or is_reward:
        del shapes["lm_head"]
    if is_reward:
        shapes[SCORE] = (1, d)
    return {
        f"{module.format(layer)}.weight": shape
        for module, shape in shapes.items()
        for layer in (range(config.num_hidden_layers) if "{}" in module else ("",))
    }


def part_rows(module: str, config: Phi3Config) -> dict[str, slice]:
    """Return the parts of a fused module and their rows of its weight; of another, all are its own.

    Args:
        module: Our name, with or without the layer: ``layers.3.attn.qkv_proj``.
        config: Sizes of the model.
    """
    keys, inner = config.num_key_value_heads * config.head_dim, config.intermediate_size
    sizes = {
        "qkv_proj": {"q_proj": config.hidden_size, "k_proj": keys, "v_proj": keys},
        "gate_up_proj": {"gate_proj": inner, "up_proj": inner},
    }
    rows, start = dict[str, slice](), 0
    for part, size in sizes.get(module.rpartition(".")[2], {}).items():
        rows[f"{module}.{part}"] = slice(start, start + size)
        start += size
    return rows or {module: slice(None)}


def module_sizes(config: Phi3Config) -> dict[str, tuple[int, int]]:
    """Return our name of every module and part, and what its adapter maps: (out, in).

    An embedding maps a token, one of the vocabulary, to a row: out is the model's width.
    """
    sizes = dict[str, tuple[int, int]]()
    for name, shape in expected_shapes(config).items():
        module = to_ours(name).removesuffix(".weight")
        if len(shape) == 2 and module != TOK_EMBEDDINGS:
            sizes[module] = shape[0], shape[1]
            for part, rows in part_rows(module, config).items():
                if part != module:
                    sizes[part] = rows.stop - rows.start, shape[1]
    d, vocab = config.hidden_size, config.vocab_size
    return {**sizes, TOK_EMBEDDINGS: (d, vocab), OUTPUT: (vocab, d)}


def split_weights(weights: Mapping[str, Tensor], config: Phi3Config) -> dict[str, Tensor]:
    """Cut fused base weights into views under the names of torchtune's own Phi-3."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        module, _, parameter = name.rpartition(".")
        for part, rows in part_rows(module, config).items():
            out[torchtune_name(f"{part}.{parameter}")] = value[rows]
    return out


def join_weights(weights: Mapping[str, Tensor], config: Phi3Config) -> dict[str, Tensor]:
    """Fuse the weights of torchtune's own Phi-3; the inverse of :func:`split_weights`.

    Raises:
        CheckpointError: Some are missing, or there are others; all are listed.
    """
    parts = dict[str, list[str]]()
    for name in map(to_ours, expected_shapes(config)):
        module, _, parameter = name.rpartition(".")
        parts[name] = [torchtune_name(f"{p}.{parameter}") for p in part_rows(module, config)]
    refuse_other_names(weights, {part for names in parts.values() for part in names})
    return {name: torch.cat([weights[part] for part in names]) for name, names in parts.items()}


def refuse_other_names(weights: Iterable[str], expected: Iterable[str]) -> None:
    """Refuse weights that are not those of the model in config.json.

    Raises:
        CheckpointError: Some are missing, or there are others; all are listed.
    """
    names, wanted = set(weights), set(expected)
    problems = [f"missing: {name}" for name in sorted(wanted - names)]
    problems += [f"unexpected: {name}" for name in sorted(names - wanted)]
    if problems:
        raise CheckpointError(
            "The model's weights are not those that config.json describes:\n  "
            + "\n  ".join(problems)
        )


# Reading a checkpoint folder

SINGLE = "model.safetensors"


MOST_PROBLEMS = 200
"""Lines of an error about weights."""


def open_weights(
    checkpoint_dir: str | Path | None, *, is_reward: bool = False
) -> dict[str, StoredTensor]:
    """Find every base weight of a checkpoint folder; values are read when they are sliced.

    Args:
        checkpoint_dir: Folder with config.json and the shards.
        is_reward: Whether it is to hold a reward model, a Phi3ForSequenceClassification.

    Returns:
        Our tensor names and where the values are, in the files' dtype.

    Raises:
        CheckpointError: Shards are damaged, or tensors are missing, unexpected or of the wrong
            shape; all are listed.
        MissingFileError: The folder, config.json, or shards that the index names are missing.
    """
    folder = checkpoint_folder(checkpoint_dir)
    config = read_config(folder)
    weight_map = _weight_map(folder)
    shards = {file: stored_tensors(folder / file) for file in sorted(set(weight_map.values()))}
    stored = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    problems = [*_contradicted(config, stored)]
    problems += _wrong_head(stored) if config.tie_word_embeddings else []
    expected = expected_shapes(config, is_reward=is_reward)
    for name in {**expected, **stored}:
        if name not in stored:
            problems.append(f"missing: {name} {list(expected[name])}")
        elif name not in expected:
            problems.append(f"unexpected: {name} {list(stored[name].shape)}")
        elif stored[name].shape != expected[name]:
            shape = list(stored[name].shape)
            problems.append(f"wrong shape: {name} is {shape}, expected {list(expected[name])}")
    problems += [
        f"misplaced: {name} is not in {file}, where {INDEX} says it is"
        for name, file in weight_map.items()
        if name in stored and name not in shards[file]
    ]
    if problems:
        raise CheckpointError(
            f"{folder} does not hold the weights that its config.json describes:\n  "
            + "\n  ".join(problems[:MOST_PROBLEMS])
            + (f"\n  and {more} more" if (more := len(problems) - MOST_PROBLEMS) > 0 else "")
            + "\nDownload the checkpoint again, or correct config.json."
        )
    ours = {f"{SCORE}.weight": f"{OUTPUT}.weight"} if is_reward else {}
    return {ours.get(name) or to_ours(name): tensor for name, tensor in stored.items()}


def load_base_weights(
    checkpoint_dir: str | Path | None, *, is_reward: bool = False
) -> dict[str, Tensor]:
    """Map every base weight of a checkpoint folder, for what needs a state dict.

    Pages are read when they are used, and count as this process's memory for as long as the
    tensors live; :func:`open_weights` has no such cost.

    Args:
        checkpoint_dir: See :func:`open_weights`, as for what is raised.
        is_reward: Likewise.

    Returns:
        Our tensor names and their values, in the files' dtype.
    """
    weights = dict[str, Tensor]()
    for name, stored in open_weights(checkpoint_dir, is_reward=is_reward).items():
        with safe_open(stored.file, framework="pt") as shard:
            weights[name] = shard.get_tensor(stored.name)
    return weights


def stored_row_norms(checkpoint_dir: Path, module: str) -> Tensor:
    """Return the fp32 norm of each row of a base weight, told our name of its module."""
    norms: Tensor = open_weights(checkpoint_dir)[f"{module}.weight"][:].float().norm(dim=1)
    return norms


def _weight_map(folder: Path) -> dict[str, str]:
    """Return tensor name -> file, from the index or from the single file."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return dict.fromkeys(stored_tensors(folder / SINGLE), SINGLE)
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = (
            f"It has {', '.join(pickled)}, which are pickles: convert them to safetensors first."
            if pickled
            else "Download the checkpoint's *.safetensors files."
        )
        raise MissingFileError(f"{folder} has neither {INDEX} nor {SINGLE}. {hint}")
    weight_map = read_json_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(type(n) is str for n in weight_map.values()):
        raise CheckpointError(
            f"{index} is not a shard index: weight_map must be an object of tensors' names and "
            "files. Download it again."
        )
    named = set(weight_map.values())
    if paths := [quoted(name) for name in named if Path(name).name != name]:
        raise CheckpointError(f"{index} names files outside its folder: {', '.join(paths[:3])}.")
    present = {path.name for path in folder.glob("*.safetensors")}
    if missing := sorted(named - present):
        raise MissingFileError(
            f"{folder}: {INDEX} names shards that are not there: {', '.join(missing)}. "
            "Download them; an interrupted download can be continued."
        )
    if extra := sorted(name for name in present - named if name.startswith("model-")):
        raise CheckpointError(
            f"{folder}: shards that {INDEX} does not name: {', '.join(extra)}. They belong to "
            "another version of the checkpoint: remove them or download the folder again."
        )
    return weight_map


def _contradicted(config: Phi3Config, stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Yield the sizes in config.json of which the weights say something else, by their keys."""
    numbers = [re.match(r"model\.layers\.(\d{1,9})\.", name) for name in stored]
    layers = len({number[1] for number in numbers if number})
    if layers != config.num_hidden_layers:
        yield f"num_hidden_layers: {config.num_hidden_layers}, but the weights have {layers} layers"
    embedding = stored.get("model.embed_tokens.weight")
    if embedding is not None and len(embedding.shape) == 2:
        for key, size in zip(("vocab_size", "hidden_size"), embedding.shape, strict=True):
            if size != (given := getattr(config, key)):
                yield f"{key}: {given}, but model.embed_tokens.weight is {list(embedding.shape)}"
    down = stored.get("model.layers.0.mlp.down_proj.weight")
    if down is not None and down.shape[1:] != (config.intermediate_size,):
        yield (
            f"intermediate_size: {config.intermediate_size}, but "
            f"model.layers.0.mlp.down_proj.weight is {list(down.shape)}"
        )


def _wrong_head(stored: dict[str, StoredTensor]) -> list[str]:
    """Take out the copy of a tied embedding that some files hold, and say if it is none."""
    embedding, copy = stored.get("model.embed_tokens.weight"), stored.pop("lm_head.weight", None)
    if copy is None or embedding is None:
        return []
    same = (copy.shape, copy.dtype) == (embedding.shape, embedding.dtype)
    steps = (slice(start, start + 4096) for start in range(0, copy.shape[0], 4096))
    if same and all(torch.equal(copy[step], embedding[step]) for step in steps):
        return []
    return ["not tied: lm_head.weight differs from model.embed_tokens.weight, but "
            "tie_word_embeddings is true"]  # fmt: skip


# Writing one

SHARD_BYTES = 5_000_000_000


def write_weights(
    folder: Path,
    sizes: Mapping[str, int],
    weight: Callable[[str], Tensor],
    shard_bytes: int = SHARD_BYTES,
    name_of: Callable[[str], str] = to_hf,
) -> None:
    """Write weights as shards with an index, under Hugging Face's names.

    Args:
        folder: An existing folder.
        sizes: Our name of each weight, and how many bytes it takes.
        weight: Gives one when it is written; one shard is in memory at a time.
        shard_bytes: A shard is closed before it grows beyond this.
        name_of: Gives Hugging Face's name of one.

    Raises:
        OutputError: The disk has not enough room.
    """
    total, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if free < total:
        raise OutputError(
            f"{folder.parent} has {free / 1e9:.1f} GB left, but the weights take "
            f"{total / 1e9:.1f} GB. Make room, or choose a folder on another disk."
        )
    shards, filled = list[list[str]]([[]]), 0
    for name, size in sizes.items():
        if filled + size > shard_bytes and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = folder / f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_tensors(file, {name_of(name): weight(name) for name in names})
        weight_map.update(dict.fromkeys(map(name_of, names), file.name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


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
    stats = [(file.name, file.stat()) for file in folder.glob("*.safetensors") if file.exists()]
    return _hash_of(folder, tuple(sorted((n, s.st_size, s.st_mtime_ns) for n, s in stats)))


# A run saves often, and reads nothing again for it while the files are the same.
@lru_cache(maxsize=8)
def _hash_of(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, stored in sorted((to_hf(name), w) for name, w in open_weights(folder).items()):
        digest.update(f"{name} {list(stored.shape)}\n".encode())
        rows = [slice(None)]
        if len(stored.shape) > 1:
            last = stored.shape[0] - 1
            rows = [slice(int(place * last), int(place * last) + 1) for place in PLACES]
        for some in rows:
            values = stored[some].to(torch.float32).numpy()
            digest.update(values.astype("<f4", copy=False).tobytes())
    return METHOD + digest.hexdigest()


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
    if own in (recorded, ""):
        return None
    there, here = (value.removeprefix(METHOD)[:12] for value in (recorded, own))
    return f"{there}, but those here have {here}"


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
