"""What can be known before an image is built and pushed, which takes hours: each check says what it found, or raises.

Each is really tried: a container is run, an upload begun. What only seems to be there fails hours later.
"""

import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from container.credentials import HUB
from container.errors import ImageError
from container.layers import StoredModel, plan
from container.push import LIMITS
from container.registry import Reference, Registry

ENGINES = {"podman": "{{.Store.GraphRoot}}", "docker": "{{.DockerRootDir}}"}
"""Each with what its `info` calls the folder of its images."""

CODE_IMAGE_BYTES = 40e9
"""What building takes on the engine's disk, generously: about 9 GB with torch's CUDA libraries, the packages as they
come, and each layer again while it is committed. An estimate."""


def architecture(machine: str = platform.machine(), system: str = platform.system()) -> str:
    if machine.lower() in ("x86_64", "amd64"):
        return f"{machine}, as RunPod's"
    where = "an ARM Mac" if system == "Darwin" else f"a machine of {machine}"
    raise ImageError(
        f"This is {where}, and the image is for x86_64: build it on a cloud machine or a self-hosted runner "
        "(docs/BUILDING.md)."
    )


def choose_engine(asked: str | None) -> str:
    """The one that is asked for, or the first that is there."""
    there = [engine for engine in ENGINES if shutil.which(engine)]
    if asked is not None and shutil.which(asked) is None:
        raise ImageError(f"--engine {asked}: it is not installed; {' and '.join(there) or 'no other engine'} is.")
    if asked is None and not there:
        raise ImageError("Neither podman nor docker is installed: apt-get install podman, or install Docker.")
    return asked or there[0]


def engine_works(engine: str, base_image: str) -> str:
    """Runs a container of the base image, which the build begins with."""
    run = [engine, "run", "--rm", "--entrypoint", "python3", base_image, "--version"]
    ran = subprocess.run(run, capture_output=True, text=True)
    if ran.returncode:
        raise ImageError(
            f"{engine} is installed and cannot run a container ({last_line(ran.stderr)}): "
            f"make `{' '.join(run)}` work. Docker's daemon must run, and be yours to use (group docker)."
        )
    return f"{engine} runs {base_image} with {ran.stdout.strip()}"


def storage(engine: str) -> Path:
    """Where the engine's images lie."""
    asked = [engine, "info", "--format", ENGINES[engine]]
    answer = subprocess.run(asked, capture_output=True, text=True)
    folder = Path(answer.stdout.strip() or tempfile.gettempdir())
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def space(folder: Path, needed: float, what: str) -> str:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ImageError(
            f"No space for {what}: {folder} has {free / 1e9:.0f} GB free and {needed / 1e9:.0f} GB are needed. "
            "Clean up there (docker system prune -a, podman system prune -a), or take a larger disk."
        )
    return f"{folder} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB of them for {what}"


def profile(models: list[StoredModel], asked: str | None) -> str:
    """Are the models in the store those of the image that is wanted?"""
    profiles = {model.name: str(model.lock["profile"]) for model in models if model.lock["profile"] != "lora"}
    size = sum(entry["size"] for model in models for entry in model.lock["files"].values())
    others = [f"{name} ({held})" for name, held in profiles.items() if asked not in (None, held)]
    if others:
        raise ImageError(
            f"--profile {asked}: the store has {', '.join(others)}. What is in the store goes into the image: import "
            f"into another one, with BENTOML_HOME=DIR python models/import_models.py --profile {asked}, "
            "and keep BENTOML_HOME set."
        )
    held = " and ".join(sorted(set(profiles.values())))
    return f"{len(models)} models in the store, {size / 1e9:.1f} GB, profile {held}"


def registry(reference: Reference, models: list[StoredModel]) -> list[str]:
    """Begins an upload, and says what may stand in the way of 241 GB."""
    most, reason = LIMITS.get(reference.host, (0, ""))
    large = [layer.name for layer in plan(models) if most and layer.size > most]
    if large:
        raise ImageError(f"{reason}: {', '.join(large)}. Take another registry, such as Docker Hub.")
    client = Registry(reference)
    try:
        client.check_push()
        found = [f"{reference.host} takes uploads to {reference.repository}"]
        if client.manifest(reference.tag) is not None:
            found.append(f"{reference} is there already: other content needs --replace, or another tag")
    finally:
        client.close()
    if reference.host == HUB:
        found.append(
            "Docker Hub does not say which plan you have. The image needs a paid one: the free plan limits what may "
            "be transferred in six hours, and what private repositories may hold"
        )
    return found


def last_line(text: str) -> str:
    return (text.strip() or "no message").splitlines()[-1]


def build_failure(engine: str, log: list[str]) -> ImageError:
    """What a failed build means, and what to do."""
    full = next((line for line in log if "no space left on device" in line.lower()), None)
    if full is not None:
        return ImageError(
            f"No space left on device in the build: {full.strip()}. Clean up {storage(engine)} "
            "(docker system prune -a, podman system prune -a), or take a larger disk."
        )
    return ImageError(f"{engine} could not build the image; its last words: {last_line(chr(10).join(log))}")
