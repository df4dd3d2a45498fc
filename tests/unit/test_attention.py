"""The sliding window over packed documents, as boolean and as block masks.

Documents without a mask are in tests/contract/test_documents.py, cached rows in test_cache.py.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask
from torchtune.modules.attention_utils import create_block_causal_mask

from phi3_plugin.models.attention import Dense, attend_causally, has_flash, windowed
from phi3_plugin.models.lora import Linear
from phi3_plugin.models.phi3 import decoder
from tests.chosen import some
from tests.tiny import CONFIG

CPU = torch.device("cpu")


def expected(documents, window):
    """The rule, spelled out one pair at a time."""
    owner = [i for i, length in enumerate(documents) for _ in range(length)]
    size = len(owner)
    return torch.tensor(
        [
            [
                key <= query and key > query - window and owner[key] == owner[query]
                for key in range(size)
            ]
            for query in range(size)
        ]
    )


@pytest.mark.parametrize("window", [1, 4, 6, 7, 8, 13, 14, 20])
@pytest.mark.parametrize("documents", [[14], [7, 7], [1, 6, 4, 3]])
def test_the_window_within_packed_documents(documents, window):
    packed = create_block_causal_mask([torch.tensor(documents)])
    seen = windowed(packed, 14, 14, 0, window, CPU)
    assert torch.equal(seen[0], expected(documents, window))
    plain = windowed(None, 14, 14, 0, window, CPU)
    if window >= 14:
        assert plain is None
    else:
        assert torch.equal(plain[0], expected([14], window))


def test_a_cache_offset_moves_the_band():
    rows = windowed(None, 3, 10, 5, 4, CPU)
    whole = expected([10], 4)
    assert torch.equal(rows[0], whole[5:8])


@pytest.mark.parametrize("heads", [[4, 4, 4], [4, 2, 2]], ids=["mha", "gqa"])
@pytest.mark.parametrize("window", [None, 60])
def test_block_masks_attend_like_boolean_masks(window, heads):
    documents = torch.tensor([100, 37, 163])
    owner = torch.repeat_interleave(torch.arange(3), documents)

    def same_document(batch, head, query, key):
        return (query >= key) & (owner[query] == owner[key])

    masks = (
        create_block_mask(same_document, 1, None, 300, 300, device="cpu"),
        create_block_causal_mask([documents]),
    )
    qkv, empty = torch.randn(1, 300, sum(heads), 16), torch.empty(0)
    found, other = (Dense(empty, empty, mask).attend(qkv, heads, window) for mask in masks)
    torch.testing.assert_close(found, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3, 9, 50])
@pytest.mark.parametrize("queries", [1, 7, 20])
def test_the_last_tokens_of_a_row_see_what_they_see_in_the_whole(queries, window, monkeypatch):
    """As new tokens of a cached row do, some at a time."""
    monkeypatch.setattr("phi3_plugin.models.attention.QUERIES", 3)
    q, k, v = torch.randn(1, 4, 20, 8), *torch.randn(2, 1, 2, 20, 8)
    whole = attend_causally(q, k, v, window)
    last = attend_causally(q[:, :, -queries:], k, v, window)
    torch.testing.assert_close(last, whole[:, :, -queries:], rtol=0, atol=1e-6)


def test_grouped_heads_attend_one_by_one_where_a_card_has_no_kernel_for_groups(monkeypatch):
    """A T4 and a V100 have none, and fp32 has none anywhere on CUDA."""
    q, k, v = torch.randn(1, 4, 9, 8), *torch.randn(2, 1, 2, 9, 8)
    expected = attend_causally(q, k, v, None)
    asked, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, **how: asked.append(how["enable_gqa"]) or attend(q, k, v, **how),
    )
    torch.testing.assert_close(attend_causally(q, k, v, None), expected, rtol=0, atol=1e-6)
    assert asked == [False]


@pytest.mark.parametrize(("capability", "has"), [((7, 0), False), ((7, 5), False), ((8, 0), True)])
def test_flash_attention_begins_with_ampere(monkeypatch, capability, has):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_flash(torch.device("cuda")) == has
    assert not has_flash(CPU)


@pytest.mark.parametrize("window", some([None, 3, 12], quick={3}))
def test_a_compiled_step_over_torchtunes_cache_is_one_graph(window):
    """Else torchtune's recipe could not answer with a quantized model, which it compiles whole."""
    config = replace(CONFIG, sliding_window=window, num_hidden_layers=1)
    model = decoder(config, lambda _, i, o: Linear(i, o)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.setup_caches(1, torch.float32, decoder_max_seq_len=8)
    seen = torch.ones(8, 8, dtype=torch.bool).tril()[None]
    tokens = torch.arange(8)[None]

    def steps(step):
        model.reset_caches()
        parts = [slice(0, 4), *(slice(n, n + 1) for n in range(4, 8))]
        positions = torch.arange(8)[None]
        with torch.no_grad():
            return [step(tokens[:, p], input_pos=positions[:, p], mask=seen[:, p]) for p in parts]

    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for ours, theirs in zip(steps(compiled), steps(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
