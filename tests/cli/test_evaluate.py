"""An evaluation measures what training measured, and what the models really answer."""

import json
import shutil
import tempfile
from contextlib import suppress

import pytest
from phi3_plugin.recipes import phi3_evaluate as recipe

from phi3_plugin.data.turns import make_turn
from phi3_plugin.errors import AdapterError, ConfigError, MissingFileError, OutputError
from phi3_plugin.evaluate import EVALUATION_FILES, Scorer
from phi3_plugin.generate import Generator
from phi3_plugin.load import load
from phi3_plugin.options import Sampling
from tests import warm
from tests.own import CONFIG, TINY, finished, full_config, merged

SHORT = "generation.max_new_tokens=12"


@pytest.fixture(scope="module")
def trained(inputs):
    """A run that held 10 of 40 chats out, and validated at its end."""
    settings = ("output_dir=run", "epochs=4", "optimizer.lr=1e-2", "val_fraction=0.25")
    rest = ("report=False", "save_every_epoch=False", "keep_best=False")
    return finished(*TINY, *settings, *rest, "gradient_accumulation_steps=1", cwd=inputs)


@pytest.fixture
def evaluate(cwd, trained, capsys):
    """Evaluate in this process; return what was printed, results.json and samples.jsonl."""

    def run(*settings, config=CONFIG, adapter=True):
        given = [f"adapter={trained / 'final'}"] * adapter
        cfg = merged(*TINY, "output_dir=eval", SHORT, *given, *settings, cwd=cwd, config=config)
        assert recipe.main.__wrapped__(cfg) == 0
        results = json.loads((cwd / "eval" / "results.json").read_text("utf-8"))
        lines = (cwd / "eval" / "samples.jsonl").read_text("utf-8").split("\n")[:-1]
        return capsys.readouterr().out, results, [json.loads(line) for line in lines]

    return run


def test_the_loss_is_that_of_the_last_validation(evaluate, trained, cwd):
    out, results, samples = evaluate("val_fraction=0.25", "answers=False", "dataset.packed=True")
    history = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    (told,) = [line["val_loss"] for line in history if "val_loss" in line]
    assert results["measures"]["loss"]["adapter"]["value"] == pytest.approx(told, rel=1e-5)
    assert len(samples) == results["samples"] < 40 and "exact" not in results["measures"]
    assert "rows.jsonl, held out by val_fraction=0.25." in out
    assert results["measures"]["loss"]["verdict"] == "better"
    assert {file.name for file in (cwd / "eval").iterdir()} == set(EVALUATION_FILES)


def test_answers_are_those_of_the_models(evaluate, cwd, trained):
    _, results, samples = evaluate("max_samples=5", "generation_batch_size=2", "batch_size=2")
    rows = [json.loads(line)["messages"] for line in (cwd / "rows.jsonl").read_text().splitlines()]
    scorer = Scorer()
    for name, adapter in (("base", None), ("adapter", trained / "final")):
        model, tokenizer = load(cwd / "base", adapter, dtype="fp32", device="cpu")
        generator = Generator(model, tokenizer, Sampling(max_new_tokens=12))
        for sample, (user, assistant) in zip(samples, rows, strict=False):
            turns = [make_turn("user", user["content"])]
            (prompt,) = tokenizer.tokenize_chats([turns], add_generation_prompt=True)
            answer = generator.answer(prompt.ids.tolist())
            expected = scorer.score(answer.text, assistant["content"]).values
            assert sample["reference"] == assistant["content"]
            assert sample["prompt"] == f"<|user|>\n{user['content']}<|end|>\n<|assistant|>\n"
            assert sample[name]["answer"] == answer.text and sample[name]["ended"] == answer.reason
            assert sample[name]["scores"] == pytest.approx(expected, abs=1e-4)
    for key, measure in results["measures"].items():
        if key in samples[0]["base"]["scores"] and key != "chrf":
            mean = sum(sample["adapter"]["scores"][key] for sample in samples) / 5
            assert measure["adapter"]["value"] == pytest.approx(mean, abs=1e-3)


