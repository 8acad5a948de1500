"""Verify an image in its registry, without pulling it.

    python scripts/verify_image.py docker.io/me/avatar-api:v1.0
    python scripts/verify_image.py docker.io/me/avatar-api:v1.0 --read    # every byte of the models, from the registry

Platform, user, environment, labels; every layer of the models against the locks; no secret in any layer of code, the
configuration or the history; nothing that would hide the models. With the models in this machine's store their layers
need not be read: their digests follow from the store. Exit status: 0 when all is well, 1 when it is not, with the
reasons; 2 when that cannot be found out.
"""

import argparse
import sys
import threading
from pathlib import Path

from rich.filesize import decimal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder

from container.digests import Digests
from container.errors import ImageError
from container.layers import StoredModel, read_store
from container.push import KEY
from container.registry import Reference, Registry
from container.verify import find_manifest, verify
from models.console import byte_progress, leave, say


def stored_models() -> list[StoredModel] | None:
    try:
        return read_store()
    except ImageError:
        return None


def verify_image(options: argparse.Namespace) -> list[str]:
    registry = Registry(Reference.parse(options.image), "pull")
    models = None if options.read else stored_models()
    manifest = find_manifest(registry)
    size = sum(layer["size"] for layer in manifest["layers"])
    code = sum(layer["size"] for layer in manifest["layers"] if KEY not in (layer.get("annotations") or {}))
    where = "read from the registry" if models is None else "compared with this machine's store"
    say(f"{registry.reference}: {len(manifest['layers'])} layers, {decimal(size)}; the models are {where}")
    with byte_progress() as progress:
        task = progress.add_task("Reading", total=size if models is None else code)
        read, lock = dict[str, int](), threading.Lock()

        def report(digest: str, position: int) -> None:
            with lock:
                read[digest] = position
                progress.update(task, completed=sum(read.values()))

        return verify(registry, models, Digests(), report)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", metavar="IMAGE", help="[HOST/]REPOSITORY[:TAG]")
    parser.add_argument("--read", action="store_true", help="read the models' layers too, whatever the store has")
    options = parser.parse_args(arguments)
    try:
        problems = verify_image(options)
    except ImageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for problem in problems:
        print(f"{options.image}: {problem}", file=sys.stderr)
    if not problems:
        say(f"{options.image} is as it should be.")
    return 1 if problems else 0


if __name__ == "__main__":
    leave(main())
