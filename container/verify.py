"""Is the image in the registry what it should be? Asked without pulling it.

    problems = verify(registry, models, digests, report)     # one line each; none if all is well

With the store at hand, the digest of every model layer follows from the store's own files. Without it, the layers are
read from the registry, and each file in them is compared with the lock that is in the image itself. The layers of code
are read in either case: for secrets, and for what would hide the models.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from container.content import BLOCK, Content, ContentReader
from container.digests import Digests
from container.errors import ImageError
from container.layers import LOCK, NEEDED, STORE, LayerContent, StoredModel, fingerprint, plan
from container.push import KEY, MODEL, origin
from container.registry import Manifest, Registry
from container.scan import LayerScan, ancestors, check_config, secrets_here

PARALLEL = 4
ENVIRONMENT = {  # what the image promises; None: whatever, but set
    "HF_HUB_OFFLINE": "1",
    "MODEL_STORAGE_PATH": "/app/models",
    "HF_HOME": "/app/models/.cache",
    "RUNPOD_INIT_TIMEOUT": "900",
    "NVIDIA_VISIBLE_DEVICES": None,
    "NVIDIA_DRIVER_CAPABILITIES": None,
}
LABELS = ("org.opencontainers.image.version", "org.opencontainers.image.revision")

Report = Callable[[str, int], object]
"""Called with a layer's digest and how many bytes of it have been read."""


class BlobContent(Content):
    """A layer in the registry, as it is read."""

    chunk = 2**62  # one request reads it to its end

    def __init__(self, registry: Registry, layer: dict[str, Any]) -> None:
        super().__init__(int(layer["size"]))
        self._registry, self._address = registry, str(layer["digest"])

    def __str__(self) -> str:
        return f"layer {self._address}"

    def _read(self, start: int, end: int) -> Iterator[memoryview]:
        for block in self._registry.blob(self._address, start):
            yield memoryview(block)


def verify(registry: Registry, models: Sequence[StoredModel] | None, digests: Digests, report: Report) -> list[str]:
    """What is wrong with the image. Raises ImageError where that cannot be found out."""
    manifest = find_manifest(registry)
    config = json.loads(b"".join(registry.blob(manifest["config"]["digest"])))
    own = secrets_here()
    problems = check_config(config, own) + check_promises(config)
    model_layers = [layer for layer in manifest["layers"] if KEY in (layer.get("annotations") or {})]
    code_layers = manifest["layers"][len(model_layers) :]
    if not model_layers or model_layers != manifest["layers"][: len(model_layers)]:
        return [*problems, "its bottom layers are not the models': push it with scripts/push_image.py"]
    diff_ids = config["rootfs"]["diff_ids"]
    plain = {layer["digest"] for layer in manifest["layers"] if not layer["mediaType"].endswith("gzip")}
    if len(diff_ids) != len(manifest["layers"]) or not plain <= set(diff_ids):
        problems.append("its configuration and its manifest name different layers")

    # The last of the models' layers says which models there are.
    registered = unpack(registry, model_layers[-1])
    locks = [json.loads(text) for path, text in registered.items() if path.endswith(f"/{LOCK}")]
    in_image = [StoredModel(Path("/"), lock) for lock in locks]
    labels = (config.get("config") or {}).get("Labels") or {}
    problems += check_registration(registered, in_image, labels)
    files = {f"{model.path}/{path}": entry for model in in_image for path, entry in model.lock["files"].items()}
    if models is not None:
        problems += compare_with_store(registry, model_layers, models, digests)
    else:
        problems += compare_with_locks(registry, model_layers[:-1], files, report)
    protected = ancestors([*files, *registered])
    with ThreadPoolExecutor(PARALLEL) as pool:
        for found in pool.map(lambda layer: scan(registry, layer, protected, own, report), code_layers):
            problems += found
    return problems


def find_manifest(registry: Registry) -> dict[str, Any]:
    """That of the image for linux/amd64."""
    reference = registry.reference
    manifest = registry.manifest(reference.tag)
    if manifest is None:
        raise ImageError(f"{reference.host} has no {reference}: push it with scripts/push_image.py.")
    if "manifests" in manifest.json:
        manifest = choose(registry, manifest)
    return manifest.json


def choose(registry: Registry, index: Manifest) -> Manifest:
    for entry in index.json["manifests"]:
        platform = entry.get("platform") or {}
        if (platform.get("os"), platform.get("architecture")) == ("linux", "amd64"):
            chosen = registry.manifest(entry["digest"])
            if chosen is not None:
                return chosen
    raise ImageError(f"{registry.reference} has no image for linux/amd64.")


