"""What a batch says is predicted, and steps in fp16; all others in tests/contract/test_step.py."""

import math

import pytest
import torch
from torch.amp import GradScaler

from phi3_plugin.train.losses import SFT
from phi3_plugin.train.model import prepare
from phi3_plugin.train.step import loss_scaler, ready, train_step, with_targets
from phi3_plugin.train.world import World
from tests.own import same
from tests.tiny import rows, tiny_batch, tiny_model


def test_labels_move_to_the_tokens_that_predict_them():
    labels = torch.tensor([[7, -100, 3, 4], [-100, -100, -100, 9]])
    batch = with_targets({"tokens": "as it is", "labels": labels})
    assert batch["targets"].tolist() == [3, 4, 9]
    assert batch["rows"].tolist() == [1, 2, 6]
    assert batch["tokens"] == "as it is"
    assert "labels" not in batch


def test_a_single_token_predicts_nothing_and_its_gradient_is_zero():
    model = tiny_model()
    batch = ready(
        {"tokens": torch.tensor([[5]]), "labels": torch.tensor([[5]])}, torch.device("cpu")
    )
    loss = SFT()(model(**batch), batch)
    loss.backward()
    assert loss.item() == 0 and len(batch["targets"]) == 0
    assert all(not p.grad.any() for p in model.parameters())


class Fp16:
    """A base in fp16 with adapters in fp32, which makes steps; or the same in fp32."""

    def __init__(self, scale=65536.0, base=torch.float16, **scaler):
        self.model = prepare(tiny_model().to(base), adapter_dtype="fp32")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.01)
        enabled = base == torch.float16
        self.scaler = GradScaler("cpu", init_scale=scale, enabled=enabled, **scaler)

    def step(self, batches, max_norm=None, loss=None):
        given = World("cpu"), self.model, self.optimizer, loss or SFT(), batches, max_norm
        return train_step(*given, self.scaler)

    @property
    def weights(self):
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}


def test_torchs_rules_are_those_of_a_run():
    scaler = loss_scaler("fp16", torch.device("cpu"))
    assert scaler.is_enabled()
    rules = scaler.get_scale(), scaler.get_growth_factor(), scaler.get_backoff_factor()
    assert (*rules, scaler.get_growth_interval()) == (65536.0, 2.0, 0.5, 2000)
    for dtype in ("bf16", "fp32"):
        assert not loss_scaler(dtype, torch.device("cpu")).is_enabled()


def test_an_overflow_in_fp16_is_survived():
    """Parameters and moments stay, the scale is halved, and then it goes on as if it were new."""
    run, batches = Fp16(2.0**24), rows(tiny_batch())
    before, results = run.weights, []
    while not results or results[-1].overflowed:
        assert same(run.weights, before) and not run.optimizer.state
        results.append(run.step(batches, 1.0))
    assert len(results) > 2
    for number, result in enumerate(results):
        assert result.loss_scale == 2.0 ** (24 - number)
        assert math.isfinite(result.loss)
        assert result.problem is None or "overflowed at a loss scale of" in result.problem
    other = Fp16(results[-1].loss_scale)
    assert other.step(batches, 1.0) == results[-1]
    assert run.step(batches, 1.0) == other.step(batches, 1.0)
    assert same(run.weights, other.weights)
    assert "16,777,216" in results[0].problem


def test_a_scale_grows_where_nothing_overflows():
    run = Fp16(4.0, growth_interval=2)
    assert [run.step([tiny_batch()]).loss_scale for _ in range(5)] == [4, 4, 8, 8, 16]


@pytest.mark.parametrize("scale", [1024.0, 8192.0])
def test_gradients_are_divided_by_the_scale_before_they_are_clipped(scale):
    """However many micro-batches there are; by as little as fp16 allows from those of fp32."""
    exact = Fp16(base=torch.float32)
    runs = [Fp16(scale), Fp16(scale)]
    batches = [[tiny_batch()], rows(tiny_batch())]
    expected = exact.step(batches[0], 0.01)
    assert expected.grad_norm > 0.05
    for run, given in zip(runs, batches, strict=True):
        found = run.step(given, 0.01)
        assert found.moved
        assert found.loss == pytest.approx(expected.loss, rel=1e-3)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=5e-3)
        state = run.optimizer.state
        for one, other in zip(state.values(), exact.optimizer.state.values(), strict=True):
            gap = (one["exp_avg"] - other["exp_avg"]).norm()
            assert gap <= 1e-2 * other["exp_avg"].norm()


def test_a_loss_that_is_no_number_is_no_overflow():
    run = Fp16()
    result = run.step([tiny_batch()], loss=lambda logps, batch: SFT()(logps, batch) * math.nan)
    assert (result.moved, result.overflowed) == (False, False)
    assert result.problem == "loss or gradient is not finite"
