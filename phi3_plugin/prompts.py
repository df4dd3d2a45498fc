"""Prompts in, answers out: what is asked, how, and where the answers go."""

import fcntl
import io
import json
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from phi3_plugin.checkpoint.files import PARTIAL
from phi3_plugin.data.formats import MessageList, Turn, kind, make_turn
from phi3_plugin.data.sources import lines
from phi3_plugin.data.tokenizer import Phi3Tokenizer, warn_of_dropped
from phi3_plugin.errors import ConfigError, DataError, MissingFileError, OutputError
from phi3_plugin.generate import Generator
from phi3_plugin.load import load
from phi3_plugin.models.cache import serve
from phi3_plugin.options import AnswerOptions, PromptOptions, closest

# What `phi3_plugin.recipes.phi3_generate` and `phi3_chat` are asked for, checked.

STDIN = "-"

SPECIAL = re.compile(r"<\|.*\|>")


def check_stop(stop: Sequence[str], tokenizer: Phi3Tokenizer) -> None:
    """Refuse a text that is meant as a special token and is none of this tokenizer's.

    Raises:
        ConfigError: There is one.
    """
    known = tokenizer.special_tokens
    if unknown := [text for text in stop if SPECIAL.fullmatch(text) and text not in known]:
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


def generator(o: AnswerOptions, tokenizer: Phi3Tokenizer, batch_size: int = 1) -> Generator:
    """Load the model that answers."""
    model = load(o.checkpoint_dir, o.adapter, dtype=o.dtype, device=o.device, quantize=o.quantize)
    serve(model)
    return Generator(model, tokenizer, o.sampling, batch_size=batch_size)


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


def too_long(tokens: int, positions: int) -> str:
    """Say that a prompt leaves no room for an answer."""
    return f"{tokens:,} tokens, but the model has {positions:,} positions, answer included"


def listed(problems: Sequence[str], most: int = 10) -> str:
    """Return problems one a line, the first of them where there are many."""
    more = len(problems) - most
    return "\n".join([*problems[:most], *([f"... and {more:,} more."] if more > 0 else [])])


# The prompts of `phi3_plugin.recipes.phi3_generate`: read, checked and tokenized.
#
# Everything that is wrong with a file is said before a model is loaded, line by line.

JSONL, TEXT = (".jsonl", ".ndjson"), (".txt",)

KEYS = ("prompt", "messages")


class Prompt(NamedTuple):
    """What is to be answered."""

    where: str
    """How the user finds it."""
    row: dict[str, Any]
    """What the line of its answer starts with."""
    turns: list[Turn]
    """What was said; without a chat template the text is the only one."""
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
    prompts, problems = list[Prompt](), list[str]()
    dropped = Counter[str]() if o.dropped == "warn" else None
    for where, row in _rows(o):
        try:
            turns = _turns(row, o)
            text = turns[0].content
            ids = tokenizer.encode(text) if o.raw else prompt_ids(tokenizer, turns, dropped)
            if len(ids) >= positions:
                raise DataError(too_long(len(ids), positions))
            prompts.append(Prompt(where, row, turns, array("i", ids)))
        except DataError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise DataError(f"Not every prompt can be answered.\n{listed(problems)}")
    if not prompts:
        raise DataError(f"{_source(o)} holds no prompts.")
    warn_of_dropped(dropped or {})
    return prompts


def _source(o: PromptOptions) -> str:
    return "standard input" if o.prompts == STDIN else str(o.prompts)


def _rows(o: PromptOptions) -> Iterator[tuple[str, Any]]:
    """Yield each row, and where it stands."""
    if o.prompt and o.prompts is not None:
        raise ConfigError("prompt and prompts: both are given. Name a file, or type a prompt.")
    if o.prompt:
        if len(o.prompt) > 1 and not any(" " in text.strip() for text in o.prompt):
            raise ConfigError(
                f"prompt: {len(o.prompt)} prompts of one word. Put a prompt in quotes: "
                f'"{" ".join(o.prompt)}". One-word prompts go into a file, one a line.'
            )
        return ((f"prompt {n}", {"prompt": text}) for n, text in enumerate(o.prompt, 1))
    if o.prompts is None:
        raise ConfigError(
            "prompts is not set. Give a prompt in quotes, a .jsonl or .txt file, or - for standard "
            "input."
        )
    is_jsonl = _is_jsonl(o)
    return _from_text(_read(o), is_jsonl)


