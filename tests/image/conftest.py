"""What the tests of the image share: each image is built once, from a checkout with secrets lying about in it."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.image.engine import Container, Engine, copy_checkout, serving
from tests.image.registries import registry
from tests.small_hub import SmallHub

TOKEN = "hf_" + "PlantedForTheTest" * 2  # looks like Hugging Face's: 34 characters
CODE, PLAIN = "localhost/avatar-test-code", "localhost/avatar-test-plain"
REPOSITORIES = ("Wan-AI/Wan2.1-I2V-14B-480P", "TencentGameMate/chinese-wav2vec2-base", "MeiGen-AI/InfiniteTalk")


@dataclass(frozen=True)
class Built:
    """An image and all that was printed on the way."""

    name: str
    log: str


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine.set_up(tmp_path_factory.mktemp("engine"))
    yield engine
    engine.run("podman", "image", "prune", "--force")  # what the next build has no use for


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as it is here, and a token in three places where people leave one."""
    folder = tmp_path_factory.mktemp("checkout")
    copy_checkout(folder)
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.com")
    for command in (("init", "--quiet"), ("add", "."), (*identity, "commit", "--quiet", "--message", "All")):
        subprocess.run(["git", "-C", folder, *command], check=True)  # noqa: S607
    for name in (".env", "examples/.env", "models/token"):
        (folder / name).write_text(f"HF_TOKEN={TOKEN}\n")
    return folder


def import_models(engine: Engine, snapshots: Path, home: Path, profile: str) -> None:
    """From a hub on this machine: the commits are the models' versions, whatever the profile takes of them."""
    hub = SmallHub()
    for repository in REPOSITORIES:
        hub.add(repository, snapshots / repository.rpartition("/")[2])
    with hub.running():
        given = {"BENTOML_HOME": str(home), "HF_ENDPOINT": hub.url}
        engine.run("python", "models/import_models.py", "--profile", profile, variables=given)


@pytest.fixture(scope="session")
def store(snapshots: Path, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BENTOML_HOME with the three models."""
    home = tmp_path_factory.mktemp("store")
    import_models(engine, snapshots, home, "full")
    return home


@pytest.fixture(scope="session")
def plain(engine: Engine, checkout: Path, store: Path) -> Built:
    """By `bentoml build && bentoml containerize`, models in."""
    settings = {"BENTOML_HOME": str(store), "HF_TOKEN": TOKEN}
    log = engine.run("bentoml", "build", cwd=checkout, variables=settings)
    command = ("bentoml", "containerize", "avatar-api:latest", "--backend", "podman", "--image-tag", PLAIN)
    return Built(PLAIN, log + engine.run(*command, building=True, cwd=checkout, variables=settings))


@pytest.fixture(scope="session")
def code(engine: Engine, checkout: Path, store: Path, plain: Built) -> Built:
    """Without models, by scripts/build_image.py; after the plain one, whose layers it shares but for the last ones."""
    settings = {"BENTOML_HOME": str(store), "HF_TOKEN": TOKEN}
    command = ("python", "scripts/build_image.py", "--engine", "podman", "--profile", "full", "--tag", CODE)
    return Built(CODE, engine.run(*command, building=True, cwd=checkout, variables=settings))


@pytest.fixture(scope="session")
def hub(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A registry, and its folder."""
    folder = tmp_path_factory.mktemp("hub") / "registry"
    with registry(folder) as host:
        yield host, folder


@pytest.fixture(scope="session")
def pushed(engine: Engine, checkout: Path, store: Path, code: Built, hub: tuple[str, Path]) -> Built:
    """The code image with the models below it, in the registry."""
    target = f"{hub[0]}/me/avatar-api:v1"
    settings = {"BENTOML_HOME": str(store), "HF_TOKEN": TOKEN}
    return Built(target, engine.run("python", "scripts/push_image.py", CODE, target, cwd=checkout, variables=settings))


@pytest.fixture(scope="session")
def pulled(engine: Engine, pushed: Built) -> Iterator[str]:
    """What another machine gets from the registry."""
    engine.run("podman", "pull", "--quiet", "--tls-verify=false", pushed.name)
    yield pushed.name
    engine.run("podman", "image", "rm", "--force", pushed.name)


@pytest.fixture(scope="session")
def container(
    engine: Engine, pulled: str, tiny_lora: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Container]:
    """Of that image, with a LoRA for `quality=fast` beside it."""
    lora = ("--volume", f"{tiny_lora}:/lora.safetensors:ro", "--env", "AVATAR_FAST_LORA=/lora.safetensors")
    with serving(engine, pulled, tmp_path_factory.mktemp("container"), *lora) as running:
        yield running
