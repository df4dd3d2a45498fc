"""The memory that is predicted, against that of real tensors in the same model."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from phi3_plugin.errors import ConfigError
from phi3_plugin.models.lora import Linear
from phi3_plugin.models.lora_settings import TARGETS, LoRASettings
from phi3_plugin.models.phi3 import adapted, decoder
from phi3_plugin.train import plan
from phi3_plugin.train.losses import SFT, Distill
from phi3_plugin.train.model import prepare
from phi3_plugin.train.plan import (
    Estimate,
    PlannedTeacher,
    Work,
    estimate,
    fewest,
    footprint,
    in_gib,
    size_of,
    weights,
)
from phi3_plugin.train.step import with_targets
from tests.tiny import CONFIG

WIDE = replace(
    CONFIG, hidden_size=256, intermediate_size=512, rope=replace(CONFIG.rope, rotary_dim=64)
)
KINDS = {
    "lora": {},
    "dropout": {"lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "nf4": {"quantize_base": True},
    "parts": {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": False},
    "whole": None,
}
LENGTHS = (40, 24)


def built(kind, recomputed=0, every=0):
    keys = {"lora_attn_modules": list(TARGETS), "apply_lora_to_mlp": True, "lora_rank": 4}
    if KINDS[kind] is None:
        model = decoder(WIDE, lambda _, i, o: Linear(i, o))
    else:
        model = adapted(WIDE, LoRASettings(**{**keys, "lora_alpha": 8, **KINDS[kind]}))
    return prepare(model, recompute_every=every, recompute_first=recomputed).train()


def on_meta(kind, recomputed=0, every=0):
    with torch.device("meta"):
        return built(kind, recomputed, every)


WORK = Work(LENGTHS, 62)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def batch():
    tokens = torch.randint(0, WIDE.vocab_size, (1, sum(LENGTHS)))
    labels = tokens.clone()
    labels[0, [0, LENGTHS[0]]] = -100
    return with_targets({"tokens": tokens, "labels": labels, "lengths": LENGTHS})


def summed_loss(model, batch):
    return SFT()(model(**batch), batch)


def kept(model):
    """Return the bytes that a real forward pass keeps, weights and the loss's own apart."""
    own = {part.untyped_storage().data_ptr() for part in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage() if type(tensor) is torch.Tensor else None
        if storage is not None and storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    final = []
    model.norm.register_forward_hook(lambda *_: final.append(dict(found)))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = summed_loss(model, batch())
    assert loss.requires_grad
    return sum(size for size, _ in final[0].values())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_optimizer_are_those_of_real_tensors(kind):
    model = built(kind)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    summed_loss(model, batch()).backward()
    parts = weights(on_meta(kind), WORK, adamw)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert parts["trained weights"] == sum(p.nbytes for p in trained)
    assert parts["gradients"] == sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert parts["base weights"] == size_of(p for p in model.parameters() if not p.requires_grad)
    optimizer.step()
    states = [s for state in optimizer.state.values() for s in state.values() if s.numel() > 1]
    assert parts["optimizer"] == size_of(states)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nf4"])
def test_activations_are_what_a_real_pass_keeps(kind):
    predicted = footprint(on_meta(kind), WORK)[0]
    # The final norm's output lives as well; positions and row numbers are small
    output = 62 * WIDE.hidden_size * 4
    assert predicted - output == pytest.approx(kept(built(kind)), rel=0.03)


def test_nf4_takes_its_codes_and_scales():
    base = weights(on_meta("nf4"), WORK, adamw)["base weights"]
    plain = weights(on_meta("lora"), WORK, adamw)["base weights"]
    others = 2 * WIDE.vocab_size * WIDE.hidden_size * 4 + 7 * WIDE.hidden_size * 4
    assert (base - others) / (plain - others) == pytest.approx(4.127 / 32, rel=0.05)


def test_each_layer_that_recomputes_keeps_less_and_computes_more():
    estimates = [footprint(on_meta("lora", count), WORK) for count in range(4)]
    activations, flops = ([one[part] for one in estimates] for part in (0, 3))
    assert activations == sorted(activations, reverse=True) and len(set(activations)) == 4
    assert flops == sorted(flops)
    assert footprint(on_meta("lora", every=1), WORK) == estimates[3]


def test_processes_share_and_gather():
    model = on_meta("lora")
    one, two = (weights(model, Work(LENGTHS, 62, shards=n), adamw) for n in (1, 2))
    assert two["base weights"] == -(-one["base weights"] // 2)
    layer = size_of(model.layers[0].parameters())
    whole = size_of(model.parameters())
    assert (one["gathered layers"], two["gathered layers"]) == (0, whole - layer)
    elsewhere = weights(model, Work(LENGTHS, 62, shards=2, cpu_weights=True), adamw)
    assert elsewhere == {**dict.fromkeys(elsewhere, 0), "gathered layers": whole - layer}


def test_a_gpu_joins_documents_without_a_copy():
    apart, joined = on_meta("lora"), on_meta("lora")
    for model in (apart, joined):
        model.layers[0].attn.sliding_window = 16
    assert footprint(joined, replace(WORK, joined=True))[0] < footprint(apart, WORK)[0]


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 12),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4),
    ],
)
def test_other_optimizers_are_asked(make, size):
    parts = weights(on_meta("lora"), WORK, make)
    assert parts["optimizer"] == size * parts["trained weights"] // 4


