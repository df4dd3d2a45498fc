"""What would be trained on: numbers that can be counted by hand, advice, and every token's text."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as draw

from phi3_plugin import settings as strict
from phi3_plugin.compare import as_trained, compare_with_hf, difference
from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.data import findings as f
from phi3_plugin.data.collate import pad_right
from phi3_plugin.data.dataset import messages_of_rows
from phi3_plugin.data.packing import Packs, StockPacks
from phi3_plugin.data.template import ChatTemplate
from phi3_plugin.data.turns import Reads
from phi3_plugin.errors import DataError
from phi3_plugin.inspect import (
    GROUPED,
    PACKED,
    UNGROUPED,
    Alike,
    Batching,
    Bin,
    Comparison,
    Cut,
    HeldOut,
    Speller,
    advice,
    alike,
    cuts,
    histogram,
    lengths_of,
    show,
    statistics,
    survey,
    unpacked,
)
from phi3_plugin.train.data import load_data
from tests.assets import assets_dir
from tests.inspected import FOUND, findings, numbers
from tests.own import TINY, merged, tiny_inputs
from tests.variants import MEDIUM, MINI, PHI35, edit_json

# One pass over the samples


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint without weights, beside 20 chats."""
    base = tiny_inputs(tmp_path_factory.mktemp("inputs"), rows=20) / "base"
    for file in base.glob("*.safetensors*"):
        file.unlink()
    return base


STOP = 9


class Rows(list):
    """Samples of ids and whether each is trained on; a place for each."""

    def __init__(self, *samples, places=None):
        super().__init__(samples)
        self.names = places or [f"chats.jsonl:{n}" for n in range(1, len(samples) + 1)]

    def __getitem__(self, index):
        ids, trained = super().__getitem__(index)
        labels = [i if counts else -100 for i, counts in zip(ids, trained, strict=True)]
        return {"tokens": ids, "labels": labels}

    def places(self, index):
        return self.names[index]


def test_what_is_counted():
    rows = Rows(([1, 2, 3, STOP], [0, 0, 1, 1]), ([1, 2], [0, 1]), ([4], [0]))
    found = survey(rows, [STOP])
    assert found.lengths.tolist() == found.full.tolist() == [4, 2, 1]
    assert found.labelled.tolist() == [2, 1, 0]
    assert found.first.tolist() == [2, 1, 1]
    assert found.stops.tolist() == [True, False, False]
    assert found.places == ["chats.jsonl:1", "chats.jsonl:2", "chats.jsonl:3"]


def test_a_turn_end_that_is_only_read_teaches_no_stopping():
    assert survey(Rows(([1, STOP, 2], [0, 0, 1])), [STOP]).stops.tolist() == [False]


def test_copies_and_other_answers():
    answer = [0, 0, 1]
    rows = Rows(([1, 2, 3], answer), ([1, 2, 4], answer), ([1, 2, 3], answer), ([5, 6, 7], answer))
    pairs = [("chats.jsonl:1", "chats.jsonl:3")]
    assert alike(survey(rows, [STOP])) == Alike(copies=1, pairs=pairs, answers=2)


def test_what_every_conversation_begins_with_is_no_prompt():
    every = [0, 1, 1]  # as with train_on=all
    rows = Rows(([1, 2, 3], every), ([1, 2, 4], every), ([1, 5, 6], every))
    assert alike(survey(rows, [STOP])) == Alike(0, [], 0)


def test_a_row_that_is_seen_twice_on_purpose_is_no_copy():
    rows = Rows(*[([1, 2], [0, 1])] * 3, places=["a:1", "a:1", "a:1"])
    assert alike(survey(rows, [STOP])) == Alike(0, [], 0)


def test_equal_ids_in_other_places_are_not_equal_samples():
    rows = Rows(([1, 2, 3], [0, 1, 1]), ([1, 2, 3, 0], [0, 1, 1, 1]))
    found = survey(rows, [STOP])
    assert found.content[0] != found.content[1] and found.prompt[0] == found.prompt[1]


