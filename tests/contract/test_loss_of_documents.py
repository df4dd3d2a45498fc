"""The loss of a row of documents: that of each alone, with all gradients, and as near as PEFT's."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch._dynamo.utils import counters
from torchtune.modules.peft import disable_adapter

from phi3_plugin.checkpoint.base import to_peft
from phi3_plugin.errors import ConfigError
from phi3_plugin.train.losses import SFT
from phi3_plugin.train.model import prepare
from tests import twins
from tests.chosen import some

LENGTHS = [17, 5, 1, 30]
VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "split": {"targets": ["q_proj", "v_proj", "up_proj", "down_proj"]},
    "one target": {"targets": ["qkv_proj"]},
    "head": {"apply_lora_to_output": True},
    "dora on the head": {"apply_lora_to_output": True, "use_dora": True},
    "whole head": {"modules_to_save": ["lm_head"]},
    "embedding": {"apply_lora_to_embedding": True},
}
CASES = [
    (family, variant)
    for family in twins.FAMILIES
    for variant in VARIANTS
    if not (family == "tied" and ("head" in variant or variant == "embedding"))
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {
        family: twins.base_of(family, tmp_path_factory.mktemp(family) / "base")
        for family in twins.FAMILIES
    }


def documents():
    """Return tokens and labels, the first third of each document not trained on."""
    torch.manual_seed(0)
    for length in LENGTHS:
        tokens = torch.randint(0, 149, (length,))
        labels = tokens.clone()
        labels[: length // 3 + 1] = -100
        yield tokens, labels


def as_one_row():
    pairs = list(documents())
    labels = torch.cat([labels for _, labels in pairs])
    rows = (labels != -100).nonzero().squeeze(1)
    return {
        "tokens": torch.cat([tokens for tokens, _ in pairs])[None],
        "input_pos": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "lengths": LENGTHS,
        "targets": labels[rows],
        "rows": rows - 1,
    }


def summed_loss(model, **instead):
    batch = {**as_one_row(), **instead}
    return SFT()(model(**batch), batch)


def one_by_one(logits_of, **options):
    """Return the summed loss by autograd over each document's whole logits."""
    options["reduction"] = "sum"
    losses = [
        F.cross_entropy(logits_of(tokens[None])[0, :-1].float(), labels[1:], **options)
        for tokens, labels in documents()
        if len(tokens) > 1
    ]
    return torch.stack(losses).sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def far(found, expected):
    """Return how far all gradients are, relative to their norm."""
    apart = sum((found[name].double() - g.double()).square().sum() for name, g in expected.items())
    return (apart / sum(g.double().square().sum() for g in expected.values())).sqrt().item()


QUICK = [case for case in CASES if case[0] == "gqa" or case[1] == "lora"]


@pytest.mark.parametrize(("family", "variant"), some(CASES, QUICK))
@pytest.mark.parametrize("recompute", [0, 1])
def test_loss_and_gradients_are_those_of_each_document_alone(family, variant, recompute, bases):
    _, folder = bases[family]
    model = twins.ours(folder, **VARIANTS[variant])
    twins.train_by_hand(model)
    expected = one_by_one(model)
    slopes = gradients(model, expected)
    prepare(model, adapter_dtype=None, recompute_every=recompute, compiled=False)
    loss = summed_loss(model)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert far(gradients(model, loss), slopes) <= 1e-6


