"""Our model beside PEFT's, with equal weights in both."""

from copy import deepcopy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from phi3_plugin.checkpoint.base import load_base_weights, to_peft
from phi3_plugin.models import lora_phi3
from phi3_plugin.models.lora_settings import TARGETS
from phi3_plugin.train.model import prepare
from tests.oracles import MEDIUM_4K, MINI_4K, TINY_GQA, TINY_MHA, hf_model, save_checkpoint

SMALL = {"num_hidden_layers": 2}
FAMILIES = {
    "mini": (MINI_4K, {**TINY_MHA, **SMALL}),
    "gqa": (MEDIUM_4K, {**TINY_GQA, **SMALL}),
    "tied": (MEDIUM_4K, {**TINY_GQA, **SMALL, "tie_word_embeddings": True}),
}
"""Names and what :func:`tests.oracles.hf_model` takes."""

BATCH = torch.randint(0, 149, (2, 17), generator=torch.Generator().manual_seed(0))


def base_of(family: str, folder: Path) -> tuple[nn.Module, Path]:
    """Return transformers' model and its folder."""
    published, sizes = FAMILIES[family]
    model = hf_model(published, **sizes)
    return model, save_checkpoint(model, published, folder, **sizes)


def ours(folder: Path, targets=TARGETS, **keys) -> nn.Module:
    """Return our model, loaded and knowing what is trained, at the adapters' start."""
    mlp = bool({"gate_up_proj", "down_proj", "gate_proj", "up_proj"} & set(targets))
    model = lora_phi3(folder, list(targets), mlp, **{"lora_rank": 4, "lora_alpha": 12, **keys})
    model.load_state_dict(load_base_weights(folder), strict=False)
    return prepare(model).eval()


def train_by_hand(model: nn.Module) -> None:
    """Give everything that is trained other values."""
    torch.manual_seed(1)
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= torch.rand_like(parameter) + 0.5
            elif parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def twin(hf: nn.Module, model: nn.Module, targets=TARGETS, **keys) -> nn.Module:
    """Return PEFT's model with our trained values."""
    config = {"r": 4, "lora_alpha": 12, "target_modules": list(targets), **keys}
    theirs = get_peft_model(deepcopy(hf), LoraConfig(**config))
    values = {to_peft(n): p.detach().clone() for n, p in trained(model).items()}
    result = set_peft_model_state_dict(theirs, values)
    assert not result.unexpected_keys
    return theirs.eval()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def in_file(name: str) -> str:
    """Return the name in a file of PEFT's for that of a parameter of its model."""
    for inner in (".modules_to_save.default", ".default"):
        name = name.replace(inner, "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def assert_same(model: nn.Module, theirs: nn.Module) -> None:
    """Compare logits and the gradient of everything that is trained."""
    logits = model(BATCH), theirs(input_ids=BATCH, use_cache=False).logits
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    for out in logits:
        out.square().mean().backward()
    expected = {in_file(n): p.grad for n, p in trained(theirs).items()}
    found: dict[str, Tensor] = {to_peft(n): p.grad for n, p in trained(model).items()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert (grad - expected[name]).norm() <= 2e-5 * expected[name].norm(), name


def kept_by(make) -> list[int]:
    """Return the number of values of each tensor that is kept for the backward pass."""
    sizes = []
    hooks = (lambda t: sizes.append(t.numel()) or t), (lambda t: t)
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        make()
    return sizes
