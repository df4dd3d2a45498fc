"""Every command and every piece of code in the documentation, run as it stands.

A tiny checkpoint has the name that the pages give it. Six things differ from a reader's
machine: downloads are only parsed, the distributed recipe runs under the test driver that swaps
NCCL for gloo, torchtune's full-size split model is replaced by a tiny one, training ends after two
steps, answers after 16 tokens, and where the CPU has no instructions for bf16, which is then many
times slower, training is in fp32.
"""

import csv
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests import warm
from tests.assets import assets_dir
from tests.stock import tiny_checkpoint
from tests.variants import PHI4_MINI_REASONING, edit_json

pytestmark = [pytest.mark.assets, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DRIVER = f"torchrun --standalone --nproc_per_node 2 {ROOT / 'tests' / 'stock_distributed.py'}"
OFTEN = ("README", "recipe", "evaluate", "generate", "inspect", "serving", "speed")
"""Pages that every run of the tests types; `make test-all` types the others too."""
PUBLISHED = "microsoft/Phi-3-mini-4k-instruct"
NOT_RUN = ("make demo", "pip install")  # the demo has a test of its own; installing needs a network

TINY_SPLIT = """
from torchtune.models.phi3._component_builders import lora_phi3

def lora_phi3_mini(lora_attn_modules, apply_lora_to_mlp, apply_lora_to_output, **keys):
    return lora_phi3(
        lora_attn_modules, apply_lora_to_mlp, apply_lora_to_output, vocab_size=32064, num_layers=2,
        num_heads=4, num_kv_heads=4, embed_dim=256, intermediate_dim=512, max_seq_len=4096,
        norm_eps=1e-5, **keys,
    )
"""


def blocks(page, *languages):
    return [code for language, code in BLOCK.findall(page.read_text()) if language in languages]


def as_run_here(code):
    code = re.sub(r"tune run --nproc_per_node 2 lora_finetune_distributed", DRIVER, code)
    code = re.sub(r"(stock_distributed\.py --config) (\w+)", rf"\1 {ROOT}/configs/\2.yaml", code)
    code = code.replace("torchtune.models.phi3.lora_phi3_mini", "tiny_split.lora_phi3_mini")
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        code = re.sub(
            r"(--config [\w/.-]*phi[34]_(?!adapter|generate)[\w.-]+)", r"\1 dtype=fp32", code
        )
    code = re.sub(r"(phi3_lora_finetune --config [\w/.-]+)", r"\1 max_steps=2", code)
    code = re.sub(
        r"( (?:lora|knowledge)_\w+_device --config [\w/.-]+)", r"\1 max_steps_per_epoch=2", code
    )
    code = re.sub(r"(phi3-tune train \S+)", r"\1 max_steps=2", code)
    code = re.sub(r"(phi3-tune train (?!.*--base))", r"\1--base Phi-3-mini-4k ", code)
    code = re.sub(r"(evaluate --config \S+config.yaml)", r"\1 generation.max_new_tokens=16", code)
    code = re.sub(r"^(tune download|pip install|python3 -m venv) .*$", "", code, flags=re.MULTILINE)
    code = code.replace(PUBLISHED, "Phi-3-mini-4k")
    code = code.replace("phi3-tune generate ", "phi3-tune generate --max-new-tokens 16 ")
    code = code.replace("--config phi3_generate ", "--config phi3_generate max_new_tokens=16 ")
    return code


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as a reader has it: a checkpoint, 40 chats, a table of pairs, an adapter."""
    cwd = tmp_path_factory.mktemp("reader")
    tiny_checkpoint(cwd / "Phi-3-mini-4k", hidden_size=256, intermediate_size=512)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    tiny_checkpoint(cwd / "Phi-3-medium-4k", **sizes)
    with_longrope(shutil.copytree(cwd / "Phi-3-mini-4k", cwd / "Phi-3.5-mini"))
    thinking = shutil.copytree(cwd / "Phi-3.5-mini", cwd / "Phi-4-mini-reasoning")
    edit_json(thinking / "tokenizer_config.json", chat_template=PHI4_MINI_REASONING)
    lines = (assets_dir() / "data" / "gsm8k_train.jsonl").read_text("utf-8").splitlines()
    shortest = map(json.loads, sorted(lines, key=len)[:40])
    # Of an answer the last line, its number: the head over 32,064 tokens takes most of the time
    pairs = [(row["question"], row["answer"].splitlines()[-1]) for row in shortest]
    with (cwd / "my_chats.jsonl").open("w", encoding="utf-8") as file:
        for question, answer in pairs:
            turns = (("user", question), ("assistant", answer))
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    with (cwd / "my_thoughts.jsonl").open("w", encoding="utf-8") as file:
        for question, answer in pairs:
            said = {"role": "assistant", "content": answer, "reasoning_content": question}
            messages = [{"role": "user", "content": question}, said]
            file.write(json.dumps({"messages": messages}) + "\n")
    with (cwd / "my_preferences.jsonl").open("w", encoding="utf-8") as file:
        for question, answer in pairs:
            row = {"prompt": question, "chosen": answer, "rejected": question}
            file.write(json.dumps(row) + "\n")
    (cwd / "my_texts").mkdir()
    for number, (question, answer) in enumerate(pairs):
        (cwd / "my_texts" / f"{number}.txt").write_text(f"{question}\n\n{answer}\n", "utf-8")
    with (cwd / "my_pairs.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("ask", "reply"), *pairs])
    (cwd / "tiny_split.py").write_text(TINY_SPLIT)
    shell(as_run_here(blocks(PAGES[0], "bash")[1]), cwd)
    return cwd


def with_longrope(folder):
    """Make a checkpoint one of 3.5, as far as positions go."""
    file = folder / "config.json"
    keys = json.loads(file.read_text())
    pairs = keys["hidden_size"] // keys["num_attention_heads"] // 2
    factors = {"short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs}
    longer = {"max_position_embeddings": 131072, "rope_scaling": {"type": "longrope", **factors}}
    file.write_text(json.dumps({**keys, **longer}))


def shell(code, cwd):
    done = warm.run("bash", "-euo", "pipefail", "-c", code, cwd=cwd)
    assert done.returncode == 0, f"{code}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def often(page):
    return page.stem in OFTEN


def marks(page):
    return () if often(page) else pytest.mark.exhaustive


def commands():
    """Return each block of commands once, under the first page that has it."""
    found = {}
    for page in (*filter(often, PAGES), *PAGES):
        for i, code in enumerate(blocks(page, "bash")):
            if code.startswith(NOT_RUN) or code == blocks(PAGES[0], "bash")[1]:
                continue  # the README's second block is that of the fixture
            if code not in found:
                rare = marks(page) or (pytest.mark.exhaustive if "AdamW8bit" in code else ())
                if "TensorBoardLogger" in code and find_spec("tensorboard") is None:
                    rare = pytest.mark.skip("needs the extra 'tensorboard'")
                found[code] = pytest.param(code, id=f"{page.stem}-{i}", marks=rare)
    return list(found.values())


@pytest.mark.parametrize("code", commands())
def test_commands_run(code, place):
    shell(as_run_here(code), place)


def test_every_run_left_an_adapter(place):
    """Runs last in this file: what the commands above wrote."""
    for output in (*place.glob("out_*"), place / "my_adapter"):
        final = output / ("final" if (output / "metrics.jsonl").exists() else "epoch_0")
        weights = (
            "model.safetensors.index.json" if "full" in output.name else "adapter_model.safetensors"
        )
        assert (final / weights).is_file(), output


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=marks(page))
        for page in PAGES
        if blocks(page, "python")
    ],
)
def test_python_code_runs(page, place):
    code = "\n".join(blocks(page, "python")).replace(PUBLISHED, "Phi-3-mini-4k")
    done = warm.run("python", "-c", code, cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "command",
    [
        line
        for page in PAGES
        for code in blocks(page, "bash", "sh")
        for line in code.replace("\\\n", " ").splitlines()
        if line.startswith(("tune download", "tune run --nnodes", "tune run --nproc_per_node 8"))
    ],
)
def test_commands_that_need_a_network_are_spelled_right(command):
    import shlex

    from torchtune._cli.tune import TuneCLIParser

    arguments = TuneCLIParser()._parser.parse_args(shlex.split(command)[1:])
    assert arguments.func.__name__ in ("_download_cmd", "_run_cmd")


def test_configs_say_the_same_commands_as_the_readme():
    for file in set((ROOT / "configs").glob("*.yaml")) - {ROOT / "configs" / "phi3_demo.yaml"}:
        header = file.read_text().partition("checkpoint_dir: null")[0]
        assert f"--config {file.stem} " in header
        if "Phi-3-mini-4k" in header:
            assert blocks(ROOT / "docs" / "torchtune.md", "bash")[0].splitlines()[0] in header


def test_each_member_of_the_family_has_its_configs():
    page = (ROOT / "docs" / "family.md").read_text()
    listed = re.findall(r"`(phi\w+_lora)`, `(\w+)`", page)
    assert len(listed) == 9
    for one, other in listed:
        assert other == one.replace("_lora", "_qlora")
        headers = [(ROOT / "configs" / f"{name}.yaml").read_text() for name in (one, other)]
        assert len({re.search(r"microsoft/\S+", header).group() for header in headers}) == 1
