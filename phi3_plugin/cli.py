"""`phi3-tune generate ...` and `phi3-tune chat ...`: what can be typed, and what it means.

The keys of `generate` are those of `tune run phi3_generate`, which takes them as `key=value`.
Needs the standard library alone until a verb runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from phi3_plugin import hook
from phi3_plugin.errors import ConfigError, Phi3Error

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence


# `phi3-tune adapter ...` and `phi3-tune import-config ...`: what can be typed, and what it means.
#
# The same verbs and keys are those of `tune run phi3_adapter`, which takes them as `key=value`.
# Needs the standard library alone until a verb runs, so that `--help` is quick.

RUNTIMES = ("PEFT", "vLLM", "llama.cpp")
FORMS = ("peft", "peft-patterns", "torchtune", "loralib", "gguf")
TARGETS = ("as-published", "as-intended", "as-intended-parts")


class Option(NamedTuple):
    """A key of a verb, and how it is typed."""

    flags: tuple[str, ...]
    """None of them: it is typed by its place."""
    how: dict[str, Any]
    """What argparse is told."""


ADAPTER_OPTIONS = {
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


ADAPTER_VERBS = {
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


def parse_adapter(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the command, ``adapter`` or ``import-config``, and what was given to it.

    Args:
        words: The command line from the command on.
    """
    given = vars(adapter_parser().parse_args(words))
    options = {k: v for k, v in given.items() if v is not None and v is not False}  # 0 is a value
    return options.pop("command"), options


def adapter_parser() -> argparse.ArgumentParser:
    """Return the parser of both commands."""
    top = argparse.ArgumentParser(prog="phi3-tune")
    commands = top.add_subparsers(dest="command", required=True)
    does = "Check, convert, merge and import adapters."
    adapter = commands.add_parser("adapter", help=does, description=does)
    verbs = adapter.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in ADAPTER_VERBS.items():
        sub = verbs.add_parser(
            name, help=verb.does.split(". ")[0].rstrip("."), description=verb.does
        )
        for key in (*verb.needs, *verb.takes):
            _add(sub, key, needed=key in verb.needs)
    _add_import_config(commands)
    return top


def _add(sub: argparse.ArgumentParser, key: str, *, needed: bool) -> None:
    flags, how = ADAPTER_OPTIONS[key]
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
    if not isinstance(name, str) or name not in ADAPTER_VERBS:
        raise ConfigError(f"verb: {name!r} must be one of {', '.join(ADAPTER_VERBS)}.")
    verb = ADAPTER_VERBS[name]
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
    how = ADAPTER_OPTIONS[key].how
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


DTYPES = ("bf16", "fp32")
DROPPED = ("error", "warn")


def _number(flag: str, kind: type, text: str) -> Option:
    return Option((flag,), {"type": kind, "metavar": "N", "help": text})


MODEL = {
    "checkpoint_dir": Option(
        ("--base", "--checkpoint-dir"),
        {"metavar": "DIR", "help": "folder of the base model, as it was downloaded"},
    ),
    "adapter": Option(
        ("--adapter",), {"metavar": "DIR", "help": "folder of an adapter, ours or anyone's"}
    ),
    "dtype": Option(
        ("--dtype",), {"choices": DTYPES, "help": "what is computed in (default: bf16)"}
    ),
    "device": Option(("--device",), {"help": "cpu or cuda (default: a GPU where there is one)"}),
    "quantize": Option(
        ("--quantize",), {"action": "store_true", "help": "keep the base's weights in NF4"}
    ),
}
"""Which model answers."""

SAMPLING = {
    "max_new_tokens": _number(
        "--max-new-tokens", int, "tokens of an answer at most (default: 256; chat: 1024)"
    ),
    "temperature": _number(
        "--temperature", float, "0, the default: always the most probable token; else sampled"
    ),
    "top_k": _number("--top-k", int, "sample from the N most probable tokens (0, off)"),
    "top_p": _number("--top-p", float, "sample from tokens that together have probability N (1)"),
    "min_p": _number(
        "--min-p", float, "sample from tokens of at least N of the best one's probability (0)"
    ),
    "repetition_penalty": _number(
        "--repetition-penalty", float, "above 1: tokens that were there become less probable (1)"
    ),
    "seed": _number("--seed", int, "of the sampling (0)"),
    "max_time": _number("--max-time", float, "seconds of an answer at most, from its first token"),
    "stop": Option(
        ("--stop",),
        {
            "action": "append",
            "metavar": "TEXT",
            "help": "text that ends an answer and is not part of it; may be repeated",
        },
    ),
}
"""How tokens are chosen, and when an answer ends."""