def test_what_a_chat_data_set_offers_is_used():
    rows = Rows(([1, 2], [0, 1]))
    rows.full = np.array([7], dtype=np.int32)
    rows.arrays = lambda i: (np.array([1, 2], np.int32), np.array([-100, 2], np.int32))
    found = survey(rows, [STOP])
    assert found.full.tolist() == [7] and found.lengths.tolist() == [2]


def test_any_data_set_will_do():
    assert survey([{"tokens": [1, 2], "labels": [-100, 2]}], [STOP]).places == ["sample 0"]


def test_an_empty_data_set_is_refused():
    with pytest.raises(DataError, match="there is no sample in it"):
        survey([], [STOP])


# The numbers


def test_lengths_in_short():
    found = lengths_of(np.arange(1, 101))
    assert (found.median, found.longest) == (50.5, 100)
    assert found.p95 == pytest.approx(95.05)


def test_bars_of_one_width():
    bars = histogram(np.array([3, 16, 17, 30, 32, 90]))
    assert bars == [
        Bin(1, 8, 1),
        Bin(9, 16, 1),
        Bin(17, 24, 1),
        Bin(25, 32, 2),
        *(Bin(low, low + 7, 0) for low in range(33, 89, 8)),
        Bin(89, 96, 1),
    ]


def test_bars_of_doubling_widths_where_few_are_long():
    bars = histogram(np.array([5, 6, 7, 8, 9, 4000]))
    assert bars[:2] == [Bin(5, 8, 4), Bin(9, 16, 1)] and bars[-1] == Bin(2049, 4096, 1)


def test_samples_of_one_length():
    assert histogram(np.array([100] * 3)) == [Bin(97, 112, 3)]
    assert histogram(np.array([1])) == [Bin(1, 1, 1)]


@given(draw.lists(draw.integers(1, 200_000), min_size=1, max_size=50))
def test_every_sample_is_in_one_bar(lengths):
    bars = histogram(np.array(lengths))
    assert len(bars) <= 19
    for bar in bars:
        assert bar.samples == sum(bar.low <= length <= bar.high for length in lengths)
    assert sum(bar.samples for bar in bars) == len(lengths)


SPLIT = ["dataset.packed=True", "dataset.split_documents=True", "tokenizer.max_seq_len=32"]


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ([], "plain"),
        (["shuffle=False"], "plain"),
        (["group_by_length=True"], "grouped by length"),
        (["dataset.packed=True"], "packed"),
        ([*SPLIT, "val_fraction=0.2"], "packed"),
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_steps_and_padding_are_those_of_a_run_that_pads(base, settings, chosen, processes):
    settings = [*TINY, "output_dir=out", "epochs=3", "gradient_accumulation_steps=1", *settings]
    s = strict.read(merged(*settings, cwd=base.parent))
    feed = load_data(s, processes)
    samples = survey(unpacked(feed.order.dataset), feed.tokenizer.stop_tokens)
    found = statistics(s, feed, samples, processes, stock=feed.order)
    total, real, padded = 0, 0, feed.order.dataset
    padded = StockPacks(padded) if isinstance(padded, Packs) else padded
    for step in range(feed.order.steps_per_epoch):
        places = feed.order.indices(step)
        for start in range(0, len(places), s.batch_size):
            samples = [padded[i] for i in places[start : start + s.batch_size]]
            total += pad_right(samples)["tokens"].numel()
            real += sum(map(real_tokens, samples))
    assert found.batching.name == chosen and found.steps == feed.total_steps
    assert found.batching.padding == pytest.approx(1 - real / total)
    assert found.batching.steps == feed.order.steps_per_epoch
    assert (found.tokens, found.labelled) == counted(feed.order.dataset)
    if feed.order_val:
        assert found.held_out[1:3] == counted(feed.order_val.dataset)


