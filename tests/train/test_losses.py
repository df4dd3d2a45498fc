import pytest
import torch
import torch.nn.functional as F

from phi3_plugin.models import logps as head_loss
from phi3_plugin.train.losses import sft
from phi3_plugin.train.step import with_targets
from tests.train.tiny import tiny_batch, tiny_model


def whole(model, batch):
    """Cross entropy over the logits of the whole sequence at once."""
    logits = model(batch["tokens"])[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="sum")


def summed(model, batch):
    batch = with_targets(batch)
    return sft(model(**batch), batch)


@pytest.mark.parametrize("lengths", [(17, 3, 9, 5), (16, 1), (5,), (8, 8, 8), (2,)])
@pytest.mark.parametrize("logits", [1, 161 * 130, 1 << 25])
def test_the_sum_over_pieces_is_that_over_whole_logits(lengths, logits, monkeypatch):
    monkeypatch.setattr(head_loss, "LOGITS", logits)
    model, batch = tiny_model(), tiny_batch(lengths)
    expected = whole(model, batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(expected, parameters)
    loss = summed(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, value, other in zip(
        names, torch.autograd.grad(loss, parameters), gradients, strict=True
    ):
        assert (value - other).norm() <= 1e-6 * other.norm(), name


def test_a_batch_without_labels_adds_nothing_and_has_a_gradient_of_zero():
    model, batch = tiny_model(), tiny_batch()
    batch["labels"].fill_(-100)
    loss = summed(model, batch)
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters())


def test_a_single_token_predicts_nothing():
    model = tiny_model()
    batch = {"tokens": torch.tensor([[5]]), "labels": torch.tensor([[5]])}
    assert summed(model, batch).item() == 0
    assert len(with_targets(batch)["targets"]) == 0


def test_bf16_logits_are_summed_in_fp32():
    model, batch = tiny_model().to(torch.bfloat16), tiny_batch()
    logits, labels = model(batch["tokens"])[:, :-1].float(), batch["labels"][:, 1:]
    expected = F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
    loss = summed(model, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_labels_move_to_the_tokens_that_predict_them():
    labels = torch.tensor([[7, -100, 3, 4], [-100, -100, -100, 9]])
    batch = with_targets({"tokens": "as it is", "labels": labels})
    assert batch["targets"].tolist() == [3, 4, 9]
    assert batch["rows"].tolist() == [1, 2, 6]
    assert batch["tokens"] == "as it is"
    assert "labels" not in batch
