"""A server whose models cannot be loaded ends, says why, and has a status of its own; for what passes it lives on."""

import json
import shutil
from pathlib import Path

from avatar_api.loading import ATTEMPTS, EXIT_STATUS
from tests.conftest import import_runtime
from tests.runpod_queue import JobApi
from tests.served import Served
from tests.waiting import PATIENCE, eventually

MISFIT, FULL, KILLED = "misfit", "full", "killed"


def served(home: Path, *loads: str, runpod: dict[str, str] | None = None) -> Served:
    """loads: what each loading of the models comes to; the later ones succeed."""
    home.mkdir()
    (home / "loads").write_text("".join(f"{load}\n" for load in loads))
    return Served(home, runpod, test_loads=home / "loads")


def test_models_that_do_not_fit_their_configuration_end_the_server_which_says_why(
    snapshots: Path, tmp_path: Path
) -> None:
    source, home = tmp_path / "snapshots", tmp_path / "bentoml"
    shutil.copytree(snapshots, source)
    config = source / "Wan2.1-I2V-14B-480P" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 7}))
    import_runtime(source, home)
    server = Served(tmp_path / "avatar", bento_home=home)
    assert server.run() == EXIT_STATUS
    last = server.log.splitlines()[-1]
    assert last.startswith("error: The models cannot be loaded: ")
    assert str(home / "models" / "wan2.1-i2v-14b-480p") in last
    assert "'blocks.2." in last


def test_a_runner_that_is_killed_each_time_it_loads_is_not_started_for_ever(tmp_path: Path) -> None:
    server = served(tmp_path / "home", *[KILLED] * ATTEMPTS)
    assert server.run() == EXIT_STATUS
    assert server.log.splitlines()[-1].startswith("error: The models cannot be loaded: the process died")
    assert (tmp_path / "home" / "loads").read_text() == ""  # it was tried so often


def test_what_passes_is_tried_again_and_counted_anew_once_they_were_loaded(tmp_path: Path) -> None:
    with served(tmp_path / "home", FULL, KILLED) as server:
        assert "MemoryError: Cannot allocate." in server.log
        (tmp_path / "home" / "loads").write_text(f"{FULL}\n" * (ATTEMPTS - 1))
        server.kill("avatar_runner")
        eventually(lambda: server.log.count("Models loaded on") == 2, seconds=PATIENCE)
        server.wait_until_ready()


def test_a_queue_endpoints_worker_ends_with_its_server(tmp_path: Path) -> None:
    worker = served(tmp_path / "home", MISFIT, runpod=JobApi().environment)
    assert worker.run() == EXIT_STATUS
    assert "error: The models cannot be loaded: It lacks 'head.weight'." in worker.log
