"""An adapter knows its ranks and kind, and sorts what a model trains."""

import torch

from phi3_plugin.checkpoint.adapter import Adapter

O_PROJ, HEAD = "layers.0.attn.o_proj", "output.weight"


def test_trained_tensors_are_sorted():
    values = {
        f"{O_PROJ}.lora_a.weight": torch.ones(4, 8),
        f"{O_PROJ}.lora_b.weight": torch.ones(8, 4),
        HEAD: torch.ones(9, 8),
    }
    adapter = Adapter.of(values, 3.0, dropout=0.1, origin={"layout": "fused"})
    assert adapter.tensors.keys() == values.keys() - {HEAD}
    assert adapter.saved.keys() == {HEAD}
    assert (adapter.scales, adapter.ranks) == ({O_PROJ: 3.0}, {O_PROJ: 4})
    assert (adapter.dropout, adapter.origin) == (0.1, {"layout": "fused"})
    assert not adapter.is_dora
    dora = Adapter.of({**values, f"{O_PROJ}.magnitude": torch.ones(8)}, 3.0)
    assert dora.is_dora
    assert dora.ranks == adapter.ranks
