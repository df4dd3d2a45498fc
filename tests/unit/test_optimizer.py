"""Who learns how fast, by which schedule, and what a checkpoint keeps of an optimizer."""

import pytest
import torch
from torch import nn

from phi3_plugin.errors import CheckpointError, ConfigError
from phi3_plugin.train import constant_with_warmup, cosine_with_warmup, linear_with_warmup
from phi3_plugin.train.model import prepare
from phi3_plugin.train.optimizer import (
    FUSABLE,
    check_shards,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
    replay,
    step_if,
)
from phi3_plugin.train.world import World
from tests.own import same
from tests.tiny import tiny_model


def test_there_is_one_group_of_parameters():
    model = prepare(tiny_model())
    (group,) = parameter_groups(model, 0.1, None)
    assert list(map(id, group["params"])) == [id(p) for p in model.parameters() if p.requires_grad]
    assert "lr" not in group


def test_with_lora_plus_the_b_matrices_learn_faster():
    model = prepare(tiny_model(use_dora=True))
    names = {id(p): name for name, p in model.named_parameters()}
    slow, fast = parameter_groups(model, 0.1, 16.0)
    assert fast["lr"] == pytest.approx(1.6)
    assert "lr" not in slow
    assert {names[id(p)].rpartition("lora_")[2] for p in fast["params"]} == {"b.weight"}
    assert len(slow["params"]) == 2 * len(fast["params"]) == 24
    optimizer = torch.optim.AdamW([slow, fast], lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, pytest.approx(1.6)]


def test_with_lora_plus_embedding_and_head_learn_as_told():
    """The embedding's A starts at zero, not its B; what is trained whole has neither."""
    keys = {"apply_lora_to_embedding": True, "modules_to_save": ["lm_head"]}
    model = prepare(tiny_model(**keys))
    names = {id(p): name for name, p in model.named_parameters()}
    slow, fast = ({names[id(p)] for p in g["params"]} for g in parameter_groups(model, 0.1, 16.0))
    assert {"tok_embeddings.lora_a.weight", "tok_embeddings.lora_b.weight", "output.weight"} <= slow
    assert fast == {n for n in names.values() if n.startswith("layers") and "lora_b" in n}


# Schedules


ALL = pytest.mark.parametrize(
    "schedule", [constant_with_warmup, cosine_with_warmup, linear_with_warmup]
)


def optimizer_of(parameter):
    return torch.optim.AdamW([parameter], lr=0.1)


def rates(optimizer, scheduler, parameter, steps):
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()
    return seen


@ALL
@pytest.mark.parametrize("stop", [1, 3, 9])
def test_resume_continues_the_schedule(stop, schedule):
    whole = torch.nn.Parameter(torch.ones(2))
    optimizer = optimizer_of(whole)
    expected = rates(optimizer, schedule(optimizer, 12, 4), whole, 12)

    first = torch.nn.Parameter(torch.ones(2))
    optimizer = optimizer_of(first)
    seen = rates(optimizer, schedule(optimizer, 12, 4), first, stop)
    second = torch.nn.Parameter(first.detach().clone())
    resumed = optimizer_of(second)
    resumed.load_state_dict(optimizer.state_dict())
    # The stock recipe says -1 here.
    seen += rates(resumed, schedule(resumed, 12, 4, last_epoch=-1), second, 12 - stop)

    assert seen == pytest.approx(expected, abs=1e-12)
    assert torch.equal(second, whole)


@pytest.mark.parametrize("warmup", [0, 4, 12])
@pytest.mark.parametrize("kind", ["constant", "cosine", "linear"])
def test_the_rates_are_those_of_transformers(kind, warmup):
    from transformers import get_scheduler

    schedule = {
        "constant": constant_with_warmup,
        "cosine": cosine_with_warmup,
        "linear": linear_with_warmup,
    }[kind]
    name = "constant_with_warmup" if kind == "constant" else kind
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer, same = optimizer_of(parameter), optimizer_of(parameter)
    theirs = get_scheduler(name, same, num_warmup_steps=warmup, num_training_steps=12)
    seen = rates(optimizer, schedule(optimizer, 12, warmup), parameter, 12)
    assert seen == pytest.approx(rates(same, theirs, parameter, 12), abs=1e-12)


