"""What is trained, in which precision, and what recomputes."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from phi3_plugin.train.losses import SFT
from phi3_plugin.train.model import is_adapted, prepare
from phi3_plugin.train.step import with_targets
from tests.tiny import tiny_batch, tiny_model


def gradients(model):
    batch = with_targets(tiny_batch())
    SFT()(model(**batch), batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dora", [False, True])
def test_of_an_adapted_model_the_adapters_are_trained(dora):
    model = prepare(tiny_model(use_dora=dora))
    assert is_adapted(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "lora" in n or "magnitude" in n}
    assert len(trained) == 3 * 4 * (3 if dora else 2)


def test_of_a_plain_model_everything_is_trained():
    model = prepare(tiny_model(lora=False))
    assert not is_adapted(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(("every", "twice"), [(1, [0, 1, 2]), (2, [0, 2]), (3, [0]), (0, [])])
def test_recomputing_layers_changes_no_gradient_and_no_name(lora, every, twice):
    plain = prepare(tiny_model(lora))
    model = tiny_model(lora)
    calls = []
    for i, layer in enumerate(model.layers):
        layer.attn.register_forward_hook(lambda *_, i=i: calls.append(i))
    model = prepare(model, recompute_every=every)
    assert list(model.state_dict()) == list(plain.state_dict())
    expected, found = gradients(plain), gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert sorted(i for i in range(3) if calls.count(i) == 2) == twice


def test_the_first_layers_alone_can_recompute():
    model = tiny_model()
    calls = []
    for i, layer in enumerate(model.layers):
        layer.attn.register_forward_hook(lambda *_, i=i: calls.append(i))
    gradients(prepare(model, recompute_first=2))
    assert [calls.count(i) for i in range(3)] == [2, 2, 1]


class Elsewhere(saved_tensors_hooks):
    """Does what torchtune's does, without a GPU: nothing may be left of a pass, nor come twice."""

    def __init__(self):
        self.there, self.count = {}, 0
        super().__init__(self.pack, self.there.pop)

    def pack(self, tensor):
        self.count += 1
        self.there[self.count] = tensor.detach().clone() if type(tensor) is Tensor else tensor
        return self.count


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("kind", [{}, {"lora_dropout": 0.5}, {"apply_lora_to_output": True}])
def test_what_layers_keep_goes_elsewhere_and_comes_back(kind, every, monkeypatch):
    made = []
    monkeypatch.setattr(
        "torchtune.training._activation_offloading.OffloadActivations",
        lambda: made.append(Elsewhere()) or made[-1],
    )
    values = []
    for offload in (False, True):
        model = prepare(tiny_model(**kind), recompute_every=every, offload=offload)
        torch.manual_seed(0)
        values.append(gradients(model))
    assert all(torch.equal(values[1][name], value) for name, value in values[0].items())
    (elsewhere,) = made
    assert elsewhere.count > 3 and not elsewhere.there


def test_recomputing_draws_the_same_dropout_again():
    values = []
    for every in (0, 1):
        model = prepare(tiny_model(lora_dropout=0.5), recompute_every=every)
        torch.manual_seed(0)
        values.append(gradients(model))
    assert all(torch.equal(values[1][name], value) for name, value in values[0].items())


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_in_fp32_over_a_bf16_base(dora):
    model = tiny_model(use_dora=dora).to(torch.bfloat16)
    model = prepare(model, adapter_dtype="fp32")
    for name, parameter in model.named_parameters():
        kind = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == kind, name
    between = []
    for layer in model.layers:
        layer.register_forward_hook(lambda *call: between.append(call[-1].dtype))
    found = gradients(model)
    assert all(value.dtype == torch.float32 and value.any() for value in found.values())
    assert between == [torch.bfloat16] * 3


def test_the_model_may_be_without_memory():
    with torch.device("meta"):
        model = tiny_model()
    model = prepare(model, adapter_dtype="bf16", recompute_every=1)
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    assert kinds == {torch.bfloat16}
    assert all(p.is_meta for p in model.parameters())


def test_what_is_trained_whole_takes_the_adapters_precision():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = tiny_model(modules_to_save=["lm_head", "embed_tokens"])
    finally:
        torch.set_default_dtype(torch.float32)
    model = prepare(model, adapter_dtype="fp32")
    assert model.tok_embeddings.weight.dtype == model.output.weight.dtype == torch.float32
    between = []
    model.layers[0].register_forward_hook(lambda *call: between.append(call[-1].dtype))
    found = gradients(model)
    assert between == [torch.bfloat16]
    assert found["tok_embeddings.weight"].any() and found["output.weight"].any()
