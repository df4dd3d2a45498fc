"""A layer compiled for GPUs that are not there: Inductor's kernels, by Triton, to machine code.

Forward and backward pass are traced where tensors have no memory, moved to CUDA as graphs, and
lowered there. What asks the driver is answered for it. Needs the package triton, which torch brings
where it is built for CUDA; nothing is run.
"""

import importlib.util
import re
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from phi3_plugin.models.attention import Documents
from phi3_plugin.models.lora_settings import TARGETS, LoRASettings
from phi3_plugin.models.phi3 import MINI, adapted
from phi3_plugin.train.model import prepare
from tests.unit.test_on_cuda import CUDA, guard  # noqa: F401

triton = pytest.importorskip("triton")

CARDS = {"T4": 75, "A100": 80, "H100": 90}
TOKENS = 4096


def graphs(dtype, **settings):
    """Return what one layer of Phi-3-mini computes forward and backward, and from what."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    found = []

    def keep(graph, inputs):
        found.append((graph, inputs))
        return graph

    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    keys = {"apply_lora_to_mlp": True, **settings}
    with torch.device("meta"):
        model = adapted(MINI, LoRASettings(TARGETS, **keys)).to(dtype)
        h = torch.empty(1, TOKENS, MINI.hidden_size, dtype=dtype, requires_grad=True)
        cos = torch.empty(TOKENS, 1, 48, dtype=dtype)
    prepare(model, adapter_dtype="fp32")
    torch.compiler.reset()
    forward = torch.compile(model.layers[1].forward, backend=backend, dynamic=False)
    with patch.object(Documents, "attend", Documents.by_kernel):
        forward(h, attends=Documents((2000, 2096), cos, cos)).sum().backward()
    return found


class Driver:
    """What Triton asks of a card."""

    def __init__(self, capability):
        self.target = triton.backends.compiler.GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def is_active(self):
        return True


@pytest.fixture
def card(request, guard, monkeypatch, tmp_path):  # noqa: F811
    """Let torch and Triton believe in a card of this compute capability."""
    import torch._inductor.scheduler
    from torch._dynamo import device_interface
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.runtime.driver import driver

    major, minor = divmod(request.param, 10)
    properties = SimpleNamespace(
        major=major,
        minor=minor,
        multi_processor_count=132,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        name="a card",
        total_memory=1 << 34,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=65536,
        shared_memory_per_multiprocessor=65536,
        L2_cache_size=1 << 22,
        gcnArchName="",
        is_integrated=0,
    )
    answers = {
        "get_device_properties": properties,
        "get_device_capability": (major, minor),
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(1),
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, partial(lambda answer, *_, **__: answer, answer))
    for name in ("get_device_properties", "current_device", "device_count"):
        answer = staticmethod(getattr(torch.cuda, name))
        monkeypatch.setattr(device_interface.CudaInterface, name, answer)
    known = device_interface.caching_worker_device_properties
    monkeypatch.setitem(known, "cuda", [properties])
    monkeypatch.setattr(torch._inductor.scheduler, "has_triton", lambda: True)
    monkeypatch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    DeviceProperties.create.cache_clear()
    monkeypatch.setattr(driver, "_active", Driver(request.param))
    yield request.param
    for kept in (DeviceProperties.create, torch.utils._triton.has_triton):
        kept.cache_clear()


class Lowered(Exception):
    """Ends the compiler where it would load what it has written."""


def written(graph, inputs, *, is_backward):
    """Return the Python in which Inductor computes a graph on CUDA."""
    from torch._inductor import compile_fx, config
    from torch._inductor.graph import GraphLowering

    def end(lowering, *_):
        raise Lowered(lowering.codegen()[0].value)

    for node in graph.graph.nodes:
        node.kwargs = {key: CUDA if key == "device" else v for key, v in node.kwargs.items()}
        node.args = tuple(CUDA if isinstance(v, torch.device) else v for v in node.args)
    graph.recompile()
    with ExitStack() as stack:
        mode = stack.enter_context(FakeTensorMode())
        there = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA) for x in inputs
        ]
        stack.enter_context(torch._guards.tracing(torch._guards.TracingContext(mode)))
        stack.enter_context(torch._inductor.virtualized.V.set_fake_mode(mode))
        stack.enter_context(config.patch(fx_graph_cache=False, compile_threads=1))
        for name in ("compile_to_module", "_compile_to_module"):
            stack.enter_context(patch.object(GraphLowering, name, end))
        with pytest.raises(torch._inductor.exc.InductorError) as raised:
            compile_fx.compile_fx_inner(graph, there, is_backward=is_backward)
    cause = raised.value
    while not isinstance(cause, Lowered):
        cause = cause.__cause__ or cause.__context__ or pytest.fail(str(raised.value))
    return cause.args[0]


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS, indirect=True)
def test_a_layer_becomes_machine_code(card, tmp_path):
    dtype = torch.float16 if card < 80 else torch.bfloat16
    both = graphs(dtype)
    assert len(both) == 2
    kernels = 0
    for number, (graph, inputs) in enumerate(both):
        code = written(graph, inputs, is_backward=number == 1)
        sources = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.S)
        for name, source in sources:
            file = tmp_path / f"{number}_{name}.py"
            file.write_text(source)
            spec = importlib.util.spec_from_file_location(file.stem, file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            getattr(module, name).precompile(warm_cache_only=True)
        kernels += len(sources)
        # Norm, rotation and SwiGLU are a kernel each: nothing wide is passed over twice
        fused = [name for name, _ in sources if "silu" in name or "rsqrt" in name or "cat" in name]
        assert len(fused) >= 2 and len(sources) <= 12
    targets = [
        re.search(r"\.target (\w+)", file.read_text()).group(1) for file in tmp_path.rglob("*.ptx")
    ]
    assert len(targets) >= kernels > 0
    assert all(target.startswith(f"sm_{card}") for target in targets)
    assert len(list(tmp_path.rglob("*.cubin"))) == len(targets)
