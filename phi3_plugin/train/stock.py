"""What torchtune's own recipes are given: a checkpointer, and a logger that waits.

The checkpointer's folders are those of :mod:`phi3_plugin.train.checkpoints`, one an epoch.
"""

import logging
import os
import re
import time
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchtune.training import FormattedCheckpointFiles
from torchtune.training.metric_logging import save_config

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.base import (
    OUTPUT,
    expected_shapes,
    join_weights,
    known_hash,
    load_base_weights,
    open_weights,
    refuse_other_names,
    split_weights,
    to_ours,
)
from phi3_plugin.checkpoint.files import append_whole, check_output, whole_folder
from phi3_plugin.checkpoint.peft import (
    WEIGHTS,
    check_trained,
    export_adapter,
    export_model,
    targets_of,
)
from phi3_plugin.config import checkpoint_folder, read_config
from phi3_plugin.errors import CheckpointError, ConfigError, MissingFileError, OutputError
from phi3_plugin.lock import FolderLock
from phi3_plugin.redaction import redacted_as_spelled
from phi3_plugin.train.checkpoints import STATE, Exporter, load_state, problem_of, save

log = logging.getLogger(__name__)

_EPOCH = re.compile(r"epoch_(\d+)")
_RESUMED = set[Path]()
"""Folders of the run that this process goes on with: a recipe's checkpointer of a reference model
may be given the same one, though it writes nothing and is told that nothing is resumed."""


