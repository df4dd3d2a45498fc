"""A dry run on CUDA without CUDA: shapes, dtypes and devices of all that a GPU would compute.

Under torch's FakeTensorMode a tensor has a device and no numbers, so that nothing takes memory and
the widths are the published ones. An index left on the CPU, two devices in one product, a kernel
told the wrong shapes: all are errors there as on a GPU. Two things are missing where torch was
built for the CPU. The guards by which C++ chooses a device are two lines that a compiler makes.
And the autograd engine asks for a real accelerator, so our own backward functions, which alone may
confuse devices, are called by hand.
"""

import ctypes
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torchtune.training import set_default_dtype

import phi3_plugin
from phi3_plugin.config import parse_config
from phi3_plugin.models import attention, nf4
from phi3_plugin.models.cache import serve
from phi3_plugin.models.lora_settings import TARGETS, LoRASettings
from phi3_plugin.models.new_tokens import add_new_tokens
from phi3_plugin.models.nf4 import rows_of
from phi3_plugin.models.phi3 import adapted
from phi3_plugin.models.recorded import Recorded
from phi3_plugin.teacher import load_teacher
from phi3_plugin.train import losses
from phi3_plugin.train.data import instantiate
from phi3_plugin.train.losses import SFT
from phi3_plugin.train.model import prepare
from phi3_plugin.train.optimizer import for_gpu, linear_with_warmup, parameter_groups
from phi3_plugin.train.step import StepResult, loss_scaler, train_step, with_targets
from phi3_plugin.train.world import World, exact
from tests.chosen import some
from tests.family import VARIANTS, published

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
C10_REGISTER_GUARD_IMPL(MPS, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::MPS>)
C10_REGISTER_GUARD_IMPL(XPU, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::XPU>)
"""

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="session")
def guard(tmp_path_factory):
    """Let C++ choose a device that is not there."""
    if torch.cuda.is_available():
        return
    compiler = shutil.which("c++") or pytest.skip("there is no C++ compiler")
    folder, torch_folder = tmp_path_factory.mktemp("guard"), Path(torch.__file__).parent
    (folder / "guard.cpp").write_text(GUARD)
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"]
    files = ["guard.cpp", "-o", "guard.so", f"-L{torch_folder / 'lib'}", "-lc10"]
    subprocess.run([compiler, *options, *files], cwd=folder, check=True, capture_output=True)
    ctypes.CDLL(str(folder / "guard.so"))


@pytest.fixture
def backward(guard, monkeypatch):
    """Run each of our functions forward and backward by hand; return the names of those that ran.

    A gradient must be where its input is, in its shape and dtype.
    """
    ran = set()

    def by_hand(function):
        def apply(*inputs):
            needed = [torch.is_tensor(x) and x.requires_grad for x in inputs]
            ctx = SimpleNamespace(needs_input_grad=needed)
            ctx.mark_dirty = lambda *_: None
            ctx.save_for_backward = lambda *saved: setattr(ctx, "saved_tensors", saved)
            with torch.no_grad():
                out = function.forward(ctx, *inputs)
                if not any(needed):
                    return out
                grads = function.backward(ctx, torch.empty_like(out))
            grads = grads if isinstance(grads, tuple) else (grads,)
            for x, needs, grad in zip(inputs, needed, grads, strict=True):
                if needs:
                    about = [(value.device, value.shape, value.dtype) for value in (x, grad)]
                    assert about[0] == about[1], function.__name__
            ran.add(function.__name__)
            return out.requires_grad_()

        return apply

    for function in own_functions():
        monkeypatch.setattr(function, "apply", by_hand(function))

    def gradients(_outputs, inputs, _grads=None, **_options):
        several = isinstance(inputs, tuple)
        found = tuple(torch.empty_like(x) for x in (inputs if several else (inputs,)))
        return found

    monkeypatch.setattr(torch.autograd, "grad", gradients)
    return ran


def own_functions():
    found = torch.autograd.Function.__subclasses__()
    return [function for function in found if function.__module__.startswith("phi3_plugin.")]


@contextmanager
def fake():
    """Compute without numbers; what is kept from call to call is forgotten afterwards."""
    try:
        # torch's fake tensors cannot be pinned, and no event is there to be recorded
        pinned = patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor)
        with pinned, patch("torch.Event"), FakeTensorMode() as mode:
            yield mode
    finally:
        nf4._memory.of.clear()
        for kept in (attention.causal_band, attention._windowed_blocks, nf4._fours):
            kept.cache_clear()


def a_model(
    variant="mini-4k",
    dtype=torch.bfloat16,
    *,
    targets=TARGETS,
    new_tokens=(),
    neftune_alpha=None,
    **settings,
):
    """Build two layers of a checkpoint's own widths there, ready to be trained."""
    config = parse_config({**published(variant), "num_hidden_layers": 2})
    keys = {"apply_lora_to_mlp": True, **settings}
    with set_default_dtype(dtype), CUDA:  # as World.build does
        model = adapted(config, LoRASettings(targets, **keys))
        if new_tokens:
            add_new_tokens(model, new_tokens)
        return prepare(model, adapter_dtype="fp32", neftune_alpha=neftune_alpha)


