"""Logits against transformers, whole tensors, on both sides of every threshold."""

import json

import pytest
import torch

from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.models import lora_phi3, phi3
from tests.assets import assets_dir
from tests.oracles import (
    MEDIUM_4K,
    MINI_4K,
    TINY_GQA,
    TINY_MHA,
    hf_logits,
    hf_model,
    save_checkpoint,
)

WINDOW = MINI_4K["sliding_window"]
FAMILIES = {"mha": (MINI_4K, TINY_MHA), "gqa": (MEDIUM_4K, TINY_GQA)}


@pytest.fixture(scope="module", params=FAMILIES)
def oracle(request, tmp_path_factory):
    published, sizes = FAMILIES[request.param]
    model = hf_model(published, **sizes)
    folder = save_checkpoint(model, published, tmp_path_factory.mktemp("base"), **sizes)
    return model, folder


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 150, (batch, length), generator=torch.Generator().manual_seed(length))


def loaded(folder):
    model = phi3(folder)
    model.load_state_dict(load_base_weights(folder))
    return model.eval()


@pytest.mark.assets
@pytest.mark.parametrize(
    ("table", "name"),
    [(MINI_4K, "phi3-mini-4k-instruct"), (MEDIUM_4K, "phi3-medium-4k-instruct")],
)
def test_the_tables_are_the_published_values(table, name):
    published = json.loads((assets_dir() / "models" / name / "config.json").read_text())
    named = {"_name_or_path", "auto_map", "transformers_version"}
    assert {key: value for key, value in published.items() if key not in named} == table


@pytest.mark.parametrize("length", [1, 17, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 14])
def test_logits_equal_transformers(oracle, length):
    model, folder = oracle
    batch = tokens(1 if length > 100 else 3, length)
    with torch.no_grad():
        ours = loaded(folder)(batch)
    torch.testing.assert_close(ours, hf_logits(model, batch), rtol=0, atol=1e-5)


def test_the_window_hides_keys_at_all(oracle):
    """Guards the test above: without the window the longest length must differ."""
    model, folder = oracle
    ours = loaded(folder)
    for layer in ours.layers:
        layer.attn.sliding_window = None
    batch = tokens(1, WINDOW + 14)
    with torch.no_grad():
        difference = (ours(batch) - hf_logits(model, batch))[0].abs().amax(dim=-1)
    assert difference[:WINDOW].max() <= 1e-5
    assert difference[WINDOW:].min() > 1e-4


def test_built_under_bf16_then_fp32_weights(oracle):
    """A bf16 arange or bf16 frequencies would ruin RoPE."""
    model, folder = oracle
    torch.set_default_dtype(torch.bfloat16)
    try:
        ours = phi3(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    assert ours.tok_embeddings.weight.dtype == torch.bfloat16
    assert all(layer.attn.rope.cos.dtype == torch.float32 for layer in ours.layers)
    ours.load_state_dict(load_base_weights(folder), assign=True)
    batch = tokens(1, WINDOW + 3)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), hf_logits(model, batch), rtol=0, atol=1e-5)


def test_built_on_the_meta_device(oracle):
    """What torchtune's distributed recipe does: meta, rope_init, then the weights."""
    model, folder = oracle
    with torch.device("meta"):
        ours = phi3(folder)
    for module in ours.modules():
        if hasattr(module, "rope_init"):
            module.rope_init()
    ours.load_state_dict(load_base_weights(folder), assign=True)
    batch = tokens(2, 17)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), hf_logits(model, batch), rtol=0, atol=1e-5)


def test_bf16_is_no_farther_from_fp32_than_transformers_bf16(oracle):
    model, folder = oracle
    batch = tokens(2, 40)
    exact = hf_logits(model, batch)
    ours = loaded(folder).bfloat16()
    with torch.no_grad():
        our_error = (ours(batch) - exact).norm()
    theirs = hf_model(model.config.to_dict()).bfloat16()
    theirs.load_state_dict(model.state_dict())
    their_error = (hf_logits(theirs, batch) - exact).norm()
    assert our_error <= their_error * 1.01  # equal up to the order of sums in attention


def test_packed_documents_equal_one_by_one(oracle):
    """A block-diagonal mask and restarted positions, longer than the window in all."""
    _, folder = oracle
    ours = loaded(folder)
    documents = [tokens(1, length) for length in (WINDOW - 50, 17, 90)]
    packed = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    blocks = [torch.ones(d.shape[1], d.shape[1]).tril().bool() for d in documents]
    with torch.no_grad():
        together = ours(packed, mask=torch.block_diag(*blocks)[None].bool(), input_pos=positions)
        alone = torch.cat([ours(document) for document in documents], dim=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [WINDOW, 5])
def test_the_cache_gives_the_same_logits_token_by_token(oracle, window):
    _, folder = oracle
    ours = loaded(folder)
    for layer in ours.layers:
        layer.attn.sliding_window = window
    batch = tokens(2, 12)
    with torch.no_grad():
        at_once = ours(batch)
        ours.setup_caches(2, torch.float32, decoder_max_seq_len=12)
        causal = torch.ones(12, 12).tril().bool()
        steps = [
            ours(batch[:, rows], mask=causal[None, rows].expand(2, -1, -1), input_pos=positions)
            for rows, positions in (
                (slice(0, 7), torch.arange(7)[None]),
                *((slice(i, i + 1), torch.tensor([[i]])) for i in range(7, 12)),
            )
        ]
    torch.testing.assert_close(torch.cat(steps, dim=1), at_once, rtol=0, atol=1e-5)


def test_weights_are_zero_and_not_garbage_before_loading(oracle):
    _, folder = oracle
    model = lora_phi3(folder, ["o_proj"])
    base = {name: p for name, p in model.named_parameters() if "lora" not in name}
    assert all(not p.any() for name, p in base.items() if "norm" not in name)
