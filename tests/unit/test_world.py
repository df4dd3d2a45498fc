"""One process is the identity; many hold and train what one does."""

import os
import re
import socket
import weakref
from pathlib import Path

import pytest
import torch

from phi3_plugin.errors import CheckpointError, ConfigError
from phi3_plugin.models.nf4 import rows_of
from phi3_plugin.train.losses import SFT
from phi3_plugin.train.model import prepare
from phi3_plugin.train.optimizer import load_optimizer_state, optimizer_state
from phi3_plugin.train.step import train_step
from phi3_plugin.train.world import World
from tests import warm
from tests.chosen import some
from tests.tiny import new_model, rows, tiny_batch, tiny_model

ROOT = Path(__file__).parents[2]


def made():
    return prepare(new_model())


def test_one_process_is_the_identity():
    world, value = World("cpu"), torch.randn(3)
    assert (world.rank, world.size, world.is_main, world.mesh) == (0, 1, True, None)
    assert world.sum(value) is value
    assert world.whole(value) is value
    assert world.gather({"any": "thing"}) == [{"any": "thing"}]
    world.barrier()
    world.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_built_in_its_dtype_and_the_default_is_put_back(dtype):
    world = World("cpu")
    model = world.build(made, dtype)
    weights = tiny_model().state_dict()
    world.load(model, weights)
    assert torch.get_default_dtype() == torch.float32
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(torch.equal(v, weights[n].to(dtype)) for n, v in model.state_dict().items())


