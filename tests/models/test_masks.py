"""The sliding window over packed documents, as boolean and as block masks."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torchtune.modules.attention_utils import create_block_causal_mask

from phi3_plugin.models.attention import attend
from phi3_plugin.models.masks import windowed

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


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("window", [None, 60])
def test_block_masks_attend_like_boolean_masks(window, heads):
    documents = torch.tensor([100, 37, 163])
    owner = torch.repeat_interleave(torch.arange(3), documents)

    def same_document(batch, head, query, key):
        return (query >= key) & (owner[query] == owner[key])

    blocks = create_block_mask(same_document, 1, None, 300, 300, device="cpu")
    boolean = create_block_causal_mask([documents])
    q = torch.randn(1, heads[0], 300, 16)
    k, v = torch.randn(2, 1, heads[1], 300, 16)
    torch.testing.assert_close(
        attend(q, k, v, windowed(blocks, 300, 300, 0, window, CPU)),
        attend(q, k, v, windowed(boolean, 300, 300, 0, window, CPU)),
        rtol=0,
        atol=1e-5,
    )


def test_a_cache_offset_moves_the_band():
    rows = windowed(None, 3, 10, 5, 4, CPU)
    whole = expected([10], 4)
    assert torch.equal(rows[0], whole[5:8])
