"""Load an adapter folder by every entry of transformers and PEFT, old and new, and print a table.

    python benchmarks/adapter_folders.py TOKENIZER [...] [--folder DIR]

A tiny base with the tokenizer of each folder TOKENIZER gets an adapter as we write it; published
ones, since 4.43 does not read what is saved today. In an environment for each set of packages (see
environments.py), every entry loads it by its folder alone. Told are the largest difference of its
logits from ours, and whether AutoTokenizer gives the base's ids. Where a model has fewer rows than
the base, the others count.

Exits with 1 if an entry ends with an error or computes something else, but for faults that a
version has with every adapter.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUB = {"huggingface_hub": "0.36.0"}
HTTP = {"httpx": "0.28.1", "httpcore": "1.0.9", "h11": "0.16.0", "anyio": "4.9.0"}
SETS: tuple[dict[str, str], ...] = (
    {
        **{"transformers": "4.43.4", "peft": "0.10.0", "tokenizers": "0.19.1"},
        **{"accelerate": "0.33.0", **HUB},
    },
    {
        **{"transformers": "4.57.6", "peft": "0.17.1", "tokenizers": "0.22.1"},
        **{"torchao": "0.13.0", **HUB},
    },
    {
        **{"transformers": "5.2.0", "peft": "0.18.1", "tokenizers": "0.22.1"},
        **{"torchao": "0.13.0", "huggingface_hub": "1.3.0", **HTTP},
    },
    {},
    {"transformers": "5.24.0"},
)
"""What differs from the present environment."""

KNOWN_FAULTS = {("4.43.4", "pipeline")}
"""It loads the base in the place of an adapter's folder."""

ENTRIES = ("PeftModel", "AutoPeftModel", "AutoModel", "pipeline", "load_adapter")
TEXTS = (
    *("Hello world", " one  two\n\n\tthree", "naïve 你好 🙂", "", "\n", "def f(x):\n    return x"),
    *(
        "<|user|>\nHi<|end|>\n<|assistant|>\n",
        "<|end|>  a <|user|> b",
        "<s> </s>",
        "\u2581x \u2581",
    ),
)
CHAT = [
    {"role": "user", "content": "Hi  there"},
    {"role": "assistant", "content": " Hello!"},
    {"role": "user", "content": "2 + 2?\n"},
]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 32064}
TOLERANCE = 1e-5
"""Of logits up to some 10 in fp32."""


def main() -> int:
    """Make the folders, load them in each environment, and return the exit code."""
    from environments import build, setting, table, versions

    parser = argparse.ArgumentParser(description="Load adapter folders by every entry.")
    parser.add_argument("tokenizers", nargs="+", type=Path, metavar="TOKENIZER")
    parser.add_argument("--folder", type=Path, help="keeps the environments")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="phi3_plugin_folders_"))
    rows, failures = [], list[str]()
    with tempfile.TemporaryDirectory() as made:
        places = [make(Path(made) / str(i), t) for i, t in enumerate(options.tokenizers)]
        for packages in SETS:
            python = sys.executable
            if packages:
                python = str(build(folder / f"transformers-{packages['transformers']}", packages))
            found = [str(v) for v in versions(Path(python), "transformers", "peft").values()]
            results = loaded(python, places)
            rows.append([*found, *(worst([r[entry] for r in results]) for entry in results[0])])
            failures += [
                f"transformers {found[0]}, PEFT {found[1]}: {entry}: {value}"
                for result in results
                for entry, value in result.items()
                if (found[0], entry) not in KNOWN_FAULTS
                and not (value == "same ids" or (isinstance(value, float) and value <= TOLERANCE))
            ]
    print(setting() + "\n")
    print(table(["transformers", "peft", "AutoTokenizer", *ENTRIES], rows))
    print("".join(f"\n- {line}" for line in dict.fromkeys(failures)))
    return bool(failures)


