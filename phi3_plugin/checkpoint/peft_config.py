"""What adapter_config.json says, whoever wrote it; what we do not compute is refused.

PEFT finds ranks and alphas of single modules by regular expressions. A stranger's are matched only
if they are so plain that matching them takes no time.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from phi3_plugin.checkpoint.equivalents import ADALORA, STARTS, adalora_keys
from phi3_plugin.checkpoint.files import quoted
from phi3_plugin.checkpoint.peft import NOTE
from phi3_plugin.config import read_json_object
from phi3_plugin.errors import AdapterError
from phi3_plugin.options import Kind, is_number, is_whole

PATTERN_NAMES = 2000
"""Names in a pattern at most."""

PLAIN_PATTERN = re.compile(
    r"\^?(?:[\w.-]|\\\.|\\d\+?|\.\*|\[[\w-]+\]|\((?:[\w.]+\|)*[\w.]+\))+\$?", re.ASCII
)
"""Names, classes of characters, alternatives and wildcards."""

LONGEST_PATTERN = 300
"""Characters of a name in a pattern."""

BRANCHES = 2
"""How many alternatives and wildcards one may hold: time grows with the power of it."""

LIMITED_PATTERNS = 16
"""Of patterns with more, which are matched under a time limit."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", "lora_only"),  # of layers that a Phi-3 has without one
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "kasa_config": (),
    "layer_replication": (),
    "megatron_config": (),
    "monteclora_config": (),
    "target_parameters": (),
    "use_bdlora": (False,),
    "velora_config": (),
}
"""Features of PEFT that change what is computed, and what they must be besides absent or null."""

MERGED_BY_PEFT = (
    *("IA3", "LOHA", "LOKR", "VERA", "OFT", "BOFT", "HRA", "FOURIERFT", "RANDLORA", "VBLORA"),
    *("TRAINABLE_TOKENS", "MISS", "ROAD", "WAVEFT", "C3A", "DELORA", "GRALORA"),
)
"""Tried with PEFT 0.21.2; prompt learning and POLY it does not merge."""
PEFT_MERGES = "PEFT itself can put it into the base: merge_and_unload(), then save_pretrained()."

BASE_KEEPING_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Starting points that leave the base as it is; after others, such as PiSSA, the adapter belongs to
a base that was changed."""

READ_KEYS = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "base_model_name_or_path", "init_lora_weights", NOTE),
    "trainable_token_indices",
}

IRRELEVANT_KEYS = {
    *("task_type", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "inference_mode", "revision", "auto_mapping", "peft_version"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "runtime_config", "ensure_weight_tying"),
    *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),  # ms-swift's
}
"""What the tensors say themselves, or what only training reads."""


@dataclass(frozen=True)
class PeftConfig:
    """What adapter_config.json says; values of each kind are checked."""

    file: Path
    keys: Mapping[str, Any]
    modules: tuple[str, ...] = ()
    """Hugging Face's names of those that have an adapter."""

    def rank(self, module: str) -> int:
        """Return the rank of a module, by Hugging Face's name."""
        return int(self._of(module, "r", "rank_pattern"))

    def alpha(self, module: str) -> float:
        """Return the alpha of a module."""
        return float(self._of(module, "lora_alpha", "alpha_pattern"))

    def scale(self, module: str) -> float:
        """Return what PEFT multiplies B A with in a module."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.keys.get("use_rslora") else rank)

    def _of(self, module: str, key: str, pattern: str) -> Any:
        """Return the value of the first pattern that fits, else that of all modules.

        Source: PEFT 0.21.2, get_pattern_key of utils/other.py; 8 is its default.
        """
        for name, value in (self.keys.get(pattern) or {}).items():
            if self._fits(name, module):
                return value
        return self.keys.get(key, 8)

    def _fits(self, pattern: str, module: str) -> bool:
        if (compiled := _compiled(pattern)) is not None:
            return bool(compiled.match(module))
        names = self.modules if module in self.modules else (module,)
        return module in matched(rf"(.*\.)?({pattern})", names)


@lru_cache(2 * PATTERN_NAMES)  # re itself remembers 512, fewer than a file may hold
def _compiled(name: str) -> re.Pattern[str] | None:
    """Return what finds the modules of a pattern; None if that needs a limit."""
    return re.compile(rf"(.*\.)?({name})$") if is_plain(name) else None


def read_peft_config(file: Path, ranks: Mapping[str, int] | None = None) -> PeftConfig:
    """Read adapter_config.json of an adapter that is to be computed, as that of a LoRA.

    Args:
        file: See above.
        ranks: Of the modules that have an adapter, by Hugging Face's names.

    Raises:
        AdapterError: It is broken, or the adapter needs what we do not compute; each is listed, up
            to a limit.
    """
    keys, ranks = read_json_object(file, AdapterError), ranks or {}
    if is_adalora(keys):
        keys = adalora_keys(keys, ranks, file)
    needed = [f"{key}: is missing." for key in ("r", "lora_alpha") if key not in keys]
    problems = [*unsupported(keys), *_unknown(keys), *needed, *wrong_values(keys)]
    if problems:
        raise AdapterError(f"{file} cannot be used:\n{problem_list(problems, 20)}")
    return PeftConfig(file, keys, tuple(ranks))


def is_adalora(keys: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of an AdaLoRA."""
    return keys.get("peft_type") == ADALORA


