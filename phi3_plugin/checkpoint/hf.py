"""Read the weights of a checkpoint folder in Hugging Face layout."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from phi3_plugin.checkpoint.names import EMBEDDING, HEAD, expected_shapes, to_hf, to_ours
from phi3_plugin.checkpoint.stored import StoredTensor, equal, stored_tensors
from phi3_plugin.config import checkpoint_folder, read_config
from phi3_plugin.errors import CheckpointError, MissingFileError

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
