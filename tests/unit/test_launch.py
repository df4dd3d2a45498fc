"""The launcher under `tune run`: which nodes it refuses, and whom a signal reaches."""

import signal
import sys
import threading
import time

import pytest
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from phi3_plugin.launch import STOPPED, ending_at_once, signals_for_workers

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # pytest has it

STOCK = PContext.start
BOTH = (signal.SIGTERM, signal.SIGINT)
ALL = (*BOTH, signal.SIGHUP)
OURS = ("phi3_lora_finetune", "phi3_plugin/recipes/lora_finetune.py")
OTHERS = ("lora_finetune_distributed", "folder/mine.py", "phi3_plugin/recipes/phi3_demo.py")

# Workers that say when they can be signalled, and what they got.
LISTENING = """
import pathlib, signal, sys, time
me = pathlib.Path(sys.argv[1])
def stop(number, frame):
    me.write_text(signal.Signals(number).name)
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, stop)
me.touch()
time.sleep(60)
"""
DEAF = LISTENING.replace(", stop)", ", signal.SIG_IGN)")
DONE = "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()"


@pytest.fixture(autouse=True)
def handlers():
    numbers = (*ALL, signal.SIGQUIT)  # torchrun's
    before = {number: signal.getsignal(number) for number in numbers}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def start(tmp_path):
    """Start one worker a script as torchrun does, and wait until each of them is there."""
    started = []

    def start(*scripts: str) -> PContext:
        files = [tmp_path / f"worker{rank}" for rank in range(len(scripts))]
        args = {rank: ("-S", "-c", code, files[rank]) for rank, code in enumerate(scripts)}
        logs = DefaultLogsSpecs(log_dir=str(tmp_path / "logs"))
        envs = {rank: {} for rank in args}
        started.append(start_processes("test", sys.executable, args, envs, logs))
        end = time.monotonic() + 60
        while not all(file.exists() for file in files):
            assert time.monotonic() < end
            time.sleep(0.01)
        return started[-1]

    yield start
    for workers in started:
        workers.close(signal.SIGKILL)


def heard(folder) -> list[str]:
    return [file.read_text() for file in sorted(folder.glob("worker*"))]


@pytest.mark.parametrize("number", ALL, ids=lambda number: number.name)
def test_the_first_signal_is_for_the_workers(start, number, tmp_path, capfd):
    with signals_for_workers():
        workers = start(LISTENING, LISTENING)
        signal.raise_signal(number)
        result = workers.wait(timeout=30, period=0.05)
    assert result and not result.is_failed()
    assert heard(tmp_path) == ["SIGTERM"] * 2  # which ends one that is not listening at once
    assert f"phi3_plugin: {number.name} goes to the workers" in capfd.readouterr().err


@pytest.mark.parametrize("first", BOTH, ids=lambda number: number.name)
@pytest.mark.parametrize("second", BOTH, ids=lambda number: number.name)
def test_the_second_signal_ends_them_and_the_command(start, first, second, capfd):
    with pytest.raises(SystemExit) as ended, signals_for_workers():
        workers = start(DEAF)
        signal.raise_signal(first)
        assert workers.wait(timeout=0.2, period=0.05) is None
        signal.raise_signal(second)
    assert ended.value.code == STOPPED
    assert capfd.readouterr().err.endswith(f"phi3_plugin: {second.name}: stopped at once.\n")


def test_a_worker_that_has_ended_is_left_out(start, tmp_path):
    with signals_for_workers():
        workers = start(DONE, LISTENING)
        workers.subprocess_handlers[0].proc.wait()
        signal.raise_signal(signal.SIGTERM)
        result = workers.wait(timeout=30, period=0.05)
    assert result and not result.is_failed()
    assert heard(tmp_path) == ["", "SIGTERM"]


def test_workers_started_anew_get_the_signal(start, tmp_path):
    with signals_for_workers():
        first = start(DEAF)
        first.close(signal.SIGKILL)
        (tmp_path / "worker0").unlink()
        workers = start(LISTENING)
        signal.raise_signal(signal.SIGTERM)
        assert not workers.wait(timeout=30, period=0.05).is_failed()
    assert heard(tmp_path) == ["SIGTERM"]


def test_after_a_signal_no_worker_is_started_anew(start):
    with signals_for_workers():
        start(DEAF)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(SignalException, match="Not restarted after SIGINT"):
            start(LISTENING)  # torchrun takes it as its own


