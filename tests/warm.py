"""Commands that start at once: processes forked from one that has imported torch and torchtune.

A command that a test types imports for many seconds what every other command has imported, once
for each process of a run. So a server imports it all and forks. On PATH, in the place of `tune`,
`phi3-tune`, `torchrun` and `python`, are small programs that hand it their words, folder,
environment and streams; what runs is the same ``main()`` in a process of its own, with its own
signals and exit code.

What is proven of the start itself (the hook, the console scripts, the workers of a launcher) is
proven with real programs, in test_hook.py, test_tune.py, test_cli.py and test_interrupt.py. With
``PHI3_COLD=1``, as under ``make test-all``, all are real ones. So they are where CUDA is, which
cannot be forked.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from importlib import import_module
from pathlib import Path
from typing import NoReturn

MAINS = {
    "tune": "torchtune._cli.tune",
    "phi3-tune": "phi3_plugin.cli",
    "torchrun": "torch.distributed.run",
}
"""The console scripts that the server knows, and whose ``main()`` they call."""

IMPORTED = (
    "torch.distributed.run",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torchdata.stateful_dataloader",
    "torchtune._cli.download",
    "torchtune._cli.run",
    "torchtune.training",
    "torchtune.training.metric_logging",
    "torchtune.datasets",
    "torchtune.modules.peft",
    "torchtune.rlhf",
    "datasets",
    "transformers.models.phi3.modeling_phi3",
    "peft",
    "matplotlib.figure",
    "phi3_plugin.recipes.lora_finetune",
    "phi3_plugin.recipes.phi3_adapter",
    "phi3_plugin.recipes.phi3_evaluate",
    "phi3_plugin.recipes.phi3_generate",
    "phi3_plugin.recipes.phi3_inspect_data",
)

ENVIRONMENT = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
"""Of every command. One thread a process: two with two threads each fight over two cores."""

STARTED = "PHI3_PROGRAMS"
"""The variable that names the folder of the programs; all processes of the tests share a server."""

_servers: list[subprocess.Popen] = []
"""Held, so that what they say while they import has a pipe to go to."""

CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
command = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(command).to_bytes(8, "big")], [0, 1, 2])
server.sendall(command)
code = int.from_bytes(server.recv(8), "big", signed=True)
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def trust_the_disk() -> None:
    """Wait for no disk to have what was written: nothing cuts the power, and runs save often."""
    if os.environ.get("PHI3_COLD") != "1":
        os.fsync = lambda file: None


def start() -> Path:
    """Start a server, and return the folder of the programs: the environment's own for real ones.

    The server ends with this process, and imports when the first command comes.
    """
    cold = os.environ.get("PHI3_COLD") == "1" or Path("/dev/nvidiactl").exists()
    if cold or sys.platform != "linux":
        return Path(sys.executable).parent
    folder = Path(tempfile.mkdtemp(prefix="phi3-warm-"))
    address = str(folder / "server")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    for name in (*MAINS, "python"):
        text = CLIENT.format(python=sys.executable, address=address, name=name)
        (folder / name).write_text(text, "utf-8")
        (folder / name).chmod(0o755)
    reading, _writing = os.pipe()  # closed, and so at its end, when this process has ended
    process = subprocess.Popen(
        [sys.executable, __file__, str(listening.fileno()), str(reading), str(folder)],
        stdin=subprocess.DEVNULL,
        # A command's streams may be pipes, where those of Python must not be made to seek
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **ENVIRONMENT, "HF_HUB_OFFLINE": "1"},
        pass_fds=(listening.fileno(), reading),
    )
    _servers.append(process)
    listening.close()
    os.close(reading)
    return folder


def begin(*command: object, cwd: Path, **environment: str) -> subprocess.Popen:
    """Start a command whose first word is one of the programs, or any other that uses them."""
    programs = os.environ[STARTED]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env={
            **os.environ,
            **ENVIRONMENT,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHON_EXEC": f"{programs}/python",  # what torchrun starts workers with
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    *command: object, cwd: Path, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Run a command and wait for its end."""
    with begin(*command, cwd=cwd, **environment) as process:
        try:
            out, error = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def run_python(code: str, cwd: Path, **environment: str) -> str:
    """Run code in an interpreter that has imported nothing, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def serve(listening: socket.socket, parent: int, folder: Path) -> None:
    """Fork a process for each command until the parent has ended; return in the forked ones."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then end
    imported = False
    while True:
        ready, _, _ = select.select([listening, parent], [], [])
        if parent in ready:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
            os._exit(0)
        client, _ = listening.accept()
        if not imported:
            for module in IMPORTED:
                import_module(module)
            trust_the_disk()
            gc.freeze()  # no collection of a child's then copies what is shared
            imported = True
        if os.fork() == 0:
            listening.close()
            os.close(parent)
            keep(client)
            return
        client.close()


def keep(client: socket.socket) -> None:
    """Fork the process of a command, pass signals on to it, and tell the client how it ended."""
    size, streams, _, _ = socket.recv_fds(client, 8, 3)
    data = b""
    while len(data) < int.from_bytes(size, "big"):
        data += client.recv(2**16)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        client.close()
        become(*json.loads(data), streams)
        return
    for stream in (0, 1, 2):
        os.close(stream)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(process)
    while True:
        ready, _, _ = select.select([client, ended], [], [])
        if ended in ready:
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            client.send(code.to_bytes(8, "big", signed=True))
            os._exit(0)
        told = client.recv(1)
        os.kill(process, told[0] if told else signal.SIGKILL)
        if not told:
            os._exit(1)


def become(name: str, words: list[str], cwd: str, env: dict[str, str], streams: list[int]) -> None:
    """Give this process the folder, environment, streams and arguments of a command."""
    os.setpgid(0, 0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [name, *words]


def execute() -> None:
    """Do what the words in ``sys.argv`` say, as the program named there does."""
    name, *words = sys.argv
    if "TORCHELASTIC_RUN_ID" in os.environ:  # which the hook looks for when torchtune is imported
        import_module("phi3_plugin.hook")._show_errors_as_a_line()
    if name in MAINS:
        sys.exit(import_module(MAINS[name]).main())
    while words[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        words = words[1:]
    kind, rest = words[0], words[1:]
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(kind).resolve().parent))
        runpy.run_path(kind, run_name="__main__")


def end() -> NoReturn:
    """Execute and end as an interpreter does, but without taking apart what is shared."""
    code: object = 0
    try:
        execute()
    except SystemExit as stopped:
        code = stopped.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3]))
    end()
