"""What a container does first: check where it is, check the models, serve, and say when it is ready.

`scripts/start.py` takes this program's place, so that signals reach it: the server, or RunPod's worker with a server
beside it. Until it is ready, a child of it waits to say so.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from rich.filesize import decimal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from container import embedded

MANUAL = """\
     cd /app/InfiniteTalk
     python generate_infinitetalk.py \\
       --task infinitetalk-14B \\
       --size infinitetalk-720 \\
       --ckpt_dir /app/models/Wan2.1-I2V-14B-480P \\
       --infinitetalk_dir /app/models/InfiniteTalk \\
       --wav2vec_dir /app/models/chinese-wav2vec2-base \\
       --input_json examples/single_example_image.json \\
       --save_file /tmp/test_output"""

VERIFY = {"sizes": "sizes as in their locks", "full": "sha256 as in their locks"}
"""AVATAR_VERIFY and what it makes sure of."""


def check_home(home: Path) -> None:
    """Exits where the jobs' folder cannot be written."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        uid, gid = os.getuid(), os.getgid()
        sys.exit(
            f"error: AVATAR_HOME={home} cannot be written by uid {uid} ({error.strerror}). Of a mounted folder, run "
            f"`chown -R {uid}:{gid} FOLDER` on the host, or start the container with --user and the folder's owner."
        )


def check_models() -> tuple[str, float]:
    """What was verified, and how many seconds that took; exits where something is missing or damaged."""
    how = os.environ.get("AVATAR_VERIFY", "sizes")
    if how not in VERIFY:
        sys.exit(f"error: AVATAR_VERIFY={how}: it is one of {', '.join(VERIFY)}.")
    started = time.monotonic()
    try:
        models = embedded.find()
        files, size = embedded.verify(models, contents=how == "full")
    except embedded.NotWholeError as error:
        sys.exit(f"error: {error}")
    embedded.link(models)
    seconds = time.monotonic() - started
    return f"{len(models)} models, {files} files, {decimal(size)}, {VERIFY[how]} ({seconds:.1f} s)", seconds


def gpus() -> str:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return "none, the CPU computes (docker run --gpus all IMAGE has them)"
    asked = subprocess.run(query, capture_output=True, text=True)
    if asked.returncode:
        return f"not usable: {(asked.stdout + asked.stderr).strip()}"
    return "; ".join(asked.stdout.strip().splitlines())


def wait_until_ready(server: int, url: str) -> bool:
    """False if the server ends before."""
    while os.getppid() == server:
        try:
            with urllib.request.urlopen(f"{url}/ping", timeout=5) as answer:  # noqa: S310 - our own address
                if answer.status == 200:
                    return True
        except (OSError, urllib.error.URLError):
            pass
        time.sleep(0.5)
    return False


def main() -> None:
    check_home(Path(os.environ["AVATAR_HOME"]))
    print("Verifying the models", flush=True)
    verified, seconds = check_models()
    os.environ["AVATAR_VERIFY_SECONDS"] = str(seconds)  # the runner tells Prometheus
    port = os.environ.get("BENTOML_PORT", "3000")  # BentoML's entry point has set it to PORT, if there is one
    url = f"http://127.0.0.1:{port}"
    said = f"✅ Container Ready\n   {verified}\n   GPU: {gpus()}\n   {url}, by hand:\n{MANUAL}"
    print(f"{verified}; loading them", flush=True)
    server = os.getpid()
    if os.fork() == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # of a terminal, meant for the server
        if wait_until_ready(server, url):
            print(said, flush=True)
        os._exit(0)
    # In what it takes for a container, BentoML does not start a worker again that was killed.
    del os.environ["BENTOML_CONTAINERIZED"]
    os.chdir(Path(os.environ["BENTO_PATH"]) / "src")
    os.execv(sys.executable, [sys.executable, "-m", "scripts.start", os.environ["BENTO_PATH"]])  # noqa: S606


if __name__ == "__main__":
    main()
