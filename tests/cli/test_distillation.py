"""Distillation as its users type it: what it prints, writes and refuses."""

import json
import math

import pytest
from phi3_plugin.recipes import phi3_demo_checkpoint

from tests.own import TINY, WORDS, own_run, tiny_inputs

pytestmark = pytest.mark.slow

RUN = ("--config", "phi3_mini_distill", *TINY, "teacher_dir=teacher", "output_dir=out")


@pytest.fixture
def cwd(tmp_path):
    tiny_inputs(tmp_path, rows=20)
    phi3_demo_checkpoint.build_checkpoint(tmp_path / "teacher", words=WORDS, layers=1)
    return tmp_path


def test_both_parts_of_the_loss_are_told(cwd):
    settings = ("val_fraction=0.2", "batch_size=4", "gradient_accumulation_steps=2")
    done = own_run(*RUN, *settings, "teacher_quantized=True", "kd_ratio=0.25", cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    out = cwd / "out"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    (validation,) = (line for line in lines if "val_loss" in line)
    assert validation["val_perplexity"] == pytest.approx(math.exp(validation["val_sft_loss"]))
    assert validation["val_tokens"] > 0
    steps = [line for line in lines if "loss" in line]
    for line, prefix in [*((line, "") for line in steps), (validation, "val_")]:
        both = 0.25 * line[f"{prefix}kl"] + 0.75 * line[f"{prefix}sft_loss"]
        assert line[f"{prefix}loss"] == pytest.approx(both, rel=1e-6)
    assert f"kl {steps[0]['kl']:.3g}  sft {steps[0]['sft_loss']:.3g}" in done.stderr
    page = (out / "report.html").read_text("utf-8")
    assert "KL divergence" in page and "Cross entropy" in page and "Its KL divergence" in page
    assert "| teacher | teacher |" in (out / "final" / "README.md").read_text("utf-8")


def test_a_plan_has_the_teacher(cwd):
    done = own_run(*RUN, "plan=true", cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    assert any(line.split()[:1] == ["teacher"] for line in done.stdout.splitlines())
    assert not (cwd / "out").exists()


def test_a_teacher_of_another_vocabulary_is_one_line(cwd):
    phi3_demo_checkpoint.build_checkpoint(cwd / "other", words=[*WORDS[:-1], "eight"], layers=1)
    done = own_run(*RUN, "teacher_dir=other", cwd=cwd)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "teacher_dir: other has another vocabulary than the student: token " in done.stderr
