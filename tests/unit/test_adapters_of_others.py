"""Adapters as other programs write them: read as PEFT computes them, or refused by feature."""

import json
import shutil
import struct

import pytest
import torch
import yaml
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Phi3ForCausalLM

from phi3_plugin.checkpoint.check import LOADS, REJECTED, verdicts
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError, MissingFileError
from phi3_plugin.models import lora_phi3
from phi3_plugin.proof import PROVEN, load_with_peft, proven
from phi3_plugin.train.model import prepare
from phi3_plugin.train.start import fitting_tensors
from tests.adapters import base_folder
from tests.assets import assets_dir
from tests.chosen import some
from tests.commands import adapter

TOKENS = torch.arange(3, 20)[None]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PATTERN = r".*\.layers\.1\..*(qkv_proj|o_proj)$"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name in ("mini", "tied"):
        base_folder(name, folder / name)
    model = AutoModelForCausalLM.from_pretrained(folder / "mini", dtype=torch.float32)
    model.resize_token_embeddings(155)
    model.save_pretrained(folder / "resized")
    return folder


def run(keys):
    return adapter({key: str(value) for key, value in keys.items()})


def made(base, folder, settings=None, rows=None, left=None, **keys):
    """Let PEFT write an adapter of random numbers; return its logits.

    ``left`` says which ranks of an AdaLoRA its training leaves, by module.
    """
    keys = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj"], **keys}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows)
    model = get_peft_model(model, settings or LoraConfig(task_type="CAUSAL_LM", **keys)).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        if left:
            model.base_model.resize_modules_by_rank_pattern(left, "default")
            model.peft_config["default"].rank_pattern = left
        model.save_pretrained(folder)
        return model(input_ids=TOKENS).logits


def merged(base, folder, out):
    """Return transformers' logits of our merged model."""
    run({"verb": "merge", "adapter": folder, "checkpoint_dir": base, "output_dir": out})
    with torch.no_grad():
        return Phi3ForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=TOKENS).logits


def changed(folder, **keys):
    said = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**said, **keys}))


ADALORA = {
    **{"init_r": 6, "target_r": 3, "lora_alpha": 16, "target_modules": ["qkv_proj", "o_proj"]},
    **{"total_step": 10, "tinit": 1, "tfinal": 1, "deltaT": 1, "task_type": "CAUSAL_LM"},
}
E_OF = "model.layers.{}.self_attn.{}.lora_E.default"
LEFT = {
    E_OF.format(0, "qkv_proj"): [True, False, True, True, False, True],
    E_OF.format(1, "o_proj"): [False] * 6,
}
EXACT = {
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {PATTERN: 8},
        "alpha_pattern": {PATTERN: 32},
    },
    "bias of layers without one": {"bias": "lora_only"},
    "pissa": {"init_lora_weights": "pissa", "target_modules": ["qkv_proj", "lm_head"]},
    "pissa and dora": {"init_lora_weights": "pissa", "use_dora": True, "use_rslora": True},
    "olora": {
        "init_lora_weights": "olora",
        "rank_pattern": {"layers.1.self_attn.qkv_proj": 7},
        "target_modules": ["qkv_proj", "down_proj"],
    },
    "rows of tokens": {"trainable_token_indices": [5, 6]},
    "rows of the head": {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [6, 7]}},
    "mica": {"init_lora_weights": "mica"},
    "adalora": {"settings": AdaLoraConfig(**ADALORA)},
    "adalora with pruned ranks": {"settings": AdaLoraConfig(**ADALORA), "left": LEFT},
}


