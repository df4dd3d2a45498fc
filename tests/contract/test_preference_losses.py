"""Losses of answers: those that plain torch gives of the logits of transformers and PEFT.

Each pair is a row of its own there, so nothing of how answers are packed is shared.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from phi3_plugin.checkpoint.base import to_peft
from phi3_plugin.data.collate import concatenate
from phi3_plugin.train.losses import DPO, KTO, ORPO, SimPO
from phi3_plugin.train.step import train_step, validate
from phi3_plugin.train.world import World
from tests import twins

# Prompt, chosen and rejected answer: in tokens
SIZES = [(4, 7, 2), (1, 1, 9), (6, 3, 3), (3, 8, 5), (2, 2, 4)]


def documents():
    """Return both sides of each pair as (tokens, tokens of the prompt)."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda count: torch.randint(0, 149, (count,), generator=generator)  # noqa: E731
    pairs = []
    for prompt, chosen, rejected in SIZES:
        start = draw(prompt)
        pairs.append([(torch.cat([start, draw(n)]), prompt) for n in (chosen, rejected)])
    return pairs


def labelled(tokens, prompt):
    return torch.cat([torch.full((prompt,), -100), tokens[prompt:]])


def sample(sides):
    """Return a sample as the data set gives it."""
    return {
        "tokens": torch.cat([tokens for tokens, _ in sides]),
        "labels": torch.cat([labelled(*side) for side in sides]),
        "lengths": torch.tensor([len(tokens) for tokens, _ in sides]),
        "wanted": torch.tensor([True, False][: len(sides)]),
    }


def mismatched(pairs):
    """Return each prompt with the answer of the pair before on the same side."""
    before = [pairs[-1], *pairs[:-1]]
    return [
        [
            (torch.cat([tokens[:start], other[other_start:]]), start)
            for (tokens, start), (other, other_start) in zip(sides, others, strict=True)
        ]
        for sides, others in zip(pairs, before, strict=True)
    ]


def batches(pairs, per_batch, with_others=False):
    samples = [sample(sides) for sides in pairs]
    if with_others:
        for one, other in zip(samples, mismatched(pairs), strict=True):
            one["mismatched"] = {**sample(other), "wanted": torch.tensor([True, True])}
    parts = [samples[i : i + per_batch] for i in range(0, len(samples), per_batch)]
    return [concatenate(part) for part in parts]


def logps(model, sides, *, off=False):
    """Return log p of each answer's tokens, of logits that are there as a whole."""
    found = []
    for tokens, prompt in sides:
        if off:
            with torch.no_grad(), model.disable_adapter():
                logits = model(input_ids=tokens[None], use_cache=False).logits
        else:
            logits = model(input_ids=tokens[None], use_cache=False).logits
        all = F.log_softmax(logits[0, :-1].float(), -1)
        found.append(all.gather(1, tokens[1:, None])[prompt - 1 :, 0])
    return found


def ratios(model, sides):
    return [
        on.sum() - off.sum()
        for on, off in zip(logps(model, sides), logps(model, sides, off=True), strict=True)
    ]


def sigmoid(model, pairs, beta=0.3, smoothing=0.0):
    losses = []
    for sides in pairs:
        chosen, rejected = ratios(model, sides)
        h = beta * (chosen - rejected)
        right, wrong = 1 / (1 + torch.exp(-h)), 1 / (1 + torch.exp(h))
        losses.append(-(1 - smoothing) * right.log() - smoothing * wrong.log())
    return torch.stack(losses).mean()


def ipo(model, pairs):
    losses = []
    for sides in pairs:
        (chosen, rejected), (m, n) = ratios(model, sides), [len(t) - p for t, p in sides]
        losses.append((chosen / m - rejected / n - 1 / (2 * 0.3)) ** 2)
    return torch.stack(losses).mean()


def hinge(model, pairs):
    losses = []
    for sides in pairs:
        chosen, rejected = ratios(model, sides)
        losses.append(torch.clamp(1 - 0.3 * (chosen - rejected), min=0))
    return torch.stack(losses).mean()


def nll(model, pairs):
    return -torch.cat([logps(model, sides)[0] for sides in pairs]).mean()


def rpo(model, pairs):
    return sigmoid(model, pairs) + 0.7 * nll(model, pairs)


def simpo(model, pairs):
    losses = []
    for sides in pairs:
        chosen, rejected = (one.mean() for one in logps(model, sides))
        losses.append(torch.log(1 + torch.exp(-(1.5 * (chosen - rejected) - 0.4))))
    return torch.stack(losses).mean()


def orpo(model, pairs):
    losses = []
    for sides in pairs:
        chosen, rejected = (one.mean().exp().double() for one in logps(model, sides))
        odds = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
        losses.append(-0.6 * torch.log(odds / (1 + odds)))
    return nll(model, pairs) + torch.stack(losses).mean()


def kto(model, pairs):
    others = [ratio for sides in mismatched(pairs) for ratio in ratios(model, sides)]
    z = torch.stack(others).mean().detach().clamp(min=0)
    assert z > 0
    losses = []
    for sides in pairs:
        chosen, rejected = ratios(model, sides)
        losses.append(1.2 * (1 - torch.sigmoid(0.3 * (chosen - z))))
        losses.append(0.8 * (1 - torch.sigmoid(0.3 * (z - rejected))))
    return torch.stack(losses).mean()


