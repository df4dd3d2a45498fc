"""Puts our names into torchtune, and torchtune onto current torchao, when torchtune is imported.

torch calls :func:`install` at the end of its own import (entry point group ``torch.backends``),
in every process of the environment. So this file uses the standard library alone, does nothing
but add one import finder, and never raises. The finder looks only at names in torchtune:

    torchtune                   first: two kinds of torchao's warnings are no longer shown
    torchtune.<any>             first: torchao gets the names that torchtune 0.6.1 imports
    torchtune._recipe_registry  afterwards: our configs are registered
    torchtune._cli.run, .ls     afterwards: `tune run` and `tune ls` are changed (launch.py)
    torchtune._cli.tune         first: our errors end `tune` with one line

``PHI3_PLUGIN_AUTOLOAD=0`` switches all of it off, except under ``phi3-tune``, which asks for it
by name; ``PHI3_PLUGIN_TRACEBACK=1`` brings back the traceback of our errors.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from copy import copy
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType, TracebackType


# The recipes that list a config of ours, beside those that take every one; "*" stands for every
# config not named here.
_RECIPES_OF = {
    "*": ("lora_finetune_single_device", "lora_finetune_distributed", "phi3_lora_finetune"),
    "phi3_mini_dpo": ("lora_dpo_single_device", "lora_dpo_distributed", "phi3_lora_finetune"),
    "phi3_mini_distill": (
        *("knowledge_distillation_single_device", "knowledge_distillation_distributed"),
        "phi3_lora_finetune",
    ),
    "phi3_demo": ("lora_finetune_single_device", "phi3_lora_finetune"),
    # These have keys that the stock recipes would pass over in silence.
    "phi3_mini_lora_1gpu": ("phi3_lora_finetune",),
    "phi3_mini_lora_8gpu": ("phi3_lora_finetune",),
    "phi3_mini_qlora_1gpu": ("phi3_lora_finetune",),
    "phi3_mini_qlora_8gpu": ("phi3_lora_finetune",),
    "phi3_mini_full_8gpu": ("phi3_lora_finetune",),
    "phi3_mini_text": ("phi3_lora_finetune",),
    "phi3_adapter": ("phi3_adapter",),
    "phi3_generate": ("phi3_generate",),
}

# Our own recipes: the name for `tune run`, and the module it runs.
_OUR_RECIPES = {
    "phi3_lora_finetune": "lora_finetune",
    "phi3_inspect_data": "phi3_inspect_data",
    "phi3_adapter": "phi3_adapter",
    "phi3_generate": "phi3_generate",
    "phi3_evaluate": "phi3_evaluate",
}
_OF_NO_RUN = ("phi3_adapter", "phi3_generate")  # configs of what is no training run
_TAKE_EVERY_RUN = ("phi3_inspect_data", "phi3_evaluate")
_ONE_PROCESS = ("phi3_inspect_data", "phi3_adapter", "phi3_generate")

_NF4_OLD = "torchao.dtypes.nf4tensor"
_NF4_NEW = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"
_INT8_INT4 = "int8_dynamic_activation_int4_weight"
_REMOVED = (
    ("torchao.dtypes", "TensorCoreTiledLayout"),
    ("torchao.quantization", "int4_weight_only"),
)


def install() -> None:
    """Do what torch's start-up asks of us, unless the user has switched it off."""
    if os.environ.get("PHI3_PLUGIN_AUTOLOAD") != "0":
        register()