@pytest.mark.parametrize("padded", [False, True])
def test_padding_is_counted_where_there_is_some(base, padded):
    """Our recipe has none, unless it is told to pad; then grouping by length spares nothing."""
    collate = "phi3_plugin.data.collate." + ("pad_right" if padded else "concatenate")
    s = strict.read(merged(*TINY, "output_dir=out", f"collate_fn={collate}", cwd=base.parent))
    feed = load_data(s, 1)
    samples = survey(feed.order.dataset, feed.tokenizer.stop_tokens)
    found = statistics(s, feed, samples)
    assert found.padded == padded and found.stock is None
    assert (found.batching.padding > 0) == padded
    names = [batching.name for batching in found.batchings]
    assert names == ["plain", *["grouped by length"] * padded, "packed"]


def test_torchtunes_recipes_make_whole_steps(base):
    s = strict.read(merged(*TINY, "output_dir=out", "epochs=3", cwd=base.parent))
    feed = load_data(s, 1)
    samples = survey(feed.order.dataset, feed.tokenizer.stop_tokens)
    found = statistics(s, feed, samples, stock=feed.order)
    each, left = divmod(len(feed.order.dataset), feed.order.per_step)
    assert found.stock == (3 * each, each, left) and not found.padded
    assert found.steps == feed.total_steps


def counted(dataset):
    rows = [dataset[i] for i in range(len(dataset))]
    labels = torch.cat([torch.as_tensor(row["labels"]) for row in rows])
    return sum(map(real_tokens, rows)), int((labels != -100).sum())


def real_tokens(sample):
    if "seq_lens" not in sample:
        return len(sample["tokens"])
    lengths = torch.as_tensor(sample["seq_lens"]).tolist()
    last = lengths.pop()  # the padding, if all its positions are 0
    end = sum(lengths)
    return end if last > 1 and not sample["input_pos"][end:].any() else end + last


# What a limit costs, against what a run with that limit loses

NONE = np.array([], dtype=np.int64)
LENGTHS = ((700, 80), (30, 900), (20, 20), (60, 500), (1100, 30))
"""Letters of question and answer; some answers begin late."""


def samples_of(*full, limit=None, first=1):
    """Survey samples of which the first tokens are only read, cut at a limit."""
    rows = Rows(
        *[([1] * n, [0] * first + [1] * (n - first)) for n in (min(n, limit or n) for n in full)]
    )
    rows.full = np.array(full)
    return survey(rows, [STOP])


def by_limit(*args, **kwargs):
    return {cut.limit: cut for cut in cuts(*args, **kwargs)}


def test_at_the_usual_lengths_and_yours():
    samples = samples_of(100, 600, 1300, limit=1000)
    found = by_limit(samples, NONE, {1000: "yours"}, limit=1000)
    assert list(found) == [512, 1000, 1024, 2048, 4096]
    assert found[512] == Cut(512, 2 / 3, pytest.approx((88 + 788) / 2000), "")
    assert found[1000] == Cut(1000, 1 / 3, pytest.approx(300 / 2000), "yours")
    assert found[2048] == Cut(2048, 0.0, 0.0, "")


def test_answers_that_begin_behind_a_limit_are_lost_whole():
    found = by_limit(samples_of(1000, first=600), NONE, {}, limit=None)
    assert found[512] == Cut(512, 1.0, 1.0, "")
    found = by_limit(samples_of(400), np.array([600]), {500: "yours"}, limit=500)
    assert found[500] == Cut(500, 0.5, pytest.approx(0.6), "yours")
    assert found[512] == Cut(512, 0.5, pytest.approx(0.088), "", least=True)
    assert found[1024] == Cut(1024, 0.0, 0.0, "")


def test_what_no_limit_could_save_is_no_loss_of_one():
    found = by_limit(samples_of(400), np.array([1]), {500: "yours"}, limit=500)
    assert found[500] == Cut(500, 0.0, 0.0, "yours") and found[1024].tokens == 0


def test_dropped_samples_are_lost_whole():
    found = by_limit(samples_of(100, 300), np.array([600]), {500: ""}, limit=500, truncate="drop")
    assert found[500] == found[512]._replace(limit=500) == Cut(500, 1 / 3, pytest.approx(0.6), "")
    assert found[1024] == Cut(1024, 0.0, 0.0, "")


