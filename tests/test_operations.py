"""What an operator sees of a server at work: metrics, log and traces, of requests that succeed and that fail.

One server goes through all of it: PostgreSQL with a password, a bucket, keys, webhooks, and a collector for its traces.
What it logged and counted is what the tests look at.
"""

import base64
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from avatar_api.jobs import JobStore
from tests.buckets import KEY as S3_KEY
from tests.buckets import SECRET as S3_SECRET
from tests.buckets import S3Server, s3_server_fixture
from tests.conftest import REPOSITORY
from tests.databases import PostgresServer, postgres_fixture
from tests.served import Served
from tests.test_service import PICTURE
from tests.waiting import eventually

__all__ = ["postgres_fixture", "s3_server_fixture"]

API_KEY, DATABASE_PASSWORD = "the-key-of-the-operator", "the-password-of-the-database"
WEBHOOK_KEY = base64.b64encode(bytes(range(32))).decode()
HOOK_TOKEN, LINK_SIGNATURE = "the-token-of-the-hook", "the-signature-of-the-link"
TRACE = "0af7651916cd43dd8448eb211c80319c"
DASHBOARD = REPOSITORY / "docs" / "grafana.json"


class World(ThreadingHTTPServer):
    """All that the server talks to outside: a file, a webhook's receiver, and an OTLP collector."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.spans: list[Span] = []
        self.services: dict[bytes, str] = {}
        self.hooks: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class _Answer(BaseHTTPRequestHandler):
    server: World

    def do_GET(self) -> None:
        found = self.path.startswith("/me.png?")
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(PICTURE.read_bytes() if found else b"not here")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.server.spans += scope.spans
                    self.server.services |= {span.span_id: names["service.name"] for span in scope.spans}
        else:
            self.server.hooks.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Observed:
    """A server, what its callers got, and its log when it had ended."""

    headers: dict[str, httpx.Headers] = field(default_factory=dict)
    """Of some answers, by path."""
    videos: dict[str, str] = field(default_factory=dict)
    """Ids of the videos, by how they ended."""
    metrics: str = ""
    metrics_without_database: str = ""
    links: list[str] = field(default_factory=list)
    world: World = field(default_factory=World)
    log: str = ""

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.splitlines()]

    def value(self, name: str, **labels: str) -> float | None:
        return value(self.metrics, name, **labels)


def value(metrics: str, name: str, **labels: str) -> float | None:
    """A sample of /metrics; None if it is not there, and an error if it is there twice."""
    families = text_string_to_metric_families(metrics)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    found = [sample.value for sample in samples if labels.items() <= sample.labels.items()]
    assert len(found) <= 1, f"{name}{labels}: {found}"
    return found[0] if found else None


@pytest.fixture(scope="module")
def observed(
    bento_home: Path,
    postgres: PostgresServer,
    s3_server: S3Server,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Observed]:
    seen = Observed()
    home, bucket = tmp_path_factory.mktemp("avatar"), f"operations-{time.time_ns()}"
    s3_server.client.create_bucket(Bucket=bucket)
    database = postgres.new_schema()
    options = f"exporter_type=otlp sample_rate=0.0 otlp.protocol=http otlp.endpoint={seen.world.url}/v1/traces"
    environment = {
        "BENTOML_CONFIG_OPTIONS": " ".join(
            f"services.{service}.tracing.{option}"
            for service in ("avatar_api", "avatar_runner")
            for option in options.split()
        ),
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "AVATAR_VERIFY_SECONDS": "1.25",
        "AWS_ACCESS_KEY_ID": S3_KEY,
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }
    with (
        Served(
            home,
            bento_home=bento_home,
            environment=environment,
            auth="keys",
            api_keys=API_KEY,
            log_format="json",
            allowed_hosts="127.0.0.1",
            database_url=database.replace("postgres@", f"postgres:{DATABASE_PASSWORD}@"),
            webhook_secret=f"whsec_{WEBHOOK_KEY}",
            s3_bucket=bucket,
            s3_endpoint_url=s3_server.url,
        ) as server,
        httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=60) as client,
    ):
        live(seen, client, JobStore(database), postgres, server)
    seen.log = server.log
    yield seen
    seen.world.shutdown()


def live(seen: Observed, client: httpx.Client, store: JobStore, postgres: PostgresServer, server: Served) -> None:
    """What the server goes through."""
    home = server.home
    voice = home / "voice.wav"
    soundfile.write(voice, np.random.default_rng(0).standard_normal(10 * 640) * 0.1, 16000)
    data_uri = "data:audio/wav;base64," + base64.b64encode(voice.read_bytes()).decode()
    request = {
        "prompt": "A woman talks.",
        "size": "64x64",
        "steps": 3,
        "input_reference": f"{seen.world.url}/me.png?X-Amz-Signature={LINK_SIGNATURE}",
        "audio": data_uri,
        "webhook_url": f"{seen.world.url}/hook?token={HOOK_TOKEN}",
    }

    def state(video: str) -> str:
        return str(client.get(f"/v1/videos/{video}").json()["status"])

    traced = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    made = client.post("/v1/videos", json=request, headers=traced).json()["id"]
    waiting = client.post("/v1/videos", json=request).json()["id"]
    client.post(f"/v1/videos/{waiting}/cancel")
    eventually(lambda: state(made) == "completed", "the video is made", seconds=120)
    seen.videos |= {"completed": made, "cancelled": waiting}
    for path in (f"/v1/videos/{made}", f"/v1/videos/{made}/content", "/", "/docs.json", "/static_content/index.css"):
        seen.headers[path.replace(made, "ID")] = client.get(path).headers
    seen.links.append(seen.headers["/v1/videos/ID/content"]["location"])
    assert httpx.get(seen.links[0]).status_code == 200

    refused = "video_refused"
    (home / "jobs" / refused).mkdir()
    (home / "jobs" / refused / "input_reference").write_text("no picture")
    store.submit(store.get(made).spec | {"files": {}}, job_id=refused)
    eventually(lambda: store.get(refused).state == "failed", "the runner refuses the job", seconds=120)
    broken = store.submit({"files": {}}).id
    eventually(lambda: store.get(broken).error, "the job fails for the first time", seconds=120)
    store.cancel(broken)
    seen.videos |= {"failed": refused, "broken": broken}

    for wrong in (
        {"audio": data_uri[:40] + "§" + data_uri[40:]},
        {"audio": "data:audio/wav;base64," + base64.b64encode(b"no sound " * 100).decode()},
        {"input_reference": f"{seen.world.url}/none.png?X-Amz-Signature={LINK_SIGNATURE}"},
        {"webhook_url": f"ftp://me:{HOOK_TOKEN}@127.0.0.1/hook"},
    ):
        assert client.post("/v1/videos", json=request | wrong).status_code == 400
    for key in ("wrong", API_KEY[:-1]):
        assert client.get("/v1/videos", headers={"Authorization": f"Bearer {key}"}).status_code == 401
        assert client.get("/metrics", headers={"Authorization": f"Bearer {key}"}).status_code == 401
    for number in range(3):
        client.get(f"/v1/videos/video_{number}")
        client.get(f"/guess/{number}")
    eventually(lambda: seen.world.hooks, "the webhook", seconds=120)
    eventually(lambda: any(span.name == "job" for span in seen.world.spans), "the job's span", seconds=120)
    seen.metrics = client.get("/metrics").text
    seen.headers["/metrics"] = client.get("/metrics").headers

    postgres.stop()
    try:
        assert client.get("/v1/videos").status_code == 503
        seen.metrics_without_database = client.get("/metrics").text
        eventually(lambda: "the database is away" in server.log, "the runner notices", seconds=120)
    finally:
        postgres.start()
    eventually(lambda: client.get("/v1/videos").status_code == 200, "the database is back", seconds=120)


class TestMetrics:
    def test_the_runners_figures_come_with_those_of_the_api(self, observed: Observed) -> None:
        assert observed.value("avatar_clip_seconds_count") == 1
        assert observed.value("avatar_step_seconds_count") == 2, "three steps, less the clip's first"
        for stage in ("generating", "encoding", "uploading"):
            assert observed.value("avatar_stage_seconds_count", stage=stage) == 1
        seconds = observed.value("avatar_stage_seconds_sum", stage="generating")
        assert seconds is not None
        assert seconds >= (observed.value("avatar_clip_seconds_sum") or 0) > 0
        assert observed.value("avatar_request_errors_total", code="invalid_api_key") == 4

    def test_each_part_of_the_start_is_told_up_to_the_first_video(self, observed: Observed) -> None:
        assert observed.value("avatar_start_seconds", part="verify") == 1.25, "as container/start.py said"
        parts = ("transformer", "vae", "text_encoder", "image_encoder", "speech_encoder", "first_step", "first_video")
        took = [observed.value("avatar_start_seconds", part=part) for part in parts]
        assert all(seconds is not None and seconds > 0 for seconds in took), took

    def test_videos_are_counted_by_how_they_ended_and_failures_by_code(self, observed: Observed) -> None:
        assert observed.value("avatar_videos_total", state="completed") == 1
        assert observed.value("avatar_videos_total", state="failed") == 1
        assert observed.value("avatar_failures_total", code="unsupported_format") == 1, "the caller's mistake"
        assert observed.value("avatar_failures_total", code="generation_failed") == 1, "the broken job"
        assert observed.value("avatar_failures_total", code="runner_died") == 0

    def test_every_start_counts_once_as_a_wait(self, observed: Observed) -> None:
        assert observed.value("avatar_job_wait_seconds_count") in (3, 4), "the cancelled one may not have started"

    def test_the_queue_is_that_of_the_database(self, observed: Observed) -> None:
        states = {state: observed.value("avatar_jobs", state=state) for state in ("queued", "completed", "failed")}
        assert states == {"queued": 0, "completed": 1, "failed": 1}
        assert observed.value("avatar_jobs", state="cancelled") == 2
        assert observed.value("avatar_database_up") == 1

    def test_metrics_are_there_while_the_database_is_away(self, observed: Observed) -> None:
        away = observed.metrics_without_database
        assert value(away, "avatar_database_up") == 0
        assert value(away, "avatar_jobs", state="queued") is None
        assert value(away, "avatar_clip_seconds_count") == 1

    def test_requests_are_counted_by_route_and_not_by_what_anybody_sends(self, observed: Observed) -> None:
        endpoints = set(re.findall(r'bentoml_service_request_total{endpoint="([^"]*)"', observed.metrics))
        assert {"/v1/videos", "/v1/videos/{video_id}", "/v1/videos/{video_id}/content", "other"} <= endpoints
        assert "guess" not in observed.metrics
        assert "video_0" not in observed.metrics

    def test_dashboard_and_handbook_name_what_there_is(self, observed: Observed) -> None:
        families = list(text_string_to_metric_families(observed.metrics))
        names = {
            sample.name for family in families for sample in family.samples if not sample.name.endswith("_created")
        }
        names |= {f"avatar_gpu_memory_{size}_bytes" for size in ("allocated", "reserved", "total")}  # with CUDA only
        wanted = {name for expression in expressions() for name in metrics_in(expression)}
        assert len(wanted) > 10
        assert wanted <= names
        handbook = metrics_in((REPOSITORY / "docs" / "OPERATIONS.md").read_text())
        assert handbook <= names | {family.name for family in families}
        ours = {family.name + "_total" * (family.type == "counter") for family in families}
        assert {name for name in ours if name.startswith("avatar_")} <= handbook


class TestDashboard:
    def test_it_is_what_grafana_imports(self) -> None:
        board = json.loads(DASHBOARD.read_text())
        assert board["title"]
        assert re.fullmatch(r"[\w-]{1,40}", board["uid"])
        assert board["schemaVersion"] >= 36, "panels have datasources by uid"
        assert [variable["type"] for variable in board["templating"]["list"]] == ["datasource"]
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            assert panel["type"] in ("stat", "timeseries")
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, f"{panel['title']} lies on another panel"
            assert all(0 <= x < 24 for x, _ in cells)
            taken |= cells
            for target in panel["targets"]:
                assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
                assert target["expr"].count("(") == target["expr"].count(")")
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def expressions() -> list[str]:
    """All that the dashboard asks Prometheus for."""
    return [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]


def metrics_in(text: str) -> set[str]:
    found = set(re.findall(r"\b(?:avatar|bentoml)_[a-z_]+", text))
    return found - {"avatar_api", "avatar_runner", "avatar_key"}


class TestLog:
    def test_every_line_is_an_object_of_the_same_form(self, observed: Observed) -> None:
        for line in observed.lines:
            assert {"time", "level", "logger", "message", "process", "pid"} <= set(line)
        assert {line["process"].rpartition(":")[0] for line in observed.lines} >= {
            "entry_service:avatar_api",
            "service:avatar_runner",
        }

    def test_lines_about_a_job_carry_its_id(self, observed: Observed) -> None:
        said = [line["message"] for line in observed.lines if line.get("job") == observed.videos["completed"]]
        for end in ("started, 0 clips are there already", "completed", "webhook: received"):
            assert any(message.endswith(end) for message in said), said
        for line in observed.lines:
            if found := re.match(r"job (\w+):", line["message"]):
                assert line.get("job") == found[1]

    def test_an_exception_is_within_its_line(self, observed: Observed) -> None:
        (line,) = [line for line in observed.lines if "exception" in line and line["logger"] == "avatar_api.worker"]
        assert line["job"] == observed.videos["broken"]
        assert line["exception"].startswith("Traceback")
        assert "KeyError" in line["exception"]

    def test_no_secret_is_in_it(self, observed: Observed) -> None:
        assert "the database is away" in observed.log, "there were failures"
        signature = re.search(r"X-Amz-Signature=(\w+)", observed.links[0])
        assert signature is not None
        audio = base64.b64encode(b"RIFF").decode()[:5]
        for secret in (
            *(API_KEY, API_KEY[:-1], WEBHOOK_KEY, S3_SECRET, DATABASE_PASSWORD, HOOK_TOKEN, LINK_SIGNATURE),
            *(signature[1], "X-Amz-", "base64,", audio, "A woman talks."),
        ):
            assert secret not in observed.log, [line for line in observed.log.splitlines() if secret in line]


class TestTraces:
    def test_a_job_runs_under_the_trace_of_the_request_that_made_it(self, observed: Observed) -> None:
        spans = [span for span in observed.world.spans if span.trace_id.hex() == TRACE]
        by_id = {span.span_id: span for span in spans}
        job, clip, publish = (next(span for span in spans if span.name == name) for name in ("job", "clip", "publish"))
        request = by_id[job.parent_span_id]
        assert request.kind == Span.SPAN_KIND_SERVER
        assert observed.world.services[request.span_id] == "avatar_api"
        assert observed.world.services[job.span_id] == "avatar_runner"
        assert by_id[clip.parent_span_id].name == by_id[publish.parent_span_id].name == "generating"
        assert by_id[by_id[clip.parent_span_id].parent_span_id].name == "job"
        attributes = {pair.key: pair.value for pair in job.attributes}
        assert attributes["avatar.job"].string_value == observed.videos["completed"]
        assert job.start_time_unix_nano <= clip.start_time_unix_nano < clip.end_time_unix_nano

    def test_nothing_else_is_exported_at_a_rate_of_nought(self, observed: Observed) -> None:
        assert {span.trace_id.hex() for span in observed.world.spans} == {TRACE}


class TestHeaders:
    def test_answers_are_neither_kept_nor_framed_nor_guessed_at(self, observed: Observed) -> None:
        for path in ("/v1/videos/ID", "/v1/videos/ID/content", "/docs.json", "/metrics"):
            headers = observed.headers[path]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cache-control"] == "no-store"
            assert "frame-ancestors 'none'" in headers["content-security-policy"]

    def test_bentomls_pages_may_run_their_scripts(self, observed: Observed) -> None:
        for path, kind in (("/", "text/html"), ("/static_content/index.css", "text/css")):
            assert observed.headers[path]["content-type"].startswith(kind)
            assert "content-security-policy" not in observed.headers[path]
            assert observed.headers[path]["x-content-type-options"] == "nosniff"
