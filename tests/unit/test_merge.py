"""Merging is exact, refuses what does not fit, and is whole or not there."""

import json

import pytest
import torch
from safetensors.torch import load_file

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.base import load_base_weights, open_weights
from phi3_plugin.checkpoint.merge import merge_into
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError, OutputError
from phi3_plugin.models import qlora_phi3
from phi3_plugin.proof import load_base_with_hf
from tests.adapters import WHOLE, adapter, base_folder
from tests.oracles import MINI_4K, TINY_MHA, hf_model, save_checkpoint

R, ALPHA = 3, 6


@pytest.fixture(scope="module")
def mha(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mha") / "base"
    return save_checkpoint(hf_model(MINI_4K, **TINY_MHA), MINI_4K, folder, **TINY_MHA)


def random_adapter(base, module="layers.1.mlp.down_proj", **more):
    shape = open_weights(base)[f"{module}.weight"].shape
    torch.manual_seed(3)
    tensors = {
        f"{module}.lora_a.weight": torch.randn(R, shape[1]),
        f"{module}.lora_b.weight": torch.randn(shape[0], R),
    }
    return Adapter(tensors, {module: 0.7}, **more)


@pytest.mark.parametrize("dtype", [None, "bf16", "fp32"])
@pytest.mark.parametrize("of_base", [torch.bfloat16, torch.float32])
def test_sums_are_rounded_once_and_the_rest_is_copied(tmp_path, dtype, of_base):
    model = hf_model(MINI_4K, **TINY_MHA).to(of_base)
    base = save_checkpoint(model, MINI_4K, tmp_path / "base", **TINY_MHA)
    adapter = random_adapter(base)
    report = merge_into(tmp_path / "out", base, adapter, dtype=dtype)
    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32, None: of_base}[dtype]
    assert report.dtype == str(wanted).removeprefix("torch.")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == report.dtype and "dtype" not in config
    old, new = load_base_weights(base), load_base_weights(tmp_path / "out")
    a, b = adapter.tensors.values()
    name = "layers.1.mlp.down_proj.weight"
    for key, value in old.items():
        expected = torch.addmm(value.float(), b, a, alpha=0.7) if key == name else value
        assert torch.equal(new[key], expected.to(wanted)), key


