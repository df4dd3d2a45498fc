"""What we write of every checkpoint of the family loads in transformers and PEFT, and computes
what we compute."""

import json
import logging
from pathlib import Path

import pytest
import torch

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.checkpoint.merge import merge_into
from phi3_plugin.checkpoint.peft import export_adapter, export_model
from phi3_plugin.models import lora_phi3, phi3
from phi3_plugin.models.lora_settings import TARGETS
from phi3_plugin.proof import load_base_with_hf, load_with_peft
from tests.adapters import load_adapter
from tests.chosen import some
from tests.family import VARIANTS, published, sizes
from tests.oracles import hf_model, save_checkpoint

RANK, ALPHA = 4, 12


@pytest.fixture(scope="module")
def base(request, tmp_path_factory):
    keys, small = published(request.param), sizes(request.param)
    if request.param == "mini-128k-april":  # transformers 5.23 loads no "su" at all
        keys = {**keys, "rope_scaling": {**keys["rope_scaling"], "type": "longrope"}}
    model = hf_model(keys, std=0.04, **small)
    return save_checkpoint(model, keys, tmp_path_factory.mktemp("base"), **small)


@pytest.fixture
def said(caplog, recwarn):
    """Everything that a library says aloud."""

    def collect():
        records = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        # What PEFT calls of transformers that will be renamed is no word about our files
        loud = [w for w in recwarn if not issubclass(w.category, FutureWarning)]
        found = [*records, *(str(w.message) for w in loud)]
        caplog.clear()
        recwarn.clear()
        return {text for text in found if "torchao" not in text}

    logging.getLogger("transformers").propagate = True
    return collect


def trained(folder, dora):
    """Return our model as after training, and its adapter."""
    model = lora_phi3(folder, list(TARGETS), True, lora_rank=RANK, lora_alpha=ALPHA, use_dora=dora)
    model.load_state_dict(load_base_weights(folder), strict=False)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    for module in model.modules():
        if dora and hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
            module.magnitude.data *= torch.rand_like(module.magnitude) + 0.5
    adapter = {n: p.detach() for n, p in model.named_parameters() if "lora" in n or "magn" in n}
    return model.eval(), adapter


def save(folder: Path, adapter, base: Path) -> Path:
    folder.mkdir()
    export_adapter(folder, Adapter.of(adapter, ALPHA / RANK), checkpoint_dir=base, card={})
    return folder


EACH = [(variant, dora) for variant in VARIANTS for dora in (False, True)]
QUICK = [(v, dora) for v, dora in EACH if not dora or v in ("medium-128k", "phi-4-mini")]


@pytest.mark.parametrize(("base", "dora"), some(EACH, QUICK), indirect=["base"])
def test_adapter_and_merged_model_compute_what_we_compute(base, dora, tmp_path, said):
    model, adapter = trained(base, dora)
    folder = save(tmp_path / "adapter", adapter, base)
    merge_into(tmp_path / "merged", base, Adapter.of(load_adapter(folder), ALPHA / RANK))

    load_base_with_hf(base)
    usual = said()
    batch = torch.randint(0, 150, (2, 40))
    with torch.no_grad():
        ours = model(batch)
        peft = load_with_peft(base, folder)(input_ids=batch).logits
        whole = load_base_with_hf(tmp_path / "merged")(input_ids=batch).logits
        again = phi3(tmp_path / "merged")
        again.load_state_dict(load_base_weights(tmp_path / "merged"))
        reloaded = again(batch)
    assert said() <= usual
    for other in (peft, whole, reloaded):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-5)
    without = load_base_with_hf(base)(input_ids=batch).logits
    assert (ours - without).abs().max() > 0.01


@pytest.mark.parametrize("base", VARIANTS, indirect=True)
def test_a_tied_embedding_is_saved_once(base, tmp_path):
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    export_model(tmp_path, load_base_weights(base), base)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) != tied
    assert index["metadata"]["total_size"] == sum(
        value.nbytes for value in load_base_weights(base).values()
    )
