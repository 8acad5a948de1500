"""Settings of the service, from environment variables that begin with AVATAR_."""

from functools import cached_property
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServiceSettings(BaseSettings):
    """Read once per process; `AVATAR_HOME` and so on. Every field's description is its documentation."""

    model_config = SettingsConfigDict(env_prefix="AVATAR_")

    home: Path = Field(Path.home() / ".avatar", description="Folder of the database, inputs, clips and results.")
    database_url: str | None = Field(
        None, description="SQLAlchemy URL of the job database; a SQLite file in the home folder if not set."
    )
    device: str | None = Field(None, description="`cuda` or `cpu`; CUDA where there is one if not set.")
    memory: str | None = Field(
        None, description="`24gb`, `48gb`, `80gb` or `141gb`: what stays on the GPU; by its memory if not set."
    )
    gpus: int = Field(
        1,
        ge=1,
        le=3,
        description="GPUs per video: the three forwards of a step are computed side by side. On a CPU, processes.",
    )
    max_seconds: float = Field(7200, gt=0, description="Longest video that a request may ask for, in seconds.")
    max_upload_bytes: int = Field(500 * 2**20, gt=0, description="Largest request body, in bytes.")

    @cached_property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'jobs.db'}"

    def job_folder(self, job_id: str) -> Path:
        """Where a job's files lie. Ids are ours and safe as file names."""
        return self.home / "jobs" / job_id
