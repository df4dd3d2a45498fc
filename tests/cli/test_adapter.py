"""The verbs for adapters, as command and as recipe, on adapters that PEFT wrote."""

import importlib.util
import json
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from phi3_plugin.recipes.phi3_demo_checkpoint import build_checkpoint
from safetensors.torch import load_file, save_file

from phi3_plugin import cli
from phi3_plugin.checkpoint.adapter import pattern_content
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError, ConfigError, MissingFileError, OutputError, Phi3Error
from phi3_plugin.options import RUNTIMES
from phi3_plugin.proof import load_base_with_hf, load_with_peft
from tests.commands import adapter as run
from tests.oracles import MEDIUM_4K, MINI_4K, TINY_GQA, hf_logits, hf_model, save_checkpoint

FOUR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"qkv_proj": 20}},
    "head and embedding": {"target_modules": [*FOUR, "lm_head", "embed_tokens"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base and one adapter of each kind, random in every value."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapters")
    hf = hf_model(MEDIUM_4K, **TINY_GQA)
    save_checkpoint(hf, MEDIUM_4K, folder / "base", **TINY_GQA)
    for name, keys in KINDS.items():
        keys = {"r": 4, "lora_alpha": 8, "target_modules": FOUR, "task_type": "CAUSAL_LM", **keys}
        torch.manual_seed(len(name))
        model = get_peft_model(deepcopy(hf), LoraConfig(**keys))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
    return folder


def options(place, verb, adapter, **keys):
    return {"verb": verb, "adapter": str(place / adapter), **keys}


def base(place):
    return {"checkpoint_dir": str(place / "base")}


def batch():
    return torch.randint(0, 150, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
def test_check_proves_what_peft_loads(place, capsys, kind):
    assert run(options(place, "check", kind, json=True, **base(place))) == 0
    report = json.loads(capsys.readouterr().out)
    proof = report["proof"]
    assert proof["difference"] < 1e-5 < 0.1 < proof["effect"]
    assert [verdict["runtime"] for verdict in report["verdicts"]] == list(RUNTIMES)


def test_check_says_it_in_words(place, capsys):
    assert run(options(place, "check", "rslora", **base(place))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PEFT       loads       PeftModel.from_pretrained(base, ")
    assert lines[1].startswith("vLLM       loads       --enable-lora --max-lora-rank 8 ")
    assert lines[2].startswith("llama.cpp  mis-scaled ")
    assert "would count 0.5 times" in lines[3]
    assert lines[-1].startswith("Proof: logits in PEFT and here differ by ")


def test_check_fails_for_a_runtime_that_misreads(place):
    assert run(options(place, "check", "rslora", runtime=["vLLM", "PEFT"])) == 0
    assert run(options(place, "check", "rslora", runtime=["llama.cpp"])) == 1
    assert run(options(place, "check", "dora", runtime=["vLLM"])) == 1


def test_check_fails_where_the_adapter_is_broken(place, tmp_path, capsys):
    folder = altered(place, tmp_path, lambda tensors: tensors.popitem())
    assert run({"verb": "check", "adapter": str(folder), **base(place)}) == 1
    out = capsys.readouterr().out
    assert "A or B is missing" in out and "Proof" not in out


def test_check_fails_where_logits_differ(place, monkeypatch, capsys):
    from phi3_plugin import proof

    own = proof.logits
    monkeypatch.setattr(proof, "logits", lambda *args: own(*args) * 1.01)
    assert run(options(place, "check", "plain", **base(place))) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("Proof failed: logits in PEFT")


def test_an_adapter_that_does_nothing_proves_nothing(place, tmp_path, capsys):
    folder = altered(place, tmp_path, lambda tensors: [t.zero_() for t in tensors.values()])
    assert run({"verb": "check", "adapter": str(folder), **base(place)}) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("No proof: logits in PEFT and here")
    keys = {"verb": "check", "adapter": str(place / "plain"), "dtype": "bf16", **base(place)}
    assert run({**keys, "json": True}) == 0
    assert json.loads(capsys.readouterr().out)["proof"]["effect"] > 0


def without_some(tensors):
    """Leave out both halves of a pair, of which only PEFT knows that they are missing."""
    for name in [name for name in tensors if "layers.1.mlp.down_proj" in name]:
        del tensors[name]


def test_check_fails_where_peft_itself_does(place, tmp_path, capsys, monkeypatch):
    folder = altered(place, tmp_path, without_some)
    assert run({"verb": "check", "adapter": str(folder), **base(place)}) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Proof failed: PEFT does not load") and "missing" in last
    from peft import PeftModel

    def refuse(*_, **__):
        raise KeyError("x")

    monkeypatch.setattr(PeftModel, "from_pretrained", refuse)
    assert run(options(place, "check", "plain", **base(place))) == 1
    assert "It says KeyError: 'x'" in capsys.readouterr().out


def test_a_base_without_weights_gives_no_proof(place, tmp_path, capsys):
    import shutil

    shutil.copy(place / "base" / "config.json", tmp_path)
    assert run(options(place, "check", "plain", checkpoint_dir=str(tmp_path))) == 0
    assert "No proof: " in capsys.readouterr().out


def altered(place, tmp_path, change):
    """Copy an adapter with other tensors."""
    import shutil

    folder = Path(shutil.copytree(place / "plain", tmp_path / "altered"))
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["peft", "peft-patterns"])
def test_converted_adapters_compute_the_same(place, tmp_path, kind, form):
    out = tmp_path / "out"
    assert run(options(place, "convert", kind, to=form, output_dir=str(out), **base(place))) == 0
    one, other = (load_with_peft(place / "base", folder) for folder in (place / kind, out))
    torch.testing.assert_close(
        hf_logits(one, batch()), hf_logits(other, batch()), atol=1e-5, rtol=0
    )
    if form == "peft" and kind in ("plain", "rslora", "patterns"):
        runtimes = ["vLLM", "llama.cpp"]
        assert run({"verb": "check", "adapter": str(out), "runtime": runtimes}) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_computes_the_same(place, tmp_path, kind):
    out = tmp_path / "merged"
    assert run(options(place, "merge", kind, output_dir=str(out), **base(place))) == 0
    one, other = load_with_peft(place / "base", place / kind), load_base_with_hf(out)
    torch.testing.assert_close(
        hf_logits(one, batch()), hf_logits(other, batch()), atol=1e-5, rtol=0
    )


def test_import_writes_a_folder_that_training_goes_on_from(place, tmp_path, capsys):
    out = tmp_path / "imported"
    assert run(options(place, "import", "patterns", output_dir=str(out), **base(place))) == 0
    text = capsys.readouterr().out
    assert "apply_lora_to_mlp: True" in text and "apply_lora_to_output: False" in text
    assert f"init_adapter: {out}" in text and "lora_rank: 4" in text and "rank_pattern" in text
    one, other = (load_file(f / "adapter_model.safetensors") for f in (place / "patterns", out))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_no_keys_say_is_not_taken_in(place, tmp_path):
    """Adapters on other modules in one layer than in the next."""
    folder, out = altered(place, tmp_path, without_some), tmp_path / "out"
    with pytest.raises(AdapterError, match="`convert --to peft-patterns` makes a folder of it"):
        run({"verb": "import", "adapter": str(folder), "output_dir": str(out), **base(place)})
    assert not out.exists()


@pytest.mark.parametrize("verb", ["convert", "merge", "import"])
def test_nothing_is_written_into_the_base(place, tmp_path, verb):
    keys = {"to": "torchtune"} if verb == "convert" else {}
    inside = str(place / "base" / "new")
    with pytest.raises(OutputError, match="is inside checkpoint_dir"):
        run(options(place, verb, "plain", output_dir=inside, **keys, **base(place)))


@pytest.mark.parametrize("verb", ["convert", "merge", "import"])
def test_what_is_there_is_not_overwritten(place, tmp_path, verb):
    (tmp_path / "kept").mkdir()
    keys = {"to": "peft"} if verb == "convert" else {}
    with pytest.raises(OutputError, match="exists"):
        run(options(place, verb, "plain", output_dir=str(tmp_path / "kept"), **keys, **base(place)))
    assert not list((tmp_path / "kept").iterdir())


def test_bad_input_is_one_clear_error(place, tmp_path):
    with pytest.raises(MissingFileError):
        run({"verb": "check", "adapter": str(tmp_path / "nothing")})
    with pytest.raises(Phi3Error):
        run({"verb": "merge", "adapter": str(tmp_path), **base(place), "output_dir": "x"})
    (tmp_path / "config.json").write_text(json.dumps({**MINI_4K, "vocab_size": 64}))
    with pytest.raises(AdapterError):
        keys = {"checkpoint_dir": str(tmp_path), "to": "peft", "output_dir": str(place / "o")}
        run(options(place, "convert", "plain", **keys))


def test_the_command_ends_with_the_exit_code(place, monkeypatch, capsys):
    def command(*words):
        monkeypatch.setattr(sys, "argv", ["phi3-tune", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code

    assert command("adapter", "check", str(place / "plain")) == 0
    assert command("adapter", "check", str(place / "dora"), "--runtime", "vLLM") == 1
    assert command("adapter", "check", str(place / "none")) == 1
    err = capsys.readouterr().err
    assert "phi3_plugin: MissingFileError: " in err and "Traceback" not in err
    assert command("adapter", "convert", "x") == 2


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder with two bases, and an adapter that we wrote for one of them."""
    folder = tmp_path_factory.mktemp("bases")
    bases = [hf_model(MEDIUM_4K, seed=seed, **TINY_GQA) for seed in (0, 1)]
    for name, model in zip(("own", "other"), bases, strict=True):
        save_checkpoint(model, MEDIUM_4K, folder / name, **TINY_GQA)
    keys = {"r": 4, "target_modules": ["qkv_proj"], "init_lora_weights": False}
    get_peft_model(bases[0], LoraConfig(**keys)).save_pretrained(folder / "theirs")
    given = {"adapter": str(folder / "theirs"), "checkpoint_dir": str(folder / "own")}
    assert run({"verb": "convert", "to": "peft", "output_dir": str(folder / "ours"), **given}) == 0
    return folder


def with_base(bases, verb, adapter, base, **keys):
    where = {"adapter": str(bases / adapter), "checkpoint_dir": str(bases / base)}
    return {"verb": verb, **where, **keys}


def test_check_tells(bases, capsys):
    assert run(with_base(bases, "check", "ours", "own", json=True)) == 0
    assert json.loads(capsys.readouterr().out)["other_base"] is None
    assert run(with_base(bases, "check", "ours", "other")) == 1
    assert "Another base: the adapter was made for weights" in capsys.readouterr().out


def test_of_an_adapter_of_others_nothing_is_known(bases, capsys):
    assert run(with_base(bases, "check", "theirs", "other")) == 0
    assert "Another base" not in capsys.readouterr().out


def test_merge_warns(bases, tmp_path, capsys):
    merged = str(tmp_path / "merged")
    assert run(with_base(bases, "merge", "ours", "other", output_dir=merged)) == 0
    assert "Warning: the adapter was made for weights" in capsys.readouterr().err


needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="llama.cpp's gguf package is not installed"
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with the demo's base, which has a tokenizer, a LoRA, and a DoRA of PEFT."""
    from peft import LoraConfig, get_peft_model

    from phi3_plugin.proof import load_base_with_hf

    folder = tmp_path_factory.mktemp("forms")
    build_checkpoint(folder / "base", words=["one", "two"])
    hf = load_base_with_hf(folder / "base")
    for name, dora in (("lora", False), ("dora", True)):
        keys = {"r": 4, "lora_alpha": 8, "target_modules": FOUR, "task_type": "CAUSAL_LM"}
        model = get_peft_model(deepcopy(hf), LoraConfig(use_dora=dora, **keys))
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
    return folder


def convert(demo, to, out, adapter="lora", **keys):
    base = {"checkpoint_dir": str(demo / "base"), "output_dir": str(out)}
    return run({"verb": "convert", "adapter": str(demo / adapter), "to": to, **base, **keys})


def no_norms(module):
    raise AssertionError(module)


def same(demo, file):
    """Whether a file, read back, holds the LoRA bit for bit."""
    sizes = read_config(demo / "base")
    lora, other = (
        pattern_content(read_adapter(path, config=sizes), sizes, no_norms)
        for path in (demo / "lora", file)
    )
    assert lora.tensors.keys() == other.tensors.keys()
    assert (lora.ranks, lora.alphas) == (other.ranks, other.alphas)
    return all(torch.equal(lora.tensors[name], other.tensors[name]) for name in lora.tensors)


FILES = [
    ("peft", "out", {}),
    ("peft-patterns", "out", {}),
    ("torchtune", "out", {}),
    ("mlx", "out", {}),
    ("loralib", "out.pt", {}),
    ("loralib", "out.safetensors", {"merged_linear": True}),
]


@pytest.mark.parametrize(("to", "name", "keys"), FILES, ids=lambda value: str(value))
def test_what_is_written_is_the_same_adapter(demo, tmp_path, to, name, keys):
    assert convert(demo, to, tmp_path / name, **keys) == 0
    assert same(demo, tmp_path / name)
    with pytest.raises(OutputError, match="exists"):
        convert(demo, to, tmp_path / name, **keys)


@needs_gguf
def test_a_file_for_llama_cpp(demo, tmp_path):
    import gguf

    assert convert(demo, "gguf", tmp_path / "out.gguf") == 0
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["adapter.lora.alpha"].contents() == 8
    assert len(reader.tensors) == 2 * 4 * 4


def test_an_adapter_of_mlx_is_told_apart_imported_and_merged(demo, tmp_path, capsys):
    assert convert(demo, "mlx", tmp_path / "mlx", "dora") == 0
    assert "Note: mlx-lm has no sliding window" in capsys.readouterr().out
    given = {"adapter": str(tmp_path / "mlx"), "checkpoint_dir": str(demo / "base")}
    with pytest.raises(AdapterError, match="is an adapter of mlx-lm, which alone loads it as it"):
        run({"verb": "check", **given})
    for verb in ("import", "merge"):
        assert run({"verb": verb, **given, "output_dir": str(tmp_path / verb)}) == 0
    assert run({"verb": "check", **given, "adapter": str(tmp_path / "import")}) == 0
    assert "Proof:" in capsys.readouterr().out


@needs_gguf
def test_a_merged_model_for_llama_cpp(demo, tmp_path, capsys):
    import gguf

    base = {"checkpoint_dir": str(demo / "base")}
    merged = {"verb": "merge", "adapter": str(demo / "dora"), **base}
    assert run({**merged, "output_dir": str(tmp_path / "folder")}) == 0
    out = str(tmp_path / "direct.gguf")
    assert run({**merged, "to": "gguf", "type": "f16", "output_dir": out}) == 0
    given = {"verb": "convert-base", "checkpoint_dir": str(tmp_path / "folder"), "to": "gguf"}
    assert run({**given, "type": "f16", "output_dir": str(tmp_path / "indirect.gguf")}) == 0
    assert "Note: llama.cpp computes no sliding window" in capsys.readouterr().out
    one, other = (
        {t.name: t.data.tobytes() for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("direct", "indirect")
    )
    assert one == other
    assert (tmp_path / "direct.Modelfile").read_text().startswith("FROM ./direct.gguf\n")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [
        "", ".Modelfile", ".Modelfile", ".gguf", ".gguf",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "keys", "message"),
    [
        ("merge", {"to": "gguf", "output_dir": "folder"}, "must be a file that ends in .gguf"),
        ("merge", {"type": "q8_0", "output_dir": "folder"}, "that of hf is for --to gguf or"),
        ("convert-base", {"output_dir": "m.gguf"}, "to is not set"),
        (
            "convert-base",
            {"to": "onnx", "type": "f16", "output_dir": "m"},
            "onnx is one of int4, fp",
        ),
        ("convert-base", {"to": "gguf", "type": "q2", "output_dir": "m.gguf"}, "type: 'q2' must"),
        ("convert-base", {"to": "gguf", "output_dir": "m"}, "must be a file that ends in .gguf"),
    ],
)
def test_what_is_refused_of_a_model(demo, tmp_path, monkeypatch, verb, keys, message):
    monkeypatch.chdir(tmp_path)
    adapter = {"adapter": str(demo / "lora")} if verb == "merge" else {}
    with pytest.raises(ConfigError, match=message):
        run({"verb": verb, "checkpoint_dir": str(demo / "base"), **adapter, **keys})
    assert not list(tmp_path.iterdir())


def test_dora_for_llama_cpp_is_to_be_merged(demo, tmp_path):
    with pytest.raises(AdapterError, match=r"it knows no DoRA\. Write a model instead"):
        convert(demo, "gguf", tmp_path / "out.gguf", "dora")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "name", "keys", "message"),
    [
        ("gguf", "out", {}, "must be a file that ends in .gguf"),
        ("loralib", "out.bin", {}, "must be a file that ends in .pt or .safetensors"),
        ("gguf", "no/such/out.gguf", {}, "is no folder"),
        ("peft", "out", {"enable_lora": "true,maybe"}, "maybe' must be a list of True and False"),
    ],
)
def test_what_is_refused(demo, tmp_path, to, name, keys, message):
    with pytest.raises(ConfigError, match=message):
        convert(demo, to, tmp_path / name, **keys)
    assert not list(tmp_path.iterdir())


def test_a_file_without_alpha_needs_it(demo, tmp_path):
    from safetensors.torch import load_file, save_file

    convert(demo, "loralib", tmp_path / "own.safetensors")
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(tmp_path / "own.safetensors"), bare)
    keys = {"verb": "import", "adapter": str(bare), "checkpoint_dir": str(demo / "base")}
    with pytest.raises(AdapterError, match="alpha"):
        run({**keys, "output_dir": str(tmp_path / "out")})
    assert run({**keys, "output_dir": str(tmp_path / "out"), "alpha": 8.0}) == 0
    assert same(demo, tmp_path / "out")


def test_onto_nf4_the_difference_is_stated(demo, tmp_path, capsys):
    base = {"checkpoint_dir": str(demo / "base"), "output_dir": str(tmp_path / "out")}
    assert run({"verb": "merge", "adapter": str(demo / "lora"), "onto": "nf4", **base}) == 0
    assert "The quantized weights differ from the original ones by " in capsys.readouterr().out
