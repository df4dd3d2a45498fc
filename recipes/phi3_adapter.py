"""Check, convert, merge and import adapters.

    tune run phi3_adapter --config phi3_adapter verb=check adapter=A checkpoint_dir=B

`phi3-tune adapter check A --base B` is the same; `phi3-tune adapter --help` lists verbs and keys.
"""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

import torch
from omegaconf import DictConfig
from torchtune import config

from phi3_plugin import options
from phi3_plugin.checkpoint import files
from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.base import open_weights, other_base
from phi3_plugin.checkpoint.check import LOADS, verdicts
from phi3_plugin.checkpoint.files import whole_folder
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.gguf import write_gguf
from phi3_plugin.checkpoint.gguf_model import write_model
from phi3_plugin.checkpoint.loralib import write_loralib
from phi3_plugin.checkpoint.merge import merge_into
from phi3_plugin.checkpoint.mlx import mlx_differs, write_mlx
from phi3_plugin.checkpoint.onnx import check_builder, merge_onnx, onnx_differs, write_onnx
from phi3_plugin.checkpoint.peft import export_adapter, load_note
from phi3_plugin.checkpoint.torchtune import write_torchtune
from phi3_plugin.config import read_config
from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.data.added_tokens import asked_as
from phi3_plugin.errors import AdapterError, ConfigError, OutputError
from phi3_plugin.load import keys_for
from phi3_plugin.models import lora_phi3
from phi3_plugin.models.new_tokens import add_new_tokens
from phi3_plugin.options import (
    AdapterOptions,
    CheckOptions,
    ConvertBaseOptions,
    ConvertOptions,
    ImportOptions,
    MergeOptions,
    OnnxType,
    Quantization,
    resolved,
)
from phi3_plugin.proof import FAILED, PROVEN, UNPROVEN, ProofResult, proven
from phi3_plugin.train.model import prepare
from phi3_plugin.train.start import fitted

ALWAYS = ("apply_lora_to_mlp", "apply_lora_to_output")
"""Model keys that our configurations set, so that a False has to be said."""


def check(o: CheckOptions) -> int:
    """Print what each runtime makes of an adapter folder, and prove it where a base is at hand."""
    folder, base = o.adapter, o.checkpoint_dir
    judged = verdicts(folder, read_config(base) if base else None)
    failed = any(v.status != LOADS for v in judged if v.runtime in (o.runtime or ["PEFT"]))
    result, other = None, None
    if base:
        if hashes := other_base(str(load_note(folder).get("base_hash", "")), base):
            other = f"Another base: the adapter was made for weights with the hash {hashes}."
        result = ProofResult(UNPROVEN, "PEFT does not load the adapter as it is.")
        if judged[0].status == LOADS:
            result = proven(base, folder, o.dtype)
        failed |= result.status == FAILED or other is not None
    if o.json:
        unproven = result and result.status != PROVEN
        report = {
            "verdicts": [asdict(verdict) for verdict in judged],
            "proof": asdict(result.proof) if result and result.proof else None,
            "no_proof": str(result).removeprefix("No proof: ") if unproven else None,
            "broken": failed,
            "other_base": other,
        }
        print(json.dumps(report, indent=2))
        return int(failed)
    for verdict in judged:
        print(f"{verdict.runtime:<10} {verdict.status:<11} {verdict.use}")
        for reason in verdict.reasons:
            print(f"{'':<10} - {reason}")
    for line in filter(None, (result, other)):
        print(line)
    return int(failed)


def convert(o: ConvertOptions) -> int:
    """Write an adapter in another form."""
    check_unwritten(o)
    if o.to == "loralib":
        check_suffix(o.output_dir, ".pt", ".safetensors")
    elif o.to == "gguf":
        check_suffix(o.output_dir, ".gguf")
    check_type(o.to, o.type)
    adapter, out, sizes = adapter_given(o), o.output_dir, read_config(o.checkpoint_dir)
    if o.to in ("peft", "peft-patterns"):
        write_peft(o, adapter, patterns=o.to == "peft-patterns")
    elif o.to == "torchtune":
        with whole_folder(out) as folder:
            write_torchtune(folder / "adapter_model.pt", adapter, sizes)
    elif o.to == "loralib":
        write_loralib(out, adapter, sizes, merged_linear=o.merged_linear)
    elif o.to == "mlx":
        with whole_folder(out) as folder:
            write_mlx(folder, adapter, o.checkpoint_dir)
    elif o.to == "onnx":
        write_onnx(out, o.checkpoint_dir, o.type or "int4", adapter)
    else:
        write_gguf(out, adapter, o.checkpoint_dir)
    print(f"Wrote {out}.")
    if o.to in ("mlx", "onnx"):
        print_remarks((mlx_differs if o.to == "mlx" else onnx_differs)(o.checkpoint_dir))
    return 0


def write_peft(o: AdapterOptions, adapter: Adapter, *, patterns: bool) -> None:
    """Write a PEFT folder."""
    card = {"made from": o.adapter.name}
    with whole_folder(o.output_dir) as folder:
        export_adapter(
            folder, adapter, checkpoint_dir=o.checkpoint_dir, card=card, patterns=patterns
        )


TYPES = {"gguf": get_args(Quantization), "onnx": get_args(OnnxType)}


def check_type(to: str, kind: str | None) -> None:
    """Refuse a type of weights that the output has not, and what cannot be written at all."""
    if kind is not None and kind not in (types := TYPES.get(to, ())):
        has = f"is one of {', '.join(types)}" if types else "is for --to gguf or --to onnx"
        raise ConfigError(f"type: {kind}, but that of {to} {has}.")
    if to == "onnx":
        check_builder()


