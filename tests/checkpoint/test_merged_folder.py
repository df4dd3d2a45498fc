"""What lies beside merged weights says what they are."""

import torch

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.merge import merge_into
from phi3_plugin.config import read_config
from tests.checkpoint.adapters import WHOLE, adapter, base_folder


def test_the_card_says_base_adapter_and_how(tmp_path):
    base = base_folder("mini", tmp_path / "base")
    (base / "original_repo_id.json").write_text('{"repo_id": "some/base"}')
    given = adapter(read_config(base), WHOLE, ranks=(4, 2), dora=True)
    merge_into(tmp_path / "out", base, given, dtype="bf16", card={"made from": "epoch_0"})
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: some/base\nlibrary_name: transformers\n")
    assert "# some/base with a DoRA merged into it" in card
    targets = "down_proj, gate_up_proj, o_proj, qkv_proj"
    assert f"| adapter | a DoRA of rank 2 or 4 on {targets} |" in card
    assert "| made from | epoch_0 |\n| weights | bfloat16 |" in card
    assert "| merged into | the base model |" in card


def test_trained_weights_alone_are_no_lora(tmp_path):
    base = base_folder("mini", tmp_path / "base")
    head = {"output.weight": torch.zeros(read_config(base).vocab_size, 64)}
    merge_into(tmp_path / "out", base, Adapter({}, {}, head))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "with trained weights merged into it" in card and "LoRA" not in card
    assert "| trained whole | output.weight |" in card
