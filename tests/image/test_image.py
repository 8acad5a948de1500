"""The image as its users meet it: built both ways, pushed, pulled, run, and asked for videos."""

import base64
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from avatar_api.footage import Footage
from avatar_api.loading import EXIT_STATUS
from avatar_api.protos import avatar_pb2 as pb
from avatar_api.protos.avatar_pb2_grpc import AvatarServiceStub
from tests.conftest import REPOSITORY
from tests.image.conftest import REPOSITORIES, TOKEN, Built, import_models
from tests.image.engine import READY, Container, Engine, serving
from tests.runpod_queue import JobApi, data_uri
from tests.waiting import PATIENCE, eventually

GUIDE = """\
cd /app/InfiniteTalk
python generate_infinitetalk.py \\
  --task infinitetalk-14B \\
  --size infinitetalk-720 \\
  --ckpt_dir /app/models/Wan2.1-I2V-14B-480P \\
  --infinitetalk_dir /app/models/InfiniteTalk \\
  --wav2vec_dir /app/models/chinese-wav2vec2-base \\
  --input_json examples/single_example_image.json \\
  --save_file /tmp/test_output"""
"""The manual command of the guide, to the letter."""
SMALLER = "--size 64x64 --sample_steps 1 --frame_num 9 --motion_frame 5"  # a CPU's share of it: the last flag counts

VIDEO: dict[str, Any] = {"prompt": "A woman talks.", "size": "64x64", "steps": 1, "seed": 7, "max_seconds": 0.4}
FRAMES = 10  # 0.4 s at 25 per second

MODELS = "/home/bentoml/bento/models"
ENTRY_POINT = "/home/bentoml/bento/env/docker/entrypoint.sh"


def generate(container: Container, **values: Any) -> bytes:
    """A video over HTTP."""
    files = {"image": REPOSITORY / "examples" / "portrait.png", "audio": REPOSITORY / "examples" / "voice.wav"}
    sent = {name: file.read_bytes() for name, file in files.items()}
    answer = httpx.post(f"{container.url}/generate", data=VIDEO | values, files=sent, timeout=3600)
    assert answer.status_code == 200, answer.text + container.log
    return answer.content


def is_the_video(content: bytes, folder: Path) -> None:
    (folder / "video.mp4").write_bytes(content)
    with Footage(folder / "video.mp4") as footage:
        assert (len(footage), footage.width, footage.height) == (FRAMES, 64, 64)


