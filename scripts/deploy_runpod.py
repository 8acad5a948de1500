"""Deploy the image as a serverless endpoint on RunPod, and look after it, through its REST API (version 2).

    python scripts/deploy_runpod.py deploy FILE [--dry-run]     create what is not there, update what is
    python scripts/deploy_runpod.py status FILE
    python scripts/deploy_runpod.py logs FILE
    python scripts/deploy_runpod.py delete FILE

FILE says what is wanted; scripts/runpod.toml is one. RUNPOD_API_KEY is the key. Template and endpoint are found again
by their name. Secrets are only named: RunPod keeps them, and puts them into a worker's environment. A dry run reads,
and prints what it would send; without a key, it takes it that nothing is there yet.
"""

import argparse
import json
import math
import os
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx2
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder

from scripts.estimate import GPUS, speed
from scripts.start import VOLUME

API = "https://api.runpod.io"
PORT = "3000"
MARGIN = 1.5  # of the reckoned time: a job that runs longer is ended
LEAST_TIMEOUT = 600  # seconds, RunPod's own default
LONG_TIMEOUT = 24 * 3600  # seconds that RunPod keeps a job, waiting included, unless the request's policy.ttl says more
LOG_LINES = 100
LOG_SECONDS = 5.0  # of silence, after which a worker's log has been read

console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)


class RunPodError(Exception):
    """RunPod does not do what was asked; the message says what and why, and holds no secret."""


