"""Whom a run with the loss `distill` learns from: a frozen model that reads the same packed rows.

    teacher_dir     teacher_adapter     the teacher                     memory beside the student's
    null            null                the base, its adapter off       none
    null            an adapter          the base with that adapter      the adapter
    a checkpoint    null, an adapter    another model, with it          that model, NF4 if asked for

The base is the student's own, in memory as it is. Where processes share the student they share
the teacher as well; a base with another adapter is then there twice.
"""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from phi3_plugin.checkpoint.base import known_hash, other_base
from phi3_plugin.checkpoint.files import StoredTensor
from phi3_plugin.config import read_config
from phi3_plugin.data.vocabulary import first_difference
from phi3_plugin.errors import CheckpointError, ConfigError
from phi3_plugin.load import empty_model, fill, tokenizer_of
from phi3_plugin.models.phi3 import PRECISIONS
from phi3_plugin.settings import Settings, is_quantized
from phi3_plugin.train.data import RunData, check_positions
from phi3_plugin.train.losses import Distill, Teacher
from phi3_plugin.train.world import World


def check_teacher(s: Settings, data: RunData) -> None:
    """Refuse a teacher that does not fit the student or the data, before weights are loaded.

    Args:
        s: Of the run.
        data: Of the run.

    Raises:
        ConfigError: The vocabularies differ, or a document is too long for it.
        Phi3Error: Its files are not there, or adapter and base do not fit.
    """
    if s.teacher_dir is None and s.teacher_adapter is None:
        return
    folder = _folder(s)
    config = read_config(folder)
    check_positions(data, config.max_position_embeddings, "teacher")
    ours, theirs = read_config(s.checkpoint_dir).vocab_size, config.vocab_size
    if ours != theirs:
        raise ConfigError(
            f"teacher_dir: {folder} predicts {theirs:,} tokens and the student {ours:,}, so that "
            "what they predict cannot be compared. Use a teacher with the student's vocabulary."
        )
    backend = getattr(data.tokenizer, "backend", None)  # another's tokenizer may have none
    if backend is not None:
        known = tokenizer_of(folder, s.teacher_adapter).backend.get_vocab()
        if difference := first_difference(backend.get_vocab(), known):
            key = "teacher_dir" if s.teacher_adapter is None else "teacher_adapter"
            raise ConfigError(
                f"{key}: {s.teacher_adapter or s.teacher_dir} has another vocabulary than the "
                f"student: {difference}. Use a teacher with the student's tokens, those of "
                "tokenizer.add_tokens included."
            )
    _files(s)  # which opens them, and refuses those that do not fit


def _folder(s: Settings) -> Path:
    return s.teacher_dir or s.checkpoint_dir


def _files(s: Settings) -> tuple[nn.Module, dict[str, Any]]:
    """Return the teacher's model on the meta device, and where its values are."""
    quantize = is_quantized(s.model) if s.teacher_dir is None else s.teacher_quantized
    return empty_model(_folder(s), s.teacher_adapter, dtype=s.dtype, quantize=quantize)


def load_teacher(world: World, s: Settings, loss: Distill, student: nn.Module) -> Teacher:
    """Return the teacher of a run, ready to be asked.

    Args:
        world: All processes.
        s: Of the run.
        loss: What is learned of it.
        student: Loaded.

    Raises:
        CheckpointError: Its weights are damaged.
        Phi3Error: As for :func:`check_teacher`.
    """
    if s.teacher_dir is None and s.teacher_adapter is None:
        return partial(loss.taught_by_base, student)
    model, values = _files(s)
    model.eval().requires_grad_(False)
    if world.mesh:
        offload = s.fsdp_cpu_offload
        reshard = s.fsdp_reshard_after_forward
        dtype = PRECISIONS[s.dtype]
        world.build(lambda: model, dtype, offload=offload, reshard=reshard, keep_head=True)
        world.load(model, values, offload=offload)
    else:
        if s.teacher_dir is None:
            values |= {
                name: parameter
                for name, parameter in student.named_parameters()
                if isinstance(values.get(name), StoredTensor)
            }
        fill(model, values, world.device)
    return partial(loss.taught_by, model)


# What a resumed run must find again.


def identity(s: Settings) -> dict[str, str]:
    """Return what tells the teacher of a run from another one, wherever its files are."""
    adapter, digest = s.teacher_adapter, hashlib.sha256()
    if adapter is not None:
        for file in sorted(adapter.glob("adapter*")) if adapter.is_dir() else [adapter]:
            digest.update(file.read_bytes())
    return {"base": known_hash(_folder(s)), "adapter": digest.hexdigest()}


def check_same_teacher(folder: Path, before: Mapping[str, str], s: Settings) -> None:
    """Refuse to go on with another teacher: no shape would tell.

    Args:
        folder: Of the checkpoint to go on from.
        before: The `identity` that it keeps.
        s: Of the run.

    Raises:
        CheckpointError: It is another one.
    """
    if other_base(before["base"], _folder(s)):
        given = f"teacher_dir={s.teacher_dir or 'null'}"
    elif before["adapter"] != identity(s)["adapter"]:
        given = f"teacher_adapter={s.teacher_adapter or 'null'}"
    else:
        return
    raise CheckpointError(
        f"resume: {folder} was trained with another teacher than that of {given}. Give the one "
        "that the run was started with, or start anew in another output_dir."
    )
