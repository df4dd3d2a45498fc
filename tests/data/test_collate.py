"""Padding on either side, against the stock collate and a real forward pass."""

import json

import pytest
import torch
from torchtune import config
from torchtune.data import padded_collate_sft

from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.data.collate import concatenate, pad_left, pad_right
from phi3_plugin.data.packing import Packs
from phi3_plugin.errors import ConfigError
from tests.data.tiny import edit_json, model

SAMPLES = [
    {"tokens": [5, 6, 7], "labels": [-100, 6, 7]},
    {"tokens": [8], "labels": [-100]},
    {"tokens": [1, 2, 3, 4, 9], "labels": [-100, -100, 3, 4, 9]},
]


@pytest.mark.parametrize("options", [{}, {"padding_idx": 9}, {"padding_idx": 2, "ignore_idx": -1}])
def test_right_is_the_stock_collate(options):
    ours, theirs = pad_right(SAMPLES, **options), padded_collate_sft(SAMPLES, **options)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key])
        assert ours[key].dtype == theirs[key].dtype


def test_right_is_found_by_its_dotpath():
    found = config._utils._get_component_from_path("phi3_plugin.data.collate.pad_right")
    assert found is pad_right


def test_one_row_has_no_padding_and_no_label_across_a_border():
    samples = [{"tokens": s["tokens"], "labels": s["tokens"]} for s in SAMPLES]
    row = concatenate(samples)
    assert row["tokens"].tolist() == [[5, 6, 7, 8, 1, 2, 3, 4, 9]]
    assert row["labels"].tolist() == [[-100, 6, 7, -100, -100, 2, 3, 4, 9]]
    assert row["input_pos"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4]]
    assert row["lengths"] == [3, 1, 5]
    assert samples[0]["labels"] == [5, 6, 7]


def test_what_fills_packs_up_is_left_out():
    dataset = [{"tokens": list(range(n)), "labels": list(range(n))} for n in (3, 2, 4, 7, 1)]
    packs = Packs(dataset, 8, padding_idx=99)
    row = concatenate([packs[i] for i in range(len(packs))])
    documents = row["tokens"][0].split(row["lengths"])
    kept = sorted(len(ids) for ids in documents if len(ids) > 1)
    assert kept == [2, 3, 4, 7]
    assert 99 not in row["tokens"]
    for ids in documents:
        assert ids.tolist() == list(range(len(ids)))


def test_left():
    batch = pad_left(SAMPLES, padding_idx=9)
    assert batch["tokens"].tolist() == [[9, 9, 5, 6, 7], [9, 9, 9, 9, 8], [1, 2, 3, 4, 9]]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, 6, 7],
        [-100] * 5,
        [-100, -100, 3, 4, 9],
    ]
    assert batch["input_pos"].tolist() == [[0, 0, 0, 1, 2], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]]
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"][0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert batch["mask"][2].equal(torch.ones(5, 5).tril().bool())
    real = batch["mask"][:, -1]
    assert real.sum(-1).tolist() == [3, 1, 5]


def test_prompts_have_no_labels():
    batch = pad_left([{"tokens": [1, 2]}, {"tokens": [3]}], padding_idx=4)
    assert batch.keys() == {"tokens", "mask", "input_pos"}
    assert batch["tokens"].tolist() == [[1, 2], [4, 3]]


def test_left_padding_changes_no_logit():
    decoder = model()
    batch = pad_left(SAMPLES, padding_idx=9)
    del batch["labels"]
    with torch.no_grad():
        together = decoder(**batch)
        assert together.isfinite().all()
        for row, sample in zip(together, SAMPLES, strict=True):
            alone = decoder(torch.tensor([sample["tokens"]]))[0]
            # Another length sums in another order
            torch.testing.assert_close(row[-len(alone) :], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad", ["model", "unk"])
@pytest.mark.parametrize("collate", [pad_right, pad_left, padded_collate_sft])
def test_an_eos_label_survives_padding_with_eos(folder, tmp_path, pad, collate):
    """Labels are padded with their own value, so no rule masks what looks like padding."""
    tokenizer = phi3_tokenizer(folder, pad=pad)
    file = tmp_path / "pairs.jsonl"
    rows = [{"question": "the", "answer": "other " * n} for n in (1, 5)]
    file.write_text("\n".join(map(json.dumps, rows)))
    dataset = chat_dataset(tokenizer, file, train_on="all")
    batch = collate(list(dataset), padding_idx=tokenizer.pad_id)
    assert tokenizer.pad_id == (tokenizer.eos_id if pad == "model" else tokenizer.unk_id)
    assert (batch["tokens"][0] == tokenizer.pad_id).sum() > 1
    labels = [row[row != -100].tolist() for row in batch["labels"]]
    assert labels == [sample["tokens"][1:] for sample in dataset]
    assert [row[-1] for row in labels] == [tokenizer.eos_id] * 2


@pytest.mark.parametrize("value", ["eos", None, 0, ["unk"]])
def test_bad_pad(folder, value):
    with pytest.raises(ConfigError, match=r"tokenizer\.pad: .* must be one of: model, unk\."):
        phi3_tokenizer(folder, pad=value)


def test_unk_must_exist(folder):
    edit_json(folder / "tokenizer_config.json", unk_token=None)
    with pytest.raises(ConfigError, match=r"tokenizer\.pad: 'unk' needs a token that .* not name"):
        phi3_tokenizer(folder, pad="unk")
