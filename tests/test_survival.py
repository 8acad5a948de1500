"""What holds whatever happens: kills, nonsense, crowds and large files. benchmarks/ has the same at full length."""

import asyncio
import gc
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import AsyncMock

import httpx
import pytest
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks import clients, kills, mutations
from tests.databases import (  # noqa: F401 - for pytest to find
    Database,
    PostgresServer,
    database_fixture,
    postgres_fixture,
)
from tests.served import Served
from tests.waiting import eventually

LIMIT = 64 * 2**20  # bytes of a request


def test_every_job_ends_once_and_right_whoever_is_killed(database: Database, tmp_path: Path) -> None:
    url = database.url if database.server else None
    figures = kills.prove(tmp_path / "home", url, jobs=10, kills=15)
    assert figures.broken == []
    assert (figures.jobs, figures.kills_of_the_api + figures.kills_of_runners) == (10, 15)
    assert figures.kills_of_the_api > 3
    assert figures.kills_of_runners > 3


def test_nonsense_breaks_nothing(tmp_path: Path) -> None:
    report = mutations.prove(tmp_path / "home", None, seed=1, numbers=range(250))
    assert report.wrong == []
    assert report.statuses["400"] > 50
    assert report.statuses["200"] > 20


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(
        tmp_path_factory.mktemp("served") / "home", max_upload_bytes=LIMIT, max_queued_per_key=10**4, fetch_seconds=1
    ) as running:
        yield running


def test_many_clients_at_once_get_their_videos_and_leave_nothing_open(served: Served) -> None:
    before = served.footprint()
    assert len(clients.all_visit(served, 20)["download"]) == 20
    assert served.footprint().open_files <= before.open_files + clients.OPEN_FILES


def test_health_is_asked_by_many_at_once_and_always_answered(served: Served) -> None:
    with httpx.Client() as client, ThreadPoolExecutor(16) as pool:
        answers = Counter(pool.map(lambda _: client.get(served.url + "/ping").status_code, range(600)))
    assert answers == {200: 600}


def test_while_the_runner_is_away_the_models_are_loading(tmp_path: Path) -> None:
    with Served(tmp_path / "home") as running:
        running.kill("avatar_runner")
        answers: list[int] = []
        with httpx.Client(timeout=10) as client:

            def back_again() -> bool:
                answers.append(client.get(running.url + "/ping").status_code)
                return 204 in answers and answers[-1] == 200

            eventually(back_again, answers)
        assert set(answers) == {200, 204}


def test_a_request_leaves_no_timer_behind_and_one_that_fails_ends_at_once() -> None:
    import service  # noqa: F401 - mends BentoML's middleware

    async def answers(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def fails(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ValueError

    async def ask(app: ASGIApp) -> int:
        async with asyncio.timeout(10):
            await TimeoutMiddleware(app, 3600)({"type": "http"}, AsyncMock(), AsyncMock())
        return sum(isinstance(found, asyncio.TimerHandle) and not found.cancelled() for found in gc.get_objects())

    assert asyncio.run(ask(answers)) == 0
    with pytest.raises(ValueError):
        asyncio.run(ask(fails))


def test_a_form_that_cannot_be_read_is_refused_with_the_reason(served: Served) -> None:
    for path in ("/v1/videos", "/generate"):
        for kind in ("multipart/form-data; boundary=x", "multipart/form-data"):
            answer = httpx.post(served.url + path, content=b"--y\r\n\r\n", headers={"Content-Type": kind})
            assert answer.status_code == 400, answer.text
            assert "form cannot be read" in answer.json()["error"]["message"]
        for odd in (b"\xff\xfe\x00", b"9" * 5000, b"[" * 100_000):
            answer = httpx.post(served.url + path, files={"speakers": odd, "image": b"x", "input_reference": b"x"})
            assert answer.status_code == 400, answer.text


def test_a_file_where_a_text_belongs_is_refused_by_name(served: Served) -> None:
    answer = httpx.post(served.url + "/generate", files={"prompt": ("prompt.txt", b"A man talks."), "image": b"x"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"] == "prompt: it is a file; send text."


@pytest.mark.parametrize("name", ["../../../../tmp/escaped", "." * 300, "/etc/passwd", "a\\b"])
def test_a_files_name_is_part_of_no_path(served: Served, name: str) -> None:
    files = {"image": (name, b"no picture"), "audio": (name, b"no sound")}
    answer = httpx.post(served.url + "/generate", files=files)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "image"


def test_a_content_type_that_is_no_text_gets_its_answer(served: Served) -> None:
    answer = httpx.post(served.url + "/v1/videos", content=b"{}", headers={b"Content-Type": b"\xff"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "input_reference"


@pytest.mark.parametrize("path", ["/v1/videos", "/generate"])
def test_a_body_beyond_the_limit_is_refused_also_to_callers_who_first_send_it_all(served: Served, path: str) -> None:
    answer = httpx.post(served.url + path, files={"audio": bytes(LIMIT + 2**20)})
    assert answer.status_code == 413, answer.text
    assert answer.json()["error"]["code"] == "too_large"


def test_a_wrong_method_is_told_the_right_ones(served: Served) -> None:
    for path, methods in (("/v1/videos", "GET, POST"), ("/v1/videos/x", "DELETE, GET"), ("/generate", "POST")):
        answer = httpx.put(served.url + path)
        assert (answer.status_code, answer.headers["Allow"]) == (405, methods)


def test_uploads_and_downloads_of_any_size_pass_through_in_little_memory(served: Served) -> None:
    more = clients.large_files(served, 60, at_once=2)
    assert all(megabytes < clients.FLAT_MB for megabytes in more.values()), more
    eventually(lambda: not any(path.is_file() for path in served.temporary.rglob("*")), "temporary files are left")


def test_the_api_is_as_its_description_says(served: Served, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{served.url}/openapi.json"]
    command += ["--max-examples", "5", "--seed", "1", "--workers", "1"]
    # No schema says which files are good ones, and authentication is off.
    command += ["--exclude-checks", "positive_data_acceptance,ignored_auth"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:]
    passed = re.search(r"generated, (\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) > 300
    assert served.alive()


def test_every_route_is_described_with_its_errors_and_examples(served: Served) -> None:
    about = httpx.get(served.url + "/openapi.json").json()
    for path, operations in about["paths"].items():
        for operation in operations.values():
            assert operation["summary"]
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    error = answer["content"]["application/json"]["example"]["error"]
                    assert {"type", "code", "message"} <= set(error), (path, status)
            if path.startswith("/v1/"):
                assert {"200", "401", "503"} <= set(operation["responses"])
    assert json.dumps(about["components"]["schemas"]["Video"]["examples"])
