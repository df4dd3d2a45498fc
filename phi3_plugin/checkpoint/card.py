"""The README.md that lies beside an adapter."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_plugin.checkpoint.peft import CONFIG

CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- phi3
- torchtune
---

# {kind} adapter for {base}

{kind} of rank {r}, alpha {lora_alpha}, dropout {lora_dropout}, on {targets}.

{table}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, ADAPTER)  # ADAPTER: this folder or its repository
tokenizer = AutoTokenizer.from_pretrained(ADAPTER)
```

The prompt must follow the chat template in tokenizer_config.json, as
`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` does.
Generation must stop at the ids in generation_config.json.
"""


def model_card(folder: Path, base: str, rows: Mapping[str, Any]) -> str:
    """Return the model card of the adapter in ``folder``.

    Args:
        folder: Holds adapter_config.json.
        base: Repository id or folder of the base model.
        rows: What the adapter was trained on and how, one row of the table each.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    targets = ", ".join(config["target_modules"])
    return CARD.format(
        **{
            **config,
            "base": base,
            "kind": "DoRA" if config["use_dora"] else "LoRA",
            "table": table("training", rows),
            "targets": targets,
        }
    )


def table(title: str, rows: Mapping[str, Any]) -> str:
    """Return rows of names and values in Markdown."""
    lines = (f"| {key} | {_cell(value)} |" for key, value in rows.items())
    return "\n".join([f"| {title} | |", "|---|---|", *lines])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
