"""How onnxruntime-genai's builder is called: with a builder that writes down what it was given."""

import json
import os

import pytest

from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.onnx import merge_onnx, write_onnx
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError, CheckpointError, MissingFileError, OutputError
from tests.adapters import PARTS, WHOLE, adapter, base_folder, same

BUILDER = """
import json, os, pathlib, shutil, sys

out = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
given = pathlib.Path(sys.argv[sys.argv.index("-i") + 1])
if "{failure}":
    (out / "model.onnx").write_text("half")
    print("loading")
    sys.exit("{failure}")
said = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "offline": os.environ["HF_HUB_OFFLINE"]}}
said["files"] = [file.name for file in given.iterdir() if file.is_file()]
said["dtype"] = json.loads((given / "config.json").read_text())["torch_dtype"]
(out / "genai_config.json").write_text(json.dumps(said))
for option in sys.argv[sys.argv.index("--extra_options") + 1 :]:
    key, _, value = option.partition("=")
    if key == "adapter_path":
        shutil.copytree(value, out / "copied")
for name in {written}:
    (out / name).write_text("made")
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder("gqa", tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def builder(tmp_path, monkeypatch):
    """Install a builder; it is given by how it fails, and what it writes."""

    def install(failure="", written=("model.onnx", "tokenizer.json")):
        package = tmp_path / "packages" / "onnxruntime_genai" / "models"
        package.mkdir(parents=True)
        for folder in (package, package.parent):
            (folder / "__init__.py").touch()
        text = BUILDER.format(failure=failure, written=list(written))
        (package / "builder.py").write_text(text)
        for name in ("onnx", "onnx_ir"):
            (tmp_path / "packages" / f"{name}.py").touch()
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))
        return tmp_path / "out"

    return install


def test_an_adapter_beside_the_base_is_given_as_peft_has_it(base, builder):
    out, made = builder(), adapter(read_config(base), PARTS, (4, 8), (3.0, 0.37))
    write_onnx(out, base, "int4", made)
    said = json.loads((out / "genai_config.json").read_text())
    words = said["argv"]
    assert words[words.index("-i") + 1].endswith("/work/base")
    assert said["dtype"] == "float32"  # as the base is stored; its config.json says bfloat16
    assert "model.safetensors.index.json" in said["files"]
    assert words[words.index("-p") + 1] == "int4" and words[words.index("-e") + 1] == "cpu"
    options = words[words.index("--extra_options") + 1 :]
    assert options[:2] == ["hf_token=false", "windowed_kv_cache=false"]
    assert options[2].startswith("adapter_path=")
    assert said["offline"] == "1"
    assert same(read_adapter(out / "copied", config=read_config(base), base=base), made)
    cache = words[words.index("-c") + 1]
    assert not os.path.exists(said["cwd"]) and not os.path.exists(cache)
    assert {file.name for file in out.iterdir()} == {
        *("model.onnx", "genai_config.json", "tokenizer.json", "copied"),
    }
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


def test_a_merged_model_is_given_in_its_place(base, builder):
    out = builder()
    made = adapter(read_config(base), (*WHOLE, "output", "tok_embeddings"))
    merge_onnx(out, base, made, "fp32")
    said = json.loads((out / "genai_config.json").read_text())
    words = said["argv"]
    assert words[words.index("-i") + 1].endswith("/work/merged")
    assert said["dtype"] == "float32"
    options = ["hf_token=false", "windowed_kv_cache=false"]
    assert words[words.index("--extra_options") + 1 :] == options
    assert not (out / "work").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dora": True}, "magnitude: DoRA's are passed over"),
        ({"inner": "output"}, "output: an adapter on embedding or head"),
        ({"inner": "tok_embeddings"}, "tok_embeddings: an adapter on embedding or head"),
        ({"saved": "output.weight"}, r"output\.weight: weights or rows"),
        ({"rows": "tok_embeddings"}, "tok_embeddings: weights or rows of them that are trained"),
    ],
)
def test_what_the_builder_would_pass_over_is_to_be_merged(base, builder, keys, message):
    import torch

    out = builder()
    inner = (*WHOLE, keys["inner"]) if "inner" in keys else WHOLE
    saved = {keys["saved"]: torch.ones(160, 64)} if "saved" in keys else {}
    rows = {keys["rows"]: {3: torch.ones(64)}} if "rows" in keys else {}
    made = adapter(read_config(base), inner, dora=keys.get("dora", False), saved=saved, rows=rows)
    with pytest.raises(AdapterError, match=message) as error:
        write_onnx(out, base, "int4", made)
    assert "adapter merge --to onnx" in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"failure": "no such operator"}, "builder ended with an error:\n  loading\n  no such"),
        ({"written": ["model.onnx"]}, "builder ended with an error"),
    ],
)
def test_nothing_is_left_of_a_model_that_the_builder_did_not_make(base, builder, how, message):
    out = builder(**how)
    with pytest.raises(CheckpointError, match=message):
        merge_onnx(out, base, adapter(read_config(base), WHOLE), "int4")
    assert [path.name for path in out.parent.iterdir()] == ["packages"]


def test_a_folder_that_is_there_stays(base, builder):
    out = builder()
    out.mkdir()
    with pytest.raises(OutputError, match="exists and would be overwritten"):
        write_onnx(out, base, "int4", adapter(read_config(base), WHOLE))
    assert not list(out.iterdir())


def test_without_the_packages_the_message_says_what_to_install(base, tmp_path, monkeypatch):
    monkeypatch.setattr("phi3_plugin.checkpoint.onnx.find_spec", found_but("onnx_ir", "onnx"))
    with pytest.raises(MissingFileError, match=r"pip install onnx onnx-ir$"):
        write_onnx(tmp_path / "out", base, "int4", None)
    assert not list(tmp_path.iterdir())


def found_but(*missing):
    return lambda name: None if name in missing else object()
