import pytest
import torch

from phi3_plugin.errors import CheckpointError, ConfigError
from phi3_plugin.train.optimizer import check_shards, check_state, copied, filled, set_rates


class Low(torch.optim.SGD):
    block_size = 256


def made(kind=Low, shape=(6, 4096), dtype=torch.float32):
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    return kind([parameter], lr=0.1), [("layer.lora_a.weight", parameter)]


def test_states_that_cannot_be_shared_out_evenly_are_refused():
    for shards in (1, 2, 3, 6):
        check_shards(*made(), shards)
    with pytest.raises(ConfigError, match=r"over 4 processes: layer\.lora_a\.weight has 6 rows"):
        check_shards(*made(), 4)


def test_states_of_bf16_cannot_be_shared_out():
    optimizer, names = made(dtype=torch.bfloat16)
    check_shards(optimizer, names, 1)
    with pytest.raises(ConfigError, match=r"weight is torch\.bfloat16\. Set adapter_dtype=fp32"):
        check_shards(optimizer, names, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stays_in_full_precision_may_be_shared_out_anyhow(dtype):
    check_shards(*made(shape=(6, 64), dtype=dtype), 4)
    check_shards(*made(torch.optim.SGD, dtype=dtype), 4)
    optimizer, names = made(dtype=dtype)
    names[0][1].requires_grad_(False)
    check_shards(optimizer, names, 4)


def test_another_optimizer_is_refused():
    optimizer, _ = made(torch.optim.SGD)
    check_state(optimizer, {}, {"kind": "torch.optim.sgd.SGD", "state": {}})
    check_state(optimizer, {}, {"state": {}})
    with pytest.raises(CheckpointError, match=r"would change from a\.B to torch\.optim\.sgd\.SGD"):
        check_state(optimizer, {}, {"kind": "a.B", "state": {}})


def test_a_state_of_another_size_is_refused():
    optimizer, names = made()
    saved = {names[0][0]: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3, 64)}}
    with pytest.raises(CheckpointError, match=r"is \(3, 64\), but the model has"):
        check_state(optimizer, dict(names), {"state": saved})


def test_a_rate_stays_what_it_was():
    optimizer, _ = made()
    set_rates(optimizer, [0.5])
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    set_rates(optimizer, [0.5])
    assert torch.equal(optimizer.param_groups[0]["lr"], torch.tensor(0.5))


def test_a_copy_owns_its_tensors():
    state = {"a": {"moment": torch.ones(2), "step": 3}, "groups": [{"lr": torch.tensor(1.0)}]}
    copy = copied(state, lambda value: value, keep=True)
    state["a"]["moment"].zero_()
    state["groups"][0]["lr"].zero_()
    assert copy == {"a": {"moment": copy["a"]["moment"], "step": 3}, "groups": [{"lr": 1.0}]}
    assert copy["a"]["moment"].tolist() == [1, 1]
    nothing = copied(state, lambda value: value, keep=False)
    assert nothing == {"a": {"moment": None, "step": 3}, "groups": [{"lr": None}]}


def test_each_value_is_filled_into_its_place():
    own = {"a": {"moment": 1, "step": 2}}
    saved = {"a": {"moment": 10, "step": 20, "more": 30}}
    found = filled(own, saved, lambda place, value: (place, value))
    assert found == {"a": {"moment": (1, 10), "step": (2, 20), "more": (None, 30)}}