LOSSES = {
    "dpo": (DPO(beta=0.3), sigmoid),
    "smoothed": (
        DPO(beta=0.3, label_smoothing=0.2),
        lambda *given: sigmoid(*given, smoothing=0.2),
    ),
    "ipo": (DPO(beta=0.3, form="ipo"), ipo),
    "hinge": (DPO(beta=0.3, form="hinge"), hinge),
    "rpo": (DPO(beta=0.3, rpo_alpha=0.7), rpo),
    "simpo": (SimPO(beta=1.5, gamma=0.4), simpo),
    "orpo": (ORPO(beta=0.6), orpo),
    "kto": (KTO(beta=0.3, desirable_weight=1.2, undesirable_weight=0.8), kto),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    hf, folder = twins.base_of("gqa", tmp_path_factory.mktemp("base") / "base")
    model = twins.ours(folder)
    twins.train_by_hand(model)
    return model, twins.twin(hf, model)


def step(model, loss, given):
    """Make a step that moves the weights by their gradient, and undo it."""
    before = {name: p.detach().clone() for name, p in twins.trained(model).items()}
    optimizer = torch.optim.SGD(twins.trained(model).values(), lr=1.0)
    result = train_step(World("cpu"), model, optimizer, loss, given, None)
    gradients = {name: before[name] - p.detach() for name, p in twins.trained(model).items()}
    with torch.no_grad():
        for name, parameter in twins.trained(model).items():
            parameter.copy_(before[name])
    return result, gradients


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_the_formula(name, models):
    (model, theirs), (loss, formula), pairs = models, LOSSES[name], documents()
    expected = formula(theirs, pairs)
    theirs.zero_grad()
    expected.backward()
    slopes = {twins.in_file(n): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for per_batch in (5, 2):  # how the step is split does not matter
        result, gradients = step(model, loss, batches(pairs, per_batch, name == "kto"))
        assert result.loss == pytest.approx(expected.item(), rel=1e-5)
        assert result.tokens == sum(chosen + rejected for _, chosen, rejected in SIZES)
        for parameter, gradient in gradients.items():
            other = slopes[to_peft(parameter)]
            assert (gradient - other).norm() <= 2e-4 * other.norm(), parameter


@pytest.mark.parametrize("name", ["dpo", "simpo", "kto"])
def test_rewards_are_those_of_the_formula(name, models):
    (model, theirs), (loss, _), pairs = models, LOSSES[name], documents()
    with torch.no_grad():
        if name == "simpo":
            found = [[1.5 * one.mean() for one in logps(theirs, sides)] for sides in pairs]
        else:
            found = [[0.3 * ratio for ratio in ratios(theirs, sides)] for sides in pairs]
    chosen, rejected = torch.tensor(found).T
    expected = {
        "reward_chosen": chosen.mean(),
        "reward_rejected": rejected.mean(),
        "reward_margin": (chosen - rejected).mean(),
    }
    if name != "kto":
        expected["reward_accuracy"] = (chosen > rejected).float().mean()
    measures = {}
    given = batches(pairs, 2, name == "kto")
    value, count = validate(World("cpu"), model, loss, given, measures)
    for key, mean in expected.items():
        assert measures[key] == pytest.approx(mean.item(), rel=1e-4, abs=1e-6), key
    assert count == (10 if name == "kto" else 5)
    result, _ = step(model, loss, batches(pairs, 5, name == "kto"))
    assert result.loss == pytest.approx(value, rel=1e-6)
    assert result.measures == pytest.approx(measures, rel=1e-5)


def test_before_the_first_step_the_adapter_is_the_reference(models):
    model, _ = models
    parts = [p for n, p in twins.trained(model).items() if "lora_b" in n]
    kept = [p.detach().clone() for p in parts]
    with torch.no_grad():
        for parameter in parts:
            parameter.zero_()
    measures = {}
    loss, _ = validate(World("cpu"), model, DPO(), batches(documents(), 5), measures)
    with torch.no_grad():
        for parameter, value in zip(parts, kept, strict=True):
            parameter.copy_(value)
    assert loss == pytest.approx(0.6931472, abs=1e-6)
    assert measures["reward_margin"] == measures["reward_accuracy"] == 0


def test_a_batch_without_labels_adds_nothing(models):
    """A process that the last samples of an epoch do not reach has one."""
    (model, _), pairs = models, documents()
    for name in LOSSES:
        loss, _ = LOSSES[name]
        given = batches(pairs, 5, name == "kto")
        empty = {**batches(pairs[:1], 1, name == "kto")[0]}
        empty["labels"] = torch.full_like(empty["labels"], -100)
        alone, gradients = step(model, loss, given)
        both, others = step(model, loss, [*given, empty])
        assert both == alone, name
        assert all(torch.equal(others[key], gradients[key]) for key in gradients), name


def test_what_was_computed_before_is_not_computed_again(models):
    (model, _), pairs = models, documents()
    given = batches(pairs, 5)
    given[0]["reference"] = torch.zeros(10)
    result, _ = step(model, replace(LOSSES["dpo"][0], form="sigmoid"), given)
    expected, _ = step(model, DPO(beta=0.3), batches(pairs, 5))
    assert result.loss != pytest.approx(expected.loss)