@pytest.fixture
def surveyed(folder, tmp_path):
    """Survey conversations as a run with a limit has them."""
    turns = [
        [{"role": "user", "content": "q" * q}, {"role": "assistant", "content": "a" * a}]
        for q, a in LENGTHS
    ]
    chats = [*turns, [*turns[0], *turns[1]], [*turns[2], *turns[3], *turns[0]]]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))

    def run(limit, truncate):
        tokenizer = phi3_tokenizer(folder, max_seq_len=limit)
        cache = tmp_path / "cache"
        dataset = chat_dataset(tokenizer, file, truncate=truncate, cache_dir=cache)
        return survey(dataset, tokenizer.stop_tokens), dataset.lost

    return run


@pytest.mark.parametrize("truncate", ["right", "left", "drop"])
@pytest.mark.parametrize("limit", [None, 300, 512, 800, 1024])
def test_the_loss_is_that_of_a_run(surveyed, truncate, limit):
    named = {} if limit is None else {limit: "yours"}
    for cut in cuts(*surveyed(limit, truncate), named, limit=limit, truncate=truncate):
        samples, lost = surveyed(cut.limit, truncate)
        total = samples.full.sum() + lost.sum()
        true = 1 - samples.lengths.sum() / total
        assert cut.tokens == pytest.approx(true) or (cut.least and cut.tokens < true)
        over = (samples.full > cut.limit).sum() + (lost > cut.limit).sum()
        assert cut.samples == pytest.approx(over / (len(samples.full) + len(lost)))
        if truncate == "drop" or cut.limit == limit or not over:
            assert not cut.least


# What is worth acting on

CHAT = FOUND.options


def said(**changes):
    return [f"{problem.text} {problem.advice}" for problem in advice(numbers(**changes))]


def rows(kind, number=3):
    return {"findings": findings(*[(kind, f"chats.jsonl:{n}", "") for n in range(number)])}


def test_nothing_is_said_of_good_data():
    assert said() == []


@pytest.mark.parametrize("kind", [f.BROKEN, f.UNUSABLE])
def test_bad_rows_stop_a_run_unless_they_are_dropped(kind):
    (problem,) = advice(numbers(**rows(kind)))
    assert problem.stops and "dataset: 3 rows cannot be read or used" in problem.text
    assert problem.advice.endswith("dataset.bad_rows=drop.")
    (problem,) = advice(numbers(**rows(kind), options={**CHAT, "bad_rows": "drop"}))
    assert not problem.stops and "leaves them out" in problem.text


def held_out(source, seen=0):
    part = HeldOut(8, 80, 40, seen, findings((f.BROKEN, "val.jsonl:1", "")))
    return {"held_out": part, "options_val": {**CHAT, "source": source}}


def test_bad_rows_of_validation_data_are_told_of_once():
    assert said(**held_out("val.jsonl"))[0].startswith("dataset_val: 1 row cannot be read")
    assert said(**held_out("chats.jsonl")) == []


def test_validation_data_that_is_trained_on():
    (line,) = said(**held_out("chats.jsonl", seen=2))
    assert line.startswith("2 of 8 validation samples (25 %) can be found in the training data")


def test_what_stops_a_run_comes_first():
    listed = advice(numbers(**rows(f.BROKEN), labelled=10, steps=3))
    assert [problem.stops for problem in listed] == [True, False, False]


CUTS = [Cut(2048, 0.12, 0.34, "yours"), Cut(4096, 0.05, 0.01, ""), Cut(8192, 0, 0, "")]


def test_cut_samples():
    changes = {"limit": 2048, "cuts": CUTS}
    start = "12 % of the samples are cut at 2,048: 34 % of all tokens are lost. "
    assert said(**changes, positions=8192) == [
        f"{start}tokenizer.max_seq_len=8192 would lose nothing."
    ]
    assert said(**changes, positions=4096) == [
        f"{start}tokenizer.max_seq_len=4096 would lose 1.0 %."
    ]
    assert said(**changes, positions=2048)[0].startswith(f"{start}That is all the model can take")


