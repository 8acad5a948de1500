"""Deploying on RunPod, against an API made from its OpenAPI document; and what it says of costs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import deploy_runpod, estimate
from scripts.deploy_runpod import Deployment, endpoint, template
from tests.conftest import REPOSITORY
from tests.runpod_rest import KEY, RestApi

DOCUMENT = REPOSITORY.parent / "shared" / "facts" / "runpod-v2.openapi.json"
IMAGE = f"docker.io/me/avatar-api@sha256:{'a' * 64}"
BUCKET = '[secrets]\nAWS_SECRET_ACCESS_KEY = "s3_secret"\n'


@pytest.fixture
def rest() -> Iterator[RestApi]:
    if not DOCUMENT.exists():
        pytest.skip(f"{DOCUMENT} is not there: RunPod's OpenAPI document")
    api = RestApi(DOCUMENT)
    yield api
    api.shutdown()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "runpod.toml")


def write(file: Path, further: str = "", kind: str = "queue", image: str = IMAGE) -> Path:
    file.write_text(f'name = "avatar"\nkind = "{kind}"\nimage = "{image}"\ngpus = ["L40S", "H100"]\n{further}')
    return file


def run(rest: RestApi, act: str, file: Path, *options: str) -> int:
    return deploy_runpod.main([act, str(file), "--api", rest.url, *options], {"RUNPOD_API_KEY": KEY})


@pytest.mark.parametrize("kind", ["queue", "load_balancer"])
def test_it_is_created_then_updated_seen_and_deleted(
    rest: RestApi, file: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(
        file, 'min_workers = 1\nnetwork_volume = "vol1"\ndata_centers = ["US-TX-3"]\nregistry = "reg1"\n' + BUCKET, kind
    )
    assert run(rest, "deploy", file) == 0
    writes = [call for call in rest.calls if call[0] != "GET"]
    assert writes == [("POST", "/v2/templates"), ("POST", "/v2/serverless")]
    (made,) = rest.things["endpoints"].values()
    assert made["type"] == ("QUEUE" if kind == "queue" else "LOAD_BALANCER")

    write(file, "max_workers = 7\n", kind)
    assert run(rest, "deploy", file) == 0
    assert [method for method, _ in rest.calls if method != "GET"] == ["POST", "POST", "PATCH", "PATCH"]
    (updated,) = rest.things["endpoints"].values()
    assert (updated["workers"]["min"], updated["workers"]["max"]) == (0, 7)

    assert run(rest, "status", file) == 0
    assert run(rest, "logs", file) == 0
    assert run(rest, "delete", file) == 0
    assert rest.things == {"templates": {}, "endpoints": {}}
    said = capsys.readouterr()
    assert "https://" in said.out
    assert "1 idle" in said.out
    assert "worker7: IDLE on NVIDIA L40S" in said.out
    assert "Container Ready" in said.out
    assert said.err == ""
    assert KEY not in said.out


def test_a_dry_run_changes_nothing_and_needs_no_key(
    rest: RestApi, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy_runpod.main(["deploy", str(file), "--dry-run", "--api", rest.url], {}) == 0
    assert rest.calls == []
    assert run(rest, "deploy", file, "--dry-run") == 0
    assert {method for method, _ in rest.calls} == {"GET"}
    assert capsys.readouterr().out.count("POST /v2/serverless") == 2


def test_what_runpod_refuses_is_told_with_its_reason(
    rest: RestApi, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy_runpod.main(["status", str(file), "--api", rest.url], {"RUNPOD_API_KEY": "another"}) == 1
    assert "does not know this key" in capsys.readouterr().err
    assert run(rest, "status", file) == 1
    assert "there is no endpoint named 'avatar'" in capsys.readouterr().err
    write(file, 'data_centers = ["US-TX-3"]\nregistry = ""\n')
    run(rest, "deploy", file)
    write(file, kind="load_balancer")
    assert run(rest, "deploy", file) == 1
    assert "cannot change; delete it first" in capsys.readouterr().err


def test_the_api_of_the_tests_refuses_what_the_document_does(rest: RestApi) -> None:
    schema = {"$ref": "#/components/schemas/CreateEndpointRequest"}
    body = endpoint(Deployment(name="a", kind="queue", image=IMAGE, gpus=["L40S"]), "tpl") | {"type": "QUEUE"}
    assert rest.wrong(schema, body) == []
    assert rest.wrong(schema, body | {"unheard": 1})
    assert rest.wrong(schema, body | {"workers": {"min": -1}})
    assert rest.wrong(schema, {name: value for name, value in body.items() if name != "scaling"})


@pytest.mark.parametrize(
    ("further", "said"),
    [
        ("max_workers = 0", "max_workers: "),
        ("workers = 3", "workers: "),
        ("size = '4k'", "size: "),
        ("[environment]\nAWS_SECRET_ACCESS_KEY = 'x'", "AWS_SECRET_ACCESS_KEY looks like a secret"),
        ("[environment]\nAVATAR_DATABASE_URL = 'postgresql://me:word@db/a'", "AVATAR_DATABASE_URL looks like a secret"),
        ("size = ", "is not TOML"),
    ],
)
def test_a_file_that_cannot_be_is_refused_by_name(
    tmp_path: Path, further: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "runpod.toml", further)
    assert deploy_runpod.main(["deploy", str(file), "--dry-run"], {}) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "word" not in error


def test_an_image_is_named_by_its_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "runpod.toml", image="docker.io/me/avatar-api:latest")
    assert deploy_runpod.main(["deploy", str(file), "--dry-run"], {}) == 1
    assert "@sha256:" in capsys.readouterr().err


def test_secrets_are_only_named(tmp_path: Path) -> None:
    wanted = deploy_runpod.read(write(tmp_path / "runpod.toml", BUCKET))
    assert "{{ RUNPOD_SECRET_s3_secret }}" in template(wanted)["env"].values()


def test_a_job_may_run_for_as_long_as_its_video_takes_on_the_slowest_gpu(tmp_path: Path) -> None:
    wanted = deploy_runpod.read(write(tmp_path / "runpod.toml", "size = '720p'\nlongest_video_seconds = 10"))
    slowest = estimate.speed("L40S", "720p").seconds
    assert slowest > estimate.speed("H100", "720p").seconds
    assert endpoint(wanted, "tpl")["timeout"] >= 1000 * 10 * slowest > 600_000
    assert any("cut it short" in said for said in deploy_runpod.expectations(wanted))


def test_the_example_is_a_file_that_can_be_deployed() -> None:
    assert deploy_runpod.read(REPOSITORY / "scripts" / "runpod.toml").kind == "queue"


def test_the_guides_costs_come_out() -> None:
    costs = estimate.month(100, estimate.GPUS["L40S"].dollars_per_second)
    assert f"{costs.gpu:.2f}" == "68.40"
    assert (round(costs.embedded), round(costs.volume), round(costs.volume - costs.embedded)) == (73, 111, 38)


def test_costs_are_printed_with_where_they_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    estimate.main([])
    said = capsys.readouterr().out
    assert "68.40" in said
    assert f"the project's guide, {estimate.DATE}" in said
    assert "reckoned: 1.89 PFLOP a pass" in said
    estimate.main(["--gpu", "H100", "--minutes", "10", "--dollars-per-hour", "2.5"])
    assert "as given" in capsys.readouterr().out