def register() -> None:
    """Add our import finder once, whatever the environment says. Quick, and never raises."""
    try:
        if not any(isinstance(finder, _TorchtuneFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _TorchtuneFinder())
        if "torchtune" in sys.modules:  # where torchtune brings torch, which brings us
            _quiet_torchao()
    except Exception as error:
        _warn("cannot watch for torchtune", error)


class _TorchtuneFinder:
    """Lets the other finders find torchtune's modules, and acts before or after they run."""

    def __init__(self) -> None:
        self.before: dict[str, Callable[[], None]] = {"torchtune._cli.tune": _show_errors_as_a_line}
        if "TORCHELASTIC_RUN_ID" in os.environ:  # a worker: torchrun starts recipes without `tune`
            self.before["torchtune.config"] = _show_errors_as_a_line
        self.after: dict[str, Callable[[ModuleType], None]] = {
            "torchtune._recipe_registry": _register,
            "torchtune.config._parse": _check_recipes,
            "torchtune._cli.run": _change_run,
            "torchtune._cli.ls": _change_ls,
        }
        self.torchao_is_ready = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return None, so that the next finder goes on, except for modules we act on afterwards."""
        # torchtune/__init__ imports torchao before its own submodules, and torchao imports torch.
        # Only here is it certain that torchao is complete, whichever of the three came first.
        if name == "torchtune":
            _guarded(_quiet_torchao)
        if not name.startswith("torchtune."):
            return None
        if not self.torchao_is_ready:
            _guarded(_alias_torchao)
            self.torchao_is_ready = True
        if name in self.before:
            _guarded(self.before[name])
        return self._find_and_wrap(name, path, target) if name in self.after else None

    def _find_and_wrap(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _guarded(_act_after, spec, self.after[name])
                return spec
        return None


def _act_after(spec: ModuleSpec, action: Callable[[ModuleType], None]) -> None:
    """Call `action` on a module once it has run."""
    loader: Any = copy(spec.loader)  # some finders share one
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        _guarded(action, module)

    loader.exec_module = exec_module
    spec.loader = loader


def _quiet_torchao() -> None:
    """Leave out what torchao says whenever it is imported, and of which nothing follows.

    That kernels for other machines cannot be loaded, and that it registers enums as torch no longer
    needs it. Everything else is shown.
    """
    import logging

    def says_more(record: logging.LogRecord) -> bool:
        text = str(record.msg)
        is_kernel = text.startswith("Failed to load ") and ".so: " in text
        return not is_kernel and "is an Enum subclass and is now natively supported" not in text

    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).addFilter(says_more)


def _alias_torchao() -> None:
    """Give torchao back the names that torchtune 0.6.1 imports, where they are missing."""
    dtypes = import_module("torchao.dtypes")
    if find_spec(_NF4_OLD) is None:
        # The module itself, never a copy: isinstance and torch's dispatch go by class identity.
        sys.modules[_NF4_OLD] = dtypes.nf4tensor = import_module(_NF4_NEW)  # type: ignore[attr-defined]
    for name in ("NF4Tensor", "to_nf4"):
        if not hasattr(dtypes, name):
            setattr(dtypes, name, getattr(sys.modules[_NF4_OLD], name))
    quantization = import_module("torchao.quantization")
    if not hasattr(quantization, _INT8_INT4):
        setattr(quantization, _INT8_INT4, _int8_dynamic_activation_int4_weight)
    for owner, name in _REMOVED:
        module = import_module(owner)
        if not hasattr(module, name):
            setattr(module, name, _removed(f"{owner}.{name}"))


def _int8_dynamic_activation_int4_weight(group_size: int = 32) -> Any:
    """Return what does the same in torchao since 0.16: its logits are those of QAT's convert."""
    torch, torchao = import_module("torch"), import_module("torchao.quantization")
    return torchao.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,
        weight_granularity=torchao.PerGroup(group_size),
        weight_mapping_type=torchao.MappingType.SYMMETRIC,
    )


def _removed(name: str) -> Callable[..., NoReturn]:
    def stub(*args: Any, **kwargs: Any) -> NoReturn:
        version = getattr(sys.modules["torchao"], "__version__", "of this version")
        raise NotImplementedError(
            f"{name} is not in torchao {version}. It serves torchtune's "
            "Int4WeightOnlyQuantizer, which needs torchao<0.16. LoRA and QLoRA do not use it."
        )

    return stub


