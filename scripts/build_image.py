"""Build the code image: all of the image but the models, which scripts/push_image.py puts below it as it pushes.

    python scripts/build_image.py --check --target docker.io/me/avatar-api:v1.0
                                                       what would stop the work hours later, asked beforehand
    python scripts/build_image.py --tag avatar-api:v1.0

The models must be in the store ($BENTOML_HOME; models/import_models.py), since the image names their versions. It also
runs alone, with that store as a volume: -v ~/bentoml/models:/home/bentoml/models:ro. docs/BUILDING.md says more.
"""

import argparse
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder

from container import checks
from container.errors import ImageError
from container.image import BASE_IMAGE
from container.layers import StoredModel, read_store, store_home
from container.registry import Reference
from models.hub import check_access
from models.import_models import find_snapshots, read_snapshots, size_of
from models.store import MODEL_YAML, ImportRefusedError

REPOSITORY = Path(__file__).resolve().parents[1]

Result = TypeVar("Result", str, list[str])


def check(options: argparse.Namespace) -> int:
    """Try everything that can be tried beforehand, and say all that is wrong. Returns the exit status."""
    failed = 0

    def attempt(what: Callable[[], Result]) -> Result | None:
        nonlocal failed
        try:
            found = what()
        except (ImageError, ImportRefusedError) as error:
            print(f"✗ {error}")
            failed += 1
            return None
        for line in [found] if isinstance(found, str) else found:
            print(f"✓ {line}")
        return found

    attempt(checks.architecture)
    engine = attempt(lambda: checks.choose_engine(options.engine))
    if engine is not None:
        attempt(lambda: checks.engine_works(engine, BASE_IMAGE))
        attempt(lambda: checks.space(checks.storage(engine), checks.CODE_IMAGE_BYTES, "the code image"))
    models: list[StoredModel] = []
    try:
        models = read_store()
    except ImageError as error:
        print(f"✗ {error}")
        failed += 1
        attempt(lambda: models_on_hub(options.profile or "full"))
    else:
        attempt(lambda: checks.profile(models, options.profile))
    if options.target is not None:
        attempt(lambda: checks.registry(Reference.parse(options.target), models))
    if failed:
        print(f"{failed} of these would stop the work: mend them, and check again.")
    return 2 if failed else 0


def models_on_hub(profile: str) -> list[str]:
    """Whether they can be imported: the token, each repository, the room for them."""
    found = find_snapshots(read_snapshots([]), None, profile)
    for model in found:
        check_access(model, model.files[0])
    size = sum(size_of(model.files) for model in found)
    home = store_home()
    folder = next(place for place in (home, *home.parents) if place.is_dir())
    token = "with the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "without an HF_TOKEN, at a lower rate"
    return [f"the hub hands out all models, {token}", checks.space(folder, size, "the models")]


def build(tag: str, engine: str, models: list[StoredModel]) -> None:
    """Build the Bento and its image without the models. Raises ImageError."""
    import bentoml
    from bentoml.exceptions import BentoMLException

    log: list[str] = []
    logger = logging.getLogger("bentoml")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    listener = logging.Handler()
    listener.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(listener)
    with tempfile.TemporaryDirectory(prefix="avatar-image-") as home:
        # BentoML copies a Bento's models into what it builds from. So it gets a store that has their names only, and
        # what it copies even of those stays out of the image.
        for model in models:
            named = Path(home) / "models" / model.name / model.version
            named.mkdir(parents=True)
            shutil.copy(model.folder / MODEL_YAML, named)
            (named.parent / "latest").write_text(model.version)
        os.environ["BENTOML_HOME"] = home  # which BentoML reads at its first use
        try:
            bento = bentoml.bentos.build_bentofile(str(REPOSITORY / "bentofile.yaml"), build_ctx=str(REPOSITORY))
        except BentoMLException as error:
            raise ImageError(f"BentoML cannot build the Bento: {error}") from error
        Path(bento.path, ".dockerignore").write_text(".dockerignore\nmodels\nhf-models\n")
        backend: Any = engine
        built = bentoml.container.build(str(bento.tag), backend=backend, image_tag=(tag,), label=labels())
    if built is None:  # BentoML logs why, and raises nothing
        raise checks.build_failure(engine, log)


def labels() -> dict[str, str]:
    """By OCI's names for them. scripts/push_image.py adds the models' commits."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    prefix = "org.opencontainers.image."
    written = {
        f"{prefix}title": "Avatar API",
        f"{prefix}description": project["description"],
        f"{prefix}version": project["version"],
        f"{prefix}licenses": project["license"],
    }
    if commit := git("rev-parse", "HEAD"):
        written[f"{prefix}revision"] = commit + ("-dirty" if git("status", "--porcelain") else "")
    return written


def git(*arguments: str) -> str:
    """Nothing outside of a repository, or without git."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", "-C", REPOSITORY, *arguments], capture_output=True, text=True).stdout.strip()  # noqa: S607


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when built or nothing is wrong, 2 otherwise, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", default="avatar-api:latest", help="the code image's name (%(default)s)")
    parser.add_argument("--engine", choices=tuple(checks.ENGINES), help="what builds it (the first that is there)")
    parser.add_argument(
        "--profile", choices=("full", "runtime"), help="refuse to go on unless the store's models are so"
    )
    parser.add_argument("--check", action="store_true", help="build nothing; try what would be needed")
    parser.add_argument("--target", metavar="IMAGE", help="with --check: where it will be pushed, tried as well")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            return check(options)
        checks.architecture()
        engine = checks.choose_engine(options.engine)
        models = read_store()
        print(checks.profile(models, options.profile))
        build(options.tag, engine, models)
    except ImageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command begins with the layers that are finished", file=sys.stderr)
        return 130
    print(f"{options.tag} is the code image. The models join it on the way to the registry:")
    print(f"  python scripts/push_image.py {options.tag} docker.io/YOU/avatar-api:v1.0 --dry-run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
