"""Print the server's settings as the table in docs/API.md.

python scripts/settings_table.py
"""

from pathlib import Path

from pydantic.fields import FieldInfo

from avatar_api.settings import ServiceSettings


def table() -> str:
    rows = [
        f"| `AVATAR_{name.upper()}` | {default(field)} | {field.description} |"
        for name, field in ServiceSettings.model_fields.items()
    ]
    return "\n".join(["| variable | default | |", "|---|---|---|", *rows])


def default(field: FieldInfo) -> str:
    value = field.default
    if value is None or value == "":
        return "not set"
    if isinstance(value, Path):
        value = Path("~") / value.relative_to(Path.home())
    return f"`{value}`"


if __name__ == "__main__":
    print(table())
