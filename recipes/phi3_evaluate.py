"""Tell whether a fine-tune made the model better: base and adapter on data that was held out.

    tune run phi3_evaluate --config phi3_mini_lora checkpoint_dir=BASE output_dir=eval \
      adapter=my_adapter/final dataset.source=evaluation_data.jsonl

It takes the configuration of a run as it is, and the keys of `phi3_plugin.options.EvaluateOptions`.
Without `adapter` the base is evaluated alone. Writes samples.jsonl, results.json and
evaluation.html. With several processes each has a whole model and takes a part of the samples.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn
from torchtune import config
from tqdm import tqdm

from phi3_plugin.checkpoint.files import append_whole, check_output
from phi3_plugin.checkpoint.peft import is_model, new_tokens_of
from phi3_plugin.config import read_config
from phi3_plugin.data.added_tokens import NewToken
from phi3_plugin.data.collate import concatenate
from phi3_plugin.errors import ConfigError, MissingFileError
from phi3_plugin.evaluate import (
    ADAPTER,
    BASE,
    PACKAGES,
    PAGE,
    PART,
    RESULTS,
    SAMPLES,
    AnswersSoFar,
    Evaluation,
    EvaluationData,
    Outcome,
    Result,
    Scorer,
    by_document,
    evaluation_data,
    measures,
    refuse_earlier,
    results,
    results_text,
    samples_text,
    set_aside,
    terminal_report,
    token_scores,
)
from phi3_plugin.generate import Generator
from phi3_plugin.launch import STOPPED
from phi3_plugin.load import empty_model, load_model, load_start
from phi3_plugin.lock import FolderLock
from phi3_plugin.models.cache import serve
from phi3_plugin.options import EvaluateOptions
from phi3_plugin.pages import versions, write_files
from phi3_plugin.pages.evaluation import page_of_evaluation
from phi3_plugin.redaction import redacted
from phi3_plugin.settings import Settings, is_quantized, read_beside
from phi3_plugin.terminal import for_stdout, harmless
from phi3_plugin.train.data import instantiate
from phi3_plugin.train.plan import give_memory_back
from phi3_plugin.train.step import ready
from phi3_plugin.train.world import World


def measure(cfg: DictConfig) -> None:
    """Check what was asked for, and evaluate."""
    # What several processes cannot train on they can evaluate
    s, o = read_beside(cfg, EvaluateOptions, processes=1)
    # What can be checked is checked before anything slow happens
    check_output(s.output_dir, s.checkpoint_dir)
    if not o.overwrite:
        refuse_earlier(s.output_dir)
    check_models(s, o)
    scorer = Scorer() if o.answers else None
    world = World(s.device, int(os.environ.get("WORLD_SIZE", 1)))
    with FolderLock(s.output_dir, "output_dir") if world.is_main else nullcontext():
        evaluate(s, o, scorer, world, redacted(cfg))
    world.close()


def evaluate(
    s: Settings,
    o: EvaluateOptions,
    scorer: Scorer | None,
    world: World,
    shown: Mapping[str, Any],
) -> None:
    """Measure base and adapter on the same samples, and write what was found.

    Args:
        s: Of a run.
        o: Of this recipe.
        scorer: Compares answers with the references; None: there are no answers.
        world: All processes.
        shown: The configuration, redacted.
    """
    if world.is_main and (text := set_aside(s.output_dir)):
        print(text, file=sys.stderr)
    tokenizer = tokenizer_for(s, o.adapter)
    positions = read_config(s.checkpoint_dir).max_position_embeddings if o.answers else None
    data = evaluation_data(s, tokenizer, o.max_samples, positions)

    so_far = AnswersSoFar(s.output_dir, world.rank)
    facts = facts_of(s, o, data, scorer, world, shown)
    outcomes: dict[str, list[Outcome]] = {}
    try:
        for name, model in models(s, o, getattr(tokenizer, "new_tokens", {})):
            losses = gathered(world, token_sums(name, model, data, s.batch_size, world))
            answers: dict[int, Any] = {}
            if scorer:
                size = o.generation_batch_size
                generator = Generator(model, tokenizer, o.generation, batch_size=size)
                answers = gathered(world, scored(name, generator, data, scorer, world, so_far))
                del generator
            outcomes[name] = []
            for i, sample in enumerate(data.samples):
                loss, hits = losses[i]
                answer, scores = answers.get(i, (None, None))
                outcomes[name].append(Outcome(loss, hits, sample.labelled, answer, scores))
            del model  # or it would be there beside the next ones
    except BaseException as error:
        if world.is_main:
            if outcomes and isinstance(error, Exception):  # of the adapter's turn
                show_measures(Evaluation(data.samples, outcomes, facts), scorer, s.seed)
            if so_far.count:
                print(f"\nThe answers so far are kept in {so_far.file}.", file=sys.stderr)
        raise

    if world.is_main:
        evaluation = Evaluation(data.samples, outcomes, facts)
        answers_text = samples_text(evaluation)
        with kept(answers_text):
            numbers = show_measures(evaluation, scorer, s.seed, s.output_dir / PAGE)
            files = {
                SAMPLES: answers_text,
                PAGE: page_of_evaluation(evaluation, numbers, most=o.worst),
                RESULTS: results_text(evaluation, numbers, s.seed),
            }
            write_files(s.output_dir, files, "Make room, or set another output_dir.")
        for part in s.output_dir.glob(f"{PART}*"):  # all of it is in samples.jsonl now
            part.unlink()


def show_measures(
    evaluation: Evaluation, scorer: Scorer | None, seed: int, page: Path | None = None
) -> list[Result]:
    """Print the table, and return what it says; the page has all of it."""
    numbers = results(evaluation, measures(scorer), seed=seed)
    text = terminal_report(evaluation, numbers, page)
    print(for_stdout(harmless(text)), end="", flush=True)
    return numbers


@contextmanager
def kept(answers: str) -> Iterator[None]:
    """Keep what took hours elsewhere, and say where, if it cannot be written where it belongs."""
    try:
        yield
    except BaseException:
        try:
            handle, name = tempfile.mkstemp(prefix="phi3_evaluate-", suffix=f"-{SAMPLES}")
            os.close(handle)
            append_whole(Path(name), answers.encode())
            print(f"The answers are kept in {name}.", file=sys.stderr)
        except OSError as error:
            problem = f"The answers cannot be kept in {tempfile.gettempdir()} either ({error}):"
            print(f"{problem}\n{for_stdout(harmless(answers))}")
        raise


def check_models(s: Settings, o: EvaluateOptions) -> None:
    """Find out what is wrong with an adapter before the base is evaluated for hours.

    Raises:
        AdapterError: It is broken, or does not fit this base.
        MissingFileError: It is not there, or the base is an adapter.
    """
    if o.adapter is not None and not o.adapter.exists():
        raise MissingFileError(
            f"adapter: {o.adapter} is not there. Give the folder that a run has saved."
        )
    quantize = is_quantized(s.model)
    over = None if o.adapter and is_model(o.adapter) else o.adapter
    empty_model(s.checkpoint_dir, over, quantize=quantize, check_base=o.check_base)


def tokenizer_for(s: Settings, adapter: Path | None) -> Any:
    """Return the tokenizer of the configuration, with the tokens that an adapter has rows for.

    Raises:
        ConfigError: The configuration adds others.
    """
    trained = new_tokens_of(adapter, s.checkpoint_dir) if adapter else []
    section = dict(s.tokenizer)
    if trained and section.get("add_tokens") is None:
        section["add_tokens"] = trained
    tokenizer = instantiate(section)
    added = [token.entry for token in getattr(tokenizer, "new_tokens", {}).values()]
    if adapter and added != trained:
        texts = [token["content"] for token in trained]
        raise ConfigError(
            f"tokenizer.add_tokens: {section.get('add_tokens')} are not the tokens that {adapter} "
            f"has rows for, {texts}. Leave the key out."
        )
    return tokenizer


def models(
    s: Settings, o: EvaluateOptions, new_tokens: Mapping[int, NewToken]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the models by name; memory never holds the base weights twice.

    The base has the rows of new tokens from which training starts.
    """
    give_memory_back()
    how: Any = {"dtype": s.dtype, "device": s.device, "quantize": is_quantized(s.model)}
    base = load_start(s.checkpoint_dir, new_tokens, **how)
    if o.adapter is None or is_model(o.adapter):
        serve(base)
        yield BASE, base
        del base
        if o.adapter is not None:
            whole = load_model(o.adapter, **how)
            serve(whole)
            yield ADAPTER, whole
        return
    adapted = load_model(s.checkpoint_dir, o.adapter, sharing=base, check_base=o.check_base, **how)
    serve(base, adapted)
    yield BASE, base
    del base
    yield ADAPTER, adapted