class Phi3Checkpointer:
    """Reads a Phi-3 checkpoint folder and writes one folder an epoch that serves as it stands.

    ``output_dir/epoch_N`` holds a PEFT adapter with a model card or, of a recipe that trains all
    weights, a Hugging Face checkpoint; beside it the tokenizer and, until the last epoch, the
    recipe's state. A folder is written aside and renamed, so it is whole or absent.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path | None,
        output_dir: str | Path | None,
        *,
        layout: str = "fused",
        lora_attn_modules: Sequence[str] | None = None,
        lora_dropout: float = 0.0,
        card: Mapping[str, Any] | None = None,
        save_adapter_weights_only: bool = True,
        should_load_recipe_state: bool = False,
        model_type: str = "PHI3_MINI",
        checkpoint_files: Sequence[str] | Mapping[str, str] | None = None,
        recipe_checkpoint: str | Path | None = None,
        adapter_checkpoint: str | Path | None = None,
        resume_from_checkpoint: bool = False,
        safe_serialization: bool = True,
    ) -> None:
        """Check both folders; nothing is read or written yet.

        Args:
            checkpoint_dir: Folder of the base model in Hugging Face layout.
            output_dir: Where the epoch folders go.
            layout: ``fused`` for the models of this package, ``split`` for torchtune's own
                Phi-3 with q_proj, k_proj, v_proj, w1, w2, w3. Adapters are always saved fused.
            lora_attn_modules: Those of the model. A resume with others than were saved is then
                refused here, and not by an assertion of the recipe's that names none of them.
            lora_dropout: Recorded in adapter_config.json.
            card: Rows of the model card's table: what the adapter was trained on and how. The
                recipes tell a checkpointer nothing of it, so the YAML does.
            save_adapter_weights_only: The recipe's setting of that name, which must be True.
            should_load_recipe_state: True when the recipe resumes.
            model_type: REWARD is a reward or value model for torchtune's PPO recipe, read and
                written as transformers' Phi3ForSequenceClassification; others are read by
                torchtune's recipes only.
            checkpoint_files: As torchtune's checkpointers take it. The index of the folder says
                it already, so that others than it names are refused.
            recipe_checkpoint: The state in the newest epoch's folder, which a resume finds by
                itself; another one is refused.
            adapter_checkpoint: The adapter in that folder, likewise.
            resume_from_checkpoint: torchtune's older name of ``should_load_recipe_state``.
            safe_serialization: Must be True: pickles are not written.

        Raises:
            ConfigError: A key is not set or cannot be honoured.
            MissingFileError: There is no checkpoint, or nothing to resume from.
            OutputError: The output folder cannot be written, holds another run, or another process
                has it.
        """
        if not save_adapter_weights_only:
            raise ConfigError(
                "save_adapter_weights_only: False is not supported: on a CPU torchtune's recipes "
                "then merge the adapter into the weights that are still being trained. Set it "
                "to True and merge the saved adapter with `phi3-tune adapter merge`."
            )
        if not safe_serialization:
            raise ConfigError(
                "checkpointer.safe_serialization: False is not supported: it would write pickles. "
                "Set it to True."
            )
        if layout not in ("fused", "split"):
            raise ConfigError(f"checkpointer.layout: {layout!r} must be 'fused' or 'split'.")
        if layout == "split" and model_type == "REWARD":
            raise ConfigError(
                "checkpointer.layout: 'split' is that of torchtune's own Phi-3, which has no "
                "reward model. Leave it out and build phi3_plugin.models.phi3_reward."
            )
        self._checkpoint_dir = checkpoint_folder(checkpoint_dir)
        if output_dir is None:
            raise ConfigError(
                "output_dir is not set. Set it in the YAML or add output_dir=/path/to/results to "
                "the command."
            )
        self._output_dir = Path(output_dir).expanduser()
        check_output(self._output_dir, self._checkpoint_dir)
        if int(os.environ.get("RANK", 0)) == 0:  # it writes for all; several may share a folder
            lock = FolderLock(self._output_dir, "output_dir")
            weakref.finalize(self, lock.release)
        self.model_type = model_type
        self._is_reward = model_type == "REWARD"
        self._layout = layout
        self._targets = lora_attn_modules
        self._dropout = lora_dropout
        self._card = {str(key): value for key, value in (card or {}).items()}
        self._files = checkpoint_files
        self._resume = should_load_recipe_state or resume_from_checkpoint
        epochs = self._epochs()
        state, adapter = (epochs[-1] / name if epochs else None for name in (STATE, WEIGHTS))
        self._refuse_other_file("recipe_checkpoint", recipe_checkpoint, state)
        self._refuse_other_file("adapter_checkpoint", adapter_checkpoint, adapter)
        if self._resume:
            _RESUMED.add(self._output_dir.resolve())
        elif epochs and self._output_dir.resolve() not in _RESUMED:
            raise OutputError(
                f"output_dir: {output_dir} holds the checkpoints of another run "
                f"({', '.join(path.name for path in epochs)}). Choose another folder, or continue "
                "that run with resume_from_checkpoint=True."
            )

    def load_checkpoint(self) -> dict[str, Any]:
        """Return the base weights under ``model`` and, when resuming, what was trained and state.

        What was trained is under ``adapter`` or, where all weights were, in place of the base's.

        Raises:
            CheckpointError: The weights or the saved state are damaged or do not fit.
            ConfigError: ``checkpoint_files`` names others than the folder has.
            MissingFileError: Files are missing.
        """
        # The cheap part first: a run that cannot resume should say so before 8 GB are read.
        state = self._load_state() if self._resume else {}
        self._refuse_other_shards()
        is_whole = self._resume and "adapter" not in state
        folder = self._epochs()[-1] if is_whole else self._checkpoint_dir
        weights = load_base_weights(folder, is_reward=self._is_reward)
        known_hash(self._checkpoint_dir)  # for what is saved, so that no save has to read it
        if self._layout == "split":
            weights = split_weights(weights, read_config(self._checkpoint_dir))
        return {"model": weights, **state}

    def save_checkpoint(
        self,
        state_dict: dict[str, Any],
        epoch: int,
        intermediate_checkpoint: bool,
        adapter_only: bool = True,
    ) -> None:
        """Write ``epoch_N``, called by the recipe with what it gathered.

        Args:
            state_dict: ``adapter`` and ``adapter_config``, or all weights under ``model``; and
                recipe state in between epochs.
            epoch: N, from 0.
            intermediate_checkpoint: Whether more epochs follow, so that state is worth keeping.
            adapter_only: What a recipe with adapters was told; merged weights are never written.

        Raises:
            AdapterError: The adapter is untrained or not finite.
            CheckpointError: The weights are not those of config.json, or not finite.
            OutputError: The folder cannot be written.
        """
        is_adapter = "adapter" in state_dict
        if is_adapter:
            write = self._adapter_writer(state_dict, epoch)
        else:
            weights = self._checked_weights(state_dict["model"])
            write = partial(
                export_model,
                weights=weights,
                checkpoint_dir=self._checkpoint_dir,
                is_reward=self._is_reward,
            )
        folder = self._output_dir / f"epoch_{epoch}"
        if intermediate_checkpoint:
            unsaved = ("adapter_config", "model")
            state = {key: value for key, value in state_dict.items() if key not in unsaved}
            state["layout"] = self._layout
            save(folder, epoch + 1, write, state, replace=False)
        else:
            with whole_folder(folder) as unfinished:
                write(unfinished)
        log.info("Saved a %s to %s", "PEFT adapter" if is_adapter else "whole model", folder)
        if is_adapter and not adapter_only:
            raise ConfigError(
                f"save_adapter_weights_only: False is not supported; the adapter is in {folder}, "
                "the merged weights were not written. Set it to True."
            )

    def _adapter_writer(self, state_dict: Mapping[str, Any], epoch: int) -> Exporter:
        """Return what writes a recipe's adapter into a folder, if it is worth keeping."""
        check_trained(state_dict["adapter"])
        settings = state_dict["adapter_config"]
        adapter = Adapter.of(
            state_dict["adapter"],
            settings["lora_alpha"] / settings["r"],
            dropout=self._dropout,
            origin={"layout": self._layout},
        )
        card = {**self._card, "epochs trained": epoch + 1}
        return partial(
            export_adapter, adapter=adapter, checkpoint_dir=self._checkpoint_dir, card=card
        )

    def _checked_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a recipe's weights fused and on the CPU, if they are a Phi-3's and finite."""
        config = read_config(self._checkpoint_dir)
        whole = {name: weight.detach().cpu() for name, weight in weights.items()}
        if self._layout == "split":
            whole = join_weights(whole, config)
        head = {f"{OUTPUT}.weight"} if self._is_reward else set[str]()
        names = {*map(to_ours, expected_shapes(config))} | head
        refuse_other_names(whole, names)
        if broken := [name for name, weight in whole.items() if not torch.isfinite(weight).all()]:
            raise CheckpointError(
                f"{len(broken)} of {len(whole)} weights hold NaN or infinite numbers, first "
                f"{broken[0]}. Nothing was saved. Lower the learning rate or set clip_grad_norm."
            )
        return whole

    def _refuse_other_file(self, key: str, named: str | Path | None, newest: Path | None) -> None:
        """Refuse to resume from a file that is not the newest epoch's."""
        if named is None:
            return
        # torchtune takes a name within output_dir as well as a path.
        paths = [path.resolve() for path in (Path(named), self._output_dir / named)]
        if newest is None or newest.resolve() not in paths:
            raise ConfigError(
                f"checkpointer.{key}: {named}, but a resume goes on from the newest epoch of "
                f"{self._output_dir}: {newest or 'there is none'}. Set it to null, and move "
                "newer epochs away to go on from an older one."
            )

    def _refuse_other_shards(self) -> None:
        """Refuse ``checkpoint_files`` that are not those of the checkpoint folder."""
        if self._files is None:
            return
        stored = open_weights(self._checkpoint_dir, is_reward=self._is_reward).values()
        shards = sorted({tensor.file.name for tensor in stored})
        named = list(self._files)
        if isinstance(self._files, Mapping):
            pattern = FormattedCheckpointFiles.from_dict(dict(self._files))
            named = pattern.build_checkpoint_filenames()
        if sorted(named) != shards:
            raise ConfigError(
                f"checkpointer.checkpoint_files: {named}, but the weights of "
                f"{self._checkpoint_dir} are in {shards}. Name those, or leave the key out."
            )

    def _epochs(self) -> list[Path]:
        """Return the epoch folders of the run, oldest first."""
        matches = [_EPOCH.fullmatch(path.name) for path in self._output_dir.glob("epoch_*")]
        numbers = sorted(int(match.group(1)) for match in matches if match)
        return [self._output_dir / f"epoch_{number}" for number in numbers]

    def _load_state(self) -> dict[str, Any]:
        """Return adapter and recipe state of the newest epoch, if they are this model's."""
        epochs = self._epochs()
        if not epochs:
            raise MissingFileError(
                f"resume_from_checkpoint: {self._output_dir} has no epoch_* folder to resume "
                "from. Set output_dir to the folder of the interrupted run, or start anew with "
                "resume_from_checkpoint=False."
            )
        folder = epochs[-1]
        if not (folder / STATE).exists():
            raise CheckpointError(
                f"resume_from_checkpoint: {folder} is the last epoch of a finished run; "
                "torchtune's recipe keeps no optimizer state there. It is ready to use. "
                "To train longer, start a new run with more epochs, or move this folder away to "
                "go on from the epoch before it."
            )
        if problem := problem_of(folder):
            raise CheckpointError(
                f"resume_from_checkpoint: {folder} cannot be resumed from: {problem}. Move it "
                "away to go on from the epoch before it."
            )
        state = load_state(folder, STOCK_STATE)
        if state["layout"] != self._layout:
            raise CheckpointError(
                f"checkpointer.layout: {self._layout!r}, but {folder} was saved from a model with "
                f"layout {state['layout']!r}. Resume with the model it was started with."
            )
        # The head and torchtune's MLP have switches of their own.
        others = ("output", "w1", "w2", "w3")
        targets = [t for t in targets_of(state.get("adapter", ())) if t not in others]
        if self._targets is not None and targets != sorted(set(self._targets)):
            raise CheckpointError(
                f"lora_attn_modules: {list(self._targets)}, but {folder} was saved from a model "
                f"with {targets}. Resume with the model it was started with."
            )
        return {key: value for key, value in state.items() if key not in ("layout", "step")}


