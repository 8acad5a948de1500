"""The image's one command, as RunPod starts it: a queue endpoint's worker, and a load balancing endpoint's."""

import contextlib
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from avatar_api.jobs import JobStore
from scripts.start import OWN_DATABASE, settings_for
from tests.runpod_queue import JobApi
from tests.served import Served, free_port
from tests.test_runpod_worker import CLIPS, PICTURE, voice, wanted
from tests.waiting import PATIENCE, eventually

BALANCED = {"RUNPOD_ENDPOINT_ID": "endpoint", "RUNPOD_POD_ID": "worker7"}
QUEUE = BALANCED | {"RUNPOD_WEBHOOK_GET_JOB": "https://…"}


def test_keys_are_off_behind_runpods_own_and_nowhere_else() -> None:
    assert settings_for(QUEUE)["AVATAR_AUTH"] == settings_for(BALANCED)["AVATAR_AUTH"] == "off"
    assert settings_for({"RUNPOD_POD_ID": "pod"}) == {}
    assert "AVATAR_AUTH" not in settings_for(BALANCED | {"AVATAR_AUTH": "keys"})


def test_on_a_network_volume_lie_files_and_no_sqlite() -> None:
    home = {"AVATAR_HOME": "/runpod-volume/avatar"}
    assert settings_for(QUEUE | home)["AVATAR_DATABASE_URL"] == OWN_DATABASE
    assert "AVATAR_DATABASE_URL" not in settings_for(QUEUE | home | {"AVATAR_DATABASE_URL": "postgresql://db"})
    assert "AVATAR_DATABASE_URL" not in settings_for(QUEUE | {"AVATAR_HOME": "/var/lib/avatar"})


def server_processes(served: Served) -> list[psutil.Process]:
    """The arbiter, first, and its services."""
    mark = str(served.home.absolute())
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("AVATAR_SIDECAR") == mark:
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def test_a_queue_endpoints_worker_outlives_its_server_and_ends_it_when_it_ends(tmp_path: Path) -> None:
    api = JobApi()
    with Served(tmp_path / "home", api.environment) as served:
        job = api.ask("started-u1", wanted(steps=100))
        eventually(lambda: JobStore(f"sqlite:///{served.home / 'jobs.db'}").page(), seconds=PATIENCE)
        killed = server_processes(served)
        killed[0].kill()  # the arbiter: its services are left
        eventually(lambda: job.answers, seconds=PATIENCE)
        assert job.output["frames"] == CLIPS * 10 - 3
        now = server_processes(served)
        assert now
        assert not {process.pid for process in killed} & {process.pid for process in now}
        assert "it is started again" in served.log
    assert api.unauthorized == 0
    eventually(lambda: not server_processes(served), seconds=PATIENCE)


class TestALoadBalancingEndpointsWorker:
    @pytest.fixture(scope="class")
    @classmethod
    def health(cls) -> int:
        return free_port()

    @pytest.fixture(scope="class")
    @classmethod
    def served(cls, health: int, tmp_path_factory: pytest.TempPathFactory) -> object:
        environment = BALANCED | {"PORT_HEALTH": str(health)}
        with Served(tmp_path_factory.mktemp("balanced") / "home", environment, max_upload_bytes=10**6) as served:
            yield served

    def test_answers_on_its_port_and_says_who_it_is_also_with_errors(self, served: Served) -> None:
        answers = [httpx.get(f"{served.url}{path}") for path in ("/ping", "/v1/videos", "/v1/videos/x", "/nowhere")]
        answers.append(httpx.post(f"{served.url}/v1/videos", content=bytes(2 * 10**6)))
        assert [answer.status_code for answer in answers] == [200, 200, 404, 404, 413]
        assert [answer.headers.get("X-Runpod-Worker-Id") for answer in answers] == ["worker7"] * len(answers)

    def test_tells_its_health_on_a_port_of_its_own(self, served: Served, health: int) -> None:
        assert httpx.get(f"http://127.0.0.1:{health}/ping").status_code == 200
        assert httpx.get(f"http://127.0.0.1:{health}/v1/videos").status_code == 404

    def test_answers_a_caller_who_waits_too_long_with_the_video_in_the_making(self, served: Served) -> None:
        files = {"image": PICTURE.read_bytes(), "audio": voice()}
        answer = httpx.post(f"{served.url}/generate", files=files, data={"size": "64x64", "steps": "200"}, timeout=60)
        assert answer.status_code == 202, answer.text
        assert answer.headers["Location"] == f"/v1/videos/{answer.json()['id']}"
        assert answer.headers["X-Runpod-Worker-Id"] == "worker7"

        def status() -> str:
            return str(httpx.get(served.url + answer.headers["Location"]).json()["status"])

        eventually(lambda: status() not in ("queued", "in_progress"))
        assert status() == "completed"
