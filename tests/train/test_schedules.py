"""A resumed run goes on with the learning rates of the run that was never stopped."""

import pytest
import torch

from phi3_plugin.errors import ConfigError
from phi3_plugin.train import constant_with_warmup, cosine_with_warmup, linear_with_warmup

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
    ("steps", "ratio", "warmup"), [(1, 0.1, 0), (2, 0.1, 1), (10, 0.1, 1), (11, 0.1, 2), (20, 0, 0)]
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

    for steps in (2, 7, 100):
        arguments = TrainingArguments(warmup_steps=0.2, report_to=[], output_dir="unused")
        ours = cosine_with_warmup(optimizer_of(torch.nn.Parameter(torch.ones(2))), steps, None, 0.2)
        theirs = arguments.get_warmup_steps(steps)
        assert ours.lr_lambdas[0](theirs) == pytest.approx(1.0)
        assert ours.lr_lambdas[0](theirs - 1) < 1.0


@ALL
def test_a_share_above_one_is_refused(schedule):
    with pytest.raises(ConfigError, match=r"lr_scheduler\.warmup_ratio: 20"):
        schedule(optimizer_of(torch.nn.Parameter(torch.ones(2))), 5, warmup_ratio=20)
