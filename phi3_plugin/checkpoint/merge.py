"""An adapter put into the weights it was trained on, as a checkpoint folder of its own."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor
from torchtune.training import set_default_dtype

from phi3_plugin import hub
from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.base import (
    MAGNITUDE,
    OUTPUT,
    SHARD_BYTES,
    TOK_EMBEDDINGS,
    A,
    B,
    fused_name,
    open_weights,
    part_rows,
    write_weights,
)
from phi3_plugin.checkpoint.files import StoredTensor, check_output, whole_folder
from phi3_plugin.checkpoint.gguf_model import name_for_llama_cpp, write_model
from phi3_plugin.checkpoint.peft import (
    base_name,
    copy_tokenizer,
    front_matter,
    markdown_table,
    set_dtype,
    targets_of,
)
from phi3_plugin.config import GENERATION, Phi3Config, generation_config, read_config, read_json
from phi3_plugin.data.vocabulary import read_vocabulary
from phi3_plugin.errors import AdapterError, Phi3Error
from phi3_plugin.models.new_tokens import with_rows
from phi3_plugin.models.nf4 import Rows, nf4_zeros, rows_of
from phi3_plugin.models.phi3 import PRECISIONS
from phi3_plugin.options import Quantization

MERGED_INTO = {"original": "the base model", "nf4": "what NF4 makes of the base model"}

# Shapes: R rank


@dataclass
class Difference:
    """How far apart two merged models are, over the weights of the layers that NF4 holds."""

    far: float = 0.0
    """The largest distance of two weights."""
    top: float = 0.0
    """The largest weight of the first."""
    apart: float = 0.0
    """Sum of all distances."""
    size: float = 0.0
    """Sum of all weights of the first, without their signs."""

    def add(self, one: Tensor, other: Tensor) -> None:
        """Count a weight of both."""
        apart, size = (other - one).abs(), one.abs()
        self.far = max(self.far, apart.max().item())
        self.top = max(self.top, size.max().item())
        self.apart += apart.sum(dtype=torch.float64).item()
        self.size += size.sum(dtype=torch.float64).item()

    @property
    def largest(self) -> float:
        """The largest distance, as a part of the largest weight there is."""
        return self.far / (self.top or 1.0)

    @property
    def mean(self) -> float:
        """The mean distance, as a part of the mean absolute weight."""
        return self.apart / (self.size or 1.0)


@dataclass(frozen=True)
class MergeReport:
    """What was written."""

    changed: tuple[str, ...]
    """The weights that the adapter changes, our names."""
    dtype: str
    """Of the weights, as config.json names it."""
    untied: bool
    """Whether a tied head got weights of its own: the adapter changes it or the embedding."""
    difference: Difference | None
    """From the same adapter merged onto the original base, if it was merged onto NF4's."""
    remarks: tuple[str, ...] = ()
    """What llama.cpp does otherwise than transformers, if a file for it was written."""


def merge_into(
    out: Path,
    checkpoint_dir: Path,
    adapter: Adapter,
    *,
    dtype: Literal["bf16", "fp32"] | None = None,
    onto: Literal["original", "nf4"] = "original",
    gguf: Quantization | None = None,
    shard_bytes: int = SHARD_BYTES,
    card: Mapping[str, Any] | None = None,
) -> MergeReport:
    """Write a model that computes what base and adapter compute, as a checkpoint folder or a file.

    One shard is in memory at a time; of a file for llama.cpp a weight and the next. Sums are in
    fp32 and rounded once.

    Args:
        out: The folder to create, or the file.
        checkpoint_dir: The base that the adapter was trained on.
        adapter: What to put into its weights; :func:`phi3_plugin.checkpoint.foreign.read_adapter`
            has found that it fits.
        dtype: Of all weights; None is each one's own in the base.
        onto: ``nf4`` for an adapter that is to stay on the quantized base of its training.
        gguf: Write one file for llama.cpp instead of a folder, with weights of this type; they are
            those of the folder, converted.
        shard_bytes: A shard is closed before it grows beyond this.
        card: Rows of the model card's table beside base, adapter, dtype and ``onto``.

    Raises:
        AdapterError: DoRA has to give a norm to what is all zero.
        OutputError: ``out`` exists, cannot be written, or has not enough room.
    """
    config, base = read_config(checkpoint_dir), open_weights(checkpoint_dir)
    check_output(out, checkpoint_dir)
    modules: dict[str, list[str]] = {}
    for module in adapter.ranks:
        modules.setdefault(f"{fused_name(module)}.weight", []).append(module)
    ends = {f"{TOK_EMBEDDINGS}.weight", f"{OUTPUT}.weight"}
    weights: dict[str, Rows] = {**base, **with_rows(base, adapter.rows)}
    # The rows of a tied head are the embedding's, and stay so
    untied = config.tie_word_embeddings and not ends.isdisjoint({*modules, *adapter.saved})
    if untied:
        base[f"{OUTPUT}.weight"] = base[f"{TOK_EMBEDDINGS}.weight"]
        weights[f"{OUTPUT}.weight"] = weights[f"{TOK_EMBEDDINGS}.weight"]
    weights |= adapter.saved
    dtypes = {name: PRECISIONS.get(dtype or "", stored.dtype) for name, stored in base.items()}
    changed = tuple(sorted({*modules, *adapter.saved, *(f"{m}.weight" for m in adapter.rows)}))
    difference = Difference() if onto == "nf4" else None

    def weight(name: str) -> Tensor:
        value, changes = weights[name][:], modules.get(name, [])
        merged = _merged(value, adapter, changes, config) if changes else value
        # NF4 holds all layers but the head
        if difference and name.startswith("layers.") and "_proj." in name:
            original, merged = merged, _merged(in_nf4(base[name]), adapter, changes, config)
            difference.add(original.float(), merged)
        return merged.to(dtypes[name])

    sizes = {name: math.prod(weights[name].shape) * kind.itemsize for name, kind in dtypes.items()}
    main = str(dtypes[max(sizes, key=lambda name: sizes[name])]).removeprefix("torch.")
    vocabulary = max(config.vocab_size, adapter.vocabulary)
    rows = {**(card or {}), "weights": main, "merged into": MERGED_INTO[onto]}

    def write_beside(folder: Path) -> None:
        copy_tokenizer(checkpoint_dir, folder, adapter.new_tokens)
        _write_settings(folder, checkpoint_dir, main, vocabulary, untied=untied)
        _write_card(folder, checkpoint_dir, adapter, rows, out.stem if gguf else out.name)

    remarks: list[str] = []
    if gguf is None:
        with whole_folder(out) as folder:
            write_weights(folder, sizes, weight, shard_bytes)
            write_beside(folder)
    else:
        shapes = {name: weights[name].shape for name in base}
        with TemporaryDirectory() as place:
            folder = Path(place) / out.stem
            folder.mkdir()
            write_beside(folder)
            remarks = write_model(out, folder, shapes, weight, gguf)
    return MergeReport(changed, main, untied, difference, tuple(remarks))


