"""Models and adapters in onnxruntime-genai, made by its own model builder."""

import sys
import tempfile
from pathlib import Path

import onnxruntime_genai as og
from jobs import Answer, answer

sys.path.insert(0, str(Path(og.__file__).parent / "models"))
from builder import create_model, parse_extra_options


def run(job: dict) -> Answer:
    """Build the model of base and adapter, and choose, with its cache."""
    with tempfile.TemporaryDirectory() as folder:
        model = job["model"]
        if not list(Path(model).glob("*.onnx")):
            given = ["windowed_kv_cache=false"]  # as phi3_plugin/checkpoint/onnx.py tells it
            given += [f"adapter_path={job['adapter']}"] if job["adapter"] else []
            told = ("", model, folder, job["type"], "cpu", f"{folder}/cache")
            create_model(*told, **parse_extra_options(*told, given))
            model = folder
        loaded = og.Model(model)
        settings = og.GeneratorParams(loaded)
        settings.set_search_options(
            do_sample=False, max_length=len(job["prompt"]) + job["steps"], min_length=0
        )
        generator = og.Generator(loaded, settings)
        generator.append_tokens(job["prompt"])
        tokens, rows = [], []
        for step in range(job["steps"]):
            rows.append(generator.get_logits()[0, -1].tolist())
            tokens.append(max(range(len(rows[-1])), key=rows[-1].__getitem__))
            if step + 1 < job["steps"]:
                generator.append_tokens(tokens[-1:])
        return tokens, rows


answer(run)