def _is_jsonl(o: PromptOptions) -> bool | None:
    """Whether the name says that each line is JSON; None where it does not say."""
    suffix = Path(str(o.prompts)).suffix.lower()
    if o.prompts == STDIN or not suffix:
        return None
    if suffix not in JSONL + TEXT:
        raise ConfigError(
            f"prompts: {o.prompts} must end in .jsonl, with {{prompt}} or {{messages}} in each "
            "line, or in .txt, with one prompt a line."
        )
    return suffix in JSONL


def _read(o: PromptOptions) -> str:
    name = _source(o)
    try:
        data = sys.stdin.buffer.read() if o.prompts == STDIN else Path(str(o.prompts)).read_bytes()
        return data.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise MissingFileError(f"prompts: {name} is not there.") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name} is not UTF-8 (line {line}). Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}.") from error


def _from_text(text: str, is_jsonl: bool | None) -> Iterator[tuple[str, Any]]:
    stream = io.StringIO(text, newline=None)  # \r\n and \r end lines too
    if is_jsonl or (is_jsonl is None and _looks_like_json(text)):
        yield from ((f"line {n}", row) for n, row in lines(stream))
        return
    # Empty lines at the end are no prompts; those between others are mistakes, and told as such
    for n, line in enumerate(stream.read().rstrip().split("\n") if text.strip() else [], 1):
        yield f"line {n}", {"prompt": line}


def _looks_like_json(text: str) -> bool:
    first = text.lstrip().partition("\n")[0]
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _turns(row: Any, o: PromptOptions) -> list[Turn]:
    """Return what the model is to answer: the conversation, or the text alone."""
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"{kind(row)}, expected an object with prompt or messages")
    key = _key(row)
    if isinstance(row[key], str) and key == "prompt":
        if not row[key].strip():
            raise DataError("the prompt is empty")
        turns = [make_turn("user", row[key])]
    elif key == "prompt" and not isinstance(row[key], list):
        raise DataError(f"prompt is {kind(row[key])}, expected a text")
    elif o.raw:
        raise DataError(f"{key} is {kind(row[key])}; without a chat template, prompt is a text")
    else:
        turns = _without_reference(MessageList(key, "role").read(row))
    if o.system and not any(turn.role == "system" for turn in turns):
        turns.insert(0, make_turn("system", o.system))
    return turns


