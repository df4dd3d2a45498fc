"""What can be asked of a command, as dataclasses, and how one is read from a YAML: strictly.

A key of a YAML, `key=value` after a recipe and a flag of `phi3-tune` are one field here. Its type
says what the value may be, the text under it is the command line's help. Reading reports every
mistake at once, under the key as it was typed. The standard library alone: `--help` is quick.
"""

import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from functools import partial
from inspect import Parameter, Signature, signature
from math import inf
from operator import eq
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from phi3_plugin.errors import ConfigError

_T = TypeVar("_T")
_Function = TypeVar("_Function", bound=Callable[..., Any])

# What a value may be. An annotation carries its kind, so that a dataclass reads as types and is
# checked as rules.


@dataclass(frozen=True)
class Kind:
    """What a value must be, in words and as a test."""

    words: str
    accepts: Callable[[Any], Any]
    """Returns something true for a value that may be."""
    convert: Callable[[Any], Any] | None = None
    """Makes of the value what the dataclass holds, if that is another type."""


class Advice(NamedTuple):
    """What more to say of a wrong value."""

    text: str


class Flags(NamedTuple):
    """How a field is typed after `phi3-tune`, where that is not ``--its-name``."""

    names: tuple[str, ...] = ()
    """None of them: it is typed by its place."""
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    """Of a flag that may be repeated."""


class OnResume(Enum):
    """Marks a key of a run: what becomes of another value when the run goes on with it."""

    HONOURED = "honoured"
    """The new value holds from there on, and the run's record says so."""
    FREE = "free"
    """Nothing that is trained depends on it."""
    CONTENT = "content"
    """What it stands for is compared instead: base weights, samples and their order, tensors."""
    REFUSED = "refused"
    """The run would become another one."""


class PartsOnResume(NamedTuple):
    """Marks a section for a component of others; any part that is not named is as the section."""

    honoured: tuple[str, ...] = ()
    free: tuple[str, ...] = ()


def is_number(value: Any, least: float = -inf, most: float = inf) -> bool:
    """Whether a value is a finite number within bounds; True and False are none."""
    if type(value) not in (int, float) or not least <= value <= most:
        return False
    return bool(abs(value) <= sys.float_info.max)  # an int may be larger


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return is_number(value) and value > 0


def is_whole(value: Any, least: float = -inf, below: float = inf) -> bool:
    """Whether a value is an int within bounds; True and False are none."""
    return type(value) is int and least <= value < below


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


_TEXT = Kind("text; put quotes around a number", lambda v: isinstance(v, str))
_NAME = Kind("a name; put quotes around a number", _is_name)
_PATH = Kind(_TEXT.words, _is_name, Path)


def _checkpoint(name: str) -> Path:
    from phi3_plugin import hub

    return hub.checkpoint(name) if hub.is_repository(name) else Path(name)


def _adapter(name: str) -> Path:
    from phi3_plugin import hub

    return hub.adapter(name)


AnyText = Annotated[str, _TEXT]
Name = Annotated[str, _NAME]
Folder = Annotated[Path, _PATH]
Checkpoint = Annotated[Path, Kind(_TEXT.words, _is_name, _checkpoint)]
"""A folder, or the name of a model of the Hub, which is downloaded to one."""
AdapterFolder = Annotated[Path, Kind(_TEXT.words, _is_name, _adapter)]
"""A folder or file, or the name of an adapter of the Hub, which is downloaded to one."""
Texts = Annotated[list[str], Kind("a list of texts, as in ['one', 'two']", _are_texts, list)]
Switch = Annotated[bool, Kind("True or False", lambda v: type(v) is bool)]
Count = Annotated[int, Kind("a whole number above 0", partial(is_whole, least=1))]
Seed = Annotated[
    int, Kind("a whole number from 0 to 2**63 - 1", partial(is_whole, least=0, below=2**63))
]
Positive = Annotated[float, Kind("a number above 0", is_positive)]
Share = Annotated[float, Kind("at least 0 and below 1", lambda v: is_number(v, 0) and v < 1)]
Section = Annotated[dict[str, Any], Kind("a section", lambda v: isinstance(v, dict))]


