"""Whether the tensors of an adapter fit each other and their base."""

from collections.abc import Iterator, Mapping

from phi3_plugin.checkpoint.names import EMBEDDING, expected_shapes
from phi3_plugin.checkpoint.peft_folder import PeftFolder, listed
from phi3_plugin.checkpoint.stored import StoredTensor
from phi3_plugin.config import Phi3Config

# Shapes: R rank


def shape_problems(adapter: PeftFolder, base: Phi3Config | None) -> Iterator[str]:
    """Say which tensors are missing or do not fit.

    Args:
        adapter: Of any origin.
        base: Sizes of the base model; without them tensors are compared with each other alone.
    """
    if alone := [m for m in adapter.adapted if not {"A", "B"} <= adapter.tensors[m].keys()]:
        yield f"A or B is missing: {listed(alone)}"
    whole = {m: adapter.tensors[m] for m in adapter.adapted if m not in alone}
    if wrong := [m for m, kinds in whole.items() if not _are_a_pair(kinds)]:
        shapes = [list(whole[wrong[0]][kind].shape) for kind in "AB"]
        yield f"A {shapes[0]} and B {shapes[1]} do not multiply: {listed(wrong)}"
    if base is not None:
        sizes = expected_shapes(base)
        for module, kinds in whole.items():
            if module not in wrong and (problem := _beside(module, kinds, sizes)):
                yield problem


def _are_a_pair(kinds: Mapping[str, StoredTensor]) -> bool:
    a, b = kinds["A"].shape, kinds["B"].shape
    return len(a) == len(b) == 2 and 0 < a[0] == b[1]


def _beside(
    module: str, kinds: Mapping[str, StoredTensor], sizes: Mapping[str, tuple[int, ...]]
) -> str | None:
    layer = sizes.get(f"{module}.weight")
    if layer is None:
        return None  # another's name; what becomes of it is for the runtimes to say
    adapts = kinds["B"].shape[0], kinds["A"].shape[1]
    if module == EMBEDDING:
        adapts = adapts[1], adapts[0]
    if adapts == layer:
        return None
    return f"{module} is {list(layer)} in this base, the adapter is for {list(adapts)}"
