"""`phi3-tune adapter ...` and `phi3-tune import-config ...`: what can be typed, and what it means.

The same verbs and keys are those of `tune run phi3_adapter`, which takes them as `key=value`.
Needs the standard library alone until a verb runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

from phi3_plugin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RUNTIMES = ("PEFT", "vLLM", "llama.cpp")
FORMS = ("peft", "peft-patterns", "torchtune", "loralib", "gguf")
TARGETS = ("as-published", "as-intended", "as-intended-parts")


class Option(NamedTuple):
    """A key of a verb, and how it is typed."""

    flags: tuple[str, ...]
    """None of them: it is typed by its place."""
    how: dict[str, Any]
    """What argparse is told."""


OPTIONS = {
    "adapter": Option(
        (), {"help": "folder of the adapter, or its file; check: a folder", "metavar": "ADAPTER"}
    ),
    "checkpoint_dir": Option(
        ("--base", "--checkpoint-dir"),
        {"metavar": "DIR", "help": "folder of the base model, as it was downloaded"},
    ),
    "output_dir": Option(
        ("-o", "--output"), {"metavar": "OUT", "help": "what to write; must not be there yet"}
    ),
    "runtime": Option(
        ("--runtime",),
        {
            "action": "append",
            "choices": RUNTIMES,
            "help": "end with 1 unless this one loads the adapter as it is; may be repeated",
        },
    ),
    "json": Option(("--json",), {"action": "store_true", "help": "print JSON instead of lines"}),
    "to": Option(
        ("--to",),
        {
            "choices": FORMS,
            "help": "a folder of PEFT's that every runtime reads alike; one that keeps each "
            "module's rank and alpha, for PEFT alone; a folder for torchtune's Phi-3; a .pt or "
            ".safetensors file for loralib; a .gguf file for llama.cpp",
        },
    ),
    "merged_linear": Option(
        ("--merged-linear",),
        {"action": "store_true", "help": "loralib: qkv_proj and gate_up_proj are MergedLinear"},
    ),
    "alpha": Option(
        ("--alpha",),
        {"type": float, "help": "what the file does not say: the scale is alpha / rank"},
    ),
    "enable_lora": Option(
        ("--enable-lora",),
        {
            "metavar": "LIST",
            "help": "of loralib's MergedLinear, such as true,false,true for q and v",
        },
    ),
    "rank": Option(("--rank",), {"type": int, "help": "refuse tensors of another rank"}),
    "onto": Option(
        ("--onto",),
        {
            "choices": ("original", "nf4"),
            "help": "the base as it was downloaded (default), or as QLoRA quantizes it",
        },
    ),
    "dtype": Option(
        ("--dtype",),
        {
            "choices": ("bf16", "fp32"),
            "help": "check: what both compute in (default: fp32); merge: of the weights (default: "
            "the base's own)",
        },
    ),
}
"""Every key."""


class Verb(NamedTuple):
    """What a verb does and takes."""

    does: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]


VERBS = {
    "check": Verb(
        "Say what PEFT, vLLM and llama.cpp make of an adapter as it lies there. With the base at "
        "hand, compare its logits in PEFT and here. Ends with 1 if it is broken.",
        ("adapter",),
        ("checkpoint_dir", "runtime", "json", "dtype"),
    ),
    "convert": Verb(
        "Write an adapter in another form.",
        ("adapter", "to", "checkpoint_dir", "output_dir"),
        ("alpha", "enable_lora", "merged_linear"),
    ),
    "merge": Verb(
        "Write a checkpoint folder in which the adapter is part of the weights.",
        ("adapter", "checkpoint_dir", "output_dir"),
        ("onto", "dtype", "alpha", "enable_lora"),
    ),
    "import": Verb(
        "Write a PEFT folder from an adapter of torchtune, loralib or PEFT, to go on training it.",
        ("adapter", "checkpoint_dir", "output_dir"),
        ("alpha", "enable_lora", "rank"),
    ),
}


def parse(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the command, ``adapter`` or ``import-config``, and what was given to it.

    Args:
        words: The command line from the command on.
    """
    given = vars(parser().parse_args(words))
    options = {k: v for k, v in given.items() if v is not None and v is not False}  # 0 is a value
    return options.pop("command"), options