def test_the_base_alone(evaluate):
    out, results, samples = evaluate("max_samples=3", adapter=False)
    assert "adapter" not in results["measures"]["loss"] and "adapter" not in samples[0]
    assert results["adapter"] is None and "The adapter" not in out
    assert out.startswith("Evaluation: 3 samples, 3 answers\nThe first 3 of 40 samples of")


def test_validation_data_of_its_own(evaluate, cwd):
    rows = (cwd / "rows.jsonl").read_text().splitlines(keepends=True)
    (cwd / "val.jsonl").write_bytes("".join(rows[:4]).replace("\n", "\r\n").encode())
    val = [f"dataset_val.source={cwd / 'val.jsonl'}"]
    val += ["dataset_val._component_=phi3_plugin.data.chat_dataset"]
    _, results, samples = evaluate(*val, "answers=False")
    places = [sample["where"] for sample in samples]
    assert places == [f"{cwd / 'val.jsonl'}:{i + 1}" for i in range(4)]
    assert results["evaluated"].endswith("val.jsonl, set as dataset_val.")


def test_a_whole_model_that_was_trained(evaluate, inputs, cwd):
    config = full_config(inputs)
    rest = ("max_steps=2", "report=False", "save_every_epoch=False")
    folder = finished(*untold(TINY), "output_dir=whole", *rest, cwd=inputs, config=config)
    _, results, _ = evaluate("max_samples=2", f"adapter={folder / 'final'}", adapter=False)
    assert results["measures"]["loss"]["difference"]["value"] != 0


def untold(settings):
    return [key for key in settings if "lora_dropout" not in key]


def test_a_base_in_nf4(evaluate):
    plain = evaluate("max_samples=2", "answers=False")[1]
    model = "model._component_=phi3_plugin.models.qlora_phi3"
    results = evaluate("max_samples=2", "answers=False", "overwrite=True", model)[1]
    assert (plain["base"], results["base"]) == ("fp32", "NF4")
    losses = [one["measures"]["loss"]["base"]["value"] for one in (plain, results)]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.parametrize(
    ("model", "quantized"),
    [
        ({"_component_": "phi3_plugin.models.lora_phi3"}, False),
        ({"_component_": "phi3_plugin.models.lora_phi3", "quantize_base": True}, True),
        ({"_component_": "phi3_plugin.models.qlora_phi3_mini"}, True),
        ({"_component_": "phi3_plugin.models.phi3"}, False),
    ],
)
def test_which_runs_train_over_nf4(model, quantized):
    assert recipe.is_quantized(model) == quantized


def test_everything_wrong_is_told_at_once(evaluate):
    wrong = ("adaptor=x", "answers=maybe", "worst=-1", "max_samples=0", "seed=-1", "generation=3")
    with pytest.raises(ConfigError) as error:
        evaluate(*wrong)
    lines = {line.partition(":")[0]: line for line in str(error.value).splitlines()}
    assert set(lines) == {"answers", "generation", "max_samples", "worst", "adaptor", "seed"}
    assert lines["adaptor"].endswith("Did you mean 'adapter'?")
    with pytest.raises(ConfigError, match=r"generation\.max_tokens: .*Did you mean 'max_new_to"):
        evaluate("generation.max_tokens=3")
    with pytest.raises(ConfigError, match=r"bacth_size: 3 .*Did you mean 'batch_size'"):
        evaluate("bacth_size=3")


def test_keys_of_training_do_not_matter(evaluate):
    evaluate("max_samples=1", "answers=False", "fsdp_replicas=2", "epochs=7", "resume=auto")


def test_an_earlier_evaluation_stays(evaluate, cwd):
    evaluate("max_samples=1", "answers=False")
    before = (cwd / "eval" / "results.json").read_bytes()
    with pytest.raises(OutputError, match="already holds an evaluation"):
        evaluate("max_samples=2", "answers=False")
    assert (cwd / "eval" / "results.json").read_bytes() == before
    assert evaluate("max_samples=2", "answers=False", "overwrite=True")[1]["samples"] == 2


