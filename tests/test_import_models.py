"""Importing models, as a user does it: the command, a hub over HTTP or a folder, and the store as BentoML sees it."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from infinitetalk.pipeline import InfiniteTalkPipeline
from models.store import place
from tests.conftest import GOLDENS, REPOSITORY
from tests.small_hub import Refusal, SmallHub

WAN, WAV2VEC2, INFINITETALK = "wan2.1-i2v-14b-480p", "chinese-wav2vec2-base", "infinitetalk"
REPOSITORIES = {
    WAN: "Wan-AI/Wan2.1-I2V-14B-480P",
    WAV2VEC2: "TencentGameMate/chinese-wav2vec2-base",
    INFINITETALK: "MeiGen-AI/InfiniteTalk",
}
SINGLE, MULTI = "single/infinitetalk.safetensors", "multi/infinitetalk.safetensors"
MEMORY = "/dev/shm"  # noqa: S108 - a filesystem that most machines have beside the disk's
TOKEN = "hf_" + "s3cret" * 5
IMPORT = [sys.executable, "models/import_models.py"]
IMPATIENT = [  # the same command, but its waits between retries are no longer than a test's
    *(sys.executable, "-c"),
    "import sys; from models import hub, import_models; hub.FIRST_WAIT = hub.LONGEST_WAIT = 0.01; "
    "sys.exit(import_models.main(sys.argv[1:]))",
]

FILES = {  # bytes of random content; what is 4096 or more is LFS on the small hub
    "Wan2.1-I2V-14B-480P": {
        "README.md": 300,
        "config.json": 250,
        "diffusion_pytorch_model.safetensors.index.json": 900,
        "diffusion_pytorch_model-00001-of-00002.safetensors": 200_000,
        "diffusion_pytorch_model-00002-of-00002.safetensors": 150_000,
        "models_t5_umt5-xxl-enc-bf16.pth": 90_000,
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": 60_000,
        "Wan2.1_VAE.pth": 30_000,
        "google/umt5-xxl/tokenizer.json": 5_000,
        "xlm-roberta-large/tokenizer.json": 5_000,
    },
    "chinese-wav2vec2-base": {
        "config.json": 300,
        "preprocessor_config.json": 200,
        "pytorch_model.bin": 50_000,
        "chinese-wav2vec2-base-fairseq-ckpt.pt": 70_000,
    },
    "InfiniteTalk": {
        SINGLE: 100_000,
        MULTI: 100_000,
        "comfyui/infinitetalk_single.safetensors": 100_000,
        "quant_models/infinitetalk_single_fp8.safetensors": 300_000,
        "an empty one": 0,
    },
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


@pytest.fixture
def hub(source: Path) -> Iterator[SmallHub]:
    hub = SmallHub()
    for repository in REPOSITORIES.values():
        hub.add(repository, source / repository.split("/")[1])
    with hub.running():
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "bentoml"


def write_source(folder: Path) -> Path:
    """The three snapshots' folders, with the names of published files and little content."""
    for name, files in FILES.items():
        for path, size in files.items():
            (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / path).write_bytes(np.random.default_rng(zlib.crc32(path.encode())).bytes(size))
    return folder