@pytest.mark.parametrize("case", EXACT)
def test_what_changes_nothing_or_can_be_computed_merges(bases, tmp_path, case):
    theirs = made(bases / "mini", tmp_path / "adapter", **EXACT[case])
    ours = merged(bases / "mini", tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


SAVED = {
    **dict.fromkeys(("plain", "metadata_null", "patterns", "token_rows", "bias_lora_only"), "base"),
    **dict.fromkeys(("rslora", "adalora", "named/sft"), "base"),
    **dict.fromkeys(("new_tokens_saved", "new_tokens_auto"), "base_resized"),
    "tied_head": "base_tied",
}
"""Adapters that PEFT wrote beside its logits, and the base of each."""


@pytest.mark.assets
@pytest.mark.parametrize("case", SAVED)
def test_saved_adapters_merge_into_what_peft_computed(tmp_path, case):
    cases = assets_dir().with_name("cases") / "adapters"
    if not (cases / case).is_dir():
        pytest.skip(f"no {cases / case}")
    expected = torch.load(cases / case / "logits.pt", weights_only=True)
    ours = merged(cases / SAVED[case], cases / case, tmp_path / "out")
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


def test_keys_of_swift_that_only_training_reads_are_passed_over(bases, tmp_path):
    made(bases / "mini", tmp_path)
    changed(tmp_path, lorap_emb_lr=1e-6, lora_dtype="bfloat16", lorap_lr_ratio=16.0)
    assert read_adapter(tmp_path, config=read_config(bases / "mini")).ranks


def test_many_patterns_that_need_a_limit_are_refused(bases, tmp_path):
    made(bases / "mini", tmp_path)
    changed(tmp_path, rank_pattern={f".*.*.*{i}": 4 for i in range(17)})
    with pytest.raises(AdapterError, match="rank_pattern: at most 16 names"):
        read_adapter(tmp_path, config=read_config(bases / "mini"))


@pytest.mark.usefixtures("impatient")
def test_a_pattern_that_takes_long_is_refused(bases, tmp_path):
    made(bases / "mini", tmp_path)
    changed(tmp_path, rank_pattern={".*" * 30 + "x": 4})
    with pytest.raises(AdapterError, match="takes more than"):
        read_adapter(tmp_path, config=read_config(bases / "mini"))


def test_metadata_may_be_null(bases, tmp_path):
    theirs = made(bases / "mini", tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = {**json.loads(data[8 : 8 + length]), "__metadata__": None}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    ours = merged(bases / "mini", tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "_orig_mod.base_model.model.model._fsdp_wrapped_module.layers.{}.{}",
        "base_model.model._orig_mod.model.layers.{}._checkpoint_wrapped_module.{}",
        "module.base_model.model.model.layers.{}.module.{}",
    ],
)
def test_wrappers_within_names_are_left_out(bases, tmp_path, name):
    made(bases / "mini", tmp_path)
    config = read_config(bases / "mini")
    before = read_adapter(tmp_path, config=config)
    tensors = {}
    for key, value in load_file(tmp_path / WEIGHTS).items():
        _, _, rest = key.partition("layers.")
        tensors[name.format(*rest.split(".", 1))] = value
    save_file(tensors, tmp_path / WEIGHTS)
    again = read_adapter(tmp_path, config=config)
    assert all(torch.equal(again.tensors[key], value) for key, value in before.tensors.items())


# A vocabulary that was resized


@pytest.mark.parametrize("keys", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {}])
def test_rows_of_new_tokens_are_merged_and_proven(bases, tmp_path, keys):
    theirs = made(bases / "resized", tmp_path / "adapter", rows=160, **keys)
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(bases / "resized", dtype=torch.float32)
    torch.manual_seed(1)
    model.resize_token_embeddings(160, mean_resizing=False)
    model.save_pretrained(base)
    ours = merged(base, tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert verdicts(tmp_path / "adapter", read_config(base))[0].status == LOADS
    assert proven(base, tmp_path / "adapter", "fp32").status == PROVEN


@pytest.mark.parametrize("keys", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {}])
def test_rows_that_the_base_has_not_are_told(bases, tmp_path, keys):
    made(bases / "mini", tmp_path, rows=170, **keys)
    peft, *_ = verdicts(tmp_path, read_config(bases / "mini"))
    assert peft.status == REJECTED
    assert "lm_head is [160, 64] in this base, and [170, 64] in the file" in peft.reasons


def test_one_weight_under_two_names_must_be_one(bases, tmp_path):
    made(bases / "resized", tmp_path, rows=160, modules_to_save=["embed_tokens", "lm_head"])
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=r"output\.weight is there twice"):
        read_adapter(tmp_path, config=read_config(bases / "mini"))


# What is not computed is named


OTHERS = {
    "LOHA": LoHaConfig(target_modules=["o_proj"], r=4, init_weights=False),
    "LOKR": LoKrConfig(target_modules=["o_proj"], r=4, init_weights=False),
    "IA3": IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
    "VERA": VeraConfig(target_modules=["o_proj"], r=4),
    "OFT": OFTConfig(target_modules=["o_proj"], oft_block_size=8, r=0),
    "PREFIX_TUNING": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}
MERGED = ("LOHA", "LOKR", "IA3", "VERA", "OFT")


