import math

import pytest
import torch
import torch.nn.functional as F

from phi3_plugin.train.losses import SFT
from phi3_plugin.train.step import train_step, validate, with_targets
from phi3_plugin.train.world import World
from tests.tiny import rows, tiny_batch, tiny_model


def labelled(batch):
    return len(with_targets(batch)["targets"])


def summed_loss(model, batch):
    batch = with_targets(batch)
    return SFT()(model(**batch), batch)


@pytest.fixture
def world():
    return World("cpu")


class Run:
    """A model that makes steps, all of it trained."""

    def __init__(self, world, make=torch.optim.AdamW, max_norm=None, **model):
        self.world, self.max_norm = world, max_norm
        self.model = tiny_model(**model)
        self.loss = SFT()
        self.optimizer = make(self.model.parameters(), lr=0.01)

    def step(self, batches, loss=None):
        given = self.model, self.optimizer, loss or self.loss
        return train_step(self.world, *given, batches, self.max_norm)

    @property
    def weights(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def assert_close(ours, theirs, rtol):
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= rtol * theirs[name].norm(), name


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("model", [{}, {"use_dora": True}, {"lora": False}])
def test_four_rows_one_by_one_are_a_batch_of_four(world, optimizer, model):
    """Labels are uneven and one row has none: a mean of means would be another loss."""
    whole, parts = (Run(world, optimizer, max_norm=1.0, **model) for _ in range(2))
    for lengths in ((9, 4, 7, 17), (4, 5, 12, 6), (9, 4, 7, 17)):
        batch = tiny_batch(lengths)
        counts = [labelled(row) for row in rows(batch)]
        assert len(set(counts)) == 4
        assert counts[1] == 0
        expected, result = whole.step([batch]), parts.step(rows(batch))
        assert result.tokens == expected.tokens == sum(counts)
        assert result.loss == pytest.approx(expected.loss, rel=1e-6)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert result.moved
    assert_close(parts.weights, whole.weights, 1e-4)


def test_the_loss_is_the_mean_over_labelled_tokens_and_so_is_its_gradient(world):
    run, other, batch = Run(world, torch.optim.SGD), tiny_model(), tiny_batch()
    mean = summed_loss(other, batch) / labelled(batch)
    mean.backward()
    result = run.step(rows(batch))
    assert result.loss == pytest.approx(mean.item(), rel=1e-6)
    gradient = torch.cat([p.grad.flatten() for p in other.parameters()])
    assert result.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-5)
    moved = {name: p.detach() - 0.01 * p.grad for name, p in other.named_parameters()}
    assert_close(run.weights, moved, 1e-6)


def test_rows_may_be_of_other_lengths_in_each_micro_batch(world):
    """Padding adds nothing."""
    run, other, batch = Run(world), Run(world), tiny_batch()
    cut = [
        {name: value[:, :length] for name, value in row.items()}
        for row, length in zip(rows(batch), (9, 4, 7, 17), strict=True)
    ]
    assert run.step(cut).loss == pytest.approx(other.step([batch]).loss, rel=1e-6)


@pytest.mark.parametrize("max_norm", [0.1, 1e9, None])
def test_the_gradient_is_clipped_and_its_norm_told_from_before(world, max_norm):
    run = Run(world, torch.optim.SGD, max_norm=max_norm)
    before = run.weights
    result = run.step([tiny_batch()])
    change = torch.cat([(before[n] - v).flatten() for n, v in run.weights.items()]).norm() / 0.01
    assert result.grad_norm > 0.2
    assert change.item() == pytest.approx(min(result.grad_norm, max_norm or math.inf), rel=1e-3)


def infinite_loss(run):
    return lambda logps, batch: run.loss(logps, batch) * math.inf


def nan_gradient(run):
    """Its loss is finite: 0 * sqrt(0)."""
    norm = run.model.norm.scale
    return lambda logps, batch: run.loss(logps, batch) + 0 * (0 * norm).sum().sqrt()