def test_dropped_samples():
    (line,) = said(limit=2048, cuts=CUTS, truncate="drop")
    assert line.startswith(
        "12 % of the samples are longer than 2,048 and dropped: 34 % of all tokens are lost. "
    )


def test_a_loss_that_may_be_more():
    listed = [*CUTS[:1], Cut(4096, 0.05, 0.04, "", least=True)]
    assert said(limit=2048, cuts=listed)[0].endswith("=4096 would lose at least 4.0 %.")
    listed = [*CUTS[:1], Cut(4096, 0.05, 0.0001, "", least=True)]
    assert said(limit=2048, cuts=listed)[0].endswith("=4096 would lose more than 0 %.")
    shares = [Cut(512, 0.5, 0.31, "", least) for least in (False, True)]
    assert [cut.loss for cut in shares] == ["31 %", "≥ 31 %"]
    assert Cut(512, 0.5, 0.0001, "", least=True).loss == ">0 %"


def test_rows_that_lose_all_that_is_trained():
    (line,) = said(**rows(f.CUT_AWAY, 1))
    assert line.startswith(
        "1 row left out: nothing to train on is within tokenizer.max_seq_len=256"
    )


def test_longer_than_the_model():
    (line,) = said(longest=5000, limit=None)
    assert "5,000 tokens; the model was made for 4,096. Set tokenizer.max_seq_len=4096" in line


def test_few_trained_tokens():
    (line,) = said(labelled=37)
    assert line.startswith("0.9 % of the tokens are trained on") and "train_on=all" in line


def test_padding_and_what_spares_it():
    plain, packed = Batching(UNGROUPED, 0.61, 25, True), Batching(PACKED, 0.008, 5, False)
    grouped = Batching(GROUPED, 0.02, 25, False)
    assert said(batchings=[plain, grouped, packed]) == [
        "61 % of each batch is padding. "
        "group_by_length=True would bring it to 2.0 %. "
        "dataset.packed=True would bring it to 0.8 %, with 5 steps an epoch instead of 25."
    ]
    assert said(batchings=[plain, grouped._replace(padding=0.6)]) == []
    packed = packed._replace(padding=0.4, chosen=True)
    assert "another tokenizer.max_seq_len" in said(batchings=[packed])[0]


def test_copies():
    assert said(alike=Alike(1, [], 0), samples=200) == said(alike=Alike(0, [], 50)) == []
    (line,) = said(alike=Alike(20, [], 0))
    assert line.startswith("20 samples (20 %) repeat an earlier one, token for token.")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (f.NO_FINAL_ANSWER, "3 conversations without an answer"),
        (f.PASSED_OVER, "train_on=assistant decides alone"),
        (f.DROPPED_MESSAGE, "3 rows with a message that the chat template leaves out"),
        (f.SPECIAL_IN_TEXT, "tokenizer.special_in_text=text"),
    ],
)
def test_what_was_noticed(kind, text):
    (line,) = said(**rows(kind))
    assert text in line


def test_special_tokens_that_stay_text_are_no_problem():
    assert said(**rows(f.SPECIAL_IN_TEXT), special_in_text="text") == []


def test_samples_that_never_stop():
    (line,) = said(endless=10, endless_uncut=1)
    assert "In 10 samples (10 %) the token that ends a turn is not trained" in line
    assert "cut before the answer ends" in line
    assert "is the answer an assistant's turn" in said(endless=10, endless_uncut=10)[0]


def test_few_steps():
    assert said(steps=1)[0].startswith("The whole run makes 1 step of 4 samples.")


def test_another_tokenizer_disagrees():
    assert said(compared=Comparison(9, 0, [])) == []
    (line,) = said(compared=Comparison(9, 2, []))
    assert line.startswith("2 of 9 samples differ from what transformers makes of them.")


