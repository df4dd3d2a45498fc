"""What adapter_config.json of an adapter says, whoever wrote it; what we do not compute is refused.

PEFT finds ranks and alphas of single modules by regular expressions. A stranger's are matched only
if they are so plain that matching them takes no time.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from phi3_plugin.checkpoint.tensor_file import shown
from phi3_plugin.errors import AdapterError

CONFIG_BYTES = 16_000_000
PATTERNS = 2000
NOTE = "phi3_plugin"
LISTED = 20

PLAIN = re.compile(
    r"\^?(?:[\w.-]|\\\.|\\d\+?|\.\*|\[[\w-]+\]|\((?:[\w.]+\|)*[\w.]+\))+\$?", re.ASCII
)
"""Names, classes of characters, alternatives and wildcards."""

BRANCHES = 2
"""How many of the last two one pattern may hold: time grows with the power of it."""

OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
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
    "trainable_token_indices": (),
    "use_bdlora": (False,),
    "velora_config": (),
}
"""Features of PEFT that change what is computed, and what they must be besides absent or null."""

STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Starting points that leave the base as it is; after others, such as PiSSA, the adapter belongs to
a base that was changed."""

USED = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "base_model_name_or_path", "init_lora_weights", NOTE),
}

IRRELEVANT = {
    *("task_type", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "inference_mode", "revision", "auto_mapping", "peft_version"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "runtime_config", "ensure_weight_tying"),
}
"""What the tensors say themselves, or what only training reads."""


@dataclass(frozen=True)
class PeftSettings:
    """The scale of every module, and what else is kept."""

    file: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    dropout: float
    base: str
    note: object = None
    """What this package noted of the original, where the weights file has no place for it."""

    def scale(self, module: str, rank: int) -> float:
        """Return what B A is multiplied with.

        Args:
            module: Hugging Face's name.
            rank: Of its tensors.

        Raises:
            AdapterError: The file says another rank.
        """
        said = _match(self.rank_pattern, module, self.rank)
        if said != rank:
            raise AdapterError(
                f"{self.file}: {module} is said to have rank {shown(said)}, but its tensors have "
                f"{rank}. Correct r or rank_pattern."
            )
        alpha = float(_match(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_settings(file: Path) -> PeftSettings:
    """Read adapter_config.json.

    Raises:
        AdapterError: It is broken, or the adapter needs what we do not compute; each is listed, up
            to a limit.
    """
    keys = read_object(file)
    problems = [*_refused(keys), *_wrong(keys)]
    if problems:
        more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        listed = "\n  ".join(problems[:LISTED])
        raise AdapterError(f"{file} cannot be used:\n  {listed}{more}")
    return PeftSettings(
        file,
        rank=keys["r"],
        alpha=keys["lora_alpha"],
        rank_pattern=keys.get("rank_pattern") or {},
        alpha_pattern=keys.get("alpha_pattern") or {},
        rslora=bool(keys.get("use_rslora")),
        dora=bool(keys.get("use_dora")),
        dropout=float(keys.get("lora_dropout") or 0.0),
        base=str(keys.get("base_model_name_or_path") or ""),
        note=keys.get(NOTE),
    )


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        AdapterError: There is none, or it is too large to be a configuration.
    """
    if file.stat().st_size > CONFIG_BYTES:
        raise AdapterError(f"{file} has {file.stat().st_size} bytes: that is no configuration.")
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is not valid JSON: {error}. Copy it again.") from error
    if not isinstance(keys, dict):
        raise AdapterError(f"{file} must hold a JSON object, not {type(keys).__name__}.")
    return keys


def _refused(keys: Mapping[str, Any]) -> list[str]:
    problems = []
    if keys.get("peft_type", "LORA") != "LORA":
        problems.append(f"peft_type: {shown(keys['peft_type'])}, only LORA adapters are computed.")
    for key, allowed in OFF.items():
        value = keys.get(key)
        if value is not None and value not in allowed and value not in ({}, []):
            problems.append(f"{key}: {shown(value)} is a feature that is not computed here.")
    if (start := keys.get("init_lora_weights", True)) not in STARTS and start is not None:
        problems.append(
            f"init_lora_weights: {shown(start)} changes the base that the adapter is for. Save it "
            "with path_initial_model_for_weight_conversion, for the original base."
        )
    known = USED | IRRELEVANT | OFF.keys()
    for key in sorted(map(str, keys.keys() - known)):
        if keys[key] not in (None, False, {}, []):
            unknown = f"{shown(key)}: {shown(keys[key])}"
            problems.append(f"{unknown} is an unknown key. Remove it if it is harmless.")
    return problems


def _wrong(keys: Mapping[str, Any]) -> list[str]:
    problems = []
    if not _is_rank(keys.get("r")):
        problems.append(f"r: {shown(keys.get('r'))} must be a whole number above 0.")
    if not is_alpha(keys.get("lora_alpha")):
        problems.append(f"lora_alpha: {shown(keys.get('lora_alpha'))} must be a number above 0.")
    dropout = keys.get("lora_dropout") or 0.0
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout: {shown(dropout)} must be at least 0 and below 1.")
    for key in ("use_dora", "use_rslora"):
        if not isinstance(keys.get(key) or False, bool):
            problems.append(f"{key}: {shown(keys[key])} must be true or false.")
    if not isinstance(base := keys.get("base_model_name_or_path") or "", str):
        problems.append(f"base_model_name_or_path: {shown(base)} must be text.")
    for key, good in (("rank_pattern", _is_rank), ("alpha_pattern", is_alpha)):
        pattern = keys.get(key) or {}
        if not isinstance(pattern, dict) or len(pattern) > PATTERNS:
            problems.append(f"{key}: must be an object of at most {PATTERNS} names.")
            continue
        for name, value in pattern.items():
            if not good(value) or not _is_plain(name):
                problems.append(
                    f"{key}: {shown(name)}: {shown(value)} is not read. Use modules' names, and "
                    "numbers above 0."
                )
    return problems


def _is_plain(name: str) -> bool:
    if len(name) > 300 or sum(map(name.count, "*+(")) > BRANCHES or not PLAIN.fullmatch(name):
        return False
    try:
        return bool(re.compile(name))
    except re.error:
        return False


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_alpha(value: object) -> bool:
    """Whether a value can be an alpha: a number that leaves a scale above 0 and not infinite."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 1e-30 < value < 1e30  # type: ignore[operator]


def _match(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that PEFT would take for this module."""
    for pattern, value in patterns.items():
        if _compiled(pattern).match(module):
            return value
    return otherwise


@lru_cache(2 * PATTERNS)  # re itself remembers 512, fewer than a file may hold
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
