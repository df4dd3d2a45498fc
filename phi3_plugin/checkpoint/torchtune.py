"""torchtune's side: its split modules, its adapter file, and the checkpointer its recipes talk to."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from phi3_plugin.checkpoint.adapter import (
    MAGNITUDE,
    A,
    Adapter,
    B,
    check_servable,
    level,
    pad,
    whole_alpha,
)
from phi3_plugin.checkpoint.base import (
    INNER,
    fused_name,
    known_hash,
    layer_of,
    load_base_weights,
    part_rows,
    split_weights,
    torchtune_name,
)
from phi3_plugin.checkpoint.files import (
    check_output,
    latest_epoch,
    load_state,
    refuse_other_run,
    save_state,
    whole_files,
    whole_folder,
    write_state,
)
from phi3_plugin.checkpoint.peft import (
    CONFIG,
    ORIGIN,
    check_trained,
    export_adapter,
    load_origin,
    load_trained,
    targets_of,
)
from phi3_plugin.config import Phi3Config, checkpoint_folder, read_config
from phi3_plugin.errors import AdapterError, CheckpointError, ConfigError

# Adapters for torchtune's own Phi-3, whose q, k, v, w1 and w3 are layers of their own.

# Shapes: R rank


def write_torchtune(file: Path, adapter: Adapter, config: Phi3Config) -> None:
    """Write an adapter that ``torchtune.models.phi3.lora_phi3_mini`` loads, and its settings.

    A whole layer is cut: every part gets a copy of A and its rows of B, which is exact. Since a
    model of torchtune has one rank and one alpha, smaller ranks are padded and other scales go
    into B; adapter_config.json beside the file says rank and alpha, and by what the original comes
    back.

    Args:
        file: Such as adapter_model.pt; it and adapter_config.json must not exist.
        adapter: What to write.
        config: Of the base model.

    Raises:
        AdapterError: It adapts or replaces what torchtune's model cannot.
        OutputError: The files exist or cannot be written.
    """
    held, rank, alpha, note = torchtune_tensors(adapter, config)
    tensors = {
        torchtune_name(name.removesuffix(ending)) + ending: value.contiguous()
        for name, value in held.items()
        for ending in (A, B, MAGNITUDE)
        if name.endswith(ending)
    }
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets_of(tensors),
        "peft_type": "LORA",
        "use_dora": adapter.is_dora,
        "lora_dropout": adapter.dropout,
        "base_model_name_or_path": adapter.base,
        ORIGIN: note,
    }
    with whole_files(file.with_name(CONFIG), file) as (config_file, weights_file):
        config_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        write_state(weights_file, tensors)


def torchtune_tensors(
    adapter: Adapter, config: Phi3Config
) -> tuple[dict[str, Tensor], int, int, dict[str, object]]:
    """Return what torchtune's file holds under our names, rank, alpha, and a note of the original.

    Raises:
        AdapterError: torchtune's model has no place for a module.
    """
    check_servable(adapter)
    if "tok_embeddings" in adapter.ranks:
        raise AdapterError("tok_embeddings: torchtune's Phi-3 has no adapter on its embedding.")
    if adapter.saved:
        raise AdapterError(
            f"{', '.join(adapter.saved)}: an adapter of torchtune's holds no weights that are "
            "trained whole. Merge the adapter instead."
        )
    rank = max(adapter.ranks.values())
    alpha = whole_alpha(adapter.scales.values(), rank)
    scales = dict.fromkeys(map(fused_name, adapter.ranks), alpha / rank)
    tensors, note = level(adapter, scales)
    return cut(pad(tensors, rank), config), rank, alpha, note


def cut(tensors: dict[str, Tensor], config: Phi3Config) -> dict[str, Tensor]:
    """Return an adapter on parts alone: those of whole layers share its A, and split its B.

    Args:
        tensors: Our names; ``lora_a [R, in]``, ``lora_b [out, R]``, ``magnitude [out]``.
        config: Sizes of the model.
    """
    out = {}
    for name, value in tensors.items():
        ending = next(e for e in (A, B, MAGNITUDE) if name.endswith(e))
        module = name.removesuffix(ending)
        _, inner = layer_of(module)
        parts = {part: split for part, split in INNER.items() if part.startswith(f"{inner}.")}
        if not parts:
            out[name] = value
        for part, split in parts.items():
            rows = slice(None) if ending == A else part_rows(inner, config)[split]
            out[f"{module}.{part.rpartition('.')[2]}{ending}"] = value[rows].clone()
    return out


# The checkpointer that torchtune's LoRA recipes talk to.

log = logging.getLogger(__name__)


class Phi3Checkpointer:
    """Reads a Phi-3 checkpoint folder and writes one PEFT adapter folder an epoch.

    ``output_dir/epoch_N`` holds the adapter, the tokenizer with config.json, a model card and,
    until the last epoch, the recipe's state. A folder is written aside and renamed, so it is
    whole or absent.
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
            model_type: Read by torchtune's recipes only.

        Raises:
            ConfigError: A key is not set or cannot be honoured.
            MissingFileError: There is no checkpoint, or nothing to resume from.
            OutputError: The output folder cannot be written or holds another run.
        """
        if not save_adapter_weights_only:
            raise ConfigError(
                "save_adapter_weights_only: False is not supported: on a CPU torchtune's recipes "
                "then merge the adapter into the weights that are still being trained. Set it "
                "to True and merge the saved adapter with `phi3-tune adapter merge`."
            )
        if layout not in ("fused", "split"):
            raise ConfigError(f"checkpointer.layout: {layout!r} must be 'fused' or 'split'.")
        self.model_type, self._layout = model_type, layout
        self._checkpoint_dir = checkpoint_folder(checkpoint_dir)
        self._config = read_config(self._checkpoint_dir)
        self._output_dir = _output_folder(output_dir, self._checkpoint_dir)
        self._targets = lora_attn_modules
        self._dropout, self._resume = lora_dropout, should_load_recipe_state
        self._card = {str(key): value for key, value in (card or {}).items()}
        if not should_load_recipe_state:
            refuse_other_run(self._output_dir)

    def load_checkpoint(self) -> dict[str, Any]:
        """Return the base weights under ``model`` and, when resuming, adapter and recipe state.

        Raises:
            CheckpointError: The weights or the saved state are damaged or do not fit.
            MissingFileError: Files are missing.
        """
        # The cheap part first: a run that cannot resume should say so before 8 GB are read.
        state: dict[str, Any] = {}
        if self._resume:
            folder = latest_epoch(self._output_dir)
            state = {**load_state(folder), "adapter": self._load_adapter(folder)}
        weights = load_base_weights(self._checkpoint_dir)
        known_hash(self._checkpoint_dir)  # for what is saved, so that no save has to read it
        if self._layout == "split":
            weights = split_weights(weights, self._config)
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
            state_dict: ``adapter`` and ``adapter_config``, and recipe state in between epochs.
            epoch: N, from 0.
            intermediate_checkpoint: Whether more epochs follow, so that state is worth keeping.
            adapter_only: What the recipe was told; merged weights are never written.

        Raises:
            AdapterError: The adapter is untrained or not finite.
            OutputError: The folder cannot be written.
        """
        check_trained(state_dict["adapter"])
        final = self._output_dir / f"epoch_{epoch}"
        with whole_folder(final) as folder:
            self._save_adapter(folder, state_dict["adapter"], state_dict["adapter_config"], epoch)
            if intermediate_checkpoint:
                inside = {"adapter", "adapter_config", "model"}
                save_state(folder, {k: v for k, v in state_dict.items() if k not in inside})
        log.info("Saved a PEFT adapter to %s", final)
        if not adapter_only:
            raise ConfigError(
                f"save_adapter_weights_only: False is not supported; the adapter is in {final}, "
                "the merged weights were not written. Set it to True."
            )

    def _save_adapter(
        self, folder: Path, adapter: dict[str, Tensor], settings: dict[str, Any], epoch: int
    ) -> None:
        export_adapter(
            folder,
            Adapter.of(
                adapter,
                settings["lora_alpha"] / settings["r"],
                dropout=self._dropout,
                origin={"layout": self._layout},
            ),
            checkpoint_dir=self._checkpoint_dir,
            card={**self._card, "epochs trained": epoch + 1},
        )

    def _load_adapter(self, folder: Path) -> dict[str, Tensor]:
        origin = load_origin(folder)
        if origin.get("layout") != self._layout:
            raise CheckpointError(
                f"checkpointer.layout: {self._layout!r}, but {folder} was saved from a model with "
                f"layout {origin.get('layout')!r}. Resume with the model it was started with."
            )
        adapter = load_trained(folder, self._checkpoint_dir)
        # The head and torchtune's MLP have switches of their own.
        saved = [t for t in targets_of(adapter) if t not in ("output", "w1", "w2", "w3")]
        if self._targets is not None and saved != sorted(set(self._targets)):
            raise CheckpointError(
                f"lora_attn_modules: {list(self._targets)}, but {folder} was saved from a model "
                f"with {saved}. Resume with the model it was started with."
            )
        return adapter


def _output_folder(output_dir: str | Path | None, checkpoint_dir: Path) -> Path:
    if output_dir is None:
        raise ConfigError(
            "output_dir is not set. Set it in the YAML or add output_dir=/path/to/results to "
            "the command."
        )
    folder = Path(output_dir)
    check_output(folder, checkpoint_dir)
    return folder