def test_table_and_answers_are_there_whatever_fails(evaluate, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for cause in (OutputError("No space left on device"), RuntimeError()):

        def fail(*_, cause=cause):
            raise cause

        monkeypatch.setattr(recipe, "write_files", fail)
        with pytest.raises(type(cause)):
            evaluate("max_samples=2", "answers=False", "overwrite=True")
        out, error = capsys.readouterr()
        assert out.startswith("Evaluation: 2 samples")
        (file,) = tmp_path.glob("phi3_evaluate-*-samples.jsonl")
        assert f"The answers are kept in {file}." in error
        assert len(file.read_text().splitlines()) == 2
        file.unlink()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(RuntimeError):
        evaluate("max_samples=2", "answers=False", "overwrite=True")
    assert '"prompt"' in capsys.readouterr().out


def test_an_adapter_that_cannot_be_used_is_told_first(evaluate, cwd, trained, monkeypatch):
    monkeypatch.setattr(recipe, "evaluation_data", lambda *_, **__: pytest.fail("it went on"))
    with pytest.raises(MissingFileError, match=r"^adapter: .*nope is not there"):
        evaluate(f"adapter={cwd / 'nope'}")
    broken = shutil.copytree(trained / "final", cwd / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterError):
        evaluate(f"adapter={broken}")
    with pytest.raises(MissingFileError, match="is the folder of an adapter"):
        evaluate(f"checkpoint_dir={trained / 'final'}")
    with pytest.raises(OutputError, match="inside checkpoint_dir"):
        evaluate(f"output_dir={cwd / 'base' / 'eval'}")


def test_stopped_before_the_first_answer(evaluate, cwd, trained, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "answers", stop)
    cfg = merged(*TINY, "output_dir=eval", "max_samples=1", cwd=cwd)
    assert recipe.main.__wrapped__(cfg) == 130
    assert capsys.readouterr().err.endswith("phi3_evaluate: stopped.\n")
    assert not (cwd / "eval").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_the_base_has_answered_is_kept_if_the_adapter_fails(
    error, evaluate, cwd, trained, capsys, monkeypatch
):
    def broken(*args, models=recipe.models):
        for name, model in models(*args):
            if name == "adapter":
                raise error
            yield name, model

    cfg = merged(*TINY, "output_dir=eval", SHORT, f"adapter={trained / 'final'}", cwd=cwd)
    cfg.max_samples = 3
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "models", broken)
        with suppress(RuntimeError):
            assert recipe.main.__wrapped__(cfg) == 130
    out, said = capsys.readouterr()
    file = cwd / "eval" / "samples.jsonl.part"
    assert f"The answers so far are kept in {file}." in said
    answers = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [answer["model"] for answer in answers] == ["base"] * 3
    assert out.startswith("Evaluation: 3 samples") == (error is RuntimeError)  # its table
    assert not [name for name in EVALUATION_FILES if (cwd / "eval" / name).exists()]

    assert recipe.main.__wrapped__(cfg) == 0
    previous = cwd / "eval" / "samples.previous.jsonl"
    assert f"ended early here. Its 3 answers are in {previous} now." in capsys.readouterr().err
    assert [json.loads(line) for line in previous.read_text("utf-8").splitlines()] == answers
    samples = (cwd / "eval" / "samples.jsonl").read_text("utf-8").splitlines()
    known = {(a["where"], a["answer"]) for a in answers}
    assert {(s["where"], s["base"]["answer"]) for s in map(json.loads, samples)} == known
    assert not file.exists()


@pytest.mark.slow
def test_two_processes_find_the_same(evaluate, cwd, trained):
    settings = (*TINY, SHORT, f"adapter={trained / 'final'}", "max_samples=7", "batch_size=2")
    command = ("run", "--nproc_per_node", "2", "phi3_evaluate", "--config", CONFIG, *settings)
    whole = f"dataset.source={cwd / 'rows.jsonl'}"
    done = warm.run("tune", *command, whole, "output_dir=two", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("All of it: two/evaluation.html") == 1
    _, _, samples = evaluate("max_samples=7", "batch_size=2")
    two = (cwd / "two" / "samples.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in two] == samples
    numbers = [
        json.loads((cwd / name / "results.json").read_text("utf-8"))["measures"]
        for name in ("eval", "two")
    ]
    assert numbers[0] == numbers[1]
