"""The real mlx-lm, where it is installed: what we write for it, and what it trained."""

import argparse
import importlib
import json
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.mlx import mlx_differs, write_mlx
from phi3_plugin.checkpoint.peft import export_adapter
from phi3_plugin.config import read_config
from phi3_plugin.proof import load_base_with_hf, load_with_peft
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

mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'mlx-lm' 'mlx[cpu]'")

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
PHI4_MINI = tiny_phi4_mini(128, pairs=6)
BASES = {
    "mini": (MINI_4K, TINY_MHA),
    "gqa": (MEDIUM_4K, TINY_GQA),
    "phi-4-mini": (MEDIUM_4K, PHI4_MINI),
}
CLOSE = {"rtol": 0, "atol": 4e-6}
"""What fp32 logits of some 0.5 may differ by where sums are made in another order."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folders = {}
    for name, (published, sizes) in BASES.items():
        folder = tmp_path_factory.mktemp("base") / name
        folders[name] = save_checkpoint(hf_model(published, **sizes), published, folder, **sizes)
    return folders


def in_mlx(base, folder=None):
    from mlx_lm.utils import load_adapters, load_model

    model, _ = load_model(base)
    if folder is not None:
        load_adapters(model, str(folder))
    model.eval()
    return model


def logits(model, tokens):
    import mlx.core as mx
    import numpy as np

    return torch.tensor(np.array(model(mx.array(tokens.numpy()))))


def answer(model, prompt, count):
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(prompt[0].numpy()), model, max_tokens=count)
    return [int(token) for token, _ in steps]


def answer_of_peft(model, prompt, count):
    """Greedy, each token by the whole text: with a cache transformers keeps LongRoPE's old keys."""
    with torch.no_grad():
        for _ in range(count):
            last = model(input_ids=prompt, use_cache=False).logits[:, -1]
            prompt = torch.cat([prompt, last.argmax(-1, keepdim=True)], 1)
    return prompt[0, -count:].tolist()


