"""Our model for EleutherAI's harness, which knows it as ``phi3_plugin`` once this is imported.

    import phi3_plugin.recipes.phi3_lm_eval_model

    lm_eval.simple_evaluate("phi3_plugin", {"base": "Phi-3-mini-4k"}, tasks=["arc_easy"])

What is scored is what the harness's own class for transformers scores: the same tokens, truncated
alike, so that numbers can be compared. Documents are scored side by side without padding, and a
question that several one-token answers share is read once.

Source: lm_eval 0.4.13, ``models/huggingface.py``.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from phi3_plugin.recipes.phi3_lm_eval_asked import chat_text, plain_encoder, sampling_of
from phi3_plugin.recipes.phi3_lm_eval_scores import Document, Score, batches, inputs_of, scored
from phi3_plugin.recipes.phi3_load import load
from tqdm import tqdm

from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.errors import ConfigError
from phi3_plugin.generate.engine import Generator
from phi3_plugin.models.serving import serve

log = logging.getLogger(__name__)

ROWS = 16
"""Answers in the making at a time, where the harness leaves the size of batches to us."""

Request = tuple[Any, list[int], list[int]]
"""What the harness caches the result by; tokens of context and continuation."""


@register_model("phi3_plugin")
class Phi3LM(TemplateLM):
    """A base, or a base with an adapter, on one device."""

    def __init__(
        self,
        base: str | None = None,
        adapter: str | None = None,
        dtype: str = "bf16",
        batch_size: int | str = "auto",
        quantize: bool = False,
        max_length: int | None = None,
        device: str | None = None,
        check_base: bool = True,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        """Load; the keys are those of ``--model_args``.

        Args:
            base: Folder of the base model.
            adapter: Folder or file of an adapter.
            dtype: bf16 or fp32.
            batch_size: Documents at a time; ``auto`` takes what is quick and fits.
            quantize: Base weights in NF4.
            max_length: Tokens of a document, at most; None is what the model has positions for.
            device: cpu or cuda; None takes what the machine has, and so does ``cuda:0``, which is
                what the harness says where nobody does.
            check_base: Refuse an adapter that says it was made for other weights.
            max_batch_size: Of the harness; not needed.
            **unknown: Refused.

        Raises:
            ConfigError: A key is unknown or has a value it cannot have.
            Phi3Error: See :func:`phi3_plugin.recipes.phi3_load.load`.
        """
        super().__init__()
        _check(base, unknown)
        self.rows = _rows(batch_size)
        self.tokenizer: Any = phi3_tokenizer(base, dropped="warn")
        self.encoder, self.folder = plain_encoder(Path(str(base))), str(base)
        where = None if device == "cuda:0" else device
        options: Any = {"dtype": dtype, "device": where, "quantize": quantize}
        self.model: Any = load(str(base), adapter, **options, check_base=check_base)
        serve(self.model)
        self._device = self.model.norm.scale.device
        positions = self.model.max_seq_len
        if max_length is not None and not (type(max_length) is int and 1 < max_length <= positions):
            raise ConfigError(f"max_length: {max_length!r} must be a number from 2 to {positions}.")
        self.max_length = max_length or positions

    max_gen_toks = 256

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has nothing before it."""
        bos = self.tokenizer.bos_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """By which the harness keeps apart what it caches of prompts."""
        return self.folder.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the checkpoint's chat template if one is asked for."""
        return str(self.tokenizer.template.source) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the checkpoint writes it."""
        return chat_text(self.tokenizer.template, chat_history, ask=add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the tokens of a text; the first checkpoints of April 2024 begin one with <s>."""
        if add_special_tokens is None:
            begins = self.tok_decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not string.startswith(begins)
        return list(self.encoder.encode(string, add_special_tokens=add_special_tokens).ids)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[Score]:
        """Score continuations.

        Raises:
            DataError: One has no token, or more than the model has positions.
        """
        documents: dict[Document, list[int]] = {}  # and the requests that each serves
        for number, request in enumerate(requests):
            documents.setdefault(inputs_of(*request, self.max_length), []).append(number)
        found: dict[int, Score] = {}
        # The longest first: what does not fit into memory says so at once.
        ordered = sorted(documents, key=lambda inputs: (-len(inputs), inputs))
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm) as bar:
            for batch in batches(self.model, ordered, self.rows):
                numbers = [(at, n) for at, inputs in enumerate(batch) for n in documents[inputs]]
                questions = [(at, requests[n][2]) for at, n in numbers]
                scores = scored(self.model, batch, questions)
                for (_, n), score in zip(numbers, scores, strict=True):
                    found[n] = score
                    if requests[n][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[n][0], score)
                bar.update(len(numbers))
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in windows as long as the model takes."""
        windows: list[Request] = []
        counts: list[int] = []
        for (text,) in (request.args for request in requests):
            tokens, before = self.tok_encode(text), self.prefix_token_id
            cut = utils.get_rolling_token_windows(tokens, before, self.max_length, context_len=1)
            own = [(None, *utils.make_disjoint_window(window)) for window in cut]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return an answer for each prompt.

        Raises:
            ConfigError: Something is asked of answers that we do not do.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True, default=str)
            groups.setdefault(key, []).append(number)
        found: dict[int, str] = {}
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
            for numbers in groups.values():
                for number, text in self._answers(numbers, requests):
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(1)
        return [found[number] for number in range(len(requests))]

    def _answers(
        self, numbers: Iterable[int], requests: Sequence[Any]
    ) -> Iterator[tuple[int, str]]:
        """Answer prompts of which the same is asked."""
        prompts = {number: self.tok_encode(requests[number].args[0]) for number in numbers}
        ordered = sorted(prompts, key=lambda number: -len(prompts[number]))
        sampling = sampling_of(requests[ordered[0]].args[1], self.max_gen_toks)
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"max_gen_toks: {sampling.max_new_tokens} leaves no room for a prompt in "
                f"{self.max_length} positions. Ask for less."
            )
        if cut := sum(len(prompt) > room for prompt in prompts.values()):
            log.warning("%s prompts are cut at their start, to %s tokens.", cut, room)
        generator = Generator(self.model, self.tokenizer, sampling, batch_size=self.rows or ROWS)
        given = [prompts[number][-room:] or [self.prefix_token_id] for number in ordered]
        for answer in generator.answers(given):
            # All of it at once, as transformers does: bytes that are no character come out alike.
            text = self.tok_decode(answer.tokens)
            cut_off = (text.split(stop)[0] for stop in sampling.stop)
            yield ordered[answer.index], min(cut_off, key=len, default=text)


def _rows(batch_size: int | str) -> int | None:
    """Return documents at a time; None leaves it to us."""
    text = str(batch_size)
    if text.split(":")[0] == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"batch_size: {batch_size!r} must be a whole number above 0, or auto.")
    return int(text)


def _check(base: str | None, unknown: Mapping[str, Any]) -> None:
    meant = {"pretrained": "base", "peft": "adapter"}
    problems = [
        f"model_args: {key} is unknown." + (f" Use {meant[key]}." if key in meant else "")
        for key in unknown
    ]
    if base is None:
        problems.append("model_args: base is not set. Give the folder of a checkpoint.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        problems.append("phi3_plugin evaluates in one process. Start it without accelerate.")
    if problems:
        raise ConfigError("\n".join(problems))
