"""The image that `bentoml containerize` makes, in the terms of BentoML's image definition; bentofile.yaml has the rest.

service.py hands it to BentoML, which asks for it when a Bento is built, and only then.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from bentoml.images import Image

from container.embedded import published_names

BASE_IMAGE = os.environ.get("AVATAR_BASE_IMAGE") or "docker.io/library/python:3.11-slim-bookworm"
"""Any image with Python 3.11 and apt will do."""
UV = "0.13.9"

BENTO = "/home/bentoml/bento"
WRITABLE = "/var/lib/avatar /app/models/.cache"  # AVATAR_HOME and HF_HOME of bentofile.yaml

COMPILER = (  # what torch.compile and triton call; CUDA comes with torch's wheels, ffmpeg with PyAV's
    "command -v cc > /dev/null || { apt-get update -qq && "
    "DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends gcc libc6-dev && "
    "rm -rf /var/lib/apt/lists/*; }"
)


class AvatarImage(Image):
    """BentoML's image with the guide's paths, and with container/start.py as what it runs."""

    def freeze(self, bento_fs: Path, *arguments: Any) -> Any:
        self.run(guide_paths(Path(os.environ.get("BENTOML_HOME") or "~/bentoml").expanduser() / "models"))
        frozen = super().freeze(bento_fs, *arguments)
        # BentoML's template has no place for a command, so its entry point gets ours in front.
        scripts = bento_fs / "env" / "docker"
        (scripts / "entrypoint.sh").rename(scripts / "bentoml.sh")
        shutil.copy(Path(__file__).with_name("entrypoint.sh"), scripts)
        return frozen


def define() -> AvatarImage:
    # distro: BentoML shall install no packages of its own.
    image = AvatarImage(base_image=BASE_IMAGE, distro="custom")
    image.run(COMPILER)
    image.run(f"command -v uv > /dev/null || pip install --no-cache-dir uv=={UV}")
    return image


def guide_paths(store: Path) -> str:
    """A command that makes them, with links to the models, which may come in other layers."""
    links = [f"ln -s {BENTO}/src/scripts/generate_infinitetalk.py {BENTO}/src/examples /app/InfiniteTalk/"]
    for published in published_names():
        name = published.lower()
        version = (store / name / "latest").read_text().strip()
        links.append(f"ln -s {BENTO}/models/{name}/{version} /app/models/{published}")
    folders = f"mkdir -p /app/InfiniteTalk {WRITABLE}"
    return " && ".join([folders, *links, f"chown -R bentoml:bentoml {WRITABLE} /app/models"])
