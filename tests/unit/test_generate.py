"""Answers: drawn as transformers draws, as if each were alone, streamed and ended for a reason."""

from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from phi3_plugin.errors import CheckpointError, DataError
from phi3_plugin.generate import (
    Generator,
    GrowingText,
    Sampling,
    choose,
    penalized,
    probabilities,
)
from tests.answers import Letters, ours, prompts_of, served
from tests.oracles import MINI_4K, TINY_MHA, hf_model, save_checkpoint

# How a token is chosen.

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


# The text while it grows.


class Bytes:
    """A tokenizer with a token for each byte, and one that says nothing."""

    special_tokens: ClassVar = {"<|end|>": 256}
    stop_tokens: ClassVar = [256]

    def decode(self, token_ids, skip_special_tokens=True):
        return bytes(i for i in token_ids if i < 256).decode("utf-8", errors="replace")


def shown(text: str | bytes, *stop: str) -> tuple[list[str], GrowingText]:
    """Return the pieces that are shown, until the text stops."""
    growing, pieces = GrowingText(Bytes(), stop), []
    for byte in text.encode() if isinstance(text, str) else text:
        pieces.append(growing.push(byte))
        if growing.stopped:
            break
    return [*pieces, growing.end()], growing


def test_characters_come_whole():
    pieces, growing = shown("aé𝄞b")
    assert [piece for piece in pieces if piece] == ["a", "é", "𝄞", "b"]
    assert growing.text == "aé𝄞b"


def test_bytes_that_are_no_character_come_in_the_end():
    pieces, growing = shown(b"a\xf0\x9d")
    assert "".join(pieces) == growing.text == "a�"


@pytest.mark.parametrize("stop", ["###", "\n\n", "é", "d###"])
def test_ends_before_a_stop_text(stop):
    text = f"abc{stop}d"
    pieces, growing = shown(text + "###", stop)
    assert growing.stopped
    assert "".join(pieces) == growing.text == "abc"


def test_the_first_of_several_ends_it():
    assert shown("one two three", "three", "two")[1].text == "one "


def test_what_only_begins_like_a_stop_text_is_shown_late_but_shown():
    pieces, growing = shown("a##b##", "###")
    assert pieces[1] == pieces[2] == "" and pieces[3] == "##b"
    assert "".join(pieces) == growing.text == "a##b##"
    assert not growing.stopped


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="ab#é\n", max_size=20),
    st.lists(st.text("ab#é", min_size=1, max_size=3), max_size=3),
)
def test_pieces_add_up_to_the_text_before_the_first_stop(text, stop):
    pieces, growing = shown(text, *stop)
    assert "".join(pieces) == growing.text
    # The one that ends first ends the text, and of those the longest begins first.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert growing.text == (text[: min(ends)[1]] if ends else text)


# Many answers at once.

SMALL = {**TINY_MHA, "num_hidden_layers": 2, "sliding_window": 48, "max_position_embeddings": 128}
LENGTHS = (3, 30, 1, 17, 60, 5, 9)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    hf = hf_model(MINI_4K, std=0.2, **SMALL)
    return served(save_checkpoint(hf, MINI_4K, tmp_path_factory.mktemp("base"), **SMALL))


def generator(model, batch_size=3, stops=(), **asked) -> Generator:
    return Generator(model, Letters(stops), Sampling(**asked), batch_size=batch_size)


def by_number(answers):
    return sorted(answers, key=lambda answer: answer.index)


@pytest.mark.parametrize("asked", [{}, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.2}])
def test_an_answer_does_not_depend_on_its_neighbours(model, asked):
    prompts = prompts_of(*LENGTHS)
    alone = ours(model, prompts, 30, batch_size=1, stop_tokens=range(0, 140, 20), **asked)
    assert len(set(map(len, alone))) > 2  # they end at different times
    for size in (2, 3, 16):
        found = ours(model, prompts, 30, batch_size=size, stop_tokens=range(0, 140, 20), **asked)
        assert found == alone


def test_other_seeds_draw_other_tokens_and_the_same_seed_the_same(model):
    asked = {"temperature": 1.0, "count": 20}
    prompts = prompts_of(5, 5)
    first, again, other = (ours(model, prompts, seed=s, **asked) for s in (1, 1, 2))
    assert first == again
    assert first[0] != first[1] and first[0] != other[0]


