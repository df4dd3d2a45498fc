"""Tell whether a fine-tune made the model better: base and adapter on data that was held out.

    tune run phi3_evaluate --config phi3_mini_lora checkpoint_dir=BASE output_dir=eval \
      adapter=my_adapter/epoch_0 dataset.source=held_out.jsonl

It takes the configuration of a run as it is, and those of `phi3_plugin.options.EvaluateOptions`.
Without `adapter` the base is evaluated alone. Writes samples.jsonl, results.json and
evaluation.html. With several processes each has a whole model and takes a part of the samples.
"""

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune import config
from tqdm import tqdm

from phi3_plugin import evaluate as files
from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.base import open_weights, refuse_other_base
from phi3_plugin.checkpoint.files import check_output
from phi3_plugin.checkpoint.peft import CONFIG as ADAPTER_CONFIG
from phi3_plugin.config import read_config
from phi3_plugin.data.collate import concatenate
from phi3_plugin.errors import MissingFileError
from phi3_plugin.evaluate import (
    ADAPTER,
    BASE,
    PACKAGES,
    Evaluation,
    Held,
    Outcome,
    Said,
    Scorer,
    by_document,
    held,
    measures,
    notes,
    report,
    results,
    token_scores,
)
from phi3_plugin.generate import Generator
from phi3_plugin.launch import STOPPED
from phi3_plugin.load import assembled, fitting_adapter
from phi3_plugin.load import build as build_model
from phi3_plugin.models.cache import serve
from phi3_plugin.options import EvaluateOptions
from phi3_plugin.pages import for_stdout, harmless
from phi3_plugin.pages.evaluation import page_of_evaluation
from phi3_plugin.settings import read_beside
from phi3_plugin.train.feed import build
from phi3_plugin.train.plan import give_memory_back
from phi3_plugin.train.step import ready
from phi3_plugin.train.world import World