def kinds_of(hint: Any) -> list[Kind]:
    """Return the kinds of value that an annotation allows."""
    if get_origin(hint) is Annotated and (own := marks(hint, Kind)):
        return own
    if get_origin(hint) is Literal:
        return [Kind(word, partial(eq, word)) for word in get_args(hint)]
    if hint is NoneType:
        return [Kind("null", lambda value: value is None)]
    return [kind for part in get_args(hint) for kind in kinds_of(part)]


def says_all(hint: Any) -> bool:
    """Whether an annotation, anyone's, says by kinds alone what a value may be."""
    if hint is NoneType or get_origin(hint) is Literal or marks(hint, Kind):
        return True
    parts = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
    is_choice = get_origin(hint) in (Annotated, Union, UnionType)
    return is_choice and all(map(says_all, parts))


def marks(hint: Any, of: type[_T]) -> list[_T]:
    """Return what an annotation is marked with, of one class; an alias's own come first."""
    return [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, of)]


# How values become a dataclass.


class Unresolved(str):
    """Stands for a value that refers to something that is not there, and says so."""


def read_options(cls: type[_T], given: Mapping[str, Any], owner: str = "this recipe") -> _T:
    """Return a dataclass of what was given.

    Args:
        cls: The dataclass. Fields that are dataclasses are sections with keys of their own.
        given: Values by key, or a configuration of OmegaConf's; null is not given.
        owner: Whose keys they are, for messages.

    Raises:
        ConfigError: A key is unknown or missing, or has a value that it cannot have; all problems,
            one line each.
    """
    given = _set(resolved(given))
    if found := option_problems(cls, given, owner):
        raise ConfigError("\n".join(found))
    return made(cls, given)


def yaml_file(file: str | Path) -> Any:
    """Return the configuration in a YAML file.

    Raises:
        ConfigError: It is not there, or is no YAML with keys.
    """
    from omegaconf import DictConfig, OmegaConf

    try:
        cfg = OmegaConf.load(file)
    except OSError as error:
        if error.strerror is None:  # OmegaConf's, of a file that holds a number
            raise ConfigError(f"--config: {file} is no YAML with keys.") from error
        raise ConfigError(
            f"--config: {file} cannot be read ({error.strerror}). Give a file or the name of a "
            "config; `tune ls` lists those."
        ) from error
    except Exception as error:  # of yaml and OmegaConf, of many kinds
        raise ConfigError(f"--config: {file} is no YAML: {_in_a_line(error)}") from error
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"--config: {file} is no YAML with keys.")
    return cfg


def with_words(cfg: Any, words: Sequence[str]) -> Any:
    """Return a configuration with the ``key=value`` of a command line.

    Raises:
        ConfigError: A word is none, all of them; or a value is no YAML.
    """
    wrong = [word for word in words if not re.fullmatch(r"~[\w.]+|[\w.]+=.*", word, re.DOTALL)]
    if wrong:
        raise ConfigError("\n".join(map(no_key, wrong)))
    if not words:
        return cfg
    from omegaconf import OmegaConf

    container: Any = OmegaConf.to_container(cfg, resolve=False)
    if not any(word.startswith("~") for word in words):  # which removes what stands before it
        with suppress(Exception):  # one of them cannot be read: which?
            return merge_words(Namespace(**container), words)
    for word in words:
        try:
            merged = merge_words(Namespace(**container), [word])
        except Exception as error:  # of yaml and OmegaConf, of many kinds
            text = f"{word}: it cannot be read ({_in_a_line(error)}). Are its quotes closed?"
            raise ConfigError(text) from error
        container = OmegaConf.to_container(merged, resolve=False)
    return OmegaConf.create(container)


