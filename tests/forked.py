"""Python as a command that begins as a fork of a process with torch and ONNX loaded: it does what
`python` does, and saves the seconds that these imports take a command.

    [*forked_python(), "cli.py", ...]     instead of     [sys.executable, "cli.py", ...]

It runs this file, which hands its arguments, environment, folder and standard streams to the
process that forks, passes signals on, and ends as the fork ends. Nothing of ours is loaded before
the fork. `-c`, `-m` and a script are known; no other option of Python's is.
"""

from __future__ import annotations

import array
import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

LOADED = ("torch", "onnx_ir", "tokenizers", "PIL.Image", "rich")  # none begins a thread
MOST_BYTES = 1 << 20  # of a request: its arguments and environment
PATIENCE = 600.0  # seconds for the imports, on the busiest machine
_started: list[str] = []


def forked_python() -> list[str]:
    """The command, of which Linux has one process that forks for each that asks here."""
    if sys.platform != "linux":
        return [sys.executable]
    if not _started:
        path = os.path.join(tempfile.mkdtemp(prefix="ssd-export-forks-"), "socket")
        environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", path],
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,  # which ends when this process does
            stdout=subprocess.DEVNULL,
        )
        atexit.register(server.terminate)
        _started.append(path)
    return [sys.executable, "-S", "-E", __file__, _started[0]]


def ask(path: str, arguments: list[str]) -> int:
    """Has a command run; its exit code, or the same end by a signal."""
    with _connected(path) as connection:
        request = [arguments, os.getcwd(), dict(os.environ)]
        streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
        content = json.dumps(request).encode()
        connection.sendmsg([len(content).to_bytes(8, "big")], streams)
        connection.sendall(content)
        answers = connection.makefile()
        process = int(answers.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda caught, _: os.kill(process, caught))
        code = int(answers.readline())
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _connected(path: str) -> socket.socket:
    until = time.monotonic() + PATIENCE
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            return connection
        except OSError:
            connection.close()
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


def serve(path: str) -> list[str] | None:
    """Forks for each command that is asked for; returns its arguments, in the fork."""
    import importlib

    found = sys.path = sys.path[1:]  # without the folder of this file
    for name in LOADED:
        importlib.import_module(name)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    assert len(os.listdir("/proc/self/task")) == 1, "threads are not in a fork"
    parent = os.getppid()
    server.settimeout(1.0)
    while os.getppid() == parent:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        server.close()
        connection.setblocking(True)
        if (arguments := _run(connection, found)) is not None:
            return arguments
        os._exit(0)
    return None


def _run(connection: socket.socket, found: list[str]) -> list[str] | None:
    """In a fork of the server: another fork runs the command, and this one tells how it ended."""
    head, streams, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * 4))
    size = int.from_bytes(head, "big")
    arguments, folder, environment = json.loads(connection.makefile("rb").read(size))
    numbers = array.array("i", streams[0][2])
    process = os.fork()
    if process:
        connection.sendall(f"{process}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        connection.sendall(f"{code}\n".encode())
        return None
    for stream, number in enumerate(numbers):
        os.dup2(number, stream)
        os.close(number)
    connection.close()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    is_script = arguments[0] not in ("-c", "-m")
    first = os.path.dirname(os.path.realpath(arguments[0])) if is_script else ""
    more = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [first, *filter(None, more), *found]
    return arguments


def run(kind: str, *rest: str) -> None:
    """Becomes `python KIND REST`."""
    import runpy

    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] != "--serve":
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    if (command := serve(sys.argv[2])) is not None:
        run(*command)