# The text of each token


def spelled(tokenizer, text, trained=None):
    ids = np.array(tokenizer.encode(text), dtype=np.int32)
    marks = np.zeros(len(ids), np.bool_) if trained is None else trained(ids)
    return Speller(tokenizer).units(ids, marks)


def texts(units):
    return [unit.text for unit in units]


def test_spaces_stay_at_their_tokens(tokenizer):
    units = spelled(tokenizer, "the other\nthe")
    assert "".join(texts(units)) == " the other\nthe"
    assert units[0].text == " the" and len(units[0].ids) == 1


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        ("a<think>b\nc</think>d", "<think>b\nc</think>"),
        ("a<think>b", "<think>b"),
        ("a</think>b", ""),
    ],
)
def test_units_of_a_thought(tokenizer, text, thought):
    units = spelled(tokenizer, text, trained=lambda ids: ids >= 0)
    assert "".join(unit.text for unit in units if unit.thought) == thought
    assert not any(unit.thought for unit in spelled(tokenizer, text))


def test_a_character_of_several_tokens_is_one_unit(tokenizer):
    (unit,) = (unit for unit in spelled(tokenizer, "a😀b") if len(unit.ids) > 1)
    assert unit.text == "😀" and len(unit.ids) == 4
    assert "".join(texts(spelled(tokenizer, "ab世界c"))) == " ab世界c"


@pytest.mark.parametrize(
    "one", ["👩\u200d👩\u200d👧\u200d👦", "👍🏽", "🇩🇪", "e\u0301", "नि", "❤\ufe0f"]
)
def test_what_a_reader_sees_as_one_character_is_one_unit(tokenizer, one):
    units = spelled(tokenizer, f"a {one}{one} b")
    assert texts(units).count(one) >= 1 and "".join(texts(units)) == f" a {one}{one} b"
    assert sum(len(unit.ids) for unit in units) == len(tokenizer.encode(f"a {one}{one} b"))


def test_a_character_is_one_unit_where_all_of_it_is_trained_on_or_none(tokenizer):
    units = spelled(tokenizer, "👍🏽", lambda ids: np.arange(len(ids)) >= len(ids) - 4)
    assert [unit.trained for unit in units][-2:] == [False, True]


def test_line_ends_stay_apart(tokenizer):
    assert "\r\n" not in texts(spelled(tokenizer, "a\r\nb"))


def test_a_character_that_was_cut_shows_its_bytes(tokenizer):
    ids = tokenizer.encode("a😀")[:-1]
    units = Speller(tokenizer).units(np.array(ids), np.zeros(len(ids), np.bool_))
    assert texts(units)[-3:] == ["<0xF0>", "<0x9F>", "<0x98>"]
    ids = [*ids[-3:-1], *tokenizer.encode("é😀b")]  # a part, and whole ones behind it
    units = Speller(tokenizer).units(np.array(ids), np.zeros(len(ids), np.bool_))
    assert "".join(texts(units)) == "<0xF0><0x9F> é😀b"


def test_added_tokens_are_told_apart(tokenizer):
    units = spelled(tokenizer, "<|user|>\nthe<|end|></s>")
    assert [(unit.text, unit.special) for unit in units] == [
        ("<|user|>", True),
        (" the", False),
        ("<|end|>", True),
        ("</s>", True),
    ]


def test_what_is_trained_is_marked(tokenizer):
    units = spelled(tokenizer, "a😀", lambda ids: np.arange(len(ids)) > 1)
    assert [unit.trained for unit in units] == [False] * (len(units) - 1) + [True]


@pytest.mark.assets
@pytest.mark.parametrize("text", ["", "  two  spaces", "你好 𝕏\t😀👍\r\nx", "ｆｕｌｌ", "\x00\x7f"])
def test_the_text_of_the_published_vocabulary(text):
    tokenizer = phi3_tokenizer(assets_dir() / "models" / "phi3-mini-4k-instruct")
    assert "".join(texts(spelled(tokenizer, text))) == (" " + text if text else "")