def test_one_prompt_asked_twice_is_answered_differently(model):
    (prompt,) = prompts_of(5)
    first, second = ours(model, [prompt, prompt], 20, temperature=1.0)
    assert first != second


def test_says_why_an_answer_ended(model):
    prompts = prompts_of(10, 120)
    answers = by_number(generator(model, max_new_tokens=16).answers(prompts))
    assert [answer.reason for answer in answers] == ["length", "context"]
    assert [len(answer.tokens) for answer in answers] == [16, 8]
    assert [answer.prompt_tokens for answer in answers] == [10, 120]
    third = answers[0].tokens[2]
    first = answers[0].tokens.index(third)
    stopped = next(generator(model, stops=[third]).answers(prompts[:1]))
    assert stopped.reason == "stop"
    assert stopped.tokens == answers[0].tokens[: first + 1]
    assert stopped.text == Letters().decode(stopped.tokens[:-1])
    hurried = next(generator(model, max_time=1e-9).answers(prompts[:1]))
    assert (hurried.reason, len(hurried.tokens)) == ("time", 1)


class Thinking(Letters):
    """Whose token 1 opens a thought."""

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join("<think>" if i == 1 else Letters.decode(self, [i]) for i in token_ids)


def test_an_answer_begins_with_the_thought_that_its_prompt_opens(model):
    asked, pieces = Generator(model, Thinking(), Sampling(max_new_tokens=4)), []
    (answer,) = asked.answers([[5, 6, 1]], lambda _, piece: pieces.append(piece))
    assert answer.text == "".join(pieces) == "<think>" + Thinking().decode(answer.tokens)
    assert asked.answer([5, 1, 6]).text == Thinking().decode(asked.answer([5, 1, 6]).tokens)


def test_stop_texts_end_an_answer_and_are_no_part_of_it(model):
    (prompt,) = prompts_of(10)
    whole = next(generator(model, max_new_tokens=16).answers([prompt]))
    stop = whole.text[5:8]
    answer = next(generator(model, stop=(stop,)).answers([prompt]))
    assert answer.reason == "stop"
    assert answer.text == whole.text[: whole.text.index(stop)]


def test_a_special_token_ends_an_answer_as_a_stop_text(model, monkeypatch):
    (prompt,) = prompts_of(10)
    whole = next(generator(model, max_new_tokens=16).answers([prompt]))
    monkeypatch.setattr(Letters, "special_tokens", {"<|other|>": whole.tokens[5]})
    answer = next(generator(model, stop=("<|other|>",)).answers([prompt]))
    end = whole.tokens.index(whole.tokens[5])
    assert (answer.reason, answer.tokens) == ("stop", whole.tokens[: end + 1])


def test_streams_every_answer_whole(model):
    pieces: dict[int, str] = {}

    def tell(index, piece):
        pieces[index] = pieces.get(index, "") + piece

    asked = generator(model, max_new_tokens=20, stop=("zq", "Ab"))
    answers = list(asked.answers(prompts_of(*LENGTHS), tell))
    assert len(answers) == len(LENGTHS)
    assert {a.index: a.text for a in answers if a.text} == pieces


def test_no_prompts_no_answers(model):
    assert list(generator(model).answers([])) == []


@pytest.mark.parametrize("length, says", [(0, "prompt 2 is empty"), (128, "128 tokens, but.* 128")])
def test_refuses_what_cannot_be_answered(model, length, says):
    with pytest.raises(DataError, match=says):
        list(generator(model).answers(prompts_of(4, length)))
    with pytest.raises(DataError, match=says.replace("2", "1", 1) if not length else says):
        generator(model).answer(prompts_of(length)[0])


def test_a_prompt_that_fills_all_but_one_position_gets_one_token(model):
    answer = generator(model).answer(prompts_of(127)[0])
    assert (answer.reason, len(answer.tokens)) == ("context", 1)


