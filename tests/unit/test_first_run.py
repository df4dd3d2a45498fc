"""A run of which only the data is known: what is chosen, and by what."""

import fcntl
import json
import pty
import re
import shlex
import struct
import sys
import termios
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from phi3_plugin.recipes import phi3_inspect_data

from phi3_plugin import cli, first_run, settings
from phi3_plugin.errors import ConfigError
from phi3_plugin.first_run import Draft, planned, run
from phi3_plugin.options import TrainOptions, read_options
from phi3_plugin.train.plan import estimated
from tests import warm
from tests.own import metrics

CPU = torch.device("cpu")


def options(*keys, **given):
    return read_options(
        TrainOptions, {"source": "rows.jsonl", "base": "base", "keys": keys, **given}
    )


@pytest.fixture
def draft(cwd, monkeypatch):
    monkeypatch.chdir(cwd)
    return lambda *keys, **given: Draft(options(*keys, **given), {})


def chosen(draft):
    plan = planned(draft)
    cfg = draft.cfg
    assert settings.read(cfg, draft.processes).epochs == cfg.epochs  # our recipe takes it
    return SimpleNamespace(**OmegaConf.to_container(cfg), text="\n".join(plan.lines), plan=plan)


def test_forty_rows_make_thirty_steps(draft):
    run = chosen(draft())
    assert (run.batch_size, run.gradient_accumulation_steps, run.epochs) == (4, 1, 3)
    assert run.dataset["source"] == "rows.jsonl"
    assert (run.checkpoint_dir, run.tokenizer["path"]) == ("base", "${checkpoint_dir}")
    assert "samples 40, none held out" in run.text
    assert "steps   30 of 4 samples, 3 epochs" in run.text
    assert "parameters (" in run.text and "GiB predicted" in run.text
    assert "val_fraction" not in vars(run)