@pytest.mark.parametrize("kind", some(OTHERS, ["LOKR", "PREFIX_TUNING"]))
def test_other_kinds_are_named_and_peft_merges_them_as_said(bases, tmp_path, kind):
    made(bases / "mini", tmp_path / "adapter", OTHERS[kind])
    config, folder = read_config(bases / "mini"), tmp_path / "adapter"
    with pytest.raises(AdapterError, match=rf"peft_type: '{kind}', only") as error:
        read_adapter(folder, config=config)
    assert "base that it was trained on" not in str(error.value)
    assert ("merge_and_unload" in str(error.value)) == (kind in MERGED)
    if kind in MERGED:
        base = AutoModelForCausalLM.from_pretrained(bases / "mini", dtype=torch.float32)
        PeftModel.from_pretrained(base, folder).merge_and_unload()
    (folder / CONFIG).unlink()
    named = kind if kind in MERGED else "prompt or prefix tuning"
    with pytest.raises(AdapterError, match=rf"is an adapter of {named}, as ") as error:
        read_adapter(folder, config=config)
    assert "base that it was trained on" not in str(error.value)


def test_a_kind_with_files_of_other_names_is_named(bases, tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "XLORA"}))
    with pytest.raises(AdapterError, match="peft_type: 'XLORA', only LORA"):
        read_adapter(tmp_path, config=read_config(bases / "mini"))


def test_biases_are_named(bases, tmp_path):
    made(bases / "mini", tmp_path, lora_bias=True)
    with pytest.raises(AdapterError, match="lora_bias: True is a feature") as error:
        read_adapter(tmp_path, config=read_config(bases / "mini"))
    assert "base that it was trained on" not in str(error.value)


# AdaLoRA, PiSSA and OLoRA as the LoRA that computes the same


@pytest.mark.parametrize("case", ["pissa", "adalora with pruned ranks"])
def test_what_becomes_a_plain_lora_computes_the_same_in_peft(bases, tmp_path, case):
    theirs = made(bases / "mini", tmp_path / "adapter", **EXACT[case])
    given = {"adapter": tmp_path / "adapter", "checkpoint_dir": bases / "mini"}
    run({"verb": "convert", "to": "peft", **given, "output_dir": tmp_path / "plain"})
    keys = json.loads((tmp_path / "plain" / CONFIG).read_text())
    assert (keys["peft_type"], keys["init_lora_weights"]) == ("LORA", True)
    with torch.no_grad():
        again = load_with_peft(bases / "mini", tmp_path / "plain")(input_ids=TOKENS).logits
    torch.testing.assert_close(again, theirs, rtol=0, atol=1e-5)
    if "pissa" in case:
        assert proven(bases / "mini", tmp_path / "adapter", "fp32").status == PROVEN


def test_a_start_that_is_drawn_or_shared_is_refused(bases, tmp_path):
    made(bases / "mini", tmp_path / "drawn", init_lora_weights="pissa_niter_4")
    with pytest.raises(AdapterError, match="init_lora_weights: 'pissa_niter_4' changes the base"):
        read_adapter(tmp_path / "drawn", config=read_config(bases / "mini"), base=bases / "mini")
    made(bases / "tied", tmp_path / "tied")
    read = {"config": read_config(bases / "tied"), "base": bases / "tied"}
    assert read_adapter(tmp_path / "tied", **read).ranks
    tensors = load_file(tmp_path / "tied" / WEIGHTS)
    a, b = (value for name, value in tensors.items() if "layers.0" in name)
    head = "base_model.model.lm_head.lora_"
    more = {f"{head}A.weight": a.clone(), f"{head}B.weight": torch.ones(160, b.shape[1])}
    save_file({**tensors, **more}, tmp_path / "tied" / WEIGHTS)
    changed(tmp_path / "tied", init_lora_weights="pissa", target_modules=["qkv_proj", "lm_head"])
    with pytest.raises(AdapterError, match="of lm_head changes the embedding too"):
        read_adapter(tmp_path / "tied", **read)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"init_r": 0}, "init_r: 0 must be a whole number above 0"),
        ({"init_r": 10**400}, r"init_r: 10+\.\.\. must be a whole number"),
        ({"rank_pattern": [1]}, "rank_pattern: must be an object"),
        ({"rank_pattern": {E_OF.format(0, "qkv_proj"): [True]}}, "leaves other ranks than"),
        ({"lora_alpha": None}, "lora_alpha: None must be a number above 0"),
        (None, "has not all of lora_A, lora_B and lora_E"),
    ],
)
def test_a_broken_adalora_is_one_error(adalora, tmp_path, wrong, message):
    folder, config = shutil.copytree(adalora[0], tmp_path / "adapter"), adalora[1]
    if wrong:
        changed(folder, **wrong)
    else:
        tensors = load_file(folder / WEIGHTS)
        tensors.pop(next(name for name in tensors if name.endswith(".lora_E")))
        save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder, config=config)


