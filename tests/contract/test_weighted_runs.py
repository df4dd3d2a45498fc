"""Rows that count more or less than others: however a run is split or stopped, it is the same."""

import json

import pytest

from phi3_plugin.train.monitor import History
from tests.adapters import load_adapter
from tests.chosen import some
from tests.own import (
    TINY,
    assert_same_end,
    finished,
    leave_until,
    linked,
    losses,
    own_run,
    same_losses,
    same_weights,
    train,
)

pytestmark = pytest.mark.slow

WEIGHTS = (0.25, 1, 2, 0.5, 3)
DATA = ("dataset.source=weighted.jsonl",)


@pytest.fixture
def weighted(cwd):
    """Give rows weights, and one message of every third row another."""
    lines = (cwd / "rows.jsonl").read_text("utf-8").splitlines()
    rows = []
    for number, row in enumerate(map(json.loads, lines)):
        if number % 3 == 0:
            row["messages"][-1]["weight"] = 0.5
        rows.append({**row, "weight": WEIGHTS[number % len(WEIGHTS)]})
    (cwd / "weighted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return cwd


def test_a_stopped_run_ends_in_the_same_bits(weighted):
    whole = train(weighted, *DATA, "epochs=2")
    assert whole.data.order.dataset.ds.store.is_weighted
    lines = History.read(weighted / "out" / "metrics.jsonl")
    told = [line for line in lines if "val_loss" in line]
    assert told and not any("val_perplexity" in line for line in told)  # exp(loss) would be none
    again = linked(weighted, weighted / "again", "base", "weighted.jsonl")
    leave_until(2, weighted / "out", again / "out")
    recipe = train(again, *DATA, "epochs=2", "resume=auto")
    assert recipe.last.folder.name == "step_000002"
    assert_same_end(again / "out", weighted / "out")


SPLIT = (
    *TINY,
    *DATA,
    "batch_size=1",
    "epochs=6",
    "max_steps=4",
    "val_fraction=0.2",
    "report=False",
)


def test_accumulation_is_a_batch_and_weights_matter(weighted):
    one = finished(*SPLIT, "gradient_accumulation_steps=4", "output_dir=one", cwd=weighted)
    sizes = ("batch_size=4", "gradient_accumulation_steps=1", "output_dir=four")
    four = finished(*SPLIT, *sizes, cwd=weighted)
    same_losses(losses(four), losses(one), rtol=1e-5)
    same_weights(load_adapter(four / "final"), load_adapter(one / "final"))
    plain = finished(
        *SPLIT, "dataset.source=rows.jsonl", *sizes, "output_dir=plain", "max_steps=1", cwd=weighted
    )
    assert losses(plain)[0] != pytest.approx(losses(four)[0], rel=0.01)


@pytest.mark.parametrize("packed", some([True, False], quick=set()))
def test_two_processes_see_what_one_does(packed, weighted):
    settings = (*SPLIT, f"dataset.packed={packed}")
    one = finished(*settings, "gradient_accumulation_steps=4", "output_dir=one", cwd=weighted)
    two = ("gradient_accumulation_steps=2", "output_dir=two")
    done = own_run(*settings, *two, cwd=weighted, processes=2)
    assert done.returncode == 0, done.stderr
    same_losses(losses(weighted / "two"), losses(one))
    same_weights(load_adapter(weighted / "two" / "final"), load_adapter(one / "final"))
