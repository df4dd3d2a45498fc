"""Prompts in, answers out: what a model is asked, and where its answers go."""

import fcntl
import io
import json
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NamedTuple

from phi3_plugin.data.columns import with_system_prompt
from phi3_plugin.data.formats import MessageList
from phi3_plugin.data.rows import lines
from phi3_plugin.data.thoughts import (
    THOUGHT_IN_TEXT,
    ThoughtsHidden,
    is_thinking,
    split_thought,
)
from phi3_plugin.data.tokenizer import Phi3Tokenizer, warn_of_dropped
from phi3_plugin.data.turns import Turn, kind, make_turn
from phi3_plugin.errors import ConfigError, DataError, MissingFileError, OutputError
from phi3_plugin.generate import Answer
from phi3_plugin.options import PromptOptions, Sampling, closest
from phi3_plugin.pages import write_files
from phi3_plugin.pages.numbers import count

STDIN = "-"
"""Names standard input, and as an output standard output."""

JsonRow = dict[str, Any]
"""A line of prompts or of answers."""

# What a model reads.


def prompt_ids(
    tokenizer: Phi3Tokenizer, turns: Sequence[Turn], dropped: Counter[str] | None = None
) -> list[int]:
    """Return the tokens of a conversation, with the header of the answer at the end.

    Args:
        tokenizer: One that lets the template leave messages out, to be judged here.
        turns: What was said.
        dropped: Counts the messages that are left out; None allows none.

    Raises:
        DataError: It cannot be rendered.
    """
    rendered = tokenizer.render(turns, add_generation_prompt=True)
    if rendered.dropped and dropped is None:
        raise DataError(
            f"the chat template leaves out {', '.join(dict.fromkeys(rendered.dropped))}; remove "
            "it, or set dropped to warn to go on without"
        )
    if dropped is not None:
        dropped.update(rendered.dropped)
    (tokens,) = tokenizer.encode_chats([rendered]).split()
    ids: list[int] = tokens.ids.tolist()
    return ids


def check_stop(stop: Sequence[str], tokenizer: Phi3Tokenizer) -> None:
    """Refuse a text that is meant as a special token and is none of this tokenizer's.

    Raises:
        ConfigError: There is one.
    """
    known = tokenizer.special_tokens
    if unknown := [text for text in stop if re.fullmatch(r"<\|.*\|>", text) and text not in known]:
        raise ConfigError(
            f"stop: {', '.join(map(repr, unknown))} would never be written: the special tokens of "
            f"this checkpoint are {', '.join(known)}."
        )


def check_system(system: str | None, tokenizer: Phi3Tokenizer) -> None:
    """Refuse a system message that the chat template leaves out.

    Raises:
        ConfigError: It does.
        DataError: It is no valid text.
    """
    if not system:
        return
    turns = [make_turn("system", system), make_turn("user", "Hello")]
    if tokenizer.template.render(turns, add_generation_prompt=True).dropped:
        raise ConfigError(
            "system: the chat template of this checkpoint leaves system messages out. Write it "
            "at the start of the prompt instead."
        )


def too_long(tokens: int, positions: int) -> str:
    """Say that a prompt leaves no room for an answer."""
    return f"{tokens:,} tokens, but the model has {positions:,} positions, answer included"


# Prompts, typed or in a file. All that is wrong with them is said before a model is loaded.

JSONL, TEXT = (".jsonl", ".ndjson"), (".txt",)
PROMPT_KEYS = ("prompt", "messages")
MOST_BAD_ROWS = 10
"""Problems that are told; more are counted."""


class Prompt(NamedTuple):
    """What is to be answered."""

    row: JsonRow
    """What the line of its answer starts with."""
    ids: "array[int]"
    """Its tokens, four bytes each."""


def read_prompts(o: PromptOptions, tokenizer: Phi3Tokenizer, positions: int) -> list[Prompt]:
    """Return the prompts, tokenized.

    Args:
        o: Where they are.
        tokenizer: See :func:`prompt_ids`.
        positions: How many tokens the model can take.

    Raises:
        ConfigError: Nothing says what to answer, or two things do.
        DataError: There are none, or some cannot be used; they are listed.
        MissingFileError: There is no such file.
    """
    prompts: list[Prompt] = []
    problems: list[str] = []
    dropped: Counter[str] = Counter()
    for where, row in _typed(o) if o.prompt else _file_rows(o.prompts):
        try:
            turns = _turns(row, o, tokenizer)
            if o.raw:
                ids = tokenizer.encode(turns[0].content)
            else:
                ids = prompt_ids(tokenizer, turns, dropped if o.dropped == "warn" else None)
            if len(ids) >= positions:
                raise DataError(too_long(len(ids), positions))
            prompts.append(Prompt(row, array("i", ids)))
        except DataError as error:
            problems.append(f"{where}: {error}")
    if len(problems) > MOST_BAD_ROWS:
        problems[MOST_BAD_ROWS:] = [f"... and {len(problems) - MOST_BAD_ROWS:,} more."]
    if problems:
        raise DataError("\n".join(["Not every prompt can be answered.", *problems]))
    if not prompts:
        raise DataError(f"{_name(o.prompts)} holds no prompts.")
    warn_of_dropped(dropped)
    return prompts


