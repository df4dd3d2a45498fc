"""Rows of new tokens in a model: where they go, what they start from, how they are trained."""

import pytest
import torch
from torch import nn
from torchtune.modules.peft import disable_adapter, get_adapter_params

from phi3_plugin.errors import ConfigError
from phi3_plugin.models.new_tokens import WithRows, add_new_tokens, starting_rows, widen
from phi3_plugin.train.optimizer import parameter_groups
from phi3_plugin.train.stock_recipes import problems
from tests.tiny import CONFIG, new_model

V, D = CONFIG.vocab_size, CONFIG.hidden_size
TOKENS = torch.tensor([[3, V - 2, V - 1, 5]])
ROWS = {"tok_embeddings.new_rows", "output.new_rows"}


def filled(ids, **settings):
    model = new_model(**settings)
    add_new_tokens(model, ids)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model.eval()


@pytest.mark.parametrize("ids", [[V - 2, V - 1], [V - 1, V, V + 1]], ids=["spare", "grown"])
def test_a_row_stands_in_the_place_of_the_weights(ids):
    model = filled(ids)
    assert {n for n in get_adapter_params(model) if "new_rows" in n} == ROWS
    tokens = torch.tensor([[3, *ids, 5]])
    found = model(tokens)
    with torch.no_grad():
        for module in (model.tok_embeddings, model.output):
            module.weight[ids] = module.new_rows
            module.disabled = True
    torch.testing.assert_close(model(tokens), found)


def test_a_disabled_adapter_has_the_rows_it_started_from():
    """So a loss that compares with the base compares with what training started from."""
    model = filled([V - 2, V - 1])
    with torch.no_grad():
        before = model(TOKENS)
        with disable_adapter(model):
            base = model(TOKENS)
            model.tok_embeddings.new_rows += 1
            torch.testing.assert_close(model(TOKENS), base, rtol=0, atol=0)
    assert (model(TOKENS) - before).abs().max() > 0.1


def test_gradients_are_of_the_rows_alone_and_summed_in_their_precision():
    model = filled([V - 2, V - 1]).to(torch.bfloat16)
    embedding = model.tok_embeddings
    embedding.new_rows.data = embedding.new_rows.data.float()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    embedding.new_rows.requires_grad_()
    many = torch.full((1, 1000), V - 1)
    out = embedding(many)
    assert out.dtype == torch.bfloat16
    out.backward(torch.full_like(out, 0.01))
    expected = 1000 * torch.tensor(0.01, dtype=torch.bfloat16).float()
    torch.testing.assert_close(embedding.new_rows.grad[1], expected.expand(D))
    assert not embedding.new_rows.grad[0].any()


def test_rows_do_not_decay_and_have_a_group_of_their_own():
    model = filled([V - 1])
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in get_adapter_params(model)
    rows = {id(p) for name, p in model.named_parameters() if name in ROWS}
    for ratio in (None, 4.0):
        *others, last = parameter_groups(model, 1e-3, ratio)
        assert {id(p) for p in last["params"]} == rows and last["weight_decay"] == 0
        assert not rows & {id(p) for group in others for p in group["params"]}
        assert not any("weight_decay" in group for group in others)
        torch.optim.AdamW([*others, last], lr=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("key", ["apply_lora_to_output", "apply_lora_to_embedding"])
def test_an_adapter_on_all_rows_leaves_none_for_them(key):
    with pytest.raises(ConfigError, match=r"tokenizer\.add_tokens: "):
        add_new_tokens(new_model(**{key: True}), [V - 1])


def test_what_is_trained_whole_grows():
    model = new_model(modules_to_save=["lm_head"])
    add_new_tokens(model, [V, V + 1])
    assert model.output.weight.shape == model.tok_embeddings.weight.shape == (V + 2, D)
    assert not hasattr(model.output, "new_rows") and len(model.tok_embeddings.new_rows) == 2
    whole = new_model(lora=False)
    add_new_tokens(whole, [V, V + 1])
    assert type(whole.output) is type(new_model(lora=False).output)
    assert whole.output.weight.shape == (V + 2, D)
    widen(whole, V)
    assert len(whole.output.weight) == V + 2


def test_a_row_starts_at_the_mean_of_its_pieces():
    weights = {"tok_embeddings.weight": torch.randn(V, D), "norm.scale": torch.ones(D)}
    rows = starting_rows(weights, {V: [1, 2, 4], V + 1: [7]})
    assert rows.keys() == {"tok_embeddings"}  # the head is tied
    weight = weights["tok_embeddings.weight"]
    torch.testing.assert_close(rows["tok_embeddings"][V], weight[[1, 2, 4]].mean(dim=0))
    assert torch.equal(rows["tok_embeddings"][V + 1], weight[7])
    assert starting_rows(weights, {}) == {}


def test_rows_are_read_with_others_in_their_place():
    weight = torch.randn(6, 3).bfloat16()
    new = {4: torch.randn(3), 8: torch.randn(3)}
    whole = torch.zeros(9, 3)
    whole[:6] = weight
    for number, row in new.items():
        whole[number] = row
    found = WithRows(weight, new)
    assert (found.shape, found.dtype) == ((9, 3), torch.float32)
    for some in (slice(None), slice(2, 5), slice(5, 9), slice(7, 9), slice(3, 3)):
        assert torch.equal(found[some], whole[some])


def test_torchtunes_recipes_refuse_what_they_would_not_train():
    ours = {"tokenizer": {"_component_": "phi3_plugin.data.phi3_tokenizer", "add_tokens": ["<a>"]}}
    (problem,) = problems("def _setup_optimizer(self): ...", ours)
    assert problem.startswith("tokenizer.add_tokens: ")
    assert problems("def setup_optimizer(self): ...", ours) == []


def test_a_module_of_others_is_refused():
    model = new_model()
    model.output = nn.Linear(D, V)
    with pytest.raises(ConfigError, match="Linear takes no rows"):
        add_new_tokens(model, [V - 1])
