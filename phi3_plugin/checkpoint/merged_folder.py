"""What lies beside merged weights: tokenizer, settings, and the README.md that says what it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.card import table
from phi3_plugin.checkpoint.export import base_name, copy_tokenizer
from phi3_plugin.checkpoint.peft import targets_of
from phi3_plugin.checkpoint.stops import GENERATION, generation_config, read_json

CARD = """---
base_model: {base}
library_name: transformers
pipeline_tag: text-generation
tags:
- phi3
- torchtune
---

# {base} with {kind} merged into it

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


def write_settings(folder: Path, checkpoint_dir: Path, dtype: str, *, untied: bool) -> None:
    """Copy the tokenizer, and write the settings of a model that was changed.

    Args:
        folder: Of the merged weights.
        checkpoint_dir: Of the base model.
        dtype: Of the weights, as config.json names it.
        untied: Whether a tied head got weights of its own.
    """
    copy_tokenizer(checkpoint_dir, folder)
    keys = read_json(checkpoint_dir / "config.json")
    keys.pop("auto_map", None)  # names code files that are not in this folder, nor needed
    keys["dtype" if "dtype" in keys else "torch_dtype"] = dtype
    if untied:
        keys["tie_word_embeddings"] = False
    _write(folder / "config.json", keys)
    _write(folder / GENERATION, generation_config(checkpoint_dir))


def write_card(
    folder: Path, checkpoint_dir: Path, adapter: Adapter, rows: Mapping[str, Any]
) -> None:
    """Write README.md: the base, the adapter, and how they were merged.

    Args:
        folder: Of the merged weights.
        checkpoint_dir: Of the base model.
        adapter: Our names.
        rows: More rows of the table.
    """
    base, kind = base_name(checkpoint_dir), "a DoRA" if adapter.is_dora else "a LoRA"
    ranks = " or ".join(map(str, sorted(set(adapter.ranks.values()))))
    said = {"adapter": f"{kind} of rank {ranks} on {', '.join(targets_of(adapter.tensors))}"}
    if not adapter.ranks:
        kind, said = "trained weights", {}
    if adapter.saved:
        said["trained whole"] = ", ".join(sorted(adapter.saved))
    text = CARD.format(base=base, kind=kind, table=table("merged", {**said, **rows}))
    (folder / "README.md").write_text(text, encoding="utf-8")


def _write(file: Path, keys: dict[str, Any]) -> None:
    file.write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")