def a_batch():
    """Return two documents in one row, as a step hands them to the model."""
    tokens = torch.arange(100)[None]
    labels = torch.where(tokens % 3 == 0, tokens, -100)
    batch = with_targets({"tokens": tokens, "labels": labels})
    return {**batch, "lengths": (60, 40)}


def faked(mode, batch):
    """Return a batch on the CPU without its numbers."""
    return tree_map_only(torch.Tensor, mode.from_tensor, batch)


WAYS = {
    "lora": {},
    "dropout": {"lora_dropout": 0.1},
    "qlora": {"quantize_base": True},
    "dora": {"use_dora": True},
    "qdora": {"use_dora": True, "quantize_base": True},
    "other layers in NF4": {
        "targets": ["o_proj"],
        "quantize_base": True,
        "apply_lora_to_mlp": False,
    },
    "parts": {"targets": ["q_proj", "v_proj", "up_proj", "o_proj", "down_proj"]},
    "head": {"apply_lora_to_output": True},
    "embedding": {"apply_lora_to_embedding": True},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-4}


class NoWaits(TorchDispatchMode):
    """Finds what makes Python wait for a GPU; numbers and sizes that it has are errors anyhow."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        tensors = filter(torch.is_tensor, tree_leaves((args, kwargs, out)))
        if len({x.device for x in tensors if x.dim()}) > 1:  # without dimensions it is a number
            assert kwargs.get("non_blocking"), function
        if function is torch.ops.aten.segment_reduce.default:
            assert kwargs["unsafe"], "it looks whether the lengths add up"
        return out


def train(mode, model, batch, loss=None, teacher=None, **optimizer):
    """Make a step, but for the way back through torch's own operations; on CUDA without a wait."""
    world = World("cpu")
    world.device = CUDA
    section = {**ADAMW, **optimizer}
    groups = parameter_groups(model, 1e-4, 16.0)
    made = instantiate(section, groups, **for_gpu(section, groups))
    schedule = linear_with_warmup(made, 10)
    trained = [p for group in groups for p in group["params"]]

    def backward(loss):
        assert (loss.device, loss.dtype, loss.requires_grad) == (CUDA, torch.float32, True)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)

    is_cuda, half = CUDA.type == "cuda", model.norm.scale.dtype == torch.float16
    with patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False):
        scaler = loss_scaler("fp16" if half else "bf16", CUDA)
    watched = NoWaits() if is_cuda else patch.object(StepResult, "moved", True)
    with patch.object(torch.Tensor, "backward", backward), watched:
        given = made, loss or SFT(), [faked(mode, batch)], 1.0
        result = train_step(world, model, *given, scaler, teacher)
        schedule.step()
    assert scaler.is_enabled() == result.is_scaled == half
    assert result.tokens == len(batch["targets"])
    kept = [v for state in made.state.values() for v in state.values()]
    assert {x.device for x in (*kept, *trained) if x.dim() or is_cuda} == {CUDA}


EXACTLY = pytest.param(torch.float32, id="fp32", marks=pytest.mark.exhaustive)
QUICK = ("phi-4-mini", "medium-128k")
"""Tied and with partial rotation; grouped heads and LongRoPE; mini-4k is that of the steps."""
HALF = pytest.param(torch.float16, id="fp16", marks=pytest.mark.exhaustive)
PRECISIONS = [pytest.param(torch.bfloat16, id="bf16"), HALF, EXACTLY]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("way", WAYS)
def test_a_step(backward, way, dtype):
    batch = a_batch()
    with fake() as mode:
        model = a_model(dtype=dtype, **WAYS[way])
        tensors = [*model.parameters(), *model.buffers()]
        assert {x.device for x in tensors} == {CUDA}
        train(mode, model, batch)
    expected = {function.__name__ for function in own_functions()}
    expected -= {"_FrozenHead" if way in ("head", "whole") else "_TrainedHead"}
    expected -= {"_NF4Linear"} if way != "other layers in NF4" else set()
    assert backward == expected