class Recipe:
    """One evaluation, from settings to numbers."""

    def __init__(self, cfg: DictConfig) -> None:
        """Check what can be checked before anything slow happens."""
        # What several processes cannot train on they can evaluate
        self.s, self.o = read_beside(cfg, EvaluateOptions, processes=1)
        check_output(self.s.output_dir, self.s.checkpoint_dir)
        if not self.o.overwrite:
            files.refuse_earlier(self.s.output_dir)
        refuse_adapter_as_base(self.s.checkpoint_dir)
        self.scorer = Scorer() if self.o.answers else None
        self.quantize = is_quantized(self.s.model)
        self.adapter = self.fitting_adapter()
        self.world = World(self.s.device, int(os.environ.get("WORLD_SIZE", 1)))
        self.tokenizer = build(self.s.tokenizer)
        positions = read_config(self.s.checkpoint_dir).max_position_embeddings
        wanted = {"limit": self.o.max_samples, "positions": positions if self.o.answers else None}
        self.held: Held = held(self.s, self.tokenizer, **wanted)

    def fitting_adapter(self) -> Adapter | None:
        """Read it before the base is evaluated for hours; None if there is none."""
        path, base = self.o.adapter, self.s.checkpoint_dir
        if path is None or is_whole(path):
            return None
        if not path.exists():
            raise MissingFileError(
                f"adapter: {path} is not there. Give the folder that a run has saved."
            )
        adapter = fitting_adapter(path, base, quantize=self.quantize)
        if self.o.check_base:
            refuse_other_base(path, adapter.base_hash, adapter.base, base)
        with torch.device("meta"):
            build_model(base, adapter, quantize=self.quantize)
        return adapter

    def evaluate(self) -> Evaluation:
        """Ask one model after the other."""
        outcomes = {}
        for name, model in self.models():
            outcomes[name] = self.outcomes(name, model)
            del model  # or it would be there beside the next one
        samples = [item.sample for item in self.held.items]
        return Evaluation(samples, outcomes, self.facts(), notes(samples, outcomes))

    def models(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the models by name; memory never holds the base weights twice."""
        give_memory_back()
        base, path = self.s.checkpoint_dir, self.o.adapter
        model = self.loaded(base)
        if self.adapter is not None:
            other = self.loaded(base, self.adapter, sharing=model)
            serve(model, other)
            yield BASE, model
            del model
            yield ADAPTER, other
            return
        serve(model)
        yield BASE, model
        if path is not None:
            del model
            model = self.loaded(path)
            serve(model)
            yield ADAPTER, model

    def loaded(
        self, folder: Path, adapter: Adapter | None = None, sharing: nn.Module | None = None
    ) -> nn.Module:
        """Return a model on this process's device."""
        choices: dict[str, Any] = {"quantize": self.quantize, "sharing": sharing}
        place = self.s.dtype, self.world.device
        return assembled(open_weights(folder), folder, adapter, *place, **choices)

    def outcomes(self, name: str, model: nn.Module) -> list[Outcome]:
        """Measure all samples with one model; each process takes its part."""
        fits = self.merged(self.fits(name, model))
        said = self.merged(self.answers(name, model)) if self.scorer else {}
        tokens = [item.sample.tokens for item in self.held.items]
        return [Outcome(*fits[i], count, said.get(i)) for i, count in enumerate(tokens)]

    def fits(self, name: str, model: nn.Module) -> Iterator[tuple[int, tuple[float, float]]]:
        """Yield loss and hits of this process's samples, in batches that do not depend on it."""
        size, items = self.s.batch_size, self.held.items
        starts = range(0, len(items), size)[self.world.rank :: self.world.size]
        with self.progress(f"{name}: loss", len(starts)) as bar:
            for start in starts:
                samples = [item.trained for item in items[start : start + size]]
                batch = ready(concatenate(samples), self.world.device)
                sums = [by_document(values, batch) for values in token_scores(model, batch)]
                yield from enumerate(zip(*sums, strict=True), start)
                bar.update()

    def answers(self, name: str, model: nn.Module) -> Iterator[tuple[int, Said]]:
        """Yield this process's answers, scored, as they come."""
        assert self.scorer is not None  # or no answers are asked for
        asked = [i for i, item in enumerate(self.held.items) if item.prompt]
        mine = asked[self.world.rank :: self.world.size]
        prompts = [self.held.items[i].prompt for i in mine]
        size = self.o.generation_batch_size
        generator = Generator(model, self.tokenizer, self.o.generation, batch_size=size)
        with self.progress(f"{name}: answers", len(mine)) as bar:
            for answer in generator.answers(prompts, numbers=mine):
                i = answer.index
                scores = self.scorer.score(answer.text, self.held.items[i].sample.reference)
                yield i, Said(answer.text, answer.reason, len(answer.tokens), scores)
                bar.update()

    def merged(self, own: Iterator[tuple[int, Any]]) -> dict[int, Any]:
        """Return what all processes found, by sample."""
        return {i: found for part in self.world.gather(dict(own)) for i, found in part.items()}

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Any]:
        """Show how far the first process is: in a terminal, and now and then in a log."""
        seen = sys.stderr.isatty()
        often = {"mininterval": 0.1 if seen else 60, "delay": 0 if seen else 60}
        with tqdm(total=total, desc=what, disable=not self.world.is_main, **often) as bar:
            yield bar

    def facts(self) -> dict[str, Any]:
        """Return what decided the numbers."""
        packages = ["phi3-plugin", "torch", "torchtune", "numpy", *PACKAGES * self.o.answers]
        facts: dict[str, Any] = {
            "evaluated": self.held.evaluated,
            "checkpoint_dir": str(self.s.checkpoint_dir),
            "adapter": None if self.o.adapter is None else str(self.o.adapter),
            "base": "NF4" if self.quantize else self.s.dtype,
            "data": dict(self.held.section),
            "tokenizer": self.s.tokenizer,
            "device": self.world.device.type,
        }
        if self.scorer:
            facts |= {"generation": asdict(self.o.generation), "scores": self.scorer.signatures()}
        versions = {name: version(name) for name in packages}
        return {**facts, "versions": {**versions, "python": platform.python_version()}}

    def write(self, evaluation: Evaluation) -> str:
        """Work out the numbers, write all files, and return what a terminal shows."""
        found = results(evaluation, measures(self.scorer), seed=self.s.seed)
        folder = self.s.output_dir
        texts = {
            files.SAMPLES: files.samples_text(evaluation),
            files.PAGE: page_of_evaluation(evaluation, found, count=self.o.worst),
            files.RESULTS: files.results_text(evaluation, found, self.s.seed),
        }
        files.write_files(folder, texts)
        return report(evaluation, found, str(folder / files.PAGE))


def is_quantized(model: Mapping[str, Any]) -> bool:
    """Whether a run with this model trains over a base in NF4."""
    name = str(model["_component_"]).rpartition(".")[2]
    return bool(model.get("quantize_base", name.startswith("qlora_")))


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a whole model rather than an adapter."""
    return (folder / "config.json").is_file() and not (folder / ADAPTER_CONFIG).is_file()


def refuse_adapter_as_base(folder: Path) -> None:
    """Tell a base from an adapter, which a training run calls by other keys.

    Raises:
        MissingFileError: It is an adapter, or has no weights at all.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise MissingFileError(
            f"checkpoint_dir: {folder} is the folder of an adapter. Give the folder of its base "
            "model here, and this one as adapter=..."
        )
    open_weights(folder)


@config.parse
def main(cfg: DictConfig) -> int:
    """Evaluate; see the top of this file."""
    try:
        recipe = Recipe(cfg)
        evaluation = recipe.evaluate()
        if recipe.world.is_main:
            print(for_stdout(harmless(recipe.write(evaluation))), end="")
        recipe.world.close()
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            print("\nphi3_evaluate: stopped, and nothing was written.", file=sys.stderr)
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
