"""An evaluation: its samples, scores, numbers with their intervals, and what a reader gets."""

import json
import math
import re
import sys
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from rouge_score.rouge_scorer import RougeScorer

from phi3_plugin import evaluate
from phi3_plugin import settings as strict
from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.data.collate import concatenate
from phi3_plugin.errors import DataError, MissingFileError, OutputError
from phi3_plugin.evaluate import (
    ADAPTER,
    BASE,
    BETTER,
    ROUGE,
    UNCLEAR,
    WORSE,
    EvalSample,
    Evaluation,
    Interval,
    Outcome,
    Scorer,
    by_document,
    last_number,
    marked_number,
    measures,
    resampled,
    results,
    terminal_report,
    token_scores,
    verdict,
    with_interval,
)
from phi3_plugin.generate import Answer
from phi3_plugin.models import logps
from phi3_plugin.pages.evaluation import LONGEST_TEXT, page_of_evaluation
from phi3_plugin.train.data import instantiate
from phi3_plugin.train.losses import SFT
from phi3_plugin.train.step import validate, with_targets
from phi3_plugin.train.world import World
from tests.inspected import Page, check_fetches_nothing
from tests.own import TINY, chat, merged
from tests.tiny import CONFIG, tiny_model

# An evaluation without any model, of texts that are written here.

HOSTILE = '<script>alert("x")</script> & {{ 7 * 7 }} \u202e\x1b[31m</div>'

ROWS = (
    # prompt, reference, base, adapter
    ("2 + 2?", "Two and two.\n#### 4", "It is 5", "It is 4.\n#### 4"),
    ("3 * 4?", "Three fours.\n#### 12", "12", "Three fours.\n#### 12"),
    ("1000 + 234?", "A sum.\n#### 1,234", "$1234.00", "About 1,200"),
    ("Say hi", "hi there", "hello there, friend", HOSTILE),
    ("中文?", "是的", "", "是的"),
)


def sample(where, labelled, prompt="", reference="", unasked=""):
    """Return a sample with so many labelled tokens."""
    tokens = [1] * (labelled + 1)
    return EvalSample(where, tokens, tokens, (1,), prompt, reference, unasked)


def made(*, adapter: bool = True, rows=ROWS, times: int = 1) -> Evaluation:
    """Return an evaluation of the rows, each so many times."""
    scorer, samples = Scorer(), []
    outcomes = {name: [] for name in (BASE, ADAPTER)[: 1 + adapter]}
    for i in range(len(rows) * times):
        prompt, reference, *answers = rows[i % len(rows)]
        samples.append(sample(f"rows.jsonl:{i + 1}", i + 1, prompt, reference))
        for number, (name, text) in enumerate(zip(outcomes, answers, strict=False)):
            answer = Answer(i, text, (1, 2, 3), "stop" if text else "length", 5)
            loss = (i + 1) * (2.0 - number + 0.01 * i)
            hits = (i + 1) * (0.3 + 0.4 * number)
            scores = scorer.score(text, reference)
            outcomes[name].append(Outcome(loss, hits, i + 1, answer, scores))
    return Evaluation(samples, outcomes, {"evaluated": f"{len(samples)} samples of <b>rows</b>."})


# What is measured on.


@pytest.fixture
def tokenizer(cwd):
    return phi3_tokenizer(cwd / "base")


