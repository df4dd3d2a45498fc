"""Models and adapters in transformers + PEFT, from 4.43 + 0.10 on."""

import torch
from jobs import Answer, answer, greedy
from transformers import AutoModelForCausalLM


def run(job: dict) -> Answer:
    """Load a model, put the adapter into it, and choose without a cache."""
    model = AutoModelForCausalLM.from_pretrained(job["model"]).float()
    if job["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    model.eval()

    def logits_of(ids: list[int]) -> list[float]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        return logits[0, -1].tolist()

    return greedy(job, logits_of)


answer(run)
