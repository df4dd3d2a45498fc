"""Our model for EleutherAI's harness against its own class for transformers, and its mistakes."""

import pytest
import torch

from phi3_plugin.checkpoint.check import load_with_peft
from phi3_plugin.errors import ConfigError, DataError
from tests.chosen import some
from tests.recipes.harnessed import harness_inputs

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'phi3-plugin[lm_eval]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from phi3_plugin.recipes.phi3_lm_eval_model import Phi3LM

CHAT = "<|user|>\nAdd: one plus two<|end|>\n<|assistant|>\n"
PAIRS = [
    ("Add: one plus two", " three"),
    ("Add: one plus two", " four"),
    ("Add: one plus two", " four five"),  # shares no document with the two before
    ("Add: one plus two four", " five"),  # but with this one
    ("", " seven"),
    (CHAT, "two three"),
    ("trailing   ", "spaces"),
    ("one two " * 300, " three four"),  # too long: cut at the start
    ("<s> one", " two"),
    ("Add:", " é 日本"),
]
TEXTS = [("one two three four five",), ("a b c d " * 200,), ("",), ("héllo 日本",)]
ANSWERS = [
    (CHAT, {"until": [], "max_gen_toks": 20}),
    ("one two", {"until": ["a", "\n"], "max_gen_toks": 30}),
    ("seven", {"until": "<|end|>", "max_gen_toks": 30, "do_sample": False}),
    ("six", {"max_new_tokens": 9}),
    ("one two " * 300, {"until": ["q"], "max_gen_toks": 20, "temperature": 0.0}),
    (CHAT, {"until": [], "max_gen_toks": 20}),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return harness_inputs(tmp_path_factory.mktemp("harness"))


def asked(kind, all_args):
    return [Instance(kind, {}, args, number) for number, args in enumerate(all_args)]


def pair(place, base, adapted):
    """Return our model and transformers'.

    The harness's own way to load an adapter cuts the rows of the head that no token has, and its
    cache of logits scores a short continuation by the place of a longer one's first token.
    """
    more = {"adapter": str(place / "adapter")} if adapted else {}
    ours = Phi3LM(str(place / base), dtype="fp32", device="cpu", **more)
    model = str(place / base)
    if adapted:
        model = load_with_peft(place / base, place / "adapter")
    # With LongRoPE transformers turns a whole batch by the factors for its longest document.
    size = 1 if base == "long" else 3
    exact = {"dtype": "float32", "device": "cpu", "batch_size": size, "logits_cache": False}
    return ours, HFLM(pretrained=model, tokenizer=str(place / base), **exact)


@pytest.mark.parametrize(
    ("base", "adapted"), [("base", False), ("base", True), ("launch", False), ("long", False)]
)
def test_numbers_and_answers_are_those_of_transformers(place, base, adapted):
    ours, theirs = pair(place, base, adapted)
    assert (ours.max_length, ours.max_gen_toks) == (theirs.max_length, theirs.max_gen_toks)
    for name in ("prefix_token_id", "eot_token_id", "tokenizer_name"):
        assert getattr(ours, name) == getattr(theirs, name)
    found, expected = (
        lm.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True) for lm in (ours, theirs)
    )
    assert [hit for _, hit in found] == [hit for _, hit in expected]
    assert [n for n, _ in found] == pytest.approx([n for n, _ in expected], abs=1e-4)
    found, expected = (
        lm.loglikelihood_rolling(asked("loglikelihood_rolling", TEXTS), disable_tqdm=True)
        for lm in (ours, theirs)
    )
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)
    found, expected = (
        lm.generate_until(asked("generate_until", ANSWERS), disable_tqdm=True)
        for lm in (ours, theirs)
    )
    assert found == expected


@pytest.mark.parametrize("batch_size", some([1, 2, "auto:4"], [2]))
def test_batches_change_nothing(place, batch_size):
    one, other = (
        Phi3LM(str(place / "base"), dtype="fp32", device="cpu", batch_size=size)
        for size in ("auto", batch_size)
    )
    scores = [lm.loglikelihood(asked("", PAIRS), disable_tqdm=True) for lm in (one, other)]
    assert [n for n, _ in scores[0]] == pytest.approx([n for n, _ in scores[1]], abs=1e-4)
    answers = [lm.generate_until(asked("", ANSWERS), disable_tqdm=True) for lm in (one, other)]
    assert answers[0] == answers[1]


def test_answers_that_share_a_question_are_scored_in_one_document(place, monkeypatch):
    lm = Phi3LM(str(place / "base"), dtype="fp32", device="cpu")
    seen = []
    forward = lm.model.forward
    monkeypatch.setattr(
        lm.model, "forward", lambda *a, **k: seen.append(k["lengths"]) or forward(*a, **k)
    )
    lm.loglikelihood(asked("", PAIRS[:2]), disable_tqdm=True)
    assert len(seen) == 1 and len(seen[0]) == 1


def test_what_is_drawn_follows_the_harness_s_seed(place):
    lm = Phi3LM(str(place / "base"), dtype="fp32", device="cpu")
    ask = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    said = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        said.append(lm.generate_until(asked("", [("one", ask)] * 3), disable_tqdm=True))
    assert said[0] == said[1] != said[2]
    assert len(set(said[0])) > 1  # repeats of one question are not one answer


@pytest.mark.parametrize("ask", [True, False])
def test_chats_are_written_as_transformers_writes_them(place, ask):
    ours, theirs = pair(place, "base", False)
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " Hi \n"},
        {"role": "assistant", "content": "The answer is "},
    ]
    chat = chat[: 2 if ask else 3]
    text = ours.apply_chat_template(chat, add_generation_prompt=ask)
    assert text == theirs.apply_chat_template(chat, add_generation_prompt=ask)
    assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.chat_template(False) is None


def test_wrong_keys_are_told_at_once(place, monkeypatch):
    base = str(place / "base")
    with pytest.raises(ConfigError, match=r"pretrained is unknown. Use base") as told:
        Phi3LM(pretrained=base, peft="x", trust=1)
    assert len(str(told.value).splitlines()) == 4
    for keys, words in (
        ({"batch_size": "many"}, "batch_size: 'many'"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"max_length": 513}, "max_length: 513 must be a number from 2 to 512"),
        ({"device": "cuda:7"}, "device: 'cuda:7'"),
    ):
        with pytest.raises(ConfigError, match=words):
            Phi3LM(base, **{"device": "cpu", **keys})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="in one process"):
        Phi3LM(base)


def test_what_cannot_be_scored_is_told(place):
    lm = Phi3LM(str(place / "base"), dtype="fp32", device="cpu", max_length=8)
    with pytest.raises(DataError, match="at most 8 to score"):
        lm.loglikelihood(asked("", [("one", " two" * 20)]), disable_tqdm=True)
    with pytest.raises(ConfigError, match=r"max_gen_toks: 256 leaves no room for a prompt in 8"):
        lm.generate_until(asked("", [("one", {})]), disable_tqdm=True)
