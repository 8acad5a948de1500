"""The dependency rule of docs/ARCHITECTURE.md: no import points the wrong way, and none in a circle."""

import ast
import graphlib
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.conftest import REPOSITORY

MAY_IMPORT = {
    "infinitetalk": set(),
    "container": set(),
    "avatar_api": {"infinitetalk"},
    "models": {"infinitetalk"},
}
OURS = {*MAY_IMPORT, "scripts", "service", "examples", "benchmarks", "tests"}


def imports(file: Path) -> set[str]:
    """The modules of ours that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where they point"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in OURS}


def modules(package: str) -> dict[str, Path]:
    files = (REPOSITORY / package).rglob("*.py")
    return {".".join(file.relative_to(REPOSITORY).with_suffix("").parts): file for file in files}


def test_packages_import_only_what_they_may() -> None:
    for package, allowed in MAY_IMPORT.items():
        for name, file in modules(package).items():
            foreign = {imported.split(".")[0] for imported in imports(file)} - allowed - {package}
            assert not foreign, f"{name} imports {foreign}"


def test_there_are_no_cycles() -> None:
    files = {name: file for package in MAY_IMPORT for name, file in modules(package).items()}
    graph = {name.removesuffix(".__init__"): imports(file) & set(files) for name, file in files.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= 10


def test_the_model_knows_nothing_of_the_service() -> None:
    outside = {"bentoml", "fastapi", "starlette", "sqlalchemy", "grpc", "av", "boto3", "runpod", "requests", "httpx"}
    for name, file in modules("infinitetalk").items():
        tree = ast.walk(ast.parse(file.read_text()))
        roots = {str(node.module).split(".")[0] for node in tree if isinstance(node, ast.ImportFrom)}
        assert not roots & outside, f"{name} imports {roots & outside}"


def test_the_image_is_pushed_and_verified_without_the_model_and_the_service() -> None:
    """container/ reads the locks as files."""
    outside = {"torch", "diffusers", "transformers", "fastapi", "sqlalchemy", "grpc", "av", "boto3"}
    for name, file in modules("container").items():
        tree = list(ast.walk(ast.parse(file.read_text())))
        roots = {str(node.module).split(".")[0] for node in tree if isinstance(node, ast.ImportFrom)}
        roots |= {alias.name.split(".")[0] for node in tree if isinstance(node, ast.Import) for alias in node.names}
        assert not roots & outside, f"{name} imports {roots & outside}"


def test_what_is_imported_is_declared() -> None:
    """By the service and the image; scripts may also use what development brings."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {canonical(re.split(r"[\[=]", dependency)[0]) for dependency in project["dependencies"]}
    parts = {"botocore": "boto3", "s3transfer": "boto3", "pydantic-core": "pydantic"}  # one project, several packages
    known = packages_distributions()
    for file in [REPOSITORY / "service.py", *(file for package in MAY_IMPORT for file in modules(package).values())]:
        tree = list(ast.walk(ast.parse(file.read_text())))
        names = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in tree if isinstance(node, ast.ImportFrom)}
        for root in {name.split(".")[0] for name in names} - OURS - sys.stdlib_module_names:
            owners = {canonical(owner) for owner in known[root]}
            assert {parts.get(owner, owner) for owner in owners} & declared, f"{file}: {root} is of {owners}"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
