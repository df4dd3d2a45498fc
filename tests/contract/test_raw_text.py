"""Raw text: ids of transformers, the loss of transformers with PEFT, and runs in many ways."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from phi3_plugin.data import phi3_tokenizer, text_dataset
from phi3_plugin.data.collate import concatenate
from phi3_plugin.data.packing import without_padding
from phi3_plugin.train.losses import SFT
from tests import twins
from tests.adapters import load_adapter
from tests.chosen import examples
from tests.contract.test_ids import CONTENT
from tests.oracles import MINI_4K, TINY_MHA, hf_model, save_checkpoint
from tests.own import (
    RUN,
    WORDS,
    assert_same_end,
    finished,
    leave_until,
    linked,
    losses,
    own_run,
    same_losses,
    same_weights,
    tiny_inputs,
)
from tests.variants import edit_json, write_checkpoint

CONFIG = Path(__file__).parents[2] / "configs" / "phi3_mini_text.yaml"


@pytest.fixture(scope="module")
def both(supported):
    return phi3_tokenizer(supported), AutoTokenizer.from_pretrained(supported)


def found(ours, text, **options):
    (document,) = ours.encode_documents([text], **options).split()
    assert document.ids[-1] == ours.special_tokens["<|endoftext|>"]
    assert document.trained.tolist() == [False] + [True] * (len(document.ids) - 1)
    return document.ids.tolist()


def expected(theirs, text, ours, **options):
    ids = theirs(text, **options)["input_ids"]
    return ids if ids[-1:] == [ours.text_end] else [*ids, ours.text_end]


@given(text=CONTENT)
@examples(60)
def test_ids_are_those_of_transformers(both, text):
    """Special tokens that are written in a text are these tokens, or text, as is asked."""
    ours, theirs = both
    assert found(ours, text, special=True) == expected(theirs, text, ours)
    # transformers knows only the tokens that are marked special to be text
    plain = [t.content for t in theirs.added_tokens_decoder.values() if not t.special]
    if not any(token in text for token in plain):
        as_text = expected(theirs, text, ours, split_special_tokens=True)
        assert found(ours, text, special=False) == as_text


@pytest.mark.parametrize("says", [None, True, False])
@pytest.mark.parametrize("in_file", [False, True])
def test_a_beginning_of_text_where_the_files_have_one(says, in_file, tmp_path):
    folder = write_checkpoint(tmp_path / "base")
    if in_file:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        special = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = processors.TemplateProcessing("<s> $A", None, special)
        backend.save(str(folder / "tokenizer.json"))
    if says is not None:
        edit_json(folder / "tokenizer_config.json", add_bos_token=says)
    ours, theirs = phi3_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert found(ours, "the other", special=False) == expected(theirs, "the other", ours)
    assert ours.text_start == ([ours.bos_id] if in_file else [])


@pytest.mark.parametrize("overlap", [0, 5])
def test_the_loss_is_that_of_transformers_with_peft(overlap, tmp_path):
    """Every window of every document alone, against packs of them."""
    sizes = {**TINY_MHA, "num_hidden_layers": 2, "vocab_size": 448}
    folder = write_checkpoint(tmp_path / "base")
    theirs = AutoTokenizer.from_pretrained(folder)
    hf = hf_model(MINI_4K, **sizes)
    save_checkpoint(hf, MINI_4K, folder, **sizes)
    texts = [" ".join(["the other brother"] * n) for n in (1, 9, 2, 4)]
    rows = "\n".join(json.dumps({"text": text}) for text in texts)
    (tmp_path / "texts.jsonl").write_text(rows)
    tokenizer = phi3_tokenizer(folder, max_seq_len=32)
    options = {"packed": True, "overlap": overlap, "cache_dir": str(tmp_path / "kept")}
    packs = without_padding(text_dataset(tokenizer, str(tmp_path / "texts.jsonl"), **options))
    model = twins.ours(folder)
    twins.train_by_hand(model)
    peft = twins.twin(hf, model)

    mine, counted = 0.0, 0
    for i in range(len(packs)):
        batch = concatenate([packs[i]])
        labels = batch.pop("labels")[0]
        at = (labels != -100).nonzero().squeeze(1)
        batch = {**batch, "targets": labels[at], "rows": at - 1}
        mine, counted = mine + SFT()(model(**batch), batch).item(), counted + len(at)

    total, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*theirs(text)["input_ids"], theirs.eos_token_id]])
        starts = [0]
        while starts[-1] + 32 < ids.shape[1]:
            starts.append(starts[-1] + 32 - overlap)
        for start in starts:
            window = ids[:, start : start + 32]
            labels = window.clone()
            labels[:, : overlap if start else 0] = -100
            count = int((labels[:, 1:] != -100).sum())
            if count:
                total += peft(input_ids=window, labels=labels).loss.item() * count
            tokens += count
    assert counted == tokens and len(packs) > 2
    assert mine == pytest.approx(total, rel=1e-5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tiny_inputs(tmp_path_factory.mktemp("texts"), rows=1)
    (folder / "texts").mkdir()
    for number in range(20):
        words = (WORDS[2:][(number * k) % 7] for k in range(5 + 9 * number))
        (folder / "texts" / f"{number}.txt").write_text(" ".join(words))
    return folder


SETTINGS = (*RUN, "dataset.source=texts", "dataset.overlap=4", "tokenizer.max_seq_len=48")
INPUTS = ("base", "texts")


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_in_the_same_bits(made, tmp_path):
    cwd = linked(made, tmp_path / "one", *INPUTS)
    out = finished(*SETTINGS, cwd=cwd, config=CONFIG)
    again = linked(made, tmp_path / "again", *INPUTS)
    leave_until(3, out, again / "out")
    finished(*SETTINGS, "resume=auto", cwd=again, config=CONFIG)
    assert_same_end(again / "out", out)
    assert losses(out)[-1] < losses(out)[0]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_are_one(made, tmp_path):
    cwd = linked(made, tmp_path / "runs", *INPUTS)
    settings = (*SETTINGS, "model.lora_dropout=0.0")
    one = finished(*settings, "output_dir=one", cwd=cwd, config=CONFIG)
    sizes = ("gradient_accumulation_steps=1", "output_dir=two")
    done = own_run("--config", "phi3_mini_text", *settings, *sizes, cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    same_losses(losses(cwd / "two"), losses(one), rtol=1e-5)
    same_weights(load_adapter(cwd / "two" / "final"), load_adapter(one / "final"))