def _typed(o: PromptOptions) -> Iterator[tuple[str, JsonRow]]:
    if o.prompts is not None:
        raise ConfigError("prompt and prompts: both are given. Name a file, or type a prompt.")
    if len(o.prompt) > 1 and not any(" " in text.strip() for text in o.prompt):
        raise ConfigError(
            f"prompt: {len(o.prompt)} prompts of one word. Put a prompt in quotes: "
            f'"{" ".join(o.prompt)}". One-word prompts go into a file, one a line.'
        )
    yield from ((f"prompt {n}", {"prompt": text}) for n, text in enumerate(o.prompt, 1))


def _file_rows(source: str | None) -> Iterator[tuple[str, Any]]:
    """Yield each row of a file, or why there is none, and where it stands."""
    if source is None:
        raise ConfigError(
            "prompts is not set. Give a prompt in quotes, a .jsonl or .txt file, or - for standard "
            "input."
        )
    suffix = "" if source == STDIN else Path(source).suffix.lower()
    if suffix and suffix not in JSONL + TEXT:
        raise ConfigError(
            f"prompts: {source} must end in .jsonl, with {{prompt}} or {{messages}} in each "
            "line, or in .txt, with one prompt a line."
        )
    text = _read(source)
    stream = io.StringIO(text, newline=None)  # \r\n and \r end lines too
    if suffix in JSONL or (not suffix and _is_object(text.lstrip().partition("\n")[0])):
        yield from ((f"line {n}", row) for n, row in lines(stream))
    elif text.strip():
        # Empty lines at the end are no prompts; those between others are mistakes, and told as such
        for n, line in enumerate(stream.read().rstrip().split("\n"), 1):
            yield f"line {n}", {"prompt": line}


def _name(source: str | None) -> str:
    return "standard input" if source == STDIN else str(source)


def _read(source: str) -> str:
    try:
        data = sys.stdin.buffer.read() if source == STDIN else Path(source).read_bytes()
        return data.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise MissingFileError(f"prompts: {source} is not there.") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{_name(source)} is not UTF-8 (line {line}). Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{_name(source)} cannot be read: {error.strerror or error}.") from error


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _turns(row: Any, o: PromptOptions, tokenizer: Phi3Tokenizer) -> list[Turn]:
    """Return what the model is to answer: the conversation, or the text alone."""
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"{kind(row)}, expected an object with prompt or messages")
    key = _key(row)
    value = row[key]
    if key == "prompt" and isinstance(value, str):
        if not value.strip():
            raise DataError("the prompt is empty")
        turns = [make_turn("user", value)]
    elif key == "prompt" and not isinstance(value, list):
        raise DataError(f"prompt is {kind(value)}, expected a text")
    elif o.raw:
        raise DataError(f"{key} is {kind(value)}; without a chat template, prompt is a text")
    else:
        reads = tokenizer.template.reads._replace(variables=frozenset())
        # A thought before an answer, or in the reference, which is not shown
        thoughts = None if reads.thought else tokenizer.thoughts or THOUGHT_IN_TEXT
        turns = MessageList(key, "role", reads=reads, thoughts=thoughts).read(row)
        if turns[-1].role == "assistant":  # a reference, with which the answer is compared
            turns = turns[:-1]
        if not any(turn.content.strip() for turn in turns if turn.role != "system"):
            raise DataError("nothing is said that could be answered")
    return with_system_prompt(turns, o.system) if o.system else turns


def _key(row: Mapping[str, Any]) -> str:
    present = [key for key in PROMPT_KEYS if row.get(key) is not None]
    if len(present) == 1:
        return present[0]
    if present:
        raise DataError("there are prompt and messages; remove one")
    for name in row:
        if close := closest(str(name), PROMPT_KEYS):
            raise DataError(
                f"there is neither prompt nor messages; did you mean {close!r} by {name!r}?"
            )
    raise DataError("there is neither prompt nor messages")


# Standard output, and what goes there.