SYSTEM = {"system": Option(("--system",), {"metavar": "TEXT", "help": "system message"})}

PROMPTS = {
    "prompt": Option(
        (),
        {
            "nargs": "*",
            "metavar": "PROMPT",
            "help": "what to answer, in quotes; the answer is printed as it is written",
        },
    ),
    "prompts": Option(
        ("--file", "--prompts"),
        {
            "metavar": "FILE",
            "help": "many prompts: .jsonl with {prompt} or {messages}, or .txt with one a line; - "
            "is standard input",
        },
    ),
    "output": Option(
        ("-o", "--output"), {"metavar": "OUT", "help": "JSONL file to write (standard output)"}
    ),
    "overwrite": Option(("--overwrite",), {"action": "store_true", "help": "replace OUT"}),
    "raw": Option(
        ("--raw",), {"action": "store_true", "help": "complete the text, without chat template"}
    ),
    "batch_size": _number("--batch-size", int, "prompts that are answered at a time (8)"),
    "dropped": Option(
        ("--dropped",),
        {
            "choices": DROPPED,
            "help": "what a message is that the chat template leaves out (default: error)",
        },
    ),
}
"""Of `generate` alone."""

GENERATE_OPTIONS = {**MODEL, **PROMPTS, **SYSTEM, **SAMPLING}
"""Every key."""

CHAT = (*MODEL, *SYSTEM, *SAMPLING)
"""The keys of `chat`."""

RECIPE = tuple(key for key in GENERATE_OPTIONS if key != "prompt")
"""The keys of the recipe. It takes prompts from a file: `key=value` would mangle free text."""

GENERATE_VERBS = {
    "generate": (
        "Answer prompts",
        "Answer a prompt in the terminal, or a file of prompts into a JSONL file. Ctrl-C keeps "
        "the answers that are there, and the same command goes on from them.",
        tuple(GENERATE_OPTIONS),
    ),
    "chat": (
        "Talk to a model",
        "Talk to a model in the terminal. /help lists what can be typed.",
        CHAT,
    ),
}
"""What a verb is listed as, what it does, and its keys."""


def parse_generate(words: Sequence[str]) -> dict[str, Any]:
    """Return what was given to a command.

    Args:
        words: The command line from the command on, ``generate`` or ``chat``.
    """
    given = vars(generate_parser(words[0]).parse_intermixed_args(words[1:]))
    if given.get("prompt") == ["-"]:  # standard input, as everywhere, and no prompt
        given |= {"prompt": [], "prompts": "-"}
    # 0 and an empty text are values
    return {key: v for key, v in given.items() if v is not None and v is not False and v != []}


def generate_parser(verb: str) -> argparse.ArgumentParser:
    """Return the parser of a command. Prompts and options may come in any order."""
    _, does, keys = GENERATE_VERBS[verb]
    made = argparse.ArgumentParser(prog=f"phi3-tune {verb}", description=does)
    for key in keys:
        flags, how = GENERATE_OPTIONS[key]
        if flags:
            made.add_argument(*flags, dest=key, required=key == "checkpoint_dir", **how)
        else:
            made.add_argument(key, **how)
    return made


# `phi3-tune`: torchtune's `tune`, with our names in it also where the start-up hook is off.
#
# Beside the verbs of `tune` it has one for each recipe of ours that is not a training run:
# `phi3-tune inspect-data ...` is `phi3-tune run phi3_inspect_data ...`. Those that take free text or
# are no recipe have a parser of their own: adapter_cli.py, generate_cli.py.
#
# The hook (hook.py) can be switched off for us alone or for every backend of torch, and both
# switches reach the workers that `tune run` starts. `phi3-tune` changes neither. It registers in its
# own process, and lets each worker be another `phi3-tune`, which does the same.