def problem_list(problems: Sequence[str], most: int) -> str:
    """Return the first problems, a line each, and how many more there are."""
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "\n".join(f"  {line}" for line in (*problems[:most], *more))


def unsupported(keys: Mapping[str, Any], known: Collection[str] = ()) -> Iterator[str]:
    """Yield the features of PEFT that change what is computed, but for those that are known."""
    if is_adalora(keys):
        if ADALORA not in known:
            converts = "`phi3-tune adapter convert --to peft` makes the LoRA that equals it."
            yield f"peft_type: {ADALORA!r} is not checked as it is. {converts}"
    elif (kind := keys.get("peft_type", "LORA")) != "LORA":
        merged = f" {PEFT_MERGES}" if kind in MERGED_BY_PEFT else ""
        yield f"peft_type: {quoted(kind)}, only LORA adapters are computed.{merged}"
    for key, allowed in UNSUPPORTED.items():
        value = keys.get(key)
        if key not in known and value is not None and value not in (*allowed, {}, []):
            yield f"{key}: {quoted(value)} is a feature that is not computed here."


def refuse_unsupported(file: Path) -> None:
    """Refuse an adapter with features that change what is computed, and are not computed here.

    Raises:
        AdapterError: It has some, and each is named; or the file is broken.
    """
    if problems := [*unsupported(read_json_object(file, AdapterError), {ADALORA})]:
        raise AdapterError(f"{file} cannot be used:\n{problem_list(problems, 20)}")


def _unknown(keys: Mapping[str, Any]) -> Iterator[str]:
    """Yield a start that changes the base, and keys of which nothing is known."""
    start = keys.get("init_lora_weights")
    if start is not None and start not in (*BASE_KEEPING_STARTS, *STARTS):
        advice = "Save it with path_initial_model_for_weight_conversion, for the original base."
        if start == "loftq":
            advice = "The file does not hold that base: merge it where it was trained."
        changes = "changes the base that the adapter is for"
        yield f"init_lora_weights: {quoted(start)} {changes}. {advice}"
    for key in sorted(map(str, keys.keys() - (READ_KEYS | IRRELEVANT_KEYS | UNSUPPORTED.keys()))):
        if keys[key] not in (None, False, {}, []):
            unknown = f"{quoted(key)}: {quoted(keys[key])}"
            yield f"{unknown} is an unknown key. Remove it if it is harmless."


def is_alpha(value: object) -> bool:
    """Whether a value can be an alpha: a number that leaves a scale above 0 and not infinite."""
    return is_number(value, 1e-30, 1e30)


def _is_switch(value: object) -> bool:
    return value is None or isinstance(value, bool)


is_rank = partial(is_whole, least=1)


def _are_token_indices(value: object) -> bool:
    lists = [*value.values()] if isinstance(value, dict) else [value or []]
    return all(
        isinstance(ids, list) and all(is_whole(i, least=0) for i in ids) and len({*ids}) == len(ids)
        for ids in lists
    )


VALUES = {
    "r": Kind("a whole number above 0", is_rank),
    "lora_alpha": Kind("a number above 0", is_alpha),
    "lora_dropout": Kind(
        "at least 0 and below 1", lambda v: v is None or (is_number(v, 0) and v < 1)
    ),
    "use_dora": Kind("true or false", _is_switch),
    "use_rslora": Kind("true or false", _is_switch),
    "trainable_token_indices": Kind(
        "a list of tokens' ids, each once, or an object of modules and such lists",
        _are_token_indices,
    ),
    "base_model_name_or_path": Kind("text", lambda v: v is None or isinstance(v, str)),
}
"""What the keys must be that are read, if they are there."""


