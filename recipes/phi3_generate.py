"""Answer prompts with a base model, or with a base model and an adapter.

    tune run phi3_generate --config phi3_generate checkpoint_dir=A adapter=B \
      prompts=prompts.jsonl output=answers.jsonl

`phi3-tune generate --base A --adapter B --file prompts.jsonl -o answers.jsonl` is the same, and
takes a prompt as it is typed: `phi3-tune generate --base A "What is 2 + 2?"`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig
from torchtune import config
from tqdm import tqdm

from phi3_plugin.config import read_config
from phi3_plugin.data.tokenizer import Phi3Tokenizer
from phi3_plugin.errors import ConfigError
from phi3_plugin.generate import Generator
from phi3_plugin.launch import STOPPED
from phi3_plugin.load import load_model, tokenizer_of
from phi3_plugin.models.cache import serve
from phi3_plugin.options import GenerateOptions, PromptOptions, read_options
from phi3_plugin.prompts import (
    STDIN,
    AnswersFile,
    PrintedAnswers,
    Prompt,
    Speaker,
    answer_row,
    check_answers_file,
    check_stop,
    check_system,
    cut_off,
    identity_of,
    read_prompts,
    safe,
)


def run(o: PromptOptions) -> int:
    """Answer what was asked for and return the exit code."""
    try:
        # All that can be wrong is found out before the model is loaded
        if o.raw and o.system:
            raise ConfigError("system: there is no system message without a chat template (raw).")
        check_answers_file(o)
        tokenizer = tokenizer_of(o.checkpoint_dir, o.adapter, dropped="warn")
        check_stop(o.stop, tokenizer)
        if o.dropped == "error":
            check_system(o.system, tokenizer)
        positions = read_config(o.checkpoint_dir).max_position_embeddings
        prompts = read_prompts(o, tokenizer, positions)
        if o.prompt and o.output in (None, STDIN):
            return speak(o, tokenizer, prompts)
        return write(o, tokenizer, prompts)
    except KeyboardInterrupt:
        say("Stopped before the first answer.")
        return STOPPED
    except BrokenPipeError:  # `| head` has seen enough
        return 1


def load_generator(o: PromptOptions, tokenizer: Phi3Tokenizer) -> Generator:
    """Load the model that answers."""
    model = load_model(
        o.checkpoint_dir, o.adapter, dtype=o.dtype, device=o.device, quantize=o.quantize
    )
    serve(model)
    return Generator(model, tokenizer, o, batch_size=o.batch_size)


def speak(o: PromptOptions, tokenizer: Phi3Tokenizer, prompts: Sequence[Prompt]) -> int:
    """Print answers as they are written, one after the other."""
    generator = load_generator(o, tokenizer)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    for n, prompt in enumerate(prompts, 1):
        if len(prompts) > 1:
            say(f"[{n}] {safe(prompt.row['prompt'])}")
        speaker = Speaker(hide_thoughts=o.hide_thoughts)
        try:
            answer = generator.answer(prompt.ids, speaker)
        except KeyboardInterrupt:
            speaker.end()
            say("Stopped.")
            return STOPPED
        speaker.end()
        if cut := speaker.told(answer.reason, o):
            say(f"The answer was {cut}.")
    return 0


def write(o: PromptOptions, tokenizer: Phi3Tokenizer, prompts: Sequence[Prompt]) -> int:
    """Write a JSON line for each prompt, many answers at a time."""
    sink: AnswersFile | PrintedAnswers = PrintedAnswers()
    if o.output in (None, STDIN):
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    else:
        sink = AnswersFile(Path(str(o.output)), identity_of(o, prompts), replace=o.overwrite)
    with sink:
        todo = [number for number in range(len(prompts)) if number not in sink.done]
        if sink.done:
            say(f"{len(sink.done):,} of {len(prompts):,} prompts are answered. Going on.")
        try:
            if todo:
                generator = load_generator(o, tokenizer)
                answers = generator.answers((prompts[n].ids for n in todo), numbers=todo)
                # disable=None: no bar where standard error is no terminal
                start, total = len(sink.done), len(prompts)
                with tqdm(total=total, initial=start, disable=None, unit=" prompts") as bar:
                    for answer in answers:
                        row = prompts[answer.index].row
                        row = answer_row(row, answer, hide_thoughts=o.hide_thoughts)
                        sink.add(answer.index, row)
                        bar.update()
            wrote = sink.finish()
        except KeyboardInterrupt:
            done = f"after {len(sink.done):,} of {len(prompts):,} prompts{sink.kept}"
            say(f"Stopped {done if sink.done else 'before the first answer'}.")
            return STOPPED
    say(" ".join(filter(None, [wrote, cut_off(sink.done.values(), o)])))
    return 0


def say(text: str) -> None:
    """Tell the user something that is no answer."""
    if text:
        print(text, file=sys.stderr, flush=True)


@config.parse
def main(cfg: DictConfig) -> int:
    """Answer prompts; see the top of this file."""
    # Prompts come from a file: `key=value` would mangle free text
    return run(PromptOptions(**vars(read_options(GenerateOptions, cfg, "phi3_generate"))))


if __name__ == "__main__":
    sys.exit(main())