class Deployment(BaseModel):
    """What FILE holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    kind: Literal["queue", "load_balancer"]
    image: str
    gpus: Annotated[list[str], Field(min_length=1)]
    min_workers: Annotated[int, Field(ge=0)] = 0
    max_workers: Annotated[int, Field(ge=1)] = 3
    idle_seconds: Annotated[int, Field(ge=1, le=3600)] = 60
    container_disk_gb: Annotated[int, Field(ge=1)] = 30
    init_seconds: Annotated[int, Field(ge=1)] = 900
    size: Literal["480p", "720p"] = "480p"
    steps: Annotated[int, Field(ge=1, le=200)] = 40
    longest_video_seconds: Annotated[float, Field(gt=0)] = 60
    network_volume: str | None = None
    data_centers: list[str] = []
    registry: str | None = None
    environment: dict[str, str] = {}
    secrets: dict[str, str] = {}

    @field_validator("image")
    @classmethod
    def _by_digest(cls, image: str) -> str:
        if not re.fullmatch(r"[^\s@]+@sha256:[0-9a-f]{64}", image):
            raise ValueError("it has to end in @sha256: and the image's digest, which no later push can change")
        return image

    @field_validator("gpus")
    @classmethod
    def _known(cls, gpus: list[str]) -> list[str]:
        for gpu in gpus:
            if gpu not in GPUS:
                raise ValueError(f"{gpu!r} is not one of {', '.join(GPUS)}")
        return gpus

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if re.search(r"SECRET|PASSWORD|TOKEN|ACCESS_KEY|API_KEYS?$|DATABASE_URL", name):
                raise ValueError(f"{name} looks like a secret; keep it in RunPod and name it under [secrets]")
        return environment

    @property
    def job_seconds(self) -> int:
        """What the longest video may take, on the slowest GPU."""
        slowest = max(speed(gpu, self.size, self.steps).seconds for gpu in self.gpus)
        return max(LEAST_TIMEOUT, math.ceil(MARGIN * slowest * self.longest_video_seconds))


def template(wanted: Deployment) -> dict[str, Any]:
    """What a worker is."""
    environment = {"RUNPOD_INIT_TIMEOUT": str(wanted.init_seconds), **wanted.environment}
    if wanted.kind == "load_balancer":
        environment |= {"PORT": PORT, "PORT_HEALTH": PORT, "HEALTH_CHECK_PATH": "/ping"}
    if wanted.network_volume is not None:
        environment.setdefault("AVATAR_HOME", str(VOLUME / "avatar"))
    environment |= {name: f"{{{{ RUNPOD_SECRET_{secret} }}}}" for name, secret in wanted.secrets.items()}
    body: dict[str, Any] = {
        "name": wanted.name,
        "image": wanted.image,
        "disk": wanted.container_disk_gb,
        "env": environment,
        "ports": [f"{PORT}/http"] if wanted.kind == "load_balancer" else [],
        "serverless": True,
        "startJupyter": False,
        "startSsh": False,
    }
    return body | ({"registry": wanted.registry} if wanted.registry else {})


def endpoint(wanted: Deployment, template_id: str) -> dict[str, Any]:
    """How many workers there are, on what, and for how long."""
    queue = {"type": "QUEUE_DELAY", "queueDelay": 4}
    body = {
        "name": wanted.name,
        "templateId": template_id,
        "gpu": {"pools": sorted({GPUS[gpu].pool for gpu in wanted.gpus}), "count": 1},
        "workers": {"min": wanted.min_workers, "max": wanted.max_workers, "idleTimeout": wanted.idle_seconds},
        "scaling": queue if wanted.kind == "queue" else {"type": "REQUEST_COUNT", "requestCount": 1},
        "timeout": wanted.job_seconds * 1000,
        "flashboot": "OFF",  # not tried: it may stop a worker and continue it much later
        "dataCenterIds": wanted.data_centers,
    }
    return body | ({"networkVolumes": [wanted.network_volume]} if wanted.network_volume else {})


class Api:
    """RunPod's REST API. Raises RunPodError."""

    def __init__(self, url: str, key: str | None, dry: bool) -> None:
        self._dry, self._known = dry, key is not None
        self._http = httpx2.Client(base_url=url, timeout=30, headers={"Authorization": f"Bearer {key}"} if key else {})

    def read(self, path: str) -> dict[str, Any]:
        return self._send("GET", path, None)

    def named(self, kind: str, name: str) -> dict[str, Any] | None:
        """The template or endpoint of that name; kind: "templates" or "endpoints"."""
        if not self._known:
            return None
        path = "/v2/templates" if kind == "templates" else "/v2/serverless"
        found = [one for one in self.read(path)[kind] if one["name"] == name]
        if len(found) > 1:
            raise RunPodError(f"there are {len(found)} {kind} named {name!r}; rename or delete all but one.")
        return found[0] if found else None

    def write(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        if self._dry:
            console.print(f"{method} {path}", *([] if body is None else [json.dumps(body, indent=2)]), markup=False)
            return {"id": "ID", **(body or {})}
        return self._send(method, path, body)

    def log(self, path: str) -> list[str]:
        """The last lines of a stream that does not end."""
        lines: list[str] = []
        with self._http.stream("GET", path, params={"tail": LOG_LINES}, timeout=LOG_SECONDS) as answer:
            if answer.status_code != 200:
                raise RunPodError(f"GET {path}: RunPod answers {answer.status_code}.")
            try:
                for line in answer.iter_lines():
                    if line.startswith("data:"):
                        said = json.loads(line.removeprefix("data:"))
                        lines.append(f"{said['ts']} {said['line']}")
            except httpx2.ReadTimeout:
                pass
        return lines

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, json=body)
        except httpx2.TransportError as error:
            raise RunPodError(f"{method} {path}: {self._http.base_url} does not answer ({error}).") from None
        if answer.status_code == 401:
            raise RunPodError("RunPod does not know this key; set RUNPOD_API_KEY to one of the console's (Settings).")
        if answer.status_code >= 400:
            raise RunPodError(f"{method} {path}: RunPod answers {answer.status_code}: {_reason(answer)}")
        content: dict[str, Any] = answer.json() if answer.content else {}
        return content


def deploy(wanted: Deployment, api: Api) -> None:
    console.print("\n".join(expectations(wanted)), markup=False)
    there = api.named("endpoints", wanted.name)
    kind = {"queue": "QUEUE", "load_balancer": "LOAD_BALANCER"}[wanted.kind]
    if there is not None and there.get("type", kind) != kind:
        raise RunPodError(f"endpoint {wanted.name!r} is of kind {there['type']}, which cannot change; delete it first.")
    body, known = template(wanted), api.named("templates", wanted.name)
    if known is None:
        known = api.write("POST", "/v2/templates", body)
    else:
        api.write("PATCH", f"/v2/templates/{known['id']}", body)
    body = endpoint(wanted, known["id"])
    if there is None:
        there = api.write("POST", "/v2/serverless", body | {"type": kind})
    else:  # of what the template says, the endpoint has a copy: naming it again brings the new one
        there = api.write("PATCH", f"/v2/serverless/{there['id']}", body)
    for name, url in there.get("requestUrls", {}).items():
        console.print(f"{name}: {url}", markup=False)


