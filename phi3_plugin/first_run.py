"""A run of which only the data is known: `phi3-tune train my_chats.csv`.

What is not said is decided here, by data, model and device, and becomes a YAML of our recipe like
any other: OUTPUT/config.yaml, which `tune run phi3_lora_finetune --config` runs as well.
"""

import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, cast

from phi3_plugin import hub
from phi3_plugin.config import checkpoint_folder, read_config
from phi3_plugin.errors import ConfigError
from phi3_plugin.launch import ending_at_once
from phi3_plugin.options import TrainOptions, spelled, with_words, yaml_file
from phi3_plugin.terminal import for_stdout, harmless, outlived

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from phi3_plugin.settings import Settings
    from phi3_plugin.train.data import RunData
    from phi3_plugin.train.plan import Estimate

TEMPLATE = "phi3_mini_lora_1gpu"
"""The config whose keys are taken where nothing else is said; it serves every model of the family,
as sizes come from the checkpoint."""

EPOCHS = 3
STEPS = 10
"""Of an epoch at least, where the samples suffice."""
MOST = 16
"""Samples of a step at most."""
AT_ONCE = 4
"""Samples that a device sees at once at most."""
SPARE = 0.9
"""Share of the free memory that may be planned with; Python and its libraries take the rest."""
SURVEYED = 20_000
"""Samples up to which each is looked at for warnings: it must not keep a user waiting."""


def run(o: TrainOptions) -> int:
    """Fine-tune, or print the YAML, and return the exit code."""
    code, _ = train(o, {}, is_command=True)
    return code


def train(
    o: TrainOptions, settings: Mapping[str, Any], *, is_command: bool = False
) -> tuple[int, Path]:
    """Fine-tune, and return the exit code and the folder of the run.

    Args:
        o: What was typed.
        settings: Keys of the YAML with their values, dotted.
        is_command: Whether the process may end with the run.
    """
    draft = Draft(o, settings)
    if not o.print_config:
        for line in lines_of(draft.cfg):
            print(line, flush=True)  # before anything slow is imported
    plan = planned(draft)
    cfg, output = draft.cfg, Path(str(draft.cfg.output_dir))
    if o.print_config:
        print(for_stdout(text_of(cfg)), end="")
        return 0, output
    for line in plan.lines:
        print(line, flush=True)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "config.yaml"
    file.write_text(text_of(cfg), "utf-8")
    with ending_at_once() if is_command else nullcontext(), outlived():
        if o.nproc_per_node > 1:
            code = launched(file, o.nproc_per_node)
        else:
            recipe = import_module("phi3_plugin.recipes.lora_finetune")
            code = recipe.finetune(cfg, is_announced=True, is_command=is_command)
        if code:
            again = command("phi3-tune", "train", o.source, "--output", str(output))
            print(f"To go on: {again}")
            if is_command:
                sys.exit(code)
    if is_command and not code:
        print("\nWhat to type next:")
        base, final = str(cfg.checkpoint_dir), output / "final"
        typed_next = next_commands(plan.settings, base, final, has_validation=plan.has_validation)
        for what, typed in typed_next:
            print(f"  # {what}\n  {continued(typed)}")
    return code, output


def launched(file: Path, processes: int) -> int:
    """Make the run in processes of their own, started by torchrun."""
    from phi3_plugin import cli

    words = ["run", "--nproc_per_node", str(processes), "phi3_lora_finetune", "--config", str(file)]
    try:
        cli.tune(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


# The YAML, as far as it was said


class Draft:
    """A configuration, and which of its keys were said by somebody."""

    def __init__(self, o: TrainOptions, settings: Mapping[str, Any]) -> None:
        """Read config, flags, keys and settings, of which the later ones come first."""
        from omegaconf import OmegaConf

        self.processes = o.nproc_per_node
        self.qlora = o.qlora
        earlier = o.output_dir / "config.yaml" if o.output_dir else None
        name = o.config or (str(earlier) if earlier and earlier.is_file() else None)
        cfg = yaml_file(config_file(name or TEMPLATE))
        self._said = {"optimizer.lr"} if name else set[str]()
        if name:
            self._said |= {key for key in cfg if cfg.get(key) is not None}
        flags = {
            "checkpoint_dir": o.base or cfg.get("checkpoint_dir") or hub.DEFAULT_BASE,
            "dataset.source": o.source,
            "output_dir": None if o.output_dir is None else str(o.output_dir),
            "epochs": o.epochs,
            "optimizer.lr": o.lr,
        }
        cfg = with_words(cfg, o.keys)
        for key, value in {**flags, **settings}.items():
            if value is not None or key in settings:
                is_whole = isinstance(value, Mapping) and "_component_" in value
                OmegaConf.update(cfg, key, value, merge=not is_whole, force_add=True)
                self._said.add(key)
        for word in o.keys:
            self._said.add(word.lstrip("~").partition("=")[0])
        if cfg.get("output_dir") is None:
            cfg.output_dir = folder_for(o.source)
        self.cfg = cfg

    def is_said(self, key: str) -> bool:
        """Whether a key, a part of it or the section it stands in was said."""
        return any(
            said == key or said.startswith(f"{key}.") or key.startswith(f"{said}.")
            for said in self._said
        )

    def choose(self, key: str, value: Any) -> None:
        """Set a key unless it was said."""
        from omegaconf import OmegaConf

        if not self.is_said(key):
            OmegaConf.update(self.cfg, key, value, force_add=True)


def config_file(name: str) -> Path:
    """Return the file of a config by its name or path.

    Raises:
        ConfigError: There is none.
    """
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(import_module("phi3_plugin.configs").__file__)).parent
    file = folder / f"{name.removesuffix('.yaml')}.yaml"
    if not file.is_file() or os.path.dirname(name):
        raise ConfigError(
            f"--config: {name} is neither a file nor a config; `tune ls` lists those."
        )
    return file