@pytest.mark.parametrize("budget", [1000, 401, 400, 399, 101, 100])
def test_the_fewest_layers_that_fit(budget):
    tried = []

    def at(count):
        tried.append(count)
        return Estimate({"activations": 1000 - 28 * count}, count, 0)

    found = fewest(at, 33, budget)
    assert found.total <= budget
    assert found.recomputed == 0 or at(found.recomputed - 1).total > budget
    assert len(tried) <= 9


def test_too_small_a_budget_says_what_takes_how_much():
    def at(count):
        return Estimate({"base weights": 2 * 2**30, "loss": 2**30, "gradients": 0}, count, 0)

    words = r"memory_budget: 2.50 GiB .* 3.00 GiB \(base weights 2.00, loss 1.00\)\. Lower batch_"
    with pytest.raises(ConfigError, match=words):
        fewest(at, 4, int(2.5 * 2**30))


def test_the_whole_is_the_sum():
    found = estimate(on_meta("dora", 2), WORK, adamw, 2)
    assert found.total == sum(found.parts.values())
    assert found.recomputed == 2 and all(size >= 0 for size in found.parts.values())


def test_amounts_are_short():
    shown = [in_gib(share * 2**30) for share in (14.24, 1.5, 0.0471)]
    assert shown == ["14.2", "1.50", "0.047"]


def test_memory_is_read_where_there_is_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "MEMINFO", tmp_path / "meminfo")
    assert plan.memory_free() is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    5 kB\n")
    assert plan.memory_free() == 5120


def test_a_teacher_is_in_the_plan():
    """Its weights, its pass, and its rows of logits beside the student's."""
    alone = estimate(on_meta("lora"), WORK, adamw)
    with torch.device("meta"):
        other = decoder(WIDE, lambda _, i, o: Linear(i, o)).eval()
    other = PlannedTeacher(Distill(), other, size_of(other.parameters()))
    base = PlannedTeacher(Distill(), None, 0)
    beside, own = (estimate(on_meta("lora"), WORK, adamw, 0, t) for t in (other, base))
    assert beside.parts["teacher"] == other.weights == alone.parts["base weights"]
    assert own.parts["teacher"] == 0
    for plan_of in (beside, own):
        assert plan_of.flops > 1.3 * alone.flops
        assert plan_of.parts["loss"] > alone.parts["loss"]
        hidden = 62 * WIDE.hidden_size * 4
        assert 0 <= plan_of.parts["activations"] - alone.parts["activations"] <= 2 * hidden
    shared = replace(WORK, shards=2)
    two = estimate(on_meta("lora"), shared, adamw, 0, other)
    assert two.parts["teacher"] == -(-other.weights // 2)
    assert two.parts["gathered layers"] > weights(on_meta("lora"), shared, adamw)["gathered layers"]