def test_of_200_rows_a_part_is_held_out(draft, cwd):
    rows = [{"question": f"{number} plus one", "answer": str(number)} for number in range(400)]
    (cwd / "many.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    run = chosen(draft(source="many.jsonl"))
    assert run.val_fraction == 0.05
    assert (run.batch_size, run.gradient_accumulation_steps) == (4, 4)
    assert run.run_val_every_n_steps == 24  # once an epoch, if that is less than 50 steps
    assert re.search(r"samples 3\d\d, \d\d held out", run.text)
    packed = chosen(draft("dataset.packed=True", source="many.jsonl"))
    assert packed.val_fraction == 0.05
    assert "val_fraction" not in vars(chosen(draft("dataset.max_samples=199", source="many.jsonl")))


@pytest.mark.parametrize(
    ("samples", "each"), [(1, 1), (19, 1), (20, 2), (40, 4), (160, 16), (9999, 16)]
)
@pytest.mark.parametrize("processes", [1, 2, 32])
def test_an_epoch_has_ten_steps_where_samples_suffice(draft, samples, each, processes):
    run = draft(nproc_per_node=processes)
    first_run.choose_batches(run, samples)
    size, times = run.cfg.batch_size, run.cfg.gradient_accumulation_steps
    assert size <= 4 and size * times * processes == max(each, processes)


def test_what_is_said_stays(draft):
    run = chosen(
        draft(
            *("batch_size=8", "lr_scheduler=null", "model.lora_rank=4", "~clip_grad_norm"),
            epochs=1,
            lr=0.5,
        )
    )
    assert (run.batch_size, run.gradient_accumulation_steps, run.epochs) == (8, 1, 1)
    assert (run.optimizer["lr"], run.model["lora_rank"]) == (0.5, 4)
    assert not hasattr(run, "clip_grad_norm")
    assert run.lr_scheduler["_component_"] is None


def test_a_config_by_name_and_by_file(draft, cwd):
    run = chosen(draft("dtype=fp32", config="phi3_mini_qlora_1gpu"))
    assert (run.batch_size, run.gradient_accumulation_steps, run.epochs) == (1, 16, 1)
    assert run.model["_component_"].endswith("qlora_phi3")
    (cwd / "my.yaml").write_text(first_run.text_of(draft("dtype=fp32", epochs=7).cfg))
    assert chosen(draft(config="my.yaml")).epochs == 7
    with pytest.raises(ConfigError, match="--config: gone is neither a file nor a config"):
        draft(config="gone")


def test_the_folder_of_a_run_goes_on_with_its_config(draft, cwd):
    (cwd / "out").mkdir()
    (cwd / "out" / "config.yaml").write_text(first_run.text_of(draft("seed=7", epochs=5).cfg))
    again = draft(output_dir="out", epochs=6)
    assert (again.cfg.seed, again.cfg.epochs) == (7, 6)


@pytest.mark.parametrize(
    ("gib", "quantized", "recomputed", "size"),
    [
        (20, False, False, 4),
        (16, False, True, 4),
        (9, True, False, 4),
        (6, True, True, 4),
        (1, True, True, 1),
    ],
)
def test_the_fastest_that_the_memory_allows(draft, monkeypatch, gib, quantized, recomputed, size):
    def estimated(s, *_):
        total = 12 + s.batch_size - 8 * s.model["_component_"].endswith("qlora_phi3")
        total -= 3 if s.enable_activation_checkpointing else 0
        return SimpleNamespace(total=total * 2**30)

    monkeypatch.setattr("phi3_plugin.train.plan.estimated", estimated)
    monkeypatch.setattr("phi3_plugin.train.plan.memory_free_on", lambda *_: gib * 2**30)
    run = chosen(draft("dtype=fp32"))
    assert run.model["_component_"].endswith(".qlora_phi3") == quantized
    assert (run.enable_activation_checkpointing, run.batch_size) == (recomputed, size)
    assert run.batch_size * run.gradient_accumulation_steps == 4
    assert ("IT MAY NOT FIT" in " ".join(run.text.split())) == (gib == 1)
    if gib == 20:
        asked = chosen(draft("dtype=fp32", "enable_activation_checkpointing=True", qlora=True))
        assert asked.model["_component_"].endswith(".qlora_phi3")
        assert asked.enable_activation_checkpointing is True
        assert "QLoRA" in asked.text


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bf16_is_for_processors_that_have_it(draft, monkeypatch, has_bf16):
    monkeypatch.setattr(first_run, "cpu_has_bf16", lambda: has_bf16)
    run = draft()
    why = first_run.choose_precision(run, CPU)
    assert run.cfg.dtype == ("bf16" if has_bf16 else "fp32")
    assert ("no instructions for bf16" in why) == (not has_bf16)
    asked = draft("dtype=bf16")
    assert ("many times faster" in first_run.choose_precision(asked, CPU)) == (not has_bf16)
    assert asked.cfg.dtype == "bf16"


def test_a_card_without_bf16_trains_in_fp16(draft, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    card, run = torch.device("cuda"), draft()
    assert "this card has no instructions for bf16" in first_run.choose_precision(run, card)
    assert run.cfg.dtype == "fp16"
    asked = draft("dtype=bf16")
    assert "dtype=fp16 is faster" in first_run.choose_precision(asked, card)
    assert asked.cfg.dtype == "bf16"
    assert first_run.choose_precision(draft("dtype=fp32"), card) == ""
    whole = draft("model._component_=phi3_plugin.models.phi3")
    first_run.choose_precision(whole, card)
    assert whole.cfg.dtype == "fp32"


def test_a_t4_is_told_of_and_planned_for(draft, monkeypatch):
    asked = []
    monkeypatch.setattr("phi3_plugin.train.world.pick_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (15 << 30, 16 << 30))
    monkeypatch.setattr("phi3_plugin.train.plan.has_flash", lambda device: asked.append(device))
    run = chosen(draft())
    assert "device  Tesla T4, fp16: this card has no instructions for bf16" in run.text
    assert run.dtype == "fp16" and asked[0] == torch.device("cuda", 0)
    assert re.search(r"memory  [\d.]+ GiB predicted at most, 15.0 free", run.text)
    s = run.plan.settings
    half, other, wide = (
        estimated(replace(s, dtype=dtype), CPU, 1, 0).parts for dtype in ("fp16", "bf16", "fp32")
    )
    for part in ("base weights", "optimizer", "activations", "loss"):
        assert half[part] == other[part]
    assert half["base weights"] == wide["base weights"] / 2
    assert half["optimizer"] == wide["optimizer"]
    (_, typed), *_ = first_run.next_commands(s, "base", Path("a"), has_validation=False)
    assert typed.endswith("--dtype fp16")


def test_the_warnings_of_an_inspection(draft):
    text = " ".join(chosen(draft("max_steps=3")).text.split())
    assert "! The whole run makes 3 steps" in text
    assert "repeat an earlier one" in text
    assert "padding" not in text


def test_an_inspection_of_the_run_counts_the_same_steps(draft, cwd, capsys):
    rows = [{"question": f"{n} plus one", "answer": str(n) * (n % 5 + 1)} for n in range(250)]
    (cwd / "many.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    run = draft(source="many.jsonl")
    header = "\n".join(planned(run).lines)
    steps, samples = re.search(r"steps +(\d+) of (\d+) samples", header).groups()
    phi3_inspect_data.main.__wrapped__(run.cfg)
    out = capsys.readouterr().out
    assert f"Training                {steps} steps of {samples} samples" in out
    assert "padding" not in out  # our recipe has none


@pytest.mark.parametrize("word", ["epochs", "epochs 3", "=3"])
def test_a_word_that_is_no_key(draft, word):
    with pytest.raises(ConfigError, match="is no key=value"):
        draft(word)


def test_a_folder_is_named_after_data_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260102-0304")
    assert first_run.folder_for("data/my chats.v2.jsonl.gz") == "my_chats-20260102-0304"
    assert first_run.folder_for("**/*.jsonl") == "_-20260102-0304"
    (tmp_path / "a-20260102-0304").mkdir()
    assert first_run.folder_for("a.csv").startswith("a-20260102-0304-")


def test_print_config_prints_what_runs(draft, capsys):
    draft()
    assert run(options("dtype=fp32", output_dir="out", print_config=True)) == 0
    cfg = OmegaConf.create(capsys.readouterr().out)
    assert settings.read(cfg).gradient_accumulation_steps == 1
    assert not (first_run.Path("out")).exists()


def test_many_processes_are_torchruns(draft, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(cli, "tune", seen.append)
    assert first_run.launched(tmp_path / "config.yaml", 2) == 0
    assert seen[0][:4] == ["run", "--nproc_per_node", "2", "phi3_lora_finetune"]

    def stopped(words):
        raise SystemExit(143)

    monkeypatch.setattr(cli, "tune", stopped)
    assert first_run.launched(tmp_path / "config.yaml", 2) == 143


def test_from_a_file_to_an_adapter_and_on(cwd):
    """What is printed at the end can be typed, and the adapter is better on the rows."""
    words = ("train", "rows.jsonl", "--base", "base", "--output", "my run", "--lr", "2e-3")
    done = warm.run("phi3-tune", *words, "prove=False", cwd=cwd)
    assert done.returncode == 0, done.stderr
    out = cwd / "my run"
    assert sum(step["lr"] > 0 for step in metrics(out)) > 2
    (chat_, evaluate, merge) = [
        shlex.split(line)
        for line in done.stdout.partition("What to type next:")[2].splitlines()
        if line.startswith("  phi3-tune ")
    ]
    done = warm.run(*evaluate, "answers=False", cwd=cwd)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "evaluation" / "results.json").read_text("utf-8"))
    assert results["measures"]["loss"]["verdict"] == "better"
    done = warm.run(*merge, cwd=cwd)
    assert done.returncode == 0 and (out / "merged" / "config.json").is_file(), done.stderr
    done = warm.run(*chat_, cwd=cwd)  # whose input ends at once
    assert done.returncode == 0, done.stderr
    again = warm.run("phi3-tune", *words, cwd=cwd)
    assert again.returncode == 0 and "finished after 30 steps" in again.stdout, again.stderr


def test_what_to_type_after_a_run_that_was_interrupted(tmp_path):
    s = SimpleNamespace(
        output_dir=tmp_path,
        model={"_component_": "phi3_plugin.models.lora_phi3"},
        dtype="bf16",
        dataset={"source": "my chats.csv"},
    )
    of = partial(first_run.next_commands, s, "base", has_validation=True)
    assert [what for what, _ in of(tmp_path / "final")][:2] == [
        *("talk to it", "base and adapter as one model")
    ]
    (tmp_path / "config.yaml").write_text("")
    assert "go on" not in dict(of(tmp_path / "final"))
    typed = dict(of(tmp_path / "step_000004"))
    assert typed["go on"] == f"phi3-tune train 'my chats.csv' --output {tmp_path}"
    assert f"adapter={tmp_path / 'step_000004'}" in typed["base and adapter on what was held out"]


class Screen:
    """A terminal of some columns on which a run writes; says what stood on it in the end."""

    def __init__(self, columns):
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.columns, self.text, self.overwritten = columns, "", []

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return True

    def fileno(self):
        return self.slave

    encoding = "utf-8"

    def lines(self):
        """Play it back: returns, line ends, the cursor up, and the erasing of a line."""
        rows, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|.", self.text, re.DOTALL):
            if part == "\r":
                column = 0
            elif part == "\n":
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            elif part == "\x1b[A":
                row -= 1
            elif part.startswith("\x1b"):
                rows[row] = rows[row][:column]
            else:
                rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in rows]


@pytest.mark.parametrize("columns", [80, 140])
def test_what_is_shown_in_a_terminal_is_clean(draft, columns, monkeypatch):
    draft()  # goes to its folder
    screen = Screen(columns)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    keys = ("val_fraction=0.1", "run_val_every_n_steps=3", "max_steps=6", "save_every_n_steps=2")
    o = options(*keys, "dtype=fp32", "enable_activation_checkpointing=True", output_dir="out")
    code, _ = first_run.train(o, {"memory_budget": None}, is_command=True)
    monkeypatch.undo()
    lines = screen.lines()
    assert code == 0
    assert lines[0].startswith("  model   base")
    header = lines[: next(i for i, line in enumerate(lines) if line.startswith("  memory")) + 1]
    assert all(len(line) < columns for line in header), lines
    # Nothing stands behind a bar, and what is said stands at the beginning of a line
    assert all(line.endswith("tok/s") for line in lines if " tok/s" in line), lines
    said = ("step 3/6  validation loss", "step 6/6  validation loss", "Wrote out/report.html.")
    said += ("final: PEFT loads", "Saved out/final.", "Proof: ", "What to type next:")
    for text in said:
        assert sum(line.startswith(text) for line in lines) == 1, (text, lines)
    known = ("  ", "100%", "step ", *said)
    (proof,) = (i for i, line in enumerate(lines) if line.startswith("Proof: "))
    others = [line for line in lines if line and not line.startswith(known)]
    assert others == (lines[proof + 1 : proof + 2] if columns == 80 else [])  # it is long
    assert all(len(line) <= columns for line in lines), lines
    # The command may be copied over its lines
    typed = "\n".join(lines).replace(" \\\n    ", " ")
    assert "  phi3-tune evaluate --config out/config.yaml adapter=out/final output_dir=" in typed
    assert ("\\" in "".join(lines)) == (columns == 80)
    # What is written stands behind the bar, which is at its end
    (bar,) = (i for i, line in enumerate(lines) if line.startswith("100%"))
    assert lines[bar + 1] == "Wrote out/report.html."