def _recipe_files() -> dict[str, Path]:
    """Return our recipes by name."""
    spec = find_spec("phi3_plugin.recipes")
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).resolve().parent
    return {name: folder / f"{module}.py" for name, module in _OUR_RECIPES.items()}


def _config_files() -> dict[str, Path]:
    """Return our configs by name (the file's stem), found without importing more of ourselves."""
    spec = find_spec("phi3_plugin.configs")
    if spec is None or spec.origin is None:
        return {}
    return {file.stem: file for file in sorted(Path(spec.origin).resolve().parent.glob("*.yaml"))}


def _register(registry: ModuleType) -> None:
    """Append our recipes, and our configs to the recipes that run them, as absolute paths."""
    registered = registry.get_all_recipes()
    registered.extend(
        registry.Recipe(name, str(file), configs=[], supports_distributed=name not in _ONE_PROCESS)
        for name, file in _recipe_files().items()
    )
    recipes = {recipe.name: recipe for recipe in registered}
    for name, file in _config_files().items():
        others = () if name in _OF_NO_RUN else _TAKE_EVERY_RUN
        for recipe in (*_RECIPES_OF.get(name, _RECIPES_OF["*"]), *others):
            recipes[recipe].configs.append(registry.Config(name=name, file_path=str(file)))


def _change_run(run: ModuleType) -> None:
    from phi3_plugin.launch import change_run

    change_run(run, _recipe_files(), _config_files().keys())


def _change_ls(ls: ModuleType) -> None:
    from phi3_plugin.launch import change_ls

    change_ls(ls, _recipe_files().keys(), _config_files().keys())


def _check_recipes(parse: ModuleType) -> None:
    """Let every recipe refuse, before its first step, what it cannot read or do with our parts.

    And let it read a section that is typed as a mapping.
    """
    stock, stock_merge = parse.parse, parse._merge_yaml_and_cli_args

    @wraps(stock_merge)
    def merge(yaml_args: Any, words: Sequence[str]) -> Any:
        from phi3_plugin.options import merge_words

        return merge_words(yaml_args, words)

    parse._merge_yaml_and_cli_args = merge  # type: ignore[attr-defined]

    def checked(recipe_main: Callable[..., Any]) -> Callable[..., Any]:
        from phi3_plugin.options import check_command
        from phi3_plugin.train.stock_recipes import checked as check

        run = stock(check(recipe_main))

        def main(*args: Any, **kwargs: Any) -> Any:
            check_command(sys.argv[1:])
            return run(*args, **kwargs)

        return wraps(recipe_main)(main)

    parse.parse = checked  # type: ignore[attr-defined]


def _show_errors_as_a_line() -> None:
    """Let a Phi3Error that nobody caught end the process with its message, not a traceback.

    And Ctrl-C, where a recipe of ours was asked for and is not listening yet.
    """
    stock = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        from phi3_plugin.errors import Phi3Error
        from phi3_plugin.launch import spellings
        from phi3_plugin.terminal import end_stopped, show_error

        if os.environ.get("PHI3_PLUGIN_TRACEBACK") == "1":
            stock(kind, error, trace)
        elif isinstance(error, Phi3Error):
            show_error(error)
        elif isinstance(error, KeyboardInterrupt) and spellings(_recipe_files()) & {*sys.argv}:
            end_stopped()
        else:
            stock(kind, error, trace)

    sys.excepthook = show


def _guarded(action: Callable[..., None], *args: Any) -> None:
    """Call `action`; turn any failure into a warning, for it must not break somebody's import."""
    try:
        action(*args)
    except Exception as error:
        _warn(f"{action.__name__.strip('_')} failed", error)


def _warn(what: str, error: Exception) -> None:
    with contextlib.suppress(Exception):  # warnings may have been turned into errors
        warnings.warn(f"phi3_plugin: {what}: {type(error).__name__}: {error}", stacklevel=2)
