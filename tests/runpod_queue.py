"""RunPod's job API on loopback, as its SDK speaks it: take, stop, progress, stream, done, ping; and the worker on it.

A job is somebody's from its taking until it is answered. RunPod gives a job again whose worker it counts as dead; here
`lost` says so.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import psutil  # type: ignore[import-untyped]

from scripts.start import VOLUME, settings_for
from tests.waiting import PATIENCE, eventually

REPOSITORY = Path(__file__).parent.parent
POLL_SECONDS = 0.5  # how long a question for a job is left waiting
KEY = "rpa_test"


@dataclass
class Asked:
    """A job, and all that was heard of it."""

    id: str
    input: Any
    progress: list[dict[str, Any]] = field(default_factory=list)
    streamed: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    """More than one: it ended twice."""
    taken: int = 0

    @property
    def error(self) -> dict[str, Any]:
        """The error object of its answer."""
        loaded: dict[str, Any] = json.loads(self.answers[0]["error"])
        return loaded

    @property
    def output(self) -> dict[str, Any]:
        assert "error" not in self.answers[0], self.answers
        output: dict[str, Any] = self.answers[0]["output"]
        return output


class JobApi(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jobs: dict[str, Asked] = {}
        self.pings: list[dict[str, list[str]]] = []
        self.unauthorized = 0
        self._waiting: deque[str] = deque()
        self._to_stop: list[str] = []
        self._connections = 0
        self._changed = threading.Condition()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What RunPod sets in a worker's environment."""
        url = f"http://127.0.0.1:{self.server_address[1]}/v2/endpoint"
        return {
            "RUNPOD_ENDPOINT_ID": "endpoint",
            "RUNPOD_POD_ID": "worker1",
            "RUNPOD_AI_API_KEY": KEY,
            "RUNPOD_WEBHOOK_GET_JOB": f"{url}/job-take/$ID?gpu=L40S",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{url}/job-done/$RUNPOD_POD_ID/$ID?gpu=L40S",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=L40S",
            "RUNPOD_WEBHOOK_PING": f"{url}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": "1000",
        }

    def ask(self, job_id: str, wanted: Any) -> Asked:
        job = Asked(job_id, wanted)
        with self._changed:
            self.jobs[job_id] = job
            self._waiting.append(job_id)
            self._changed.notify_all()
        return job

    def answer(self, job_id: str, wanted: Any) -> Asked:
        """A job and its end."""
        job = self.ask(job_id, wanted)
        eventually(lambda: job.answers, f"{job_id} was not answered", seconds=PATIENCE)
        return job

    def stop(self, job_id: str) -> None:
        with self._changed:
            self._to_stop.append(job_id)
            self._changed.notify_all()

    def lost(self) -> list[str]:
        """The worker is dead: what it has not answered is given again."""
        with self._changed:  # its last words have been heard
            assert self._changed.wait_for(lambda: not self._connections, PATIENCE), "the worker is alive"
        return self.retry()

    def retry(self) -> list[str]:
        """What has not been answered is given again."""
        with self._changed:
            again = [job.id for job in self.jobs.values() if not job.answers and job.id not in self._waiting]
            self._waiting.extend(again)
            self._changed.notify_all()
        return again

    def process_request_thread(self, *arguments: Any) -> None:
        with self._changed:
            self._connections += 1
        try:
            super().process_request_thread(*arguments)
        finally:
            with self._changed:
                self._connections -= 1
                self._changed.notify_all()

    def handle_error(self, *_: Any) -> None:
        """A worker that was killed in the middle of a sentence."""

    def take(self) -> dict[str, Any] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting, POLL_SECONDS)
            if not self._waiting:
                return None
            job = self.jobs[self._waiting.popleft()]
            job.taken += 1
            return {"id": job.id, "input": job.input}

    def stops(self) -> list[str]:
        with self._changed:
            self._changed.wait_for(lambda: self._to_stop, POLL_SECONDS)
            stops, self._to_stop = self._to_stop, []
            return stops

    def hear(self, kind: str, job_id: str, said: dict[str, Any]) -> None:
        with self._changed:
            job = self.jobs[job_id]
            if kind == "job-stream":
                job.streamed.append(said["output"])
            elif said.get("status") == "IN_PROGRESS":
                assert not job.answers, "progress after the end"
                job.progress.append(said["output"])
            else:
                job.answers.append(said)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: JobApi

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        kind = url.path.split("/")[3]
        if self.headers["Authorization"] != KEY:
            self.server.unauthorized += 1
        if kind == "ping":
            self.server.pings.append(parse_qs(url.query))
            self._send(200, {})
        elif kind == "job-take":
            job = self.server.take()
            self._send(204 if job is None else 200, job)
        else:
            self._send(200, {"jobsToStop": self.server.stops()})

    def do_POST(self) -> None:
        kind, _, job_id = urlsplit(self.path).path.split("/")[3:]
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.hear(kind, job_id, said)
        self._send(200, {})

    def _send(self, status: int, content: Any) -> None:
        body = b"" if status == 204 else json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:  # the worker was killed meanwhile
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


class Worker:
    """A context manager: the queue worker alone, in a process; whoever uses it is the runner, or has one."""

    def __init__(self, api: JobApi, home: Path, volume: Path | None = None, **settings: object) -> None:
        """settings: of the service, by their names."""
        self.temporary = home.parent / f"{home.name}-queue-temporary"
        values = {"home": home, "auth": "off", "allowed_hosts": "127.0.0.1", **settings}
        own = {f"AVATAR_{name.upper()}": str(value) for name, value in values.items()}
        own["TMPDIR"] = str(self.temporary)
        self._environment = {**os.environ, **settings_for(api.environment), **api.environment, **own}
        self._log = home.parent / f"{home.name}-queue.log"
        self._command = [sys.executable, "-m", "tests.runpod_queue", str(volume or VOLUME)]

    def __enter__(self) -> Self:
        self.temporary.mkdir(parents=True, exist_ok=True)  # a worker that takes the place of another
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command, cwd=REPOSITORY, env=self._environment, stdout=output, stderr=output
            )

    def kill(self) -> None:
        """-9; and to what it leaves behind, which in a container would die with it."""
        pinging = psutil.Process(self.process.pid).children() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        for process in pinging:
            process.kill()

    def drain(self) -> int:
        """SIGTERM, and what it ends with."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    @property
    def log(self) -> str:
        return self._log.read_text()


def data_uri(content: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"


if __name__ == "__main__":
    import logging

    from avatar_api.runpod_worker import serve
    from avatar_api.settings import ServiceSettings

    logging.basicConfig(level=logging.INFO)
    serve(ServiceSettings(), [], Path(sys.argv[1]))
