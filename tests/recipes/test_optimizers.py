"""Optimizers chosen by name: they learn as AdamW does, and resumed runs end in the same bits."""

import os
import shutil
import sys

import pytest
import torch
from omegaconf import OmegaConf

from phi3_plugin import settings as strict
from phi3_plugin.errors import CheckpointError, ConfigError
from tests.own import (
    CONFIG,
    RUN,
    assert_same_end,
    leave_until,
    lines,
    merged,
    metrics,
    own_run,
    tiny_inputs,
    train,
)

pytestmark = pytest.mark.slow

TORCHAO = pytest.param(
    "torchao.optim.AdamW8bit",
    id="torchao",
    marks=pytest.mark.skipif(
        shutil.which(os.environ.get("CXX", "g++")) is None,
        reason="torchao compiles its step, and there is no C++ compiler",
    ),
)
BITSANDBYTES = pytest.param("bitsandbytes.optim.AdamW8bit", id="bitsandbytes")
PAGED = pytest.param(
    "bitsandbytes.optim.PagedAdamW8bit",
    id="paged",
    marks=pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
)


def using(component):
    if component.startswith("bitsandbytes."):
        pytest.importorskip("bitsandbytes")
    return f"optimizer._component_={component}"


def held(state):
    """Return the bytes of the tensors in a state."""
    if isinstance(state, dict):
        return sum(held(value) for key, value in state.items() if key != "step")
    if hasattr(state, "__tensor_flatten__"):
        return sum(held(getattr(state, part)) for part in state.__tensor_flatten__()[0])
    return state.nbytes if isinstance(state, torch.Tensor) else 0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The rank is 16 and the width 256: A and B have 4096 values or more, so 8 bits hold them."""
    folder = tiny_inputs(tmp_path_factory.mktemp("inputs"), 40)
    cfg = OmegaConf.load(CONFIG)
    del cfg.optimizer["fused"]  # which only torch's own optimizers have
    OmegaConf.save(cfg, folder / "plain.yaml")
    return folder


@pytest.fixture(scope="module")
def adamw(inputs):
    """Train with torch's AdamW, 9 steps, and return what was measured."""
    recipe = train(inputs, config=inputs / "plain.yaml")
    assert recipe.s.optimizer["_component_"] == "torch.optim.AdamW"
    assert {held(state) / p.numel() for p, state in recipe.optimizer.state.items()} == {8}
    return metrics(inputs / "out")


@pytest.fixture
def cwd(inputs, tmp_path):
    for name in ("base", "rows.jsonl", "plain.yaml"):
        (tmp_path / name).symlink_to(inputs / name)
    return tmp_path


def learned(found, expected, rtol):
    """Compare the losses of two runs, and the rates that their steps had."""
    for one, other in zip(found, expected, strict=True):
        assert one["lr"] == pytest.approx(other["lr"], rel=1e-6)
        assert one["loss"] == pytest.approx(other["loss"], rel=rtol), one["step"]


def test_fused_adamw_is_adamw(adamw, cwd):
    recipe = train(cwd)
    assert recipe.s.optimizer["fused"] is True
    learned(metrics(cwd / "out"), adamw, 1e-6)


@pytest.mark.parametrize("component", [TORCHAO, BITSANDBYTES])
def test_eight_bits_learn_what_adamw_learns(component, adamw, cwd):
    recipe = train(cwd, using(component), config=cwd / "plain.yaml")
    found = metrics(cwd / "out")
    assert found[-1]["loss"] < 0.6 * found[0]["loss"]
    learned(found, adamw, 2e-3)
    # One byte a value and moment; in layers this small the tables of 1 KB weigh half a byte.
    sizes = [held(state) / p.numel() for p, state in recipe.optimizer.state.items()]
    assert len(sizes) == 32
    assert max(sizes) < 2.6


