"""Children that start in milliseconds: a process that has imported what they need forks one for whoever asks.

The fork server is started with the first child, and again should it have died. A child ends with its `Child`, with the
fork server, and with the process that asked for it. What a child does is the main function that its module gives to
`serve`:

    if __name__ == "__main__":
        serve(main)
"""

import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

START_SECONDS = 60.0
PACKAGES = Path(__file__).parent.parent

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STDIN = 0
_MESSAGE = 4096  # bytes, more than any is long


@dataclass(frozen=True)
class Child:
    pid: int
    channel: socket.socket
    """The other end is the child's standard input."""
    _life: socket.socket
    """The child is killed when this end is shut; then comes what it ended with."""

    def end(self) -> int:
        """End it; returns what it ended with, as Popen has it: minus a signal's number, or an exit code.

        One that closed its end of the channel has done so by dying: the signal here comes too late to be the reason.
        """
        with self.channel, self._life:
            self._life.shutdown(socket.SHUT_WR)
            status = self._life.recv(_MESSAGE)
        return os.waitstatus_to_exitcode(int(status)) if status else -signal.SIGKILL  # as the server was


class ForkServer:
    """Of one module's children; for all threads."""

    def __init__(self, module: str, environment: Callable[[], Mapping[str, str]]) -> None:
        """environment: all that the server and its children have of one."""
        self._module, self._environment = module, environment
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: int) -> Child:
        """A child that runs main(*arguments). Raises ConnectionError if the server was killed, or is too slow."""
        with ExitStack() as failed:
            with self._lock:
                if self._process is None or self._process.poll() is not None:
                    self._control, self._process = self._start()
                process = self._process
                channel, childs, life, servers = map(failed.enter_context, (*socket.socketpair(), *socket.socketpair()))
                with childs, servers:
                    message = json.dumps(arguments).encode()
                    socket.send_fds(self._control, [message], [childs.fileno(), servers.fileno()])
            life.settimeout(START_SECONDS)
            try:
                pid = life.recv(_MESSAGE)
            except TimeoutError:
                raise ConnectionError(f"No child of {self._module} started within {START_SECONDS:g} s") from None
            if pid:
                life.settimeout(None)
                failed.pop_all()
                return Child(int(pid), channel, life)
        if (code := process.wait()) >= 0:
            raise RuntimeError(f"{self._module} ended with exit code {code}; the log may say why.")
        raise ConnectionError(f"The fork server of {self._module} was killed")

    def renew(self) -> None:
        """The next child comes from a new server, with other addresses of everything; children that are there go on."""
        with self._lock:
            if self._process is not None:
                self._control.close()
                self._process = None  # it ends after its last child

    def _start(self) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            return control, subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                cwd=PACKAGES,
                env=self._environment(),
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )


def serve(main: Callable[..., None]) -> NoReturn:
    """Fork a child for each message on the standard input, until that is closed and the last has ended.

    Nothing may have started a thread.
    """
    control = socket.socket(fileno=_STDIN)
    woken, waker = socket.socketpair()
    woken.setblocking(False)
    waker.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno())
    lives: dict[int, socket.socket] = {}
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    while control.fileno() >= 0 or lives:
        for key, _ in selector.select():
            if key.fileobj is control:
                message, files, *_ = socket.recv_fds(control, _MESSAGE, 2)
                if not message:
                    selector.unregister(control)
                    control.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    for end in (control, woken, waker, *lives.values()):
                        end.close()
                    _run(main, json.loads(message), *files)
                os.close(files[0])
                lives[pid] = socket.socket(fileno=files[1])
                selector.register(lives[pid], selectors.EVENT_READ, pid)
                with suppress(ConnectionError):
                    lives[pid].send(str(pid).encode())
            elif key.fileobj is woken:
                woken.recv(_MESSAGE)
            else:  # nobody wants it any more; a number that is not yet waited for is no other process's
                selector.unregister(key.fileobj)
                os.kill(key.data, signal.SIGKILL)
        with suppress(ChildProcessError):  # there is none
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with lives.pop(ended[0]) as life, suppress(ConnectionError):
                    if life in selector.get_map():
                        selector.unregister(life)
                    life.send(str(ended[1]).encode())
    os._exit(0)


def _run(main: Callable[..., None], arguments: list[int], channel: int, life: int) -> NoReturn:
    """In a child."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.close(life)
    os.dup2(channel, _STDIN)
    os.close(channel)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        main(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: whoever asked must not see the channel closed before there is an exit code
    os._exit(0)