def inspect(engine: Engine, image: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(engine.run("podman", "image", "inspect", image))[0]["Config"]
    return config


def model_file(engine: Engine, image: str, name: str) -> str:
    """Where a file of the models lies in an image."""
    find = ("podman", "run", "--rm", "--entrypoint", "find", image, MODELS, "-name", name)
    return engine.run(*find).splitlines()[0]


@pytest.fixture(scope="session")
def video(container: Container) -> bytes:
    """What the pushed image makes of VIDEO."""
    return generate(container)


def test_the_plain_path_gives_a_container_that_is_ready_and_makes_the_same_video(
    engine: Engine, plain: Built, video: bytes, tmp_path: Path
) -> None:
    with serving(engine, plain.name, tmp_path) as running:
        assert generate(running) == video


def test_both_ways_give_the_same_files_and_environment(engine: Engine, plain: Built, pulled: str) -> None:
    def files(image: str) -> set[str]:
        listing = "find / -xdev -path /proc -prune -o -printf '%p %y %l %U\n'"
        listed = engine.run("podman", "run", "--rm", "--user", "0", "--entrypoint", "sh", image, "-c", listing)
        return {line for line in listed.splitlines() if not line.startswith(("/run", "/dev", "/sys", "/etc"))}

    ours, theirs = files(pulled), files(plain.name)
    assert {line for line in ours ^ theirs if "/hf-models" not in line} == set()  # empty, BentoML's
    assert inspect(engine, pulled)["Env"] == inspect(engine, plain.name)["Env"]


def test_the_container_makes_the_same_video_over_http_and_grpc(
    container: Container, video: bytes, tmp_path: Path
) -> None:
    def request() -> Iterator[pb.CreateVideoRequest]:
        yield pb.CreateVideoRequest(video=pb.NewVideo(**VIDEO))
        for name, file in (("input_reference", "portrait.png"), ("audio", "voice.wav")):
            yield pb.CreateVideoRequest(
                file=pb.FileChunk(name=name, content=(REPOSITORY / "examples" / file).read_bytes())
            )
        yield pb.CreateVideoRequest(finish=True)

    is_the_video(video, tmp_path)
    with grpc.insecure_channel(f"127.0.0.1:{container.grpc_port}") as channel:
        videos = AvatarServiceStub(channel)
        made = videos.CreateVideo(request())
        for _ in videos.WatchVideo(pb.WatchVideoRequest(id=made.id)):
            pass
        parts = videos.DownloadVideo(pb.DownloadVideoRequest(id=made.id))
        assert b"".join(part.content for part in parts) == video


def test_a_lora_that_is_mounted_makes_fast_videos_and_leaves_exact_ones_alone(
    container: Container, video: bytes
) -> None:
    the_same = {"text_guidance": 1, "audio_guidance": 2, "shift": 2}
    assert generate(container, quality="fast") != generate(container, **the_same)
    assert generate(container) == video


def test_it_says_what_it_verified_and_which_gpu_it_found_and_prints_the_guides_command(container: Container) -> None:
    said = container.log.partition(READY)[2]
    assert "3 models, 50 files, 16.7 MB, sizes as in their locks" in said
    assert "GPU: " in said
    assert GUIDE.split() == said.partition("cd ")[2].partition("test_output")[0].join(["cd ", "test_output"]).split()


def test_the_guides_command_runs_in_the_container(container: Container) -> None:
    container.execute(f"{GUIDE} {SMALLER}")
    assert int(container.execute("stat -c %s /tmp/test_output.mp4")) > 1000


def test_a_killed_runner_is_started_again_in_a_container_too(container: Container, video: bytes) -> None:
    killed = container.runner()
    killed.kill()
    container.wait_for("Models loaded", times=2)
    assert container.runner().pid != killed.pid
    assert generate(container) == video


def test_what_the_start_took_is_told_from_the_verification_on(container: Container, video: bytes) -> None:
    told = httpx.get(f"{container.url}/metrics").text
    for part in ("verify", "transformer", "first_video"):
        assert f'avatar_start_seconds{{part="{part}"}}' in told


class TestOnRunPodsQueue:
    """The same image, with what RunPod sets in the environment of a queue endpoint's worker; its job API is on
    loopback."""

    @pytest.fixture(scope="class")
    @classmethod
    def api(cls) -> JobApi:
        return JobApi()

    @pytest.fixture(scope="class")
    @classmethod
    def worker(
        cls, engine: Engine, pulled: str, api: JobApi, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Container]:
        given = [part for name, value in api.environment.items() for part in ("--env", f"{name}={value}")]
        with serving(engine, pulled, tmp_path_factory.mktemp("worker"), *given) as running:
            yield running

    @staticmethod
    def wanted(**values: Any) -> dict[str, Any]:
        files = {"input_reference": "portrait.png", "audio": "voice.wav"}
        sent = {name: data_uri((REPOSITORY / "examples" / file).read_bytes()) for name, file in files.items()}
        return VIDEO | sent | values

    def test_a_job_is_answered_with_the_very_video_that_http_gives(
        self, api: JobApi, worker: Container, video: bytes
    ) -> None:
        job = api.answer("image-u1", self.wanted())
        assert base64.b64decode(job.output["video_base64"]) == video
        assert job.output["frames"] == FRAMES
        assert job.taken == len(job.answers) == 1
        assert job.progress[0]["percent"] < 100
        assert api.unauthorized == 0

    def test_sigterm_lets_it_finish_the_job_that_it_has_and_take_no_other(self, api: JobApi, worker: Container) -> None:
        job = api.ask("drained-u1", self.wanted(steps=200))
        eventually(lambda: any("step" in told for told in job.progress), seconds=PATIENCE)
        later = api.ask("later-u1", self.wanted())
        assert worker.stop(seconds=600) == 0, worker.log
        assert job.output["frames"] == FRAMES
        assert later.taken == 0


def test_what_gpus_runpod_and_torch_compile_need_is_there(engine: Engine, pulled: str) -> None:
    config = inspect(engine, pulled)
    environment = dict(variable.split("=", 1) for variable in config["Env"])
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert environment["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility,video"
    assert environment["RUNPOD_INIT_TIMEOUT"] == "900"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["MODEL_STORAGE_PATH"] == "/app/models"
    assert environment["HF_HOME"] == "/app/models/.cache"
    assert environment["AVATAR_GRPC_HOST"] == "0.0.0.0"  # noqa: S104 - within the container
    assert set(config["ExposedPorts"]) == {"3000/tcp", "3001/tcp"}
    run = ("podman", "run", "--rm", "--network", "none", "--entrypoint", "sh", pulled, "-c")
    assert engine.run(*run, "id -u; cc --version").startswith("1034\ncc (Debian")


def test_labels_name_the_version_the_commit_and_the_models(engine: Engine, pulled: str, store: Path) -> None:
    labels = inspect(engine, pulled)["Labels"]
    assert labels["org.opencontainers.image.version"] == "0.1.0"
    for repository in REPOSITORIES:
        name = repository.rpartition("/")[2].lower()
        version = (store / "models" / name / "latest").read_text()
        assert labels[f"avatar-api.model.{name}"].startswith(f"{repository}@{version}")


def test_skopeo_copies_it_out_of_the_registry(engine: Engine, pushed: Built, tmp_path: Path) -> None:
    engine.run("skopeo", "copy", "--quiet", "--src-tls-verify=false", f"docker://{pushed.name}", f"dir:{tmp_path}")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    sizes = {layer["digest"].removeprefix("sha256:"): layer["size"] for layer in manifest["layers"]}
    assert {digest: (tmp_path / digest).stat().st_size for digest in sizes} == sizes


@pytest.mark.parametrize(
    ("verify", "damage", "complaint"),
    [
        pytest.param("sizes", "rm {}", "{} is missing.\nPull the image again", id="missing"),
        pytest.param("sizes", "truncate -s 99 {}", "{} has 99 bytes instead of ", id="cut"),
        pytest.param("sizes", "chmod 0 {}", "{} cannot be read by uid 1034: chmod -R a+rX", id="locked"),
        pytest.param("full", "printf x | dd of={} conv=notrunc", "{} is damaged: its sha256 is not", id="changed"),
    ],
)
def test_a_model_file_that_is_damaged_stops_it_and_is_named(
    engine: Engine, pulled: str, verify: str, damage: str, complaint: str
) -> None:
    file = model_file(engine, pulled, "Wan2.1_VAE.pth")
    command = ("-c", f"{damage.format(file)} 2> /dev/null && exec {ENTRY_POINT}")
    said = engine.refused(pulled, "--env", f"AVATAR_VERIFY={verify}", "--entrypoint", "bash", command=command)
    assert said.startswith(f"error: {complaint.format(file)}")


def test_models_that_are_whole_and_cannot_be_loaded_end_it_with_a_status_of_their_own(
    engine: Engine, pulled: str
) -> None:
    more = f"""sed -i 's/"num_layers": 2/"num_layers": 7/' {MODELS}/wan2.1-i2v-14b-480p/*/config.json"""
    command = ("-c", f"{more} && exec {ENTRY_POINT}")
    said = engine.refused(pulled, "--entrypoint", "bash", command=command, status=EXIT_STATUS)
    assert said.splitlines()[-1].startswith(f"error: The models cannot be loaded: {MODELS}/wan2.1-i2v-14b-480p/")


def test_an_unknown_way_to_verify_is_refused(engine: Engine, pulled: str) -> None:
    said = engine.refused(pulled, "--env", "AVATAR_VERIFY=fast")
    assert said == "error: AVATAR_VERIFY=fast: it is one of sizes, full.\n"


def test_a_home_that_cannot_be_written_is_refused_with_path_uid_and_cure(
    engine: Engine, pulled: str, tmp_path: Path
) -> None:
    said = engine.refused(pulled, "--volume", f"{tmp_path}:/var/lib/avatar")
    assert said.startswith("error: AVATAR_HOME=/var/lib/avatar cannot be written by uid 1034 (Permission denied).")
    assert "`chown -R 1034:1034 FOLDER` on the host" in said


def test_the_code_image_without_models_says_what_it_lacks(engine: Engine, code: Built) -> None:
    said = engine.refused(code.name)
    assert said.startswith("error: Wan2.1-I2V-14B-480P is neither in this image")
    assert "-v ~/bentoml/models:/home/bentoml/models:ro" in said


def test_with_the_runtime_profile_in_a_volume_the_code_image_makes_the_same_video(
    engine: Engine, code: Built, snapshots: Path, video: bytes, tmp_path: Path
) -> None:
    import_models(engine, snapshots, tmp_path / "store", "runtime")
    volume = ("--volume", f"{tmp_path}/store/models:/home/bentoml/models:ro")
    with serving(engine, code.name, tmp_path, *volume) as running:
        assert "3 models, 20 files" in running.log
        assert generate(running) == video
        running.execute("test -f /app/models/Wan2.1-I2V-14B-480P/config.json")
        assert running.stop() == 0


def test_no_secret_is_in_any_layer_configuration_or_log(
    engine: Engine, plain: Built, code: Built, pushed: Built, hub: tuple[str, Path], tmp_path: Path
) -> None:
    here = b"A picture and a voice go in"  # of README.md: what the search must find, if it can find anything
    for built in (plain, code, pushed):
        assert TOKEN not in built.log
    blobs = [file for file in hub[1].rglob("data") if file.is_file()]
    assert any(here in file.read_bytes() for file in blobs)
    assert not [file for file in blobs if TOKEN.encode() in file.read_bytes()]
    engine.run(
        "podman", "save", "--quiet", "--format", "docker-archive", "--output", tmp_path / "plain.tar", plain.name
    )
    found: set[bytes] = set()
    with tarfile.open(tmp_path / "plain.tar") as saved:
        for member in saved:
            content = saved.extractfile(member)
            if content is not None:
                text = content.read()
                found |= {part for part in (here, TOKEN.encode()) if part in text}
    assert found == {here}


def test_verify_image_finds_nothing_wrong_in_the_registry(engine: Engine, pushed: Built, store: Path) -> None:
    engine.run("python", "scripts/verify_image.py", pushed.name, variables={"BENTOML_HOME": str(store)})