def test_dtype_keeps_the_name_it_has_and_remote_code_is_not_named(mha, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in mha.iterdir():
        (base / file.name).symlink_to(file)
    keys = json.loads((mha / "config.json").read_text())
    keys["dtype"] = keys.pop("torch_dtype")
    (base / "config.json").unlink()
    (base / "config.json").write_text(json.dumps({**keys, "auto_map": {"AutoConfig": "x.Y"}}))
    merge_into(tmp_path / "out", base, random_adapter(mha))
    found = json.loads((tmp_path / "out/config.json").read_text())
    assert found == {**keys, "dtype": "float32"}
    stops = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert stops["eos_token_id"] == [150]


def test_shards_hold_the_same_weights(mha, tmp_path):
    for name, size, shards in (("few", 1 << 30, 1), ("many", 100_000, 7)):
        merge_into(tmp_path / name, mha, random_adapter(mha), shard_bytes=size)
        assert len(list((tmp_path / name).glob("*.safetensors"))) == shards
    one, other = (load_base_weights(tmp_path / name) for name in ("few", "many"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


NF4_SIZES = {**TINY_MHA, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


def test_on_nf4_it_is_the_model_that_was_trained(tmp_path):
    base = save_checkpoint(hf_model(MINI_4K, **NF4_SIZES), MINI_4K, tmp_path / "base", **NF4_SIZES)
    model = qlora_phi3(base, ["qkv_proj"], False, lora_rank=R, lora_alpha=ALPHA)
    model.load_state_dict(load_base_weights(base), strict=False)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapter = Adapter.of({n: p.detach() for n, p in model.named_parameters() if "lora" in n}, 2.0)
    nf4 = {n: p.to(torch.float32) for n, p in model.named_parameters() if "_proj.weight" in n}
    report = merge_into(tmp_path / "out", base, adapter, onto="nf4")
    batch = torch.randint(0, 150, (2, 17))
    with torch.no_grad():
        found = load_base_with_hf(tmp_path / "out")(input_ids=batch).logits
        torch.testing.assert_close(found, model.eval()(batch), rtol=0, atol=1e-5)
    merge_into(tmp_path / "plain", base, adapter)
    one, other = (load_base_weights(tmp_path / name) for name in ("plain", "out"))
    far = [(one[n] - other[n]).abs() for n in nf4]
    size = [one[n].abs() for n in nf4]
    largest = max(t.max() for t in far) / max(t.max() for t in size)
    mean = sum(t.sum() for t in far) / sum(t.sum() for t in size)
    assert report.difference.largest == pytest.approx(largest.item(), rel=1e-4)
    assert report.difference.mean == pytest.approx(mean.item(), rel=1e-4)
    assert 0.01 < report.difference.mean < 0.2
    for name in ("tok_embeddings.weight", "output.weight", "norm.scale"):
        assert torch.equal(one[name], other[name])


NAME = "layers.1.mlp.down_proj"
A, B = f"{NAME}.lora_a.weight", f"{NAME}.lora_b.weight"


def test_outputs_are_checked_first(mha, tmp_path):
    adapter = random_adapter(mha)
    with pytest.raises(OutputError, match="exists and would be overwritten"):
        merge_into(tmp_path, mha, adapter)
    with pytest.raises(OutputError, match="is inside checkpoint_dir"):
        merge_into(mha / "out", mha, adapter)


def test_nothing_is_left_of_a_merge_that_fails(mha, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("phi3_plugin.checkpoint.base.save_tensors", fails)
    with pytest.raises(OutputError, match="disk full"):
        merge_into(tmp_path / "out", mha, random_adapter(mha))
    assert not list(tmp_path.iterdir())


def test_rows_of_zeros_have_no_norm_to_set(tmp_path):
    model = hf_model(MINI_4K, **TINY_MHA)
    model.model.layers[1].mlp.down_proj.weight.data[5] = 0
    base = save_checkpoint(model, MINI_4K, tmp_path / "base", **TINY_MHA)
    adapter = random_adapter(base)
    tensors = {**adapter.tensors, B: adapter.tensors[B].clone()}
    tensors[f"{NAME}.magnitude"] = torch.ones(64)
    merge_into(tmp_path / "moved", base, Adapter(tensors, adapter.scales))
    tensors[B][5] = 0
    with pytest.raises(AdapterError, match="weights that are all zero in this base"):
        merge_into(tmp_path / "out", base, Adapter(tensors, adapter.scales))
    assert not (tmp_path / "out").exists()


def test_files_are_those_of_transformers(mha, tmp_path):
    merge_into(tmp_path / "out", mha, random_adapter(mha))
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} <= files
    names = load_file(tmp_path / "out/model-00001-of-00001.safetensors").keys()
    assert names == {name for file in mha.glob("*.safetensors") for name in load_file(file)}


def test_the_card_says_base_adapter_and_how(tmp_path):
    base = base_folder("mini", tmp_path / "base")
    (base / "original_repo_id.json").write_text('{"repo_id": "some/base"}')
    given = adapter(read_config(base), WHOLE, ranks=(4, 2), dora=True)
    merge_into(tmp_path / "out", base, given, dtype="bf16", card={"made from": "epoch_0"})
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: some/base\nlibrary_name: transformers\n")
    assert "# some/base with a DoRA merged into it" in card
    targets = "down_proj, gate_up_proj, o_proj, qkv_proj"
    assert f"| adapter | a DoRA of rank 2 or 4 on {targets} |" in card
    assert "| made from | epoch_0 |\n| weights | bfloat16 |" in card
    assert "| merged into | the base model |" in card
