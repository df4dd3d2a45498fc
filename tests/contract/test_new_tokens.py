"""Tokens that a run adds: their ids are those of transformers, their rows are trained as by PEFT.

The base is tiny. Some have rows to spare, as most of the family; some have none, and must grow.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from phi3_plugin.recipes import phi3_evaluate
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from phi3_plugin.checkpoint.base import load_base_weights, to_peft
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.merge import merge_into
from phi3_plugin.config import read_config
from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.data.collate import pad_right
from phi3_plugin.data.turns import make_turn
from phi3_plugin.errors import AdapterError, CheckpointError, ConfigError
from phi3_plugin.load import load
from phi3_plugin.models.lora_settings import TARGETS
from tests import commands
from tests.chosen import examples, some
from tests.own import (
    RUN,
    TINY,
    assert_same_end,
    finished,
    full_config,
    leave_until,
    losses,
    merged,
    own_run,
    same,
    same_losses,
    same_weights,
    started,
    state,
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

    base, final, whole = cwd / "base", cwd / "out" / "final", cwd / "whole"
    adapter = read_adapter(final, config=read_config(base), base=base)
    assert [token["content"] for token in adapter.new_tokens] == NEW
    merge_into(whole, base, adapter)
    ours, tokenizer = load(base, final, dtype="fp32", device="cpu")
    ids = tokenizer.encode(TEXT)
    assert {397, 398, 399} < {*ids}
    for folder in (final, whole):
        assert AutoTokenizer.from_pretrained(folder).encode(TEXT, add_special_tokens=False) == ids
    peft = PeftModel.from_pretrained(in_transformers(base, adapter.vocabulary), final).eval()
    found = logits(ours, ids)
    torch.testing.assert_close(found, logits(peft, ids), rtol=0, atol=1e-5)
    alone = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    torch.testing.assert_close(found, logits(alone, ids), rtol=0, atol=1e-5)
    assert alone.config.tie_word_embeddings == ("tied" in kind)
    assert alone.config.vocab_size == (400 if "grown" in kind else 448)
    recipe.model.eval()
    torch.testing.assert_close(found, logits(recipe.model, ids), rtol=0, atol=1e-5)


def start_of(name, start):
    module = "output" if "lm_head" in name else "tok_embeddings"
    return start.get(f"{module}.new_rows", start[f"{module}.weight"])


FRAGMENTS = (*NEW, *(f" {token}" for token in NEW), "<|end|>", "<|assistant|>", " ", "\n", "a", "é")
CONTENT = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=6).map("".join)


@pytest.fixture(scope="session")
def both(supported):
    ours = phi3_tokenizer(supported, dropped="warn", add_tokens=NEW)
    theirs = AutoTokenizer.from_pretrained(supported)
    theirs.add_tokens(NEW)
    return ours, theirs


@given(turns=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), CONTENT), min_size=1))
@examples(40)
def test_ids_are_those_of_transformers_after_add_tokens(both, turns):
    ours, theirs = both
    chat = [make_turn(*turn) for turn in turns]
    plain = [{"role": role, "content": content} for role, content in turns]
    expected = theirs.apply_chat_template(plain, tokenize=True, return_dict=False)
    assert ours.tokenize_chats([chat])[0].ids.tolist() == expected
    assert {token.entry["content"]: i for i, token in ours.new_tokens.items()} == {
        token: theirs.convert_tokens_to_ids(token) for token in NEW
    }


def test_a_resumed_run_ends_in_the_same_bits_and_takes_no_other_tokens(bases, tmp_path):
    cwd, again = (linked(bases, "spare", tmp_path / name) for name in ("whole", "again"))
    settings = (*RUN, "val_fraction=0", "run_val_every_n_steps=null", "epochs=4")
    finished(*settings, ADD, cwd=cwd)
    leave_until(2, cwd / "out", again / "out")
    finished(*settings, ADD, "resume=auto", cwd=again)
    assert_same_end(again / "out", cwd / "out")
    leave_until(2, cwd / "out", tmp_path / "third" / "out")
    third = linked(bases, "spare", tmp_path / "third")
    for other in ("tokenizer.add_tokens=['<call>']", "tokenizer.add_tokens=null"):
        with (
            pytest.raises(CheckpointError, match=r"tokenizer\.add_tokens: .* before"),
            started(*settings, other, "resume=auto", cwd=third),
        ):
            pass


@pytest.mark.parametrize("kind", some(["spare", "grown", "tied-grown"], quick={"tied-grown"}))
def test_a_whole_model_is_trained_with_its_new_rows(kind, bases, tmp_path):
    cwd = linked(bases, kind, tmp_path / "run")
    full = full_config(tmp_path)
    settings = [s for s in TINY if "lora" not in s]
    with started(
        *settings, ADD, *SIZES, "save_every_n_steps=2", "output_dir=out", cwd=cwd, config=full
    ) as recipe:
        before = recipe.model.tok_embeddings.weight.detach().clone()
        recipe.train()
        recipe.finish()
    pieces = {i: token.pieces for i, token in recipe.new_tokens.items()}
    for number, ids in pieces.items():
        torch.testing.assert_close(before[number], before[ids].mean(dim=0))
    final = cwd / "out" / "final"
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    ids = recipe.data.tokenizer.encode(TEXT)
    assert AutoTokenizer.from_pretrained(final).encode(TEXT, add_special_tokens=False) == ids
    recipe.model.eval()
    torch.testing.assert_close(logits(recipe.model, ids), logits(model, ids), rtol=0, atol=1e-5)

    again = linked(bases, kind, tmp_path / "again")
    leave_until(2, cwd / "out", again / "out")
    finished(
        *settings,
        ADD,
        *SIZES,
        "save_every_n_steps=2",
        "output_dir=out",
        "resume=auto",
        cwd=again,
        config=full,
    )
    states, weights = (
        [read(place / "out" / "final") for place in (again, cwd)]
        for read in (state, load_base_weights)
    )
    assert same(*states)
    assert same(*weights)


def test_what_peft_trained_of_single_tokens_is_read_and_goes_on(bases, tmp_path, capsys):
    """A list is for the embedding alone; the folder has no note, and the tokenizer as saved."""
    cwd = linked(bases, "spare", tmp_path / "run")
    theirs = AutoTokenizer.from_pretrained(cwd / "base")
    theirs.add_tokens(NEW)
    peft = get_peft_model(
        in_transformers(cwd / "base", 448),
        LoraConfig(
            r=16, lora_alpha=32, target_modules=list(TARGETS), task_type="CAUSAL_LM",
            trainable_token_indices=[397, 398, 399],
        ),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    peft.eval().save_pretrained(cwd / "theirs")
    theirs.save_pretrained(cwd / "theirs")
    model, tokenizer = load(cwd / "base", cwd / "theirs", dtype="fp32", device="cpu")
    ids = tokenizer.encode(TEXT)
    assert ids == theirs.encode(TEXT, add_special_tokens=False)
    torch.testing.assert_close(logits(model, ids), logits(peft, ids), rtol=0, atol=1e-5)
    adapter = read_adapter(cwd / "theirs", config=read_config(cwd / "base"), base=cwd / "base")
    merge_into(cwd / "whole", cwd / "base", adapter)
    whole, _ = load(cwd / "whole", dtype="fp32", device="cpu")
    torch.testing.assert_close(logits(whole, ids), logits(peft, ids), rtol=0, atol=1e-5)

    capsys.readouterr()
    places = {"adapter": cwd / "theirs", "checkpoint_dir": cwd / "base", "output_dir": cwd / "in"}
    commands.adapter({"verb": "import", **{key: str(place) for key, place in places.items()}})
    printed = yaml.safe_load(capsys.readouterr().out.partition("\n")[2])
    assert printed["tokenizer"] == {"add_tokens": NEW}

    init = f"init_adapter={cwd / 'theirs'}"
    with (
        pytest.raises(AdapterError, match=r"tokenizer.add_tokens=\['<call>', '</call>', 'zork'\]"),
        started(*TINY, init, *SIZES, "output_dir=out", cwd=cwd),
    ):
        pass
    with started(*TINY, init, ADD, *SIZES, "output_dir=out", cwd=cwd) as recipe:
        recipe.model.eval()
        ours = logits(recipe.model, ids)
    # Theirs has no rows of the head: those start at the mean
    kept = [i for i in range(448) if i not in recipe.new_tokens]
    torch.testing.assert_close(ours[..., kept], logits(peft, ids)[..., kept], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("indices", "said"),
    [
        ({"embed_tokens": [1, 2]}, r"tok_embeddings: its rows are \[3, 256\], expected \[2, 256\]"),
        ({"embed_tokens": [1, 2, 10**15]}, "is for a base of 1000000000000001 rows"),
        ({"embed_tokens": [1, 2, 448]}, "has not all others of lm_head"),
        ({"embed_tokens": [1, 2, 2]}, "trainable_token_indices: .* must be a list"),
        ({"embed_tokens": [1, 2, -3]}, "trainable_token_indices: .* must be a list"),
        ({"lm_head": [1, 2, 3]}, "output: its rows are missing"),
    ],
)
def test_rows_that_nobody_could_put_somewhere_are_refused(indices, said, bases, tmp_path):
    base = bases / "spare" / "base"
    how = {"target_modules": ["o_proj"], "trainable_token_indices": [1, 2, 3]}
    get_peft_model(in_transformers(base, 448), LoraConfig(**how)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    keys = json.loads(file.read_text("utf-8"))
    assert read_adapter(tmp_path, config=read_config(base)).rows["tok_embeddings"].keys() == {
        1,
        2,
        3,
    }
    file.write_text(json.dumps({**keys, "trainable_token_indices": indices}), "utf-8")
    with pytest.raises(AdapterError, match=said):
        read_adapter(tmp_path, config=read_config(base))


@pytest.mark.parametrize("replicas", some([1, 2], quick=[]))
def test_one_process_and_two_are_one_run(replicas, bases, tmp_path):
    cwd = linked(bases, "grown", tmp_path / "run")
    settings = (*TINY, ADD, "epochs=2", "model.quantize_base=True")
    one = finished(
        *settings, "batch_size=4", "gradient_accumulation_steps=1", "output_dir=one", cwd=cwd
    )
    sizes = ("batch_size=1", "gradient_accumulation_steps=2", f"fsdp_replicas={replicas}")
    done = own_run(*settings, *sizes, "output_dir=two", cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr
    same_losses(losses(cwd / "two"), losses(one))
    files = [load_file(out / "final" / "adapter_model.safetensors") for out in (one, cwd / "two")]
    same_weights(*files)


def test_commands_take_the_tokens_from_the_folder(bases, tmp_path, monkeypatch, capsys):
    """An evaluation's base has the rows that training started from; answers are those of PEFT."""
    monkeypatch.chdir(linked(bases, "grown", tmp_path / "run"))
    cwd = Path.cwd()
    one = ("batch_size=11", "gradient_accumulation_steps=1", "max_steps=4", "prove=True")
    out = finished(*TINY, *one, ADD, "output_dir=out", cwd=cwd)
    assert "Proof: " in capsys.readouterr().out
    adapter = f"adapter={out / 'final'}"
    measured = ("output_dir=eval", adapter, "answers=False", "batch_size=11")
    assert phi3_evaluate.main.__wrapped__(merged(*TINY, *measured, cwd=cwd)) == 0
    results = json.loads((cwd / "eval" / "results.json").read_text("utf-8"))
    assert results["measures"]["loss"]["base"]["value"] == pytest.approx(losses(out)[0], rel=1e-5)
    with pytest.raises(ConfigError, match="add_tokens"):
        other = ("output_dir=other", "tokenizer.add_tokens=['<else>']")
        phi3_evaluate.main.__wrapped__(merged(*TINY, *measured, *other, cwd=cwd))

    files = {"checkpoint_dir": "base", "adapter": str(out / "final")}
    assert commands.adapter({"verb": "merge", **files, "output_dir": "merged"}) == 0
    assert commands.adapter({"verb": "check", **files}) == 0
    assert "resize_token_embeddings(400), then PeftModel" in capsys.readouterr().out
    assert commands.adapter({"verb": "import", **files, "output_dir": "taken"}) == 0
    assert f"add_tokens: {NEW}" in capsys.readouterr().out
    for name in ("torchtune", "loralib.pt"):
        with pytest.raises(AdapterError, match="tok_embeddings"):
            to = name.partition(".")[0]
            commands.adapter({"verb": "convert", **files, "to": to, "output_dir": name})

    prompt = "Add: one <call> two zork"
    asked = {**files, "prompt": [prompt], "dtype": "fp32", "max_new_tokens": 8}
    assert commands.generate(asked) == 0
    answer = capsys.readouterr().out
    theirs = AutoTokenizer.from_pretrained("merged")
    chat = [{"role": "user", "content": prompt}]
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert {397, 399} < {*ids}
    model = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    said = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert answer.strip() == theirs.decode(said, skip_special_tokens=True).strip()
