"""A resumed run goes on with the learning rates of the run that was never stopped."""

import pytest
import torch

from phi3_plugin.train import cosine_with_warmup


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


@pytest.mark.parametrize("stop", [1, 3, 9])
def test_resume_continues_the_schedule(stop):
    whole = torch.nn.Parameter(torch.ones(2))
    optimizer = optimizer_of(whole)
    expected = rates(optimizer, cosine_with_warmup(optimizer, 4, 12), whole, 12)

    first = torch.nn.Parameter(torch.ones(2))
    optimizer = optimizer_of(first)
    seen = rates(optimizer, cosine_with_warmup(optimizer, 4, 12), first, stop)
    second = torch.nn.Parameter(first.detach().clone())
    resumed = optimizer_of(second)
    resumed.load_state_dict(optimizer.state_dict())
    # The stock recipe says -1 here.
    seen += rates(resumed, cosine_with_warmup(resumed, 4, 12, last_epoch=-1), second, 12 - stop)

    assert seen == pytest.approx(expected, abs=1e-12)
    assert torch.equal(second, whole)


def test_a_recipe_that_knows_its_step_is_believed():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = optimizer_of(parameter)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    scheduler = cosine_with_warmup(optimizer, 4, 12, last_epoch=1)
    assert scheduler.get_last_lr() == [pytest.approx(0.1 * 2 / 4)]
