"""What torchtune's recipes get: epoch folders that PEFT loads, whole or absent, and a logger."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Phi3ForCausalLM

from phi3_plugin.checkpoint import Phi3Checkpointer
from phi3_plugin.checkpoint.base import load_base_weights, split_weights
from phi3_plugin.checkpoint.peft import export_model
from phi3_plugin.config import read_config
from phi3_plugin.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    MissingFileError,
    OutputError,
)
from phi3_plugin.models import lora_phi3, phi3
from phi3_plugin.models.lora_settings import TARGETS
from phi3_plugin.proof import load_with_peft
from phi3_plugin.train import DiskLogger
from tests.adapters import load_adapter
from tests.oracles import MEDIUM_4K, MINI_4K, TINY_GQA, TINY_MHA, hf_model, save_checkpoint

FORK = multiprocessing.get_context("fork")
STATE = {"optimizer": {"state": {}}, "seed": 7, "epochs_run": 1, "total_epochs": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "base"
    return save_checkpoint(hf_model(MINI_4K, **TINY_MHA), MINI_4K, folder, **TINY_MHA)


def trained_model(base, targets=TARGETS, dtype=torch.float32):
    model = lora_phi3(
        base,
        list(targets),
        apply_lora_to_mlp=bool({"gate_up_proj", "down_proj"} & set(targets)),
        lora_rank=4,
        lora_alpha=12,
    )
    model.load_state_dict(load_base_weights(base), strict=False)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def adapter_of(model):
    return {name: value for name, value in model.state_dict().items() if "lora" in name}


def recipe_dict(model, **state):
    # The stock recipe's list of targets is not true: it adds w1, w2, w3.
    config = {"r": 4, "lora_alpha": 12, "target_modules": ["qkv_proj", "w1"], "peft_type": "LORA"}
    return {"adapter": adapter_of(model), "adapter_config": config, **state}


def saved(base, out, model, epoch=0, intermediate=False, **keys):
    checkpointer = Phi3Checkpointer(base, out, **keys)
    checkpointer.save_checkpoint(
        recipe_dict(model, **(STATE if intermediate else {})), epoch, intermediate
    )
    return out / f"epoch_{epoch}"


@pytest.mark.parametrize(
    ("published", "sizes", "targets"),
    [
        (MINI_4K, TINY_MHA, TARGETS),
        (MEDIUM_4K, TINY_GQA, TARGETS),
        (MINI_4K, TINY_MHA, ("qkv_proj",)),
        (MINI_4K, TINY_MHA, ("o_proj", "down_proj")),
    ],
)
def test_peft_computes_what_was_trained(published, sizes, targets, tmp_path):
    base = save_checkpoint(hf_model(published, **sizes), published, tmp_path / "base", **sizes)
    model = trained_model(base, targets)
    folder = saved(base, tmp_path / "out", model)
    batch = torch.randint(0, 150, (2, 17))
    with torch.no_grad():
        theirs = load_with_peft(base, folder)(input_ids=batch).logits
        torch.testing.assert_close(model(batch), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_comes_back_bit_for_bit(base, dtype, tmp_path):
    model = trained_model(base, dtype=dtype)
    loaded = load_adapter(saved(base, tmp_path / "out", model))
    adapter = adapter_of(model)
    assert loaded.keys() == adapter.keys()
    assert all(torch.equal(loaded[name], adapter[name]) for name in adapter)
    assert all(value.dtype == dtype for value in loaded.values())


def test_the_check_sees_a_tensor_that_finds_no_place(base, tmp_path):
    folder = saved(base, tmp_path / "out", trained_model(base))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.9.mlp.down_proj.lora_A.weight"] = torch.ones(4, 96)
    gone = next(iter(tensors))
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=rf"missing .*{gone}.*unexpected .*layers\.9"):
        load_with_peft(base, folder)


def test_adapter_config_is_read_off_the_tensors(base, tmp_path):
    out = tmp_path / "out"
    folder = saved(base, out, trained_model(base, ("o_proj",)), lora_dropout=0.25)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 12, 0.25)
    assert isinstance(config["lora_alpha"], int)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["task_type"] == "CAUSAL_LM"
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_every_field_of_the_config_is_one_that_peft_knows(base, tmp_path):
    from peft import LoraConfig

    folder = saved(base, tmp_path / "out", trained_model(base))
    keys = json.loads((folder / "adapter_config.json").read_text())
    assert keys.keys() <= LoraConfig().to_dict().keys()


def test_the_base_is_named_by_the_repository_it_came_from(base, tmp_path):
    config = saved(base, tmp_path / "a", trained_model(base)) / "adapter_config.json"
    assert json.loads(config.read_text())["base_model_name_or_path"] == str(base.resolve())
    note = base / "original_repo_id.json"
    note.write_text(json.dumps({"repo_id": "microsoft/Phi-3-mini-4k-instruct"}))
    try:
        folder = saved(base, tmp_path / "b", trained_model(base))
    finally:
        note.unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "microsoft/Phi-3-mini-4k-instruct"
    card = (folder / "README.md").read_text()
    assert "base_model: microsoft/Phi-3-mini-4k-instruct\n" in card
    assert "down_proj, gate_up_proj, o_proj, qkv_proj" in card


def test_the_card_says_what_the_yaml_says(base, tmp_path):
    card = {"data": "a|b.jsonl", "learning rate": 2e-4}
    folder = saved(base, tmp_path / "out", trained_model(base), epoch=2, card=card)
    text = (folder / "README.md").read_text()
    assert "| data | a\\|b.jsonl |\n| learning rate | 0.0002 |\n| epochs trained | 3 |\n" in text


def test_resume_gives_back_state_and_adapter(base, tmp_path):
    model, out = trained_model(base), tmp_path / "out"
    saved(base, out, model, epoch=0, intermediate=True)
    later = trained_model(base)
    resumed = Phi3Checkpointer(base, out, should_load_recipe_state=True)
    resumed.save_checkpoint(recipe_dict(later, **STATE), 1, True)
    loaded = Phi3Checkpointer(base, out, should_load_recipe_state=True).load_checkpoint()
    assert {key: loaded[key] for key in STATE} == STATE
    assert loaded["model"].keys() == {k for k in model.state_dict() if "lora" not in k}
    for name, value in adapter_of(later).items():
        assert torch.equal(loaded["adapter"][name], value)


def test_a_finished_run_is_not_resumed(base, tmp_path):
    model, out = trained_model(base), tmp_path / "out"
    saved(base, out, model, epoch=0)
    with pytest.raises(CheckpointError, match="epoch_0 is the last epoch of a finished run"):
        Phi3Checkpointer(base, out, should_load_recipe_state=True).load_checkpoint()


def test_nothing_to_resume_from(base, tmp_path):
    with pytest.raises(MissingFileError, match=r"no epoch_\* folder to resume from"):
        Phi3Checkpointer(base, tmp_path, should_load_recipe_state=True).load_checkpoint()


def test_a_changed_file_is_noticed(base, tmp_path):
    folder = saved(base, tmp_path / "out", trained_model(base), intermediate=True)
    (folder / "resume" / "state.pt").write_bytes(b"changed")
    with pytest.raises(CheckpointError, match=r"epoch_0 cannot be .*: resume/state\.pt has"):
        Phi3Checkpointer(base, tmp_path / "out", should_load_recipe_state=True).load_checkpoint()


def test_another_runs_checkpoints_are_not_overwritten(base, tmp_path):
    saved(base, tmp_path / "out", trained_model(base))
    with pytest.raises(OutputError, match=r"holds the checkpoints of another run \(epoch_0\)"):
        Phi3Checkpointer(base, tmp_path / "out")


@pytest.mark.parametrize("where", ["file/out", "file"])
def test_an_output_folder_that_cannot_be_written(base, where, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"output_dir: .* cannot be written"):
        Phi3Checkpointer(base, tmp_path / where)


def hold(base, out, held, end):
    """Be a recipe that has made its checkpointer, until told to end."""
    checkpointer = Phi3Checkpointer(base, out)
    held.set()
    end.wait()
    del checkpointer


def test_one_recipe_at_a_time_has_an_output_folder(base, tmp_path, monkeypatch):
    held, end = FORK.Event(), FORK.Event()
    other = FORK.Process(target=hold, args=(base, tmp_path / "out", held, end))
    other.start()
    assert held.wait(60)
    with pytest.raises(OutputError, match=rf"output_dir: .*process {other.pid} on host"):
        Phi3Checkpointer(base, tmp_path / "out")
    with monkeypatch.context() as worker:
        worker.setenv("RANK", "1")  # which writes nothing
        Phi3Checkpointer(base, tmp_path / "out")
    end.set()
    other.join()
    two = [Phi3Checkpointer(base, tmp_path / "out") for _ in range(2)]  # one of a reference model
    saved(base, tmp_path / "out", trained_model(base))
    del two
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["epoch_0"]


def test_checking_the_output_folder_leaves_nothing(base, tmp_path):
    Phi3Checkpointer(base, tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", [".", "out"])
def test_output_inside_the_checkpoint(base, inside):
    with pytest.raises(OutputError, match="is inside checkpoint_dir"):
        Phi3Checkpointer(base, base / inside)


def test_keys_that_are_not_set_or_not_supported(base, tmp_path):
    with pytest.raises(ValueError, match="checkpoint_dir is not set"):
        Phi3Checkpointer(None, tmp_path)
    with pytest.raises(ValueError, match="output_dir is not set"):
        Phi3Checkpointer(base, None)
    with pytest.raises(ValueError, match="save_adapter_weights_only: False"):
        Phi3Checkpointer(base, tmp_path, save_adapter_weights_only=False)


def test_merged_weights_are_not_written_but_the_adapter_is_kept(base, tmp_path):
    model = trained_model(base)
    with pytest.raises(ValueError, match=r"the adapter is in .*epoch_0"):
        Phi3Checkpointer(base, tmp_path).save_checkpoint(recipe_dict(model), 0, False, False)
    assert load_adapter(tmp_path / "epoch_0").keys() == adapter_of(model).keys()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda name, p: p.mul_(float("nan")), "hold NaN or infinite numbers"),
        (lambda name, p: p.zero_() if "lora_b" in name else p, "no optimizer step"),
    ],
)
def test_an_adapter_that_is_nonsense_is_not_saved(base, spoil, message, tmp_path):
    model = trained_model(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                spoil(name, parameter)
    with pytest.raises(AdapterError, match=message):
        saved(base, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_a_folder_left_by_a_killed_run_does_not_count(base, tmp_path):
    (tmp_path / ".partial-epoch_0").mkdir()
    (tmp_path / ".partial-epoch_0" / "adapter_model.safetensors").write_bytes(b"half")
    folder = saved(base, tmp_path, trained_model(base))
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


# All weights, as full fine-tuning, full DPO and QAT give them


def whole_model(base):
    """Return a model that was trained a little, so that it is not the base."""
    model = phi3(base)
    model.load_state_dict(load_base_weights(base))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def saved_whole(base, out, weights, intermediate=False, **keys):
    state = {"model": weights, **(STATE if intermediate else {})}
    Phi3Checkpointer(base, out, **keys).save_checkpoint(state, 0, intermediate)
    return out / "epoch_0"


@pytest.mark.parametrize(
    ("published", "sizes"), [(MINI_4K, TINY_MHA), (MEDIUM_4K, TINY_GQA)], ids=["mini", "medium"]
)
@pytest.mark.parametrize("layout", ["fused", "split"])
def test_transformers_computes_what_was_trained(published, sizes, layout, tmp_path):
    base = save_checkpoint(hf_model(published, **sizes), published, tmp_path / "base", **sizes)
    model = whole_model(base)
    weights = model.state_dict()
    if layout == "split":
        weights = split_weights(weights, read_config(base))
    folder = saved_whole(base, tmp_path / "out", weights, layout=layout)
    theirs, report = Phi3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    batch = torch.randint(0, 150, (2, 17))
    with torch.no_grad():
        ours = model(batch)
        torch.testing.assert_close(ours, theirs(input_ids=batch).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("names", [["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"], []])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_others_load_a_whole_model_in_the_precision_it_was_saved_in(base, names, dtype, tmp_path):
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    config = json.loads((copy / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    (copy / "config.json").write_text(json.dumps({**config, **dict.fromkeys(names, "float16")}))
    (tmp_path / "out").mkdir()
    weights = {name: weight.to(dtype) for name, weight in load_base_weights(base).items()}
    export_model(tmp_path / "out", weights, copy)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    text = str(dtype).removeprefix("torch.")
    assert written == {**config, **dict.fromkeys(names or ["torch_dtype"], text)}
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype is dtype


def test_resume_gives_back_the_trained_weights(base, tmp_path):
    weights = whole_model(base).state_dict()
    saved_whole(base, tmp_path, weights, intermediate=True)
    resumed = Phi3Checkpointer(base, tmp_path, should_load_recipe_state=True)
    loaded = resumed.load_checkpoint()
    assert {key: loaded[key] for key in STATE} == STATE
    assert loaded.keys() == {"model", *STATE}
    assert all(torch.equal(loaded["model"][name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w["norm.scale"].fill_(float("inf")), r"1 of \d+ weights hold NaN.*norm\.scale"),
        (lambda w: w.pop("output.weight"), "missing: output.weight"),
        (lambda w: w.update(score=torch.ones(2)), "unexpected: score"),
    ],
)
def test_weights_that_are_no_phi3_are_not_saved(base, spoil, message, tmp_path):
    weights = {name: value.clone() for name, value in whole_model(base).state_dict().items()}
    spoil(weights)
    with pytest.raises(CheckpointError, match=message):
        saved_whole(base, tmp_path / "out", weights)
    assert not (tmp_path / "out").exists()


# The keys of torchtune's own checkpointers


@pytest.mark.parametrize(
    "files",
    [
        [f"model-0000{i}-of-00003.safetensors" for i in (2, 1, 3)],
        {"filename_format": "model-{}-of-{}.safetensors", "max_filename": "00003"},
    ],
)
def test_a_stock_yaml_needs_another_component_alone(base, files, tmp_path):
    keys = {"checkpoint_files": files, "recipe_checkpoint": None, "adapter_checkpoint": None}
    loaded = Phi3Checkpointer(base, tmp_path, **keys, safe_serialization=True).load_checkpoint()
    assert loaded.keys() == {"model"}


def test_files_of_another_checkpoint_are_refused_before_they_are_read(base, tmp_path):
    checkpointer = Phi3Checkpointer(base, tmp_path, checkpoint_files=["model.bin"])
    with pytest.raises(ConfigError, match=r"checkpoint_files: \['model\.bin'\], but"):
        checkpointer.load_checkpoint()
    with pytest.raises(ConfigError, match="safe_serialization: False"):
        Phi3Checkpointer(base, tmp_path, safe_serialization=False)


def test_a_resume_takes_the_newest_state_and_refuses_another(base, tmp_path):
    saved_whole(base, tmp_path, whole_model(base).state_dict(), intermediate=True)
    for name in ("epoch_0/resume/state.pt", tmp_path / "epoch_0" / "resume" / "state.pt"):
        keys = {"recipe_checkpoint": name, "resume_from_checkpoint": True}
        assert Phi3Checkpointer(base, tmp_path, **keys).load_checkpoint()["seed"] == 7
    for key in ("recipe_checkpoint", "adapter_checkpoint"):
        with pytest.raises(ConfigError, match=rf"checkpointer\.{key}: other\.pt, but a resume"):
            Phi3Checkpointer(base, tmp_path, **{key: "other.pt"}, should_load_recipe_state=True)


def test_the_reference_of_a_resumed_run_may_name_its_folder(base, tmp_path):
    saved_whole(base, tmp_path, whole_model(base).state_dict(), intermediate=True)
    Phi3Checkpointer(base, tmp_path, should_load_recipe_state=True)
    reference = Phi3Checkpointer(base, tmp_path, should_load_recipe_state=False)
    assert torch.equal(
        reference.load_checkpoint()["model"]["norm.scale"], load_base_weights(base)["norm.scale"]
    )


# The logger


def test_nothing_is_written_before_the_first_step(tmp_path):
    logger = DiskLogger(tmp_path / "out")
    logger.log_config(OmegaConf.create({"output_dir": str(tmp_path / "out")}))
    logger.close()
    assert list(tmp_path.iterdir()) == []


def test_steps_and_settings_are_written(tmp_path):
    logger = DiskLogger(tmp_path)
    more = {"api_key": "hunter2", "hf_token": "${oc.env:TOKEN}", "auth": "${oc.env:A,hunter2}"}
    config = {"output_dir": "${base}", "base": str(tmp_path), "seed": 3, "logger": more}
    logger.log_config(OmegaConf.create(config))
    logger.log_dict({"loss": 1.5, "lr": 0.1}, step=1)
    logger.log("loss", 1.25, step=2)
    logger.close()
    (file,) = (tmp_path / "logs").iterdir()
    assert file.read_text() == "Step 1 | loss:1.5 lr:0.1 \nStep 2 | loss:1.25\n"
    kept = (tmp_path / "torchtune_config.yaml").read_text()
    assert "seed: 3" in kept and "output_dir: ${base}" in kept and "${oc.env:TOKEN}" in kept
    assert "hunter2" not in kept


def test_a_log_on_a_full_disk_is_one_error_and_no_half_line(tmp_path, monkeypatch):
    logger = DiskLogger(tmp_path)
    logger.log("loss", 1.5, step=1)
    (file,) = (tmp_path / "logs").iterdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("phi3_plugin.train.stock.append_whole", full)
    with pytest.raises(OutputError, match="logs could not be written to: No space left on device"):
        logger.log_dict({"loss": 1.25}, step=2)
    logger.close()
    assert file.read_text() == "Step 1 | loss:1.5\n"


def test_no_output_folder_is_left_to_the_checkpointer_to_refuse():
    DiskLogger(None).log_config(OmegaConf.create({"output_dir": None}))
