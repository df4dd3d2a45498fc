"""`plan=true`, `memory_budget` and offloading, as a user asks for them."""

import json

import pytest

from phi3_plugin.errors import ConfigError
from phi3_plugin.settings import read
from phi3_plugin.train import plan as planner
from phi3_plugin.train.world import World
from tests.own import TINY, finished, merged, metrics, own_run

OWN = (*TINY, "output_dir=out", "enable_activation_checkpointing=False", "epochs=1")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(planner, "MEASURED_SECONDS", 0.01)


def planned(cwd, capsys, *settings):
    planner.print_plan(merged(*OWN, "plan=true", *settings, cwd=cwd))
    return capsys.readouterr().out


def total(text):
    (line,) = [line for line in text.splitlines() if line.startswith("  total")]
    return float(line.split()[1])


def chosen(cwd, *settings):
    return planner.recomputed_for(read(merged(*OWN, *settings, cwd=cwd)), World("cpu"))


def test_the_parts_add_up_and_nothing_is_written(cwd, capsys):
    before = sorted(cwd.iterdir())
    text = planned(cwd, capsys, "tokenizer.max_seq_len=2048")
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if "GiB" in line) + 1
    last = next(i for i, line in enumerate(lines) if line.startswith("  ---"))
    parts = [line.rsplit(maxsplit=1) for line in lines[first:last]]
    names = ["base weights", "trained weights", "gradients", "optimizer", "activations", "loss"]
    assert [name.strip() for name, _ in parts] == [*names, "buffers"]
    assert sum(float(size) for _, size in parts) == pytest.approx(total(text), abs=0.02)
    assert "it fits" in text and "a step," in text and "TFLOP/s" in text
    assert "4 x 2048 tokens at once at most, 4 times a device" in text
    assert max(map(len, lines)) <= 100
    assert sorted(cwd.iterdir()) == before


def test_only_config_json_is_read(cwd, capsys):
    config = (cwd / "base" / "config.json").read_text("utf-8")
    (cwd / "bare").mkdir()
    (cwd / "bare" / "config.json").write_text(config, "utf-8")
    (cwd / "empty.jsonl").write_text("", "utf-8")
    assert "total" in planned(cwd, capsys, "checkpoint_dir=bare", "dataset.source=empty.jsonl")


def test_devices_share_a_model_or_copies_of_it(cwd, capsys):
    texts = [planned(cwd, capsys, "plan=4", f"fsdp_replicas={copies}") for copies in (1, 2, 4)]
    shares = ["4 share a copy", "2 share a copy", "each with the whole model"]
    assert all(words in text for words, text in zip(shares, texts, strict=True))
    assert ["gathered layers" in text for text in texts] == [True, True, False]
    with pytest.raises(ConfigError, match=r"fsdp_replicas: 3 copies .* 4 devices"):
        planned(cwd, capsys, "plan=4", "fsdp_replicas=3")


def test_of_several_processes_one_prints(cwd, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 share a copy" in planned(cwd, capsys)
    monkeypatch.setenv("RANK", "1")
    assert planned(cwd, capsys) == ""


def test_what_does_not_fit_is_told_what_would(cwd, capsys):
    long = "tokenizer.max_seq_len=1024"
    most = total(planned(cwd, capsys, long))
    least = total(planned(cwd, capsys, long, "enable_activation_checkpointing=True"))
    limit = (most + least) / 2
    text = planned(cwd, capsys, long, f"memory_budget={limit}GiB")
    assert "it fits" in text and total(text) <= limit + 0.001
    text = planned(cwd, capsys, long, "memory_budget=1MiB")
    assert "IT DOES NOT FIT" in text and "Lower batch_size" in text
    assert max(map(len, text.splitlines())) <= 100


def test_without_a_budget_the_advice_is_one(cwd, capsys, monkeypatch):
    long = "tokenizer.max_seq_len=1024"
    most = total(planned(cwd, capsys, long))
    monkeypatch.setattr(planner, "memory_free", lambda: int(0.97 * most * 2**30))
    text = planned(cwd, capsys, long)
    assert "IT DOES NOT FIT" in text
    assert "layers recomputed it would: add memory_budget=" in text


def test_a_budget_chooses_the_fewest_layers_and_says_so(cwd, capsys):
    long = "tokenizer.max_seq_len=1024"
    assert chosen(cwd, long) == 0
    assert capsys.readouterr().out == ""
    assert chosen(cwd, long, "memory_budget=64GiB") == 0
    assert "memory_budget: 0 of 2 layers recompute; predicted peak" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"with all 2 layers recomputed .*activations.*Lower"):
        chosen(cwd, long, "memory_budget=1MiB")


def test_a_run_within_a_budget_ends_where_one_without_does(cwd, capsys):
    most = total(planned(cwd, capsys, "tokenizer.max_seq_len=96"))
    same = (*OWN, "max_steps=2", "report=False")
    losses = []
    for name, more in (("a", ()), ("b", (f"memory_budget={0.99 * most}GiB",))):
        out = finished(*same, f"output_dir={name}", *more, cwd=cwd)
        losses.append([step["loss"] for step in metrics(out)])
    assert losses[0] == losses[1]
    assert "layers recompute; predicted peak" in capsys.readouterr().out


@pytest.mark.slow
def test_from_the_command_line(cwd):
    done = own_run(*OWN, "plan=true", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "Planned only: nothing is loaded, nothing is written." in done.stdout
    assert not (cwd / "out").exists()
    assert json.loads((cwd / "base" / "config.json").read_text("utf-8"))
