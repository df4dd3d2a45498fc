"""Fine-tuning, answering and measuring from Python, a call each.

    from phi3_plugin import evaluate, generate, load, train

    adapter = train("my_chats.csv")
    model, tokenizer = load("microsoft/Phi-3-mini-4k-instruct", adapter)
    print(generate(model, tokenizer, "What is 2 + 2?"))
    print(evaluate(adapter)["measures"]["loss"])

Nothing heavy is imported before a call needs it.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_plugin import hub

if TYPE_CHECKING:
    from torch import nn

    from phi3_plugin.data.tokenizer import Phi3Tokenizer

__all__ = ["evaluate", "generate", "load", "train"]

Conversation = Sequence[Mapping[str, Any]]


def train(
    data: str | Path,
    *,
    base: str | Path = hub.DEFAULT_BASE,
    output: str | Path | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    qlora: bool | None = None,
    config: str | Path | None = None,
    **settings: Any,
) -> Path:
    """Fine-tune a model on chats, as `phi3-tune train` does, and return the adapter's folder.

    What is not said is chosen by data, model and device, and printed first: three epochs, ten
    steps an epoch or more, a part held out from 200 samples on, QLoRA and recompute where the
    memory demands them. All of it is in OUTPUT/config.yaml afterwards, and the curves are in
    OUTPUT/report.html.

    Args:
        data: A .csv, .json, .jsonl or .parquet file, a folder, a glob, or a data set of the Hub.
        base: A model by its name on the Hub, or the folder it was downloaded to.
        output: Folder of the run; None names one after data and time. A run that is there goes on.
        epochs: Times that the data is seen.
        lr: Learning rate.
        qlora: True keeps the base's weights in NF4, False does not, None goes by the memory.
        config: A config by name or file, whose keys are taken as they are.
        **settings: Any key of the YAML, see docs/recipe.md: ``batch_size=2``, or with a dot
            ``**{"model.lora_rank": 8}``.

    Returns:
        The folder that `load` and `evaluate` take, and PEFT, vLLM and llama.cpp too.

    Raises:
        KeyboardInterrupt: It was interrupted, and has saved; the same ``output`` goes on.
        Phi3Error: Data, model or a setting cannot be used; what, and what to do.
    """
    from phi3_plugin import first_run
    from phi3_plugin.options import TrainOptions, read_options

    if qlora is False:
        settings = {"model._component_": "phi3_plugin.models.lora_phi3", **settings}
    given = {
        "source": str(data),
        "base": str(base),
        "output_dir": None if output is None else str(output),
        "epochs": epochs,
        "lr": lr,
        "qlora": bool(qlora),
        "config": None if config is None else str(config),
    }
    code, folder = first_run.train(read_options(TrainOptions, given, "train"), settings)
    if code:
        raise KeyboardInterrupt
    return folder / "final"


def load(
    checkpoint_dir: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: str = "bf16",
    device: str | None = None,
    quantize: bool = False,
    check_base: bool = True,
    sharing: "nn.Module | None" = None,
) -> "tuple[nn.Module, Phi3Tokenizer]":
    """Return a model that is ready to compute, and the tokenizer of its base.

    The model is on the device, in eval mode, without gradients: ``model(tokens)`` gives logits.

    Args:
        checkpoint_dir: The base model: its name on the Hub, or its folder.
        adapter: Its name on the Hub, or folder or file of an adapter of PEFT, torchtune, loralib,
            mlx-lm or this package.
        dtype: bf16, fp16 or fp32, of base and adapter; a processor without bf16 needs fp32, and a
            card without it fp16.
        device: cpu, cuda, xpu or mps; None is cuda where there is one.
        quantize: Store the base in NF4, as QLoRA trains over it.
        check_base: Refuse an adapter that says it was made for other base weights.
        sharing: A model that was loaded from the same base in the same way, whose weights serve
            this one too.

    Raises:
        Phi3Error: Something is not there, damaged, or does not fit; what, and what to do.
    """
    from phi3_plugin.load import load as load_both

    return load_both(
        checkpoint_dir,
        adapter,
        dtype=dtype,
        device=device,
        quantize=quantize,
        check_base=check_base,
        sharing=sharing,
    )


def generate(
    model: "nn.Module",
    tokenizer: "Phi3Tokenizer",
    prompts: str | Conversation | Sequence[str | Conversation],
    *,
    system: str | None = None,
    batch_size: int = 8,
    **sampling: Any,
) -> str | list[str]:
    """Return what a model answers.

    Args:
        model: From `load`. It is made ready to answer, and can be neither trained nor saved then.
        tokenizer: From `load`.
        prompts: A text, a conversation (a list of messages with ``role`` and ``content``), or a
            list of these.
        system: System message, for texts.
        batch_size: Prompts that are answered at a time.
        **sampling: Fields of `phi3_plugin.options.Sampling`: ``max_new_tokens`` (256),
            ``temperature`` (0, always the likeliest token), ``top_k``, ``top_p``, ``min_p``,
            ``repetition_penalty``, ``seed``, ``max_time``, ``stop``.

    Returns:
        A text for one prompt, a list of texts for a list.

    Raises:
        Phi3Error: A prompt or an option cannot be used; what, and what to do.
    """
    from phi3_plugin.data.turns import make_turn
    from phi3_plugin.generate import Generator
    from phi3_plugin.models.cache import serve
    from phi3_plugin.options import Sampling, read_options
    from phi3_plugin.prompts import check_stop, prompt_ids

    chosen = read_options(Sampling, sampling, "generate")
    check_stop(chosen.stop, tokenizer)
    is_one = isinstance(prompts, str) or bool(prompts and isinstance(prompts[0], Mapping))
    asked: list[Any] = [prompts] if is_one else list(prompts)
    before = [] if system is None else [make_turn("system", system)]
    ids = []
    for prompt in asked:
        if isinstance(prompt, str):
            turns = [*before, make_turn("user", prompt)]
        else:
            turns = [make_turn(message["role"], message["content"]) for message in prompt]
        ids.append(prompt_ids(tokenizer, turns))
    serve(model)
    generator = Generator(model, tokenizer, chosen, batch_size=batch_size)
    texts = {answer.index: answer.text for answer in generator.answers(ids)}
    answers = [texts[number] for number in range(len(ids))]
    return answers[0] if is_one else answers


def evaluate(
    adapter: str | Path,
    data: str | Path | None = None,
    *,
    base: str | Path | None = None,
    output: str | Path | None = None,
    max_samples: int | None = None,
    answers: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Measure base and adapter on the same samples, as `phi3-tune evaluate` does.

    Args:
        adapter: Its folder, such as `train` returns, or its name on the Hub.
        data: As for `train`; None is what the run of the adapter held out, or if that was nothing
            what it was trained on.
        base: The base model: its name on the Hub, or its folder; None is the adapter's own.
        output: Folder for evaluation.html, results.json and samples.jsonl; None is ``evaluation``
            beside the adapter, or here for one of the Hub. What is there is replaced.
        max_samples: The first so many samples; None is all.
        answers: False measures loss and accuracy alone, which takes no time beside answers.
        **settings: Any other key of the YAML, as for `train`, or of the evaluation, such as
            ``generation_batch_size`` and ``**{"generation.max_new_tokens": 64}``.

    Returns:
        What results.json holds: ``measures`` by name, each with ``base``, ``adapter``, their
        ``difference`` with a 95 % interval, and a ``verdict``.

    Raises:
        Phi3Error: Something is not there or does not fit; what, and what to do.
    """
    from importlib import import_module

    from omegaconf import OmegaConf

    from phi3_plugin import first_run
    from phi3_plugin.train.world import pick_device

    folder = hub.adapter(str(adapter))
    of_run = folder.parent / "config.yaml"
    file = of_run if of_run.is_file() else first_run.config_file(first_run.TEMPLATE)
    cfg: Any = OmegaConf.load(file)
    beside = folder.parent if str(folder) == str(adapter) else Path()  # of the Hub's, the cache
    out = beside / "evaluation" if output is None else Path(output)
    given = {
        "checkpoint_dir": base or cfg.get("checkpoint_dir") or _base_of(folder),
        "dataset.source": data,
        "val_fraction": None if data is None else 0.0,
        "max_samples": max_samples,
    }
    if file != of_run:
        device = pick_device(settings.get("device", cfg.get("device")), 0)
        given["dtype"] = first_run.native_dtype(device)
    fixed = {"adapter": str(folder), "output_dir": str(out), "answers": answers, "overwrite": True}
    for key, value in {**given, **fixed, **settings}.items():
        if value is not None or key in settings:
            text = str(value) if isinstance(value, Path) else value
            OmegaConf.update(cfg, key, text, force_add=True)
    import_module("phi3_plugin.recipes.phi3_evaluate").measure(cfg)
    found: dict[str, Any] = json.loads((out / "results.json").read_text("utf-8"))
    return found


def _base_of(adapter: Path) -> str | None:
    """Return what an adapter names as its base."""
    with suppress(OSError, ValueError, AttributeError):
        name = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
        return name.get("base_model_name_or_path") or None
    return None
