"""Every checkpoint of the family against transformers: logits, gradients, padding, packing."""

from types import SimpleNamespace

import pytest
import torch

from phi3_plugin.checkpoint.base import load_base_weights, to_hf
from phi3_plugin.config import read_config
from phi3_plugin.data.collate import pad_left
from phi3_plugin.errors import AdapterError, ConfigError
from phi3_plugin.models import lora_phi3, phi3
from phi3_plugin.models.rope import RotaryEmbedding, rotate
from tests.chosen import EVERYTHING, some
from tests.family import ALIKE, LONG, VARIANTS, lengths, published, sizes
from tests.oracles import hf_logits, hf_model, save_checkpoint


def made(variant, folder):
    keys = published(variant), sizes(variant)
    model = small_model(variant)
    return SimpleNamespace(
        variant=variant, hf=model, folder=save_checkpoint(model, keys[0], folder, **keys[1])
    )


def small_model(variant):
    keys = published(variant)
    if variant == "mini-128k-april":  # a name that transformers 5.23 refuses to build
        keys = {**keys, "rope_scaling": {**keys["rope_scaling"], "type": "longrope"}}
    return hf_model(keys, std=0.04, **sizes(variant))


SECOND = ("mini-128k", "medium-4k", "phi-4-reasoning")
"""Like 3.5-mini, or phi-4, but for their numbers; medium in test_logits.py, too."""
LONG_QUICK = ("3.5-mini", "phi-4-mini")


@pytest.fixture(scope="module", params=some(VARIANTS, [v for v in VARIANTS if v not in SECOND]))
def oracle(request, tmp_path_factory):
    return made(request.param, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=some(LONG, LONG_QUICK))
def long(request, tmp_path_factory):
    return made(request.param, tmp_path_factory.mktemp("long"))


def tokens(batch, length):
    return torch.randint(0, 150, (batch, length), generator=torch.Generator().manual_seed(length))


def loaded(folder, **keys):
    model = phi3(folder, **keys)
    model.load_state_dict(load_base_weights(folder))
    return model.eval()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_logits_on_both_sides_of_every_threshold(oracle):
    ours = loaded(oracle.folder)
    for length in lengths(oracle.variant):
        batch = tokens(1 if length > 100 else 3, length)
        with torch.no_grad():
            close(ours(batch), hf_logits(oracle.hf, batch))


def test_positions_that_are_given_count_as_those_that_are_not(long):
    ours, batch = loaded(long.folder), tokens(1, 4097)
    with torch.no_grad():
        close(ours(batch, input_pos=torch.arange(4097)[None]), hf_logits(long.hf, batch))


def test_phi4_reasoning_turns_slower_than_phi4(tmp_path):
    one, other = (made(name, tmp_path / name) for name in ("phi-4", "phi-4-reasoning"))
    batch = tokens(1, 40)
    with torch.no_grad():
        ours = loaded(other.folder)(batch)
    close(ours, hf_logits(other.hf, batch))
    assert (ours - hf_logits(one.hf, batch)).abs().max() > 1e-3


def test_the_two_sets_of_factors_differ(long):
    """Guards the tests above: by the wrong set, logits are elsewhere."""
    batch = tokens(1, 17)
    with torch.no_grad():
        short, other = (loaded(long.folder, rope_factors=f)(batch) for f in ("short", "long"))
    close(short, hf_logits(long.hf, batch))
    assert (short - other).abs().max() > 1e-3