@pytest.mark.parametrize(
    ("family", "variant"),
    some(
        [(family, v) for family, v in CASES if v in ("lora", "whole head")],
        {("tied", "lora"), ("gqa", "whole head")},
    ),
)
def test_a_smoothed_loss_is_that_of_whole_logits_of_transformers(family, variant, bases):
    hf, folder = bases[family]
    model = twins.ours(folder, **VARIANTS[variant])
    twins.train_by_hand(model)
    theirs = twins.twin(hf, model, **VARIANTS[variant])
    expected = one_by_one(
        lambda tokens: theirs(input_ids=tokens, use_cache=False).logits, label_smoothing=0.2
    )
    slopes = {twins.in_file(name): slope for name, slope in gradients(theirs, expected).items()}
    loss = summed_loss(model, label_smoothing=0.2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert abs(loss.item() - summed_loss(model).item()) > 1e-4 * loss.item()
    found = {to_peft(name): slope for name, slope in gradients(model, loss).items()}
    assert far(found, slopes) <= 1e-5


def test_a_document_longer_than_the_window(bases):
    model = twins.ours(bases["mini"][1])
    for layer in model.layers:
        layer.attn.sliding_window = 7
    twins.train_by_hand(model)
    expected = one_by_one(model)
    slopes = gradients(model, expected)
    assert far(gradients(model, summed_loss(model)), slopes) <= 1e-6


def test_rows_that_predict_nothing_give_a_loss_of_zero(bases):
    model = twins.ours(bases["mini"][1])
    nothing = torch.tensor([], dtype=torch.int64)
    loss = summed_loss(model, targets=nothing, rows=nothing)
    assert loss.item() == 0
    assert not any(g.any() for g in gradients(model, loss).values())


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize(
    ("variant", "recompute"),
    some(
        [(variant, n) for variant in ("lora", "dora", "split") for n in (0, 1)],
        quick={("dora", 1), ("split", 0)},
    ),
)
def test_compiled_it_computes_the_same(variant, recompute, backend, bases, monkeypatch):
    torch.compiler.reset()
    model = twins.ours(bases["gqa"][1], **VARIANTS[variant])
    twins.train_by_hand(model)
    slopes = gradients(model, summed_loss(model))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    prepare(model, adapter_dtype=None, recompute_every=recompute, compiled=True)
    counters.clear()
    assert far(gradients(model, summed_loss(model)), slopes) <= 1e-6
    assert counters["frames"]["ok"] > 0


def test_a_document_beyond_the_models_positions_is_refused(bases):
    model = twins.ours(bases["mini"][1])
    model.max_seq_len = 29
    with pytest.raises(ConfigError, match="a document has 30 tokens, but the model has 29 pos"):
        summed_loss(model)


def test_the_base_alone_has_a_loss_too(bases):
    """Also with an adapter on the head, which is then not used; and without any gradient."""
    model = twins.ours(bases["gqa"][1], apply_lora_to_output=True)
    twins.train_by_hand(model)
    adapted = summed_loss(model).item()
    with disable_adapter(model):
        base = summed_loss(model)
        base.backward()
        assert base.item() == pytest.approx(one_by_one(model).item(), rel=1e-6)
    assert abs(adapted - base.item()) > 0.1
    with torch.inference_mode():
        assert summed_loss(model).item() == adapted


def test_validation_takes_no_gradient_of_the_head(bases, monkeypatch):
    model = twins.ours(bases["gqa"][1], modules_to_save=["lm_head"])
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        assert summed_loss(model).item() > 0


def in_precision(folder, hf, adapters, dtype):
    """Return our model and PEFT's with equal values, as after training: B is small."""
    torch.manual_seed(2)
    model = twins.ours(folder)
    twins.train_by_hand(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 0.1 if name.endswith("lora_b.weight") else 1
    config = LoraConfig(r=4, lora_alpha=12, target_modules=list(twins.TARGETS))
    theirs = get_peft_model(deepcopy(hf), config)
    values = {to_peft(n): p.detach().clone() for n, p in twins.trained(model).items()}
    set_peft_model_state_dict(theirs, values)
    for one in (model, theirs):
        for name, parameter in one.named_parameters():
            is_adapter = "lora_" in name
            value = parameter.data if is_adapter else parameter.data.bfloat16()
            parameter.data = value.to(adapters if is_adapter else dtype)
    return model, theirs.eval()


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32])
def test_bf16_is_no_farther_from_fp32_than_pefts(adapters, bases):
    """Ours rounds adapters in fp32 for its products; PEFT rounds the sum of both products."""
    hf, folder = bases["mini"]
    exact, _ = in_precision(folder, hf, torch.float32, torch.float32)
    ours, theirs = in_precision(folder, hf, adapters, torch.bfloat16)
    truth = gradients(exact, summed_loss(exact))
    found = gradients(ours, summed_loss(ours))
    other = gradients(theirs, one_by_one(lambda x: theirs(input_ids=x, use_cache=False).logits))
    other = {name: other[to_peft(name).replace(".weight", ".default.weight")] for name in truth}
    assert far(found, truth) <= far(other, truth) < 0.02