def test_a_recipe_that_knows_its_step_is_believed():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = optimizer_of(parameter)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    scheduler = cosine_with_warmup(optimizer, 12, 4, last_epoch=1)
    assert scheduler.get_last_lr() == [pytest.approx(0.1 * 2 / 4)]


@pytest.mark.parametrize(
    ("steps", "ratio", "warmup"), [(1, 0.1, 0), (9, 0.3, 0), (10, 0.1, 1), (11, 0.1, 2), (20, 0, 0)]
)
def test_the_share_of_warm_up_steps(steps, ratio, warmup):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer, same = optimizer_of(parameter), optimizer_of(parameter)
    by_share = cosine_with_warmup(optimizer, steps, warmup_ratio=ratio)
    by_number = cosine_with_warmup(same, steps, warmup)
    assert rates(optimizer, by_share, parameter, steps) == rates(same, by_number, parameter, steps)


def test_the_first_of_one_step_trains():
    optimizer = optimizer_of(torch.nn.Parameter(torch.ones(2)))
    assert cosine_with_warmup(optimizer, 1, warmup_ratio=0.1).get_last_lr() == [0.1]


def test_the_share_is_that_of_transformers():
    from transformers import TrainingArguments

    for steps in (10, 17, 100):
        arguments = TrainingArguments(warmup_steps=0.2, report_to=[], output_dir="unused")
        ours = cosine_with_warmup(optimizer_of(torch.nn.Parameter(torch.ones(2))), steps, None, 0.2)
        theirs = arguments.get_warmup_steps(steps)
        assert ours.lr_lambdas[0](theirs) == pytest.approx(1.0)
        assert ours.lr_lambdas[0](theirs - 1) < 1.0


@ALL
def test_a_share_above_one_is_refused(schedule):
    with pytest.raises(ConfigError, match=r"lr_scheduler\.warmup_ratio: 20"):
        schedule(optimizer_of(torch.nn.Parameter(torch.ones(2))), 5, warmup_ratio=20)


@ALL
def test_a_run_that_can_hardly_be_meant_is_warned_of(schedule, caplog):
    """torchtune's recipes say nothing of it: 40 rows in steps of 16 make two."""
    optimizer = optimizer_of(torch.nn.Parameter(torch.ones(2)))
    schedule(optimizer, 10, num_warmup_steps=9)
    assert caplog.text == ""
    schedule(optimizer, 2, warmup_ratio=0.1)
    assert "The whole run makes 2 steps." in caplog.text
    schedule(optimizer, 10, num_warmup_steps=10)
    assert "the rate never comes to optimizer.lr" in caplog.text


# The state


def stepped(kind=torch.optim.AdamW, rank=3):
    """Return a model and an optimizer of its adapters that made a step."""
    model = prepare(tiny_model(lora_rank=rank))
    optimizer = kind(parameter_groups(model, None, None), lr=0.5)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def test_a_saved_state_is_a_copy_that_a_new_optimizer_goes_on_with():
    world = World("cpu")
    model, optimizer = stepped()
    saved = optimizer_state(world, model, optimizer)
    optimizer.step()  # training goes on
    again, fresh = stepped()
    load_optimizer_state(world, again, fresh, saved)
    assert fresh.param_groups[0]["lr"] == 0.5
    names = dict(again.named_parameters())
    assert len(saved["state"]) == 24
    for name, moments in saved["state"].items():
        assert moments["step"] == 1
        assert torch.equal(fresh.state[names[name]]["exp_avg"], moments["exp_avg"])
        assert (moments["exp_avg"] == 0.1).all()


def test_an_optimizer_that_made_no_step_has_nothing_to_keep():
    """torch would make a step to have something to save."""
    world, model = World("cpu"), tiny_model()
    one, other = (torch.optim.AdamW(model.parameters(), lr=rate) for rate in (0.25, 0.5))
    before = model.output.weight.clone()
    saved = optimizer_state(world, model, one)
    load_optimizer_state(world, model, other, saved)
    assert torch.equal(model.output.weight, before)
    assert not other.state


