"""The data of a run: the same samples for any number of processes, packed or padded."""

import json
from itertools import chain
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from phi3_plugin.data.order import held_out, shares
from phi3_plugin.errors import ConfigError
from phi3_plugin.settings import read
from phi3_plugin.train.data import check_positions, facts_in_words, load_data, validation_share
from tests.own import chat
from tests.variants import write_checkpoint

ROWS = 30
KINDS = {
    "padded": {},
    "grouped": {"group_by_length": True},
    "packed": {"dataset": {"packed": True}},
    "split": {"dataset": {"packed": True, "split_documents": True}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_checkpoint(folder / "base")
    for name, rows in (("rows.jsonl", range(ROWS)), ("val.jsonl", range(ROWS, ROWS + 5))):
        text = "".join(json.dumps(chat(number)) + "\n" for number in rows)
        (folder / name).write_text(text, "utf-8")
    return folder


@pytest.fixture
def load(folder):
    """Load with six micro-batches a step, shared out to the processes."""

    def make(processes=1, **changed):
        keys = {
            "checkpoint_dir": str(folder / "base"),
            "output_dir": str(folder / "out"),
            "model": {"_component_": "phi3_plugin.models.phi3", "checkpoint_dir": "base"},
            "tokenizer": {
                "_component_": "phi3_plugin.data.phi3_tokenizer",
                "path": str(folder / "base"),
                "max_seq_len": 96,
            },
            "dataset": section(folder / "rows.jsonl"),
            "optimizer": {"_component_": "torch.optim.AdamW"},
            "gradient_accumulation_steps": 6 // processes,
            "batch_size": 1,
            "dtype": "fp32",
        }
        return load_data(read(OmegaConf.merge(keys, changed)), processes)

    return make


def section(file, **keys):
    return {"_component_": "phi3_plugin.data.chat_dataset", "source": str(file), **keys}


def trained(batches):
    """Return what is trained on in batches of one, in an order that does not depend on theirs."""
    return sorted(b["labels"][b["labels"] != -100].tolist() for b in batches)


def step_of(data, step, processes=1):
    batches = [data.order.batches(step, rank, data.collate) for rank in range(processes)]
    return [labels for labels in trained(chain(*batches)) if labels]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_for_any_number_of_processes_and_from_any_step_on(kind, load):
    one = load(epochs=2, val_fraction=0.2, **KINDS[kind])
    steps = [step_of(one, step) for step in range(one.total_steps)]
    assert len(steps) == 2 * one.order.steps_per_epoch > 3
    half = len(steps) // 2
    assert sorted(chain(*steps[:half])) == sorted(chain(*steps[half:]))
    for processes in (2, 3):
        many = load(processes, epochs=2, val_fraction=0.2, **KINDS[kind])
        assert many.order.identity == one.order.identity
        assert many.total_steps == one.total_steps
        # Backwards: a resumed run asks for any step first
        backwards = [step_of(many, step, processes) for step in reversed(range(len(steps)))]
        assert backwards[::-1] == steps
        shared = (shares(many.order_val, rank, many.collate_val) for rank in range(processes))
        expected = trained(shares(one.order_val, 0, one.collate_val))
        assert [labels for labels in trained(chain(*shared)) if labels] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_of_many_samples_a_part_is_held_out_by_itself(kind, load, monkeypatch):
    assert load(**KINDS[kind]).order_val is None
    monkeypatch.setattr("phi3_plugin.train.data.ENOUGH", ROWS)
    assert load(val_fraction=0.0, **KINDS[kind]).order_val is None
    one, same = load(**KINDS[kind]), load(val_fraction=0.05, **KINDS[kind])
    assert held_out(one.order_val) == held_out(same.order_val)
    assert one.order.identity == same.order.identity


def test_at_most_200_samples_are_held_out_by_themselves():
    s = SimpleNamespace(val_fraction=None, dataset_val=None)
    assert [validation_share(s, range(n)) for n in (199, 200, 4000, 8000)] == [0, 0.05, 0.05, 0.025]
    s.dataset_val = {"source": "x"}
    assert validation_share(s, range(4000)) == 0


def test_patience_needs_validation_data(load):
    with pytest.raises(ConfigError, match="early_stop_patience: 3 needs validation data"):
        load(early_stop_patience=3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_out_is_not_trained_on(kind, load):
    data = load(val_fraction=0.2, **KINDS[kind])
    kept, held = (set(documents(order.dataset)) for order in (data.order, data.order_val))
    assert len(held) > 3
    assert not kept & held


def documents(dataset):
    inner = getattr(dataset, "ds", dataset)  # what is packed
    return [tuple(inner[i]["tokens"]) for i in range(len(inner))]


def test_without_validation_data_there_is_no_order_of_it(load):
    assert load().order_val is None


def test_max_steps_is_what_a_run_makes(load):
    assert load(epochs=3).total_steps == 15
    assert load(epochs=3, max_steps=4).total_steps == 4


def test_beyond_its_epochs_the_data_is_repeated_in_other_orders(load):
    data = load(epochs=1, max_steps=40)
    assert data.total_steps == 40
    epochs = [[i for s in range(5 * e, 5 * e + 5) for i in data.order.indices(s)] for e in range(8)]
    assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(range(len(data.order.dataset)))}
    assert len({tuple(epoch) for epoch in epochs}) == 8


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"epochs": 3}, "steps: 15, of {} samples each; epochs: 3, of 5 steps"),
        ({"epochs": 1, "max_steps": 12}, "steps: 12, of {} samples each; epochs: 2.4, of 5 steps"),
        ({"epochs": 3, "max_steps": 4}, "steps: 4, of {} samples each; epochs: 0.8, of 5 steps"),
    ],
)
def test_what_a_run_is_going_to_do_is_said(load, keys, expected):
    data = load(**keys)
    assert facts_in_words(data).endswith(expected.format(data.order.per_step))


@pytest.mark.parametrize("packed", [True, False])
def test_validation_data_is_packed_if_its_own_section_says_so(packed, load, folder):
    data = load(
        dataset={"packed": packed}, dataset_val=section(folder / "val.jsonl", packed=not packed)
    )
    both = shares(data.order, 0, data.collate), shares(data.order_val, 0, data.collate_val)
    found = [any(len(batch["lengths"]) > 1 for batch in batches) for batches in both]
    assert found == [packed, not packed]


def test_padding_is_the_tokenizers(load):
    pad_right = "phi3_plugin.data.collate.pad_right"
    sizes = {"batch_size": 6, "gradient_accumulation_steps": 1}
    data = load(tokenizer={"pad": "unk"}, collate_fn=pad_right, **sizes)
    (batch,) = data.order.batches(0, 0, data.collate)
    lengths = [len(data.order.dataset[i]["tokens"]) for i in data.order.indices(0)]
    assert len(set(lengths)) > 1
    for row, length in zip(batch["tokens"], lengths, strict=True):
        assert row[length:].eq(data.tokenizer.unk_id).all()


@pytest.mark.parametrize("packed", [False, True])
def test_a_document_longer_than_the_positions_is_refused_before_the_model(load, folder, packed):
    data = load(dataset=section(folder / "rows.jsonl", packed=packed))
    longest = max(
        max(sample.get("lengths", [len(sample["tokens"])])) for sample in data.order.dataset
    )
    check_positions(data, longest)
    with pytest.raises(ConfigError, match=rf"max_seq_len: a document has {longest} tokens.*Set it"):
        check_positions(data, longest - 1)