def merge_words(yaml_args: Namespace, words: Sequence[str]) -> Any:
    """Merge YAML and command line as torchtune does, but for ``section={…}``.

    torchtune takes that for the name of the section's component. Here a mapping that names a
    component takes the place of the section, since the keys of another one mean nothing to it;
    any other mapping sets keys.
    """
    from omegaconf import OmegaConf
    from torchtune.config._utils import _merge_yaml_and_cli_args

    keys, others = dict(vars(yaml_args)), list[str]()
    for word in words:
        key, _, value = word.partition("=")
        section = keys.get(key)
        if not value.lstrip().startswith("{") or "_component_" not in (section or ()):
            others.append(word)
            continue
        given = OmegaConf.from_dotlist([word])[key]
        if is_whole := "_component_" in given:
            others = [other for other in others if not re.match(rf"{key}[.=]", other)]
        merged = given if is_whole else OmegaConf.merge(section, given)
        keys[key] = OmegaConf.to_container(merged, resolve=False)
    return _merge_yaml_and_cli_args(Namespace(**keys), others)


def no_key(word: str) -> str:
    """Return the problem of a word that was to be a ``key=value``."""
    if dashed := re.fullmatch(r"--?([\w.-]+)(=.*)?", word, re.DOTALL):
        key, value = dashed[1].replace("-", "_"), dashed[2] or "=VALUE"
        return f"{word}: keys are typed without dashes, as {key}{value}."
    return f"{word!r} is no key=value, such as epochs=2."


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def check_command(words: Sequence[str]) -> None:
    """Refuse the words of a recipe's command line that torchtune would answer with a traceback.

    Raises:
        ConfigError: The config cannot be read, a word is no ``key=value``, or a value no YAML.
    """
    rest, config = [], None
    following = iter(words)
    for word in following:
        if word in ("-h", "--help"):
            return
        if word == "--config":
            config = next(following, None)
        elif word.startswith("--config="):
            config = word.partition("=")[2]
        else:
            rest.append(word)
    if config is not None:
        with_words(yaml_file(config), rest)