STOCK_STATE = {"layout": str, "step": int, "optimizer": object, "epochs_run": int, "seed": int}
"""What a state has that torchtune's recipes go on from; see `load_state`."""


class DiskLogger:
    """Writes ``output_dir/logs/log_*.txt`` and the settings, from the first step on.

    torchtune's recipes start their logger before they look at anything else; its own loggers
    write at once, and leave files behind when the run is refused a moment later.
    """

    def __init__(self, output_dir: str | Path | None) -> None:
        """Write nothing yet.

        Args:
            output_dir: Where the run's results go. None is left to the checkpointer to refuse.
        """
        self._output_dir = None if output_dir is None else Path(output_dir).expanduser()
        self._config: DictConfig | None = None
        self._file: Path | None = None

    def log_config(self, config: DictConfig) -> None:
        """Keep the settings until the first step."""
        self._config = config

    def log(self, name: str, data: float, step: int) -> None:
        """Write one number.

        Raises:
            OutputError: The disk is full, or the folder cannot be written to.
        """
        self._write(f"Step {step} | {name}:{data}\n")

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Write the numbers of one step on one line.

        Raises:
            OutputError: The disk is full, or the folder cannot be written to.
        """
        numbers = "".join(f"{name}:{data} " for name, data in payload.items())
        self._write(f"Step {step} | {numbers}\n")

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def _write(self, line: str) -> None:
        folder = Path(f"{self._output_dir}/logs")
        try:
            if self._file is None:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = folder / f"log_{int(time.time())}.txt"
                print(f"Writing logs to {self._file}")
                if self._config is not None:
                    save_config(redacted_as_spelled(self._config))
            append_whole(self._file, line.encode())
        except OSError as error:
            raise OutputError(
                f"{folder} could not be written to: {error.strerror or error}. Free space or make "
                "it writable, then resume from the last checkpoint."
            ) from error