CUT = {
    "length": "at {0.max_new_tokens} tokens (max_new_tokens)",
    "time": "after {0.max_time} seconds (max_time)",
    "context": "at the last of the model's positions",
}
"""What cut an answer off, by its reason."""


def writer() -> Callable[[str], None]:
    """Return what prints a piece of text at once; to a terminal, nothing that could drive it."""
    return (lambda piece: put(safe(piece))) if sys.stdout.isatty() else put


class Speaker:
    """Shows an answer as it is written, with its thought or without."""

    def __init__(self, *, hide_thoughts: bool = False) -> None:
        """Show nothing yet."""
        self._show = writer()
        self._hidden = ThoughtsHidden(self._show) if hide_thoughts else None
        self.text = ""
        """All of the answer, so far."""

    def __call__(self, piece: str) -> None:
        """Take a piece of the answer."""
        self.text += piece
        (self._hidden or self._show)(piece)

    def end(self) -> None:
        """Show the rest, and end the line."""
        if self._hidden is not None:
            self._hidden.end()
        self._show("\n")

    def told(self, reason: str, sampling: Sampling) -> str:
        """Say what cut the answer off; empty where it ended by itself."""
        if reason not in CUT:
            return ""
        where = ", within its thought" if is_thinking(self.text) else ""
        return f"cut {CUT[reason].format(sampling)}{where}"


def safe(text: str) -> str:
    """Return text without what drives a terminal: control characters and turns of direction."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", "", text)


def put(text: str) -> None:
    """Write to standard output at once.

    Raises:
        BrokenPipeError: Its reader has seen enough, as `| head` has.
        OutputError: It cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Or what waits to be written would fail once more as the process ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        reason = error.strerror or error
        raise OutputError(f"standard output cannot be written: {reason}.") from error


def as_line(row: Mapping[str, Any]) -> str:
    """Return a row as JSON that every reader takes for one line, with its end."""
    text = json.dumps(row, ensure_ascii=False)
    unwritable = "[\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(unwritable, lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


# The lines of a file of answers.


def answer_row(row: JsonRow, answer: Answer, *, hide_thoughts: bool = False) -> JsonRow:
    """Return a row with its answer.

    What it has under our names goes on as ``given_...``, so that answers can be answered again.
    """
    ours = re.compile("(given_)*(answer|reason|tokens|prompt_tokens)")
    given = {f"given_{key}" if ours.fullmatch(key) else key: value for key, value in row.items()}
    counts = {"tokens": len(answer.tokens), "prompt_tokens": answer.prompt_tokens}
    text = split_thought(answer.text)[1] if hide_thoughts else answer.text
    return {**given, "answer": text, "reason": answer.reason, **counts}


def cut_off(rows: Iterable[JsonRow], sampling: Sampling) -> str:
    """Say how many answers were cut off, and by what; empty where none was."""
    counts = Counter(row["reason"] for row in rows)
    parts = [f"{counts[why]:,} {how.format(sampling)}" for why, how in CUT.items() if counts[why]]
    return f"Cut off: {', '.join(parts)}." if parts else ""


def check_answers_file(o: PromptOptions) -> None:
    """Check that the file can be written, before anything is read that takes long.

    Raises:
        OutputError: It cannot, or something would be lost.
    """
    if o.output in (None, STDIN):
        return
    out, base = Path(str(o.output)), Path(o.checkpoint_dir)
    if not out.parent.is_dir():
        raise OutputError(f"output: {out.parent} is no folder. Make it first.")
    if out.is_dir():
        raise OutputError(f"output: {out} is a folder. Name a file in it, such as answers.jsonl.")
    if o.prompts is not None and out.resolve() == Path(o.prompts).resolve():
        raise OutputError(f"output: {out} holds the prompts. Choose another file.")
    if out.exists() and not o.overwrite:
        raise OutputError(
            f"{out} exists. Choose another file, or add --overwrite (overwrite=True) to replace it."
        )
    if base.resolve() in out.resolve().parents:
        raise OutputError(f"output: {out} is inside the base model {base}. Choose another place.")


class PrintedAnswers:
    """Standard output: answers in the order of the prompts, each as soon as its turn has come."""

    kept = "; their answers are printed above"
    """Where the answers are, after a stop."""

    def __init__(self) -> None:
        self.done: dict[int, JsonRow] = {}
        """By the number of the prompt."""
        self._next = 0

    def __enter__(self) -> "PrintedAnswers":
        return self

    def __exit__(self, *error: object) -> None:
        """Print also those that waited for others, which will not come."""
        put("".join(as_line(self.done[n]) for n in sorted(self.done) if n >= self._next))

    def add(self, number: int, row: JsonRow) -> None:
        """Take the answer to a prompt."""
        self.done[number] = row
        while self._next in self.done:
            self._next += 1
            put(as_line(self.done[self._next - 1]))

    def finish(self) -> str:
        """Return what there is to say at the end."""
        return ""