def folder_for(source: str) -> str:
    """Return a name for the folder of a run that is not there yet: of its data and of now."""
    stem = Path(source).name.partition(".")[0]
    name = f"{re.sub(r'[^A-Za-z0-9_-]+', '_', stem) or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    return name if not Path(name).exists() else f"{name}-{os.getpid()}"


def text_of(cfg: "DictConfig") -> str:
    """Return the YAML of a run."""
    from omegaconf import OmegaConf

    head = "# tune run phi3_lora_finetune --config THIS_FILE; docs/recipe.md explains every key.\n"
    return head + OmegaConf.to_yaml(cfg)


# What data, model and device decide


@dataclass(frozen=True)
class Decisions:
    """What a run is going to do."""

    lines: list[str]
    """For a terminal."""
    settings: "Settings"
    has_validation: bool


def planned(draft: Draft) -> Decisions:
    """Decide what was not said, and return what the run is going to do."""
    import torch

    from phi3_plugin import settings
    from phi3_plugin.train.data import load_data, validation_share
    from phi3_plugin.train.world import pick_device

    cfg = draft.cfg
    device = pick_device(cfg.get("device"), 0)
    draft.choose("epochs", EPOCHS)
    note = choose_precision(draft, device)
    # Weights are not needed yet, and what is wrong with the settings is said before they come
    small = checkpoint_folder(str(cfg.checkpoint_dir), weights=False)
    read = settings.read(at(cfg, small), draft.processes)
    data = load_data(read, draft.processes)
    samples = len(data.order.dataset) + (len(data.order_val.dataset) if data.order_val else 0)
    choose_batches(draft, len(data.order.dataset))
    if data.order_val and read.val_fraction is None and not read.dataset_val:
        whole = range(samples) if not read.dataset.get("packed") else data.order.dataset
        draft.choose("val_fraction", round(validation_share(read, whole) or 0.05, 4))
    if data.order_val:
        per_step = cfg.batch_size * cfg.gradient_accumulation_steps * draft.processes
        draft.choose("run_val_every_n_steps", min(50, -(-len(data.order.dataset) // per_step)))
    longest = longest_of(data)
    best, free = choose_memory(draft, small, device, longest)
    read = settings.read(at(cfg, small), draft.processes)
    data = load_data(read, draft.processes)

    def shown(name: str, text: str) -> list[str]:
        return wrapped(f"  {name:<8}", text)

    count, trained = parameters(read)
    kind = (
        "QLoRA"
        if settings.is_quantized(read.model)
        else "LoRA"
        if trained < count
        else "all weights"
    )
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    many = f"{draft.processes} x " if draft.processes > 1 else ""
    order, held = data.order, data.order_val
    each = f"{order.per_step} {'pack' if read.dataset.get('packed') else 'sample'}"
    held_out = f"{len(held.dataset):,} held out" if held else "none held out"
    lines = [
        *shown("device", f"{many}{where}, {read.dtype}{note}"),
        *shown("trained", f"{trained:,} of {count:,} parameters ({trained / count:.2%}), {kind}"),
        *shown("samples", f"{len(order.dataset):,}, {held_out}"),
        *shown(
            "steps",
            f"{data.total_steps:,} of {each}{'s' if order.per_step > 1 else ''}, "
            f"{read.epochs} {'epochs' if read.epochs > 1 else 'epoch'}",
        ),
        *shown("memory", memory_in_words(best, free, read)),
    ]
    for warning in warnings_of(read, data, draft.processes):
        lines += wrapped("  ! ", warning)
    return Decisions(lines, read, held is not None)


def at(cfg: "DictConfig", folder: Path) -> "DictConfig":
    """Return a configuration with another folder of the base."""
    from omegaconf import OmegaConf

    return cast("DictConfig", OmegaConf.merge(cfg, {"checkpoint_dir": str(folder)}))


def choose_precision(draft: Draft, device: "torch.device") -> str:
    """Choose a precision that a device has instructions for, and return why it is another."""
    from phi3_plugin import settings

    native = native_dtype(device)
    if native == "fp16" and draft.cfg.model._component_ in settings.WHOLE_MODELS:
        native = "fp32"
    draft.choose("dtype", native)
    name = "processor" if device.type == "cpu" else "card"
    if native == "bf16" or draft.cfg.dtype not in ("bf16", native):
        return ""
    if draft.cfg.dtype == native:
        return f": this {name} has no instructions for bf16"
    many = " many times" if device.type == "cpu" else ""
    return f", which this {name} has no instructions for: dtype={native} is{many} faster"


def native_dtype(device: "torch.device") -> str:
    """Return in what a device computes the fastest, and accurately enough to train adapters."""
    import torch

    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "fp32" if device.type == "cpu" and not cpu_has_bf16() else "bf16"


def cpu_has_bf16() -> bool:
    """Whether products in bf16 are the processor's own: by detours they take a hundred times."""
    import platform

    import torch

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    cpu: Any = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def choose_batches(draft: Draft, samples: int) -> None:
    """Choose how many samples a step sees: 16, or so few that an epoch has ten steps."""
    wanted = 1 << max(0, int(math.log2(max(1, min(MOST, samples // STEPS)))))
    share = max(1, wanted // draft.processes)
    cfg = draft.cfg
    if draft.is_said("gradient_accumulation_steps"):
        times = cfg.gradient_accumulation_steps
        draft.choose("batch_size", max(1, min(AT_ONCE, share // times)))
    draft.choose("batch_size", min(AT_ONCE, share))
    draft.choose("gradient_accumulation_steps", max(1, share // cfg.batch_size))


def longest_of(data: "RunData") -> int:
    """Return the tokens of the longest sample or pack."""
    dataset = data.order.dataset
    if hasattr(dataset, "size"):
        return int(dataset.size)
    if hasattr(dataset, "lengths"):
        return int(dataset.lengths.max())
    return max(len(dataset[i]["tokens"]) for i in range(len(dataset)))


def choose_memory(
    draft: Draft, small: Path, device: "torch.device", longest: int
) -> tuple["Estimate", int | None]:
    """Choose what a device has the memory for, the fastest first.

    Args:
        draft: Of the run.
        small: Folder with config.json.
        device: One of the run's.
        longest: Tokens of the longest sample.

    Returns:
        What it takes, and the bytes that are free, where the system says so.
    """
    from phi3_plugin import settings
    from phi3_plugin.train.plan import estimated, memory_free_on

    cfg = draft.cfg
    free = memory_free_on(device, draft.processes)
    models = ["phi3_plugin.models.lora_phi3", "phi3_plugin.models.qlora_phi3"]
    if draft.is_said("model._component_") or draft.cfg.model._component_ not in models:
        models = [cfg.model._component_]
    elif draft.qlora or cfg.model._component_ == models[1]:
        models = models[1:]
    recompute = [False, True]
    if draft.is_said("enable_activation_checkpointing") or draft.is_said("memory_budget"):
        recompute = [cfg.get("enable_activation_checkpointing", False)]
    size, times = cfg.batch_size, cfg.gradient_accumulation_steps
    ways = [(model, again, size, times) for model in models for again in recompute]
    if not draft.is_said("batch_size") and not draft.is_said("gradient_accumulation_steps"):
        ways += [(models[-1], recompute[-1], 1, size * times)] if size > 1 else []
    for model, again, one, more in ways:
        draft.choose("model._component_", model)
        draft.choose("enable_activation_checkpointing", again)
        draft.choose("batch_size", one)
        draft.choose("gradient_accumulation_steps", more)
        s = settings.read(at(cfg, small), draft.processes)
        s = replace(s, tokenizer={**s.tokenizer, "max_seq_len": longest})
        best = estimated(s, device, max(1, draft.processes // s.fsdp_replicas), 0)
        if free is None or best.total <= SPARE * free:
            break
    return best, free


def parameters(s: "Settings") -> tuple[int, int]:
    """Return how many parameters the model has, and how many of them are trained."""
    from phi3_plugin.train.plan import on_meta

    sizes = [(p.numel(), p.requires_grad) for p in on_meta(s).parameters()]
    return sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)


def memory_in_words(best: "Estimate", free: int | None, s: "Settings") -> str:
    """Return what a step takes, and whether that is there."""
    from phi3_plugin.train.plan import in_gib

    text = f"{in_gib(best.total)} GiB predicted at most"
    if s.enable_activation_checkpointing:
        text += ", layers recomputed"
    if free is None:
        return text
    text += f", {in_gib(free)} free"
    if best.total > SPARE * free:
        text += (
            ": IT MAY NOT FIT. Lower tokenizer.max_seq_len or batch_size, or share the model among "
            "more devices with --nproc-per-node"
        )
    return text


def warnings_of(s: "Settings", data: "RunData", processes: int) -> Iterator[str]:
    """Yield what an inspection would say to act on."""
    from phi3_plugin.inspect import advice, statistics, survey, unpacked
    from phi3_plugin.train.data import FEW_STEPS

    dataset = unpacked(data.order.dataset)
    if len(dataset) <= SURVEYED:
        samples = survey(dataset, data.tokenizer.stop_tokens)
        for problem in advice(statistics(s, data, samples, processes)):
            yield f"{problem.text} {problem.advice}"
    elif data.total_steps < FEW_STEPS:
        yield f"The whole run makes {data.total_steps} steps."


# What is shown


def lines_of(cfg: "DictConfig") -> list[str]:
    """Return the first lines of the header, for which nothing slow is needed."""
    base = str(cfg.checkpoint_dir)
    config = read_config(checkpoint_folder(base, weights=False))
    sizes = f"{config.num_hidden_layers} layers of width {config.hidden_size:,}"
    source = cfg.dataset.source
    return [
        *wrapped("  model   ", f"{base}, {sizes}"),
        *wrapped("  data    ", source if isinstance(source, str) else spelled(source)),
        *wrapped("  output  ", str(cfg.output_dir)),
    ]


def wrapped(before: str, text: str) -> list[str]:
    """Return a text in lines of the terminal's width, with a name before the first."""
    width = max(40, min(100, shutil.get_terminal_size().columns - 1))
    text, after = for_stdout(harmless(text)), " " * len(before)
    return wrap(text, width, initial_indent=before, subsequent_indent=after)


def next_commands(
    s: "Settings", base: str, adapter: Path, *, has_validation: bool
) -> Iterator[tuple[str, str]]:
    """Yield what a user may want to do with the result, and what to type for it.

    Args:
        s: Of the run.
        base: Name or folder of the base, as it was typed.
        adapter: Folder of the result.
        has_validation: Whether samples were held out.
    """
    from phi3_plugin.settings import is_quantized
    from phi3_plugin.train.checkpoints import FINAL

    file = s.output_dir / "config.yaml"  # a run of `tune` has none
    if file.is_file() and adapter.name != FINAL and "source" in s.dataset:
        source = str(s.dataset["source"])
        yield "go on", command("phi3-tune", "train", source, "--output", str(s.output_dir))
    if trains_all_weights(s):
        yield "talk to it", command("phi3-tune", "chat", "--base", str(adapter))
        return
    how = [*(["--quantize"] if is_quantized(s.model) else [])]
    how += ["--dtype", s.dtype] if s.dtype != "bf16" else []
    chat = ("phi3-tune", "chat", "--base", base, "--adapter", str(adapter), *how)
    yield "talk to it", command(*chat)
    if file.is_file():
        rows = "what was held out" if has_validation else "what it was trained on"
        scores = all(find_spec(name) for name in ("rouge_score", "sacrebleu"))
        yield (
            f"base and adapter on {rows}",
            command(
                *("phi3-tune", "evaluate", "--config", str(file)),
                *(f"adapter={adapter}", f"output_dir={s.output_dir / 'evaluation'}"),
                *([] if scores else ["answers=False"]),
            ),
        )
    yield (
        "base and adapter as one model",
        command(
            *("phi3-tune", "adapter", "merge", str(adapter), "--base", base),
            *("--output", str(s.output_dir / "merged")),
        ),
    )


def trains_all_weights(s: "Settings") -> bool:
    """Whether all weights are trained."""
    from phi3_plugin.settings import WHOLE_MODELS

    return s.model["_component_"] in WHOLE_MODELS


def command(*words: str) -> str:
    """Return words as they are typed."""
    return shlex.join(words)


def continued(typed: str) -> str:
    """Return a command on as many lines as a terminal needs, to be copied as it stands."""
    width = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or len(typed) + 2 < width:
        return typed
    lines = [""]
    for word in map(shlex.quote, shlex.split(typed)):
        if lines[-1] and len(lines[-1]) + len(word) + 7 > width:  # what stands around them
            lines.append(word)
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n    ".join(lines)
