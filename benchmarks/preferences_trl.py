"""TRL's side of preferences.py: a program for an environment of its own, which has TRL 1.16.

    python benchmarks/preferences_trl.py job.json

Reads what to train on as tokens, so that nothing but the trainers differs; their losses, their
steps and their metrics are TRL's, unmodified. Writes ``result.json`` and the adapter beside it.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

METRICS = {
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "kl": "kl",
}
"""Names of TRL's, and ours."""


class Recorded:
    """A trainer that takes tokens as they are, and keeps each loss before it is rounded."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def tokenize_row(self, row: dict[str, Any], *_: Any) -> dict[str, Any]:
        """Return tokens and labels under the names of ORPO's and CPO's trainers."""
        prompt = row["prompt_ids"]
        out: dict[str, Any] = {
            "prompt_input_ids": prompt,
            "prompt_attention_mask": [1] * len(prompt),
        }
        for side in ("chosen", "rejected"):
            answer = row[f"{side}_ids"]
            out[f"{side}_input_ids"] = [*prompt, *answer]
            out[f"{side}_attention_mask"] = [1] * (len(prompt) + len(answer))
            out[f"{side}_labels"] = [-100] * len(prompt) + answer
        return out

    def compute_loss(self, *given: Any, **named: Any) -> Any:
        """Compute the loss, and keep it."""
        loss = super().compute_loss(*given, **named)  # type: ignore[misc]
        self.seen = [*getattr(self, "seen", []), float(loss.detach())]
        return loss


class Clock(TrainerCallback):
    """Notes how long each step takes, and waits for a line before it if another is timed too."""

    def __init__(self, waits: bool) -> None:
        self.waits = waits
        self.times: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        if self.waits:
            print("waiting", flush=True)
            input()
        self.begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it."""
        self.times.append(time.perf_counter() - self.begun)
        if self.waits:
            print("step took", self.times[-1], flush=True)


def trainer_of(job: dict[str, Any]) -> tuple[type, type, dict[str, Any]]:
    """Return trainer, configuration and options of a loss."""
    name, options = job["loss"], dict(job["options"])
    if name == "dpo":
        form = options.pop("form", "sigmoid")
        if smoothing := options.pop("label_smoothing", 0.0):
            # The sum of both ways round, as TRL's own "robust" is another formula
            raise ValueError(f"label_smoothing {smoothing} has no counterpart")
        if alpha := options.pop("rpo_alpha", None):
            options |= {"loss_type": [form, "sft"], "loss_weights": [1.0, alpha]}
        else:
            options["loss_type"] = [form]
        return DPOTrainer, DPOConfig, options
    if name == "simpo":
        simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": options.pop("gamma")}
        return CPOTrainer, CPOConfig, {**options, **simpo}
    if name == "orpo":
        return ORPOTrainer, ORPOConfig, options
    return KTOTrainer, KTOConfig, options


def main(file: Path) -> None:
    """Train as a job says."""
    job = json.loads(file.read_text())
    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job["dtype"])
    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype)
    model = PeftModel.from_pretrained(base, job["adapter"], is_trainable=True)
    trainer_class, config_class, options = trainer_of(job)
    trainer_class = type("Trainer", (Recorded, trainer_class), {})
    config = config_class(
        output_dir=str(file.parent / "trl"),
        per_device_train_batch_size=job["batch_size"],
        max_steps=job["steps"],
        learning_rate=job["lr"],
        lr_scheduler_type="cosine",
        warmup_steps=job["warmup"],
        weight_decay=job["weight_decay"],
        max_grad_norm=1.0,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        seed=0,
        gradient_checkpointing=False,
        max_length=None,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        **options,
    )
    clock = Clock(job.get("waits", False))
    trainer = trainer_class(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(job["rows"]),
        processing_class=AutoTokenizer.from_pretrained(job["base"]),
        callbacks=[clock],
    )
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    measures = [
        {ours: line[name] for name, ours in METRICS.items() if name in line} for line in logs
    ]
    trainer.model.save_pretrained(file.parent / "trl")
    result = {"losses": trainer.seen, "measures": measures, "seconds": clock.times}
    (file.parent / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