def test_every_kind_of_vocabulary(supported):
    tokenizer = phi3_tokenizer(supported)
    units = spelled(tokenizer, "one é世界😀  two\n")
    assert "".join(texts(units)).lstrip() == "one é世界😀  two\n"
    assert not [unit for unit in units if "\ufffd" in unit.text or "Ġ" in unit.text]


class CutRows:
    full = np.array([9, 2])

    def arrays(self, i):
        return np.array([5, 6], np.int32), np.array([-100, 6], np.int32)

    def places(self, i):
        return f"rows.jsonl:{i + 1}"


def test_a_sample(tokenizer):
    first, second = show(CutRows(), [0, 1], tokenizer)
    assert (first.where, first.tokens, first.trained, first.lost) == ("rows.jsonl:1", 2, 1, 7)
    assert (second.where, second.lost) == ("rows.jsonl:2", 0)


# Beside transformers

OURS = [1, 2, 3], [False, True, True]


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (OURS, ""),
        (([1, 9, 3], OURS[1]), "token 1 has id 2 here, 9 there"),
        ((OURS[0], [False, False, True]), "token 1 has trained True here, False there"),
        (([1, 2], OURS[1][:2]), "3 tokens here, 2 there"),
    ],
)
def test_where_two_begin_to_differ(theirs, said):
    assert difference(OURS, theirs) == said


def test_options_of_the_data_set_are_followed():
    def done(**options):
        return as_trained(OURS, limit=None, options=options, eos_id=7)

    assert done() == ([1, 2, 3], [False, True, True])
    assert done(add_eos=True) == ([1, 2, 3, 7], [False, True, True, False])
    assert done(add_eos=True, train_on="all") == ([1, 2, 3, 7], [False, True, True, True])
    first = as_trained(([1, 7], [True, True]), limit=1, options={"add_eos": True}, eos_id=7)
    assert first == ([1], [False])


def test_the_messages_that_samples_were_made_of(tokenizer, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "no answer"}]},
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join([*map(json.dumps, rows), "{broken"]))
    ((where, messages),) = messages_of_rows(tokenizer, {"source": str(file), "system_prompt": "s"})
    assert where == f"{file}:1"
    assert [(m["role"], m["content"], m["trained"]) for m in messages] == [
        ("system", "s", False),
        ("user", "a", False),
        ("assistant", "b", True),
    ]


def compared_with_hf(settings):
    feed = load_data(settings, 1)
    samples = survey(unpacked(feed.order.dataset), feed.tokenizer.stop_tokens)
    return compare_with_hf(settings, feed, samples)


TRIMS = MINI.replace("message['content']", "message['content'] | trim")


@pytest.fixture
def compared(base, tmp_path):
    """Compare conversations of roles, contents and what is asked to be trained on."""

    def run(*chats, template=MINI, **options):
        shutil.copytree(base, tmp_path / "base", dirs_exist_ok=True)
        edit_json(tmp_path / "base" / "tokenizer_config.json", chat_template=template)
        listed = [[m if isinstance(m, dict) else message(*m) for m in chat] for chat in chats]
        rows = [{"messages": chat} for chat in listed]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        given = [f"dataset.{key}={value}" for key, value in options.items()]
        given.append("tokenizer.dropped=warn")
        return compared_with_hf(strict.read(merged(*TINY, "output_dir=out", *given, cwd=tmp_path)))

    return run


def message(role, content, train=None, **fields):
    asked = {} if train is None else {"train": train}
    return {"role": role, "content": content, **asked, **fields}


SYSTEM, USER, ANSWER = ("system", "one two"), ("user", "Add: one"), ("assistant", "one two")
STARTS = [[ANSWER], [ANSWER, USER, ANSWER], [SYSTEM, ANSWER, USER, ANSWER]]


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("template", [MINI, PHI35, MEDIUM, TRIMS])
def test_conversations_that_the_assistant_begins(compared, template, train_on):
    found = compared(*STARTS, template=template, train_on=train_on)
    assert found == Comparison(3, 0, [])


