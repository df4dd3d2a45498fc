"""The checkpoints of a run: folders that serve, and that training goes on from.

output_dir/
  step_000120/  best/  final/     each a PEFT adapter (or a model), and
    resume/state.pt               trained tensors, optimizer, schedule, random numbers, …
    resume/hashes.json            of what a resume reads, written last
"""

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from phi3_plugin.checkpoint.files import (
    PARTIAL,
    read_state,
    restore,
    sweep,
    whole_folder,
    write_state,
)
from phi3_plugin.config import read_json_object
from phi3_plugin.errors import CheckpointError, MissingFileError, OutputError, Phi3Error

BEST, FINAL = "best", "final"
STATE, HASHES = "resume/state.pt", "resume/hashes.json"
_STEP = re.compile(r"step_(\d+)")

Exporter = Callable[[Path], None]
"""Writes what serves into the folder that it is given."""


class LastCheckpoint(NamedTuple):
    """Where a run can go on."""

    folder: Path | None
    """The newest whole checkpoint; None starts anew."""
    passed_over: dict[Path, str]
    """Newer ones that are not whole, and why; they stay as they are."""


def step_name(step: int) -> str:
    """Return the name of the folder saved after this many steps."""
    return f"step_{step:06d}"


def save(
    folder: Path, step: int, export: Exporter, state: dict[str, Any], *, replace: bool
) -> None:
    """Write one checkpoint, whole or not at all.

    Args:
        folder: Of the checkpoint, in that of the run.
        step: Optimizer steps made.
        export: Writes what serves.
        state: What training goes on from.
        replace: Whether the folder may exist; it is removed once the new one is in its place.

    Raises:
        OutputError: The folder cannot be written; earlier checkpoints are untouched.
    """
    sweep(folder.parent)
    with whole_folder(folder, replace=replace) as partial:
        export(partial)
        (partial / "resume").mkdir()
        write_state(partial / STATE, {**state, "step": step})
        # Of an adapter the state has all; the files that serve are the user's, to edit the card of.
        weights = [] if "adapter" in state else sorted(partial.glob("*.safetensors*"))
        files = [partial / STATE, *weights]
        hashes = {file.relative_to(partial).as_posix(): _hash(file) for file in files}
        text = json.dumps({"step": step, "files": hashes}, indent=1)
        (partial / HASHES).write_text(text, encoding="utf-8")


RUN_STATE: Mapping[str, Any] = {
    "step": int,
    "optimizer": {"kind": str, "state": dict},
    "random": list,
    "train": {
        **{"step": int, "best": float, "stale": int, "validated": int},
        **{"answers_before": dict, "changes": list},
    },
    "data": dict,
    "held_out": object,
    "base_hash": str,
    "settings": {"model": dict},
}
"""What the state of a run has, and of which kind; a dictionary may have more, as fp16 and
distillation do: runs from before these are gone on with."""


