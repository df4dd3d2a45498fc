"""How long dequantizing an NF4 weight takes, ours and torchao's, in turn."""

import statistics
import time

import torch

from phi3_plugin.models.nf4 import plain, to_nf4

SHAPE = 16384, 3072  # gate_up_proj of Phi-3-mini


def main() -> None:
    """Print the medians of seven rounds."""
    weight = to_nf4(torch.randn(*SHAPE).mul_(0.02).bfloat16())
    cases = {"ours": lambda: plain(weight, weight.dtype), "torchao": weight.get_original_weight}
    assert torch.equal(*(case() for case in cases.values()))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(7):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - started)
    ours, theirs = (statistics.median(values) for values in seconds.values())
    print(f"ours {1e3 * ours:.0f} ms, torchao {1e3 * theirs:.0f} ms: {theirs / ours:.0f} times")


if __name__ == "__main__":
    main()