def _key(row: Mapping[str, Any]) -> str:
    found = [key for key in KEYS if row.get(key) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError("there are prompt and messages; remove one")
    meant = [(name, close) for name in row if (close := closest(str(name), KEYS))]
    said = "; did you mean {1!r} by {0!r}?".format(*meant[0]) if meant else ""
    raise DataError(f"there is neither prompt nor messages{said}")


def _without_reference(turns: list[Turn]) -> list[Turn]:
    """Leave out what the assistant says at the end, which is what the answer is compared with."""
    asked = turns[:-1] if turns[-1].role == "assistant" else turns
    if not any(turn.content.strip() for turn in asked if turn.role != "system"):
        raise DataError("nothing is said that could be answered")
    return asked


# Where the answers of `phi3_plugin.recipes.phi3_generate` go: a file, or standard output.

HEADER = "phi3_generate"
"""Key of the first line of a file that is not complete, which says whose answers these are."""

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")

UNWRITABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")

Row = dict[str, Any]


CUT = {
    "length": "at {0.max_new_tokens} tokens (max_new_tokens)",
    "time": "after {0.max_time} seconds (max_time)",
    "context": "at the last of the model's positions",
}
"""What cut an answer off, by its reason."""


def safe(text: str) -> str:
    """Return text without what drives a terminal: control characters and turns of direction."""
    return UNSAFE.sub("", text)


def open_streams() -> None:
    """Let standard input and error be empty where they are closed, which Python has as None."""
    sys.stdin = sys.stdin or Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def set_stdout(**how: str) -> None:
    """Set how answers are written to standard output.

    Raises:
        OutputError: It is closed.
    """
    if sys.stdout is None:
        raise OutputError("standard output is closed: there is nowhere to write answers to.")
    sys.stdout.reconfigure(**how)  # type: ignore[union-attr]


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


def writer() -> Callable[[str], None]:
    """Return what prints a piece of text at once; to a terminal, nothing that could drive it."""
    if sys.stdout.isatty():
        return lambda piece: put(safe(piece))
    return put


def as_line(row: Mapping[str, Any]) -> str:
    """Return a row as JSON that every reader takes for one line, with its end."""
    text = json.dumps(row, ensure_ascii=False)
    return UNWRITABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def check_output(o: PromptOptions) -> None:
    """Check that the file can be written, before anything is read that takes long.

    Raises:
        OutputError: It cannot, or something would be lost.
    """
    if o.output is None:
        return
    out, base = Path(o.output), Path(o.checkpoint_dir)
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


def answers_of(count: int) -> str:
    """Return a number of answers."""
    return f"{count:,} answer{'s' * (count != 1)}"


class Printed:
    """Standard output: answers in the order of the prompts, each as soon as its turn has come."""

    def __init__(self) -> None:
        self.done: dict[int, Row] = {}
        self._next = 0

    def __enter__(self) -> "Printed":
        return self

    def __exit__(self, *error: object) -> None:
        """Print also those that waited for others, which will not come."""
        put("".join(as_line(self.done[n]) for n in sorted(self.done) if n >= self._next))

    def add(self, number: int, row: Row) -> None:
        """Take the answer to a prompt."""
        self.done[number] = row
        while self._next in self.done:
            self._next += 1
            put(as_line(self.done[self._next - 1]))

    def finish(self) -> str:
        """Return what there is to say at the end."""
        return ""

    @property
    def kept(self) -> str:
        """Where the answers are, after a stop."""
        return "; their answers are printed above"


class Part:
    """A file: answers lie in OUT.part as they finish, and in OUT, in order, when all are there."""

    def __init__(self, out: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
        """Take what decides on the answers: another run goes on from them if it is the same."""
        self.out, self.identity, self.overwrite = out, dict(identity), overwrite
        self.part = out.with_name(f"{out.name}.part")
        self.done: dict[int, Row] = {}
        self._file: IO[bytes]

    def __enter__(self) -> "Part":
        """Read what is there.

        Raises:
            OutputError: It belongs to something else, or the file cannot be written.
        """
        try:
            self._file = self.part.open("a+b")
        except OSError as error:
            raise self._failed(error) from error
        try:
            self._lock()
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

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{self.part} is being written by another process.") from error
        except OSError:
            pass  # a file system without locks

    def _read(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a killed process leaves half a line
        try:
            found = [json.loads(line) for line in whole.splitlines()]
            theirs = dict(found[0][HEADER]) if found else self._unstarted(data)
            self.done = {answer["number"]: answer["row"] for answer in found[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{self.part} is in the way and was not written by this command. Move it."
            ) from error
        keys = {**theirs, **self.identity}
        if other := [key for key in keys if theirs.get(key) != self.identity.get(key)]:
            raise OutputError(
                f"{self.part} holds {answers_of(len(self.done))} of a run that differs in "
                f"{', '.join(other)}. Repeat that command, or remove the file to start anew."
            )
        self._file.truncate(len(whole))
        if not found:
            self._write({HEADER: self.identity})

    def _unstarted(self, data: bytes) -> Mapping[str, Any]:
        """Return our own identity for a file that has nothing, or the start of our first line."""
        if not as_line({HEADER: self.identity}).encode().startswith(data):
            raise ValueError
        return self.identity

    def add(self, number: int, row: Row) -> None:
        """Take the answer to a prompt, and keep it on disk.

        Raises:
            OutputError: There is no room.
        """
        self._write({"number": number, "row": row})
        self.done[number] = row

    def _write(self, line: Row) -> None:
        try:
            self._file.write(as_line(line).encode())
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def finish(self) -> str:
        """Write the file that was asked for, and return what there is to say.

        Raises:
            OutputError: It cannot be written, or is there by now.
        """
        whole = self.out.with_name(f"{PARTIAL}{self.out.name}")
        try:
            with whole.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(as_line(self.done[number]) for number in sorted(self.done))
                file.flush()
                os.fsync(file.fileno())
            if self.out.exists() and not self.overwrite:
                raise FileExistsError(0, "it is there by now")
            whole.replace(self.out)
            self.part.unlink()
        except OSError as error:
            whole.unlink(missing_ok=True)
            raise self._failed(error) from error
        return f"Wrote {answers_of(len(self.done))} to {self.out}."

    def _failed(self, error: OSError) -> OutputError:
        kept = f" {self.part} holds {answers_of(len(self.done))}." if self.done else ""
        return OutputError(f"{self.out} cannot be written: {error.strerror or error}.{kept}")

    @property
    def kept(self) -> str:
        """Where the answers are, after a stop."""
        return f"; their answers are in {self.part}. Repeat the command to go on"