@pytest.mark.parametrize("way", ["qdora", "head"])
def test_a_step_in_fp16(backward, way):
    """Its scale is found, and grows and shrinks, without a wait."""
    test_a_step(backward, way, torch.float16)


@pytest.mark.parametrize("variant", some(VARIANTS, QUICK))
def test_a_step_of_each_checkpoint(backward, variant):
    batch = a_batch()
    with fake() as mode:
        train(mode, a_model(variant), batch)


@pytest.mark.parametrize("name", [kind.__name__ for kind in losses.Preference.__subclasses__()])
def test_a_step_over_answers(backward, name):
    loss = getattr(losses, name)()
    batch = {**a_batch(), "wanted": torch.tensor([True, False])}
    batch["labelled"] = torch.tensor([20, 13])
    batch["mismatched"] = {**batch} if loss.mismatched else None
    with fake() as mode:
        train(mode, a_model(), batch, loss)


def test_a_step_with_noise_smoothing_and_new_tokens(backward):
    batch = a_batch()
    with fake() as mode:
        model = a_model(new_tokens=range(32011, 32020), neftune_alpha=5.0)
        train(mode, model, batch, SFT(label_smoothing=0.1))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_step_that_learns_from_the_base(backward, temperature):
    batch, loss = a_batch(), losses.Distill(temperature=temperature)
    of = SimpleNamespace(teacher_dir=None, teacher_adapter=None)
    with fake() as mode:
        model = a_model()
        train(mode, model, batch, loss, load_teacher(World("cpu"), of, loss, model))


@pytest.mark.parametrize("asked", [{"fused": False}, {"_component_": "torch.optim.SGD"}])
def test_others_look_before_they_step(backward, asked):
    batch = a_batch()
    with fake() as mode, pytest.raises(DataDependentOutputException):
        train(mode, a_model(), batch, **asked)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["lora", "qlora", "dora"])
def test_a_real_step_waits_for_nothing_and_can_be_left_out(way):
    world, model = World("cuda"), a_model(**WAYS[way])
    groups = parameter_groups(model, 1e-4, None)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, **for_gpu(ADAMW, groups))
    batch = a_batch()

    def step(loss):
        return train_step(world, model, optimizer, loss, [batch], 1.0)

    def weights():
        return [p.detach().clone() for group in groups for p in group["params"]]

    assert step(SFT()).moved  # which also sets up what is set up once
    before = weights()
    torch.cuda.set_sync_debug_mode("error")
    try:
        left_out = step(lambda logps, batch: logps.sum() * torch.nan)
        made = step(SFT())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not left_out.moved and made.moved
    assert all(state["step"] == 2 for state in optimizer.state.values())
    assert any(not torch.equal(*pair) for pair in zip(before, weights(), strict=True))