@pytest.fixture(scope="module")
def adalora(bases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adalora") / "adapter"
    made(bases / "mini", folder, AdaLoraConfig(**ADALORA))
    return folder, read_config(bases / "mini")


def test_check_says_how_an_adalora_can_be_checked(adalora):
    with pytest.raises(AdapterError, match=r"peft_type: 'ADALORA' .*convert --to peft"):
        verdicts(*adalora)


@pytest.mark.parametrize("verb", ["merge", "check"])
def test_the_folder_of_a_named_adapter_is_named(bases, tmp_path, verb):
    made(bases / "mini", tmp_path / "named" / "sft")
    given = {"verb": verb, "adapter": tmp_path / "named", "checkpoint_dir": bases / "mini"}
    with pytest.raises(MissingFileError, match=r"Give .*named/sft, which is one"):
        run({**given, **({"output_dir": tmp_path / "out"} if verb == "merge" else {})})


# What import prints, training takes


def test_import_says_rslora_as_it_was_trained(bases, tmp_path, capsys):
    made(bases / "mini", tmp_path / "adapter", use_rslora=True, r=12, lora_alpha=7)
    out = tmp_path / "out"
    given = {"adapter": tmp_path / "adapter", "checkpoint_dir": bases / "mini", "output_dir": out}
    run({"verb": "import", **given})
    lines = capsys.readouterr().out.splitlines()
    assert {"    lora_rank: 12", "    lora_alpha: 7", "    use_rslora: True"} <= {*lines}
    assert not any("pattern" in line for line in lines)


@pytest.mark.parametrize("case", ["pissa and dora", "adalora"])
def test_what_import_prints_for_another_kind_takes_its_adapter(bases, tmp_path, case, capsys):
    made(bases / "mini", tmp_path / "adapter", **EXACT[case])
    given = {"adapter": tmp_path / "adapter", "checkpoint_dir": bases / "mini"}
    run({"verb": "import", **given, "output_dir": tmp_path / "out"})
    printed = yaml.safe_load(capsys.readouterr().out.partition("\n")[2])
    model = prepare(lora_phi3(bases / "mini", **printed["model"]))
    assert printed["init_adapter"] == str(tmp_path / "out")
    taken = fitting_tensors(tmp_path / "out", bases / "mini", model, {})
    sizes = read_config(bases / "mini")
    before = read_adapter(tmp_path / "adapter", config=sizes, base=bases / "mini")
    assert all(torch.equal(taken[name], value) for name, value in before.tensors.items())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"trainable_token_indices": [5, 6]},
            r"has rows of the tokens \[5, 6\].*Merge the adapter",
        ),
        ({"rows": 170, "modules_to_save": ["embed_tokens", "lm_head"]}, "Merge the adapter and"),
    ],
)
def test_import_refuses_rows_that_training_would(bases, tmp_path, keys, message):
    made(bases / "mini", tmp_path / "adapter", **keys)
    given = {"adapter": tmp_path / "adapter", "checkpoint_dir": bases / "mini"}
    with pytest.raises(AdapterError, match=message):
        run({"verb": "import", **given, "output_dir": tmp_path / "out"})
    assert not (tmp_path / "out").exists()


def test_import_refuses_what_training_would(bases, tmp_path):
    made(bases / "tied", tmp_path / "adapter", modules_to_save=["lm_head"])
    out = tmp_path / "out"
    given = {"adapter": tmp_path / "adapter", "checkpoint_dir": bases / "tied", "output_dir": out}
    with pytest.raises(AdapterError, match=r"modules_to_save: .* this checkpoint ties them"):
        run({"verb": "import", **given})
    assert not out.exists()
    # as the error says
    run({"verb": "convert", "to": "peft-patterns", **given})
    assert verdicts(out, read_config(bases / "tied"))[0].status == LOADS
