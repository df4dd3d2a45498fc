"""Loss and hits of every labelled token, beside validation and the model's own logits."""

import pytest
import torch
import torch.nn.functional as F

from phi3_plugin.data.collate import concatenate
from phi3_plugin.evaluate import by_document, token_scores
from phi3_plugin.models import logps as head_loss
from phi3_plugin.train.losses import sft
from phi3_plugin.train.step import validate, with_targets
from phi3_plugin.train.world import World
from tests.train.tiny import CONFIG, tiny_model

LENGTHS = (9, 4, 17, 1, 7)


def samples():
    """The second has no label, and the fourth nothing that could be predicted."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, length in enumerate(LENGTHS):
        tokens = torch.randint(0, CONFIG.vocab_size, (length,), generator=generator).tolist()
        first = length if number == 1 else min(number + 1, length)
        made.append({"tokens": tokens, "labels": [-100] * first + tokens[first:]})
    return made


@pytest.fixture(params=["lora", "plain", "tied", "head"])
def model(request):
    made = {
        "lora": tiny_model,
        "plain": lambda: tiny_model(lora=False),
        "tied": lambda: tied(tiny_model()),
        "head": lambda: tiny_model(apply_lora_to_output=True),
    }
    return made[request.param]().eval()


def tied(model):
    from torchtune.modules import TiedLinear

    del model.output
    object.__setattr__(model, "output", TiedLinear(model.tok_embeddings))
    return model


def brute_force(model, sample):
    """Return loss and hits of a sample from all its logits."""
    tokens, labels = torch.tensor([sample["tokens"]]), torch.tensor(sample["labels"])[1:]
    with torch.no_grad():
        logits = model(tokens)[0, :-1].float()
    some = labels != -100
    losses = F.cross_entropy(logits[some], labels[some], reduction="sum")
    return float(losses), int((logits[some].argmax(-1) == labels[some]).sum())


@pytest.mark.parametrize("pieces", [1, 1 << 25])
def test_each_document_is_measured_as_if_it_were_alone(model, monkeypatch, pieces):
    monkeypatch.setattr(head_loss, "LOGITS", pieces * 64 * CONFIG.vocab_size)
    batch = with_targets(concatenate(samples()))
    losses, hits = (by_document(values, batch) for values in token_scores(model, batch))
    expected = [brute_force(model, sample) for sample in samples()]
    assert losses == pytest.approx([loss for loss, _ in expected], rel=1e-5, abs=1e-6)
    assert hits == [count for _, count in expected]
    assert losses[1] == losses[3] == 0 and losses[2] > 0


def test_the_mean_is_that_of_validation(model):
    batch = concatenate(samples())
    losses, _ = token_scores(model, with_targets(batch))
    loss, count = validate(World("cpu"), model, sft, [batch])
    assert len(losses) == count
    assert float(losses.double().mean()) == pytest.approx(loss, rel=1e-6)


def test_some_tokens_are_the_likeliest(model):
    batch = with_targets(concatenate(samples()))
    with torch.no_grad():
        likeliest = torch.cat([model(torch.tensor([s["tokens"]]))[0].argmax(-1) for s in samples()])
    batch["targets"] = likeliest[batch["rows"]]
    assert token_scores(model, batch)[1].all()


def test_a_batch_without_labels_has_none(model):
    batch = concatenate(samples())
    batch["labels"].fill_(-100)
    losses, hits = token_scores(model, with_targets(batch))
    assert losses.shape == hits.shape == (0,) and hits.dtype == torch.bool
    assert by_document(losses, with_targets(batch)) == [0.0] * len(LENGTHS)


def test_nobody_listens_afterwards(model):
    batch = with_targets(concatenate(samples()))
    before = token_scores(model, batch)[0]
    with pytest.raises(IndexError):
        token_scores(model, {**batch, "tokens": batch["tokens"] + CONFIG.vocab_size})
    head = model.output if isinstance(model.output, torch.nn.Module) else model.output.linear
    assert not head._forward_hooks
    assert torch.equal(token_scores(model, batch)[0], before)
