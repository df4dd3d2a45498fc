"""What stands for what in a stranger's file, and copies of the base beside adapters."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError
from tests.checkpoint.adapters import base_folder, merged_logits
from tests.contract.test_foreign import FUSED, trained_by_peft

COPY = "base_model.model.model.embed_tokens.base_layer.weight"


@pytest.fixture(scope="module", params=["gqa", "tied"])
def base(request, tmp_path_factory):
    return base_folder(request.param, tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def folder(base, tmp_path):
    """Return an adapter on the embedding, beside which PEFT saves the embedding itself."""
    more = {"ensure_weight_tying": True} if read_config(base).tie_word_embeddings else {}
    trained_by_peft(base, tmp_path, target_modules=[*FUSED, "embed_tokens"], **more)
    return tmp_path


def changed(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_copy_of_the_base_is_left_out(base, folder):
    read = read_adapter(folder, config=read_config(base), base=base)
    assert "tok_embeddings" in read.ranks
    assert not read.saved


def test_a_copy_in_another_dtype_is_the_same(base, folder):
    changed(folder, lambda t: t.update({COPY: t[COPY].bfloat16()}))
    assert "tok_embeddings" in read_adapter(folder, config=read_config(base), base=base).ranks


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({COPY: t[COPY] + 0.1}),
        lambda t: t[COPY].__setitem__((-1, 3), float("nan")),
        lambda t: t.update({COPY: torch.ones(3)}),
        lambda t: t.update({COPY: torch.cat([t[COPY], t[COPY][:2]])}),
    ],
    ids=["changed", "NaN", "small", "more tokens"],
)
def test_a_copy_of_another_base_is_refused(base, folder, change):
    changed(folder, change)
    message = r"a copy of tok_embeddings\.weight.* that differs from the base's"
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder, config=read_config(base), base=base)


def test_a_tied_base_that_peft_keeps_tied_computes_the_same(base, tmp_path):
    keys = {"target_modules": FUSED, "modules_to_save": ["embed_tokens"]}
    tokens, theirs = trained_by_peft(base, tmp_path, ensure_weight_tying=True, **keys)
    config = read_config(base)
    ours = merged_logits(base, read_adapter(tmp_path, config=config, base=base), config, tokens)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["lm_head", "base_model.model.model.layers.0.self_attn.o_proj.base_layer.weight"]
)
def test_no_tensor_is_passed_over(base, folder, name):
    changed(folder, lambda t: t.update({name: torch.ones(3)}))
    with pytest.raises(AdapterError, match=f"'{name}' is no part of an adapter"):
        read_adapter(folder, config=read_config(base))
