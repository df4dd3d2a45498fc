"""Base and adapter as one model of ONNX Runtime, made by onnxruntime-genai's own model builder.

The builder runs in a process of its own, on the CPU. An adapter is given to it in one of two ways:

    beside   by its ``adapter_path``: A and B stay matrices of their own beside each weight
    merged   in the weights: the model is smaller and faster, and the adapter may be any

Source: onnxruntime-genai 0.18.0, models/builder.py and models/builders/base.py.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.base import OUTPUT, TOK_EMBEDDINGS, open_weights
from phi3_plugin.checkpoint.files import whole_folder
from phi3_plugin.checkpoint.merge import MergeReport, merge_into
from phi3_plugin.checkpoint.peft import export_adapter, set_dtype
from phi3_plugin.checkpoint.peft_config import problem_list
from phi3_plugin.config import read_config, read_json_object
from phi3_plugin.errors import AdapterError, CheckpointError, MissingFileError
from phi3_plugin.options import OnnxType

BUILDER = "onnxruntime_genai.models.builder"
ONNX_PACKAGES = {
    "onnxruntime_genai": "onnxruntime-genai",
    "onnx": "onnx",
    "onnx_ir": "onnx-ir",
    "transformers": "transformers",
    "peft": "peft",
}
"""What the builder imports, and by which name pip installs it."""

ALWAYS_SAID = ("hf_token=false", "windowed_kv_cache=false")
"""A cache of a window's length ends in an error once a Phi-3 goes beyond its window."""

WRITTEN = ("model.onnx", "genai_config.json", "tokenizer.json")


def check_builder() -> None:
    """Refuse to begin where the builder could not run.

    Raises:
        MissingFileError: A package is not installed; all are named.
    """
    if missing := [
        package for module, package in ONNX_PACKAGES.items() if find_spec(module) is None
    ]:
        raise MissingFileError(
            "A model of ONNX Runtime is made by onnxruntime-genai's builder, for which here is no "
            f"{', no '.join(missing)}. Install what is missing: pip install {' '.join(missing)}"
        )


def write_onnx(
    out: Path, checkpoint_dir: Path, kind: OnnxType, adapter: Adapter | None = None
) -> None:
    """Write the folder that onnxruntime-genai loads, of a base, and an adapter beside it.

    Args:
        out: The folder to create.
        checkpoint_dir: The base.
        kind: Of the weights, the adapter's too: ``int4`` in blocks of 32, or ``fp32``.
        adapter: Our names.

    Raises:
        AdapterError: The builder would write something that does not compute the adapter.
        CheckpointError: The builder ended with an error; its last lines are told.
        MissingFileError: It is not installed.
        OutputError: The folder exists or cannot be written.
    """
    check_builder()
    if adapter and (problems := list(_unfit(adapter))):
        raise AdapterError(
            "onnxruntime-genai's builder does not compute this adapter beside the base:\n"
            f"{problem_list(problems, 8)}\nMerge it: phi3-tune adapter merge --to onnx."
        )
    with whole_folder(out) as folder, _workplace(folder) as work:
        options = []
        if adapter:
            place = work / "adapter"
            place.mkdir()
            export_adapter(place, adapter, checkpoint_dir=checkpoint_dir, card={}, patterns=True)
            options.append(f"adapter_path={place}")
        _build(_as_stored(checkpoint_dir, work), folder.resolve(), kind, work, options)


def merge_onnx(
    out: Path,
    checkpoint_dir: Path,
    adapter: Adapter,
    kind: OnnxType,
    *,
    dtype: Literal["bf16", "fp32"] | None = None,
    onto: Literal["original", "nf4"] = "original",
) -> MergeReport:
    """Write the folder that onnxruntime-genai loads, with any adapter in its weights.

    The merged model lies in the folder meanwhile, so that its disk must have room for both.

    Args:
        out: The folder to create.
        checkpoint_dir: The base.
        adapter: Our names.
        kind: Of the weights, ``int4`` or ``fp32``.
        dtype: To which sums are rounded before; None is fp32 for fp32, else each weight's own.
        onto: See :func:`phi3_plugin.checkpoint.merge.merge_into`.

    Raises:
        Phi3Error: See :func:`write_onnx` and :func:`phi3_plugin.checkpoint.merge.merge_into`.
    """
    check_builder()
    with whole_folder(out) as folder, _workplace(folder) as work:
        merged = work / "merged"
        dtype = dtype or ("fp32" if kind == "fp32" else None)
        report = merge_into(merged, checkpoint_dir, adapter, dtype=dtype, onto=onto)
        _build(merged, folder.resolve(), kind, work, [])
    return report


def _as_stored(checkpoint_dir: Path, work: Path) -> Path:
    """Return a folder with links to a base's files, whose config.json names their precision.

    The builder rounds to the one that is named, and a base may be stored in a wider one.
    """
    folder = work / "base"
    folder.mkdir()
    for file in checkpoint_dir.iterdir():
        if file.is_file() and file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    largest = max(open_weights(checkpoint_dir).values(), key=lambda stored: math.prod(stored.shape))
    keys = read_json_object(checkpoint_dir / "config.json")
    keys.pop("auto_map", None)  # names code, which is neither there nor needed
    set_dtype(keys, str(largest.dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")
    return folder


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """Give a folder within one that is being written, and remove it if all went well."""
    work = (folder / "work").resolve()
    work.mkdir()
    yield work
    shutil.rmtree(work)


def onnx_differs(checkpoint_dir: Path) -> Iterator[str]:
    """Yield where onnxruntime-genai computes something else with this base than was trained."""
    config = read_config(checkpoint_dir)
    if config.sliding_window and config.sliding_window < config.max_position_embeddings:
        yield (
            "onnxruntime-genai has no sliding window for a Phi-3: beyond "
            f"{config.sliding_window} tokens it attends to more than training did."
        )


def _unfit(adapter: Adapter) -> Iterator[str]:
    """Yield what the builder passes over in silence, or breaks at."""
    if adapter.is_dora:
        yield "magnitude: DoRA's are passed over."
    if whole := {**adapter.saved, **adapter.rows}:
        yield f"{', '.join(sorted(whole))}: weights or rows of them that are trained whole."
    if ends := sorted({TOK_EMBEDDINGS, OUTPUT} & adapter.ranks.keys()):
        yield f"{', '.join(ends)}: an adapter on embedding or head."


def _build(source: Path, folder: Path, kind: str, work: Path, options: list[str]) -> None:
    """Run the builder, which says much and is heard only where it fails."""
    where = ["-i", str(source), "-o", str(folder), "-c", str(work / "cache")]
    command = [sys.executable, "-m", BUILDER, *where, "-p", kind, "-e", "cpu"]
    log = work / "builder.log"
    with log.open("wb") as stream:
        done = subprocess.run(
            [*command, "--extra_options", *ALWAYS_SAID, *options],
            cwd=work,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},  # all that it needs is here
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode or not all((folder / name).is_file() for name in WRITTEN):
        lines = log.read_text("utf-8", "replace").strip().splitlines()[-5:]
        why = (
            f"ended by signal {-done.returncode}" if done.returncode < 0 else "ended with an error"
        )
        told = "\n".join(f"  {line[-300:]}" for line in lines)
        raise CheckpointError(f"onnxruntime-genai's builder {why}:\n{told}")