def test_only_signals_that_torchrun_handles_are_passed_on(start, handlers, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM")
    with signals_for_workers():
        start(DEAF)
    assert signal.getsignal(signal.SIGINT) is handlers[signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) is not handlers[signal.SIGTERM]


def test_a_launcher_in_a_thread_is_left_alone(start, handlers):
    with signals_for_workers():
        thread = threading.Thread(target=start, args=(DEAF,))
        thread.start()
        thread.join()
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_torchrun_is_unchanged_afterwards(start):
    with signals_for_workers():
        pass
    assert PContext.start is STOCK
    start(DEAF)
    with pytest.raises(SignalException):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("codes", "asked", "end"),
    [
        ((130, 130), True, 130),
        ((-signal.SIGTERM, 130), True, 130),
        ((1, 130), True, 130),
        ((1, 1), False, 1),
        ((3, -signal.SIGTERM), False, 3),  # the others are ended by torchrun
        ((-signal.SIGKILL, 1), False, None),
        ((-signal.SIGTERM, -signal.SIGTERM), True, 130),  # they were not listening yet
        ((-signal.SIGTERM, -signal.SIGTERM), False, None),
    ],
)
def test_what_workers_have_said_is_not_said_again(start, codes, asked, end, capfd):
    failures = {
        rank: ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="none")
        for rank, code in enumerate(codes)
    }
    for rank, failure in failures.items():
        failure.timestamp = rank  # when it was seen; the first one is the cause
    kind = ChildFailedError if end is None else SystemExit
    with pytest.raises(kind) as ended, signals_for_workers():
        start(DEAF)
        if asked:
            signal.raise_signal(signal.SIGINT)
        raise ChildFailedError("recipe", failures)
    assert end is None or ended.value.code == end
    is_said = end == STOPPED and codes[0] != STOPPED  # which the first one does, for all
    assert capfd.readouterr().err.endswith("phi3_plugin: SIGINT: stopped.\n") == is_said


@pytest.fixture
def launch(monkeypatch, tmp_path):
    """Run `tune` or `phi3-tune` up to torchrun, and return what a launcher would start with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # importing `tune` sets ours
    monkeypatch.setattr(sys, "path", [*sys.path])  # `run` appends the folder
    from torchtune._cli import tune

    from phi3_plugin import cli

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.py").touch()

    def launch(command: str, *words: str) -> list:
        seen = []
        launch.handled = []
        monkeypatch.setattr(
            "torchtune._cli.run.run",
            lambda args: (
                seen.append(PContext.start),
                launch.handled.append(args.signals_to_handle),
            ),
        )
        monkeypatch.setattr(sys, "argv", [command, "run", *words, "--config", "phi3_mini_lora"])
        {"tune": tune, "phi3-tune": cli}[command].main()
        return seen

    return launch


@pytest.mark.parametrize("command", ["tune", "phi3-tune"])
@pytest.mark.parametrize("recipe", [*OURS, *OTHERS])
def test_signals_are_passed_on_for_our_recipe_only(launch, command, recipe):
    (used,) = launch(command, "--nproc_per_node", "2", recipe)
    assert (used is not STOCK) == (recipe in OURS)
    assert PContext.start is STOCK


@pytest.mark.parametrize("is_ignored", [True, False])
def test_under_nohup_a_closed_terminal_ends_no_run(launch, is_ignored):
    signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    launch("tune", "--nproc_per_node", "2", OTHERS[0])
    (handled,) = launch.handled
    assert ("SIGHUP" in handled) != is_ignored
    assert {"SIGTERM", "SIGINT"} <= {*handled.split(",")}


@pytest.mark.parametrize("nodes", ["2", "1:2"])
def test_several_nodes_without_a_meeting_place_are_refused(launch, nodes, capsys):
    with pytest.raises(SystemExit):
        launch("tune", "--nnodes", nodes, OURS[0])
    assert f"--nnodes {nodes} needs --rdzv_endpoint HOST:PORT" in capsys.readouterr().err


def test_nodes_that_meet_and_single_ones_are_launched(launch):
    meeting = ("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:29511")
    assert launch("tune", "--nnodes", "2", *meeting, OURS[0])
    assert launch("tune", "--nnodes", "1", OURS[0])


@pytest.mark.parametrize("code", [0, 3, STOPPED])
def test_a_command_does_not_wait_for_python_to_take_itself_apart(code, monkeypatch):
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    with ending_at_once():
        sys.exit(code)
    assert ended == [code]


def test_a_command_that_ends_by_itself_or_with_a_text_is_left_alone(monkeypatch):
    monkeypatch.setattr("os._exit", lambda code: pytest.fail("it ended"))
    with ending_at_once():
        pass
    with pytest.raises(SystemExit, match="text"), ending_at_once():
        sys.exit("text")