class NoDoubles(TorchDispatchMode):
    """Finds fp64, which Apple's GPUs do not have."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            assert not torch.is_tensor(tensor) or tensor.dtype != torch.float64, function
        return out


@pytest.mark.parametrize("way", ["lora", "qdora"])
@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_a_step_on_another_device(backward, monkeypatch, kind, way):
    if getattr(torch, kind).is_available():
        pytest.skip("there is a real one")
    monkeypatch.setattr(sys.modules[__name__], "CUDA", torch.device(kind, 0))
    # Their attention is not in torch as it is built for the CPU
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q))
    batch, watched = a_batch(), NoDoubles() if kind == "mps" else nullcontext()
    with fake() as mode, watched:
        train(mode, a_model(**WAYS[way]), batch)
        assert exact(CUDA) == (torch.float32 if kind == "mps" else torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_documents_take_the_kernel_that_knows_their_dtype(guard, monkeypatch, dtype):
    asked = []
    monkeypatch.setattr(attention.Documents, "by_kernel", lambda *_: asked.append(1))
    with fake():
        qkv = torch.empty(1, 50, 96, 96, dtype=dtype, device=CUDA)
        attention.Documents((20, 30), qkv, qkv).attend(qkv, [32, 32, 32], 2047)
    assert bool(asked) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("variant", some(VARIANTS, QUICK))
@pytest.mark.parametrize(
    "quantize", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["plain", "nf4"]
)
@torch.no_grad()
def test_answers(guard, variant, dtype, quantize):
    """Prompts side by side, then a token for each of them, then one of them read on."""
    with fake():
        model = a_model(variant, dtype, quantize_base=quantize).eval()
        serve(model)
        cache = model.cache(2)
        for rows, lengths in [((0, 1), (7, 2100)), ((0, 1), (1, 1)), ((1,), (3,))]:
            step = model.step(cache, rows, lengths)
            tokens = torch.zeros(1, sum(lengths), dtype=torch.int64, device=CUDA)
            logits = model(tokens, step=step)
            assert (logits.device, len(logits)) == (CUDA, len(rows))
        with NoWaits():  # which a graph could not record
            logits = Recorded(model, cache).compute()
        assert (logits.device, len(logits)) == (CUDA, 2)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("quantize", [False, True], ids=["plain", "nf4"])
def test_weights_are_put_there(guard, quantize, stored):
    with fake():
        model = a_model(quantize_base=quantize)
        layer = model.layers[0].attn.qkv_proj.weight.detach()
        weight = torch.empty(layer.shape, dtype=stored, device="cpu")
        assert rows_of(weight, layer, 0, 1, CUDA).device == CUDA
        if not quantize:  # of a shard, whose rows are made anew
            assert rows_of(weight, layer.to("meta"), 1, 2, CUDA).device == CUDA


@pytest.mark.parametrize("window", [None, 2047])
def test_a_block_mask(guard, monkeypatch, window):
    """torchtune packs with one on a GPU."""
    monkeypatch.setattr(attention, "_flex", lambda device: attention.flex_attention)
    with fake():
        mask = attention.create_block_mask(causal, 1, None, 3000, 3000, device=CUDA)
        seen = attention.windowed(mask, 3000, 3000, 0, window, CUDA)
        assert seen.kv_num_blocks.device == CUDA


def causal(batch, head, query, key):
    return query >= key


ELSEWHERE = {
    "settings.py": "what a YAML may say; asks torch whether there is a GPU",
    "options.py": "the text of an option",
    "load.py": "a docstring",
    "api.py": "a docstring",
    "first_run.py": "whether a plan for a GPU is asked for",
    "train/step.py": "tells torch's scaler of losses where it is",
    "models/recorded.py": "records a graph of what the tests above run",
    "train/compiled.py": "whether layers are compiled on CUDA",
    "train/monitor.py": "asks the allocator for its peak",
    "train/world.py": "chooses the device, and names it to NCCL, to the mesh and to its generator",
    "train/plan.py": "asks the driver what memory is free, and waits for a step that it tries",
    "pages/report.py": "the name of the card",
    "checkpoint/files.py": "what was read is on the CPU",
    "generate.py": "the kind of device for which autocast is off",
}
"""Files that ask for the device and compute nothing by it that could be run without one."""

BRANCHES = {
    "device.py": ['device.type == "cuda"'],
    "models/nf4.py": ["DEQUANTIZED_AT_ONCE if codes", "if codes.device.type"],
    "models/logps.py": ["few = max(IN_CACHE"],
    "models/attention.py": [
        *("_flex(q.device.type)", 'if device.type != "cuda"', "get_device_capability"),
        "if gqa and q.is_cuda",
    ],
    "models/cache.py": ["twice = q.shape[2] == 1", "plain = weight.device.type"],
}
"""Those that decide how something is computed; the tests above run them."""


def test_every_place_that_asks_for_the_device_is_known():
    folder = Path(phi3_plugin.__file__).parent
    found = {}
    for file in folder.rglob("*.py"):
        lines = file.read_text("utf-8").splitlines()
        asks = [line for line in lines if re.search(r"cuda|device\.type", line)]
        if asks:
            found[file.relative_to(folder).as_posix()] = asks
    assert found.keys() == ELSEWHERE.keys() | BRANCHES.keys()
    for file, pieces in BRANCHES.items():
        assert len(found[file]) == len(pieces), found[file]
        assert all(piece in line for piece, line in zip(pieces, found[file], strict=True))
