"""docs/lm_eval.md: EleutherAI's harness with our adapters, its commands and what they measure."""

import json

import pytest
from phi3_plugin.recipes import phi3_demo_checkpoint

from phi3_plugin.checkpoint.peft import export_adapter
from phi3_plugin.config import read_config
from phi3_plugin.proof import load_with_peft
from tests.adapters import PARTS, adapter
from tests.cli.test_docs import ROOT, blocks, shell
from tests.own import WORDS

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'phi3-plugin[lm_eval]'")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "lm_eval.md"
BASE, ADAPTER, MERGED = "Phi-3-mini-4k", "my_adapter/epoch_0", "my_model"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A reader's folder: a base whose vocabulary is padded, an adapter, one on the head, a task."""
    folder = tmp_path_factory.mktemp("reader")
    phi3_demo_checkpoint.build_checkpoint(folder / BASE, words=WORDS)
    for name, modules in ((ADAPTER, PARTS), ("on_head", ("attn.qkv_proj", "output"))):
        (folder / name).mkdir(parents=True)
        numbers = adapter(read_config(folder / BASE), modules, (4, 2), (1.0, 0.5))
        export_adapter(folder / name, numbers, checkpoint_dir=folder / BASE, card={})
    (folder / "my_tasks").mkdir()
    (task,), (row,) = blocks(PAGE, "yaml"), blocks(PAGE, "json")
    (folder / "my_tasks" / "sums.yaml").write_text(task, "utf-8")
    (folder / "my_tasks" / "sums.jsonl").write_text(row, "utf-8")
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))


def loaded(pretrained, **keys):
    return HFLM(pretrained=pretrained, dtype="float32", device="cpu", **keys)


def score(lm, question="2 + 2 =", choice=" 4"):
    request = Instance("loglikelihood", {}, (question, choice), 0)
    ((logarithm, _),) = lm.loglikelihood([request], disable_tqdm=True)
    return logarithm


def test_the_commands_of_the_page_run(place, offline):
    for code in blocks(PAGE, "sh"):
        if not code.startswith("pip install"):
            shell(code, place)
    measured = [json.loads(file.read_text("utf-8")) for file in place.rglob("results_*.json")]
    models = [results["config"]["model_args"] for results in measured]
    assert {(args["pretrained"], args.get("peft")) for args in models} == {
        (BASE, ADAPTER),
        (MERGED, None),
        (BASE, None),
    }
    for results in measured:
        assert results["results"]["my_sums"]["acc,none"] in (0, 1)
        assert results["chat_template"]


def test_a_merged_adapter_is_measured_with_all_rows_and_peft_with_fewer(place):
    shell(f"phi3-tune adapter merge {ADAPTER} --base {BASE} --output merged", place)
    base, made = str(place / BASE), str(place / ADAPTER)
    exact = score(loaded(load_with_peft(base, made), tokenizer=base))
    assert score(loaded(str(place / "merged"))) == pytest.approx(exact, abs=1e-4)
    beside = loaded(base, peft=made)
    rows = beside.model.get_input_embeddings().weight.shape[0]
    assert rows == len(beside.tokenizer) < read_config(base).vocab_size
    assert score(beside) > exact + 1e-2  # the same logits, of which fewer share the probability


def test_an_adapter_on_the_head_loads_only_merged(place):
    with pytest.raises(RuntimeError, match="size mismatch"):
        loaded(str(place / BASE), peft=str(place / "on_head"))
    shell(f"phi3-tune adapter merge on_head --base {BASE} --output merged_head", place)
    loaded(str(place / "merged_head"))


def test_an_empty_stop_text_ends_an_answer_after_one_token(place):
    lm = loaded(str(place / BASE))
    answers = []
    for until, most in (("", 6), ("no such text", 1), ("no such text", 6)):
        ask = {"until": [until], "max_gen_toks": most}
        request = Instance("generate_until", {}, ("one plus two", ask), 0)
        answers += lm.generate_until([request], disable_tqdm=True)
    assert answers[0] == answers[1] != answers[2]


def test_a_question_that_goes_on_as_another_is_scored_rightly_without_the_cache(place):
    pairs = [("Add: one plus two", " four five"), ("Add: one plus two four", " five")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    together = {}
    for cached in (True, False):
        lm = loaded(str(place / BASE), logits_cache=cached)
        together[cached] = lm.loglikelihood(requests, disable_tqdm=True)[1][0]
    alone = score(lm, *pairs[1])
    assert together[False] == pytest.approx(alone, abs=1e-4)
    assert together[True] != pytest.approx(alone, abs=1e-4)
