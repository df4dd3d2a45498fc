"""What a batch says is predicted; the steps themselves are in tests/contract/test_step.py."""

import torch

from phi3_plugin.train.losses import SFT
from phi3_plugin.train.step import ready, with_targets
from tests.tiny import tiny_model


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