KINDS = {
    "whole": lambda config: adapter(config, WHOLE),
    "parts": lambda config: adapter(config, PARTS, (4, 8, 2), (3.0, 1.5, 0.37)),
    "dora": lambda config: adapter(config, WHOLE, dora=True),
    "two layers": lambda config: adapter(config, WHOLE, layers=[0, 2]),
    "ends": lambda config: adapter(config, (*WHOLE, "output", "tok_embeddings")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_mlx_computes_what_peft_computes(bases, base, kind, tmp_path):
    base = bases[base]
    config = read_config(base)
    if kind == "ends" and config.tie_word_embeddings:
        pytest.skip("is refused")
    made = KINDS[kind](config)
    for name in ("mlx", "peft"):
        (tmp_path / name).mkdir()
    write_mlx(tmp_path / "mlx", made, base)
    export_adapter(tmp_path / "peft", made, checkpoint_dir=base, card={}, patterns=True)
    peft, mlx = load_with_peft(base, tmp_path / "peft").eval(), in_mlx(base, tmp_path / "mlx")
    torch.manual_seed(0)
    tokens = torch.randint(0, 150, (2, 20))  # LongRoPE is beyond its original length here
    with torch.no_grad():
        theirs = peft(input_ids=tokens, use_cache=False).logits
        base_alone = load_base_with_hf(base)(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(logits(mlx, tokens), theirs, **CLOSE)
    assert (theirs - base_alone).abs().max() > 0.01
    assert answer(mlx, tokens[:1], 24) == answer_of_peft(peft, tokens[:1], 24)


def test_mlx_takes_the_long_factors_whatever_the_length(bases, tmp_path):
    base, tokens = bases["phi-4-mini"], torch.randint(0, 150, (1, 8))
    assert any("LongRoPE's long factors" in line for line in mlx_differs(base))
    always_long = shutil.copytree(base, tmp_path / "long")
    keys = json.loads((base / "config.json").read_text())
    keys["rope_scaling"]["short_factor"] = keys["rope_scaling"]["long_factor"]
    (always_long / "config.json").write_text(json.dumps(keys))
    theirs = logits(in_mlx(base), tokens)
    with torch.no_grad():
        long, short = (
            load_base_with_hf(folder)(input_ids=tokens, use_cache=False).logits
            for folder in (always_long, base)
        )
    torch.testing.assert_close(theirs, long, **CLOSE)
    assert (theirs - short).abs().max() > 1e-3


def test_mlx_has_no_sliding_window(tmp_path):
    sizes = {**TINY_MHA, "sliding_window": 8}
    model = hf_model(MINI_4K, **sizes)
    base = save_checkpoint(model, MINI_4K, tmp_path / "base", **sizes)
    assert any("no sliding window: beyond 8 tokens" in line for line in mlx_differs(base))
    tokens = torch.randint(0, 150, (1, 20))
    theirs = logits(in_mlx(base), tokens)
    with torch.no_grad():
        ours = load_base_with_hf(base)(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(theirs[:, :8], ours[:, :8], **CLOSE)
    assert (theirs - ours)[:, 8:].abs().max() > 1e-3


class Parsed(Exception):
    """The command is spelled right."""


@pytest.mark.parametrize("command", re.findall(r"^mlx_lm\..*$", PAGE.read_text(), re.MULTILINE))
def test_commands_of_the_page_are_spelled_right(command, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(parser):
        parse(parser)
        raise Parsed

    words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    with pytest.raises(Parsed):
        importlib.import_module(words[0]).main()


class Rows:
    """Tokens of a few texts, as `mlx_lm.lora` has them once they are read."""

    def __init__(self):
        torch.manual_seed(2)
        self.rows = torch.randint(0, 150, (4, 12)).tolist()

    def __getitem__(self, index):
        return self.rows[index]

    def __len__(self):
        return len(self.rows)

    def process(self, row):
        return row, 0


TRAINED = {
    "default keys": {"base": "mini"},
    "keys": {"base": "gqa", "keys": ["self_attn.qkv_proj", "lm_head"], "num_layers": 2},
    "embedding": {"base": "gqa", "keys": ["mlp.down_proj", "model.embed_tokens"], "scale": 0.3},
    "dora": {"base": "mini", "fine_tune_type": "dora"},
    "tied embedding": {"base": "phi-4-mini", "keys": ["self_attn.o_proj", "model.embed_tokens"]},
}


@pytest.mark.parametrize("case", some(TRAINED, ["keys", "dora"]))
def test_what_mlx_trained_computes_the_same_in_peft(bases, case, tmp_path):
    from mlx_lm import lora

    keys = dict(TRAINED[case])
    base = bases[keys.pop("base")]
    parameters = {"rank": 4, "dropout": 0.1, "scale": keys.pop("scale", 20.0)}
    parameters |= {"keys": keys.pop("keys")} if "keys" in keys else {}
    own = {"adapter_path": str(tmp_path / "mlx"), "model": str(base), "num_layers": 3, **keys}
    settings = {**lora.CONFIG_DEFAULTS, "iters": 3, "val_batches": 1, "learning_rate": 1e-2, **own}
    args = types.SimpleNamespace(**{**settings, "lora_parameters": parameters})
    lora.train_model(args, in_mlx(base), Rows(), Rows())
    folder, config = tmp_path / "mlx", read_config(base)
    assert "peft_type" not in json.loads((folder / "adapter_config.json").read_text())
    read = read_adapter(folder, config=config, base=base)
    (tmp_path / "peft").mkdir()
    export_adapter(tmp_path / "peft", read, checkpoint_dir=base, card={}, patterns=True)
    tokens = torch.randint(0, 150, (2, 20))
    theirs = logits(in_mlx(base, folder), tokens)
    assert (theirs - logits(in_mlx(base), tokens)).abs().max() > 0.01
    with torch.no_grad():
        peft = load_with_peft(base, tmp_path / "peft").eval()
        ours = peft(input_ids=tokens, use_cache=False).logits
    largest = theirs.abs().max().item()  # as a scale of 20 makes them, up to 4
    torch.testing.assert_close(ours, theirs, rtol=0, atol=max(largest, 1) * CLOSE["atol"])
    (tmp_path / "again").mkdir()
    write_mlx(tmp_path / "again", read, base)
    assert (logits(in_mlx(base, tmp_path / "again"), tokens) == theirs).all()