def token_sums(
    name: str, model: nn.Module, data: EvaluationData, batch_size: int, world: World
) -> Iterator[tuple[int, tuple[float, float]]]:
    """Yield loss and hits of this process's samples, in batches that do not depend on it."""
    starts = range(0, len(data.samples), batch_size)[world.rank :: world.size]
    with progress_bar(f"{name}: loss", len(starts), world) as bar:
        for start in starts:
            samples = data.samples[start : start + batch_size]
            rows = [{"tokens": sample.tokens, "labels": sample.labels} for sample in samples]
            batch = ready(concatenate(rows), world.device)
            sums = [by_document(values, batch) for values in token_scores(model, batch)]
            yield from enumerate(zip(*sums, strict=True), start)
            bar.update()


def scored(
    name: str,
    generator: Generator,
    data: EvaluationData,
    scorer: Scorer,
    world: World,
    so_far: AnswersSoFar,
) -> Iterator[tuple[int, Any]]:
    """Yield this process's answers with their scores, as they come."""
    asked = [i for i, sample in enumerate(data.samples) if sample.prompt_ids]
    mine = asked[world.rank :: world.size]
    prompts = [data.samples[i].prompt_ids for i in mine]
    with progress_bar(f"{name}: answers", len(mine), world) as bar:
        for answer in generator.answers(prompts, numbers=mine):
            sample = data.samples[answer.index]
            so_far.add(name, sample, answer)
            scores = scorer.score(answer.text, sample.reference)
            yield answer.index, (answer, scores)
            bar.update()


