"""What attention within packed documents costs by each kernel, with Phi-3-mini's heads.

    python benchmarks/attention.py [--device cuda] [--tokens 4096] [--rounds 5] [--layers 32]

A pack of documents of one length each, in bf16 on a GPU. Printed is the median of a layer's forward
pass, of forward and backward pass, and of what has to be worked out once for all layers of a step:
borders or a mask; "step" is all of a step of --layers. Kernels take turns. Outputs must be equal;
asserts nothing else.

    ours             variable lengths in one kernel, as we train; document by document on the CPU
    FlexAttention    compiled, with a block mask: what torchtune packs with
    sdpa, mask       with a mask of all pairs: what transformers packs with

On the CPU, in fp32, without a backward pass, which FlexAttention has none of there.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from environments import setting, table
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from training_limit import machine, synchronize

from phi3_plugin.models.attention import Documents
from phi3_plugin.models.phi3 import MINI

HEADS, DIM = MINI.num_attention_heads, MINI.hidden_size // MINI.num_attention_heads
WINDOW = MINI.sliding_window or MINI.max_position_embeddings
DOCUMENTS = 128, 512, 4096
REPEATS = 10
"""Of a pass that is timed: one takes less than it takes to ask the clock of a GPU."""


# Shapes: T tokens, H heads, F head dim
class Kernel(NamedTuple):
    """A way to attend."""

    prepare: Callable[[list[int], torch.device], Any]
    """Once a step, from the lengths of the documents."""
    attend: Callable[[Tensor, Any], Tensor]
    """Queries, keys and values ``[1, T, 3 H, F]`` -> ``[1, T, H F]``."""


class Pass(NamedTuple):
    """Seconds."""

    prepare: float
    forward: float
    both: float
    """Forward and backward pass."""


def borders(lengths: list[int], device: torch.device) -> Documents:
    """Return what our attention knows of documents."""
    nowhere = torch.empty(0, device=device)  # the heads are turned by now
    return Documents(tuple(lengths), nowhere, nowhere)


def ours(qkv: Tensor, documents: Documents) -> Tensor:
    """Attend as we train."""
    return documents.attend(qkv, [HEADS] * 3, WINDOW)


def numbers(lengths: list[int], device: torch.device) -> Tensor:
    """Return the document of each token, ``[T]``."""
    counts = torch.tensor(lengths, device=device)
    return torch.arange(len(lengths), device=device).repeat_interleave(counts)


def block_mask(lengths: list[int], device: torch.device) -> Any:
    """Return FlexAttention's mask."""
    document = numbers(lengths, device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (key <= query) & (key > query - WINDOW)
        return near & (document[query] == document[key])

    return create_block_mask(sees, None, None, len(document), len(document), device=str(device))


def all_pairs(lengths: list[int], device: torch.device) -> Tensor:
    """Return the mask of all pairs, ``[T, T]``."""
    document = numbers(lengths, device)
    place = torch.arange(len(document), device=device)
    apart = place[:, None] - place
    return (apart >= 0) & (apart < WINDOW) & (document[:, None] == document)


def by(kernel: Callable[..., Tensor], name: str, qkv: Tensor, mask: Any) -> Tensor:
    """Attend by a kernel that takes queries, keys and values apart, and a mask under a name."""
    q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)
    return kernel(q, k, v, **{name: mask}).transpose(1, 2).flatten(2)


def kernels(device: torch.device) -> dict[str, Kernel]:
    """Return the contestants."""
    gpu = device.type == "cuda"
    flex = torch.compile(flex_attention, dynamic=False) if gpu else flex_attention
    dense = partial(by, F.scaled_dot_product_attention, "attn_mask")
    return {
        "ours": Kernel(borders, ours),
        "FlexAttention": Kernel(block_mask, partial(by, flex, "block_mask")),
        "sdpa, mask": Kernel(all_pairs, dense),
    }


def timed(work: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, Any]:
    """Return the seconds of one of several calls, and what the last one returned."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        result = work()
    synchronize(device)
    return (time.perf_counter() - start) / repeats, result


def once(kernel: Kernel, qkv: Tensor, lengths: list[int], repeats: int) -> tuple[Pass, Tensor]:
    """Time a kernel, and return what it found too."""
    device = qkv.device
    prepare, known = timed(partial(kernel.prepare, lengths, device), device, 1)
    forward, out = timed(partial(kernel.attend, qkv, known), device, repeats)
    if not qkv.requires_grad:
        return Pass(prepare, forward, 0.0), out

    def both() -> None:  # a compiled graph cannot be kept to go back through it again
        torch.autograd.grad(kernel.attend(qkv, known), qkv, torch.ones_like(out))

    return Pass(prepare, forward, timed(both, device, repeats)[0]), out.detach()


def race(lengths: list[int], device: torch.device, rounds: int) -> dict[str, list[Pass]]:
    """Time all kernels by turns; the first round sets up, and is checked.

    One that fails is named and left out.
    """
    gpu = device.type == "cuda"
    shape, dtype = (1, sum(lengths), 3 * HEADS, DIM), torch.bfloat16 if gpu else torch.float32
    torch.manual_seed(0)
    qkv = torch.randn(shape, dtype=dtype, device=device).requires_grad_(gpu)
    racing, outputs = kernels(device), dict[str, Tensor]()
    passes: dict[str, list[Pass]] = {name: [] for name in racing}
    for turn in range(rounds + 1):
        for name in list(passes):
            try:
                found, out = once(racing[name], qkv, lengths, REPEATS if turn and gpu else 1)
            except (RuntimeError, NotImplementedError) as error:  # of a kernel that is not there
                print(f"Failed: {name}, {str(error).strip().splitlines()[0]}\n")
                del passes[name]
                continue
            if turn:
                passes[name].append(found)
            else:
                outputs[name] = out
        if not turn:
            check_equal(outputs, 5e-2 if gpu else 1e-4)
            outputs.clear()
    return passes


def check_equal(outputs: dict[str, Tensor], tolerance: float) -> None:
    """Refuse to compare what does not compute the same."""
    first, *others = outputs.items()
    for name, out in others:
        apart = (out - first[1]).abs().max().item()
        if not apart <= tolerance:
            raise SystemExit(f"{first[0]} and {name} differ by {apart:.2g}")


def row(name: str, document: int, passes: list[Pass], layers: int) -> list[str]:
    """Return the cells of a kernel, in milliseconds."""
    prepare, forward, both = (1e3 * statistics.median(c) for c in zip(*passes, strict=True))
    step = prepare + layers * both if both else 0
    cells = [f"{value:.3f}" if value else "-" for value in (forward, both, prepare, step)]
    return [f"{document:,}", name, *cells]


def main() -> None:
    """Race over packs of short and of long documents, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tokens", type=int, default=4096, help="of the pack")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    rows = []
    for document in dict.fromkeys(min(length, args.tokens) for length in DOCUMENTS):
        lengths = [min(document, args.tokens - n) for n in range(0, args.tokens, document)]
        passes = race(lengths, torch.device(args.device), args.rounds)
        rows += [row(name, document, found, args.layers) for name, found in passes.items()]
    print(f"{setting('triton')}; {machine()}; {args.tokens:,} tokens, window {WINDOW:,}\n")
    head = ["tokens of a document", "kernel", "forward, ms", "both, ms", "once, ms", "step, ms"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