@pytest.mark.parametrize("template", [MINI, PHI35, MEDIUM, TRIMS])
def test_messages_that_ask_for_it(compared, template):
    asks = (*USER, True)
    chats = [[asks, ANSWER], [SYSTEM, asks, ANSWER], [USER, ANSWER, asks, (*ANSWER, True)]]
    assert compared(*chats, template=template, train_on="marked") == Comparison(3, 0, [])


def test_system_messages_that_ask_for_it(compared):
    chats = [[(*SYSTEM, True), USER, ANSWER], [("system", " ", True), USER, (*ANSWER, True)]]
    assert compared(*chats, train_on="marked") == Comparison(2, 0, [])
    left_out = [("system", "", True), USER, (*ANSWER, True)]
    assert compared(left_out, template=PHI35, train_on="marked") == Comparison(1, 0, [])


THINKS = MINI.replace(
    "{{'<|assistant|>\n' + ",
    "{{'<|assistant|>\n'}}{% if message['thinking'] %}{{ '<think>' + message['thinking'] + "
    "'</think>' }}{% endif %}{{",
)
FORGETS = THINKS.replace("{% if message['thinking']", "{% if loop.last and message['thinking']")
OPENS = MINI.replace("{{ '<|assistant|>\n' }}", "{{ '<|assistant|>\n<think>' }}")
KNOWS = "{# <think> #}" + MINI


@pytest.mark.parametrize("template", [THINKS, FORGETS, OPENS, KNOWS])
def test_thoughts_beside_transformers(compared, template):
    thinks = message(*ANSWER, reasoning="two one")
    written = ("assistant", "<think>two one</think>one")
    chats = [[USER, thinks], [USER, thinks, USER, thinks], [USER, thinks, USER, ANSWER]]
    chats += [[USER, written], [USER, written, USER, written]]
    options = {"thoughts": "<think>{}</think>"} if template is OPENS else {}
    assert compared(*chats, template=template, **options) == Comparison(5, 0, [])


@pytest.mark.parametrize("reads", [None, Reads()])
def test_transformers_is_given_the_row_and_not_what_we_read_of_it(
    base, tmp_path, monkeypatch, reads
):
    shutil.copytree(base, tmp_path / "base")
    source = MINI.replace("message['content']", "(message.name or '') + message['content']")
    edit_json(tmp_path / "base" / "tokenizer_config.json", chat_template=source)
    chat = [message(*USER) | {"name": "one"}, message(*ANSWER)]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": chat}))
    if reads is not None:
        monkeypatch.setattr(ChatTemplate, "reads", reads)
    found = compared_with_hf(strict.read(merged(*TINY, "output_dir=out", cwd=tmp_path)))
    assert (found.samples, found.differ) == (1, 0 if reads is None else 1)


@pytest.mark.parametrize("content", ["", " ", " one  two ", "one one one"])
@pytest.mark.parametrize("template", [MINI, TRIMS])
def test_white_space_and_repeated_texts(compared, template, content):
    chat = [("user", content), ("assistant", content), ("user", content), ANSWER]
    found = compared(chat, template=template, train_on="assistant")
    assert found == Comparison(1, 0, [])


@pytest.mark.assets
@pytest.mark.parametrize(
    "model", ["phi3-mini-4k-instruct", "phi3.5-mini-instruct", "phi3-medium-4k-instruct"]
)
def test_gsm8k_is_tokenized_as_by_transformers(tmp_path, model):
    assets = assets_dir()
    shutil.copytree(assets / "models" / model, tmp_path / "base")
    settings = ["checkpoint_dir=base", "output_dir=out", "dataset.max_samples=200"]
    cfg = merged(*settings, "val_fraction=0", "dataset.source=x", cwd=tmp_path)
    cfg.dataset.source = str(assets / "data" / "gsm8k_train.jsonl")
    assert compared_with_hf(strict.read(cfg)) == Comparison(200, 0, [])
