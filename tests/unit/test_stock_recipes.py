"""torchtune's recipes with our parts: what would fail or mislead is refused at the start."""

from pathlib import Path

import pytest
import torch
import torchtune
from omegaconf import OmegaConf
from torchtune.training.quantization import Int8DynActInt4WeightQATQuantizer

from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.errors import ConfigError
from phi3_plugin.models import phi3
from phi3_plugin.models.lora import Linear
from phi3_plugin.train.stock_recipes import checked, problems
from tests.oracles import MINI_4K, TINY_MHA, hf_model, save_checkpoint

RECIPES = Path(torchtune.__file__).parents[1] / "recipes"
OURS = {
    "model": {"_component_": "phi3_plugin.models.lora_phi3"},
    "checkpointer": {
        "_component_": "phi3_plugin.checkpoint.Phi3Checkpointer",
        "output_dir": "out",
    },
    "dataset": {"_component_": "torchtune.datasets.preference_dataset"},
    "save_adapter_weights_only": True,
}


def of(recipe, **keys):
    return problems((RECIPES / f"{recipe}.py").read_text(), {**OURS, **keys})


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """Let the recipes that need one not be refused for its absence."""
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)


SERVED = [
    "lora_finetune_single_device",
    "lora_finetune_distributed",
    "lora_dpo_single_device",
    "lora_dpo_distributed",
    "knowledge_distillation_single_device",
    "knowledge_distillation_distributed",
    "full_finetune_single_device",
    "full_finetune_distributed",
    "full_dpo_distributed",
    "ppo_full_finetune_single_device",
    "qat_distributed",
    "generate",
    "quantize",
    "eleuther_eval",
    "dev/lora_finetune_distributed_multi_dataset",
    "dev/early_exit_finetune_distributed",
]


@pytest.mark.parametrize("recipe", SERVED)
def test_what_serves_is_not_refused(recipe):
    assert of(recipe) == []


DORA = {"model": {**OURS["model"], "use_dora": True}}
CHATS, ANSWERS = (
    {"_component_": f"phi3_plugin.data.{name}_dataset"} for name in ("chat", "preference")
)
PPO = "ppo_full_finetune_single_device"
REWARD = {**OURS["checkpointer"], "model_type": "REWARD", "output_dir": "out/value"}
OWN_LOSS = {"_component_": "phi3_plugin.train.losses.dpo"}
SMOOTHED = {"_component_": "phi3_plugin.train.losses.sft", "label_smoothing": 0.1}
NF4 = {"model": {**OURS["model"], "quantize_base": True}}


@pytest.mark.parametrize(
    ("recipe", "keys", "message"),
    [
        ("lora_dpo_single_device", {"save_adapter_weights_only": False}, "save_adapter_weights"),
        ("lora_finetune_distributed", {"save_adapter_weights_only": None}, "save_adapter_weights"),
        ("lora_dpo_single_device", {"dataset": CHATS}, "gives one answer a row"),
        ("lora_finetune_distributed", {"dataset": ANSWERS}, "gives two answers a row"),
        ("lora_dpo_single_device", {"loss": OWN_LOSS}, "Use torchtune.rlhf.loss.DPOLoss"),
        ("lora_finetune_single_device", {"loss": SMOOTHED}, "Use torchtune.modules.loss.CE"),
        ("lora_dpo_single_device", DORA, "never sets the magnitudes"),
        ("full_finetune_single_device", NF4, "NF4 cannot be trained"),
        ("full_finetune_distributed", {"tensor_parallel_dim": 2}, "tensor_parallel_plan"),
        ("dev/generate_v2_distributed", {}, "tensor_parallel_plan"),
        ("full_finetune_distributed", {"enable_async_checkpointing": True}, "enable_async"),
        ("qat_lora_finetune_distributed", {}, "QATLoRALinear"),
        ("dev/early_exit_finetune_distributed", {"early_exit_loss": {"scale": 1}}, "reshard"),
        (PPO, {"value_checkpointer": {**REWARD, "model_type": "PHI3_MINI"}}, "Set it to REWARD"),
        (PPO, {"value_checkpointer": {**REWARD, "output_dir": "out"}}, "another folder"),
        (PPO, {"dataset": CHATS}, "wants prompts"),
    ],
)
def test_what_would_fail_or_mislead_is_refused(recipe, keys, message):
    (problem,) = of(recipe, **keys)
    assert message in problem


@pytest.mark.parametrize("recipe", ["lora_finetune_single_device", "lora_dpo_distributed"])
def test_where_magnitudes_are_set_dora_is_trained(recipe):
    assert of(recipe, **DORA) == of(recipe, **NF4) == []


def test_it_is_said_in_the_place_of_the_first_step(tmp_path):
    file = tmp_path / "mine.py"  # a copy, which is judged by what it does
    file.write_text("def main(cfg):\n    raise SystemExit('trains')\n# get_merged_lora_ckpt\n")
    names = {}
    exec(compile(file.read_text(), file, "exec"), names)
    main = checked(names["main"])
    with pytest.raises(ConfigError, match="mine: save_adapter_weights_only is not True"):
        main(OmegaConf.create({**OURS, "save_adapter_weights_only": False}))
    for cfg in (OURS, {"model": {"_component_": "torchtune.models.phi3.phi3_mini"}}):
        with pytest.raises(SystemExit, match="trains"):
            main(OmegaConf.create(cfg))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qat") / "base"
    return save_checkpoint(hf_model(MINI_4K, **TINY_MHA), MINI_4K, folder, **TINY_MHA)


def test_a_group_that_divides_no_width_is_refused_for_qat(base):
    model = {"_component_": "phi3_plugin.models.phi3", "checkpoint_dir": str(base)}
    quantizer = {"_component_": "torchao.quantization.qat.Int8DynActInt4WeightQATQuantizer"}
    messages = of("qat_distributed", model=model, quantizer=quantizer)
    assert [message.split(" of ")[0] for message in messages] == [
        f"quantizer.groupsize: 256 does not divide {name} {TINY_MHA[name]}"
        for name in ("hidden_size", "intermediate_size")
    ]
    assert of("qat_distributed", model=model, quantizer={**quantizer, "groupsize": 32}) == []


def test_torchao_quantizes_every_linear_layer_in_qat(base):
    model = phi3(base)
    model.load_state_dict(load_base_weights(base))
    linears = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    names = model.state_dict().keys()
    batch = torch.randint(0, 150, (2, 9))
    exact = model(batch)
    prepared = Int8DynActInt4WeightQATQuantizer(groupsize=32).prepare(model)
    assert linears == {
        name for name, module in prepared.named_modules() if "QAT" in type(module).__name__
    }
    assert prepared.state_dict().keys() == names
    loss = prepared(batch).float()
    assert 0 < (loss - exact).abs().max() < 1
    loss.sum().backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())
