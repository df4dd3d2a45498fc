"""Models and adapters in llama.cpp; folders become GGUF files by its own converters first.

Where the weights are to be rounded, its library does that, as llama-quantize calls it.
"""

import ctypes
import hashlib
import json
import logging
import os
import platform
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from jobs import Answer, answer

PLACE = Path(os.environ["LLAMA_CPP"])
"""With node_modules, and the sources of the same release."""

sys.path[:0] = [str(PLACE / "source" / "gguf-py"), str(PLACE / "source")]


class Errors(logging.Handler):
    """What the converters say before they end."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.last = record.getMessage()


errors = Errors(logging.ERROR)
logging.getLogger().addHandler(errors)


def converted(folder: str, script: str, *arguments: str) -> str:
    """Return the GGUF file of a folder, made by a script of llama.cpp's if it is not there."""
    words = [script, folder, *arguments, "--outtype", "f32"]
    name = hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]
    file = Path(sys.argv[2]).absolute().parent / f"{name}.gguf"
    if not file.exists():
        partial = file.with_suffix(".partial")
        sys_argv, sys.argv = sys.argv, [*words, "--outfile", str(partial)]
        try:
            runpy.run_path(str(PLACE / "source" / script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{script}: {errors.last or end.code}") from end
        finally:
            sys.argv = sys_argv
        partial.rename(file)
    return str(file)


class Quantization(ctypes.Structure):
    """What is told to llama_model_quantize: ``llama_model_quantize_params`` of llama.h."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("file_type", ctypes.c_int),
        ("head_type", ctypes.c_int),
        ("embedding_type", ctypes.c_int),
        ("flags", ctypes.c_bool * 6),
        ("pointers", ctypes.c_void_p * 4),
        ("most_bytes", ctypes.c_size_t),
    )


FILE_TYPES = {"q8_0": 7, "q4_0": 2}
HEAD_Q8_0 = 8
"""The head of both; llama-quantize is told so by ``--output-tensor-type q8_0``."""


def quantized(file: str, kind: str) -> str:
    """Return a file of weights of fp32 with those of another type, made if it is not there."""
    out = Path(file).with_suffix(f".{kind}.gguf")
    if not out.exists():
        machine = {"x86_64": "x64", "aarch64": "arm64"}[platform.machine()]
        place = PLACE / "node_modules" / "@node-llama-cpp" / f"linux-{machine}" / "bins"
        for name in ("libggml-base.so*", "libggml.*", "libllama.*"):
            (path,) = place.glob(f"linux-{machine}/{name}")
            library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        library.llama_model_quantize_default_params.restype = Quantization
        told = library.llama_model_quantize_default_params()
        told.threads, told.file_type, told.head_type = 1, FILE_TYPES[kind], HEAD_Q8_0
        if library.llama_model_quantize(file.encode(), str(out).encode(), ctypes.byref(told)):
            raise RuntimeError(f"llama_model_quantize makes no {kind}")
    return str(out)


def run(job: dict) -> Answer:
    """Convert what is no GGUF file yet, then load and choose in a process of its own."""
    model, adapter = job["model"], job["adapter"]
    if adapter and not adapter.endswith(".gguf"):
        adapter = converted(adapter, "convert_lora_to_gguf.py", "--base", model)
    if not model.endswith(".gguf"):
        model = converted(model, "convert_hf_to_gguf.py")
        model = quantized(model, job["type"]) if job["type"] in FILE_TYPES else model
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "job.json"), Path(folder, "answer.json")]
        files[0].write_text(json.dumps({**job, "model": model, "adapter": adapter}))
        command = ["node", Path(__file__).with_name("in_llama_cpp.mjs"), *files]
        done = subprocess.run(command, cwd=PLACE, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.splitlines()
            lines = [line for line in said if "rror" in line or "ASSERT" in line]
            raise RuntimeError((lines or [f"ends with {done.returncode}"])[0].strip())
        found = json.loads(files[1].read_text())
    return found["tokens"], found["logits"]


answer(run)