def test_a_model_that_cannot_be_built_leaves_the_default_dtype_alone():
    with pytest.raises(ZeroDivisionError):
        World("cpu").build(lambda: 1 / 0, torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


def test_weights_that_do_not_fit_are_refused():
    world, weights = World("cpu"), tiny_model().state_dict()
    del weights["norm.scale"]
    weights["output.weight"] = weights["output.weight"][:1]  # copying would repeat the row
    weights["extra"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as caught:
        world.load(world.build(made, torch.float32), weights)
    text = str(caught.value)
    assert re.search(r"norm\.scale: the model has \(64,\), given is None", text)
    assert re.search(r"output\.weight: the model has \(\d+, 64\), given is \(1, 64\)", text)
    assert re.search(r"extra: the model has None, given is \(3,\)", text)


def test_one_weight_at_a_time_is_in_memory():
    class Stored:
        def __init__(self, value):
            self.value, self.shape, self.dtype = value, value.shape, value.dtype

        def __getitem__(self, rows):
            assert all(read() is None for read in alive)
            value = self.value[rows].clone()
            alive.append(weakref.ref(value))
            return value

    alive, weights, world = [], tiny_model().state_dict(), World("cpu")
    model = world.build(made, torch.float32)
    world.load(model, {n: Stored(v) for n, v in weights.items()})
    assert len(alive) >= len(weights)
    assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())


def test_random_numbers_go_on_where_they_were():
    world = World("cpu")
    torch.manual_seed(3)
    states = world.gather(world.random_state())
    expected = torch.rand(4)
    world.set_random_state(states, seed=9)
    assert torch.equal(torch.rand(4), expected)


def test_another_number_of_processes_draws_other_random_numbers():
    world = World("cpu")
    states = [world.random_state(), world.random_state()]
    world.set_random_state(states, seed=9)
    drawn = torch.rand(4)
    torch.manual_seed(9)
    assert torch.equal(torch.rand(4), drawn)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rows_are_cut_into_equal_chunks_and_what_is_left(rows, size):
    like = torch.empty(0, dtype=torch.bfloat16, device="meta")
    weight = torch.arange(rows * 2.0).reshape(rows, 2)
    parts = [rows_of(weight, like, rank, size, torch.device("cpu")) for rank in range(size)]
    expected = list(weight.to(torch.bfloat16).chunk(size))
    expected += [weight[:0].bfloat16()] * (size - len(expected))
    for part, other in zip(parts, expected, strict=True):
        assert part.dtype == torch.bfloat16
        assert torch.equal(part, other)


@pytest.mark.parametrize(
    ("gpus", "device", "place", "message"),
    [
        (1, "tpu", 0, "device: 'tpu' must be one of 'cpu', 'cuda', 'xpu', 'mps', or null"),
        (0, "cuda", 0, "device: 'cuda' was asked for, but torch sees none. Use 'cpu'"),
        (0, "mps", 0, "device: 'mps' was asked for, but torch sees none. Use 'cpu'"),
        (0, "xpu", 0, "device: 'xpu' was asked for, but torch sees none. Use 'cpu'"),
        (2, None, 2, "--nproc_per_node: process 2 has no GPU of its own, there are 2"),
    ],
)
def test_a_device_that_is_not_there_is_one_clear_line(gpus, device, place, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", str(place))
    with pytest.raises(ConfigError, match=message):
        World(device)


def test_a_variable_that_a_scheduler_left_behind_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2 .* tune run --nproc_per_node 2"):
        World("cpu")


@pytest.mark.parametrize(("size", "replicas"), [(1, 2), (3, 2), (2, 4)])
def test_copies_that_cannot_be_shared_out_are_refused(size, replicas, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    with pytest.raises(ConfigError, match=f"fsdp_replicas: {replicas} copies .* over {size} proc"):
        World("cpu", replicas)


def test_there_is_nothing_to_offload_where_nothing_is_sharded():
    with pytest.raises(ConfigError, match="fsdp_cpu_offload: True needs a model that several"):
        World("cpu").build(made, torch.float32, offload=True)


@pytest.mark.parametrize("device", ["cpu", None])
def test_without_a_gpu_there_is_the_cpu(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert World(device).device == torch.device("cpu")


def test_more_processes_than_gpus_may_share_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert World("cpu").device == torch.device("cpu")


SIZES = some([(3, 1), (2, 2), (4, 2)], [(2, 2)])
"""Processes and the copies of the model they hold. No dimension is a multiple of 3, and A has two
rows: less than one for each of them."""

KINDS = {"lora": {"lora_rank": 2}, "dora": {"lora_rank": 2, "use_dora": True}, "full": {"lora": 0}}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "replicas"), SIZES)
def test_many_processes_hold_and_train_the_weights_of_one(size, replicas):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = "from tests.unit.test_world import one_of_many as one; one({}, {}, {}, {})"
    processes = [
        warm.begin("python", "-c", code.format(rank, port, size, replicas), cwd=ROOT)
        for rank in range(size)
    ]
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error


def one_of_many(rank, port, size, replicas):
    torch.set_num_threads(1)
    alone = {kind: trained(World("cpu"), settings) for kind, settings in KINDS.items()}
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": size, "RANK": rank}
    os.environ.update({name: str(value) for name, value in place.items()})
    world = World("cpu", replicas)
    assert world.gather(rank) == list(range(size))
    assert world.sum(torch.tensor(rank)).item() == sum(range(size))
    assert world.is_main == (rank == 0)
    together = {
        kind: trained(world, KINDS[kind], offload=kind == "full" and size > replicas)
        for kind in KINDS
    }
    for kind in KINDS if rank == 0 else ():
        compare(kind, *alone[kind], *together[kind])
    overflow_together(world)
    world.close()


def overflow_together(world):
    """In fp16 a gradient of the last process alone is too large: all skip the step and scale less.

    What it does after that is what it does without the overflow.
    """
    runs = [scaled(world, broken) for broken in (True, False)]
    (first, *rest), others = (run.pop("results") for run in runs)
    assert first.overflowed and not any(result.overflowed for result in (*rest, *others))
    assert {result.loss_scale for result in rest} == {512.0}
    assert {result.loss_scale for result in others} == {1024.0}
    assert set(world.gather(runs[0].pop("scale"))) == {512.0}
    assert runs[1].pop("scale") == 1024.0
    for name, value in runs[0].items():  # a half is exact, but for what fp16 rounds to zero
        assert (value - runs[1][name]).norm() <= 1e-2 * value.norm(), name


def scaled(world, broken):
    """Make steps over a base in fp16; return what is trained, and results and scale beside it."""

    def make():
        return prepare(new_model(lora_rank=2), adapter_dtype="fp32")

    model = world.build(make, torch.float16)
    world.load(model, tiny_model(lora_rank=2).state_dict())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: world.whole(p.detach()).clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-2)
    scaler, results = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for step in range(3 if broken else 2):
        is_too_much = broken and step == 0 and world.rank == world.size - 1
        loss = (lambda logps, batch: SFT()(logps, batch) * 1e6) if is_too_much else SFT()
        mine = rows(tiny_batch((9, 4, 7, 17, 3, 12)))[world.rank :: world.size]
        results.append(train_step(world, model, optimizer, loss, mine, 1.0, scaler))
        if broken and step == 0:
            assert not optimizer.state and all(
                torch.equal(world.whole(p.detach()), before[name]) for name, p in trained.items()
            )
    after = {name: world.whole(p.detach()).clone() for name, p in trained.items()}
    return {**after, "results": results, "scale": scaler.get_scale()}


def compare(kind, losses, weights, state, again, *others):
    other_losses, other_weights, other_state, other_again = others
    assert other_losses == pytest.approx(losses, rel=1e-6), kind
    for ours, theirs in ((other_weights, weights), (other_state, state), (other_again, again)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert (ours[name] - value).norm() <= 1e-5 * value.norm(), (kind, name)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())


def trained(world, settings, offload=False):
    """Make two steps on six rows; return losses, weights, and the state before and after a load."""

    def make():
        model = new_model(**settings)
        return prepare(model, recompute_every=1)

    model = world.build(make, torch.float32, offload=offload)
    start = tiny_model(**settings).state_dict()
    world.load(model, start, offload=offload)
    for name, parameter in model.named_parameters():
        assert torch.equal(world.whole(parameter.detach()), start[name]), name
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    steps = {(9, 4, 7, 17, 3, 12): SFT(), (5, 6, 7, 8, 9, 10): SFT(label_smoothing=0.1)}
    for lengths, loss in steps.items():
        mine = rows(tiny_batch(lengths))[world.rank :: world.size]
        if loss.label_smoothing:  # rows that count unequally, too
            mine = [{**row, "weights": row["tokens"] / 50} for row in mine]
        losses.append(train_step(world, model, optimizer, loss, mine, 1.0).loss)
    weights = {n: world.whole(p.detach()).clone() for n, p in model.named_parameters()}
    state = optimizer_state(world, model, optimizer)
    fresh = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    # Only the main process has the state; on resume each reads it from the file.
    load_optimizer_state(world, model, fresh, max(world.gather(state), key=len))
    return losses, weights, flat(state), flat(optimizer_state(world, model, fresh))


def flat(state):
    """Return the moments of each parameter; only the main process has them."""
    return {
        f"{name} {moment}": value
        for name, moments in state.get("state", {}).items()
        for moment, value in moments.items()
    }
