"""One adapter and one merged model in each program that serves them; `make runtimes` has all."""

import pytest


def test_a_runtime_that_cannot_be_installed_is_one_line(tmp_path):
    from benchmarks import runtimes

    (tmp_path / "MLX").write_text("no folder")
    with pytest.raises(runtimes.NotInstalledError, match=r"-m venv .*: .*MLX") as error:
        runtimes.environment("MLX", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.runtimes
@pytest.mark.parametrize("name", ["PEFT 0.10", "PEFT", "vLLM", "llama.cpp", "ONNX", "MLX"])
def test_what_we_write_computes_the_same_in(name, tmp_path):
    from benchmarks import runtimes

    try:
        python = runtimes.environment(name, runtimes.ENVIRONMENTS, install=False)
    except runtimes.NotInstalledError as error:
        pytest.skip(str(error))
    run = runtimes.Run(tmp_path)
    run.models = runtimes.build_models(tmp_path, [("mini-4k", "all targets")])
    run.write({form for runtime, form in runtimes.COLUMNS if runtime == name})
    run.serve(name, python)
    assert len(run.outcomes) == sum(runtime == name for runtime, _ in runtimes.COLUMNS) >= 2
    rows, causes, unexplained = runtimes.cells(run, {})
    assert not unexplained and "refused" not in str(rows), (rows, causes)
    assert all("bits round" in cause for cause in causes), causes
