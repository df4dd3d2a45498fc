"""Check, convert, merge and import adapters.

    tune run phi3_adapter --config phi3_adapter verb=check adapter=A checkpoint_dir=B

`phi3-tune adapter check A --base B` is the same; `phi3-tune adapter --help` lists verbs and keys.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchtune import config

from phi3_plugin import options
from phi3_plugin.checkpoint.adapter import BASE_HASH, Adapter
from phi3_plugin.checkpoint.base import other_base
from phi3_plugin.checkpoint.check import LOADS, Proof, Verdict, proven, verdicts
from phi3_plugin.checkpoint.files import check_output, whole_folder
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.gguf import write_gguf
from phi3_plugin.checkpoint.loralib import write_loralib
from phi3_plugin.checkpoint.merge import merge_into
from phi3_plugin.checkpoint.peft import export_adapter, load_origin
from phi3_plugin.checkpoint.torchtune import write_torchtune
from phi3_plugin.config import Phi3Config, read_config
from phi3_plugin.errors import AdapterError, ConfigError, OutputError, Phi3Error
from phi3_plugin.load import keys_for
from phi3_plugin.options import (
    AdapterOptions,
    CheckOptions,
    ConvertOptions,
    ImportOptions,
    MergeOptions,
    resolved,
)

# The forms that `phi3_plugin.recipes.phi3_adapter` writes an adapter in.

Options = Mapping[str, Any]


def read(path: Path, sizes: Phi3Config, o: Options) -> Adapter:
    """Read an adapter of any origin."""
    given = {key: o[key] for key in ("alpha", "rank", "enable_lora") if key in o}
    if "checkpoint_dir" in o:
        given["base"] = Path(o["checkpoint_dir"])
    return read_adapter(path, config=sizes, **given)


def read_from_base(o: Options) -> Adapter:
    """Read the adapter of a verb that needs the base, and warn where it is for another one."""
    base = Path(o["checkpoint_dir"])
    adapter = read(Path(o["adapter"]), read_config(base), o)
    if hashes := other_base(adapter.base_hash, base):
        print(f"Warning: the adapter was made for weights with the hash {hashes}.", file=sys.stderr)
    return adapter


def to_peft(o: Options, base: Path, out: Path, *, patterns: bool = False) -> None:
    """Write a PEFT folder."""
    adapter, card = read_from_base(o), {"made from": Path(o["adapter"]).name}
    with whole_folder(out) as folder:
        export_adapter(folder, adapter, checkpoint_dir=base, card=card, patterns=patterns)


def to_torchtune(o: Options, base: Path, out: Path) -> None:
    """Write a folder with adapter_model.pt, for torchtune's own Phi-3."""
    adapter = read_from_base(o)
    with whole_folder(out) as folder:
        write_torchtune(folder / "adapter_model.pt", adapter, read_config(base))


def to_loralib(o: Options, base: Path, out: Path) -> None:
    """Write what a loralib-built Phi-3 takes."""
    _check_suffix(out, (".pt", ".safetensors"))
    merged_linear = bool(o.get("merged_linear"))
    write_loralib(out, read_from_base(o), read_config(base), merged_linear=merged_linear)


def to_gguf(o: Options, base: Path, out: Path) -> None:
    """Write a file for llama.cpp."""
    _check_suffix(out, (".gguf",))
    write_gguf(out, read_from_base(o), base)


def _check_suffix(out: Path, suffixes: Sequence[str]) -> None:
    if out.suffix not in suffixes:
        raise ConfigError(f"output_dir: {out} must be a file that ends in {' or '.join(suffixes)}.")
    if not out.parent.is_dir():
        raise ConfigError(f"output_dir: {out.parent} is no folder. Make it first.")


FORMS: dict[str, Callable[[Options, Path, Path], None]] = {
    "peft": to_peft,
    "peft-patterns": partial(to_peft, patterns=True),
    "torchtune": to_torchtune,
    "loralib": to_loralib,
    "gguf": to_gguf,
}
"""Of `convert`, by what --to calls them."""


ALWAYS = ("apply_lora_to_mlp", "apply_lora_to_output")
"""Model keys that our configurations set, so that a False has to be said."""


