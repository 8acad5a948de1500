"""verify_image.py: what is wrong with an image in a registry is said, without pulling it."""

import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from container import registry as client
from container.code_image import TAR
from container.content import BytesContent
from container.layers import STORE, LayerContent, plan, read_store
from container.registry import MANIFEST, Reference, Registry
from scripts.push_image import main as push_image
from scripts.verify_image import main as verify_image
from tests.image.registries import Proxy, random_cuts, registry, tar_of, write_code_image
from tests.image.test_push import BASE, MODEL_BYTES, TOKEN, source_layer
from tests.model_store import small_models, write_store

AS_PROMISED = {
    "config": {
        "User": "1034",
        "Env": [
            "HF_HUB_OFFLINE=1",
            "MODEL_STORAGE_PATH=/app/models",
            "HF_HOME=/app/models/.cache",
            "RUNPOD_INIT_TIMEOUT=900",
            "NVIDIA_VISIBLE_DEVICES=all",
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        ],
        "Labels": {"org.opencontainers.image.version": "0.1.0", "org.opencontainers.image.revision": "abc"},
    }
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With a store of small models in it, and nobody's logins."""
    folder = tmp_path_factory.mktemp("verify")
    with pytest.MonkeyPatch.context() as patch:
        write_store(folder / "home", small_models(), patch)
        patch.setattr(client, "FIRST_WAIT", 0.01)
        patch.setenv("DOCKER_CONFIG", str(folder))
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def host(folder: Path) -> Iterator[str]:
    with registry(folder / "registry") as host:
        yield host


@pytest.fixture(scope="module")
def image(host: str, folder: Path) -> str:
    code = write_code_image(folder / "code.tar", [BASE, source_layer(b"print(1)")], AS_PROMISED)
    assert push_image([code, f"{host}/me/avatar:v1"]) == 0
    return f"{host}/me/avatar:v1"


@pytest.fixture(params=["with the store", "without the store"])
def options(request: pytest.FixtureRequest) -> list[str]:
    return [] if request.param == "with the store" else ["--read"]


def test_an_image_as_pushed_is_as_it_should_be(image: str, options: list[str]) -> None:
    assert verify_image([image, *options]) == 0


def test_with_the_store_at_hand_no_model_is_read_from_the_registry(image: str, host: str, folder: Path) -> None:
    (folder / "home" / "push" / "digests.json").unlink()
    with Proxy(host) as proxy:
        assert verify_image([image.replace(host, proxy.host)]) == 0
        assert proxy.sent_back < MODEL_BYTES / 3


def test_a_machine_without_a_store_reads_the_layers(
    image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "nothing"))
    assert verify_image([image]) == 0
    assert "read from the registry" in capsys.readouterr().out


def test_a_cut_connection_does_not_stop_it(image: str, host: str) -> None:
    with Proxy(host) as proxy:
        proxy.cuts_back = random_cuts(3, 10, MODEL_BYTES)
        assert verify_image([image.replace(host, proxy.host), "--read"]) == 0
        assert proxy.cut == 10


