"""Check, convert, merge, import and compare adapters.

    tune run phi3_adapter --config phi3_adapter verb=check adapter=A checkpoint_dir=B

`phi3-tune adapter check A --base B` is the same; `phi3-tune adapter --help` lists verbs and keys.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from phi3_plugin.recipes.phi3_adapter_forms import FORMS, read, read_from_base, to_peft
from torch import Tensor
from torchtune import config
from torchtune.training import set_default_dtype

from phi3_plugin import adapter_cli
from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.check import Proof, prove
from phi3_plugin.checkpoint.difference import differences
from phi3_plugin.checkpoint.hf import load_base_weights, row_norms
from phi3_plugin.checkpoint.merge import merge_into
from phi3_plugin.checkpoint.stored import StoredTensor
from phi3_plugin.checkpoint.verdicts import LOADS, Verdict, verdicts
from phi3_plugin.config import Phi3Config, read_config
from phi3_plugin.errors import AdapterError, ConfigError, MissingFileError
from phi3_plugin.models import lora_phi3
from phi3_plugin.models.fitting import keys_of
from phi3_plugin.models.nf4 import nf4_zeros, rows_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""How far logits may be apart, as a part of the largest, before the proof fails: the order of
sums differs. Tiny models agree to 1e-6 in fp32."""

# Shapes: B batch, S sequence, V vocabulary


def check(o: Mapping[str, Any]) -> int:
    """Print what each runtime makes of an adapter folder, and prove it where a base is at hand."""
    folder, base = Path(o["adapter"]), o.get("checkpoint_dir")
    found = verdicts(folder, read_config(base) if base else None)
    proof, reason = None, ""
    if base and found[0].status == LOADS:
        proof, reason = try_proof(Path(base), folder, o.get("dtype", "fp32"))
    wanted = o.get("runtime") or ["PEFT"]
    failed = any(v.status != LOADS for v in found if v.runtime in wanted)
    if proof:
        failed |= not proof.difference <= TOLERANCE[o.get("dtype", "fp32")] * proof.largest
    if o.get("json"):
        print(json.dumps(as_json(found, proof, reason, failed), indent=2))
    else:
        print("\n".join(as_lines(found, proof, reason)))
    return int(failed)


def try_proof(base: Path, folder: Path, dtype: str) -> tuple[Proof | None, str]:
    """Return the proof, or why there is none."""
    if not all(importlib.util.find_spec(name) for name in ("transformers", "peft")):
        return None, "transformers and PEFT are not installed: pip install 'phi3-plugin[hf]'"
    try:
        return prove(base, folder, partial(logits, base, folder, dtype), dtype=DTYPES[dtype]), ""
    except AdapterError as error:
        return None, str(error)


def logits(base: Path, folder: Path, dtype: str, tokens: Tensor) -> Tensor:
    """Return what our own model with the adapter makes of ``tokens [B, S]``: ``[B, S, V]``."""
    adapter = read(folder, read_config(base), {})
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        model = lora_phi3(base, **keys_for(adapter, read_config(base)))
    finally:
        torch.set_default_dtype(before)
    state = {**load_base_weights(base), **adapter.tensors, **adapter.saved}
    model.load_state_dict(state, strict=True)
    out: Tensor = model.eval()(tokens)
    return out


def keys_for(adapter: Adapter, sizes: Phi3Config) -> dict[str, Any]:
    """Return the keys of our builder for a model with the ranks and scales of an adapter."""
    return keys_of(
        adapter.ranks,
        adapter.scales,
        set(adapter.saved),
        layers=sizes.num_hidden_layers,
        use_dora=adapter.is_dora,
        use_rslora=False,
    )


def as_lines(found: list[Verdict], proof: Proof | None, reason: str) -> Iterator[str]:
    """Yield the report."""
    for verdict in found:
        yield f"{verdict.runtime:<10} {verdict.status:<11} {verdict.use}"
        yield from (f"{'':<10} - {why}" for why in verdict.reasons)
    if proof:
        yield (
            f"Proof: logits in PEFT and here differ by {proof.difference:.2e} at most. The adapter "
            f"moves them by up to {proof.effect:.2e}; the largest is {proof.largest:.3g}."
        )
    elif reason:
        yield f"No proof: {reason}"


