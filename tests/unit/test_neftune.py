"""Noise on embeddings: that of transformers, a document at a time, and in training alone."""

import math
from types import SimpleNamespace

import pytest
import torch

from phi3_plugin.models.neftune import noisy
from phi3_plugin.train.losses import predicted
from phi3_plugin.train.model import prepare
from phi3_plugin.train.step import with_targets
from tests.tiny import tiny_model


@pytest.mark.parametrize("rows", [1, 3])
def test_it_is_the_noise_of_transformers(rows):
    hooks = pytest.importorskip("transformers.integrations.neftune")
    h = torch.randn(rows, 12, 16)
    torch.manual_seed(3)
    ours = noisy(h, None, 5.0)
    torch.manual_seed(3)
    module = SimpleNamespace(training=True, neftune_noise_alpha=5.0)
    theirs = hooks.neftune_post_forward_hook(module, None, h.clone())
    torch.testing.assert_close(ours, theirs)


def test_a_document_in_a_pack_gets_what_it_gets_alone():
    h, lengths, alpha = torch.zeros(1, 1002, 64), (1000, 2), 5.0
    long, short = noisy(h, lengths, alpha)[0].split(lengths)
    for part, length in ((long, 1000), (short, 2)):
        bound = alpha / math.sqrt(length * 64)
        assert 0.9 * bound < part.abs().max() <= bound


def test_it_is_for_training_alone():
    tokens = torch.arange(9)[None]
    batch = with_targets({"tokens": tokens, "labels": tokens.clone()})
    model = prepare(tiny_model(), neftune_alpha=5.0)
    plain = predicted(model.eval(), batch)
    model.train()
    assert not torch.equal(predicted(model, batch), plain)
    with torch.no_grad():  # what losses compare with
        assert torch.equal(predicted(model, batch), plain)
    assert torch.equal(predicted(prepare(tiny_model()).train(), batch), plain)