def environment(home: Path, hub: SmallHub | None, **variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    endpoint = {"HF_ENDPOINT": hub.url} if hub is not None else {"HF_HUB_OFFLINE": "1"}
    ours = {"BENTOML_HOME": str(home), "HF_HOME": f"{home}-hf", "COLUMNS": "200"}
    return inherited | endpoint | ours | variables


def run(
    home: Path, hub: SmallHub | None, *arguments: str | Path, command: list[str] = IMPORT, **variables: str
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment(home, hub, **variables),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in result.stderr
    assert TOKEN not in result.stdout + result.stderr
    return result


def succeeds(
    home: Path, hub: SmallHub | None, *arguments: str | Path, command: list[str] = IMPORT, **variables: str
) -> str:
    result = run(home, hub, *arguments, command=command, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def refused(
    home: Path, hub: SmallHub | None, *arguments: str | Path, command: list[str] = IMPORT, **variables: str
) -> str:
    """The one line that a user reads, having got no model."""
    result = run(home, hub, *arguments, command=command, **variables)
    assert result.returncode == 2, result.stdout
    assert re.fullmatch(r"error: .*\.\n", result.stderr), result.stderr
    return result.stderr


def model_folders(home: Path) -> dict[str, Path]:
    """Name → folder of every model in the store."""
    return {folder.parent.name: folder for folder in (home / "models").glob("*/*/")}


def contents(folder: Path) -> dict[str, bytes]:
    """Path → content, without what an import adds."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in ("model.yaml", "snapshot.lock.json")}


def whole(home: Path, source: Path, *names: str) -> bool:
    """Whether the store holds these models, each with every file of its snapshot."""
    folders = model_folders(home)
    assert set(folders) == set(names or REPOSITORIES)
    for name, folder in folders.items():
        assert contents(folder) == contents(source / REPOSITORIES[name].split("/")[1])
        lock = json.loads((folder / "snapshot.lock.json").read_text())
        assert {path: entry["sha256"] for path, entry in lock["files"].items()} == {
            path: hashlib.sha256(content).hexdigest() for path, content in contents(folder).items()
        }
        assert (folder.parent / "latest").read_text() == folder.name
    assert not any((home / "import").iterdir())
    return True


def all_bytes(source: Path) -> int:
    return sum(path.stat().st_size for path in source.rglob("*") if path.is_file())


# What is imported.


def test_everything_comes_from_the_hub_once(hub: SmallHub, home: Path, source: Path) -> None:
    hub.token = TOKEN
    hub.private = True
    output = succeeds(home, hub, HF_TOKEN=TOKEN)

    assert whole(home, source)
    assert hub.bytes_sent() == all_bytes(source)
    assert "Importing" in output and "1.3/1.3 MB" in output and "MB/s" in output
    lock = json.loads((model_folders(home)[INFINITETALK] / "snapshot.lock.json").read_text())
    commit = hub.repositories["MeiGen-AI/InfiniteTalk"].commit
    assert lock["repository"] == "MeiGen-AI/InfiniteTalk"
    assert (lock["revision"], lock["commit"], lock["profile"]) == ("main", commit, "full")
    assert model_folders(home)[INFINITETALK].name == commit[:12]
    assert lock["files"][SINGLE]["size"] == 100_000

    on_cdn = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert on_cdn and all(request.token is None for request in on_cdn)
    written = [path for path in home.parent.rglob("*") if path.is_file() and source not in path.parents]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert sum(path.stat().st_size for path in written) < 1.05 * all_bytes(source)  # no copy in a cache


def test_bentoml_finds_and_serves_the_models(hub: SmallHub, home: Path) -> None:
    hub.repositories["MeiGen-AI/InfiniteTalk"].commit = "123456789012" + "e" * 28  # in YAML, a number
    succeeds(home, hub)
    hub.repositories["Wan-AI/Wan2.1-I2V-14B-480P"].commit = "b" * 40
    hub.bytes_per_second = 100_000
    stop_after(hub.bytes_sent() + 50_000, start(home, hub), hub)  # half a model, which is none of BentoML's business
    script = """if True:
        import bentoml, pathlib
        from bentoml.models import BentoModel
        print(sorted(str(model.tag) for model in bentoml.models.list()))
        print(bentoml.models.get("infinitetalk").info.metadata)

        @bentoml.service
        class Service:
            weights = BentoModel("infinitetalk:latest")

            @bentoml.api
            def size(self) -> int:
                return pathlib.Path(self.weights.path_of("single/infinitetalk.safetensors")).stat().st_size

        print(Service.models[0].tag, Service().size())
        """
    result = run(home, hub, command=[sys.executable, "-c", script])
    tags = sorted(f"{name}:{folder.name}" for name, folder in model_folders(home).items())
    first, second, third = result.stdout.splitlines()
    assert first == str(tags)
    assert "'repository': 'MeiGen-AI/InfiniteTalk'" in second
    assert third == "infinitetalk:123456789012 100000"

    listed = run(home, hub, command=[str(Path(sys.executable).with_name("bentoml")), "models", "list", "-o", "json"])
    assert sorted(model["tag"] for model in json.loads(listed.stdout)) == tags


def test_the_runtime_profile_is_all_that_the_pipeline_reads(home: Path, snapshots: Path) -> None:
    output = succeeds(home, None, "--source", snapshots, "--profile", "runtime")
    folders = model_folders(home)
    assert set(contents(folders[INFINITETALK])) == {SINGLE, MULTI}
    assert "xlm-roberta-large/tokenizer.json" not in contents(folders[WAN])
    assert re.search(r"infinitetalk: profile runtime takes 2 of \d+ files, 3\.6 MB of [\d.]+ MB \([\d.]+%\)", output)
    InfiniteTalkPipeline.from_snapshots(folders[WAN], folders[INFINITETALK], folders[WAV2VEC2], "cpu")


def test_a_runtime_import_is_completed_and_a_full_one_stays(hub: SmallHub, home: Path, source: Path) -> None:
    succeeds(home, hub, "--profile", "runtime")
    runtime = hub.bytes_sent()
    assert set(contents(model_folders(home)[WAV2VEC2])) == set(FILES["chinese-wav2vec2-base"]) - {
        "chinese-wav2vec2-base-fairseq-ckpt.pt"
    }
    succeeds(home, hub)
    assert whole(home, source)
    assert hub.bytes_sent() == all_bytes(source) > runtime
    succeeds(home, hub, "--profile", "runtime")
    assert whole(home, source)
    assert hub.bytes_sent() == all_bytes(source)


def test_only_the_models_that_are_named(hub: SmallHub, home: Path, source: Path) -> None:
    succeeds(home, hub, "--only", "InfiniteTalk", WAV2VEC2)
    assert whole(home, source, INFINITETALK, WAV2VEC2)
    assert "there are wan2.1-i2v-14b-480p, chinese-wav2vec2-base, infinitetalk" in refused(home, hub, "--only", "sora")


def test_pinned_commits_are_written_and_imported_from_then_on(hub: SmallHub, home: Path, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "models", tmp_path / "models")
    listed, here = tmp_path / "models" / "snapshots.toml", [sys.executable, str(tmp_path / "models/import_models.py")]
    before = listed.read_text()
    assert run(home, hub, "--pin", command=here).returncode == 0

    commits = [repository.commit for repository in hub.repositories.values()]
    assert re.findall(r'^revision = "(.*)"$', listed.read_text(), re.MULTILINE) == commits
    assert re.sub('revision = ".*"', 'revision = "main"', listed.read_text()) == before
    assert not home.exists()
    assert run(home, hub, command=here).returncode == 0
    lock = json.loads((model_folders(home)[WAN] / "snapshot.lock.json").read_text())
    assert lock["revision"] == lock["commit"] == commits[0]

    offline = run(home, None, command=here)  # what is pinned and there is verified without the hub
    assert (offline.returncode, offline.stdout.count("as its lock says")) == (0, 3)


# Importing again.


def test_importing_again_verifies(hub: SmallHub, home: Path, source: Path) -> None:
    succeeds(home, hub)
    hub.sent.clear()
    output = succeeds(home, hub)
    assert f"{INFINITETALK}:{model_folders(home)[INFINITETALK].name}: in the store; its 5 files are as" in output
    assert "Verifying" in output
    assert hub.bytes_sent() == 0
    assert whole(home, source)


def test_damage_is_named_and_repaired_only_when_asked_for(hub: SmallHub, home: Path, source: Path) -> None:
    succeeds(home, hub)
    wan, talk = model_folders(home)[WAN], model_folders(home)[INFINITETALK]
    (talk / SINGLE).write_bytes(b"1" * 100_000)
    (talk / MULTI).write_bytes(b"12")
    (talk / "an empty one").unlink()
    hub.sent.clear()

    message = refused(home, hub, "--profile", "runtime")  # which does not need them all, but the store has them all
    for fault in ("an empty one (missing)", f"{MULTI} (2 bytes instead of 100000)", f"{SINGLE} (wrong checksum)"):
        assert fault in message
    assert "--repair" in message
    assert (talk / MULTI).read_bytes() == b"12"
    assert hub.bytes_sent() == 0

    untouched = (wan / "Wan2.1_VAE.pth").stat()
    succeeds(home, hub, "--repair", "--profile", "runtime")
    assert whole(home, source)
    assert hub.bytes_sent() == 200_000
    assert (wan / "Wan2.1_VAE.pth").stat() == untouched


def test_a_lost_lock_is_written_again_from_what_the_hub_says(hub: SmallHub, home: Path, source: Path) -> None:
    succeeds(home, hub)
    hub.sent.clear()
    (model_folders(home)[WAN] / "snapshot.lock.json").write_text("{")
    assert "snapshot.lock.json (missing or unreadable)" in refused(home, hub)
    succeeds(home, hub, "--repair")
    assert whole(home, source)
    assert hub.bytes_sent() == 0


def test_a_moved_branch_is_another_version_beside(hub: SmallHub, home: Path) -> None:
    succeeds(home, hub, "--only", WAV2VEC2)
    hub.repositories[REPOSITORIES[WAV2VEC2]].commit = "b" * 40
    succeeds(home, hub, "--only", WAV2VEC2)
    assert len(list((home / "models" / WAV2VEC2).glob("*/"))) == 2
    assert (home / "models" / WAV2VEC2 / "latest").read_text() == "b" * 12


# Stopped in the middle.


def stop_after(bytes_sent: int, process: subprocess.Popen[str], hub: SmallHub, how: int = signal.SIGKILL) -> str:
    """Send the signal when the hub has sent that much; what the command has to say to that."""
    while process.poll() is None and hub.bytes_sent() < bytes_sent:
        time.sleep(0.002)
    process.send_signal(how)
    return process.communicate(timeout=5)[1]


def start(home: Path, hub: SmallHub | None, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [*IMPORT, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment(home, hub), **pipes)  # type: ignore[call-overload]


def nothing_half_registered(home: Path, source: Path) -> None:
    for name, folder in model_folders(home).items():
        assert contents(folder) == contents(source / REPOSITORIES[name].split("/")[1])
        assert json.loads((folder / "snapshot.lock.json").read_text())["files"]


def test_a_killed_download_goes_on_at_the_byte_where_it_was(hub: SmallHub, home: Path, source: Path) -> None:
    hub.bytes_per_second = 400_000
    size = all_bytes(source)
    for moment in sorted(np.random.default_rng(0).integers(1000, size, 5)):
        stop_after(moment, start(home, hub), hub)
        nothing_half_registered(home, source)
    hub.bytes_per_second = 0
    succeeds(home, hub)
    assert whole(home, source)
    # Bytes on their way when it was killed come twice: of each of 8 files, what sockets and buffers hold.
    assert hub.bytes_sent() < size + 5 * 8 * 16_384
    starts = [start for name, start, _ in hub.sent if name.endswith("infinitetalk_single_fp8.safetensors")]
    assert any(starts)  # the largest was cut off at least once, and was not begun anew


def test_a_killed_import_from_a_folder_goes_on(home: Path, source: Path) -> None:
    lines = [0, 1, 4, 9, 14, 18]  # printed before the kill: the snapshots' lines, then one for each file
    for count in lines:
        process = start(home, None, "--source", source)
        assert process.stdout is not None
        for _ in range(count):
            process.stdout.readline()
        process.kill()
        process.communicate()
        nothing_half_registered(home, source)
    succeeds(home, None, "--source", source)
    assert whole(home, source)


def test_killed_at_any_step_on_the_disk_nothing_is_half_there(source: Path, tmp_path: Path) -> None:
    """A process for each step: import up to it, look at the store, import again."""
    script = """if True:
        import json, os, signal, sys
        from pathlib import Path
        from models import import_models

        STEPS = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")

        def import_in_a_child(kill_at):
            if child := os.fork():
                return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            left = kill_at

            def hook(event, arguments):
                nonlocal left
                if event in STEPS or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.addaudithook(hook)
            os._exit(import_models.main(sys.argv[2:]))

        step, killed = 1, True
        while killed:
            os.environ["BENTOML_HOME"] = f"{sys.argv[1]}/{step}"
            killed = import_in_a_child(step) == -signal.SIGKILL
            folders = Path(os.environ["BENTOML_HOME"]).glob("models/*/*/")
            print([sorted(path.name for path in folder.rglob("*") if path.is_file()) for folder in folders])
            assert import_in_a_child(-1) == 0
            step += 1
        """
    arguments = [str(tmp_path / "homes"), "--source", str(source), "--only", WAV2VEC2]
    steps = run(tmp_path, None, *arguments, command=[sys.executable, "-c", script]).stdout.splitlines()
    complete = str([sorted([*FILES["chinese-wav2vec2-base"], "model.yaml", "snapshot.lock.json"])])
    assert set(steps) == {"[]", complete}
    assert steps == sorted(steps, key=len)
    assert len(steps) > 20
    for home in (tmp_path / "homes").iterdir():
        assert whole(home, source, WAV2VEC2)


def test_what_an_interrupted_import_has_left_and_nobody_wants_goes(hub: SmallHub, home: Path, source: Path) -> None:
    hub.bytes_per_second = 400_000
    stop_after(500_000, start(home, hub, "--only", INFINITETALK), hub)
    assert any((home / "import").rglob("infinitetalk_single_fp8.safetensors*"))
    hub.bytes_per_second = 0
    succeeds(home, hub, "--only", INFINITETALK, "--profile", "runtime")
    assert set(contents(model_folders(home)[INFINITETALK])) == {SINGLE, MULTI}

    shutil.rmtree(home / "models")
    hub.bytes_per_second = 400_000
    stop_after(hub.bytes_sent() + 100_000, start(home, hub, "--only", INFINITETALK), hub)
    assert any((home / "import").iterdir())
    succeeds(home, None, "--source", source, "--only", INFINITETALK)
    assert whole(home, source, INFINITETALK)


def test_a_branch_that_moves_does_not_cost_the_finished_files(hub: SmallHub, home: Path, source: Path) -> None:
    hub.bytes_per_second = 400_000
    stop_after(300_000, start(home, hub, "--only", INFINITETALK), hub)
    hub.bytes_per_second = 0
    repository = hub.repositories["MeiGen-AI/InfiniteTalk"]
    begun, repository.commit = repository.commit, "b" * 40
    repository.older = (begun,)
    assert f"going on with {begun[:12]}" in succeeds(home, hub, "--only", INFINITETALK)
    assert whole(home, source, INFINITETALK)
    assert model_folders(home)[INFINITETALK].name == begun[:12]
    assert hub.bytes_sent() < 600_000 + 5 * 16_384


def test_ctrl_c_stops_at_once_and_says_how_to_go_on(hub: SmallHub, home: Path, source: Path) -> None:
    hub.bytes_per_second = 400  # 10 s from one piece to the next
    errors = stop_after(4096, process := start(home, hub), hub, signal.SIGINT)
    assert (process.returncode, errors) == (130, "stopped; the same command goes on from here\n")
    hub.bytes_per_second = 0
    succeeds(home, hub)
    assert whole(home, source)


def test_two_imports_at_a_time_are_one_too_many(hub: SmallHub, home: Path, source: Path) -> None:
    hub.bytes_per_second = 100_000
    first = start(home, hub)
    while not hub.bytes_sent():
        time.sleep(0.01)
    assert "Another import" in refused(home, hub)
    hub.bytes_per_second = 0
    first.communicate()
    assert whole(home, source)


# A hub that is in trouble.


def test_a_cut_connection_goes_on_where_it_was_cut(hub: SmallHub, home: Path, source: Path) -> None:
    hub.cuts = {SINGLE: [30_000, 0, 20_000], "config.json": [100]}
    output = succeeds(home, hub, command=IMPATIENT)
    assert whole(home, source)
    asked = [start for name, start, _ in hub.sent if name.endswith(SINGLE)]
    assert asked == [0, 30_000, 30_000, 50_000]
    assert hub.bytes_sent() == all_bytes(source)
    assert "MeiGen-AI/InfiniteTalk/single/infinitetalk.safetensors" in output and "trying again in 0.01 s" in output


def test_a_connection_that_is_always_cut_is_given_up(hub: SmallHub, home: Path, source: Path) -> None:
    hub.cuts = {SINGLE: [40_000] + [0] * 6}
    message = refused(home, hub, command=IMPATIENT)
    assert "MeiGen-AI/InfiniteTalk/single/infinitetalk.safetensors" in message
    assert "the same command goes on" in message
    assert INFINITETALK not in model_folders(home)
    succeeds(home, hub)
    assert whole(home, source)
    assert hub.bytes_sent(SINGLE) == 100_000


def test_a_server_that_knows_no_ranges_is_good_enough(hub: SmallHub, home: Path, source: Path) -> None:
    hub.ignores_ranges = True
    hub.cuts = {SINGLE: [30_000]}
    assert "wrong checksum" not in succeeds(home, hub, command=IMPATIENT)
    assert whole(home, source)


def test_a_corrupt_file_is_fetched_once_more(hub: SmallHub, home: Path, source: Path) -> None:
    hub.corrupt = {SINGLE: [True], "chinese-wav2vec2-base/config.json": [True]}  # known by sha256, and by git's sha1
    assert succeeds(home, hub).count("wrong checksum; fetching it once more") == 2
    assert whole(home, source)


def test_a_file_that_is_corrupt_twice_is_named_and_not_registered(hub: SmallHub, home: Path, source: Path) -> None:
    hub.corrupt = {MULTI: [True, True]}
    assert f"MeiGen-AI/InfiniteTalk/{MULTI} came with a wrong checksum twice" in refused(home, hub)
    assert INFINITETALK not in model_folders(home)
    succeeds(home, hub)
    assert whole(home, source)


def test_a_rate_limit_is_waited_for(hub: SmallHub, home: Path, source: Path) -> None:
    hub.refusals = {
        "/api/models/MeiGen-AI/InfiniteTalk/revision/main": [Refusal(429, {"Retry-After": "1"})],
        SINGLE: [Refusal(429, {"Retry-After": "2"})],
    }
    began = time.monotonic()
    output = succeeds(home, hub)
    assert time.monotonic() - began > 3
    assert "the hub answers 429; trying again in 2 s" in output
    assert whole(home, source)


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/api/models/MeiGen-AI/InfiniteTalk/revision/main", 429, "the hub limits requests (429), after 5 retries too"),
        (
            f"/cdn/MeiGen-AI/InfiniteTalk/{SINGLE}",
            503,
            f"{SINGLE}: the hub answers 503: wait a while; the same command",
        ),
    ],
)
def test_what_does_not_pass_is_given_up(hub: SmallHub, home: Path, path: str, status: int, says: str) -> None:
    hub.refusals = {path: [Refusal(status)] * 100}
    assert says in refused(home, hub, command=IMPATIENT)
    assert sum(request.path == path for request in hub.requests) == 6
    assert INFINITETALK not in model_folders(home)


def test_xet_storage_is_used_where_the_hub_offers_it(hub: SmallHub, home: Path, source: Path, tmp_path: Path) -> None:
    storage = tmp_path / "xet"
    storage.mkdir()
    hub.xet_storage = f"local://{storage}"
    repository = hub.repositories["MeiGen-AI/InfiniteTalk"]
    script = """if True:
        import hf_xet, pathlib, sys
        with hf_xet.XetSession().new_upload_commit(endpoint=sys.argv[1]) as upload:
            files = [upload.start_upload_bytes(pathlib.Path(path).read_bytes()) for path in sys.argv[2:]]
        print(*(file.result().xet_info.hash for file in files))
        """
    uploaded = [str(repository.files[path]) for path in (SINGLE, MULTI)]
    stored = run(home, hub, hub.xet_storage, *uploaded, command=[sys.executable, "-c", script])
    repository.xet_hashes = dict(zip((SINGLE, MULTI), stored.stdout.split(), strict=True))
    part = home / "import" / f"infinitetalk-{repository.commit[:12]}" / (SINGLE + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(repository.files[SINGLE].read_bytes()[:60_000])  # from an import that was killed

    output = succeeds(home, hub, "--only", INFINITETALK)
    assert whole(home, source, INFINITETALK)
    assert hub.bytes_sent(SINGLE) == hub.bytes_sent(MULTI) == 0  # neither came from the CDN
    assert "checksum" not in output  # the part was of use

    shutil.rmtree(home)
    succeeds(home, hub, "--only", INFINITETALK, HF_HUB_DISABLE_XET="1")
    assert whole(home, source, INFINITETALK)
    assert hub.bytes_sent(SINGLE) == 100_000


# Refused before the first byte.


def test_a_bad_token(hub: SmallHub, home: Path) -> None:
    hub.token = TOKEN[::-1]
    message = refused(home, hub, HF_TOKEN=TOKEN)
    assert "The token in HF_TOKEN is not valid (401)" in message and "/settings/tokens" in message
    assert "characters that no token has" in refused(home, hub, HF_TOKEN=TOKEN + "…")
    assert not any(request.path.startswith("/api/models/") for request in hub.requests)


def test_no_token_where_one_is_needed(hub: SmallHub, home: Path) -> None:
    hub.private = True
    message = refused(home, hub)
    assert "demands a token (401)" in message and "set HF_TOKEN" in message
    assert hub.bytes_sent() == 0


def test_a_gated_repository(hub: SmallHub, home: Path) -> None:
    hub.token = TOKEN
    hub.repositories["MeiGen-AI/InfiniteTalk"].gated = True
    message = refused(home, hub, HF_TOKEN=TOKEN)
    assert f"MeiGen-AI/InfiniteTalk is gated (403): accept its terms on {hub.url}/MeiGen-AI/InfiniteTalk" in message
    assert hub.bytes_sent() == 0


def test_a_repository_or_revision_that_is_not_there(hub: SmallHub, home: Path) -> None:
    repository = hub.repositories.pop("MeiGen-AI/InfiniteTalk")
    message = refused(home, hub)
    assert "MeiGen-AI/InfiniteTalk is not on" in message and "snapshots.toml" in message
    hub.repositories[repository.name] = repository
    hub.refusals = {"/InfiniteTalk/revision/main": [Refusal(404, {"X-Error-Code": "RevisionNotFound"})]}
    assert "MeiGen-AI/InfiniteTalk has no such revision (404)" in refused(home, hub)
    assert hub.bytes_sent() == 0


def test_a_repository_that_lacks_what_serving_reads(hub: SmallHub, home: Path) -> None:
    del hub.repositories["MeiGen-AI/InfiniteTalk"].files[MULTI]
    assert f"lacks {MULTI}, which serving reads" in refused(home, hub)
    assert hub.bytes_sent() == 0


def test_too_little_disk(hub: SmallHub, home: Path) -> None:
    hub.repositories["MeiGen-AI/InfiniteTalk"].claimed_sizes[SINGLE] = 10**15
    message = refused(home, hub)
    free = shutil.disk_usage(home).free / 1e9
    match = re.search(r"has ([\d.]+) GB free and ([\d.]+) PB are still missing", message)
    assert match is not None
    assert float(match[1]) == pytest.approx(free, rel=0.1)
    assert match[2] == "1.0"
    assert "--profile runtime" in message
    assert hub.bytes_sent() == 0


def test_a_disk_that_fills_up_in_the_middle(hub: SmallHub, home: Path, source: Path) -> None:
    full = "import errno, os; from models import hub, import_models\n"
    full += "def sync(content): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), content.name)\n"
    full += "hub.sync = sync; raise SystemExit(import_models.main())"
    message = refused(home, hub, command=[sys.executable, "-c", full])
    assert "No space left on device: make room there" in message and str(home) in message
    assert not model_folders(home)
    succeeds(home, hub)
    assert whole(home, source)


def test_no_network(hub: SmallHub, home: Path) -> None:
    message = refused(home, None)
    assert "HF_HUB_OFFLINE is set" in message and "--source" in message
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        hub.url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    message = refused(home, hub, command=IMPATIENT)
    assert "Connection refused" in message and "check the network" in message and "--source" in message


def test_a_page_instead_of_the_hub(hub: SmallHub, home: Path) -> None:
    hub.refusals = {"/revision/main": [Refusal(200)]}  # what a proxy's login page looks like
    assert "does not answer as a hub does" in refused(home, hub)


def test_a_file_that_would_lie_outside(hub: SmallHub, home: Path, source: Path) -> None:
    hub.repositories["MeiGen-AI/InfiniteTalk"].files["single/../../../../evil"] = source / "InfiniteTalk" / SINGLE
    assert "do not trust this source" in refused(home, hub)


def test_a_store_that_cannot_be_written(hub: SmallHub, home: Path) -> None:
    home.write_text("a file")
    message = refused(home, hub)
    assert str(home) in message and "Not a directory" in message


# From a folder.


def test_a_folder_is_linked_not_copied(home: Path, source: Path) -> None:
    output = succeeds(home, None, "--source", source)
    assert whole(home, source)
    assert "made of hard links" in output
    files = [path for path in source.rglob("*") if path.is_file()]
    assert all(path.stat().st_nlink == 2 for path in files)
    lock = json.loads((model_folders(home)[WAN] / "snapshot.lock.json").read_text())
    assert (lock["commit"], lock["revision"]) == (None, None)

    versions = {name: folder.name for name, folder in model_folders(home).items()}
    assert succeeds(home, None, "--source", source).count("as its lock says") == 3
    moved = write_source(source.parent / "elsewhere")
    (moved / "InfiniteTalk" / ".cache" / "huggingface").mkdir(parents=True)  # what `hf download` leaves
    (moved / "InfiniteTalk" / ".cache" / "huggingface" / "x.metadata").write_text("…")
    succeeds(home, None, "--source", moved)
    assert {name: folder.name for name, folder in model_folders(home).items()} == versions  # the content decides

    (moved / "InfiniteTalk" / SINGLE).write_bytes(b"another")
    succeeds(home, None, "--source", moved)
    assert len(list((home / "models" / INFINITETALK).glob("*/"))) == 2
    assert (model_folders(home)[WAN] / "config.json").read_bytes() == (
        source / "Wan2.1-I2V-14B-480P/config.json"
    ).read_bytes()


def test_a_folder_of_symbolic_links_becomes_files(home: Path, source: Path, tmp_path: Path) -> None:
    linked = tmp_path / "hub cache"
    for path in (path for path in source.rglob("*") if path.is_file()):
        link = linked / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    succeeds(home, None, "--source", linked)
    assert whole(home, source)
    assert not any(path.is_symlink() for path in home.rglob("*"))


@pytest.mark.skipif(not os.access(MEMORY, os.W_OK), reason="needs a second filesystem")
def test_a_folder_on_another_filesystem_is_copied(home: Path) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        source = write_source(Path(folder))
        if source.stat().st_dev == home.parent.stat().st_dev:
            pytest.skip("the temporary folder is on that filesystem too")
        assert "made of copies" in succeeds(home, None, "--source", source)
        assert whole(home, source)
        (home / "models" / INFINITETALK / "latest").unlink()
        (model_folders(home)[INFINITETALK] / SINGLE).write_bytes(b"")
        assert f"{SINGLE} (0 bytes instead of 100000)" in refused(home, None, "--source", source)
        succeeds(home, None, "--source", source, "--repair")
        assert whole(home, source)


def test_a_filesystem_without_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"content")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError))
    assert place(tmp_path / "a", tmp_path / "b") in ("reflinks", "copies")
    assert (tmp_path / "b").read_bytes() == b"content"
    assert (tmp_path / "b").stat().st_ino != (tmp_path / "a").stat().st_ino


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("InfiniteTalk", "InfiniteTalk is not there: --source takes a folder that holds Wan2.1-I2V-14B-480P, "),
        ("Wan2.1-I2V-14B-480P/Wan2.1_VAE.pth", "lacks Wan2.1_VAE.pth, which serving reads"),
        ("Wan2.1-I2V-14B-480P/google", "lacks google/umt5-xxl/*, which serving reads"),
        (
            "Wan2.1-I2V-14B-480P/diffusion_pytorch_model-00001-of-00002.safetensors",
            "lacks diffusion_pytorch_model-00001",
        ),
        (
            "chinese-wav2vec2-base/pytorch_model.bin",
            "lacks model.safetensors or pytorch_model.bin, which serving reads",
        ),
    ],
)
def test_a_folder_that_is_not_complete(home: Path, source: Path, lost: str, says: str) -> None:
    path = source / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert says in refused(home, None, "--source", source)
    assert not model_folders(home)


# One LoRA.

LORA = "wan21_t2v_14b_lightx2v_cfg_step_distill_lora_rank32"
LORA_FILE = "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors"
LORA_CONTENT = (GOLDENS / "lora" / "lora.safetensors").read_bytes()


@pytest.fixture
def lora_source(tmp_path: Path) -> Path:
    """A folder of one repository: LoRAs, one of them in a folder with a name that is a pattern, and other files."""
    folder = tmp_path / "loras" / "WanVideo_comfy"
    for path in (LORA_FILE, f"[v2]/{LORA_FILE}", "[v2]/Größer als (1).safetensors"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(LORA_CONTENT)
    (folder / "a model.safetensors").write_bytes(b"0" * 100_000)
    return folder.parent


@pytest.fixture
def lora_hub(lora_source: Path) -> Iterator[SmallHub]:
    hub = SmallHub()
    hub.add("Kijai/WanVideo_comfy", lora_source / "WanVideo_comfy")
    with hub.running():
        yield hub


def imports_lora(home: Path, hub: SmallHub | None, *arguments: str | Path) -> str:
    result = run(home, hub, "--lora", *arguments)
    assert result.returncode == 0, result.stderr
    assert not any((home / "import").iterdir())
    return result.stdout


def refuses_lora(home: Path, hub: SmallHub | None, *arguments: str | Path) -> str:
    """The one line that a user reads, having got no LoRA and no rest of one."""
    before = model_folders(home)
    result = run(home, hub, "--lora", *arguments)
    assert result.returncode == 2, result.stdout
    assert model_folders(home) == before
    assert not any((home / "import").iterdir())
    line = result.stderr.splitlines()[-1]
    assert re.fullmatch(r"error: .*\.", line), result.stderr
    return line


def test_a_lora_comes_from_the_hub_alone(lora_hub: SmallHub, home: Path) -> None:
    lora_hub.bytes_per_second = 40_000
    stop_after(20_000, start(home, lora_hub, "--lora", f"Kijai/WanVideo_comfy/{LORA_FILE}"), lora_hub)
    assert not model_folders(home)
    lora_hub.bytes_per_second = 0
    output = imports_lora(home, lora_hub, f"Kijai/WanVideo_comfy/{LORA_FILE}")
    assert [start > 0 for _, start, _ in lora_hub.sent] == [False, True]  # it went on where it was

    folder, commit = model_folders(home)[LORA], lora_hub.repositories["Kijai/WanVideo_comfy"].commit
    assert contents(folder) == {LORA_FILE: LORA_CONTENT}
    assert f"{LORA}:{commit[:12]}: 43.7 kB, every file verified" in output
    lock = json.loads((folder / "snapshot.lock.json").read_text())
    assert (lock["repository"], lock["commit"], lock["profile"]) == ("Kijai/WanVideo_comfy", commit, "lora")
    assert lock["files"][LORA_FILE]["sha256"] == hashlib.sha256(LORA_CONTENT).hexdigest()
    listed = run(home, None, command=[str(Path(sys.executable).with_name("bentoml")), "models", "list", "-o", "json"])
    assert [model["tag"] for model in json.loads(listed.stdout)] == [f"{LORA}:{commit[:12]}"]

    lora_hub.sent.clear()
    imports_lora(home, lora_hub, f"Kijai/WanVideo_comfy/{LORA_FILE}")
    # The same commit has another of that name: it would have the same tag.
    message = refuses_lora(home, lora_hub, f"Kijai/WanVideo_comfy/[v2]/{LORA_FILE}")
    assert f"`bentoml models delete {LORA}:{commit[:12]}`" in message
    assert lora_hub.bytes_sent() == 0


def test_a_lora_of_a_revision(lora_hub: SmallHub, home: Path) -> None:
    repository = lora_hub.repositories["Kijai/WanVideo_comfy"]
    repository.older = ("c" * 40,)
    asked = f"Kijai/WanVideo_comfy@{'c' * 40}/[v2]/Größer als (1).safetensors"
    imports_lora(home, lora_hub, asked)
    folder = model_folders(home)["gr-er-als-1"]
    assert folder.name == "c" * 12
    assert contents(folder) == {"[v2]/Größer als (1).safetensors": LORA_CONTENT}
    assert "as its lock says" in imports_lora(home, None, asked)  # a commit that is there needs no hub


def test_an_interrupted_lora_of_the_same_name_elsewhere_is_another(lora_hub: SmallHub, home: Path) -> None:
    lora_hub.bytes_per_second = 40_000
    stop_after(20_000, start(home, lora_hub, "--lora", f"Kijai/WanVideo_comfy/{LORA_FILE}"), lora_hub)
    lora_hub.bytes_per_second = 0
    other = lora_hub.add("Somebody/copies", lora_hub.repositories["Kijai/WanVideo_comfy"].files[LORA_FILE].parent)
    imports_lora(home, lora_hub, f"Somebody/copies/{LORA_FILE}")
    assert model_folders(home)[LORA].name == other.commit[:12]


def test_a_lora_from_a_file(home: Path, lora_source: Path) -> None:
    asked = lora_source / "WanVideo_comfy" / "[v2]" / LORA_FILE
    assert "made of hard links" in imports_lora(home, None, asked)
    folder = model_folders(home)[LORA]
    assert folder.name == hashlib.sha256(LORA_CONTENT).hexdigest()[:12]
    assert contents(folder) == {LORA_FILE: LORA_CONTENT}

    (folder / LORA_FILE).unlink()
    (folder / LORA_FILE).write_bytes(b"damage")
    assert "with --repair" in refuses_lora(home, None, asked)
    # With --source the same words name the file of a folder; a tag comes from the name, whatever signs are in it.
    (lora_source / "WanVideo_comfy" / LORA_FILE).rename(lora_source / "WanVideo_comfy" / "-My LoRA_.safetensors")
    imports_lora(home, None, "Kijai/WanVideo_comfy/-My LoRA_.safetensors", "--source", lora_source)
    folder = model_folders(home)["my-lora"]
    assert contents(folder) == {"-My LoRA_.safetensors": LORA_CONTENT}
    assert json.loads((folder / "snapshot.lock.json").read_text())["repository"] == "Kijai/WanVideo_comfy"
    assert "takes DIR/REPOSITORY/FILE" in refuses_lora(home, None, "a/b/c.safetensors", "--source", lora_source)
    assert "is neither a file" in refuses_lora(home, None, asked, "--source", lora_source)  # one source at a time


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("Kijai/WanVideo_comfy/b.safetensors", "has no b.safetensors: correct what --lora says"),
        ("Kijai/WanVideo/a.safetensors", "Kijai/WanVideo is not on"),
        ("Kijai/WanVideo_comfy@v9/a.safetensors", "Kijai/WanVideo_comfy has no such revision (404)"),
        ("Kijai/a.safetensors", "is neither a file here nor OWNER/REPOSITORY/FILE on the hub"),
        ("Kijai/WanVideo_comfy/a.pt", "only .safetensors files are imported"),
        ("MeiGen-AI/InfiniteTalk/single/infinitetalk.safetensors", "infinitetalk is the name of a snapshot"),
    ],
)
def test_what_is_no_lora_is_refused(lora_hub: SmallHub, home: Path, asked: str, says: str) -> None:
    assert says in refuses_lora(home, lora_hub, asked)


def test_a_file_that_is_no_lora_is_refused_and_forgotten(
    lora_hub: SmallHub, home: Path, lora_source: Path, tmp_path: Path
) -> None:
    repository = lora_hub.repositories["Kijai/WanVideo_comfy"]
    whole_model = GOLDENS / "ckpt_tiny" / "diffusion_pytorch_model-00001-of-00007.safetensors"
    repository.files[LORA_FILE] = whole_model
    message = refuses_lora(home, lora_hub, f"Kijai/WanVideo_comfy/{LORA_FILE}")
    assert f"Kijai/WanVideo_comfy/{LORA_FILE} has a tensor 'blocks." in message
    damaged = lora_source / "WanVideo_comfy" / "a model.safetensors"
    assert f"error: {damaged} (100000 bytes) is truncated or damaged" in refuses_lora(home, None, damaged)

    (tmp_path / "mended").write_bytes(LORA_CONTENT)
    repository.files[LORA_FILE], repository.commit = tmp_path / "mended", "d" * 40
    imports_lora(home, lora_hub, f"Kijai/WanVideo_comfy/{LORA_FILE}")
    assert model_folders(home)[LORA].name == "d" * 12


def test_a_lora_is_imported_alone(home: Path) -> None:
    for more in (["--pin"], ["--only", "infinitetalk"]):
        result = run(home, None, "--lora", "a/b/c.safetensors", *more)
        assert result.returncode == 2
        assert "leave --only and --pin out" in result.stderr
