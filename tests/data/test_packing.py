"""Packs against the conversations they are made of, as the stock recipe sees them."""

import json
from itertools import chain

import pytest
import torch
from torchtune.data import padded_collate_packed
from torchtune.datasets import ConcatDataset, PackedDataset
from torchtune.modules import attention_utils

from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.data.packing import Packs
from phi3_plugin.errors import ConfigError
from tests.assets import assets_dir
from tests.data.tiny import model

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
    alone, packs = both
    assert 1 < len(packs) < len(alone) == len(PAIRS)
    found = [(t.tolist(), y.tolist()) for pack in packs for t, y, _ in documents(pack)]
    assert sorted(document for document in found if any(y != -100 for y in document[1])) == sorted(
        (sample["tokens"], sample["labels"]) for sample in alone
    )
    filled = sum(len(tokens) for tokens, labels in found if any(y != -100 for y in labels))
    assert filled == sum(len(sample["tokens"]) for sample in alone) == sum(packs.lengths)
    assert packs.waste == pytest.approx(1 - filled / (len(packs) * LENGTH))


def test_a_pack_tells_its_documents(both):
    alone, packs = both
    for i, pack in enumerate(packs):
        assert int(pack["labels"].ne(-100).sum()) == packs.labelled[i]
        said = packs.documents(i)
        lengths = [length for _, _, length in said]
        assert sum(lengths) == packs.lengths[i]
        assert pack["seq_lens"].tolist()[: len(said)] == lengths
        for (document, start, _), (tokens, _, _) in zip(said, documents(pack), strict=False):
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


def test_a_long_conversation_fills_a_pack(both):
    alone, packs = both
    assert len(alone[2]["tokens"]) == LENGTH
    assert [pack["seq_lens"].tolist() for pack in packs].count([LENGTH]) == 1


def test_nothing_is_predicted_across_a_border(both):
    alone, packs = both
    batch = padded_collate_packed([packs[i] for i in range(len(packs))])
    # As the stock recipe shifts: the prediction at a place is judged by the label after it
    shifted = torch.hstack([batch["labels"][:, 1:], torch.full((len(packs), 1), -100)])
    for pack, labels in zip(packs, shifted, strict=True):
        ends = pack["seq_lens"].cumsum(0) - 1
        assert labels[ends].eq(-100).all()
    trained = sum(label != -100 for sample in alone for label in sample["labels"])
    assert shifted.ne(-100).sum() == trained


@pytest.mark.skipif(attention_utils._SUPPORTS_FLEX_ATTENTION, reason="the mask is a BlockMask")
def test_the_mask_of_a_cpu_keeps_documents_apart(both):
    _, packs = both
    batch = padded_collate_packed([packs[i] for i in range(len(packs))])
    assert batch.keys() == {"tokens", "labels", "input_pos", "mask"}
    assert batch["mask"].dtype == torch.bool
    for pack, mask in zip(packs, batch["mask"], strict=True):
        blocks = [torch.ones(n, n).tril().bool() for n in pack["seq_lens"].tolist()]
        assert mask.equal(torch.block_diag(*blocks))


@pytest.mark.skipif(attention_utils._SUPPORTS_FLEX_ATTENTION, reason="the mask is a BlockMask")
def test_a_pack_computes_what_its_conversations_do_alone(both):
    _, packs = both
    decoder = model()
    batch = padded_collate_packed([packs[i] for i in range(len(packs))])
    del batch["labels"]
    with torch.no_grad():
        for pack, logits in zip(packs, decoder(**batch), strict=True):
            parts = [part.split(pack["seq_lens"].tolist()) for part in (pack["tokens"], logits)]
            for tokens, packed in list(zip(*parts, strict=True))[:-1]:  # without the padding
                # Another length sums in another order
                torch.testing.assert_close(packed, decoder(tokens[None])[0], rtol=1e-5, atol=1e-5)


def test_padding_is_the_tokenizers(folder, source):
    tokenizer = phi3_tokenizer(folder, max_seq_len=LENGTH, pad="unk")
    packs = chat_dataset(tokenizer, source, packed=True)
    last = packs[int(packs.lengths.argmin()) - len(packs)]  # from the end, as a list
    assert last["tokens"][-int(last["seq_lens"][-1]) :].eq(tokenizer.unk_id).all()


def test_torchtune_knows_it_is_packed(both):
    assert isinstance(both[1], PackedDataset)
    assert ConcatDataset([both[1], both[1]]).packed


def test_packed_needs_a_length(tokenizer, source):
    with pytest.raises(ConfigError, match=r"dataset\.packed: True .* Set tokenizer\.max_seq_len"):
        chat_dataset(tokenizer, source, packed=True)


@pytest.mark.parametrize("value", ["True", 1, None])
def test_bad_packed(tokenizer, source, value):
    with pytest.raises(ConfigError, match=r"dataset\.packed: .* must be True or False"):
        chat_dataset(tokenizer, source, packed=value)


@pytest.mark.assets
@pytest.mark.parametrize("file", ["gsm8k_train.jsonl", "oasst_en_100_messages.jsonl"])
def test_real_conversations_leave_little_padding(file):
    folder = assets_dir()
    tokenizer = phi3_tokenizer(folder / "models" / "phi3-mini-4k-instruct", max_seq_len=2048)
    alone = chat_dataset(tokenizer, folder / "data" / file)
    packs = Packs(alone, 2048, tokenizer.pad_id)
    assert packs.waste < 0.02
    found = chain.from_iterable(packs.documents(i) for i in range(len(packs)))
    assert sorted(found) == [(i, 0, n) for i, n in enumerate(packs.ds.lengths)]
    document, _, length = packs.documents(0)[-1]
    end = packs.lengths[0]
    assert packs[0]["tokens"][end - length : end].tolist() == alone[document]["tokens"]