def test_rates_and_betas_are_those_of_the_settings_and_not_of_the_state():
    world = World("cpu")
    model, optimizer = stepped()
    again = prepare(tiny_model(lora_rank=3))
    slow_and_fast = parameter_groups(again, 0.25, 8)  # two groups, where there was one
    fresh = torch.optim.AdamW(slow_and_fast, lr=0.25, betas=(0.5, 0.6), weight_decay=0.7)
    load_optimizer_state(world, again, fresh, optimizer_state(world, model, optimizer))
    assert [group["lr"] for group in fresh.param_groups] == [0.25, 2.0]
    assert {group["betas"] for group in fresh.param_groups} == {(0.5, 0.6)}
    assert {group["weight_decay"] for group in fresh.param_groups} == {0.7}
    assert all((fresh.state[p]["exp_avg"] == 0.1).all() for p in fresh.state)


@pytest.mark.parametrize("kind", ["LambdaLR", "CosineAnnealingLR", "OneCycleLR"])
def test_a_replayed_schedule_is_where_its_steps_left_it_to_the_last_bit(kind):
    def schedule():
        optimizer = optimizer_of(torch.nn.Parameter(torch.ones(2)))
        if kind == "LambdaLR":
            return optimizer, cosine_with_warmup(optimizer, 9, warmup_ratio=0.3)
        name = getattr(torch.optim.lr_scheduler, kind)
        return optimizer, name(optimizer, *((0.5, 9) if kind == "OneCycleLR" else (9,)))

    optimizer, stepped_schedule = schedule()
    for _ in range(5):
        optimizer.step()
        stepped_schedule.step()
    again, replayed = schedule()
    replay(replayed, 5)
    for _ in range(3):
        pairs = zip(optimizer.param_groups, again.param_groups, strict=True)
        assert all(one["lr"] == other["lr"] for one, other in pairs)
        stepped_schedule.step()
        replayed.step()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"kind": torch.optim.RAdam}, r"would change from torch\.\S+AdamW to torch"),
        ({"rank": 2}, r"lora_a\.weight is \(3, \d+\), but the model has \(2, \d+\)"),
    ],
)
def test_a_state_of_another_optimizer_or_model_is_refused(other, message):
    world = World("cpu")
    saved = optimizer_state(world, *stepped())
    with pytest.raises(CheckpointError, match=message):
        load_optimizer_state(world, *stepped(**other), saved)


# Shards


class Low(torch.optim.SGD):
    block_size = 256


def made(kind=Low, shape=(6, 4096), dtype=torch.float32):
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    return kind([parameter], lr=0.1), [("layer.lora_a.weight", parameter)]


def test_states_that_cannot_be_shared_out_evenly_are_refused():
    for shards in (1, 2, 3, 6):
        check_shards(*made(), shards)
    with pytest.raises(ConfigError, match=r"over 4 processes: layer\.lora_a\.weight has 6 rows"):
        check_shards(*made(), 4)


def test_states_of_bf16_cannot_be_shared_out():
    optimizer, names = made(dtype=torch.bfloat16)
    check_shards(optimizer, names, 1)
    with pytest.raises(ConfigError, match=r"weight is torch\.bfloat16\. Set adapter_dtype=fp32"):
        check_shards(optimizer, names, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stays_in_full_precision_may_be_shared_out_anyhow(dtype):
    check_shards(*made(shape=(6, 64), dtype=dtype), 4)
    check_shards(*made(torch.optim.SGD, dtype=dtype), 4)
    optimizer, names = made(dtype=dtype)
    names[0][1].requires_grad_(False)
    check_shards(optimizer, names, 4)


@pytest.mark.parametrize("make", FUSABLE)
def test_a_fused_step_is_left_out_by_a_number(make):
    """As a GPU does it, whose Python does not know the number."""
    plain, asked = (nn.Linear(3, 2) for _ in range(2))
    asked.load_state_dict(plain.state_dict())
    steps = [make(model.parameters(), lr=0.1, fused=True) for model in (plain, asked)]
    for wanted in (True, False, True, False):
        for model in (plain, asked):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.5 if wanted else torch.nan)
        if wanted:
            steps[0].step()
        step_if(steps[1], torch.tensor(wanted))
        assert same(plain.state_dict(), asked.state_dict())
        assert same(*(optimizer.state_dict()["state"] for optimizer in steps))
    assert not hasattr(steps[1], "found_inf")
