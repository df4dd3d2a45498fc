"""Where the answers of `phi3_plugin.recipes.phi3_generate` go: a file, or standard output."""

import fcntl
import json
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from phi3_plugin.recipes.phi3_generate_options import Options

from phi3_plugin.checkpoint.folder import PARTIAL
from phi3_plugin.errors import OutputError

HEADER = "phi3_generate"
"""Key of the first line of a file that is not complete, which says whose answers these are."""

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")

UNWRITABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")

Row = dict[str, Any]


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


def as_line(row: Mapping[str, Any]) -> str:
    """Return a row as JSON that every reader takes for one line, with its end."""
    text = json.dumps(row, ensure_ascii=False)
    return UNWRITABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def check_output(o: Options) -> None:
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