def gathered(world: World, own: Iterator[tuple[int, Any]]) -> dict[int, Any]:
    """Return the values of all processes, by sample."""
    return {i: value for part in world.gather(dict(own)) for i, value in part.items()}


def progress_bar(what: str, total: int, world: World) -> Any:
    """Return what shows how far the first process is: in a terminal, and now and then in a log."""
    interval, delay = (0.1, 0) if sys.stderr.isatty() else (60, 60)  # seconds
    quiet = not world.is_main
    return tqdm(total=total, desc=what, disable=quiet, mininterval=interval, delay=delay)


def facts_of(
    s: Settings,
    o: EvaluateOptions,
    data: EvaluationData,
    scorer: Scorer | None,
    world: World,
    shown: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what decided the numbers; of the data and the tokenizer what may be shown."""
    facts: dict[str, Any] = {
        "evaluated": data.source,
        "checkpoint_dir": str(s.checkpoint_dir),
        "adapter": None if o.adapter is None else str(o.adapter),
        "base": "NF4" if is_quantized(s.model) else s.dtype,
        "data": shown["dataset_val" if s.dataset_val else "dataset"],
        "tokenizer": shown["tokenizer"],
        "device": world.device.type,
    }
    if scorer:
        facts |= {"generation": asdict(o.generation), "scores": scorer.signatures()}
    return {**facts, "versions": versions("numpy", *(PACKAGES if scorer else ()))}


@config.parse
def main(cfg: DictConfig) -> int:
    """Evaluate; see the top of this file."""
    try:
        measure(cfg)
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            print("\nphi3_evaluate: stopped.", file=sys.stderr)
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