def load_state(folder: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Read what training goes on from.

    Args:
        folder: Of the checkpoint.
        kinds: What must be there, as in `RUN_STATE`.

    Raises:
        CheckpointError: The file holds more than tensors and plain values, is damaged, or lacks a
            key or has one of another kind; all are listed.
    """
    state = read_state(folder / STATE)
    if problems := list(_wrong_kinds(state, kinds)):
        listed = "\n  ".join(problems)
        raise CheckpointError(f"{folder / STATE} is no state of a run:\n  {listed}\n{ADVICE}")
    return state


ADVICE = "Resume from another checkpoint; what serves of this one may still be whole."


def _wrong_kinds(state: Mapping[str, Any], kinds: Mapping[str, Any]) -> Iterator[str]:
    for key, kind in kinds.items():
        expected = dict if isinstance(kind, Mapping) else kind
        if key not in state:
            yield f"{key}: is missing"
        elif not isinstance(state[key], expected):
            yield f"{key}: is a {type(state[key]).__name__}, expected {expected.__name__}"
        elif isinstance(kind, Mapping):
            yield from (f"{key}.{problem}" for problem in _wrong_kinds(state[key], kind))


@contextmanager
def going_on(folder: Path | None) -> Iterator[None]:
    """Name the file where its state has another form than `load_state` looks at.

    Raises:
        CheckpointError: Taking the state failed.
    """
    try:
        yield
    except (Phi3Error, torch.OutOfMemoryError):
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if folder is None:
            raise
        raise CheckpointError(
            f"{folder / STATE} is no state of a run: {type(error).__name__}: {error}. {ADVICE}"
        ) from error


def problem_of(folder: Path) -> str | None:
    """Say why a folder is not a whole checkpoint, or return None if it is one."""
    try:
        files = read_json_object(folder / HASHES, CheckpointError).get("files")
    except CheckpointError:
        files = None
    if not isinstance(files, dict):
        return f"{HASHES} is missing or damaged"
    if STATE not in files:
        return f"{HASHES} does not name {STATE}"
    for path, digest in files.items():
        if not (folder / path).is_file():
            return f"{path} is missing"
        if _hash(folder / path) != digest:
            return f"{path} has changed since it was written"
    return None


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find(output_dir: Path, resume: str) -> LastCheckpoint:
    """Find the checkpoint that a run goes on from.

    Args:
        output_dir: Folder of the run.
        resume: ``never``, ``auto`` for the newest whole one, or a folder.

    Raises:
        CheckpointError: The folder that was named is not whole.
        MissingFileError: There is no such folder.
        OutputError: The output folder holds checkpoints that the run would get mixed up with.
    """
    restore(output_dir)
    if resume == "never":
        _refuse_other_run(output_dir)
        return LastCheckpoint(None, {})
    if resume != "auto":
        folder = Path(resume)
        if not folder.is_dir():
            raise MissingFileError(
                f"resume: {folder} is not a folder. Use auto, never or a folder."
            )
        if problem := problem_of(folder):
            raise CheckpointError(f"resume: {folder} cannot be resumed from: {problem}.")
        _refuse_newer(output_dir, folder)
        return LastCheckpoint(folder, {})
    passed_over: dict[Path, str] = {}
    for folder in _newest_first(output_dir):
        problem = problem_of(folder)
        if problem is None:
            return LastCheckpoint(folder, passed_over)
        passed_over[folder] = problem
    return LastCheckpoint(None, passed_over)


def _newest_first(output_dir: Path) -> list[Path]:
    names = [p for p in output_dir.glob("*") if _STEP.fullmatch(p.name) or p.name in (BEST, FINAL)]
    return sorted(names, key=lambda p: (_step_of(p), p.name == FINAL, p.name), reverse=True)


def _step_of(folder: Path) -> int:
    if match := _STEP.fullmatch(folder.name):
        return int(match.group(1))
    try:
        step = read_json_object(folder / HASHES, CheckpointError).get("step")
    except CheckpointError:
        return -1
    return step if isinstance(step, int) else -1


def _refuse_other_run(output_dir: Path) -> None:
    if names := [path.name for path in _newest_first(output_dir)]:
        raise OutputError(
            f"output_dir: {output_dir} holds the checkpoints of another run ({', '.join(names)}). "
            "Choose another folder, or continue that run with resume=auto."
        )


def _refuse_newer(output_dir: Path, folder: Path) -> None:
    """Refuse to go on from the past of a run, or from another run's, among its checkpoints."""
    if folder.resolve().parent != output_dir.resolve():
        return _refuse_other_run(output_dir)
    newer = [path.name for path in _newest_first(output_dir) if _step_of(path) > _step_of(folder)]
    if newer:
        raise OutputError(
            f"resume: {folder} is older than {', '.join(newer)} beside it, and the next "
            "resume=auto would take those. Move them away, or set another output_dir."
        )


def prune(output_dir: Path, limit: int | None, keep: Collection[Path] = ()) -> None:
    """Remove the oldest step folders beyond the limit; best and final do not count.

    Args:
        output_dir: Folder of the run.
        limit: How many to keep; None keeps all.
        keep: Folders that are neither counted nor removed.
    """
    if limit is None:
        return
    folders = [p for p in output_dir.glob("step_*") if _STEP.fullmatch(p.name) and p not in keep]
    steps = sorted(folders, key=_step_of)
    for folder in steps[: max(0, len(steps) - limit)]:
        # Renamed first: a kill in between must not leave half a folder under its name.
        shutil.rmtree(folder.rename(folder.with_name(f"{PARTIAL}{folder.name}")))


class Saver:
    """Writes a run's checkpoints one after the other, while training waits or goes on."""

    def __init__(
        self,
        output_dir: Path,
        limit: int | None,
        saved: Callable[[str, int], None],
        *,
        passed_over: Iterable[Path] = (),
        background: bool,
    ) -> None:
        """Start nothing yet.

        Args:
            output_dir: Folder of the run.
            limit: Step folders to keep; None keeps all.
            saved: Told name and step of each checkpoint that is whole, in the caller's thread.
            passed_over: Checkpoints that the run did not go on from. They may hold what somebody
                wants back, so one whose name is needed is given another.
            background: Return from :meth:`save` while the folder is being written.
        """
        self._output_dir = output_dir
        self._limit = limit
        self._saved = saved
        self._passed_over = set(passed_over)
        self._pool = ThreadPoolExecutor(1) if background else None
        self._writing: tuple[Future[None], str, int] | None = None

    def save(self, name: str, step: int, export: Exporter, state: dict[str, Any]) -> None:
        """Write a checkpoint, in place of an earlier one of that name, and prune.

        Args:
            name: Of its folder.
            step: Optimizer steps made.
            export: Writes what serves.
            state: What training goes on from. Like the tensors of ``export`` it must be a copy,
                since training may go on before it is written.

        Raises:
            OutputError: This one or, in the background, the one before it cannot be written.
        """
        self.wait()
        if self._pool is None:
            self._write(name, step, export, state)
            self._saved(name, step)
        else:
            self._writing = self._pool.submit(self._write, name, step, export, state), name, step

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            OutputError: The last checkpoint could not be written.
        """
        if self._writing:
            job, name, step = self._writing
            self._writing = None
            job.result()
            self._saved(name, step)

    def _write(self, name: str, step: int, export: Exporter, state: dict[str, Any]) -> None:
        folder = self._output_dir / name
        if folder in self._passed_over:
            _set_aside(folder)
            self._passed_over.remove(folder)
        save(folder, step, export, state, replace=True)
        prune(self._output_dir, self._limit, self._passed_over)


def _set_aside(folder: Path) -> None:
    """Rename ``final`` to ``final.passed-over``, or ``final.passed-over-2`` and so on."""
    names = (f"{folder.name}.passed-over{f'-{n}' if n > 1 else ''}" for n in itertools.count(1))
    folder.rename(next(p for p in map(folder.with_name, names) if not p.exists()))