@pytest.fixture
def held(cwd):
    """Return what is evaluated with such settings, and rows if they are given."""

    def get(*settings, rows=None, limit=None, positions=1000):
        if rows is not None:
            (cwd / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            settings = ("dataset.source=own.jsonl", *settings)
        s = strict.read(merged(*TINY, "output_dir=eval", *settings, cwd=cwd))
        return evaluate.evaluation_data(s, instantiate(s.tokenizer), limit, positions)

    return get


def message(role, content, **rest):
    return {"role": role, "content": content, **rest}


def conversation(*messages):
    return {"messages": list(messages)}


def test_all_of_a_data_set(held, cwd):
    found = held()
    assert found.source == f"40 samples of {cwd / 'rows.jsonl'}, the whole data set."
    dataset = chat_dataset(phi3_tokenizer(cwd / "base", 96), str(cwd / "rows.jsonl"))
    assert [{"tokens": item.tokens, "labels": item.labels} for item in found.samples] == [
        dataset[i] for i in range(40)
    ]
    for number, item in enumerate(found.samples):
        assert item.reference == chat(number)["messages"][1]["content"]
        assert item.labelled == dataset.labelled[number]
        assert item.tokens[: len(item.prompt_ids)] == item.prompt_ids


def test_the_same_is_held_out_as_in_training(held, cwd):
    for packed in ("dataset.packed=True", "dataset.packed=False"):
        s = strict.read(merged(*TINY, "output_dir=x", "val_fraction=0.2", "seed=3", cwd=cwd))
        dataset = chat_dataset(phi3_tokenizer(cwd / "base", 96), str(cwd / "rows.jsonl"))
        part = dataset.hold_out(s.val_fraction, s.seed)[1]
        found = held("val_fraction=0.2", "seed=3", packed)
        places = [item.where for item in found.samples]
        assert places == [part.places(i) for i in range(len(part))] and len(places) < 40


def test_the_first_samples(held):
    found = held(limit=3)
    assert len(found.samples) == 3 and found.source.startswith("The first 3 of 40 samples of ")
    assert len(held(limit=300).samples) == 40


def test_a_weight_repeats_nothing(held, cwd):
    source = "{source: " + str(cwd / "rows.jsonl") + ", weight: 2.5}"
    s = strict.read(merged(*TINY, "output_dir=x", cwd=cwd))
    s.dataset["source"] = [{"source": str(cwd / "rows.jsonl"), "weight": 2.5}]
    found = evaluate.evaluation_data(s, instantiate(s.tokenizer), None, 1000)
    assert len(found.samples) == 40, source
    assert all(item.prompt_ids for item in found.samples)


def test_the_last_answer_is_asked_for(held, tokenizer):
    messages = [
        message("system", "one"),
        message("user", "two"),
        message("assistant", "three"),
        message("user", "four"),
        message("assistant", "five"),
        message("user", "six"),
    ]
    (item,) = held(rows=[conversation(*messages)]).samples
    assert item.reference == "five"
    assert item.prompt == (
        "<|system|>\none<|end|>\n<|user|>\ntwo<|end|>\n<|assistant|>\nthree<|end|>\n"
        "<|user|>\nfour<|end|>\n<|assistant|>\n"
    )
    assert tokenizer.decode(item.prompt_ids, False).count("three") == 1


def test_a_prompt_is_whole_where_training_cuts_it(held):
    long = conversation(message("user", "two " * 100), message("assistant", "three " * 90))
    row = conversation(message("user", "one"), message("assistant", "three " * 200))
    found = held("dataset.bad_rows=drop", rows=[long, row, chat(1)])
    cut, short = found.samples
    assert len(cut.tokens) == 96 and cut.reference.count("three") == 200
    assert short.reference == "four five six seven"


def test_what_is_too_long_is_told(held, cwd):
    asked, filler = message("user", "one"), "two three " * 60
    rows = [
        conversation(asked, message("assistant", "two")),
        conversation(asked, message("assistant", filler)),
        conversation(message("user", filler), message("assistant", "two")),
    ]
    found = held(rows=rows)
    assert len(found.samples) == 2 and found.samples[1].reference == filler
    assert found.source == (
        f"2 samples of {cwd / 'own.jsonl'}, the whole data set. "
        "Cut at tokenizer.max_seq_len for the loss: 1. "
        "Left out, with no answer within tokenizer.max_seq_len: 1 more."
    )


def test_several_sources_are_named(held, cwd):
    file = cwd / "rows.jsonl"
    section = ("_component_=phi3_plugin.data.chat_dataset", f"source=[{file},{file}]")
    found = held(*(f"dataset_val.{part}" for part in section))
    assert f" of {file}, {file}, set as dataset_val" in found.source


def test_a_system_prompt_of_the_run(held):
    found = held("dataset.system_prompt=seven", limit=1)
    assert found.samples[0].prompt.startswith("<|system|>\nseven<|end|>\n<|user|>")


def test_what_cannot_be_asked_is_told_and_still_has_a_loss(held):
    rows = [
        conversation(message("assistant", "one two")),
        conversation(message("user", "two " * 30), message("assistant", "three")),
        chat(1),
    ]
    first, long, good = held(rows=rows, positions=25).samples
    assert first.unasked == evaluate.NO_ANSWER and not first.prompt_ids
    assert "tokens, but the model has 25 positions" in long.unasked
    assert good.unasked == "" and good.prompt_ids
    assert all(item.labelled for item in (first, long, good))


def test_no_answers_are_wanted(held):
    found = held(limit=2, positions=None)
    assert all(not item.prompt_ids and item.unasked == "" for item in found.samples)


@pytest.mark.parametrize(
    ("labels", "prompt", "said"),
    [
        ([-100, -100, 7, 8], [5, 6], [7, 8]),
        ([-100, 6, -100, 8], [5, 6, 7], [8]),
    ],
)
def test_without_messages_labels_tell(tokenizer, labels, prompt, said):
    found = evaluate.last_labelled([5, 6, 7, 8], labels, tokenizer)
    assert found == (prompt, tokenizer.decode(prompt, False), tokenizer.decode(said))


@pytest.mark.parametrize("labels", [[-100] * 4, [-100, 6, 7, 8], [5, 6, 7, 8]])
def test_labels_that_leave_no_prompt(tokenizer, labels):
    with pytest.raises(DataError, match="no answer"):
        evaluate.last_labelled([5, 6, 7, 8], labels, tokenizer)


def test_a_data_set_of_the_users_own(held, tmp_path, monkeypatch):
    (tmp_path / "rows_of_my_own.py").write_text(
        "def rows(tokenizer, source=None):\n"
        "    return [{'tokens': [5, 6, 7, 8], 'labels': [-100, -100, 7, 8]}] * 10\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = held("dataset._component_=rows_of_my_own.rows", "val_fraction=0.2")
    assert len(found.samples) == 2 and found.samples[0].prompt_ids == [5, 6]
    assert found.samples[0].where == "sample 0"


# The loss of tokens.

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
    monkeypatch.setattr(logps, "LOGITS", pieces * 64 * CONFIG.vocab_size)
    batch = with_targets(concatenate(samples()))
    losses, hits = (by_document(values, batch) for values in token_scores(model, batch))
    expected = [brute_force(model, sample) for sample in samples()]
    assert losses == pytest.approx([loss for loss, _ in expected], rel=1e-5, abs=1e-6)
    assert hits == [count for _, count in expected]
    assert losses[1] == losses[3] == 0 and losses[2] > 0


def test_the_mean_is_that_of_validation(model):
    batch = concatenate(samples())
    losses, _ = token_scores(model, with_targets(batch))
    loss, count = validate(World("cpu"), model, SFT(), [batch])
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


# Scores of answers.

PAIRS = [
    ("The cats were running.", "A cat runs."),
    ("One line.\nAnother line here.\n\nThird.", "Another line.\nOne line here.\nThird thing."),
    ("line one\r\nline two", "line one\nline two"),
    ("exactly the same text of seven words", "exactly the same text of seven words"),
    ("", "no answer at all"),
    ("中文答案", "中文的答案"),
    ("something", ""),
    ("I said: 12,000 dollars ended.", "Work.\n#### 12000"),
]


@pytest.fixture(scope="module")
def scorer():
    return Scorer()


@pytest.fixture(scope="module")
def scores(scorer):
    return [scorer.score(*pair) for pair in PAIRS]


def test_rouge_is_the_mean_of_the_scorer(scores):
    theirs = RougeScorer(list(ROUGE), use_stemmer=True)
    for name in ROUGE:
        each = [theirs.score(reference, answer)[name].fmeasure for answer, reference in PAIRS]
        assert [one.values[name] for one in scores] == pytest.approx([100 * f for f in each])
    assert scores[1].values["rougeLsum"] != scores[1].values["rougeL"]


def test_bleu_and_chrf_are_those_of_the_corpus(scorer, scores):
    answers, references = map(list, zip(*PAIRS, strict=True))
    ours = scorer.bleu(np.sum([one.bleu for one in scores], axis=0, keepdims=True))
    assert ours == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score)
    ours = scorer.chrf(np.sum([one.chrf for one in scores], axis=0, keepdims=True))
    assert ours == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
    for one, (answer, reference) in zip(scores, PAIRS, strict=True):
        assert one.values["chrf"] == pytest.approx(
            sacrebleu.sentence_chrf(answer, [reference]).score
        )


def test_nothing_has_no_corpus_score(scorer, scores):
    for of, sums in ((scorer.bleu, scores[0].bleu), (scorer.chrf, scores[0].chrf)):
        values = of(np.array([[0.0] * len(sums), sums]))
        assert np.isnan(values[0]) and not np.isnan(values[1])


def test_exact_and_numeric(scores):
    assert [one.values["exact"] for one in scores] == [0, 0, 100, 100, 0, 0, 0, 0]
    assert [one.values.get("numeric") for one in scores] == [None] * 7 + [100]


def test_thoughts_are_not_compared(scorer):
    plain = scorer.score("It is 4", "#### 4")
    for said in ("<think>5?</think>\nIt is 4", "5?\n</think>\n\nIt is 4"):
        assert scorer.score(said, "<think>1 + 1</think>\n#### 4") == plain
    assert scorer.score("<think>It is 4", "#### 4") == scorer.score("", "#### 4")


def test_rouge_cannot_read_every_script(scores):
    assert [one.readable for one in scores] == [True] * 5 + [False, False, True]
    assert scores[5].values["rouge1"] == 0 and scores[5].values["chrf"] > 0


def test_how_scores_can_be_had_again(scorer):
    signatures = scorer.signatures()
    assert "tok:13a" in signatures["bleu"] and "nc:6" in signatures["chrf"]
    assert all(f"version:{sacrebleu.__version__}" in text for text in signatures.values())


@pytest.mark.parametrize("package", ["rouge_score", "sacrebleu"])
def test_without_the_packages(monkeypatch, package):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingFileError, match=r"pip install 'phi3-plugin\[eval\]'") as error:
        Scorer()
    assert "\n" not in str(error.value) and package.replace("_", "-") in str(error.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3.\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("####1234.50\n", "1234.5"),
        ("#### $5", "5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### 10 apples", "10"),
        ("#### 1\nno:\r\n#### 2\r\n", "2"),
        ("#### .5", "0.5"),
        ("#### 18.", "18"),
        ("#### about\n", None),
        ("#### 1 #### 2", "2"),
        ("#### 1 ####\n", "1"),
        ("#### \N{MINUS SIGN}3", "-3"),
        ("72", None),
        ("", None),
    ],
)
def test_marked(text, number):
    assert marked_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 4 and then 5", "4"),
        ("It is 4, not 5.", "5"),
        ("The answer is $1,234.00.", "1234"),
        ("2 + 3 = 5%", "5"),
        ("from 3-5", "5"),
        ("it is -5", "-5"),
        ("x=-7", "-7"),
        ("x = \N{MINUS SIGN}7", "-7"),
        ("#### 5 #### none", "5"),
        ("in 1,23", "23"),
        ("1,2345", "2345"),
        ("nothing", None),
        ("#### none", None),
    ],
)
def test_last(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_a_very_long_text_takes_no_time():
    assert last_number("1," * 200_000 + "7" * 4000) is not None


# Numbers and their intervals.


def test_sums_are_those_of_samples_drawn_again():
    columns = np.stack([np.ones(7), np.arange(7.0), np.arange(7.0) ** 2], axis=1)
    sums = resampled(columns, resamples=50, seed=3)
    assert sums.shape == (50, 3)
    assert (sums[:, 0] == 7).all()  # as many as there are
    assert len(np.unique(sums[:, 1])) > 10
    pairs = np.concatenate([columns, 2 * columns], axis=1)
    drawn = resampled(pairs, resamples=50, seed=3)
    assert np.array_equal(drawn, np.concatenate([sums, 2 * sums], axis=1))  # the same draws


def test_a_seed_decides_them_whatever_the_blocks(monkeypatch):
    columns = np.random.default_rng(0).normal(size=(40, 2))
    sums = resampled(columns, resamples=101, seed=1)
    assert np.array_equal(sums, resampled(columns, resamples=101, seed=1))
    assert not np.array_equal(sums, resampled(columns, resamples=101, seed=2))
    monkeypatch.setattr(evaluate, "DRAWN", 400)
    assert np.allclose(sums, resampled(columns, resamples=101, seed=1), rtol=1e-13)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """The mean of 60 skewed numbers: theory has the interval hold it in a little under 95 %."""
    random = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        values = random.exponential(size=60)
        draws = resampled(values[:, None], resamples=1000, seed=trial)[:, 0] / 60
        found = with_interval(values.mean(), draws)
        held += found.low <= 1.0 <= found.high
    assert 0.89 <= held / 200 <= 0.97


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(size=400)
    found = with_interval(values.mean(), resampled(values[:, None], resamples=4000)[:, 0] / 400)
    half = 1.96 * values.std() / 20
    ends = (values.mean() - half, values.mean() + half)
    assert (found.low, found.high) == pytest.approx(ends, abs=0.006)


def test_what_cannot_be_computed_does_not_count():
    assert with_interval(1.0, np.array([np.nan, 2.0, np.inf, 2.0])) == (1.0, 2.0, 2.0)
    assert np.isnan(with_interval(1.0, np.array([np.nan]))[1:]).all()


@pytest.fixture(scope="module")
def wanted():
    return measures(Scorer())


def found(evaluation, wanted, **choices):
    return {result.measure.key: result for result in results(evaluation, wanted, **choices)}


def test_every_number(wanted):
    evaluation = made()
    got = found(evaluation, wanted)
    tokens = [1, 2, 3, 4, 5]
    for number, name in enumerate((BASE, ADAPTER)):
        values = {key: result.models[name].value for key, result in got.items()}
        answers, references = [row[2 + number] for row in ROWS], [row[1] for row in ROWS]
        loss = sum(one.loss for one in evaluation.outcomes[name]) / sum(tokens)
        assert values["loss"] == pytest.approx(loss)
        assert values["perplexity"] == pytest.approx(math.exp(loss))
        assert values["accuracy"] == pytest.approx(30 + 40 * number)
        assert values["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score)
        assert values["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
        for key in ("rouge1", "rouge2", "rougeL", "rougeLsum", "exact"):
            each = [one.scores.values[key] for one in evaluation.outcomes[name]]
            assert values[key] == pytest.approx(np.mean(each)), key
    assert got["exact"].models[BASE].value == 0 and got["exact"].models[ADAPTER].value == 40
    assert got["numeric"].models[BASE].value == pytest.approx(200 / 3)
    assert got["numeric"].samples == 3 and got["exact"].samples == 5
    for result in got.values():
        base, adapter = result.models.values()
        assert result.difference.value == pytest.approx(adapter.value - base.value)


def test_numbers_that_no_reference_has_are_left_out(wanted):
    got = found(made(rows=ROWS[3:]), wanted)
    assert "numeric" not in got and "exact" in got


def test_shares_of_samples(wanted):
    got = found(made(), wanted)
    assert got["loss"].shares == (1.0, 0.0, 0.0)  # lower is better
    assert got["exact"].shares == pytest.approx((0.4, 0, 0.6))
    assert got["numeric"].shares == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert got["bleu"].shares is None is got["perplexity"].shares


def test_verdicts(wanted):
    got = found(made(times=8), wanted)
    assert got["loss"].verdict == got["exact"].verdict == BETTER
    assert got["numeric"].verdict == UNCLEAR
    turned = made(times=8)
    base, adapter = turned.outcomes.values()
    turned = replace(turned, outcomes={BASE: adapter, ADAPTER: base})
    got = found(turned, wanted)
    assert got["loss"].verdict == got["exact"].verdict == WORSE
    same = made(times=8)
    same = replace(same, outcomes=dict.fromkeys((BASE, ADAPTER), same.outcomes[BASE]))
    for result in found(same, wanted).values():
        assert result.difference == (0, 0, 0) and result.verdict == UNCLEAR
        assert result.shares in (None, (0, 0, 1))


@pytest.mark.parametrize(("count", "kind"), [(1, UNCLEAR), (5, UNCLEAR), (6, BETTER)])
def test_too_few_samples_tell_nothing(wanted, count, kind):
    got = found(made(rows=ROWS[:1] * count), wanted)
    assert got["loss"].verdict == got["numeric"].verdict == kind
    assert math.isnan(got["loss"].difference.low) == (count == 1)


def test_pairs_make_the_interval_of_a_difference_narrow(wanted):
    """Samples differ much, the models by the same on each."""
    got = found(made(times=20), wanted)["loss"]
    base = got.models[BASE]
    assert base.high - base.low > 0.05 > got.difference.high - got.difference.low


def test_the_seed_decides_the_intervals(wanted):
    one, same, other = (found(made(times=3), wanted, seed=seed) for seed in (1, 1, 2))
    estimates = [
        {k: [*r.models.values(), r.difference] for k, r in g.items()} for g in (one, same, other)
    ]
    assert repr(estimates[0]) == repr(estimates[1]) != repr(estimates[2])


def test_one_model_has_no_difference(wanted):
    for result in found(made(adapter=False), wanted).values():
        assert list(result.models) == [BASE]
        assert result.difference is None is result.shares and result.verdict == ""


def test_without_answers_only_tokens_are_measured():
    evaluation = Evaluation([sample("a:1", 2, "", "")], {BASE: [Outcome(1.0, 1, 2)]}, {})
    for wanted in (measures(None), measures(Scorer())):
        got = found(evaluation, wanted)
        assert list(got) == ["loss", "perplexity", "accuracy"]
        assert got["loss"].models[BASE].value == 0.5


def test_a_sample_without_labels_or_answer_takes_no_part(wanted):
    evaluation = made(times=2)
    samples = [*evaluation.samples, sample("x:1", 0, "", "", "no prompt")]
    outcomes = {name: [*seen, Outcome(0.0, 0, 0)] for name, seen in evaluation.outcomes.items()}
    more = found(Evaluation(samples, outcomes, {}), wanted)
    for key, result in found(evaluation, wanted).items():
        assert more[key].samples == result.samples
        values = [[e.value for e in one.models.values()] for one in (more[key], result)]
        assert values[0] == pytest.approx(values[1]), key


def test_a_loss_that_is_infinite_is_told(wanted):
    outcomes = {BASE: [Outcome(1e6, 0, 1)] * 3}
    got = found(Evaluation([sample("x:1", 1, "", "")] * 3, outcomes, {}), wanted)
    assert got["perplexity"].models[BASE].value == math.inf
    json.dumps(got["accuracy"].models[BASE])  # measured, though never right
    assert got["accuracy"].models[BASE].value == 0


# What a reader gets.


def test_what_limits_the_numbers():
    evaluation = made()
    samples = [*evaluation.samples, sample("a:9", 0, "", "", "no prompt")]
    samples += [sample("b:1", 1, "", "", "too long"), sample("b:2", 1, "", "", "too long")]
    assert replace(evaluation, samples=samples).notes == [
        "Only 8 samples: the intervals are rough, and narrower than they should be.",
        "a:9 was not answered: no prompt.",
        "2 samples, the first b:1, were not answered: too long.",
        "1 of 8 samples has no labelled token, and so no loss.",
        "ROUGE finds no word in 1 of 5 references, for it knows Latin letters and digits alone. "
        "Look at chrF.",
    ]


def test_answers_that_end_within_a_thought_are_told():
    rows = [(*row[:3], "<think>Hm") for row in ROWS[:2]]
    (told,) = [note for note in made(rows=rows, times=20).notes if "thought" in note]
    assert told.startswith("40 answers of the adapter ended within the thought, and count as empty")


def test_nothing_to_say():
    evaluation = made(rows=ROWS[:4], times=8)
    assert evaluation.notes == []
    alone = replace(evaluation, samples=evaluation.samples[:1])
    assert alone.notes[0].startswith("Only 1 sample, ")


def test_the_worst_of_the_last_model_come_first():
    assert made().worst(10) == [3, 2]  # what is right is not among them
    assert made().worst(1) == [3]
    assert made(adapter=False).worst(10)[0] == 4  # it said nothing
    assert made().worst(0) == []


def test_what_the_adapter_gained_and_lost():
    gained, lost = made().changed(10)
    assert set(gained) == {0, 1, 4} and gained[-1] == 1  # whose number was right before
    assert lost == [2, 3]  # a right number that is lost comes before another text
    assert made().changed(1) == (gained[:1], [2])
    assert made(adapter=False).changed(10) == ([], [])


def test_equal_answers_are_neither():
    rows = [(prompt, reference, base, base) for prompt, reference, base, _ in ROWS]
    assert made(rows=rows).changed(10) == ([], [])


def printed(evaluation):
    return terminal_report(
        evaluation, results(evaluation, measures(Scorer())), "eval/evaluation.html"
    )


def test_both_models():
    text = printed(made(times=8))
    lines = text.splitlines()
    assert lines[0] == "Evaluation: 40 samples, 40 answers from each model"
    assert "Loss               2.2600   1.2600     -1.0000" in text
    assert lines[4].endswith("  better") and lines[-1] == "All of it: eval/evaluation.html"
    assert "better than the base in 10 measures; no clear difference in Right number." in text
    assert (
        "Answers of the base: 32 ended by themselves, 8 cut at generation.max_new_tokens." in text
    )
    assert all(len(line) <= 100 for line in lines if "better" in line[60:])
    assert "\x1b" not in text


def test_a_terminal_of_one_model():
    lines = printed(made(adapter=False)).splitlines()
    assert lines[0] == "Evaluation: 5 samples, 5 answers"
    assert "difference" not in lines[3] and "The adapter" not in "".join(lines)


@pytest.mark.parametrize(
    ("kinds", "text", "sign"),
    [
        (("better", "better"), "The adapter is better than the base in every measure.", "better"),
        (
            ("worse", "no clear difference"),
            "The adapter is worse than the base in A; no clear difference in B.",
            "worse",
        ),
        (("better", "worse"), "Mixed: better in A; worse in B.", "no clear difference"),
        (("no clear difference",) * 2, "No clear difference: ", "no clear difference"),
        (("", ""), "", ""),
    ],
)
def test_the_verdict(kinds, text, sign):
    class Result:
        def __init__(self, verdict, title):
            self.verdict, self.samples = verdict, 9
            self.measure = type("Measure", (), {"title": title})

    got = verdict([Result(kind, title) for kind, title in zip(kinds, ("A, %", "B"), strict=True)])
    assert got[0].startswith(text) and got[1] == sign


def test_numbers_of_a_row_have_one_precision(wanted):
    loss, perplexity = results(made(), wanted)[:2]
    assert loss.text(1.23456) == "1.2346" and loss.text(0.5, signed=True) == "+0.5000"
    assert perplexity.text(1234567.8) == "1,234,567.800"
    assert perplexity.text(float("inf")) == perplexity.text(float("nan")) == "–"
    large = {name: Interval(4e4, 3e4, math.inf) for name in (BASE, ADAPTER)}
    assert replace(perplexity, models=large).text(1234567.8) == "1,234,568"
    large[ADAPTER] = Interval(1.5, 1.0, 2.0)  # which decides: nothing of it is to be lost
    assert replace(perplexity, models=large).text(4e4) == "40,000.000"


def page_text(evaluation, count=10):
    numbers = results(evaluation, measures(Scorer()))
    return page_of_evaluation(evaluation, numbers, most=count)


@pytest.mark.parametrize("where", ["prompt", "reference", "base", "adapter"])
def test_nothing_of_a_sample_is_more_than_text(where):
    texts = {"prompt": "p", "reference": "r", "base": "b", "adapter": "a", where: HOSTILE}
    text = page_text(made(rows=[tuple(texts.values())]))
    page = Page(text)
    check_fetches_nothing(page)
    assert not {"b", "img"} & set(page.tags) and "http" not in text.replace("http-equiv", "")
    spelled = '<script>alert("x")</script> & {{ 7 * 7 }} \\u202e\\x1b[31m</div>'
    assert spelled in page.words and "\u202e" not in text and "\x1b" not in text
    assert "<b>rows</b>" in page.words  # the name of a source is text too


def test_lists_of_answers():
    text = page_text(made())
    assert text.index("Gained most") < text.index("Lost most") < text.index("Worst answers")
    assert text.count("<summary>") == 1 + 3 + 2 + 2
    assert page_text(made(), count=1).count("<summary>") == 1 + 3
    assert page_text(made(), count=0).count("<summary>") == 1  # that of the ROUGE variants
    text = page_text(made(adapter=False))
    assert "Gained most" not in text and "is the adapter better?" not in text


def test_tiles_are_the_loss_and_what_ranks_the_answers():
    words = Page(page_text(made(times=8))).words
    for tile in (
        "Loss, base → adapter 2.2600 → 1.2600",
        "Right number, %, base → adapter 66.67 → 66.67",
        "Samples 40",
        "Answers of each model 40",
    ):
        assert tile in words, tile
    exact = Page(page_text(made(rows=ROWS[3:]))).words
    assert "Exact match, %, base → adapter 0.00 → 50.00" in exact
    none_right = Page(page_text(made(rows=ROWS[3:4], adapter=False))).words
    assert re.search(r" chrF \d+\.\d\d Samples 1", none_right)


def test_what_changed_most_says_by_what():
    words = Page(page_text(made())).words
    by = "right number (exact match where the reference has none), then chrF."
    assert f"The adapter's answer is better than the base's, by {by}" in words
    assert f"Of the adapter, by {by}" in words
    assert "right number no → yes · chrF " in words and "exact match no → no · chrF " in words
    of_numbers = Page(page_text(made(rows=ROWS[:3]))).words
    assert "better than the base's, by right number, then chrF." in of_numbers
    assert "by exact match, then chrF." in Page(page_text(made(rows=ROWS[3:]))).words


def test_variants_of_rouge_are_folded():
    shown, _, rest = page_text(made()).partition('<details class="more">')
    folded = rest.partition("</details>")[0]
    assert '<th scope="row">ROUGE-L</th>' in shown
    for name in ("ROUGE-1", "ROUGE-2", "ROUGE-Lsum"):
        assert f'<th scope="row">{name}</th>' in folded and name not in shown
    assert "<details class=" not in page_text(without_answers())


def test_a_page_has_a_true_minus_and_a_terminal_what_it_can_write():
    evaluation = made(times=8)
    assert "−1.0000" in page_text(evaluation) and "−" not in printed(evaluation)
    assert "-1.0000" in printed(evaluation)


def test_the_numbers_are_there():
    page = Page(page_text(made(times=8)))
    assert "Loss 2.26002.2" in page.words and "+40.00" in page.words
    assert "60 % better, 20 % worse, 20 % equal" in page.words
    assert "The adapter is better than the base in 10 measures" in page.words
    assert "32 ended by themselves, 8 cut at generation.max_new_tokens" in page.words
    widths = [float(v) for tag, key, v in page.attributes if (tag, key) == ("rect", "width")]
    assert sum(widths) == pytest.approx(len(widths) / 3)
    assert "100 % better, 0 %" not in page.words


def test_long_texts_are_cut():
    text = page_text(made(rows=[("p" * (LONGEST_TEXT + 1234), "r", "b", "a")]))
    assert "p" * LONGEST_TEXT + "… 1,234 more characters in samples.jsonl" in text


def without_answers():
    return Evaluation([sample("a:1", 2, "", "")], {BASE: [Outcome(1.0, 1, 2)]}, {"base": None})


def test_without_answers():
    text = page_text(without_answers())
    assert "0.5000" in text and "Worst answers" not in text
    assert '<th scope="row">base</th> <td>null</td>' in text


def test_samples_are_a_line_each():
    evaluation = made()
    text = evaluate.samples_text(evaluation)
    scores = evaluation.outcomes[BASE][0].scores.values
    lines = [json.loads(line) for line in text.splitlines()]  # also where a text has U+2028
    assert len(lines) == 5 and text.endswith("\n")
    assert lines[0]["where"] == "rows.jsonl:1" and lines[0]["reference"].endswith("#### 4")
    assert lines[0]["base"] == {
        "loss": pytest.approx(2.0),
        "correct_tokens": 0,
        "answer": "It is 5",
        "ended": "stop",
        "answer_tokens": 3,
        "scores": {k: pytest.approx(v, abs=1e-4) for k, v in scores.items()},
    }
    assert lines[3]["adapter"]["answer"] == HOSTILE
    assert lines[4]["base"]["ended"] == "length" and "中文" in text


def test_line_ends_of_unicode_stay_in_their_line():
    one = sample("a:1", 1, "x\u2028y\x85z\u2029", "", "none")
    text = evaluate.samples_text(Evaluation([one], {BASE: [Outcome(1.0, 0, 1)]}, {}))
    assert len(text.splitlines()) == 1
    assert json.loads(text)["prompt"] == one.prompt
    assert json.loads(text)["not_answered"] == "none"


def test_results_hold_every_number():
    evaluation = made()
    found = results(evaluation, measures(Scorer()), seed=7)
    content = json.loads(evaluate.results_text(evaluation, found, 7))
    loss = content["measures"]["loss"]
    assert loss["base"]["value"] == found[0].models[BASE].value and loss["better"] == "lower"
    assert loss["difference"]["low"] <= loss["difference"]["value"] <= loss["difference"]["high"]
    assert loss["share_of_samples"] == {"better": 1.0, "worse": 0.0, "equal": 0.0}
    assert content["bootstrap"] == {"resamples": 2000, "percent": 95.0, "seed": 7}
    assert content["ended"]["base"] == {"stop": 4, "length": 1}
    assert content["labelled_tokens"] == 15 and content["answered"] == 5


def test_json_has_no_infinity():
    evaluation = Evaluation(
        [sample("a:1", 1, "", "")], {BASE: [Outcome(1e9, 0, 1)]}, {"x": [1e400]}
    )
    text = evaluate.results_text(evaluation, results(evaluation, measures(None)), 0)
    content = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert content["measures"]["perplexity"]["base"]["value"] is None and content["x"] == [None]


def test_an_earlier_evaluation_is_not_lost(tmp_path):
    evaluate.refuse_earlier(tmp_path)
    (tmp_path / "report.html").write_text("of a training run")
    evaluate.refuse_earlier(tmp_path)
    (tmp_path / evaluate.RESULTS).write_text("{}")
    with pytest.raises(OutputError, match=r"already holds .*results\.json.*overwrite=True"):
        evaluate.refuse_earlier(tmp_path)
