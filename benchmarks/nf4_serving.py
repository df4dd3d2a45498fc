"""What it costs to serve an adapter that was trained over an NF4 base on another base.

    python benchmarks/nf4_serving.py [--layers 2] [--checkpoint DIR]

An adapter is trained for a few steps over our NF4 base. Then its logits are compared on the
same held-out rows with the same adapter on: our own dequantized NF4 weights in transformers
(the proof that nothing else differs), the original weights, and bitsandbytes' NF4 of the same
weights if that package is installed. Without a checkpoint folder the base has Phi-3-mini's width
and random weights, so the size of the differences is what to look at, not the loss.
Prints one row a base; asserts nothing.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phi3_plugin.checkpoint.base import load_base_weights, to_hf, to_peft
from phi3_plugin.models import qlora_phi3

TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
RANK, ALPHA, STEPS, BATCH, LENGTH = 16, 32, 8, 2, 64
STD = 0.02


def main() -> None:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2, help="layers of the random base")
    parser.add_argument("--checkpoint", type=Path, help="a Phi-3 folder instead of random weights")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.checkpoint or random_base(Path(scratch), options.layers)
        model, hf = trained(folder), load_hf(folder)
        rows = batch(model.tok_embeddings.num_embeddings)
        reference = probabilities(model, rows)
        compare("ours: NF4 base + adapter", reference, reference)
        compare(
            "transformers: our dequantized NF4 + adapter", on_base(hf, model, True, rows), reference
        )
        compare(
            "transformers: original weights + adapter", on_base(hf, model, False, rows), reference
        )
        compare("transformers: bitsandbytes NF4 + adapter", on_bnb(hf, model, rows), reference)


def random_base(folder: Path, layers: int) -> Path:
    """Write a random checkpoint of Phi-3-mini's width."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(num_hidden_layers=layers, sliding_window=2047, initializer_range=STD)
    Phi3ForCausalLM(config).bfloat16().save_pretrained(folder)
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


def load_hf(folder: Path) -> nn.Module:
    """Return the base as transformers loads it, fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def batch(vocabulary: int) -> Tensor:
    """Return a repetitive sequence a row, so that there is something to learn."""
    generator = torch.Generator().manual_seed(len(TARGETS))
    pattern = torch.randint(0, vocabulary, (BATCH, 8), generator=generator)
    return pattern.repeat(1, LENGTH // 8)


def trained(folder: Path) -> nn.Module:
    """Return our QLoRA model after a few steps."""
    model = qlora_phi3(folder, TARGETS, True, lora_rank=RANK, lora_alpha=ALPHA)
    model.load_state_dict(load_base_weights(folder), strict=False)
    adapter = [p for n, p in model.named_parameters() if "lora" in n]
    model.requires_grad_(False)
    for parameter in adapter:
        parameter.requires_grad_(True)
    optimizer, rows = (
        torch.optim.AdamW(adapter, lr=1e-3),
        batch(model.tok_embeddings.num_embeddings),
    )
    for _ in range(STEPS):
        loss = F.cross_entropy(model(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained {STEPS} steps, last loss {loss.item():.3f}")
    return model.eval()


def on_base(hf: nn.Module, model: nn.Module, dequantized: bool, rows: Tensor) -> Tensor:
    """Return logits of the adapter over plain weights in transformers + PEFT."""
    base = copy.deepcopy(hf)
    if dequantized:
        state = {to_hf(n): v for n, v in model.state_dict().items() if "lora" not in n}
        base.load_state_dict(state)
    return probabilities(with_adapter(base, model), rows)


def on_bnb(hf: nn.Module, model: nn.Module, rows: Tensor) -> Tensor | None:
    """Return logits of the adapter over bitsandbytes' NF4 of the same weights."""
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        return None
    base = copy.deepcopy(hf)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if any(target in name for target in TARGETS):
                packed, state = bnb.quantize_4bit(
                    parameter, blocksize=64, compress_statistics=True, quant_type="nf4"
                )
                parameter.copy_(bnb.dequantize_4bit(packed, state))
    return probabilities(with_adapter(base, model), rows)


def with_adapter(base: nn.Module, model: nn.Module) -> nn.Module:
    """Put our adapter on a transformers model with PEFT."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    twin = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    adapter = {to_peft(n): v for n, v in model.state_dict().items() if "lora" in n}
    set_peft_model_state_dict(twin, adapter)
    return twin.eval()


@torch.no_grad()
def probabilities(model: nn.Module, rows: Tensor) -> Tensor:
    """Return logits ``[B, S, V]``."""
    out = model(rows)
    return (out if isinstance(out, Tensor) else out.logits).float()


def compare(name: str, logits: Tensor | None, reference: Tensor) -> None:
    """Print how far logits are from what was trained."""
    if logits is None:
        print(f"{name:48} not installed")
        return
    error = (logits - reference).abs()
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    same = (logits.argmax(-1) == reference.argmax(-1)).float().mean()
    print(
        f"{name:48} max {error.max():9.2e}  mean {error.mean():9.2e}  "
        f"logits' std {reference.std():.2f}  KL {divergence:9.2e}  same top token {same:6.1%}"
    )


if __name__ == "__main__":
    main()
