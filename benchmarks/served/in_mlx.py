"""Models in MLX, merged or with an adapter of its own form."""

from pathlib import Path

import mlx.core as mx
from jobs import Answer, answer, greedy
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_adapters, load_model


def run(job: dict) -> Answer:
    """Load a model and choose, with a cache."""
    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(job["model"]))
    if job["adapter"]:
        model = load_adapters(model, job["adapter"])
    cache = make_prompt_cache(model)
    read = 0

    def logits_of(ids: list[int]) -> list[float]:
        nonlocal read
        logits = model(mx.array([ids[read:]]), cache=cache)[0, -1]
        read = len(ids)
        return logits.astype(mx.float32).tolist()

    return greedy(job, logits_of)


answer(run)