def check_promises(config: dict[str, Any]) -> list[str]:
    """Platform, user, environment and labels."""
    settings = config.get("config") or {}
    environment = dict(variable.split("=", 1) for variable in settings.get("Env") or [])
    problems = []
    if (config.get("os"), config.get("architecture")) != ("linux", "amd64"):
        problems.append(f"it is for {config.get('os')}/{config.get('architecture')}, not for linux/amd64")
    if str(settings.get("User") or "root").split(":")[0] in ("root", "0"):
        problems.append("it runs as root")
    for name, value in ENVIRONMENT.items():
        found = environment.get(name)
        if found is None or (value is not None and found != value):
            problems.append(f"its environment has {name}={found or ''}, and not {value or 'a value'}")
    missing = [label for label in LABELS if not (settings.get("Labels") or {}).get(label)]
    return problems + [f"it has no label {label}" for label in missing]


def check_registration(files: dict[str, bytes], models: Sequence[StoredModel], labels: dict[str, str]) -> list[str]:
    """Are all models there, each with what BentoML reads, and labelled?"""
    names = [model.name for model in models]
    problems = [f"it has no {name}" for name in NEEDED if name not in names]
    for model in models:
        expected = {f"{model.path}/{LOCK}", f"{model.path}/model.yaml", f"{STORE}/{model.name}/latest"}
        problems += [f"/{path} is missing" for path in sorted(expected - set(files))]
        if files.get(f"{STORE}/{model.name}/latest", b"").decode() != model.version:
            problems.append(f"/{STORE}/{model.name}/latest is not {model.version}")
        if labels.get(f"{MODEL}.{model.name}") != origin(model):
            problems.append(f"its label {MODEL}.{model.name} is not {origin(model)}")
    return problems


def compare_with_store(
    registry: Registry, layers: Sequence[dict[str, Any]], models: Sequence[StoredModel], digests: Digests
) -> list[str]:
    """The digests and sizes of the layers, against those that the store's files give."""
    problems = []
    there = {layer["digest"]: layer for layer in layers}
    for planned in plan(models):
        name = fingerprint(planned)
        digest = digests.layer(name)
        if digest is None:
            digest = LayerContent(planned).digest
            digests.set_layer(name, digest)
        layer = there.pop(digest, None)
        if layer is None:
            problems.append(f"{planned.name}: the store's is {digest}, and the image has no such layer")
        elif layer["size"] != planned.size:
            problems.append(f"{planned.name}: its manifest says {layer['size']} bytes, and it has {planned.size}")
        elif not registry.has(digest):
            problems.append(f"{planned.name}: the registry has lost the layer {digest}")
    return problems + [f"layer {digest} has a model that the store has not" for digest in there]


def compare_with_locks(
    registry: Registry, layers: Sequence[dict[str, Any]], files: dict[str, Any], report: Report
) -> list[str]:
    """Every file of the layers, against the locks in the image; and that none is missing."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        sums = list(pool.map(lambda layer: sums_of(registry, layer, report), layers))
    found = {path: digest for layer in sums for path, digest in layer.items()}
    problems = [f"/{path} is missing" for path in sorted(set(files) - set(found))]
    problems += [f"/{path} is in no lock" for path in sorted(set(found) - set(files))]
    problems += [
        f"/{path} is not what its lock says"
        for path in sorted(set(found) & set(files))
        if found[path] != (files[path]["size"], files[path]["sha256"])
    ]
    return problems


def sums_of(registry: Registry, layer: dict[str, Any], report: Report) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each file in a layer."""
    sums = {}
    for member, content in members(registry, layer, partial(report, layer["digest"])):
        digest = hashlib.sha256()
        while block := content.read(BLOCK):
            digest.update(block)
        sums[member.name] = (member.size, digest.hexdigest())
    return sums


def unpack(registry: Registry, layer: dict[str, Any]) -> dict[str, bytes]:
    """A small layer's files."""
    return {member.name: content.read() for member, content in members(registry, layer, lambda _: None)}


def members(
    registry: Registry, layer: dict[str, Any], report: Callable[[int], object]
) -> Iterator[tuple[tarfile.TarInfo, Any]]:
    """A layer's files as it is read. Raises ImageError if in the end it is not what its digest says."""
    content = BlobContent(registry, layer)
    stream = io.BufferedReader(ContentReader(content, report), BLOCK)
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if member.isreg():
                    yield member, archive.extractfile(member)
        while stream.read(BLOCK):
            pass
    except tarfile.TarError as error:
        raise ImageError(f"{content} is no tar file: {error}") from error
    check_digest(content, layer)


def scan(
    registry: Registry, layer: dict[str, Any], protected: dict[str, bool], own: dict[str, bytes], report: Report
) -> list[str]:
    """What a layer of code must not hold."""
    content, found, position = BlobContent(registry, layer), LayerScan(protected, own), 0
    for block in content.all_blocks():
        found.feed(block)
        position += len(block)
        report(layer["digest"], position)
    check_digest(content, layer)
    return found.problems


def check_digest(content: Content, layer: dict[str, Any]) -> None:
    if content.digest != layer["digest"]:
        raise ImageError(f"The registry gives something else than the {content} that is asked for: push it again.")
