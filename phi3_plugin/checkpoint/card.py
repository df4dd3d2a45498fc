"""The README.md that lies beside an adapter."""

import json
from pathlib import Path

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

# LoRA adapter for {base}

Rank {r}, alpha {lora_alpha}, dropout {lora_dropout}, on {targets}. Epochs trained: {epochs}.

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


def model_card(folder: Path, base: str, epoch: int) -> str:
    """Return the model card of the adapter in ``folder``.

    Args:
        folder: Holds adapter_config.json.
        base: Repository id or folder of the base model.
        epoch: Number of the last epoch trained, from 0.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    targets = ", ".join(config["target_modules"])
    return CARD.format(**{**config, "base": base, "epochs": epoch + 1, "targets": targets})
