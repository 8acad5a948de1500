"""Who we are to a registry: what `docker login` or `podman login` has left, read as they do."""

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from container.errors import ImageError

HUB = "docker.io"
HUB_KEY = "https://index.docker.io/v1/"  # what Docker calls its hub in its configuration


@dataclass(frozen=True)
class Credentials:
    """`token` is an identity token, which some logins leave instead of a password."""

    username: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


def find_credentials(host: str) -> Credentials | None:
    """Those for a registry; None where nobody has logged in to it."""
    keys = [HUB_KEY, HUB] if host == HUB else [host, f"https://{host}", f"https://{host}/v1/", f"https://{host}/v2/"]
    for file in login_files():
        login = read_login(file)
        programs, entries = login.get("credHelpers") or {}, login.get("auths") or {}
        program = next((programs[key] for key in keys if key in programs), login.get("credsStore"))
        found = ask_program(program, keys[0]) if program else None
        for key in keys:
            found = found or (in_file(entries[key]) if key in entries else None)
        if found:
            return found
    return None


def login_files() -> Iterator[Path]:
    """Docker's and podman's, those that there are."""
    docker = Path(os.environ.get("DOCKER_CONFIG") or "~/.docker").expanduser() / "config.json"
    podman = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}") / "containers" / "auth.json"
    if os.environ.get("REGISTRY_AUTH_FILE"):
        podman = Path(os.environ["REGISTRY_AUTH_FILE"])
    root = Path("/run/containers") / str(os.getuid()) / "auth.json"  # podman's without a login session
    return (file for file in (docker, podman, root) if file.is_file())


def stored_secrets() -> dict[str, str]:
    """The passwords and tokens in those files, under the registries that they are for."""
    secrets = {}
    for file in login_files():
        for host, entry in (read_login(file).get("auths") or {}).items():
            found = in_file(entry)
            if found is not None:
                secrets[f"the login of {host}"] = found.password or found.token
    return secrets


def read_login(file: Path) -> dict[str, Any]:
    try:
        login: dict[str, Any] = json.loads(file.read_text())
        return login
    except ValueError as error:
        raise ImageError(f"{file} cannot be read ({error}): mend it, or log in again.") from error


def in_file(entry: dict[str, Any]) -> Credentials | None:
    if entry.get("identitytoken"):
        return Credentials(token=entry["identitytoken"])
    if entry.get("auth"):
        username, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
        return Credentials(username, password)
    if entry.get("username"):
        return Credentials(entry["username"], entry.get("password", ""))
    return None


def ask_program(name: str, key: str) -> Credentials | None:
    """docker-credential-NAME's answer; it says that it has none by failing."""
    program = f"docker-credential-{name}"
    try:
        answer = subprocess.run([program, "get"], input=key, capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise ImageError(f"{program}, which Docker's configuration names, cannot be run: {error.strerror}.") from error
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"{program} gave no answer within 60 s: is it waiting for you to unlock it?") from error
    if answer.returncode:
        return None
    found = json.loads(answer.stdout)
    if found["Username"] == "<token>":
        return Credentials(token=found["Secret"])
    return Credentials(found["Username"], found["Secret"])
