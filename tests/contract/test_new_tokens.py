"""Tokens that a run adds: their ids are those of transformers, their rows are trained as by PEFT.

The base is tiny. Some have rows to spare, as most of the family; some have none, and must grow.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from phi3_plugin.checkpoint.base import to_peft
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.merge import merge_into
from phi3_plugin.config import read_config
from phi3_plugin.data.collate import pad_right
from phi3_plugin.load import load
from phi3_plugin.models.lora_settings import TARGETS
from tests.chosen import some
from tests.own import (
    TINY,
    losses,
    same_losses,
    started,
    tiny_inputs,
)

NEW = ["<call>", "</call>", "zork"]
ADD = f"tokenizer.add_tokens={NEW}"
TEXT = "one <call> two </call> zork three"
SIZES = ("batch_size=2", "gradient_accumulation_steps=2", "max_steps=4", "optimizer.lr=2e-3")


def answered(folder, rows):
    """Write chats whose answers have the new tokens in them, each in another place."""
    chats = [json.loads(line) for line in (folder / "rows.jsonl").read_text("utf-8").splitlines()]
    for number, chat in enumerate(chats[:rows]):
        words = chat["messages"][1]["content"].split()
        for i, token in enumerate(NEW):
            words.insert((number + i) % (len(words) + 1), token)
        chat["messages"][1]["content"] = " ".join(words)
    (folder / "rows.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")


def rebuilt(base, *, vocabulary=None, tied=False):
    """Change a tiny checkpoint: as many rows as its tokenizer has tokens, or a tied head."""
    config = json.loads((base / "config.json").read_text("utf-8"))
    weights = {}
    for file in base.glob("*.safetensors"):
        weights |= load_file(file)
        file.unlink()
    (base / "model.safetensors.index.json").unlink()
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    for name in ends if vocabulary else ():
        weights[name] = weights[name][:vocabulary].clone()
    if tied:
        del weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config |= {"tie_word_embeddings": tied, "vocab_size": vocabulary or config["vocab_size"]}
    (base / "config.json").write_text(json.dumps(config), "utf-8")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By kind, a base and the same chats; the run's first new id is 397."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("spare", "grown", "tied", "tied-grown"):
        tiny_inputs(folder / kind, rows=11)
        answered(folder / kind, 11)
        vocabulary = 397 if "grown" in kind else None
        if kind != "spare":
            rebuilt(folder / kind / "base", vocabulary=vocabulary, tied="tied" in kind)
    return folder


def linked(bases, kind, folder):
    folder.mkdir(exist_ok=True)
    for path in (bases / kind).iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def in_transformers(base, vocabulary):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if vocabulary > model.config.vocab_size:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model


def logits(model, ids):
    with torch.no_grad():
        out = model(torch.tensor([ids]))
    return getattr(out, "logits", out).float()


def by_peft(recipe, start, whole, dora):
    """Train as users of transformers and PEFT do, from the same rows; losses and the tensors."""
    ids = [*recipe.new_tokens]
    model = in_transformers(recipe.s.checkpoint_dir, recipe.model.tok_embeddings.num_embeddings)
    tied = model.config.tie_word_embeddings
    ends = {"model.embed_tokens": "tok_embeddings", "lm_head": "output"}
    for theirs, ours in ends.items():
        if ours == "tok_embeddings" or not tied:
            rows = start[f"{ours}.weight"][ids] if whole else start[f"{ours}.new_rows"]
            model.get_submodule(theirs).weight.data[ids] = rows
    names = ["embed_tokens", "lm_head"]
    how = (
        {"modules_to_save": names}
        if whole
        else {"trainable_token_indices": dict.fromkeys(names, ids)}
    )
    model = get_peft_model(
        model.train(),
        LoraConfig(
            r=16, lora_alpha=32, target_modules=list(TARGETS), task_type="CAUSAL_LM",
            use_dora=dora, **how
        ),
    )  # fmt: skip
    named = dict(model.named_parameters())
    for name, value in start.items():
        if "lora_a" in name:
            named[to_peft(name).replace(".weight", ".default.weight")].data.copy_(value)
    trained = [(name, p) for name, p in named.items() if p.requires_grad]
    rows = [p for name, p in trained if "trainable_tokens" in name]
    others = [p for name, p in trained if "trainable_tokens" not in name]
    groups = [{"params": others}, {"params": rows, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=2e-3, weight_decay=0.01)
    seen = []
    for step in range(recipe.data.total_steps):
        batches = recipe.data.order.batches(step, 0, pad_right)
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        seen.append(0.0)
        for batch in batches:
            out = model(input_ids=batch["tokens"], use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(
                out.transpose(1, 2), batch["labels"][:, 1:], reduction="sum"
            ) / count  # fmt: skip
            loss.backward()
            seen[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return seen, {name: p.detach() for name, p in trained}


WHOLE = "model.modules_to_save=[lm_head,embed_tokens]"
KINDS = [
    *(("spare", setting) for setting in ("", "model.use_dora=True", WHOLE, "dataset.packed=True")),
    *(("grown", setting) for setting in ("", WHOLE)),
    ("tied", ""),
    ("tied-grown", ""),
]
QUICK = {("spare", ""), ("grown", WHOLE), ("tied-grown", "")}


@pytest.mark.parametrize(("kind", "setting"), some(KINDS, quick=QUICK))
def test_rows_are_trained_as_by_peft_and_serve_in_it(kind, setting, bases, tmp_path):
    cwd = linked(bases, kind, tmp_path / "run")
    more = (ADD, *filter(None, [setting]), *SIZES, "clip_grad_norm=1.0", "lr_scheduler=null")
    with started(*TINY, *more, "output_dir=out", cwd=cwd) as recipe:
        start = {n: p.detach().clone() for n, p in recipe.model.named_parameters()}
        expected, theirs = by_peft(recipe, start, setting == WHOLE, "dora" in setting)
        recipe.train()
        recipe.finish()
    if "packed" not in setting:  # there a step has other samples
        same_losses(losses(cwd / "out"), expected, rtol=1e-5)
    rows = [(n, v) for n, v in theirs.items() if "trainable_tokens" in n or "modules_to_save" in n]
    assert len(rows) == (1 if "tied" in kind else 2)
    files = load_file(cwd / "out" / "final" / "adapter_model.safetensors")
    for name, value in rows if "packed" not in setting else ():
        own = files[name.replace(".default", "").replace(".modules_to_save", "")]
        started_at = start_of(name, start)
        assert (own - value).norm() < 1e-3 * (value - started_at).norm()

    base, final, merged = cwd / "base", cwd / "out" / "final", cwd / "merged"
    adapter = read_adapter(final, config=read_config(base), base=base)
    assert [token["content"] for token in adapter.new_tokens] == NEW
    merge_into(merged, base, adapter)
    ours, tokenizer = load(base, final, dtype="fp32", device="cpu")
    ids = tokenizer.encode(TEXT)
    assert {397, 398, 399} < {*ids}
    for folder in (final, merged):
        assert AutoTokenizer.from_pretrained(folder).encode(TEXT, add_special_tokens=False) == ids
    peft = PeftModel.from_pretrained(in_transformers(base, adapter.vocabulary), final).eval()
    found = logits(ours, ids)
    torch.testing.assert_close(found, logits(peft, ids), rtol=0, atol=1e-5)
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    torch.testing.assert_close(found, logits(whole, ids), rtol=0, atol=1e-5)
    assert whole.config.tie_word_embeddings == ("tied" in kind)
    assert whole.config.vocab_size == (400 if "grown" in kind else 448)
    recipe.model.eval()
    torch.testing.assert_close(found, logits(recipe.model, ids), rtol=0, atol=1e-5)


def start_of(name, start):
    module = "output" if "lm_head" in name else "tok_embeddings"
    return start.get(f"{module}.new_rows", start[f"{module}.weight"])
