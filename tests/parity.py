"""Whether two runs are the same, and whether PEFT computes what was trained."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.checkpoint.check import load_with_peft
from phi3_plugin.checkpoint.peft import export_model, load_trained
from phi3_plugin.models import lora_phi3
from phi3_plugin.models.lora_settings import TARGETS
from tests.own import metrics

VARIANTS = {
    "lora": (),
    "dora": ("model.use_dora=True",),
    "qlora": ("model.quantize_base=True",),
    "qdora": ("model.quantize_base=True", "model.use_dora=True"),
}


def same_losses(ours: Iterable[float], theirs: Iterable[float], rtol: float = 1e-6) -> None:
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one == pytest.approx(other, rel=rtol), f"step {step}"


def same_weights(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Compare norms: where B started at zero, single elements differ by AdamW's noise."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


def losses(folder) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


def peft_agrees(
    cwd: Path,
    folder: Path,
    names: Sequence[str] = TARGETS,
    *,
    dora: bool = False,
    quantized: bool = False,
) -> float:
    """Compare logits over our base weights, which are dequantized where ours are NF4.

    Returns how far the adapter moves them from the base's.
    """
    keys = {"lora_rank": 16, "lora_alpha": 32, "use_dora": dora, "quantize_base": quantized}
    ours = lora_phi3(cwd / "base", list(names), True, **keys).eval()
    weights = load_base_weights(cwd / "base")
    ours.load_state_dict({**weights, **load_trained(folder, cwd / "base")})
    (cwd / "as_computed").mkdir()
    state = ours.state_dict()
    export_model(cwd / "as_computed", {name: state[name] for name in weights}, cwd / "base")
    peft = load_with_peft(cwd / "as_computed", folder)
    batch = torch.randint(0, 400, (2, 30))
    with torch.no_grad():
        theirs = peft(input_ids=batch).logits
        torch.testing.assert_close(ours(batch), theirs, rtol=0, atol=1e-5)
        with peft.disable_adapter():
            return (peft(input_ids=batch).logits - theirs).abs().max().item()
