"""What a chat template writes: Jinja in a sandbox, with a limit on time and memory.

A template comes with a checkpoint, so a stranger wrote it, and Jinja's sandbox keeps it from
everything but time and memory. One whose syntax shows that it takes little of both, as every
published one of the family, runs in this process. Any other runs in a child, which ends when it
takes too much::

    ChatTemplate.write -> write_text -- cheap ------------> _written
                                 `- _Child --pipe--> main -> _written    (this file as a program)

The child needs Jinja and the standard library alone, so it starts in a tenth of a second.
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose files have names of their own

import atexit
import json
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW = datetime.fromisoformat(sys.argv[1]) if __name__ == "__main__" else datetime.now()
"""What templates are told is the time: one for all conversations, since layouts are kept."""

CHUNKS = 1000
CHUNKS_OF_A_MESSAGE = 100
"""A template may write so many pieces, and so many more a message; published ones write a few."""

CHARACTERS = 1_000_000
CHARACTERS_OF_ONE = 20
"""It may write so many characters, and so many more for each that it is given."""

RENDERING_SECONDS = 3
"""Of computing that a child may take for one conversation; more for a long one."""
CHARACTERS_A_SECOND = 2_000_000
MEMORY = 1 << 30
"""Bytes that a child may have."""


class RenderingError(Exception):
    """The template fails, or does not come to an end."""


def write_text(source: str, variables: Mapping[str, Any]) -> str:
    """Return what a template writes.

    Args:
        source: The Jinja text.
        variables: What it is given, JSON values; ``messages`` is a list.

    Raises:
        RenderingError: It fails, or takes too much time or memory.
    """
    return _written(source, variables) if is_cheap(source) else _CHILD.render(source, variables)


def _written(source: str, variables: Mapping[str, Any]) -> str:
    given = sum(map(len, _texts(variables)))
    most = CHUNKS + CHUNKS_OF_A_MESSAGE * len(variables["messages"])
    longest = CHARACTERS + CHARACTERS_OF_ONE * given
    chunks = list[str]()
    try:
        for chunk in _compiled(source).generate(**variables):
            chunks.append(chunk)
            longest -= len(chunk)
            if len(chunks) > most or longest < 0:
                raise RenderingError("it writes without end")
    except MemoryError as error:
        raise RenderingError(f"it takes more than {MEMORY >> 20} MB of memory") from error
    except Exception as error:
        raise RenderingError(str(error)) from error
    return "".join(chunks)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


@lru_cache
def _compiled(source: str) -> jinja2.Template:
    return environment().from_string(source)


BOUNDS = ("text_before_generation", "text_after_generation")
"""Variables that are written around a ``{% generation %}``; nothing where they are not given."""


class _Generation(Extension):
    """``{% generation %}``, by which a template says what the assistant wrote: adds no text."""

    tags = {"generation"}  # noqa: RUF012  (how Jinja asks for it)

    def parse(self, parser: Parser) -> nodes.Node:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        before, after = (nodes.Output([nodes.Name(name, "load")]) for name in BOUNDS)
        return nodes.Scope([before, *body, after])


@lru_cache
def environment() -> ImmutableSandboxedEnvironment:
    """Return what templates are read with.

    Source: transformers 5.23, utils/chat_template_utils.py.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    del environment.globals["lipsum"]  # writes something else each time
    environment.globals.update(raise_exception=_raise_exception, strftime_now=NOW.strftime)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


# What the syntax of a template shows of its cost

LONGEST_CHEAP = 50_000
"""Characters of a template that can be cheap."""

DEEPEST = 40
"""Nodes of its syntax within each other."""

PLAIN = (
    *(nodes.And, nodes.Break, nodes.Compare, nodes.CondExpr, nodes.Const, nodes.Continue),
    *(nodes.Getattr, nodes.Getitem, nodes.If, nodes.Name, nodes.Neg, nodes.Not, nodes.Operand),
    *(nodes.Or, nodes.Output, nodes.Scope, nodes.Slice, nodes.Sub, nodes.Template),
    *(nodes.TemplateData, nodes.Test),
)
"""What takes the time that it takes to read it, and makes nothing larger."""

FILTERS = {"first", "last", "length", "lower", "trim", "upper"}
METHODS = {"endswith", "lower", "lstrip", "rstrip", "split", "startswith", "strip", "upper"}