def changed(image: str, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> str:
    """Another image beside it: `change` is given its manifest and its configuration."""
    there = Registry(Reference.parse(image))
    found = there.manifest("v1")
    assert found is not None
    manifest, config = found.json, json.loads(b"".join(there.blob(found.json["config"]["digest"])))
    change(manifest, config)
    written = json.dumps(config).encode()
    there.upload(BytesContent(written, "config"), lambda _: None)
    manifest["config"] |= {"digest": f"sha256:{sha256(written).hexdigest()}", "size": len(written)}
    there.put_manifest("changed", json.dumps(manifest).encode(), MANIFEST)
    return image.replace(":v1", ":changed")


def with_layer(image: str, layer: bytes, at: int | None = None) -> str:
    """The image with a layer on top; with `at`, in the place of another."""
    digest = Registry(Reference.parse(image)).upload(BytesContent(layer, "layer"), lambda _: None)
    described = {"mediaType": TAR, "digest": digest, "size": len(layer)}

    def change(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        place = slice(len(manifest["layers"]), None) if at is None else slice(at, at + 1)
        if at is not None:
            described["annotations"] = manifest["layers"][at]["annotations"]
        manifest["layers"][place] = [described]
        config["rootfs"]["diff_ids"][place] = [digest]

    return changed(image, change)


def complaints(image: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert verify_image([image, *options]) == 1
    return capsys.readouterr().err


def test_a_layer_with_other_bytes_than_the_lock_says_is_found(
    image: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    layer = plan(read_store())[1]
    content = bytearray(b"".join(bytes(block) for block in LayerContent(layer).blocks(0, layer.size)))
    content[layer.size // 2] ^= 1
    said = complaints(with_layer(image, bytes(content), at=1), options, capsys)
    assert "infinitetalk" in said
    assert ("is not what its lock says" if options else "the image has no such layer") in said


def test_a_missing_layer_is_found(image: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def change(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        del manifest["layers"][0], config["rootfs"]["diff_ids"][0]

    said = complaints(changed(image, change), options, capsys)
    assert f"{STORE}/chinese-wav2vec2-base/0123456789ab/config.json is missing" in said or "has no such layer" in said


def test_what_hides_the_models_and_what_is_secret_is_found_in_layers_of_code(
    image: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"home/bentoml/.wh.bento": b"", "app/.env": b"TOKEN=" + TOKEN}
    said = complaints(with_layer(image, tar_of(files)), options, capsys)
    assert "/home/bentoml/.wh.bento would hide the models'" in said
    assert "/app/.env has a Hugging Face token in it" in said
    assert TOKEN.decode() not in said


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda config: config.update(architecture="arm64"), "it is for linux/arm64, not for linux/amd64"),
        (lambda config: config["config"].update(User="root"), "it runs as root"),
        (lambda config: config["config"]["Env"].remove("HF_HUB_OFFLINE=1"), "HF_HUB_OFFLINE=, and not 1"),
        (lambda config: config["config"]["Env"].append("RUNPOD_INIT_TIMEOUT=7"), "RUNPOD_INIT_TIMEOUT=7, and not 900"),
        (lambda config: config["config"]["Env"].append("HF_TOKEN=x"), "its environment sets HF_TOKEN"),
        (lambda config: config["config"]["Labels"].pop("org.opencontainers.image.revision"), "image.revision"),
        (
            lambda config: config["config"]["Labels"].pop("avatar-api.model.infinitetalk"),
            "avatar-api.model.infinitetalk",
        ),
        (lambda config: config["history"].append({"created_by": "RUN login --password=abcdefg"}), "shows password"),
        (lambda config: config["rootfs"]["diff_ids"].pop(), "name different layers"),
    ],
)
def test_what_the_configuration_does_not_keep_of_its_promises_is_said(
    image: str, change: Callable[[dict[str, Any]], None], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in complaints(changed(image, lambda _, config: change(config)), [], capsys)


def test_other_models_than_the_stores_are_found(
    image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = small_models()
    newer = {**models["infinitetalk"], "config.json": b'{"dim": 1536}\n'}
    write_store(tmp_path / "newer", {**models, "infinitetalk": newer}, monkeypatch)
    said = complaints(image, [], capsys)
    assert "infinitetalk/config.json and 2 more: the store's is sha256:" in said
    assert "wan2.1" not in said


def test_an_image_without_models_below_it_is_no_such_image(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    there = Registry(Reference.parse(f"{host}/me/other:v1"))
    layer, config = tar_of({"etc/motd": b"hello"}), b""
    digest = there.upload(BytesContent(layer, "layer"), lambda _: None)
    config = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": [digest]}}).encode()
    described = {"mediaType": TAR, "digest": digest, "size": len(layer)}
    named = {"digest": there.upload(BytesContent(config, "config"), lambda _: None), "size": len(config)}
    named |= {"mediaType": "application/vnd.oci.image.config.v1+json"}
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": named, "layers": [described]}
    there.put_manifest("v1", json.dumps(manifest).encode(), MANIFEST)
    assert "its bottom layers are not the models'" in complaints(f"{host}/me/other:v1", [], capsys)


def test_an_image_that_is_not_there_cannot_be_verified(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_image([f"{host}/me/avatar:v0"]) == 2
    assert f"{host} has no {host}/me/avatar:v0: push it" in capsys.readouterr().err
