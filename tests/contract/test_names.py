"""State-dict names are contracts: read both ways, for every tensor."""

import pytest

from phi3_plugin.checkpoint.base import expected_shapes, from_peft, to_hf, to_ours, to_peft
from phi3_plugin.config import parse_config
from phi3_plugin.errors import CheckpointError
from phi3_plugin.models.lora import Linear, LoRALinear
from phi3_plugin.models.phi3 import decoder
from tests.oracles import MEDIUM_4K, MINI_4K, TINY_GQA, TINY_MHA, hf_model


@pytest.mark.parametrize(
    ("published", "sizes"), [(MINI_4K, TINY_MHA), (MEDIUM_4K, TINY_GQA)], ids=["mha", "gqa"]
)
def test_names_and_shapes_are_those_of_transformers(published, sizes):
    theirs = {name: tuple(p.shape) for name, p in hf_model(published, **sizes).named_parameters()}
    config = parse_config({**published, **sizes})
    assert expected_shapes(config) == theirs
    model = decoder(config, lambda _, i, o: Linear(i, o))
    ours = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert {to_ours(name): shape for name, shape in theirs.items()} == ours
    assert all(to_hf(to_ours(name)) == name for name in theirs)


def test_a_tied_head_has_no_tensor_of_its_own():
    sizes = {**TINY_MHA, "tie_word_embeddings": True}
    theirs = {n: tuple(p.shape) for n, p in hf_model(MINI_4K, **sizes).named_parameters()}
    config = parse_config({**MINI_4K, **sizes})
    assert "lm_head.weight" not in theirs  # PyTorch names a shared tensor once
    assert expected_shapes(config) == theirs
    model = decoder(config, lambda _, i, o: Linear(i, o))
    assert model.state_dict().keys() == {to_ours(name) for name in theirs}


def test_the_number_of_parameters_of_mini():
    shapes = expected_shapes(parse_config(MINI_4K))
    count = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values())
    assert (len(shapes), count) == (195, 3_821_079_552)


def test_adapter_names_both_ways():
    config = parse_config({**MINI_4K, **TINY_MHA})
    model = decoder(config, lambda name, i, o: LoRALinear(i, o, 4, 8))
    names = [name for name in model.state_dict() if "lora" in name and "layers" in name]
    assert len(names) == 3 * 4 * 2
    assert all(from_peft(to_peft(name)) == name for name in names)
    assert (
        to_peft("layers.1.mlp.gate_up_proj.lora_b.weight")
        == "base_model.model.model.layers.1.mlp.gate_up_proj.lora_B.weight"
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("tok_embeddings.lora_a.weight", "model.embed_tokens.lora_embedding_A"),
        ("tok_embeddings.lora_b.weight", "model.embed_tokens.lora_embedding_B"),
        ("output.lora_b.weight", "lm_head.lora_B.weight"),
        ("output.weight", "lm_head.weight"),
        ("tok_embeddings.weight", "model.embed_tokens.weight"),
        ("layers.2.attn.o_proj.magnitude", "model.layers.2.self_attn.o_proj.lora_magnitude_vector"),
    ],
)
def test_names_of_embedding_head_and_whole_weights(ours, theirs):
    assert to_peft(ours) == f"base_model.model.{theirs}"
    assert from_peft(f"base_model.model.{theirs}") == ours


@pytest.mark.parametrize("convert", [to_ours, to_hf, to_peft, from_peft])
@pytest.mark.parametrize(
    "name",
    ["x.weight", "model.layers.0.self_attn.q_proj.weight", "layers.0.attn.q_proj.lora_a.weight"],
)
def test_unknown_names_are_refused(convert, name):
    with pytest.raises(CheckpointError, match="is not a"):
        convert(name)
