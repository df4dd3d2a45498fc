"""What a training step costs at least, and how fast this machine multiplies matrices.

LoRA needs of each weight of a linear layer 4 FLOP a token: 2 forward, 2 for the gradient of its
input; 2 more where all layers are recomputed. The head counts for labelled tokens only, and the
first qkv_proj passes no gradient on, since nothing below it is trained. Adapters and attention
are left out; so this is a little less than what any program must do.

The rate is that of the matrix products themselves, on the model's own shapes and at the number
of tokens in use: the time of the best of several runs of each, all FLOP over all seconds.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phi3_plugin.checkpoint.base import expected_shapes
from phi3_plugin.config import parse_config
from phi3_plugin.data.collate import concatenate
from phi3_plugin.train.step import with_targets

Keys = Mapping[str, Any]
"""A config.json."""

HEAD = "lm_head.weight"


class Work(NamedTuple):
    """Tokens of one step or of several."""

    tokens: int
    """Without padding."""
    labelled: int
    """Those that predict something."""


def work_of(samples: Sequence[Mapping[str, Sequence[int]]]) -> Work:
    """Count the tokens of samples."""
    batch = with_targets(concatenate(samples))
    return Work(batch["tokens"].numel(), len(batch["targets"]))


# Shapes: O output, I input of a weight, N tokens
def layer_shapes(keys: Keys) -> dict[str, tuple[int, ...]]:
    """Return the name and shape [O, I] of the four linear layers of the first block."""
    shapes = expected_shapes(parse_config(dict(keys)))
    return {n: s for n, s in shapes.items() if n.startswith("model.layers.0.") and len(s) == 2}


def least(keys: Keys, work: Work, recompute: bool) -> float:
    """Return the FLOP that LoRA on all linear layers of the blocks cannot do without."""
    shapes = layer_shapes(keys)
    block = sum(map(math.prod, shapes.values()))
    first = next(math.prod(shape) for name, shape in shapes.items() if "qkv_proj" in name)
    all_blocks = (6 if recompute else 4) * block * keys["num_hidden_layers"] - 2 * first
    return all_blocks * work.tokens + 4 * _head(keys) * work.labelled


def simple(keys: Keys, work: Work, recompute: bool) -> float:
    """Return 4 FLOP (6 with recompute) x all parameters, embedding and all, x tokens."""
    parameters = sum(map(math.prod, expected_shapes(parse_config(dict(keys))).values()))
    return (6 if recompute else 4) * parameters * work.tokens


def skippable(keys: Keys, work: Work, recompute: bool) -> float:
    """Return the part of :func:`least` that the last block spends on tokens without a label.

    Its o_proj and feed-forward are of no use to them: a program may leave that out, so it can
    come out above the limit.
    """
    sizes = {name: math.prod(shape) for name, shape in layer_shapes(keys).items()}
    needless = sum(size for name, size in sizes.items() if "qkv_proj" not in name)
    return (6 if recompute else 4) * needless * (work.tokens - work.labelled)


def _head(keys: Keys) -> int:
    return int(keys["vocab_size"] * keys["hidden_size"])


class Roofline:
    """The best times seen so far of each matrix product that a step is made of."""

    def __init__(self, keys: Keys, weights: Mapping[str, Tensor], work: Work) -> None:
        """Draw inputs and gradients.

        Args:
            keys: Says how often each product is done.
            weights: At least those of the first block and the head, by Hugging Face's names.
            work: Of one step; that many rows the products have.
        """
        names = [*layer_shapes(keys), HEAD]
        self.layers = keys["num_hidden_layers"]
        self.weights = {name: weights[name] for name in names}
        self.rows = {name: work.labelled if name == HEAD else work.tokens for name in names}
        self.best = {(name, way): math.inf for name in names for way in ("forward", "backward")}

    @torch.no_grad()
    def measure(self, times: int = 2) -> None:
        """Time every product a few times more."""
        for name, weight in self.weights.items():
            x, g = (weight.new_empty(self.rows[name], width) for width in weight.shape[::-1])
            x.normal_(), g.normal_()
            for way, left, right in (("forward", x, weight.t()), ("backward", g, weight)):
                for _ in range(times):
                    self.best[name, way] = min(self.best[name, way], _seconds(left, right))

    @property
    def rate(self) -> float:
        """FLOP a second."""
        flop = seconds = 0.0
        for (name, _), best in self.best.items():
            count = 1 if name == HEAD else self.layers
            flop += count * 2 * self.weights[name].numel() * self.rows[name]
            seconds += count * best
        return flop / seconds


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(left: Tensor, right: Tensor) -> float:
    synchronize(left.device)
    start = time.perf_counter()
    left @ right
    synchronize(left.device)
    return time.perf_counter() - start


def machine() -> str:
    """Name what computes."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{torch.get_num_threads()} threads, {names[0] if names else 'unknown CPU'}"