def test_fixed_factors_are_those_of_a_batch_that_chooses_them(long):
    config, x = read_config(long.folder), torch.randn(1, 20, 2, long.hf.config.hidden_size // 2)
    x = x[..., : config.head_dim]
    auto, short, fixed = (
        RotaryEmbedding(config.rope, config.max_position_embeddings, f)
        for f in ("auto", "short", "long")
    )
    places = torch.arange(20)[None]

    def turned(rope, input_pos=None):
        return rotate(x.clone().flatten(2), *rope.turns(20, input_pos, x.dtype), 2, x.shape[3])

    assert torch.equal(turned(auto), turned(short))
    assert torch.equal(turned(auto, input_pos=places), turned(short, input_pos=places))
    far = torch.cat([places[:, :-1], torch.tensor([[4096]])], dim=1)
    assert torch.equal(turned(auto, input_pos=far), turned(fixed, input_pos=far))
    assert torch.equal(turned(fixed)[:, :-1], turned(fixed, input_pos=far)[:, :-1])


def test_padding_on_either_side_changes_nothing(oracle):
    ours = loaded(oracle.folder)
    rows = [tokens(1, length)[0].tolist() for length in (5, 17, 11)]
    left = pad_left([{"tokens": row} for row in rows], padding_idx=150)
    real = left["mask"][:, -1]
    with torch.no_grad():
        found = ours(left["tokens"], mask=left["mask"], input_pos=left["input_pos"])
        theirs = oracle.hf(
            input_ids=left["tokens"], attention_mask=real.long(), position_ids=left["input_pos"]
        ).logits
        close(found[real], theirs[real])
        for row, text in enumerate(rows):
            alone = hf_logits(oracle.hf, torch.tensor([text]))[0]
            close(found[row][real[row]], alone)
            right = torch.tensor([text + [150] * 9])
            close(ours(right)[0, : len(text)], alone)


def test_packed_documents_are_what_they_are_alone(oracle):
    """Together longer than the original length, each of them shorter; LongRoPE stays short."""
    if oracle.variant in ALIKE and not EVERYTHING:
        pytest.skip("takes long and is like another: make test-all")
    ours, sizes = loaded(oracle.folder), (2100, 17, 2000)
    if oracle.variant not in LONG:
        windowed = published(oracle.variant)["sliding_window"]
        sizes = (2100, 17, 900) if windowed else (210, 17, 90)
    documents = [tokens(1, size) for size in sizes]
    places = torch.cat([torch.arange(size) for size in sizes])[None]
    mask = torch.block_diag(*(torch.ones(size, size).tril() for size in sizes)).bool()[None]
    with torch.no_grad():
        together = ours(torch.cat(documents, dim=1), mask=mask, input_pos=places)
        alone = torch.cat([hf_logits(oracle.hf, document) for document in documents], dim=1)
    close(together, alone)


@pytest.mark.parametrize("factors", [pytest.param("long", marks=pytest.mark.slow), "short"])
def test_gradients_are_those_of_transformers(oracle, factors):
    two = ("3.5-mini", "phi-4-mini") if EVERYTHING else ("phi-4-mini",)
    if factors == "long" and oracle.variant not in two:
        pytest.skip("a long batch takes long: one checkpoint, and two under make test-all")
    ours, batch = loaded(oracle.folder), tokens(1, 4097 if factors == "long" else 17)
    oracle.hf.zero_grad()
    for logits in (oracle.hf(input_ids=batch, use_cache=False).logits, ours(batch)):
        logits.square().mean().backward()
    expected = {name: p.grad for name, p in oracle.hf.named_parameters()}
    found = {to_hf(name): p.grad for name, p in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = expected[name].abs().max()
        torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=2e-5)


def test_bf16_is_no_farther_from_fp32_than_that_of_transformers(oracle):
    batch, variant = tokens(2, 40), oracle.variant
    exact = hf_logits(oracle.hf, batch)
    theirs = small_model(variant).bfloat16()
    # As from_pretrained leaves it: frequencies stay in fp32
    theirs.model.rotary_emb = small_model(variant).model.rotary_emb
    torch.set_default_dtype(torch.bfloat16)
    try:
        ours = loaded(oracle.folder)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        error = (ours(batch) - exact).norm()
    assert 0 < error <= (hf_logits(theirs, batch) - exact).norm()


def test_tied_weights_are_one_tensor(oracle):
    ours, tied = loaded(oracle.folder), oracle.hf.config.tie_word_embeddings
    assert ("output.weight" in ours.state_dict()) != tied
    assert len(dict(ours.named_parameters())) == len(dict(oracle.hf.named_parameters()))


def test_an_adapter_on_a_tied_head_is_refused(oracle):
    keys = {"apply_lora_to_output": True, "lora_rank": 4}
    if not oracle.hf.config.tie_word_embeddings:
        assert lora_phi3(oracle.folder, ["o_proj"], **keys).output.rank == 4
        return
    with pytest.raises(AdapterError, match="apply_lora_to_output: True needs a head of its own"):
        lora_phi3(oracle.folder, ["o_proj"], **keys)


def test_factors_that_are_not_there_are_refused(oracle):
    expected = "must be auto" + (", short or long" if oracle.variant in LONG else ": this check")
    with pytest.raises(ConfigError, match=f"rope_factors: 'longer' {expected}"):
        phi3(oracle.folder, rope_factors="longer")
    if oracle.variant not in LONG:
        with pytest.raises(ConfigError, match="rope_factors: 'short' must be auto: this"):
            phi3(oracle.folder, rope_factors="short")
