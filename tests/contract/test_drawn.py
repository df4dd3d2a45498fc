"""Drawn tokens follow the distribution of transformers' ``generate``, from logits to tokens."""

from pathlib import Path

import pytest
import torch
from torchtune.training import set_default_dtype

from phi3_plugin import generate
from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.generate import Generator
from phi3_plugin.models import phi3
from phi3_plugin.models.cache import serve
from phi3_plugin.models.recorded import Recorded
from phi3_plugin.options import Sampling
from tests.answers import Letters, chi_square, prompts_of, served
from tests.oracles import MINI_4K, TINY_MHA, hf_model, save_checkpoint

DRAWS = 3000
GPU = "cuda"
CASES = [
    {"temperature": 1.0, "top_k": 12},
    {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.3},
    {"temperature": 1.5, "min_p": 0.2},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    small = {**TINY_MHA, "num_hidden_layers": 2}
    hf = hf_model(MINI_4K, std=0.15, **small)
    return hf, served(save_checkpoint(hf, MINI_4K, tmp_path_factory.mktemp("base"), **small))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_tokens_follow_the_distribution_of_transformers(models, case):
    theirs, ours = models
    (prompt,) = prompts_of(9)
    asked = Sampling(max_new_tokens=2, **case)
    answers = list(Generator(ours, Letters(), asked, batch_size=50).answers([prompt] * DRAWS))
    # Of those that begin alike, the commonest: what follows depends on the cache
    first = torch.tensor([answer.tokens[0] for answer in answers]).mode().values.item()
    drawn = torch.tensor([a.tokens[1] for a in answers if a.tokens[0] == first])
    assert len(drawn) > 200
    counts = torch.bincount(drawn, minlength=TINY_MHA["vocab_size"]).double()
    expected = probabilities(theirs, [*prompt, first], case) * len(drawn)
    assert not counts[expected == 0].any()
    assert above_chance(counts, expected) < 5  # standard deviations above what chance gives


def probabilities(model, tokens: list[int], case: dict) -> torch.Tensor:
    """Return what transformers draws the next token from."""
    how = {"do_sample": True, "max_new_tokens": 1, "top_k": 0, "eos_token_id": None, **case}
    more = {"output_scores": True, "return_dict_in_generate": True, "pad_token_id": 0}
    given = torch.tensor([tokens])
    out = model.generate(given, attention_mask=torch.ones_like(given), **how, **more)
    return out.scores[0][0].softmax(0).double()


def above_chance(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how far the statistic lies above its mean, in its standard deviations."""
    squares, freedom = chi_square(counts, expected)
    assert freedom > 2
    return (squares - freedom) / (2 * freedom) ** 0.5


def on_gpu(dtype: torch.dtype, folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return transformers' model and ours, there."""
    theirs = hf_model(MINI_4K, std=0.15, **TINY_MHA)
    save_checkpoint(theirs, MINI_4K, folder, **TINY_MHA)
    with set_default_dtype(dtype), torch.device(GPU):
        ours = phi3(folder)
    ours.load_state_dict(load_base_weights(folder))
    serve(ours)
    return theirs.to(GPU), ours


@pytest.mark.gpu
def test_answers_on_a_gpu(tmp_path):
    theirs, ours = on_gpu(torch.float32, tmp_path)
    prompts = prompts_of(3, 40, 2100)
    for answer in Generator(ours, Letters(), Sampling(max_new_tokens=40)).answers(prompts):
        tokens = torch.tensor([prompts[answer.index]], device=GPU)
        how = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **how)
        assert list(answer.tokens) == out[0, tokens.shape[1] :].tolist()


@pytest.mark.gpu
def test_a_graph_answers_as_steps_of_their_own_do(tmp_path, monkeypatch):
    _, ours = on_gpu(torch.float32, tmp_path)
    replays = []
    replay = Recorded._replay
    monkeypatch.setattr(Recorded, "_replay", lambda self: (replays.append(1), replay(self)))

    def answers():
        generator = Generator(
            ours, Letters(range(0, 140, 20)), Sampling(max_new_tokens=100), batch_size=2
        )
        return {
            answer.index: answer.tokens for answer in generator.answers(prompts_of(3, 40, 2100, 9))
        }

    found = answers()
    assert len(replays) > 50
    monkeypatch.setattr(generate, "computes_ahead", lambda device: False)
    assert answers() == found


@pytest.mark.gpu
@torch.no_grad()
def test_logits_on_a_gpu_in_bf16(tmp_path):
    theirs, ours = on_gpu(torch.bfloat16, tmp_path)
    cache, lengths = ours.cache(2), [40, 2100]
    tokens = torch.tensor([t for prompt in prompts_of(*lengths) for t in prompt], device=GPU)
    step = ours.step(cache, [0, 1], lengths)
    logits = ours(tokens[None], step=step).float()
    for row, part in zip(logits, tokens.split(lengths), strict=True):
        expected = theirs(part[None], logits_to_keep=1).logits[0, -1]
        assert (row - expected).norm() <= 0.05 * expected.norm()
