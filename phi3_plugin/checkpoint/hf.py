"""Read the weights of a checkpoint folder in Hugging Face layout."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from phi3_plugin.checkpoint.names import expected_shapes, to_hf, to_ours
from phi3_plugin.config import checkpoint_folder, read_config
from phi3_plugin.errors import CheckpointError, MissingFileError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def load_base_weights(checkpoint_dir: str | Path | None) -> dict[str, Tensor]:
    """Open every base weight of a checkpoint folder.

    The tensors are backed by the files and are paged in when they are copied into the model,
    so the checkpoint is never in memory twice.

    Args:
        checkpoint_dir: Folder with config.json and the shards.

    Returns:
        Our tensor names and their values, in the files' dtype.

    Raises:
        CheckpointError: Shards are damaged, or tensors are missing, unexpected or of the wrong
            shape; all are listed.
        MissingFileError: The folder, config.json, or shards that the index names are missing.
    """
    folder = checkpoint_folder(checkpoint_dir)
    expected = expected_shapes(read_config(folder))
    weight_map = _weight_map(folder)
    found = {file: _header(folder / file) for file in sorted(set(weight_map.values()))}
    problems = _differences(expected, found) + _misplaced(weight_map, found)
    if problems:
        raise CheckpointError(
            f"{folder} does not hold the weights that its config.json describes:\n  "
            + "\n  ".join(problems)
            + "\nDownload the checkpoint again, or correct config.json."
        )
    return {
        to_ours(name): tensor
        for file in found
        for name, tensor in _tensors(folder / file, expected).items()
    }


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
    with safe_open(file, framework="pt") as shard:
        norms: Tensor = shard.get_tensor(hf_name).float().norm(dim=1)
    return norms


def _weight_map(folder: Path) -> dict[str, str]:
    """Return tensor name -> file, from the index or from the single file."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise MissingFileError(_no_weights(folder))
        return dict.fromkeys(_header(folder / SINGLE), SINGLE)
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


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape of one shard; reads no weights."""
    try:
        with safe_open(file, framework="pt") as shard:
            return {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) is damaged or cut short: {error}. "
            "Download it again."
        ) from error


def _tensors(file: Path, names: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as shard:
        return {name: shard.get_tensor(name) for name in shard.keys() if name in names}  # noqa: SIM118


def _differences(
    expected: dict[str, tuple[int, ...]], found: dict[str, dict[str, tuple[int, ...]]]
) -> list[str]:
    shapes = {name: shape for header in found.values() for name, shape in header.items()}
    return (
        [f"missing: {name} {list(expected[name])}" for name in expected if name not in shapes]
        + [f"unexpected: {name} {list(shapes[name])}" for name in shapes if name not in expected]
        + [
            f"wrong shape: {name} is {list(shapes[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ]
    )


def _misplaced(
    weight_map: dict[str, str], found: dict[str, dict[str, tuple[int, ...]]]
) -> list[str]:
    return [
        f"misplaced: {name} is not in {file}, where {INDEX} says it is"
        for name, file in weight_map.items()
        if name not in found[file] and any(name in header for header in found.values())
    ]


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
