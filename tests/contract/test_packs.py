"""Packs of documents whose tokens tell where they come from."""

import pickle

import numpy as np
import pytest

from phi3_plugin.data.packing import Packs
from phi3_plugin.errors import DataError


class Numbered:
    """Document n holds the tokens 100 n, 100 n + 1 and so on; its second half is trained on."""

    def __init__(self, lengths, first=0):
        self.lengths, self.first = np.array(lengths, np.int32), first
        self.labelled = self.lengths // 2
        self.fingerprint = str((lengths, first))

    def __len__(self):
        return len(self.lengths)

    def arrays(self, index):
        ids = 100 * (self.first + index) + np.arange(self.lengths[index], dtype=np.int32)
        labels = ids.copy()
        labels[: -self.labelled[index] or None] = -100
        return ids, labels

    def hold_out(self, share, seed):
        count = round(len(self) * share)
        return Numbered(self.lengths[count:], count), Numbered(self.lengths[:count])


LENGTHS = [3, 40, 7, 1, 16, 9, 2, 30, 5]


def test_split_documents_restart_and_predict_nothing_across_the_cut():
    packs = Packs(Numbered(LENGTHS), 16, seed=1, split_documents=True)
    cut = 0
    for i, pack in enumerate(packs):
        said = packs.documents(i)
        ends = np.cumsum([length for _, _, length in said])
        for (document, start, length), end in zip(said, ends, strict=True):
            here = slice(end - length, end)
            assert pack["tokens"][here].tolist() == [
                100 * document + start + k for k in range(length)
            ]
            assert pack["input_pos"][here].tolist() == list(range(length))
            assert pack["labels"][end - length] == -100
            trained = packs.ds.arrays(document)[1][start + 1 : start + length]
            assert pack["labels"][here][1:].tolist() == trained.tolist()
            cut += start > 0
        assert pack["labels"].ne(-100).sum() == packs.labelled[i]
    assert cut > 3


def test_packs_that_train_nothing_are_left_out(caplog):
    packs = Packs(Numbered([200]), 16, split_documents=True)
    assert len(packs) == 7  # of 13: the answer begins at token 100
    assert (packs.labelled > 0).all()
    assert "left out 6 of 13 packs: they train nothing" in caplog.text
    assert sum(packs.labelled) == 100 - 6  # each cut in the answer costs one


def test_both_parts_are_packed_alike():
    packs = Packs(Numbered(LENGTHS), 16, seed=2, split_documents=True)
    kept, held = packs.hold_out(1 / 3, seed=0)
    assert (len(kept.ds), len(held.ds)) == (6, 3)
    for part in (kept, held):
        alone = Packs(part.ds, 16, seed=2, split_documents=True)
        assert part.fingerprint == alone.fingerprint != packs.fingerprint
        assert part.lengths.sum() == part.ds.lengths.sum()


def test_a_copy_in_another_process_holds_the_same():
    packs = Packs(Numbered([n for n in LENGTHS if n <= 16]), 16)
    again = pickle.loads(pickle.dumps(packs))
    assert again.fingerprint == packs.fingerprint
    for one, other in zip(packs, again, strict=True):
        assert all(value.equal(other[key]) for key, value in one.items())


def test_the_fingerprint_tells_packs_apart():
    lengths = [n for n in LENGTHS if n <= 16]
    options = [{}, {"seed": 1}, {"split_documents": True}, {"seed": 1, "split_documents": True}]
    packs = [Packs(Numbered(lengths), 16, **more) for more in options]
    packs += [Packs(Numbered(lengths), 17), Packs(Numbered(lengths, 1), 16)]
    assert len({p.fingerprint for p in packs}) == len(packs)
    assert Packs(Numbered(lengths), 16).fingerprint == packs[0].fingerprint


def test_a_data_set_of_samples_only():
    """Nothing is predicted across a border, even if its labels would have it."""
    ours = Numbered([n for n in LENGTHS if n <= 16])
    samples = [
        dict(zip(("tokens", "labels"), ours.arrays(i), strict=True)) for i in range(len(ours))
    ]
    for sample in samples:
        sample["labels"] = [int(sample["tokens"][0]), *sample["labels"].tolist()[1:]]
    packs, expected = Packs(samples, 16), Packs(ours, 16)
    for one, other in zip(packs, expected, strict=True):
        assert all(value.equal(other[key]) for key, value in one.items())
    assert packs.labelled.tolist() == expected.labelled.tolist()
    assert packs.fingerprint == Packs(samples, 16).fingerprint != Packs(samples[1:], 16).fingerprint
    with pytest.raises(
        DataError, match=r"val_fraction: 0\.1 cannot be split off .* Set dataset_val"
    ):
        packs.hold_out(0.1, seed=0)


def test_packs_without_any_label():
    with pytest.raises(DataError, match="no token to train on in any pack"):
        Packs(Numbered([1, 1]), 16)
