"""What the tests on EleutherAI's harness share: a tiny checkpoint, an adapter, and the skip."""

import importlib.util
import json

import pytest
from phi3_plugin.recipes import phi3_demo_checkpoint

from phi3_plugin.checkpoint.export import export_adapter
from phi3_plugin.config import read_config
from tests.checkpoint.adapters import PARTS, adapter
from tests.own import WORDS

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="needs lm_eval: pip install 'phi3-plugin[lm_eval]'",
)


def harness_inputs(folder):
    """Write a base, the same with <s> before every text, the same with LongRoPE, an adapter."""
    for name in ("base", "launch", "long"):
        phi3_demo_checkpoint.build_checkpoint(folder / name, words=WORDS)
    file = folder / "long" / "config.json"
    keys = json.loads(file.read_text("utf-8"))
    pairs = keys["hidden_size"] // keys["num_attention_heads"] // 2
    scaling = {"type": "longrope", "short_factor": [1.0] * pairs, "long_factor": [3.0] * pairs}
    keys |= {"rope_scaling": scaling, "original_max_position_embeddings": 16}
    file.write_text(json.dumps(keys), "utf-8")
    file = folder / "launch" / "tokenizer.json"
    keys = json.loads(file.read_text("utf-8"))
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    keys["post_processor"]["single"].insert(0, bos)
    keys["post_processor"]["special_tokens"] = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    assert next(t["id"] for t in keys["added_tokens"] if t["content"] == "<s>") == 1
    file.write_text(json.dumps(keys), "utf-8")
    (folder / "adapter").mkdir()
    made = adapter(read_config(folder / "base"), PARTS, (4, 2), (1.0, 0.5))
    export_adapter(folder / "adapter", made, checkpoint_dir=folder / "base", card={})
    return folder
