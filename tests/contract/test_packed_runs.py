"""Packed runs and runs grouped by length: the same for two processes, and when resumed.

tests/contract/test_resume.py stops the packed run after every step, and goes on with one process
where two stopped.
"""

import pytest

from tests.adapters import load_adapter
from tests.chosen import some
from tests.own import (
    TINY,
    assert_same_end,
    finished,
    leave_until,
    linked,
    losses,
    metrics,
    own_run,
    same_losses,
    same_weights,
    train,
)

pytestmark = pytest.mark.slow

KINDS = {
    "packed": ("dataset.packed=True",),
    "split": ("dataset.packed=True", "dataset.split_documents=True"),
    "grouped": ("group_by_length=True", "dataset.packed=False"),
}


@pytest.mark.parametrize("kind", some(KINDS, quick=set()))
def test_two_processes_see_what_one_does(kind, cwd):
    settings = (*TINY, *KINDS[kind], "batch_size=1", "epochs=6", "max_steps=6")
    settings += ("val_fraction=0.2", "run_val_every_n_steps=3")
    one = finished(*settings, "gradient_accumulation_steps=4", "output_dir=one", cwd=cwd)
    two = ("gradient_accumulation_steps=2", "output_dir=two")
    done = own_run(*settings, *two, cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr
    assert len(losses(one)) == 6
    same_losses(losses(cwd / "two"), losses(one))
    same_weights(load_adapter(cwd / "two" / "final"), load_adapter(one / "final"))
    tokens = [[step["tokens"] for step in metrics(cwd / name)] for name in ("one", "two")]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("kind", "accumulation"), some([("grouped", 8), ("split", 2)], quick={("grouped", 8)})
)
def test_a_stopped_run_ends_in_the_same_bits(kind, accumulation, cwd):
    settings = (*KINDS[kind], f"gradient_accumulation_steps={accumulation}", "epochs=2")
    whole = train(cwd, *settings)
    assert whole.data.total_steps > 5
    linked(cwd, cwd / "again")
    leave_until(3, cwd / "out", cwd / "again" / "out")
    recipe = train(cwd / "again", *settings, "resume=auto")
    assert recipe.last.folder.name == "step_000003"
    assert_same_end(cwd / "again" / "out", cwd / "out")