def _set(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what is not null."""
    return {key: value for key, value in (given or {}).items() if value is not None}


_PATHS = re.compile(r"(.*_)?(dir|path|file|folder)|source|(init_|teacher_)?adapter|resume|"
                    r".*output|prompts|sample")  # fmt: skip
"""Keys that may name a file or a folder."""


def resolved(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as plain Python; what cannot be looked up is `Unresolved`.

    In keys for paths ``~`` is the home folder, which no shell puts into ``key=~/x``.
    """
    return {key: _with_home(value, key) for key, value in _plain(given).items()}


def _with_home(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_home(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_home(item, key) for item in value)
    if not isinstance(value, str | Path) or not _PATHS.fullmatch(key):
        return value
    return type(value)(os.path.expanduser(value))


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(given, dict):
        return dict(given)
    from omegaconf import OmegaConf  # not earlier: `--help` would wait for it
    from omegaconf.errors import OmegaConfBaseException

    plain: dict[str, Any] = {}
    for key in map(str, given):
        try:
            value = given.get(key)  # None where it is ???
            is_section = OmegaConf.is_config(value)
            plain[key] = OmegaConf.to_container(value, resolve=True) if is_section else value
        except OmegaConfBaseException as error:
            where = error.full_key or key
            plain[key] = Unresolved(f"{where}: {str(error).splitlines()[0]}.")
    return plain


def option_problems(
    cls: type[Any],
    given: Mapping[str, Any],
    owner: str,
    *,
    section: str = "",
    others: Iterable[str] = (),
) -> list[str]:
    """Say what is wrong with values for a dataclass, a line each.

    Args:
        cls: The dataclass.
        given: Values by key, see `resolved`.
        owner: Whose keys they are.
        section: What stands before each key, as in ``generation.``.
        others: Keys that somebody else reads.
    """
    hints, others = get_type_hints(cls, include_extras=True), [*others]
    known = [*hints, *others]
    broken = [key for key, value in given.items() if isinstance(value, Unresolved)]
    unknown = [key for key in given if key not in (*known, *broken)]
    unset_keys = [key for key in required(cls) if given.get(key) is None]
    meant = {closest(key, known) for key in unknown}  # one mistake, one line
    found: list[str] = [given[key] for key in broken]
    available = f"Available: {', '.join(known)}." if len(known) <= 30 else "Remove it."
    found += [unknown_key(section + key, given[key], owner, known, available) for key in unknown]
    found += [unset(section + key) for key in unset_keys if key not in meant]
    for key, value in given.items():
        if key in hints and key not in (*unset_keys, *broken):
            found += mistakes(section + key, value, hints[key], owner)
    return found


def required(cls: type[Any]) -> list[str]:
    """Return the fields of a dataclass that have no default."""
    return [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]


def mistakes(key: str, value: Any, hint: Any, owner: str = "") -> list[str]:
    """Say what is wrong with one value.

    Args:
        key: As it was typed.
        value: What was given.
        hint: Annotation of its field.
        owner: Whose key it is.
    """
    if is_dataclass(hint):
        if value is not None and not isinstance(value, Mapping):
            return [f"{key}: {spelled(value)} must be a section."]
        inner = cast("type[Any]", hint)
        return option_problems(inner, _set(value), f"{owner}'s {key}", section=f"{key}.")
    kinds = kinds_of(hint)
    if any(kind.accepts(value) for kind in kinds):
        return []
    words = " or ".join(kind.words for kind in kinds)
    advice = "".join(f" {mark.text}" for mark in marks(hint, Advice))
    return [f"{key}: {spelled(value)} must be {words}.{advice}"]


def made(cls: type[_T], given: Mapping[str, Any]) -> _T:
    """Return a dataclass of values that have no problems; keys of others are passed over."""
    values = {}
    for key, hint in get_type_hints(cls, include_extras=True).items():
        if key not in given:
            continue
        value = given[key]
        if is_dataclass(hint):
            value = made(cast("type[Any]", hint), _set(value))
        else:
            kind = next(kind for kind in kinds_of(hint) if kind.accepts(value))
            value = kind.convert(value) if kind.convert else value
        values[key] = value
    return cls(**values)


EXAMPLES = {
    "checkpoint_dir": "checkpoint_dir=/path/to/Phi-3-mini-4k-instruct",
    "output_dir": "output_dir=/path/to/results",
    "model": "model._component_=phi3_plugin.models.lora_phi3",
    "tokenizer": "tokenizer._component_=phi3_plugin.data.phi3_tokenizer",
    "dataset": "dataset._component_=phi3_plugin.data.chat_dataset",
    "dataset.source": "dataset.source=my_chats.jsonl",
    "optimizer": "optimizer._component_=torch.optim.AdamW",
    "batch_size": "batch_size=4",
    "dtype": "dtype=bf16",
}
"""What a user may type who must set a key."""


def unset(key: str) -> str:
    """Return the problem of a key that the user must set."""
    example = EXAMPLES.get(key, f"{key}=VALUE")
    return f"{key} is not set. Set it in the YAML or add {example} to the command."


def takes(cls: type[Any], until: str | None = None) -> Callable[[_Function], _Function]:
    """Show the fields of a dataclass in the signature of a function that passes them on to it.

    Args:
        cls: The dataclass.
        until: The last field that is shown; None shows all.

    The function has ``*options`` or ``**options`` in their place; they are declared and explained
    once, in the dataclass. `tune validate`, help() and the check of a YAML's keys read signatures.
    """

    def show(function: _Function) -> _Function:
        passed_on = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        own = [p for p in signature(function).parameters.values() if p.kind not in passed_on]
        named = [p.name for p in own]  # a field that the function names itself is as that says
        fields = list(signature(cls).parameters.values())
        if until:
            fields = fields[: [p.name for p in fields].index(until) + 1]
        more = [p for p in fields if p.name not in named]
        shown = sorted([*own, *more], key=lambda p: p.kind)
        function.__signature__ = Signature(shown)  # type: ignore[attr-defined]
        return function

    return show


def unknown_key(
    where: str, value: Any, owner: str, known: Iterable[str], otherwise: str = "Remove it."
) -> str:
    """Return the problem of a key that nothing reads."""
    key = where.rpartition(".")[2]
    meant = closest(key, known)
    advice = f"Did you mean {meant!r}?" if meant else otherwise
    shown = HIDDEN if is_secret(key) else spelled(value)
    return f"{where}: {shown} is given, but {owner} has no such key. {advice}"


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that was probably meant."""
    return next(iter(get_close_matches(word, list(known), n=1)), None)


_SECRET = re.compile(
    r"key|token|secret|passw|pwd|credential|(^|[^a-z])auth(?!ors?([^a-z]|$))", re.IGNORECASE
)
_NO_SECRETS = ("tokenizer", "sample_max_new_tokens", "max_new_tokens", "skip_special_tokens")
HIDDEN = "(not shown)"
"""Stands for a secret."""


def is_secret(key: str) -> bool:
    """Whether a key looks like that of a secret, whose value is not to be shown."""
    return key not in _NO_SECRETS and _SECRET.search(key) is not None


def spelled(value: Any) -> str:
    """Return a value as the YAML would spell it, cut if it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# What is downloaded.


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """Download a model of the Hub: weights, configuration and tokenizer.

    It goes on where it was interrupted. HF_HOME says where the cache is, HF_TOKEN who asks.
    `tune download` is torchtune's own.
    """

    name: Annotated[Name, Flags(metavar="ID")]
    """such as microsoft/Phi-3-mini-4k-instruct"""
    output_dir: Annotated[Folder | None, Flags(("-o", "--output", "--output-dir"), "DIR")] = None
    """folder to download to (default: the Hub's cache, where its name is enough to find it)"""


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Upload an adapter or a model to the Hub, whose repository is made if there is none.

    HF_TOKEN, or what `hf auth login` keeps, says who uploads. resume/, which only going on with a
    run needs, stays here.
    """

    folder: Annotated[Folder, Flags(metavar="FOLDER")]
    """such as my_adapter/final"""
    name: Annotated[Name, Flags(metavar="USER/NAME")]
    """the repository"""
    private: Switch = False
    """a repository that is made is seen by its owner alone"""


# A run of which only the data is known.


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Fine-tune a model on your chats, and choose by data, model and device what is not said.

    It writes OUT/config.yaml, which `tune run phi3_lora_finetune --config` runs too. With --output
    of a run that is there it goes on.
    """

    source: Annotated[Name, Flags(metavar="DATA")]
    """a .csv, .json, .jsonl or .parquet file, a folder, a glob, or a data set of the Hub"""
    keys: Annotated[
        tuple[str, ...], Kind("a list of texts", _are_texts, tuple), Flags(metavar="KEY=VALUE")
    ] = ()
    """any key of the YAML, such as model.lora_rank=8; docs/recipe.md explains them"""
    base: Annotated[Name | None, Flags(("--base", "--checkpoint-dir"), "ID|DIR")] = None
    """base model: its name on the Hub, or a folder (microsoft/Phi-3-mini-4k-instruct)"""
    output_dir: Annotated[Folder | None, Flags(("-o", "--output"), "OUT")] = None
    """folder of the run (default: named after data and time)"""
    epochs: Count | None = None
    """times that the data is seen (3)"""
    lr: Positive | None = None
    """learning rate (2e-4)"""
    qlora: Switch = False
    """keep the base's weights in NF4 (default: where the memory would not suffice otherwise)"""
    config: Annotated[Name | None, Flags(("--config",), "YAML")] = None
    """a config, by name or file, whose keys are taken as they are"""
    print_config: Switch = False
    """print the YAML that would be run, and do nothing"""
    nproc_per_node: Annotated[Count, Flags(("--nproc-per-node", "--nproc_per_node"))] = 1
    """processes, one for each device (1)"""


# Which model answers, and how.

BASE_FLAGS = Flags(("--base", "--checkpoint-dir"), "ID|DIR")
Base = Annotated[Checkpoint, BASE_FLAGS]
Dtype = Literal["bf16", "fp16", "fp32"]
WideDtype = Literal["bf16", "fp32"]
"""With a range of exponents that no weight or update leaves."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is asked of every answer; by default the likeliest token each time."""

    max_new_tokens: Count = 256
    """tokens of an answer at most (default: 256; chat: 1024)"""
    temperature: Annotated[
        float, Kind("a number from 0 to a million", partial(is_number, least=0, most=1e6))
    ] = 0.0
    """0, the default: always the likeliest token, and nothing below but the penalty matters; else
    sampled"""
    top_k: Annotated[
        int, Kind("a whole number from 0, which is off", partial(is_whole, least=0))
    ] = 0
    """sample from the N likeliest tokens (0, off)"""
    top_p: Annotated[
        float, Kind("above 0 and at most 1, which is off", lambda p: is_number(p, 0, 1) and p > 0)
    ] = 1.0
    """sample from the likeliest tokens that together have probability N (1, off)"""
    min_p: Annotated[
        float, Kind("from 0, which is off, and below 1", lambda p: is_number(p, 0) and p < 1)
    ] = 0.0
    """sample from tokens of at least N of the likeliest one's probability (0, off)"""
    repetition_penalty: Annotated[
        float, Kind("from 1e-6 to a million", partial(is_number, least=1e-6, most=1e6))
    ] = 1.0
    """divides what speaks for tokens that were there before, the prompt included (1, off)"""
    seed: Annotated[
        int, Kind("a whole number from 0 to 2**63 - 1", partial(is_whole, least=0, below=2**63))
    ] = 0
    """decides the draws of each prompt; those of its neighbours change nothing (0)"""
    max_time: Positive | None = None
    """seconds of an answer at most, from its first token"""
    stop: Annotated[
        tuple[str, ...],
        Kind(
            "a text, or a list of texts such as '[\"Q:\"]', none empty",
            lambda v: _is_name(v) or (_are_texts(v) and all(v)),
            _as_tuple,
        ),
        Flags(("--stop",), "TEXT"),
    ] = ()
    """text that ends an answer and is not part of it; may be repeated"""


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(Sampling):
    """A model, a system message, and how tokens are chosen."""

    checkpoint_dir: Base
    """base model: its name on the Hub, or the folder it was downloaded to"""
    adapter: Annotated[AdapterFolder | None, Flags(("--adapter",), "DIR")] = None
    """an adapter, ours or anyone's: its folder, or its name on the Hub"""
    dtype: Dtype = "bf16"
    """what is computed in (default: bf16)"""
    device: Name | None = None
    """cpu, cuda, xpu or mps (default: cuda where there is one)"""
    quantize: Switch = False
    """keep the base's weights in NF4"""
    system: AnyText | None = None
    """system message"""
    hide_thoughts: Switch = False
    """leave out what stands between <think> and </think> before an answer"""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(AnswerOptions):
    """Talk to a model in the terminal. /help lists what can be typed."""

    max_new_tokens: Count = 1024
    """tokens of an answer at most (1024); whoever reads along can stop it"""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(AnswerOptions):
    """Answer a file of prompts."""

    prompts: Annotated[
        Name
        # what YAML makes of a single dash
        | Annotated[str, Kind("-", lambda v: v == [None], lambda _: "-")]
        | None,
        Flags(("--file", "--prompts"), "FILE"),
    ] = None
    """many prompts: .jsonl with {prompt} or {messages}, or .txt with one a line; - is standard
    input"""
    output: Annotated[Name | None, Flags(("-o", "--output"), "OUT")] = None
    """JSONL file to write (standard output)"""
    overwrite: Switch = False
    """replace OUT"""
    raw: Switch = False
    """complete the text, without chat template"""
    batch_size: Count = 8
    """prompts that are answered at a time (8)"""
    dropped: Literal["error", "warn"] = "error"
    """what a message is that the chat template leaves out (default: error)"""


@dataclass(frozen=True, kw_only=True)
class PromptOptions(GenerateOptions):
    """Answer a prompt in the terminal, or a file of prompts into a JSONL file.

    Ctrl-C keeps the answers that are there, and the same command goes on from them.
    """

    prompt: Annotated[
        tuple[str, ...], Kind("a list of texts", _are_texts, tuple), Flags(metavar="PROMPT")
    ] = ()
    """what to answer, in quotes; the answer is printed as it is written. The recipe takes prompts
    from a file alone: `key=value` would mangle free text"""


# What the recipes read that take the YAML of a training run, beside it.


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure a model on held-out data."""

    adapter: AdapterFolder | None = None
    """of any origin; or a whole model that was fine-tuned. null evaluates the base alone"""
    check_base: Switch = True
    """refuse an adapter that says it was made for other base weights"""
    answers: Switch = True
    """False measures loss and accuracy alone, which takes no time beside answers"""
    generation: Sampling = field(default_factory=Sampling)
    """how answers are generated, a section; greedily by default"""
    generation_batch_size: Count = 8
    """answers that one process generates at once"""
    max_samples: Count | None = None
    """evaluate the first so many; null is all"""
    worst: Seed = 10
    """answers that the page shows of each kind"""
    overwrite: Switch = False
    """replace an evaluation that output_dir holds already"""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Show what a run would be trained on."""

    samples: Seed = 8
    """how many to show, token by token"""
    processes: Count = 1
    """for how many to count steps"""
    compare: Switch = False
    """compare ids and masks with transformers"""


# What the verbs of `phi3-tune adapter` read.

RUNTIMES = ("PEFT", "vLLM", "llama.cpp")
Form = Literal["peft", "peft-patterns", "torchtune", "loralib", "gguf", "mlx", "onnx"]
Quantization = Literal["f16", "bf16", "q8_0", "q4_0"]
OnnxType = Literal["int4", "fp32"]
PublishedTargets = Literal["as-published", "as-intended", "as-intended-parts"]


def _groups(value: Any) -> list[bool] | None:
    """Return the switches of ``true,false,true`` or of a list; None if it is neither."""
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, list | tuple):
        return None
    names = [str(word).strip().lower() for word in words]
    known = all(name in ("true", "false", "1", "0") for name in names)
    return [name in ("true", "1") for name in names] if known else None


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Say what PEFT, vLLM and llama.cpp make of an adapter as it lies there.

    With the base at hand, compare its logits in PEFT and here. Ends with 1 if it is broken.
    """

    adapter: Annotated[AdapterFolder, Flags(metavar="ADAPTER")]
    """the adapter: its folder, or its name on the Hub"""
    checkpoint_dir: Annotated[Checkpoint | None, BASE_FLAGS] = None
    """base model: its name on the Hub, or the folder it was downloaded to"""
    runtime: Annotated[
        tuple[str, ...],
        Kind(
            f"one of {', '.join(RUNTIMES)}, or a list of them",
            lambda v: (_is_name(v) and v in RUNTIMES) or (_are_texts(v) and {*v} <= {*RUNTIMES}),
            _as_tuple,
        ),
        Flags(("--runtime",), choices=RUNTIMES),
    ] = ("PEFT",)
    """end with 1 unless this one loads the adapter as it is; may be repeated"""
    json: Switch = False
    """print JSON instead of lines"""
    dtype: WideDtype = "fp32"
    """what both compute in (default: fp32)"""


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """An adapter that is made into something else: from where, over which base, to where."""

    adapter: Annotated[AdapterFolder, Flags(metavar="ADAPTER")]
    """the adapter: its folder or file, or its name on the Hub"""
    checkpoint_dir: Base
    """base model: its name on the Hub, or the folder it was downloaded to"""
    output_dir: Annotated[Folder, Flags(("-o", "--output"), "OUT")]
    """what to write; must not be there yet"""
    alpha: Annotated[float, Kind("a number", is_number)] | None = None
    """what the file does not say: the scale is alpha / rank"""
    enable_lora: Annotated[
        Annotated[list[bool], Kind("a list of True and False", _groups, _groups)] | None,
        Flags(("--enable-lora",), "LIST"),
    ] = None
    """of loralib's MergedLinear, such as true,false,true for q and v"""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(AdapterOptions):
    """Write an adapter in another form."""

    to: Form
    """a folder of PEFT's that every runtime reads alike; one that keeps each module's rank and
    alpha, for PEFT alone; a folder for torchtune's Phi-3; a .pt or .safetensors file for loralib;
    a .gguf file for llama.cpp; a folder for mlx-lm; base and adapter for ONNX Runtime"""
    merged_linear: Switch = False
    """loralib: qkv_proj and gate_up_proj are MergedLinear"""
    type: OnnxType | None = None
    """onnx: of the weights (default: int4)"""


@dataclass(frozen=True, kw_only=True)
class MergeOptions(AdapterOptions):
    """Write a model in which the adapter is part of the weights."""

    to: Literal["hf", "gguf", "onnx"] = "hf"
    """a checkpoint folder (default), a .gguf file for llama.cpp with a Modelfile for ollama, or a
    folder for ONNX Runtime"""
    type: Literal[Quantization, OnnxType] | None = None
    """of the weights in a .gguf file (default: q8_0), or for ONNX Runtime (int4)"""
    onto: Literal["original", "nf4"] = "original"
    """the base as it was downloaded (default), or as QLoRA quantizes it"""
    dtype: WideDtype | None = None
    """of the weights (default: the base's own); others are rounded to it first"""


@dataclass(frozen=True, kw_only=True)
class ConvertBaseOptions:
    """Write a model, such as one that an adapter was merged into, in another form."""

    checkpoint_dir: Annotated[Checkpoint, Flags(metavar="BASE")]
    """its name on the Hub, or its folder"""
    to: Literal["gguf", "onnx"]
    """a .gguf file for llama.cpp, with a Modelfile for ollama; or a folder for ONNX Runtime"""
    output_dir: Annotated[Folder, Flags(("-o", "--output"), "OUT")]
    """what to write; must not be there yet"""
    type: Literal[Quantization, OnnxType] | None = None
    """of the weights (default: q8_0 in a .gguf file, int4 for ONNX Runtime)"""


@dataclass(frozen=True, kw_only=True)
class ImportOptions(AdapterOptions):
    """Write a PEFT folder from an adapter of torchtune, loralib, mlx-lm or PEFT, to train it on."""

    rank: Annotated[int, Kind("a whole number", is_whole)] | None = None
    """refuse tensors of another rank"""


@dataclass(frozen=True, kw_only=True)
class ImportConfigOptions:
    """Turn the training_config and peft_config of Microsoft's samples into our YAML."""

    sample: Annotated[Folder, Flags(metavar="SAMPLE.json")]
    """JSON object with both dictionaries"""
    output: Annotated[Folder, Flags(("-o", "--output"), "OUT.yaml")]
    """must not be there yet"""
    targets: PublishedTargets = "as-published"
    """what q_proj, k_proj and their like mean, which a Phi-3 has only fused: nothing, as PEFT reads
    them (default); the fused layers; or their parts"""