def _merged(weight: Tensor, adapter: Adapter, modules: list[str], config: Phi3Config) -> Tensor:
    """Return a weight with ``scale B A`` of each module added to its rows; DoRA sets their norms.

    DoRA's norms are those of the rows by which a layer multiplies. An embedding has them as its
    columns: their norms are over the whole vocabulary.

    Args:
        weight: ``[out, in]``.
        adapter: Has the modules.
        modules: Those that act on this weight; parts of a layer on their rows.
        config: Sizes of the model.

    Returns:
        The changed weight in fp32.

    Raises:
        AdapterError: DoRA has to give a norm to what is all zero.

    Source: Hu et al. 2021, LoRA, section 4.1; Liu et al. 2024, DoRA, equation 5.
    """
    merged = weight.to(torch.float32, copy=True)
    for module in modules:
        a, b = adapter.tensors[module + A].float(), adapter.tensors[module + B].float()
        rows = merged[part_rows(fused_name(module), config).get(module, slice(None))]
        if module == TOK_EMBEDDINGS:  # its rows are the inputs: (B A)^T = A^T B^T
            a, b = b.T, a.T
        rows.addmm_(b, a, alpha=adapter.scales[module])
        magnitude = adapter.tensors.get(module + MAGNITUDE)
        if magnitude is not None:
            norms = rows.norm(dim=0 if module == TOK_EMBEDDINGS else 1)
            if not norms.all():
                raise AdapterError(
                    f"{module}: DoRA divides by the norm of weights that are all zero in this "
                    "base, so every answer would be NaN. Use the adapter's own base."
                )
            factors = magnitude.float() / norms
            rows *= factors if module == TOK_EMBEDDINGS else factors[:, None]
    return merged


def in_nf4(stored: StoredTensor) -> Tensor:
    """Return what a model over NF4 computes with in the place of a weight."""
    with set_default_dtype(stored.dtype):  # of which NF4 takes what it computes in
        like = nf4_zeros(*stored.shape)
    return rows_of(stored, like, 0, 1, torch.device("cpu")).to(stored.dtype)


# What lies beside merged weights: tokenizer, settings, and the README.md that says what it is

MERGED_CARD = """{matter}
# {title} with {kind} merged into it

{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(MODEL)  # MODEL: this folder or its repository
tokenizer = AutoTokenizer.from_pretrained(MODEL)
```

The prompt must follow the chat template of the tokenizer, as
`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` does.
Generation must stop at the ids in generation_config.json. The license is that of the base model.
"""


def _write_settings(
    folder: Path, checkpoint_dir: Path, dtype: str, vocabulary: int, *, untied: bool
) -> None:
    """Write the settings of a model that was changed."""
    keys = read_json(checkpoint_dir / "config.json")
    keys["vocab_size"] = vocabulary
    keys.pop("auto_map", None)  # names code files that are not in this folder, nor needed
    set_dtype(keys, dtype)
    if untied:
        keys["tie_word_embeddings"] = False
    for name, content in (("config.json", keys), (GENERATION, generation_config(checkpoint_dir))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_card(
    folder: Path, checkpoint_dir: Path, adapter: Adapter, rows: Mapping[str, Any], name: str
) -> None:
    """Write README.md: the base, the adapter, and how they were merged."""
    base = base_name(checkpoint_dir)
    kind = "a DoRA" if adapter.is_dora else "a LoRA"
    ranks = " or ".join(map(str, sorted(set(adapter.ranks.values()))))
    facts = {"adapter": f"{kind} of rank {ranks} on {', '.join(targets_of(adapter.tensors))}"}
    if adapter.saved:
        facts["trained whole"] = ", ".join(sorted(adapter.saved))
    if adapter.new_tokens:
        facts["new tokens"] = ", ".join(repr(token["content"]) for token in adapter.new_tokens)
    table = markdown_table("merged", {**facts, **rows})
    try:
        model_name = name_for_llama_cpp(name, read_vocabulary(checkpoint_dir).backend)
    except Phi3Error:  # weights can be merged without a tokenizer
        model_name = None
    matter = front_matter(base, "transformers", ["phi3", "torchtune"], model_name)
    title = (
        base if hub.REPOSITORY.fullmatch(base) else Path(base).name
    )  # others have no such folder
    text = MERGED_CARD.format(matter=matter, title=title, kind=kind, table=table)
    (folder / "README.md").write_text(text, encoding="utf-8")