def as_json(found: list[Verdict], proof: Proof | None, reason: str, failed: bool) -> dict[str, Any]:
    """Return the report as one object."""
    return {
        "verdicts": [verdict.__dict__ for verdict in found],
        "proof": proof.__dict__ if proof else None,
        "no_proof": reason or None,
        "broken": failed,
    }


def convert(o: Mapping[str, Any]) -> int:
    """Write an adapter in another form."""
    FORMS[o["to"]](o, Path(o["checkpoint_dir"]), Path(o["output_dir"]))
    print(f"Wrote {o['output_dir']}.")
    return 0


def import_(o: Mapping[str, Any]) -> int:
    """Write a PEFT folder that says every rank and alpha, and how to go on training it."""
    base, out = Path(o["checkpoint_dir"]), Path(o["output_dir"])
    to_peft(o, base, out, patterns=True)
    adapter = read(out, read_config(base), {})
    keys = {key: value for key, value in keys_for(adapter, read_config(base)).items() if value}
    print(f"Wrote {out}. To go on training it:")
    print("  init_adapter:", out)
    print("  model:", *(f"    {key}: {value}" for key, value in keys.items()), sep="\n")
    return 0


def merge(o: Mapping[str, Any]) -> int:
    """Write a checkpoint with the adapter in its weights."""
    base, out = Path(o["checkpoint_dir"]), Path(o["output_dir"])
    onto = o.get("onto", "original")
    quantizer = in_nf4 if onto == "nf4" else None
    adapter, dtype = read_from_base(o), o.get("dtype")
    report = merge_into(out, base, adapter, dtype=dtype, onto=onto, quantizer=quantizer)
    print(f"Wrote {out}: {len(report.changed)} weights changed, {report.dtype}.")
    if report.difference:
        d = report.difference
        print(
            f"The quantized weights differ from the original ones by {d.mean:.2e} on average and "
            f"{d.largest:.2e} at most, of the mean and the largest weight."
        )
    return 0


def in_nf4(stored: StoredTensor) -> Tensor:
    """Return what a model over NF4 computes with in the place of a weight."""
    with set_default_dtype(stored.dtype):  # Of which NF4 takes what it computes in
        like = nf4_zeros(*stored.shape)
    return rows_of(stored, like, 0, 1, torch.device("cpu")).to(stored.dtype)


def diff(o: Mapping[str, Any]) -> int:
    """Print how far apart two adapters are; 1 if they are not the same."""
    sizes = sizes_for(o)
    one, other = (read(Path(o[key]), sizes, {}) for key in ("adapter", "other"))
    norms = partial(row_norms, Path(o["checkpoint_dir"])) if "checkpoint_dir" in o else no_norms
    found = differences(one, other, sizes, norms)
    if o.get("json"):
        print(json.dumps([difference.__dict__ for difference in found], indent=2))
    for d in () if o.get("json") else found:
        only = f"only in {o['adapter'] if d.only_in == 0 else o['other']}"
        apart = only if d.relative is None else f"{d.relative:.3e}"
        more = "" if d.magnitude is None else f"  magnitude {d.magnitude:.3e}"
        print(f"{d.module:<32} {apart}{more}")
    return int(any(d.relative != 0 or d.magnitude for d in found))


def sizes_for(o: Mapping[str, Any]) -> Phi3Config:
    """Read config.json of the base, or of the adapter's folder, where ours have a copy."""
    folders = [o.get("checkpoint_dir"), o["adapter"], o["other"]]
    for folder in filter(None, folders):
        if (Path(folder) / "config.json").is_file():
            return read_config(folder)
    raise MissingFileError("There is no config.json beside the adapters. Name their base.")


def no_norms(module: str) -> Tensor:
    """Refuse DoRA on parts of a layer, which needs the base."""
    raise ConfigError(f"{module}: DoRA on a part of it can be compared only with the base.")


VERBS = {"check": check, "convert": convert, "merge": merge, "import": import_, "diff": diff}


def run(options: Mapping[str, Any]) -> int:
    """Run a verb and return the exit code.

    Args:
        options: ``verb`` and its keys; those that are not given are absent.
    """
    return VERBS[options["verb"]](options)


@config.parse
def main(cfg: DictConfig) -> int:
    """Run a verb; see the top of this file."""
    given: Any = OmegaConf.to_container(cfg, resolve=True)
    return run(adapter_cli.checked(given))


if __name__ == "__main__":
    sys.exit(main())
