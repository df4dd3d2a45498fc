"""`phi3-tune import-config`: the file that it writes, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from phi3_plugin import settings
from phi3_plugin.errors import ConfigError, MissingFileError, OutputError
from phi3_plugin.import_config import run
from phi3_plugin.options import ImportConfigOptions

NOTEBOOK = ["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]


@pytest.fixture
def sample(tmp_path):
    training = {"bf16": True, "learning_rate": 1e-4, "log_level": "info", "output_dir": "out"}
    peft = {"r": 16, "lora_alpha": 16, "target_modules": NOTEBOOK, "task_type": "CAUSAL_LM"}
    file = tmp_path / "sample.json"
    file.write_text(json.dumps({"training_config": training, "peft_config": peft}))
    return file


def given(sample, **more):
    out = sample.with_name("my.yaml")
    return out, ImportConfigOptions(sample=sample, output=out, **more)


def test_the_yaml_is_one_of_ours(sample, capsys, tmp_path):
    out, options = given(sample, targets="as-intended")
    assert run(options) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Wrote {out}."
    assert f"--config {out} " in out.read_text() and "--targets as-intended" in out.read_text()
    (tmp_path / "config.json").write_text("{}")
    more = {"checkpoint_dir": str(tmp_path), "dataset": {"source": "chats.jsonl"}}
    read = settings.read(OmegaConf.merge(OmegaConf.load(out), more))
    assert read.model["lora_attn_modules"] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def test_what_is_lost_is_said_on_the_screen_and_in_the_file(sample, capsys):
    out, options = given(sample)
    run(options)
    for text in (capsys.readouterr().out, out.read_text()):
        assert "these match nothing in a Phi-3: k_proj, q_proj, v_proj, gate_proj, up_proj" in text
        assert "log_level: 'info' has no effect" in text


def test_what_is_refused(sample, tmp_path):
    out, options = given(sample)
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        run(options)
    assert out.read_text() == "mine"
    with pytest.raises(MissingFileError, match="is not there"):
        run(replace(options, sample=tmp_path / "none.json"))
    for text, match in (("{", "not valid JSON"), ("[]", "must hold a JSON"), ("{}", "has no")):
        sample.write_text(text)
        with pytest.raises(ConfigError, match=match):
            run(replace(options, output=tmp_path / "other.yaml"))
    assert not (tmp_path / "other.yaml").exists()


def test_what_building_the_model_would_refuse_is_refused_now(sample):
    peft = {"r": 4, "target_modules": ["o_proj"], "modules_to_save": ["norm"]}
    sample.write_text(json.dumps({"training_config": {}, "peft_config": peft}))
    out, options = given(sample)
    with pytest.raises(ConfigError, match="modules_to_save: 'norm' cannot be trained whole"):
        run(options)
    assert not out.exists()


def test_a_key_that_is_there_twice_is_refused(sample):
    sample.write_text('{"training_config": {"seed": 1, "seed": 2}, "peft_config": {}}')
    out, options = given(sample)
    with pytest.raises(ConfigError, match="not valid JSON: 'seed' is there twice"):
        run(options)
    assert not out.exists()


def test_a_disk_that_is_full_leaves_nothing(sample, monkeypatch):
    out, options = given(sample)
    opened = Path.open

    def full(self, *words, **keys):
        file = opened(self, *words, **keys)
        return open("/dev/full", "wb") if self.name.startswith(".") else file

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OutputError, match=r"could not be written.*No space left"):
        run(options)
    assert not out.exists()