VERBS = {
    "inspect-data": ("phi3_inspect_data", "Show what a run would be trained on"),
    "evaluate": ("phi3_evaluate", "Measure a model on held-out data"),
}
"""Our own verbs: the recipe that each runs, and what it does."""

PARSED = {
    "generate": ("recipes.phi3_generate", GENERATE_VERBS["generate"][0]),
    "chat": ("chat", GENERATE_VERBS["chat"][0]),
    "adapter": ("recipes.phi3_adapter", "Check, convert, merge and import adapters"),
    "import-config": (
        "import_config",
        "Turn the dictionaries of Microsoft's samples into our YAML",
    ),
}
"""Those that parse their own words: the module whose run() each calls, and what it does."""


def main() -> None:
    """Run `phi3-tune` with the command line of this process."""
    hook.register()
    verb, words = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if verb in PARSED:
        sys.exit(_run_parsed(sys.argv[1:]))
    if verb in VERBS and {"-h", "--help"} & {*words}:
        return print(_help(verb), end="")
    from torchtune._cli.tune import TuneCLIParser  # not earlier: importing torchtune must find us

    tune = TuneCLIParser()
    subparsers = tune._parser._subparsers._group_actions[0]
    for verb, (_, does) in (VERBS | PARSED).items():
        subparsers.add_parser(verb, help=does)
    verbs = subparsers.choices
    tune._parser.description = "torchtune's command line, with Phi-3."
    for parser in (tune._parser, *verbs.values()):
        _rename(parser)
    _make_workers_register(verbs["run"].get_default("func").__self__)
    _run_recipes()
    tune.run(tune.parse_args())


def _run_parsed(words: list[str]) -> int:
    """Run a verb that has a parser; return the exit code. `--help` imports nothing else."""
    options = _parsed(words)
    try:
        module = import_module(f"phi3_plugin.{PARSED[words[0]][0]}")
        return int(module.run(options))
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except Phi3Error as error:
        if os.environ.get("PHI3_PLUGIN_TRACEBACK") == "1":
            raise
        print(f"phi3_plugin: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _parsed(words: list[str]) -> Any:
    if words[0] in GENERATE_VERBS:
        return parse_generate(words)
    return parse_adapter(words)[1]


def _help(verb: str) -> str:
    """Return the help of a verb that is a recipe, for which `run` would ask for a config."""
    recipe, does = VERBS[verb]
    return (
        f"usage: phi3-tune {verb} [TORCHRUN-OPTIONS] --config CONFIG [KEY=VALUE ...]\n\n"
        f"{does}. CONFIG is that of a training run; KEY=VALUE replaces what it says.\n"
        f"The same as phi3-tune run {recipe}. docs/{verb.partition('-')[0]}.md lists the keys.\n"
    )


def _run_recipes() -> None:
    """Write a verb of ours as the `run` that it stands for."""
    if sys.argv[1:2] and sys.argv[1] in VERBS:
        sys.argv[1:2] = ["run", VERBS[sys.argv[1]][0]]


def _rename(parser: argparse.ArgumentParser) -> None:
    """Say `phi3-tune` wherever a parser says `tune` to the user."""
    for field in ("prog", "usage", "epilog"):
        text = getattr(parser, field)
        if text is not None:
            setattr(parser, field, re.sub(r"(?<![\w-])tune\b", "phi3-tune", text))


def _make_workers_register(run: Any) -> None:
    """Let torchrun start `phi3-tune run RECIPE ...` in each worker instead of the bare recipe."""
    stock = run._run_distributed

    def _run_distributed(args: argparse.Namespace, is_builtin: bool) -> None:
        as_typed = sys.argv[-len(args.recipe_args) - 1 :]  # args holds paths, which `run` refuses
        args.recipe, args.recipe_args = "phi3_plugin.cli", ["run", *as_typed]
        stock(args, is_builtin=False)  # so that torchrun takes the recipe as a module

    run._run_distributed = _run_distributed


if __name__ == "__main__":
    main()
