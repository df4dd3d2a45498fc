"""An adapter folder alone is enough for every entry of transformers and PEFT, with the base's ids.

`benchmarks/adapter_folders.py` does the same with old and with the newest versions.
"""

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from phi3_plugin.recipes.phi3_demo_checkpoint import build_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from phi3_plugin.checkpoint.peft import copy_tokenizer, export_adapter
from phi3_plugin.config import read_config
from phi3_plugin.load import load_model
from tests.adapters import WHOLE, adapter

TOKENS = torch.arange(3, 20)[None]
TEXTS = (
    *("Hello world", " one  two\n\n\tthree", "naïve 你好 🙂", "", "\n", "def f(x):\n    return x"),
    *("<|user|>\nHi<|end|>\n<|assistant|>\n", "<|end|>  a <|user|> b", "<s> </s>"),
    *("<|im_start|> user<|im_sep|>Hi<|im_end|>", "\u2581x \u2581"),
)
CHAT = [{"role": "user", "content": "Hi  there"}, {"role": "assistant", "content": " Hello!"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    build_checkpoint(place / "base", words=["hello"])
    (place / "adapter").mkdir()
    made = adapter(read_config(place / "base"), WHOLE)
    export_adapter(place / "adapter", made, checkpoint_dir=place / "base", card={})
    return place


def with_adapter(place):
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    model.load_adapter(str(place / "adapter"))
    return model


ENTRIES = {
    "AutoModelForCausalLM": lambda p: AutoModelForCausalLM.from_pretrained(p / "adapter"),
    "AutoPeftModelForCausalLM": lambda p: AutoPeftModelForCausalLM.from_pretrained(p / "adapter"),
    "pipeline": lambda p: pipeline("text-generation", model=str(p / "adapter")).model,
    "load_adapter": with_adapter,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_base_and_adapter_are_loaded_by_the_folder_alone(place, entry):
    with torch.no_grad():
        theirs = ENTRIES[entry](place).eval()(input_ids=TOKENS).logits
    ours = load_model(place / "base", place / "adapter", dtype="fp32", device="cpu")(TOKENS)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert (load_model(place / "base", dtype="fp32", device="cpu")(TOKENS) - ours).abs().max() > 0.1


def test_the_tokenizer_alone_gives_the_ids_of_the_base(supported, tmp_path):
    copy_tokenizer(supported, tmp_path, alone=True)
    base, alone = (AutoTokenizer.from_pretrained(folder) for folder in (supported, tmp_path))
    for text in (*TEXTS, base.apply_chat_template(CHAT, tokenize=False)):
        assert alone(text)["input_ids"] == base(text)["input_ids"], text
        assert alone.decode(base(text)["input_ids"]) == base.decode(base(text)["input_ids"])
    assert alone.chat_template == base.chat_template
    assert alone.special_tokens_map == base.special_tokens_map
    assert (alone.model_max_length, alone.padding_side) == (
        base.model_max_length,
        base.padding_side,
    )