def fed(model, monkeypatch) -> list[int]:
    """Return a list that grows by the number of tokens the model reads at a time."""
    sizes = []
    stock = model.step

    def step(cache, rows, lengths):
        sizes.append(sum(lengths))
        return stock(cache, rows, lengths)

    monkeypatch.setattr(model, "step", step)
    return sizes


def test_what_was_heard_is_not_read_again(model, monkeypatch):
    asked = generator(model, max_new_tokens=4)
    first = prompts_of(20)[0]
    answer = asked.answer(first)
    second = [*first, *answer.tokens, *prompts_of(6, seed=1)[0]]
    sizes = fed(model, monkeypatch)
    found = asked.answer(second)
    assert sizes[0] == 7  # the last token of the answer was never read
    assert found.tokens == generator(model, max_new_tokens=4).answer(second).tokens
    # Another history: what is shared is kept
    third = [*second[:22], *prompts_of(5, seed=2)[0]]
    del sizes[:]
    assert asked.answer(third).tokens == generator(model, max_new_tokens=4).answer(third).tokens
    assert sizes[0] <= 8
    # The very same prompt
    assert asked.answer(third).tokens == asked.answer(third).tokens


def test_a_ring_that_has_been_written_over_is_read_anew(model):
    asked = generator(model, max_new_tokens=4)
    first = prompts_of(60)[0]
    asked.answer(first)
    for prompt in (first[:50], first, [*first, *prompts_of(30, seed=3)[0]], first[:3]):
        assert (
            asked.answer(prompt).tokens == generator(model, max_new_tokens=4).answer(prompt).tokens
        )


def test_goes_on_after_an_interrupt(model):
    asked, first = generator(model, max_new_tokens=8), prompts_of(40)[0]
    said = 0

    def interrupt(piece):
        nonlocal said
        said += 1
        if said == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asked.answer(first, interrupt)
    expected = generator(model, max_new_tokens=8).answer(first)
    assert asked.answer(first).tokens == expected.tokens


@pytest.mark.parametrize("heard", [30, 44, 60])
@pytest.mark.parametrize("layer", [0, 1])
def test_what_an_interrupted_reading_wrote_over_is_read_anew(model, monkeypatch, heard, layer):
    asked, first = generator(model, max_new_tokens=4), prompts_of(heard)[0]
    answer = asked.answer(first)
    second = [*first, *answer.tokens, *prompts_of(30, seed=1)[0]]  # more than the window
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(model.layers[layer].mlp, "forward", interrupt)
        asked.answer(second)
    third = [*second[: heard + 4], *prompts_of(5, seed=2)[0]]
    assert asked.answer(third).tokens == generator(model, max_new_tokens=4).answer(third).tokens


def interrupt(*_):
    raise KeyboardInterrupt


def test_sizes_of_what_is_read_at_once_are_bounded(model, monkeypatch):
    monkeypatch.setattr("phi3_plugin.generate.READ_AT_ONCE", 40)
    sizes, prompts = fed(model, monkeypatch), prompts_of(*LENGTHS)
    found = by_number(generator(model, batch_size=8, max_new_tokens=3).answers(prompts))
    assert max(sizes) == 60 and sizes[0] == 34
    assert [list(a.tokens) for a in found] == ours(model, prompts, 3, batch_size=1)


@pytest.mark.parametrize("token", [160, -1])
def test_refuses_tokens_that_the_model_does_not_know(model, token):
    with pytest.raises(DataError, match=rf"1 has the token {token}, but the model knows 160"):
        generator(model).answer([3, token])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("asked", [{}, {"temperature": 1.0}, {"repetition_penalty": 1.2}])
def test_a_broken_model_says_nothing(model, monkeypatch, value, asked):
    monkeypatch.setattr(model.norm.scale, "data", torch.full_like(model.norm.scale, value))
    with pytest.raises(CheckpointError, match="scores are not finite"):
        generator(model, **asked).answer([3, 4])


def test_inference_mode_may_come_and_go(model):
    asked, first = generator(model, max_new_tokens=4), prompts_of(20)[0]
    with torch.inference_mode():
        inside = asked.answer(first)
    assert asked.answer(first).tokens == inside.tokens


def test_autocast_changes_nothing(model):
    prompts = prompts_of(20, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(model, prompts, 4)
    assert found == ours(model, prompts, 4)