def wrong_values(keys: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the values that are there, a sentence each."""
    for key, kind in VALUES.items():
        if key in keys and not kind.accepts(keys[key]):
            yield f"{key}: {quoted(keys[key])} must be {kind.words}."
    for key, is_good in (("rank_pattern", is_rank), ("alpha_pattern", is_alpha)):
        pattern = keys.get(key) or {}
        if not isinstance(pattern, dict) or len(pattern) > PATTERN_NAMES:
            yield f"{key}: must be an object of at most {PATTERN_NAMES} names."
            continue
        limited = [name for name in pattern if is_limited(name)]
        if len(limited) > LIMITED_PATTERNS:
            most = f"at most {LIMITED_PATTERNS} names"
            yield f"{key}: {most} may have more than {BRANCHES} wildcards."
        for name, value in pattern.items():
            if not is_good(value) or not (is_plain(name) or is_limited(name)):
                yield (
                    f"{key}: {quoted(name)}: {quoted(value)} is not read. Use modules' names, and "
                    "numbers above 0."
                )


SECONDS = 2
"""Of computing that a pattern may take for the modules of a model."""

_MATCHER = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({1 << 29}, {1 << 29}))
pattern, names = json.load(sys.stdin)
print(json.dumps([name for name in names if re.fullmatch(pattern, name)]))
"""


@lru_cache
def matched(pattern: str, names: tuple[str, ...]) -> frozenset[str]:
    """Return the names that a stranger's pattern fits from end to end, as PEFT does.

    One that is not plain may take for ever, so it is matched in a child with a limit.

    Args:
        pattern: From ``target_modules`` or ``exclude_modules``.
        names: Of modules.

    Raises:
        AdapterError: It is no regular expression, or takes too long.
    """
    if is_plain(pattern, 3):
        return frozenset(name for name in names if re.fullmatch(pattern, name))
    child = subprocess.run(
        [sys.executable, "-c", _MATCHER],
        input=json.dumps([pattern, names]).encode(),
        capture_output=True,
        check=False,
    )
    if child.returncode:
        problem = f"takes more than {SECONDS} s" if child.returncode < 0 else "cannot be matched"
        raise AdapterError(
            f"the pattern {quoted(pattern)} {problem}. Name the modules in a list, as in "
            "['qkv_proj', 'o_proj']."
        )
    return frozenset(json.loads(child.stdout))


def check_patterns(file: Path, names: Iterable[str]) -> None:
    """Refuse what PEFT would match without a limit.

    Args:
        file: adapter_config.json.
        names: Of all modules of the model.

    Raises:
        AdapterError: A pattern is too complicated; or the file is broken.
    """
    keys = read_json_object(file, AdapterError)
    for key in ("target_modules", "exclude_modules"):
        if isinstance(pattern := keys.get(key), str) and pattern != "all-linear":
            try:
                matched(pattern, tuple(names))
            except AdapterError as error:
                raise AdapterError(f"{file}: {key}: {error}") from error
    if wrong := [line for line in wrong_values(keys) if "_pattern: " in line]:
        raise AdapterError(f"{file}: {wrong[0]}")
    layers = keys.get("layers_pattern") or []
    for pattern in [layers] if isinstance(layers, str) else layers:
        if not isinstance(pattern, str) or not is_plain(pattern):
            raise AdapterError(f"{file}: layers_pattern: {quoted(pattern)} is not read.")


def is_plain(pattern: str, branches: int = BRANCHES) -> bool:
    """Whether a stranger's pattern is so plain that matching it takes no time."""
    if len(pattern) > LONGEST_PATTERN or sum(map(pattern.count, "*+(")) > branches:
        return False
    try:
        return bool(PLAIN_PATTERN.fullmatch(pattern) and re.compile(pattern))
    except re.error:
        return False


def is_limited(pattern: str) -> bool:
    """Whether one is too long to be plain, but matched under a time limit."""
    wildcards = sum(map(pattern.count, "*+("))
    return pattern.count("(") <= BRANCHES < wildcards and is_plain(pattern, 2 * wildcards)