def expectations(wanted: Deployment) -> list[str]:
    """What to expect of the GPUs, in sentences."""
    said = []
    for gpu in wanted.gpus:
        made = speed(gpu, wanted.size, wanted.steps)
        minutes = made.seconds * wanted.longest_video_seconds / 60
        said.append(
            f"{gpu}: {made.seconds:.0f} s for a second of video ({made.source}); {minutes:.0f} min for "
            f"{wanted.longest_video_seconds:g} s at {wanted.size}, {wanted.steps} steps."
        )
    said.append(f"A job may run for {wanted.job_seconds / 60:.0f} min; RunPod's own default of 10 would cut it short.")
    if wanted.job_seconds > LONG_TIMEOUT:
        said.append('Callers have to ask for more than a day: "policy": {"ttl": …} in milliseconds, beside "input".')
    return said


def status(wanted: Deployment, api: Api) -> None:
    there = _there(wanted, api)
    listed = api.read(f"/v2/serverless/{there['id']}/workers")
    console.print(f"{there['id']}: {there.get('type')}, {there.get('image')}", markup=False)
    console.print(", ".join(f"{count} {name}" for name, count in listed["summary"].items()))
    for worker in listed["workers"]:
        old = ", of an older version" if worker["isStale"] else ""
        console.print(f"{worker['id']}: {worker['status']} on {worker.get('gpuTypeId')}{old}", markup=False)


def logs(wanted: Deployment, api: Api) -> None:
    there = _there(wanted, api)
    for worker in api.read(f"/v2/serverless/{there['id']}/workers")["workers"]:
        for line in api.log(f"/v2/serverless/{there['id']}/workers/{worker['id']}/logs"):
            console.print(f"{worker['id']} {line}", markup=False)


def delete(wanted: Deployment, api: Api) -> None:
    """Endpoint and template; jobs that run are cancelled."""
    for kind, path in (("endpoints", "/v2/serverless"), ("templates", "/v2/templates")):
        if (there := api.named(kind, wanted.name)) is not None:
            api.write("DELETE", f"{path}/{there['id']}", None)
            console.print(f"{path}/{there['id']} is deleted", markup=False)


def _there(wanted: Deployment, api: Api) -> dict[str, Any]:
    there = api.named("endpoints", wanted.name)
    if there is None:
        raise RunPodError(f"there is no endpoint named {wanted.name!r}; deploy makes it.")
    return there


def _reason(answer: httpx2.Response) -> str:
    try:
        said = answer.json()
        return "; ".join([str(said.get("detail", said)), *said.get("errors", [])])
    except (ValueError, AttributeError):
        return answer.text[:200]


def read(file: Path) -> Deployment:
    """Raises RunPodError."""
    try:
        return Deployment.model_validate(tomllib.loads(file.read_text()))
    except OSError as error:
        raise RunPodError(f"{file} cannot be read: {error.strerror}.") from None
    except tomllib.TOMLDecodeError as error:
        raise RunPodError(f"{file} is not TOML: {error}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        name, said = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise RunPodError(f"{file}: {name}: {said}.") from None


def main(arguments: list[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    acts = {"deploy": deploy, "status": status, "logs": logs, "delete": delete}
    parser.add_argument("act", choices=acts)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--dry-run", action="store_true", help="send nothing that changes anything; print it")
    parser.add_argument("--api", default=API, help="%(default)s")
    options = parser.parse_args(arguments)
    key = environment.get("RUNPOD_API_KEY")
    try:
        if key is None and not (options.dry_run and options.act == "deploy"):
            raise RunPodError("set RUNPOD_API_KEY to a key of RunPod's console (Settings, API keys).")
        acts[options.act](read(options.file), Api(options.api, key, options.dry_run))
    except RunPodError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
