"""What becomes of a server whose models cannot be loaded: it ends, with a status that whoever runs it sees.

BentoML's first process starts a runner again whenever one has ended, for ever, and a runner that lives without models
is never ready. So the first process keeps a note in which its runners write how loading goes. What will not pass, such
as a model that does not fit, ends the server at once. What may pass, or kills the process, such as too little memory,
ends it when it has happened ATTEMPTS times in a row.
"""

import atexit
import json
import logging
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from avatar_api.shutdown import Shutdown
from infinitetalk.errors import CheckpointError, InputError

logger = logging.getLogger(__name__)

EXIT_STATUS = 78  # the server's; EX_CONFIG
ATTEMPTS = 3
AGAIN_EXIT = 75  # a runner's that shall be started again; EX_TEMPFAIL
KILLED = "the process died while it loaded them: killed by the kernel for memory (dmesg), or by the GPU's driver"

_NOTE, _SERVER = "AVATAR_LOADING_NOTE", "AVATAR_LOADING_SERVER"
"""In the environment of the server's processes: the note's file, and the first process's number."""
_SIGNAL_SECONDS = 5.0  # between signals to the first process, which loses one while it starts others


@dataclass(frozen=True)
class _Note:
    attempts: int = 0
    """That have begun in a row and have not succeeded."""
    error: str = ""
    """What ended the last one."""
    given_up: bool = False

    @classmethod
    def read(cls) -> "_Note":
        """An empty one, where loading has not begun or has succeeded: then there is no file."""
        file = Path(os.environ[_NOTE])
        return cls(**json.loads(file.read_text())) if file.exists() else cls()

    def write(self) -> None:
        file = Path(os.environ[_NOTE])
        draft = file.with_suffix(".part")
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(file)


def end_when_given_up() -> None:
    """In the server's first process, before it starts others: when this one ends, it tells why and with what status."""
    if _NOTE in os.environ:  # called for each of its services
        return
    os.environ[_NOTE] = str(Path(tempfile.gettempdir()) / f"avatar-loading-{secrets.token_hex(8)}.json")
    os.environ[_SERVER] = str(os.getpid())
    atexit.register(_end)


def _end() -> None:
    note = _Note.read()
    Path(os.environ[_NOTE]).unlink(missing_ok=True)
    if note.given_up:
        print(f"error: The models cannot be loaded: {note.error}", file=sys.stderr, flush=True)
        os._exit(EXIT_STATUS)


@contextmanager
def attempt(shutdown: Shutdown) -> Iterator[None]:
    """Within it a runner's thread loads the models. If that fails, the thread ends with the server, or the process."""
    note = _Note.read()
    if note.attempts == ATTEMPTS:
        _give_up(note, shutdown)
    note = replace(note, attempts=note.attempts + 1, error=KILLED)
    note.write()
    try:
        yield
    except (CheckpointError, InputError) as error:
        _give_up(replace(note, error=str(error)), shutdown)
    except Exception as error:
        logger.exception("The models could not be loaded, attempt %d of %d", note.attempts, ATTEMPTS)
        note = replace(note, error=f"{type(error).__name__}: {error}")
        if note.attempts == ATTEMPTS:
            _give_up(note, shutdown)
        note.write()
        os._exit(AGAIN_EXIT)
    Path(os.environ[_NOTE]).unlink(missing_ok=True)


def _give_up(note: _Note, shutdown: Shutdown) -> None:
    replace(note, given_up=True).write()
    logger.critical("The models cannot be loaded: %s; the server ends", note.error)
    server = int(os.environ[_SERVER])
    while not shutdown.asked and os.getppid() == server:
        os.kill(server, signal.SIGTERM)
        shutdown.wait(_SIGNAL_SECONDS)
    sys.exit()  # of the thread
