"""API keys: which are accepted, whose they are, and the one that is made at the first start."""

import multiprocessing
import stat
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from avatar_api.auth import EVERYBODY, Keys
from avatar_api.settings import ServiceSettings


def client(keys: Keys, **headers: str) -> str | None:
    return keys.client(Headers({name.replace("_", "-"): value for name, value in headers.items()}))


def test_a_key_is_known_in_either_header_and_stands_for_one_client() -> None:
    keys = Keys(["first", "second"])
    first = client(keys, authorization="Bearer first")
    assert first == client(keys, authorization="bearer  first ") == client(keys, x_api_key="first")
    assert first is not None
    assert "first" not in first, "what is stored and logged does not give the key away"
    assert client(keys, x_api_key="second") not in (first, None)


@pytest.mark.parametrize(
    "headers",
    [{}, {"x_api_key": ""}, {"x_api_key": "firs"}, {"authorization": "first"}, {"authorization": "Basic first"}],
)
def test_anything_else_is_not(headers: dict[str, str]) -> None:
    assert client(Keys(["first"]), **headers) is None


def test_keys_come_from_settings_and_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("third\n\n  fourth \n")
    keys = Keys.of(ServiceSettings(home=tmp_path, api_keys="first, second,", api_keys_file=tmp_path / "keys"))
    assert all(client(keys, x_api_key=key) for key in ("first", "second", "third", "fourth"))
    assert client(keys, x_api_key="") is None
    assert not (tmp_path / "api_key").exists()


def test_without_authentication_everybody_is_one_client(tmp_path: Path) -> None:
    assert client(Keys.of(ServiceSettings(home=tmp_path, auth="off"))) == EVERYBODY


def test_a_key_is_made_once_printed_once_and_kept_for_its_owner_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ServiceSettings(home=tmp_path / "home")
    keys = Keys.of(settings)
    file = tmp_path / "home" / "api_key"
    key = file.read_text().strip()
    assert client(keys, x_api_key=key)
    assert key in capsys.readouterr().out
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert client(Keys.of(settings), x_api_key=key)
    assert capsys.readouterr().out == ""
    assert [entry.name for entry in file.parent.iterdir()] == ["api_key"]


def own_client(home: Path) -> str | None:
    keys = Keys.of(ServiceSettings(home=home))
    return client(keys, x_api_key=(home / "api_key").read_text().strip())


def test_processes_that_start_at_once_agree_on_the_key(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as processes:
        found = processes.map(own_client, [tmp_path] * 8)
    assert len(set(found)) == 1
    assert None not in found