def parser() -> argparse.ArgumentParser:
    """Return the parser of both commands."""
    top = argparse.ArgumentParser(prog="phi3-tune")
    commands = top.add_subparsers(dest="command", required=True)
    does = "Check, convert, merge and import adapters."
    adapter = commands.add_parser("adapter", help=does, description=does)
    verbs = adapter.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        sub = verbs.add_parser(
            name, help=verb.does.split(". ")[0].rstrip("."), description=verb.does
        )
        for key in (*verb.needs, *verb.takes):
            _add(sub, key, needed=key in verb.needs)
    _add_import_config(commands)
    return top


def _add(sub: argparse.ArgumentParser, key: str, *, needed: bool) -> None:
    flags, how = OPTIONS[key]
    if flags:
        sub.add_argument(*flags, dest=key, required=needed, **how)
    else:
        sub.add_argument(key, **how)


def _add_import_config(commands: Any) -> None:
    does = "Turn the training_config and peft_config of Microsoft's samples into our YAML."
    sub = commands.add_parser("import-config", help=does, description=does)
    sub.add_argument("sample", metavar="SAMPLE.json", help="JSON object with both dictionaries")
    sub.add_argument(
        "-o", "--output", required=True, metavar="OUT.yaml", help="must not be there yet"
    )
    sub.add_argument(
        "--targets",
        choices=TARGETS,
        default=TARGETS[0],
        help="what q_proj, k_proj and their like mean, which a Phi-3 has only fused: nothing, as "
        "PEFT reads them (default); the fused layers; or their parts",
    )


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the keys of the recipe as the command line would.

    Args:
        given: All keys of the configuration; those that are None are not given.

    Raises:
        ConfigError: A verb or key is unknown, missing, or has a value it cannot have.
    """
    options = {key: value for key, value in given.items() if value is not None}
    name = options.get("verb")
    if not isinstance(name, str) or name not in VERBS:
        raise ConfigError(f"verb: {name!r} must be one of {', '.join(VERBS)}.")
    verb = VERBS[name]
    known = (*verb.needs, *verb.takes)
    problems = [f"{key} is not set. Add {key}=... to the command." for key in verb.needs]
    problems = [problem for problem in problems if problem.partition(" ")[0] not in options]
    for key, value in options.items():
        if key != "verb":
            problems += _wrong(key, value, name, known)
    if problems:
        raise ConfigError("\n".join(problems))
    if "runtime" in options and isinstance(options["runtime"], str):
        options["runtime"] = [options["runtime"]]
    return options


def _wrong(key: str, value: Any, verb: str, known: Sequence[str]) -> list[str]:
    if key not in known:
        return [f"{key}: {value!r} is given, but {verb} takes {', '.join(known)}."]
    how = OPTIONS[key].how
    choices = how.get("choices")
    values = value if isinstance(value, list) else [value]
    if choices and not all(one in choices for one in values):
        return [f"{key}: {value!r} must be one of {', '.join(choices)}."]
    if how.get("action") == "store_true" and not isinstance(value, bool):
        return [f"{key}: {value!r} must be True or False."]
    if not how.keys() & {"type", "choices", "action"}:
        return _no_text(key, value)
    whole = how.get("type") is int
    if "type" in how and type(value) not in ((int,) if whole else (int, float)):
        return [f"{key}: {value!r} must be a {'whole ' * whole}number."]
    return []


def _no_text(key: str, value: Any) -> list[str]:
    """Say what is wrong with a name; YAML takes one of digits alone for a number."""
    if isinstance(value, str) or (key == "enable_lora" and isinstance(value, list)):
        return []
    if key == "enable_lora":
        return [f"{key}: {value!r} must be a list of True and False."]
    return [f"{key}: {value!r} is read as {type(value).__name__}. Write a name, such as ./{value}."]
