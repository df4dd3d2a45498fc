"""Drawn tokens follow transformers' distribution; wrong requests are refused, all at once."""

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from phi3_plugin.errors import ConfigError
from phi3_plugin.generate import Sampling, choose, penalized, probabilities, read_sampling
from tests.generate.spoken import chi_square

SEEN = torch.tensor([3, 3, 7, 11])
CASES = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.7, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "repetition_penalty": 1.4},
    {"temperature": 0.9, "repetition_penalty": 0.8, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.3, "top_k": 50, "top_p": 0.95},
]


def logits(seed: int = 0, vocabulary: int = 16) -> torch.Tensor:
    return 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))


def theirs(scores: torch.Tensor, s: Sampling) -> torch.Tensor:
    """Return the probabilities of transformers' processors, in the order of its ``generate``."""
    chain = [RepetitionPenaltyLogitsProcessor(float(s.repetition_penalty))]
    chain.append(TemperatureLogitsWarper(float(s.temperature)))
    chain += [TopKLogitsWarper(s.top_k)] if s.top_k else []
    chain += [TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    chain += [MinPLogitsWarper(s.min_p)] if s.min_p else []
    scores = scores[None]
    for processor in chain:
        scores = processor(SEEN[None], scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("vocabulary", [16, 500])
def test_probabilities_are_those_of_transformers(case, vocabulary):
    sampling = Sampling(**case)
    for seed in range(5):
        scores = penalized(logits(seed, vocabulary), SEEN, sampling.repetition_penalty)
        expected = theirs(logits(seed, vocabulary), sampling)
        torch.testing.assert_close(probabilities(scores, sampling), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_follow_the_probabilities(case):
    sampling, random = Sampling(**case), torch.Generator().manual_seed(0)
    draws = [choose(logits(), SEEN, sampling, random) for _ in range(3000)]
    counts = torch.bincount(torch.tensor(draws), minlength=16).double()
    expected = theirs(logits(), sampling).double() * len(draws)
    assert not counts[expected == 0].any()
    squares, freedom = chi_square(counts, expected)
    # Beyond the 99.99 % quantile (Wilson and Hilferty's formula) once in ten thousand seeds
    limit = (
        freedom * (1 - 2 / (9 * max(freedom, 1)) + 3.72 * (2 / (9 * max(freedom, 1))) ** 0.5) ** 3
    )
    assert squares <= max(limit, 1e-9)


def test_greedy_takes_the_likeliest_that_the_penalty_leaves():
    random = torch.Generator()
    assert choose(logits(), SEEN, Sampling(), random) == int(logits().argmax())
    first = torch.tensor([int(logits().argmax())])
    other = choose(logits(), first, Sampling(repetition_penalty=100.0), random)
    assert other == int(logits().topk(2).indices[1])


def test_a_temperature_near_zero_is_greedy():
    scores = logits()
    chances = probabilities(scores, Sampling(temperature=1e-30))
    assert chances[scores.argmax()] == 1


def test_reads_what_is_given():
    sampling = read_sampling({"temperature": 0.3, "top_k": None, "stop": "###", "max_time": 180})
    assert sampling == Sampling(temperature=0.3, stop=("###",), max_time=180)
    assert read_sampling({"stop": ["a", "b"]}).stop == ("a", "b")


WRONG = {
    "max_new_tokens": [0, -1, 2.5, True, "8"],
    "temperature": [-0.1, float("nan"), float("inf"), "hot"],
    "top_k": [-1, 1.5],
    "top_p": [0, 1.01],
    "min_p": [1, -0.1],
    "repetition_penalty": [0, -1],
    "seed": [-1, 2**63],
    "max_time": [0, -5],
    "stop": ["", ["a", ""], [1], 7],
}


@pytest.mark.parametrize("name", WRONG)
def test_refuses_wrong_values(name):
    for value in WRONG[name]:
        with pytest.raises(ConfigError, match=rf"^{name}: .* must be "):
            read_sampling({name: value})


def test_says_all_that_is_wrong_at_once():
    with pytest.raises(ConfigError) as caught:
        read_sampling({"top_p": 2, "temprature": 1, "beams": 4})
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "Did you mean temperature?" in lines[1]
    assert "max_new_tokens" in lines[2]