class AnswersFile:
    """A file: answers lie in OUT.part as they finish, and in OUT, in order, when all are there.

    The first line of OUT.part says what decides on the answers. Another run goes on from them if
    that is the same.
    """

    HEADER = "phi3_generate"

    def __init__(self, out: Path, identity: Mapping[str, Any], *, replace: bool) -> None:
        """Take the file's name, what decides on the answers, and whether it may exist."""
        self.out = out
        self.part = out.with_name(f"{out.name}.part")
        self.identity: JsonRow = json.loads(json.dumps(identity))
        self.replace = replace
        self.done: dict[int, JsonRow] = {}
        """By the number of the prompt."""
        self._file: IO[bytes]

    def __enter__(self) -> "AnswersFile":
        """Read what is there.

        Raises:
            OutputError: It belongs to something else, or the file cannot be written.
        """
        try:
            self._file = self.part.open("a+b")
        except OSError as error:
            raise self._unwritable(error.strerror or str(error)) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise OutputError(f"{self.part} is being written by another process.") from error
        except OSError:
            pass  # a file system without locks
        try:
            self._read()
        except BaseException:
            with suppress(OSError):  # of what it could not write, which is told
                self._file.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Leave nothing where there is no answer."""
        with suppress(OSError):  # what it could not write, it has told before
            self._file.close()
        if not self.done:
            self.part.unlink(missing_ok=True)

    def _read(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a killed process leaves half a line
        header = as_line({self.HEADER: self.identity}).encode()
        try:
            if not whole and not header.startswith(data):
                raise ValueError
            first, *rest = map(json.loads, (whole or header).splitlines())
            theirs = dict(first[self.HEADER])
            self.done = {answer["number"]: answer["row"] for answer in rest}
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{self.part} is in the way and was not written by this command. Move it."
            ) from error
        keys = {**theirs, **self.identity}
        if other := [key for key in keys if theirs.get(key) != self.identity.get(key)]:
            raise OutputError(
                f"{self.part} holds {count(len(self.done), 'answer')} of a run that differs in "
                f"{', '.join(other)}. Repeat that command, or remove the file to start anew."
            )
        self._file.truncate(len(whole))
        if not whole:
            self._write(header)

    def add(self, number: int, row: JsonRow) -> None:
        """Take the answer to a prompt, and keep it on disk.

        Raises:
            OutputError: There is no room.
        """
        self._write(as_line({"number": number, "row": row}).encode())
        self.done[number] = row

    def _write(self, line: bytes) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error.strerror or str(error)) from error

    def finish(self) -> str:
        """Write the file that was asked for, and return what there is to say.

        Raises:
            OutputError: It cannot be written, or is there by now.
        """
        if self.out.exists() and not self.replace:
            raise self._unwritable("it is there by now")
        text = "".join(as_line(self.done[number]) for number in sorted(self.done))
        write_files(self.out.parent, {self.out.name: text}, self._kept())
        self.part.unlink()
        return f"Wrote {count(len(self.done), 'answer')} to {self.out}."

    @property
    def kept(self) -> str:
        """Where the answers are, after a stop."""
        return f"; their answers are in {self.part}. Repeat the command to go on"

    def _kept(self) -> str:
        return f"{self.part} holds {count(len(self.done), 'answer')}." if self.done else ""

    def _unwritable(self, problem: str) -> OutputError:
        return OutputError(f"{self.out} cannot be written: {problem}. {self._kept()}".rstrip())


NEUTRAL = ("prompt", "prompts", "output", "overwrite", "dropped", "batch_size", "device")
"""Options that do not decide on the answers: of the prompts, their content does."""


def identity_of(o: PromptOptions, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return what decides on the answers, so that a run goes on from its own alone."""
    content = sha256()
    for prompt in prompts:
        content.update(as_line(prompt.row).encode())
        content.update(prompt.ids.tobytes())
    options = {key: value for key, value in asdict(o).items() if key not in NEUTRAL}
    weights = {key: _files_hash(options[key]) for key in ("checkpoint_dir", "adapter")}
    return {"prompts": content.hexdigest(), **options, **weights}


def _files_hash(path: Path | None) -> str | None:
    """Return a hash of which files make a model: names, sizes and times tell enough."""
    if path is None:
        return None
    place = path.resolve()
    names = sha256(str(place).encode())
    for file in [place] if place.is_file() else sorted(place.glob("*")):
        if file.is_file():
            status = file.stat()
            names.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return names.hexdigest()
