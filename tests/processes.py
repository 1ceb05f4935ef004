"""Processes of the tests' own: commands that are forked from a process which has imported what they need.

A process that trains needs five seconds of computing for its imports, more than most trainings of the tests. Here a
process that has imported everything, and has computed nothing, is forked for each command: the command gets its own
arguments, environment, folder, files and signals, and ends as any other process does. Only what a module reads from
the environment as it is imported is that of the tests. What is said or read during the imports is tested elsewhere,
with processes of their own.
"""

import atexit
import ctypes
import gc
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

SCRIPT = Path(sys.executable).with_name("soundwave")
# For processes that compile nothing with torch. Whatever imports peft imports bitsandbytes, which asks for torch's
# compiler as it is imported: with it a process needs a third more time to start.
WITHOUT_COMPILER = {"TORCHDYNAMO_DISABLE": "1"}
PR_SET_CHILD_SUBREAPER = 36


class Forker:
    """The process that is forked."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=os.environ | WITHOUT_COMPILER, start_new_session=True
            )
        self.answers = self.socket.makefile()
        assert self.answers.readline() == "ready\n"
        atexit.register(self.close)

    def close(self) -> None:
        self.answers.close()
        self.socket.close()
        self.process.wait()

    def start(self, fds: list[int], **what: Any) -> int:
        """Start a command with these files as stdin, stdout and stderr -> its id; it is a child of this process."""
        adopt(True)  # from the process between, which ends at once
        try:
            socket.send_fds(self.socket, [b"."], fds)
            self.socket.sendall(json.dumps(what).encode() + b"\n")
            return int(self.answers.readline())
        finally:
            adopt(False)


def adopt(whether: bool) -> None:
    """Let processes whose parent has ended become children of this process."""
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(whether), 0, 0, 0) == 0


forker = cache(Forker)


class Popen(subprocess.Popen):
    """`subprocess.Popen` for the commands ["soundwave", …] and [PYTHON, FILE, …]."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                       shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid,
                       umask, start_new_session, *_):  # fmt: skip
        words = [os.fspath(word) for word in args]
        assert Path(words[0]) in (SCRIPT, Path(sys.executable)), words
        assert not (preexec_fn or pass_fds or shell)
        env = os.environ | WITHOUT_COMPILER if env is None else env
        fds = [place if fd == -1 else fd for place, fd in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid = forker().start(
            fds, words=words, folder=os.fspath(cwd or Path.cwd()), environment=dict(env), session=start_new_session
        )
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def run(
    command: list, *, capture_output: bool = False, timeout: float | None = None, **options: Any
) -> subprocess.CompletedProcess:
    """`subprocess.run` of such a command."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# ---------------------------------------------------------------- in the process that is forked


def import_all() -> None:
    """Import what a command would, and compute nothing: of a process that has computed, torch refuses to be forked."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as the command does
    import bitsandbytes  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.whisper.modeling_whisper  # noqa: F401

    import soundwave.cli
    import soundwave.demo.ablation
    import soundwave.evaluation.run
    import soundwave.inference.answer
    import soundwave.report
    import soundwave.training.stages  # noqa: F401


def next_command(connection: socket.socket) -> list[str]:
    """Fork for each command that comes -> in each child, which has become that process, its words."""
    requests = connection.makefile("rb")
    while True:
        dot, fds, _, _ = socket.recv_fds(connection, 1, 3)
        if not dot:
            os._exit(0)
        asked = json.loads(requests.readline())
        reading, writing = os.pipe()
        if between := os.fork():
            os.close(writing)
            os.waitpid(between, 0)
            connection.sendall(os.read(reading, 20) + b"\n")
            for fd in (reading, *fds):
                os.close(fd)
        elif child := os.fork():
            os.write(writing, str(child).encode())
            os._exit(0)
        else:
            if asked["session"]:
                os.setsid()
            for place, fd in enumerate(fds):
                os.dup2(fd, place)
            for fd in (reading, writing, connection.detach(), *fds):
                os.close(fd)
            os.chdir(asked["folder"])
            os.environ.clear()
            os.environ.update(asked["environment"])
            tempfile.tempdir = None  # TMPDIR may be another one
            return asked["words"]


class Ending:
    """Ends the process without the taking apart of all modules, a second of computing, where its status is known."""

    status: int | None = None

    def __call__(self) -> None:
        if self.status is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.status)


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    sys.path.remove(str(Path(__file__).parent))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ending = Ending()
    atexit.register(ending)  # what is registered first is called last
    import_all()
    gc.freeze()
    connection.sendall(b"ready\n")
    words = next_command(connection)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if Path(words[0]) == SCRIPT:
            from soundwave.cli import main as command

            sys.argv = words
            command()
        else:
            sys.argv = words[1:]
            runpy.run_path(words[1], run_name="__main__")
        ending.status = 0
    except SystemExit as end:
        ending.status = end.code if isinstance(end.code, int) else None
        raise


if __name__ == "__main__":
    main()