def check_suffix(out: Path, *suffixes: str) -> None:
    """Refuse an output that is no file of this kind in a folder that is there."""
    if out.suffix not in suffixes:
        raise ConfigError(f"output_dir: {out} must be a file that ends in {' or '.join(suffixes)}.")
    if not out.parent.is_dir():
        raise ConfigError(f"output_dir: {out.parent} is no folder. Make it first.")


def import_(o: ImportOptions) -> int:
    """Write a PEFT folder that says every rank and alpha, and how to go on training it."""
    check_unwritten(o)
    adapter = adapter_given(o)
    try:
        rslora = bool(adapter.origin.get("rslora"))
        keys = keys_for(adapter, read_config(o.checkpoint_dir), use_rslora=rslora)
        asked = [*map(asked_as, adapter.new_tokens)]
        new = phi3_tokenizer(o.checkpoint_dir, add_tokens=asked).new_tokens if asked else {}
        with torch.device("meta"):  # whatever training would refuse is refused here
            model = lora_phi3(o.checkpoint_dir, **keys)
            if new:
                add_new_tokens(model, [*new])
        fitted(adapter, o.adapter, prepare(model), new)
    except (AdapterError, ConfigError) as error:
        raise AdapterError(
            f"{o.adapter} cannot be gone on with here. Its keys would be refused: {error}\n"
            "`convert --to peft-patterns` makes a folder of it that others load, `merge` a model."
        ) from error
    write_peft(o, adapter, patterns=True)
    print(f"Wrote {o.output_dir}. To go on training it:\n  init_adapter: {o.output_dir}\n  model:")
    for key, value in keys.items():
        if value or key in ALWAYS:
            print(f"    {key}: {value}")
    if asked:
        print(f"  tokenizer:\n    add_tokens: {asked}")
    return 0


def merge(o: MergeOptions) -> int:
    """Write a model with the adapter in its weights."""
    check_unwritten(o)
    if o.to == "gguf":
        check_suffix(o.output_dir, ".gguf")
    check_type(o.to, o.type)
    out, base, adapter = o.output_dir, o.checkpoint_dir, adapter_given(o)
    how: dict[str, Any] = {"dtype": o.dtype, "onto": o.onto}
    if o.to == "onnx":
        report = merge_onnx(out, base, adapter, cast(OnnxType, o.type or "int4"), **how)
    else:
        gguf = cast(Quantization, o.type or "q8_0") if o.to == "gguf" else None
        report = merge_into(
            out, base, adapter, gguf=gguf, card={"made from": o.adapter.name}, **how
        )
    print(f"Wrote {out}: {len(report.changed)} weights changed, {report.dtype}.")
    print_remarks(onnx_differs(base) if o.to == "onnx" else report.remarks)
    if report.difference:
        d = report.difference
        print(
            f"The quantized weights differ from the original ones by {d.mean:.2e} on average and "
            f"{d.largest:.2e} at most, of the mean and the largest weight."
        )
    return 0


def convert_base(o: ConvertBaseOptions) -> int:
    """Write a model in another form."""
    check_unwritten(o)
    check_type(o.to, o.type)
    if o.to == "onnx":
        kind = o.type or "int4"
        write_onnx(o.output_dir, o.checkpoint_dir, cast(OnnxType, kind))
        remarks = list(onnx_differs(o.checkpoint_dir))
    else:
        check_suffix(o.output_dir, ".gguf")
        weights = open_weights(o.checkpoint_dir)
        shapes = {name: stored.shape for name, stored in weights.items()}
        kind = o.type or "q8_0"
        remarks = write_model(
            o.output_dir,
            o.checkpoint_dir,
            shapes,
            lambda name: weights[name][:],
            cast(Quantization, kind),
        )
    print(f"Wrote {o.output_dir}: {kind}.")
    print_remarks(remarks)
    return 0


def print_remarks(remarks: Iterable[str]) -> None:
    """Say what another program will do otherwise."""
    for remark in remarks:
        print(f"Note: {remark}")


def check_unwritten(o: AdapterOptions | ConvertBaseOptions) -> None:
    """Check the output before anything is read that takes long.

    Raises:
        OutputError: It exists, is part of the base, or cannot be written.
    """
    out = o.output_dir
    if out.exists():
        raise OutputError(f"{out} exists and would be overwritten. Move it or choose another.")
    files.check_output(out, o.checkpoint_dir)


def adapter_given(o: AdapterOptions) -> Adapter:
    """Read an adapter of any origin, and warn where it is for another base than the one given."""
    base = o.checkpoint_dir
    adapter = read_adapter(
        o.adapter,
        config=read_config(base),
        base=base,
        alpha=o.alpha,
        enable_lora=o.enable_lora,
        rank=o.rank if isinstance(o, ImportOptions) else None,
    )
    if hashes := other_base(adapter.base_hash, base):
        print(f"Warning: the adapter was made for weights with the hash {hashes}.", file=sys.stderr)
    return adapter


VERBS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "check": (CheckOptions, check),
    "convert": (ConvertOptions, convert),
    "merge": (MergeOptions, merge),
    "import": (ImportOptions, import_),
    "convert-base": (ConvertBaseOptions, convert_base),
}


def run(o: CheckOptions | AdapterOptions | ConvertBaseOptions) -> int:
    """Run the verb of these options and return the exit code."""
    (action,) = (action for kind, action in VERBS.values() if type(o) is kind)
    return action(o)


@config.parse
def main(cfg: DictConfig) -> int:
    """Run a verb; see the top of this file."""
    given = resolved(cfg)
    verb = given.pop("verb", None)
    if not isinstance(verb, str) or verb not in VERBS:
        raise ConfigError(f"verb: {verb!r} must be one of {', '.join(VERBS)}.")
    return run(options.read_options(VERBS[verb][0], given, verb))


if __name__ == "__main__":
    sys.exit(main())
