"""Answer prompts with a base model, or with a base model and an adapter.

    tune run phi3_generate --config phi3_generate checkpoint_dir=A adapter=B \
      prompts=prompts.jsonl output=answers.jsonl

`phi3-tune generate --base A --adapter B --file prompts.jsonl -o answers.jsonl` is the same, and
takes a prompt as it is typed: `phi3-tune generate --base A "What is 2 + 2?"`.
"""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchtune import config
from tqdm import tqdm

from phi3_plugin.config import read_config
from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.data.tokenizer import Phi3Tokenizer
from phi3_plugin.errors import ConfigError
from phi3_plugin.generate import Answer, Generator
from phi3_plugin.launch import STOPPED
from phi3_plugin.options import GenerateOptions, PromptOptions, Sampling, read
from phi3_plugin.prompts import (
    CUT,
    STDIN,
    Part,
    Printed,
    Prompt,
    Row,
    as_line,
    check_output,
    check_stop,
    check_system,
    generator,
    open_streams,
    read_prompts,
    safe,
    set_stdout,
    writer,
)

OURS = re.compile("(given_)*(answer|reason|tokens|prompt_tokens)")
"""Keys that a row of ours has; answers of answers keep all of them."""


def run(o: PromptOptions) -> int:
    """Answer what was asked for and return the exit code."""
    try:
        return _answer(o)
    except KeyboardInterrupt:
        say("Stopped before the first answer.")
        return STOPPED
    except BrokenPipeError:  # `| head` has seen enough
        return 1


def _answer(o: PromptOptions) -> int:
    """Find out all that can be wrong before the model is loaded, then load it and let it answer."""
    open_streams()
    o = replace(o, output=None) if o.output == STDIN else o
    if o.raw and o.system:
        raise ConfigError("system: there is no system message without a chat template (raw).")
    check_output(o)
    tokenizer = phi3_tokenizer(o.checkpoint_dir, dropped="warn")
    check_stop(o.sampling.stop, tokenizer)
    if o.dropped == "error":
        check_system(o.system, tokenizer)
    positions = read_config(o.checkpoint_dir).max_position_embeddings
    prompts = read_prompts(o, tokenizer, positions)
    if o.prompt and o.output is None:
        return speak(generator(o, tokenizer, o.batch_size), prompts)
    return fill(o, tokenizer, prompts)


def speak(ready: Generator, prompts: Sequence[Prompt]) -> int:
    """Print answers as they are written."""
    set_stdout(errors="replace")
    show = writer()
    for n, prompt in enumerate(prompts, 1):
        if len(prompts) > 1:
            say(f"[{n}] {safe(prompt.turns[-1].content)}")
        try:
            answer = ready.answer(prompt.ids, show)
        except KeyboardInterrupt:
            show("\n")
            say("Stopped.")
            return STOPPED
        show("\n")
        if answer.reason in CUT:
            say(f"The answer was cut {CUT[answer.reason].format(ready.sampling)}.")
    return 0


def fill(o: PromptOptions, tokenizer: Phi3Tokenizer, prompts: Sequence[Prompt]) -> int:
    """Write a JSON line for each prompt."""
    sink: Part | Printed = Printed()
    if o.output is not None:
        sink = Part(Path(o.output), identity(o, prompts), overwrite=o.overwrite)
    else:
        set_stdout(encoding="utf-8")
    with sink:
        todo = [number for number in range(len(prompts)) if number not in sink.done]
        if sink.done:
            say(f"{len(sink.done):,} of {len(prompts):,} prompts are answered. Going on.")
        try:
            if todo:
                _fill(sink, generator(o, tokenizer, o.batch_size), prompts, todo)
            wrote = sink.finish()
        except KeyboardInterrupt:
            done = f"after {len(sink.done):,} of {len(prompts):,} prompts{sink.kept}"
            say(f"Stopped {done if sink.done else 'before the first answer'}.")
            return STOPPED
    say(" ".join(filter(None, [wrote, cut(sink.done.values(), o.sampling)])))
    return 0


def _fill(
    sink: Part | Printed, ready: Generator, prompts: Sequence[Prompt], todo: Sequence[int]
) -> None:
    answers = ready.answers((prompts[number].ids for number in todo), numbers=todo)
    start = len(prompts) - len(todo)
    # disable=None: no bar where standard error is no terminal
    with tqdm(total=len(prompts), initial=start, disable=None, unit=" prompts") as bar:
        for answer in answers:
            sink.add(answer.index, answered(prompts[answer.index].row, answer))
            bar.update()


def answered(row: Row, answer: Answer) -> Row:
    """Return a row with its answer. What it has under our names goes on as given_..."""
    given = {f"given_{key}" if OURS.fullmatch(key) else key: v for key, v in row.items()}
    counts = {"tokens": len(answer.tokens), "prompt_tokens": answer.prompt_tokens}
    return {**given, "answer": answer.text, "reason": answer.reason, **counts}


def cut(rows: Any, sampling: Sampling) -> str:
    """Say how many answers were cut off, and by what."""
    counted = Counter(row["reason"] for row in rows)
    said = [f"{counted[why]:,} {how.format(sampling)}" for why, how in CUT.items() if counted[why]]
    return f"Cut off: {', '.join(said)}." if said else ""


def identity(o: PromptOptions, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return what decides on the answers, so that a run goes on from its own alone."""
    asked = {key: list(v) if key == "stop" else v for key, v in asdict(o.sampling).items()}
    seen = sha256()
    for prompt in prompts:
        seen.update(as_line(prompt.row).encode())
        seen.update(prompt.ids.tobytes())
    chosen = {key: getattr(o, key) for key in ("system", "raw", "dtype", "quantize")}
    weights = {key: _files(getattr(o, key)) for key in ("checkpoint_dir", "adapter")}
    return {"prompts": seen.hexdigest(), **weights, **chosen, **asked}


def _files(path: str | None) -> str | None:
    """Return a hash of which files make a model: names, sizes and times tell enough."""
    if path is None:
        return None
    place, seen = Path(path).resolve(), sha256(str(Path(path).resolve()).encode())
    files = [place] if place.is_file() else sorted(place.glob("*"))
    for file in files:
        if file.is_file():
            seen.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return seen.hexdigest()


def say(text: str) -> None:
    """Tell the user something that is no answer."""
    if text:
        print(text, file=sys.stderr, flush=True)


@config.parse
def main(cfg: DictConfig) -> int:
    """Answer prompts; see the top of this file."""
    # Prompts come from a file: `key=value` would mangle free text
    return run(PromptOptions(**vars(read(GenerateOptions, cfg, "phi3_generate"))))


if __name__ == "__main__":
    sys.exit(main())