@pytest.mark.parametrize("component", [TORCHAO, BITSANDBYTES, PAGED])
def test_a_resumed_run_ends_in_the_same_bits(component, cwd):
    """The first checkpoint is written while training goes on: it must own what it writes."""
    settings = (using(component), "lora_plus_ratio=4", "epochs=1", "save_in_background=True")
    train(cwd, *settings, "output_dir=whole", config=cwd / "plain.yaml")
    leave_until(1, cwd / "whole", cwd / "out")
    recipe = train(cwd, *settings, "resume=auto", config=cwd / "plain.yaml")
    assert recipe.last.folder.name == "step_000001"
    slow, fast = (group["lr"] for group in recipe.optimizer.param_groups)
    assert float(fast) == pytest.approx(4 * float(slow))
    assert_same_end(cwd / "out", cwd / "whole")


def two_processes(cwd, *settings):
    own = ("--config", "plain.yaml", *RUN, "gradient_accumulation_steps=1", "epochs=1")
    done = own_run(*own, *settings, cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "unwaited collective" not in done.stderr


@pytest.mark.parametrize("component", [TORCHAO, BITSANDBYTES])
@pytest.mark.exhaustive
def test_two_processes_do_too(component, cwd):
    settings = (using(component), f"fsdp_replicas={1 if 'torchao' in component else 2}")
    two_processes(cwd, *settings, "output_dir=whole")
    leave_until(2, cwd / "whole", cwd / "out")
    two_processes(cwd, *settings, "resume=auto")
    assert_same_end(cwd / "out", cwd / "whole")


@pytest.mark.exhaustive
@pytest.mark.parametrize("component", [TORCHAO])
def test_one_process_goes_on_where_two_stopped(component, cwd):
    """With whole tensors instead of halves, more of which are large enough for 8 bits."""
    no_dropout = (using(component), "model.lora_dropout=0.0")
    two_processes(cwd, *no_dropout, "output_dir=two")
    leave_until(1, cwd / "two", cwd / "out")
    train(cwd, *no_dropout, "epochs=1", "resume=auto", config=cwd / "plain.yaml")
    ours, theirs = (lines(cwd / name) for name in ("out", "two"))
    assert len(ours) == len(theirs) == 3 + 2
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("component", [TORCHAO, PAGED])
def test_eight_bits_on_a_gpu(component, adamw, cwd):
    settings = (using(component), "device=cuda", "model.lora_dropout=0.0")
    train(cwd, *settings, "output_dir=whole", config=cwd / "plain.yaml")
    found = metrics(cwd / "whole")
    assert found[-1]["loss"] < 0.6 * found[0]["loss"]
    leave_until(4, cwd / "whole", cwd / "out")
    train(cwd, *settings, "resume=auto", config=cwd / "plain.yaml")
    assert metrics(cwd / "out")[-1]["loss"] == pytest.approx(found[-1]["loss"], rel=1e-3)


def test_another_optimizer_does_not_go_on(inputs, adamw, cwd):
    leave_until(2, inputs / "out", cwd / "out")
    with pytest.raises(
        CheckpointError, match=r"resume: the optimizer would change from torch\.\S+"
    ):
        train(
            cwd, "optimizer._component_=torch.optim.RAdam", "resume=auto", config=cwd / "plain.yaml"
        )


def problems(cwd, component):
    override = f"optimizer._component_={component}"
    cfg = merged(*RUN, override, cwd=cwd, config=cwd / "plain.yaml")
    with pytest.raises(ConfigError) as raised:
        strict.read(cfg)
    return str(raised.value)


def test_a_package_that_is_not_installed_is_one_clear_line(cwd, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (line,) = problems(cwd, "bitsandbytes.optim.AdamW8bit").splitlines()
    assert line.startswith(
        "optimizer._component_: 'bitsandbytes.optim.AdamW8bit' cannot be imported. "
    )


def test_bitsandbytes_is_refused_where_processes_share_weights(cwd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = problems(cwd, "bitsandbytes.optim.AdamW8bit").splitlines()[-1]
    assert "cannot update weights that processes share. Set fsdp_replicas=2, or use" in line
