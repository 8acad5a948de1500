"""The settings, and the table of them."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from avatar_api.settings import ServiceSettings
from scripts.settings_table import table
from tests.conftest import REPOSITORY


def test_the_table_in_the_docs_is_that_of_the_settings() -> None:
    assert table() in (REPOSITORY / "docs" / "API.md").read_text(), "run scripts/settings_table.py"


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("HOME", str(tmp_path)), ("KEEP_DAYS", "0.5"), ("API_KEYS", "a,b"), ("AUTH", "off")):
        monkeypatch.setenv(f"AVATAR_{name}", value)
    settings = ServiceSettings()
    assert (settings.home, settings.keep_days, settings.auth) == (tmp_path, 0.5, "off")
    assert "a,b" not in repr(settings), "secrets are not shown"


@pytest.mark.parametrize(("name", "value"), [("AUTH", "maybe"), ("KEEP_DAYS", "0"), ("MAX_QUEUED", "many")])
def test_settings_that_cannot_be_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"AVATAR_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        ServiceSettings()
