"""Batches of either side's padding and of none, against the stock collate and a forward pass."""

import json

import pytest
import torch
from torchtune import config
from torchtune.data import padded_collate_packed, padded_collate_sft
from torchtune.datasets import ConcatDataset, PackedDataset
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import attention_utils

from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.data.collate import concatenate, pad_left, pad_right
from phi3_plugin.data.packing import Packs, StockPacks, without_padding

SAMPLES = [
    {"tokens": [5, 6, 7], "labels": [-100, 6, 7]},
    {"tokens": [8], "labels": [-100]},
    {"tokens": [1, 2, 3, 4, 9], "labels": [-100, -100, 3, 4, 9]},
]


def decoder():
    """The shell that all decoders of torchtune share, to run batches through."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 448, "embed_dim": 16, "intermediate_dim": 32, "max_seq_len": 64}
    return llama3_2(num_layers=2, num_heads=2, num_kv_heads=1, **sizes).eval()


@pytest.mark.parametrize("options", [{}, {"padding_idx": 9}, {"padding_idx": 2, "ignore_idx": -1}])
def test_right_is_the_stock_collate(options):
    ours, theirs = pad_right(SAMPLES, **options), padded_collate_sft(SAMPLES, **options)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key])
        assert ours[key].dtype == theirs[key].dtype


@pytest.mark.parametrize("function", [concatenate, pad_right, pad_left])
def test_recipes_find_it_by_its_dotpath(function):
    path = f"phi3_plugin.data.collate.{function.__name__}"
    assert config._utils._get_component_from_path(path) is function


def test_one_row_has_no_padding_and_no_label_across_a_border():
    samples = [{"tokens": s["tokens"], "labels": s["tokens"]} for s in SAMPLES]
    row = concatenate(samples)
    assert row["tokens"].tolist() == [[5, 6, 7, 8, 1, 2, 3, 4, 9]]
    assert row["labels"].tolist() == [[-100, 6, 7, -100, -100, 2, 3, 4, 9]]
    assert row["input_pos"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4]]
    assert row["lengths"] == [3, 1, 5]
    assert samples[0]["labels"] == [5, 6, 7]


def test_packs_in_one_row_are_their_documents():
    dataset = [{"tokens": list(range(n)), "labels": list(range(n))} for n in (3, 2, 4, 7, 1)]
    packs = Packs(dataset, 8)
    stock = StockPacks(packs, padding_idx=99)
    assert without_padding(stock) is packs and without_padding(dataset) is dataset
    row = concatenate([packs[i] for i in range(len(packs))])
    assert sorted(row["lengths"]) == [1, 2, 3, 4, 7]
    for ids, labels in zip(
        *(row[key][0].split(row["lengths"]) for key in ("tokens", "labels")), strict=True
    ):
        assert ids.tolist() == list(range(len(ids)))
        assert labels.tolist() == [-100, *range(1, len(ids))]
    # A padded pack, as torchtune's own packed data set has them; a lone token may go with it
    again = concatenate([stock[i] for i in range(len(stock))])
    assert 99 not in again["tokens"] and sorted(again["lengths"])[-4:] == [2, 3, 4, 7]


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
    assert batch["mask"][:, -1].sum(-1).tolist() == [3, 1, 5]
    prompts = pad_left([{"tokens": [1, 2]}, {"tokens": [3]}], padding_idx=4)
    assert prompts.keys() == {"tokens", "mask", "input_pos"}
    assert prompts["tokens"].tolist() == [[1, 2], [4, 3]]


def test_left_padding_changes_no_logit():
    model = decoder()
    batch = pad_left(SAMPLES, padding_idx=9)
    del batch["labels"]
    with torch.no_grad():
        together = model(**batch)
        assert together.isfinite().all()
        for row, sample in zip(together, SAMPLES, strict=True):
            alone = model(torch.tensor([sample["tokens"]]))[0]
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


# Packs as torchtune's own recipes see them

LENGTH = 64
PAIRS = [{"question": "the " * n, "answer": f"other {n}"} for n in (1, 5, 90, 2, 30, 3, 40, 8)]
PAIRS[2] = {"question": "the", "answer": "other " * 90}  # longer than a pack


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, PAIRS)))
    return file


@pytest.fixture(params=["assistant", "last", "all"])
def both(request, folder, source):
    """The conversations one by one, and the packs of them."""
    tokenizer = phi3_tokenizer(folder, max_seq_len=LENGTH)
    options = {"train_on": request.param}
    alone = chat_dataset(tokenizer, source, **options)
    return list(alone), chat_dataset(tokenizer, source, packed=True, **options)


def documents(pack):
    """Split a pack into its documents and the padding, told from the labels of neither."""
    parts = [pack[key].split(pack["seq_lens"].tolist()) for key in ("tokens", "labels")]
    return list(zip(*parts, pack["input_pos"].split(pack["seq_lens"].tolist()), strict=True))


def test_every_conversation_whole_and_once(both):
    alone, stock = both
    assert isinstance(stock, PackedDataset)
    assert ConcatDataset([stock, stock]).packed
    assert 1 < len(stock) < len(alone) == len(PAIRS)
    found = [(t.tolist(), y.tolist()) for pack in stock for t, y, _ in documents(pack)]
    assert sorted(document for document in found if any(y != -100 for y in document[1])) == sorted(
        (sample["tokens"], sample["labels"]) for sample in alone
    )
    assert len(alone[2]["tokens"]) == LENGTH
    assert [pack["seq_lens"].tolist() for pack in stock].count([LENGTH]) == 1


def test_a_pack_tells_its_documents(both):
    alone, stock = both
    packs = stock.packs
    for i, pack in enumerate(packs):
        assert int(pack["labels"].ne(-100).sum()) == packs.labelled[i]
        lengths = [length for _, _, length in packs.documents(i)]
        assert sum(lengths) == packs.lengths[i] == len(pack["tokens"])
        assert pack["lengths"].tolist() == lengths
        for (document, start, _), tokens in zip(
            packs.documents(i), pack["tokens"].split(lengths), strict=True
        ):
            assert start == 0
            assert tokens.tolist() == alone[document]["tokens"]


def test_lengths_add_up_and_positions_restart(both):
    for pack in both[1]:
        assert pack["seq_lens"].sum() == LENGTH == len(pack["tokens"])
        assert (pack["seq_lens"] > 0).all()
        for _, labels, positions in documents(pack):
            padding = (labels == -100).all()
            expected = torch.zeros(len(labels)) if padding else torch.arange(len(labels))
            assert positions.equal(expected.long())


def test_nothing_is_predicted_across_a_border(both):
    alone, stock = both
    batch = padded_collate_packed([stock[i] for i in range(len(stock))])
    # As the stock recipe shifts: the prediction at a place is judged by the label after it
    shifted = torch.hstack([batch["labels"][:, 1:], torch.full((len(stock), 1), -100)])
    for pack, labels in zip(stock, shifted, strict=True):
        assert labels[pack["seq_lens"].cumsum(0) - 1].eq(-100).all()
    trained = sum(label != -100 for sample in alone for label in sample["labels"])
    assert shifted.ne(-100).sum() == trained


@pytest.mark.skipif(attention_utils._SUPPORTS_FLEX_ATTENTION, reason="the mask is a BlockMask")
def test_a_stock_batch_computes_what_its_conversations_do_alone(both):
    _, stock = both
    model = decoder()
    batch = padded_collate_packed([stock[i] for i in range(len(stock))])
    assert batch.keys() == {"tokens", "labels", "input_pos", "mask"}
    assert batch["mask"].dtype == torch.bool
    for pack, mask in zip(stock, batch["mask"], strict=True):
        blocks = [torch.ones(n, n).tril().bool() for n in pack["seq_lens"].tolist()]
        assert mask.equal(torch.block_diag(*blocks))
    del batch["labels"]
    with torch.no_grad():
        for pack, logits in zip(stock, model(**batch), strict=True):
            parts = [part.split(pack["seq_lens"].tolist()) for part in (pack["tokens"], logits)]
            for tokens, packed in list(zip(*parts, strict=True))[:-1]:  # without the padding
                # Another length sums in another order
                torch.testing.assert_close(packed, model(tokens[None])[0], rtol=1e-5, atol=1e-5)


def test_padding_is_the_tokenizers(folder, source):
    tokenizer = phi3_tokenizer(folder, max_seq_len=LENGTH, pad="unk")
    stock = chat_dataset(tokenizer, source, packed=True)
    last = stock[int(stock.packs.lengths.argmin()) - len(stock)]  # from the end, as a list
    assert last["tokens"][-int(last["seq_lens"][-1]) :].eq(tokenizer.unk_id).all()
