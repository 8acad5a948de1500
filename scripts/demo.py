"""The whole way at once: start the server, send it the example over HTTP, keep the video, stop the server.

    python scripts/demo.py [--home .avatar] [--output out/demo.mp4]

The models must be in the store of the home folder (models/import_models.py). What happens here happens the same with
`make serve` and any HTTP client.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import bentoml
import httpx2
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from avatar_api.jobs import JobStore

START_SECONDS = 180.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx2.get(f"{url}/ping", timeout=2).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"error: the server did not start; the end of {log}:\n{log.read_text()[-2000:]}")


def generate(url: str, example: Path, size: str, steps: int, answer: list[Path | Exception]) -> None:
    request = json.loads(example.read_text())
    try:
        with bentoml.SyncHTTPClient(url, timeout=3600) as client:
            answer.append(
                client.generate(
                    image=Path(request["cond_video"]),
                    audio=Path(request["cond_audio"]["person1"]),
                    prompt=request["prompt"],
                    size=size,
                    steps=steps,
                )
            )
    except Exception as error:  # shown by the main thread
        answer.append(error)


def follow(store: JobStore, caller: threading.Thread, console: Console) -> None:
    """A progress bar for the newest job, until the caller has its answer."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("Waiting in the queue", total=100)
        while caller.is_alive():
            jobs = store.page(limit=1)
            said = (jobs[0].progress if jobs else None) or {}
            if "clip" in said:
                text = f"Clip {said['clip']} of {said['clips']}, step {said['step']} of {said['steps']}"
                progress.update(task, description=text, completed=said["percent"])
            elif "stage" in said:
                progress.update(task, description=str(said["stage"]).capitalize())
            caller.join(0.2)
        progress.update(task, completed=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".avatar"), help="models, jobs and log (%(default)s)")
    parser.add_argument("--example", type=Path, default=Path("examples/single_example_image.json"), help="%(default)s")
    parser.add_argument("--size", default="128x128", help="%(default)s")
    parser.add_argument("--steps", type=int, default=4, help="%(default)s")
    parser.add_argument("--output", type=Path, default=Path("out/demo.mp4"), help="%(default)s")
    options = parser.parse_args()
    console, home = Console(), options.home.absolute()
    url, log = f"http://127.0.0.1:{free_port()}", home / "serve.log"
    environment = {
        "BENTOML_HOME": str(home),
        "AVATAR_HOME": str(home),
        "AVATAR_AUTH": "off",
        "AVATAR_GRPC_PORT": "0",  # perhaps `make serve` has it
        "BENTOML_CONFIG": str(Path("configuration.yaml").absolute()),
        "BENTOML_DO_NOT_TRACK": "1",
    }
    command = [sys.executable, "-m", "bentoml", "serve", "--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    with log.open("wb") as output:
        server = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=output)
    try:
        with console.status("Starting the server"):
            wait_until_ready(url, server, log)
        console.print(f"Serving on {url}, log in {log}")
        answer: list[Path | Exception] = []
        arguments = (url, options.example, options.size, options.steps, answer)
        caller = threading.Thread(target=generate, args=arguments, daemon=True)
        caller.start()
        follow(JobStore(f"sqlite:///{home / 'jobs.db'}"), caller, console)
        if isinstance(answer[0], Exception):
            raise SystemExit(f"error: {answer[0]}")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(answer[0], options.output)
        console.print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB over HTTP from {url}/generate")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