def worst(values: list[Any]) -> str:
    """Return what a cell says of the folders."""
    if all(isinstance(value, float) for value in values):
        return "differs" if max(values) > TOLERANCE else f"{max(values):.0e}"
    return "same ids" if set(values) == {"same ids"} else "fails"


def make(place: Path, tokenizer: Path) -> Path:
    """Write a base, an adapter as we export it, and the logits that our model computes."""
    import torch
    from phi3_plugin.recipes.phi3_demo_checkpoint import (
        build_checkpoint,
        random_weights,
        write_shards,
    )
    from safetensors.torch import save_file

    from phi3_plugin.checkpoint.adapter import A, Adapter, B
    from phi3_plugin.checkpoint.base import module_sizes
    from phi3_plugin.checkpoint.peft import TOKENIZER_FILES, export_adapter
    from phi3_plugin.config import read_config
    from phi3_plugin.load import load_model

    base, folder = place / "base", place / "adapter"
    build_checkpoint(base, words=[])
    for name in TOKENIZER_FILES:
        (base / name).unlink(missing_ok=True)
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, base / name)
    config = json.loads((base / "config.json").read_text()) | SIZES
    (base / "config.json").write_text(json.dumps(config))
    write_shards(base, random_weights(config))
    sizes, tensors = module_sizes(read_config(base)), {}
    torch.manual_seed(0)
    for module in [name for name in sizes if name.endswith(("qkv_proj", "down_proj"))]:
        out, into = sizes[module]
        tensors[module + A], tensors[module + B] = torch.randn(4, into), torch.randn(out, 4) * 0.05
    folder.mkdir()
    export_adapter(folder, Adapter.of(tensors, 0.5), checkpoint_dir=base, card={})
    logits = load_model(base, folder, dtype="fp32", device="cpu")(tokens())
    save_file({"logits": logits.contiguous()}, place / "logits.safetensors")
    return place


def loaded(python: str, places: list[Path]) -> list[dict[str, Any]]:
    """Run `probe` in an environment."""
    command = [python, __file__, "--probe", *map(str, places)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()[-len(places) :]]


def tokens() -> Any:
    """Return token ids ``[1, 17]`` that every vocabulary has."""
    import torch

    return torch.arange(3, 20)[None]


def probe(place: Path) -> None:
    """Print what becomes of each entry, as JSON: a difference, or an error."""
    import torch
    from peft import AutoPeftModelForCausalLM, PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    base, folder = str(place / "base"), str(place / "adapter")
    ours = load_file(place / "logits.safetensors")["logits"]

    def difference(model: Any) -> float:
        with torch.no_grad():
            logits = model.eval()(input_ids=tokens()).logits
        return float((logits - ours[..., : logits.shape[-1]]).abs().max())

    def ids(source: str) -> list[Any]:
        tokenizer = AutoTokenizer.from_pretrained(source)
        found = [tokenizer(text)["input_ids"] for text in TEXTS]
        text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
        return [*found, text, tokenizer(text)["input_ids"]]

    def with_adapter() -> Any:
        model = AutoModelForCausalLM.from_pretrained(base)
        model.load_adapter(folder)
        return model

    entries: dict[str, Callable[[], Any]] = {
        "PeftModel": lambda: PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), folder
        ),
        "AutoPeftModel": lambda: AutoPeftModelForCausalLM.from_pretrained(folder),
        "AutoModel": lambda: AutoModelForCausalLM.from_pretrained(folder),
        "pipeline": lambda: pipeline("text-generation", model=folder).model,
        "load_adapter": with_adapter,
    }
    found: dict[str, Any] = {"AutoTokenizer": "same ids" if ids(folder) == ids(base) else "other"}
    for name, load in entries.items():
        try:
            found[name] = difference(load())
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--probe"]:
        for place in sys.argv[2:]:
            probe(Path(place))
        sys.exit()
    sys.exit(main())