@lru_cache
def is_cheap(source: str) -> bool:
    """Whether the syntax alone shows that a template takes little time and memory.

    Allowed are conditions, one loop that holds no other, sums of texts that are written, and
    variables; not those that are made of others by ``+``, since twenty of them double a text a
    million times. Nothing that repeats or pads a text, no macros, no function but
    ``raise_exception`` and ``namespace``.
    """
    if len(source) > LONGEST_CHEAP:
        return False
    try:
        return _Cost().is_low(environment().parse(source), DEEPEST)
    except Exception:  # the child will say what is wrong with it
        return False


class _Cost:
    """Walks through the syntax of a template."""

    def __init__(self) -> None:
        self._in_loop = False
        self._sums = set[str]()
        """Variables that are made by ``+``."""

    def is_low(self, node: nodes.Node, depth: int) -> bool:
        """Whether a node, with all in it, is cheap; it may be so deep."""
        if depth == 0:
            return False
        match node:
            case nodes.For():
                if self._in_loop or node.recursive or not self._is_free_of_sums(node.iter):
                    return False
                self._in_loop = True
                low = self._are_low(node, depth)
                self._in_loop = False
                return low
            case nodes.Assign(target=nodes.Name(name=name)) if name != "loop":
                if not self._is_free_of_sums(node.node):
                    self._sums.add(name)
                    names = {inner.name for inner in node.node.find_all(nodes.Name)}
                    if names & self._sums:
                        return False
                return self._are_low(node, depth)
            case nodes.Assign(target=nodes.NSRef()):
                return self._is_free_of_sums(node.node) and self.is_low(node.node, depth - 1)
            case nodes.Filter(name=name, args=[], kwargs=[], dyn_args=None, dyn_kwargs=None):
                return name in FILTERS and node.node is not None and self._are_low(node, depth)
            case nodes.Call(node=nodes.Name(name="raise_exception" | "namespace")):
                return self._are_low(node, depth)
            case nodes.Call(node=nodes.Getattr(attr=name), kwargs=[], dyn_args=None):
                return name in METHODS and self._are_low(node, depth)
            case nodes.Mod(left=nodes.Getattr(node=nodes.Name(name="loop")), right=nodes.Const()):
                return True
            case nodes.Add() | nodes.Concat() | nodes.Keyword():
                return self._are_low(node, depth)
        return isinstance(node, PLAIN) and self._are_low(node, depth)

    def _are_low(self, node: nodes.Node, depth: int) -> bool:
        return all(self.is_low(inner, depth - 1) for inner in node.iter_child_nodes())

    @staticmethod
    def _is_free_of_sums(node: nodes.Node) -> bool:
        sums = (nodes.Add, nodes.Concat)
        return not isinstance(node, sums) and next(node.find_all(sums), None) is None


# The child


class _Child:
    """A process that renders one conversation after the other, and is replaced when it ends."""

    def __init__(self) -> None:
        self.forget()
        os.register_at_fork(after_in_child=self.forget)
        atexit.register(self.end)

    def forget(self) -> None:
        """Begin anew, as in a process that was forked off."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def end(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Render a conversation, as `write_text` does."""
        request = json.dumps([source, variables]).encode() + b"\n"
        with self._lock:
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, __file__, NOW.isoformat()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            process = self._process
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(request)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            except BaseException:  # such as Ctrl-C: its answer would be taken for the next one's
                self.end()
                raise
            if not answer.endswith(b"\n"):
                code = process.wait()
                self.end()
                raise RenderingError(_ending(code))
        text, error = json.loads(answer)
        if error is not None:
            raise RenderingError(error)
        return str(text)


def _ending(code: int) -> str:
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"it computes without end, or for more than {RENDERING_SECONDS} s"
    return f"it takes more than {MEMORY >> 20} MB of memory, or ended with {code}"


_CHILD = _Child()


def main() -> None:
    """Read conversations, a line each, and answer with a line: the text, or what is wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to take; we end with its pipe
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = RENDERING_SECONDS + len(line) // CHARACTERS_A_SECOND
        limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
        source, variables = json.loads(line)
        try:
            answer = json.dumps([_written(source, variables), None])
        except RenderingError as error:
            answer = json.dumps([None, str(error)[:10_000]])
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