def check(o: Mapping[str, Any]) -> int:
    """Print what each runtime makes of an adapter folder, and prove it where a base is at hand."""
    folder, base, dtype = Path(o["adapter"]), o.get("checkpoint_dir"), o.get("dtype", "fp32")
    found = verdicts(folder, read_config(base) if base else None)
    wanted = o.get("runtime") or ["PEFT"]
    failed = any(v.status != LOADS for v in found if v.runtime in wanted)
    proof, said = None, ""
    other = another_base(folder, Path(base)) if base else None
    failed |= other is not None
    if base and found[0].status != LOADS:
        said = "No proof: PEFT does not load the adapter as it is."
    elif base:
        proof, broken, said = proven(Path(base), folder, dtype)
        failed |= broken
    if o.get("json"):
        report = as_json(found, proof, said, failed)
        print(json.dumps({**report, "other_base": other}, indent=2))
    else:
        print("\n".join([*as_lines(found, said), *([other] if other else [])]))
    return int(failed)


def another_base(folder: Path, base: Path) -> str | None:
    """Say that an adapter was made for other weights than those at hand, if it says so itself."""
    try:
        hashes = other_base(str(load_origin(folder).get(BASE_HASH, "")), base)
    except Phi3Error:  # of which the verdicts speak
        return None
    return hashes and f"Another base: the adapter was made for weights with the hash {hashes}."


def as_lines(found: list[Verdict], said: str) -> Iterator[str]:
    """Yield the report."""
    for verdict in found:
        yield f"{verdict.runtime:<10} {verdict.status:<11} {verdict.use}"
        yield from (f"{'':<10} - {why}" for why in verdict.reasons)
    if said:
        yield said


def as_json(found: list[Verdict], proof: Proof | None, said: str, failed: bool) -> dict[str, Any]:
    """Return the report as one object."""
    return {
        "verdicts": [verdict.__dict__ for verdict in found],
        "proof": proof.__dict__ if proof else None,
        "no_proof": None if said.startswith("Proof: ") else said.removeprefix("No proof: ") or None,
        "broken": failed,
    }


def output(o: Mapping[str, Any]) -> tuple[Path, Path]:
    """Return base and output, before anything is read that takes long.

    Raises:
        OutputError: The output exists, is part of the base, or cannot be written.
    """
    base, out = Path(o["checkpoint_dir"]), Path(o["output_dir"])
    if out.exists():
        raise OutputError(f"{out} exists and would be overwritten. Move it or choose another.")
    check_output(out, base)
    return base, out


def convert(o: Mapping[str, Any]) -> int:
    """Write an adapter in another form."""
    FORMS[o["to"]](o, *output(o))
    print(f"Wrote {o['output_dir']}.")
    return 0


def import_(o: Mapping[str, Any]) -> int:
    """Write a PEFT folder that says every rank and alpha, and how to go on training it."""
    (base, out), sizes = output(o), read_config(o["checkpoint_dir"])
    try:
        keys_for(read(Path(o["adapter"]), sizes, o), sizes)
    except AdapterError as error:
        raise AdapterError(f"{error} `convert --to peft-patterns` makes a folder of it.") from error
    to_peft(o, base, out, patterns=True)
    keys = keys_for(read(out, sizes, {}), sizes)
    keys = {key: value for key, value in keys.items() if value or key in ALWAYS}
    print(f"Wrote {out}. To go on training it:")
    print("  init_adapter:", out)
    print("  model:", *(f"    {key}: {value}" for key, value in keys.items()), sep="\n")
    return 0


def merge(o: Mapping[str, Any]) -> int:
    """Write a checkpoint with the adapter in its weights."""
    base, out = output(o)
    onto = o.get("onto", "original")
    adapter, dtype = read_from_base(o), o.get("dtype")
    card = {"made from": Path(o["adapter"]).name}
    report = merge_into(out, base, adapter, dtype=dtype, onto=onto, card=card)
    print(f"Wrote {out}: {len(report.changed)} weights changed, {report.dtype}.")
    if report.difference:
        d = report.difference
        print(
            f"The quantized weights differ from the original ones by {d.mean:.2e} on average and "
            f"{d.largest:.2e} at most, of the mean and the largest weight."
        )
    return 0


VERBS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "check": (CheckOptions, check),
    "convert": (ConvertOptions, convert),
    "merge": (MergeOptions, merge),
    "import": (ImportOptions, import_),
}


def run(o: CheckOptions | AdapterOptions) -> int:
    """Run the verb of these options and return the exit code."""
    (action,) = (action for kind, action in VERBS.values() if type(o) is kind)
    return action({key: value for key, value in vars(o).items() if value is not None})


@config.parse
def main(cfg: DictConfig) -> int:
    """Run a verb; see the top of this file."""
    given = resolved(cfg)
    verb = given.pop("verb", None)
    if not isinstance(verb, str) or verb not in VERBS:
        raise ConfigError(f"verb: {verb!r} must be one of {', '.join(VERBS)}.")
    return run(options.read(VERBS[verb][0], given, verb))


if __name__ == "__main__":
    sys.exit(main())