@pytest.mark.parametrize("broken", [infinite_loss, nan_gradient])
def test_a_step_that_is_not_finite_leaves_no_trace(world, broken):
    run, other = Run(world, max_norm=1.0), Run(world, max_norm=1.0)
    for one in (run, other):
        one.step([tiny_batch()])
    before = run.weights
    result = run.step(rows(tiny_batch()), broken(run))
    assert not result.moved
    assert math.isfinite(result.loss) == (broken is nan_gradient)
    assert not math.isfinite(result.grad_norm)
    assert all(torch.equal(value, before[name]) for name, value in run.weights.items())
    assert run.step([tiny_batch((5, 6))]) == other.step([tiny_batch((5, 6))])
    assert all(torch.equal(value, other.weights[name]) for name, value in run.weights.items())
    states = [one.optimizer.state_dict()["state"] for one in (run, other)]
    assert all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name]))
        for key, state in states[0].items()
        for name, value in state.items()
    )


def test_a_step_without_any_label_moves_nothing(world):
    run, batch = Run(world), tiny_batch()
    batch["labels"].fill_(-100)
    before = run.weights
    result = run.step([batch])
    assert (result.moved, result.tokens) == (False, 0)
    assert result.problem == "no token has a label"
    assert all(torch.equal(value, before[name]) for name, value in run.weights.items())


def test_what_is_frozen_stays(world):
    run = Run(world)
    frozen = run.model.layers[0].attn.qkv_proj.weight.requires_grad_(False)
    before = frozen.clone()
    assert run.step([tiny_batch()]).moved
    assert torch.equal(frozen, before)


def test_validation_is_the_mean_over_all_labelled_tokens(world):
    run = Run(world, lora_dropout=0.5)
    batches = [tiny_batch(), tiny_batch((3, 9)), *rows(tiny_batch((2, 3, 4)))]
    before = run.weights
    loss, tokens = validate(world, run.model, run.loss, iter(batches))
    assert run.model.training
    run.model.eval()
    with torch.no_grad():
        sums = [summed_loss(run.model, batch).item() for batch in batches]
    assert tokens == sum(labelled(batch) for batch in batches)
    assert loss == pytest.approx(sum(sums) / tokens, rel=1e-6)
    assert validate(world, run.model, run.loss, batches) == (loss, tokens)
    assert not run.model.training
    assert all(torch.equal(value, before[name]) for name, value in run.weights.items())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weights_scale_the_loss_of_their_tokens_and_not_their_number(world, smoothing):
    """Beside torch's, token by token, and its gradient; in validation too."""
    run, batch = Run(world, torch.optim.SGD), tiny_batch()
    run.loss = SFT(label_smoothing=smoothing)
    batch["weights"] = torch.rand(batch["labels"].shape) * 3
    logits, labels = run.model(batch["tokens"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:]
    options = {"reduction": "none", "label_smoothing": smoothing}
    losses = F.cross_entropy(logits, labels.flatten(), **options)
    mean = (losses * batch["weights"][:, 1:].flatten()).sum() / labelled(batch)
    slopes = torch.autograd.grad(mean, [*run.model.parameters()])
    norm = torch.cat([slope.flatten() for slope in slopes]).norm()
    if not smoothing:
        found, tokens = validate(world, run.model, run.loss, [batch])
        assert (found, tokens) == (pytest.approx(mean.item(), rel=1e-6), labelled(batch))
    each = [{name: value[n : n + 1] for name, value in batch.items()} for n in range(4)]
    result = run.step(each)
    assert result.loss == pytest.approx(mean.item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert result.tokens == labelled(batch)


def test_smoothed_steps_are_torchs_and_validation_is_not_smoothed(world):
    run, batch = Run(world, torch.optim.SGD), tiny_batch()
    run.loss = SFT(label_smoothing=0.2)
    logits, labels = run.model(batch["tokens"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:]
    mean = F.cross_entropy(logits, labels.flatten(), label_smoothing=0.2)
    plain, _ = validate(world, run.model, run.loss, [batch])
    assert plain == pytest.approx(F.cross_entropy(logits, labels.flatten()).item(), rel=1e-6)
    slopes = torch.autograd.grad(mean, [*run.model.parameters()])
    norm = torch.cat([slope.flatten() for slope in slopes]).norm()
    result = run.step(rows(batch))
    assert result.loss == pytest.approx(mean.item(), rel=1e-6) != plain
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)


def test_validation_without_a_label_is_a_loss_of_zero_over_no_tokens(world):
    run, batch = Run(world), tiny_batch()
    batch["labels"].fill_(-100)
    assert validate(world, run.model, run.loss, [batch]) == (0.0, 0)
