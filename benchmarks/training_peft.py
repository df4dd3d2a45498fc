"""What training.py compares ours with, on top of transformers: PEFT, and TRL's trainer."""

import tempfile
from typing import Any

import torch
from load_memory import TARGETS
from torch import Tensor, nn
from torchtune.data import padded_collate_sft
from training_cases import ALPHA, RANK, Case, Samples, Setup, Skipped, adamw, pack

from phi3_plugin.checkpoint.base import to_peft
from phi3_plugin.models.phi3 import PRECISIONS


# Shapes: B batch, S sequence
def peft(setup: Setup, packed: bool = False) -> Case:
    """PEFT on transformers with sdpa attention: padded right, or packed in one row."""
    model = peft_model(setup)
    optimizer = adamw(model.parameters())
    if setup.compiled:  # as torchtune and we do: all 32 layers at once take minutes to start
        for layer in model.get_base_model().model.layers:
            layer.compile()

    def step(samples: Samples) -> float:
        loss = model(**inputs(samples, setup, packed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Case(model, step)


def inputs(samples: Samples, setup: Setup, packed: bool) -> dict[str, Tensor]:
    """Return what transformers' model takes.

    Without a mask it tells packed documents by positions that start again.

    Returns:
        ``input_ids`` and ``labels``, each ``[B, S]``, with ``position_ids`` or ``attention_mask``.
    """
    if packed:
        row = pack(samples, setup.size, setup.pad)
        batch = {key: row[key][None] for key in ("tokens", "labels")}
        batch["position_ids"] = row["input_pos"][None]
    else:
        batch = padded_collate_sft(samples, setup.pad)
        lengths = torch.tensor([len(sample["tokens"]) for sample in samples])
        places = torch.arange(batch["tokens"].shape[1])
        batch["attention_mask"] = (places < lengths[:, None]).long()
    batch["input_ids"] = batch.pop("tokens")
    return {key: value.to(setup.device) for key, value in batch.items()}


def peft_model(setup: Setup) -> nn.Module:
    """Return PEFT's model, ready to be trained."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    base = transformers_model(setup)
    if setup.recompute:  # PEFT sees that, and lets the embedding's output need a gradient
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora, autocast_adapter_dtype=setup.adapter_dtype == "fp32")
    set_peft_model_state_dict(model, {to_peft(n): value for n, value in setup.adapter.items()})
    return model.train()


def transformers_model(setup: Setup) -> Any:
    """Return transformers' model without adapters; it shares the base weights."""
    from transformers import AutoModelForCausalLM, Phi3Config

    if setup.liger:
        use_liger()
    keys = {key: value for key, value in setup.keys.items() if key != "model_type"}
    how: dict[str, Any] = {"dtype": PRECISIONS[setup.dtype], "attn_implementation": "sdpa"}
    with setup.device:
        model = AutoModelForCausalLM.from_config(Phi3Config(**keys, use_cache=False), **how)
    model.load_state_dict(setup.base, assign=True)
    if setup.quantize:
        quantize(model, setup.device)
    return model


def use_liger() -> None:
    """Let transformers compute Phi-3 with Liger's kernels, in this process from here on."""
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_phi3
    except ImportError as error:
        raise Skipped(f"--liger: {error}") from error
    apply_liger_kernel_to_phi3()


def quantize(model: Any, device: torch.device) -> None:
    """Put the linear layers of the blocks into bitsandbytes' NF4, doubly quantized as ours."""
    if device.type != "cuda":
        raise Skipped("bitsandbytes' NF4 is compared on a GPU only")
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise Skipped(f"--quantize: {error}") from error
    for block in model.model.layers:
        for name, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear):
                sizes = linear.in_features, linear.out_features
                dtype: Any = {"compute_dtype": torch.bfloat16, "quant_type": "nf4"}
                small = bnb.nn.Linear4bit(*sizes, bias=False, **dtype, device="meta")
                values = linear.weight.detach().cpu()
                small.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4")
                block.set_submodule(name, small.to(device))  # which quantizes
    model.is_loaded_in_4bit = True


def trl(setup: Setup) -> Case:
    """TRL's supervised trainer over the same model, padded right."""
    try:
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise Skipped(f"trl: {error}") from error
    if setup.quantize or setup.compiled or setup.dtype != "bf16":
        raise Skipped("trl is compared in bf16 and not compiled")
    model = peft_model(setup)
    config = SFTConfig(
        tempfile.gettempdir(),  # nothing is written
        bf16=False,  # the model is in bf16, and there is nothing to autocast
        max_length=None,
        report_to="none",
        use_cpu=setup.device.type == "cpu",
        gradient_checkpointing=setup.recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    tokenizer = AutoTokenizer.from_pretrained(setup.folder)
    nothing = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    trainer = SFTTrainer(model, config, train_dataset=nothing, processing_class=tokenizer)
    optimizer = adamw(model.parameters())
    trainer.current_gradient_accumulation_steps = 1  # what its own loop sets

    def step(samples: Samples) -> float:
        loss = trainer.training_step(model, inputs(samples, setup, packed=False))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Case(model, step)
