"""The real onnxruntime-genai and its builder, where they are installed, beside PEFT."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from phi3_plugin.recipes.phi3_demo_checkpoint import build_checkpoint

from phi3_plugin.checkpoint.onnx import ONNX_PACKAGES, merge_onnx, onnx_differs, write_onnx
from phi3_plugin.checkpoint.peft import TOKENIZER_FILES, export_adapter
from phi3_plugin.config import read_config
from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.proof import load_with_peft
from tests.adapters import PARTS, WHOLE, adapter
from tests.chosen import some
from tests.oracles import (
    MEDIUM_4K,
    MINI_4K,
    TINY_GQA,
    TINY_MHA,
    hf_model,
    save_checkpoint,
    tiny_phi4_mini,
)

for package in ONNX_PACKAGES:
    pytest.importorskip(package, reason=f"needs {ONNX_PACKAGES[package]}")

SIZES = {"vocab_size": 416, "eos_token_id": 357, "pad_token_id": 357, "torch_dtype": "float32"}
"""The builder takes any layer with as many rows as the vocabulary for the head."""
PHI4_MINI = tiny_phi4_mini(512, pairs=24)  # its kernels turn multiples of eight pairs
BASES = {
    "mini": (MINI_4K, {**TINY_MHA, "hidden_size": 128}),
    "gqa": (MEDIUM_4K, {**TINY_GQA, "hidden_size": 256}),
    "phi-4-mini": (MEDIUM_4K, PHI4_MINI),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    place, folders = tmp_path_factory.mktemp("base"), {}
    build_checkpoint(place / "tokenizer", words=["one"])
    for name, (published, sizes) in BASES.items():
        sizes = {**sizes, **SIZES}
        base = save_checkpoint(hf_model(published, **sizes), published, place / name, **sizes)
        for file in {*TOKENIZER_FILES} - {"config.json"}:
            if (place / "tokenizer" / file).is_file():
                shutil.copy(place / "tokenizer" / file, base / file)
        folders[name] = base
    return folders


def served(model, prompt, count):
    """Return logits of a prompt, ``[S, V]``, and the tokens that follow it."""
    import onnxruntime_genai as og

    model = og.Model(str(model))
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = og.Generator(model, settings)
    generator.append_tokens(np.array(prompt, dtype=np.int32))
    logits, tokens = torch.tensor(np.array(generator.get_output("logits")))[0], []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return logits, tokens


def of_peft(base, adapter, prompt, count):
    """The same in PEFT; as long as the prompt is, each token by the whole text."""
    model, text = load_with_peft(base, adapter).eval(), torch.tensor([prompt])
    with torch.no_grad():
        logits = model(input_ids=text, use_cache=False).logits[0]
        for _ in range(count):
            last = model(input_ids=text, use_cache=False).logits[:, -1]
            text = torch.cat([text, last.argmax(-1, keepdim=True)], 1)
    return logits, text[0, len(prompt) :].tolist()


def write(merged, out, base, made, kind):
    if merged:
        merge_onnx(out, base, made, kind)
    else:
        write_onnx(out, base, kind, made)


def folder(path):
    path.mkdir()
    return path


def prompt(length):
    torch.manual_seed(length)
    return torch.randint(3, 300, (length,)).tolist()


KINDS = {
    "whole": lambda config: adapter(config, WHOLE),
    "parts": lambda config: adapter(config, PARTS, (4, 8, 2), (3.0, 1.5, 0.37)),
    "dora": lambda config: adapter(config, WHOLE, dora=True),
    "ends": lambda config: adapter(config, (*WHOLE, "output", "tok_embeddings")),
}
CASES = [
    *(("mini", kind, False) for kind in ("whole", "parts")),
    *(("gqa", kind, True) for kind in KINDS),
    *(("phi-4-mini", kind, merged) for kind, merged in (("whole", False), ("ends", True))),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "kind", "merged"), some(CASES, ["mini-parts-False", "phi-4-mini-ends-True"])
)
def test_onnx_runtime_computes_what_peft_computes(bases, base, kind, merged, tmp_path):
    base = bases[base]
    made = KINDS[kind](read_config(base))
    export_adapter(folder(tmp_path / "peft"), made, checkpoint_dir=base, card={}, patterns=True)
    write(merged, tmp_path / "onnx", base, made, "fp32")
    for length in (5, 20):  # of LongRoPE's 16
        with warnings.catch_warnings(action="ignore"):  # PEFT's, at tied heads
            logits, tokens = of_peft(base, tmp_path / "peft", prompt(length), 10)
        theirs, answer = served(tmp_path / "onnx", prompt(length), 10)
        close = 1e-5 * max(logits.abs().max().item(), 1)
        torch.testing.assert_close(theirs, logits, rtol=0, atol=close)
        assert answer == tokens[: len(answer)] and answer


@pytest.mark.slow
def test_it_goes_beyond_the_sliding_window_without_one(bases, tmp_path):
    base, keys = shutil.copytree(bases["mini"], tmp_path / "base"), {"sliding_window": 8}
    written = {**json.loads((base / "config.json").read_text()), **keys}
    (base / "config.json").write_text(json.dumps(written))
    assert "beyond 8 tokens it attends to more" in next(onnx_differs(base))
    made = adapter(read_config(base), WHOLE)
    merge_onnx(tmp_path / "onnx", base, made, "fp32")
    export_adapter(folder(tmp_path / "peft"), made, checkpoint_dir=base, card={})
    whole, answer = of_peft(bases["mini"], tmp_path / "peft", prompt(20), 20)
    logits, tokens = served(tmp_path / "onnx", prompt(20), 20)
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5 * whole.abs().max().item())
    assert tokens == answer
    windowed, _ = of_peft(base, tmp_path / "peft", prompt(20), 1)
    torch.testing.assert_close(logits[:8], windowed[:8], rtol=0, atol=1e-4)
    assert (logits - windowed).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_four_bits_are_near(bases, merged, tmp_path):
    base = bases["gqa"]
    made = adapter(read_config(base), WHOLE)
    export_adapter(folder(tmp_path / "peft"), made, checkpoint_dir=base, card={}, patterns=True)
    write(merged, tmp_path / "onnx", base, made, "int4")
    logits, _ = of_peft(base, tmp_path / "peft", prompt(20), 1)
    theirs, _ = served(tmp_path / "onnx", prompt(20), 1)
    assert torch.nn.functional.cosine_similarity(theirs, logits, dim=-1).mean() > 0.9
    words = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert words["model"]["eos_token_id"] == [357, 358, 364]


@pytest.mark.slow
def test_its_tokenizer_has_the_same_ids(bases, tmp_path):
    import onnxruntime_genai as og

    base = bases["mini"]
    write_onnx(tmp_path / "onnx", base, "fp32", adapter(read_config(base), WHOLE))
    tokenizer = og.Tokenizer(og.Model(str(tmp_path / "onnx")))
    text = "<|user|>\none and two?<|end|>\n<|assistant|>\n"
    ours = phi3_tokenizer(base).encode(text, add_bos=False, add_eos=False)
    assert tokenizer.encode(text).tolist() == ours
