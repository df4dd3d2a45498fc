"""Which base an adapter belongs to: equal weights have one hash, and every file carries it."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from phi3_plugin.checkpoint import base as identity
from phi3_plugin.checkpoint.base import (
    base_hash,
    known_hash,
    load_base_weights,
    other_base,
    refuse_other_base,
    save_weights,
)
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.loralib import write_loralib
from phi3_plugin.checkpoint.merge import merge_into
from phi3_plugin.checkpoint.peft import export_adapter
from phi3_plugin.checkpoint.torchtune import write_torchtune
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError, MissingFileError
from tests.checkpoint.adapters import BASES, PARTS, WHOLE, adapter, base_folder, same


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: base_folder(name, tmp_path_factory.mktemp("base") / name) for name in BASES}


def copy(base, folder, change=lambda weights: weights, shard_bytes=1 << 30):
    """Write a base again, with other weights."""
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    save_weights(folder, change({**load_base_weights(base)}), shard_bytes)
    return folder


def test_equal_weights_have_one_hash_in_any_dtype_and_any_shards(bases, tmp_path):
    bf16 = copy(bases["gqa"], tmp_path / "bf16", lambda w: {n: v.bfloat16() for n, v in w.items()})
    fp32 = copy(bf16, tmp_path / "fp32", lambda w: {n: v.float() for n, v in w.items()}, 50_000)
    assert len(list(fp32.glob("*.safetensors"))) > 3
    assert base_hash(bf16) == base_hash(fp32) != base_hash(bases["gqa"])
    assert len({base_hash(base) for base in bases.values()}) == len(bases)


def test_a_copy_of_a_tied_head_does_not_count(bases, tmp_path):
    with_head = shutil.copytree(bases["tied"], tmp_path / "head")
    for file in with_head.glob("*.safetensors*"):
        file.unlink()
    weights = dict(load_base_weights(bases["tied"]))
    save_weights(with_head, {**weights, "output.weight": weights["tok_embeddings.weight"].clone()})
    assert base_hash(with_head) == base_hash(bases["tied"])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
def test_a_model_with_an_adapter_merged_into_one_part_is_another_base(bases, base, part, tmp_path):
    inner = f"{'mlp.gate_up_proj' if part in ('gate_proj', 'up_proj') else 'attn.qkv_proj'}.{part}"
    made = adapter(read_config(bases[base]), [inner], layers=[1])
    merge_into(tmp_path / "merged", bases[base], made)
    assert base_hash(tmp_path / "merged") != base_hash(bases[base])


def test_a_folder_that_is_written_again_is_read_again(bases, tmp_path, monkeypatch):
    folder = shutil.copytree(bases["mini"], tmp_path / "base")
    reads = []
    monkeypatch.setattr(identity, "hash_of", lambda weights: reads.append(1) or "rows4:x")
    for _ in range(3):
        base_hash(folder)
    assert len(reads) == 1
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file({n: v + 1 for n, v in load_file(file).items()}, file, metadata={"format": "pt"})
    base_hash(folder)
    assert len(reads) == 2


def test_links_are_followed_and_broken_ones_do_not_count(bases, tmp_path):
    for file in bases["mini"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "consolidated.safetensors").symlink_to(tmp_path / "gone")
    assert known_hash(tmp_path) == base_hash(bases["mini"])
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text("{")
    assert known_hash(tmp_path) == base_hash(bases["mini"])  # of the same files
    identity._hash_of.cache_clear()
    assert known_hash(tmp_path) == ""


@pytest.mark.parametrize("form", ["peft", "patterns", "torchtune", "loralib"])
def test_every_form_says_for_which_base_it_is_and_comes_back(bases, form, tmp_path):
    base, config = bases["mini"], read_config(bases["mini"])
    made = adapter(config, PARTS, base_hash=base_hash(base))
    out = tmp_path / "out"
    if form == "torchtune":
        out.mkdir()
        write_torchtune(out / "adapter_model.pt", made, config)
    elif form == "loralib":
        write_loralib(out := tmp_path / "out.safetensors", made, config, merged_linear=True)
    else:
        out.mkdir()
        keys = {"checkpoint_dir": base, "card": {}, "patterns": form == "patterns"}
        export_adapter(out, replace(made, base_hash=""), **keys)
    again = read_adapter(out, config=config)
    assert same(again, made) and again.base_hash == made.base_hash and not again.origin


def test_what_the_adapter_says_itself_is_kept(bases, tmp_path):
    made = adapter(read_config(bases["mini"]), WHOLE, base_hash="rows4:abc")
    export_adapter(tmp_path, made, checkpoint_dir=bases["mini"], card={})
    assert read_adapter(tmp_path, config=read_config(bases["mini"])).base_hash == "rows4:abc"
    keys = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert "base_hash" not in keys  # only the metadata, which other programs do not read
    (tmp_path / "adapter_config.json").write_text(json.dumps({**keys, "lora_alpha": 99}), "utf-8")
    assert read_adapter(tmp_path, config=read_config(bases["mini"])).base_hash == "rows4:abc"


def test_a_base_without_weights_is_no_reason_not_to_save(bases, tmp_path):
    (tmp_path / "base").mkdir()
    shutil.copy(bases["mini"] / "config.json", tmp_path / "base")
    assert known_hash(tmp_path / "base") == ""
    with pytest.raises(MissingFileError):
        base_hash(tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    made = adapter(read_config(bases["mini"]), WHOLE)
    export_adapter(out, made, checkpoint_dir=tmp_path / "base", card={})
    assert read_adapter(out, config=read_config(bases["mini"])).base_hash == ""


def test_another_base_is_refused_and_an_unknown_one_is_not(bases):
    own, other = base_hash(bases["mini"]), base_hash(bases["gqa"])
    for unknown in ("", "some-later-kind:123", own):
        assert other_base(unknown, bases["mini"]) is None
        refuse_other_base(bases["mini"], unknown, "", bases["mini"])
    with pytest.raises(AdapterError) as refused:
        refuse_other_base(bases["mini"] / "a", other, "microsoft/Phi-3", bases["mini"])
    said = str(refused.value)
    for words in (other[6:18], own[6:18], str(bases["mini"]), "microsoft/Phi-3", "check_base"):
        assert words in said
    assert "\n" not in said


def test_norms_count_whole(bases, tmp_path):
    def change(weights):
        weights["layers.1.sa_norm.scale"] = weights["layers.1.sa_norm.scale"].clone()
        weights["layers.1.sa_norm.scale"][37] += 1e-3
        return weights

    assert base_hash(copy(bases["mini"], tmp_path / "b", change)) != base_hash(bases["mini"])


def test_a_base_that_cannot_be_read_is_not_another_one(bases, tmp_path):
    shutil.copy(bases["mini"] / "config.json", tmp_path)
    assert other_base(base_hash(bases["gqa"]), tmp_path) is None
