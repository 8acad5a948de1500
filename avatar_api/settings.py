"""Settings of the service, from environment variables that begin with AVATAR_."""

from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from infinitetalk.settings import FEW_STEPS, FewSteps


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
    fast_lora: Path | None = Field(
        None, description="The LoRA of `quality=fast`, a `.safetensors` file; that quality is refused if not set."
    )
    fast_preset: Literal["lightx2v", "fusionx"] = Field(
        "lightx2v", description="How it is used: 4 steps (`lightx2v`) or 8 (`fusionx`) if a request does not say."
    )
    gpus: int = Field(
        1,
        ge=1,
        le=3,
        description="GPUs per video: the three forwards of a step are computed side by side. On a CPU, processes.",
    )
    log_format: Literal["text", "json"] = Field("text", description="`json`: one JSON object per line of the log.")
    max_seconds: float = Field(7200, gt=0, description="Longest video that a request may ask for, in seconds.")
    max_upload_bytes: int = Field(500 * 2**20, gt=0, description="Largest request body, and largest file from a URL.")

    auth: Literal["keys", "off"] = Field("keys", description="`off`: whoever reaches the server may use it.")
    api_keys: SecretStr | None = Field(
        None, description="Keys that callers send, separated by commas; one is made and printed if there are none."
    )
    api_keys_file: Path | None = Field(None, description="A file with one key per line, instead or besides.")

    grpc_port: int = Field(3001, ge=0, le=65535, description="Port of gRPC; `0` turns it off.")
    grpc_host: str = Field(
        "127.0.0.1", description="Address that gRPC listens on: `0.0.0.0` for all, as `bentoml serve` has it for HTTP."
    )
    grpc_tls_cert: Path | None = Field(None, description="Certificate chain in PEM, for gRPC over TLS.")
    grpc_tls_key: Path | None = Field(None, description="Its private key.")

    max_queued: int = Field(1000, gt=0, description="Videos that may wait; further requests get 429.")
    max_queued_per_key: int = Field(100, gt=0, description="The same, of one API key.")
    keep_days: float = Field(7, gt=0, description="A finished video and its files are deleted after so many days.")
    keep_bytes: int | None = Field(
        None,
        gt=0,
        description="Delete the oldest finished videos while the home folder holds more than this; with a bucket, from "
        "the home folder only.",
    )

    allowed_hosts: str = Field(
        "",
        description="Hosts and networks, separated by commas, that inputs and webhooks may name though not public: "
        "`files.internal, 10.1.0.0/16`.",
    )
    fetch_seconds: float = Field(300, gt=0, description="Longest time for a file from a URL.")
    webhook_secret: SecretStr | None = Field(
        None, description="`whsec_…`, signs webhooks; one is made and kept in the home folder if not set."
    )

    s3_bucket: str | None = Field(None, description="Bucket for results and checkpoints; the home folder if not set.")
    s3_prefix: str = Field("avatar/", description="What their names in the bucket begin with.")
    s3_endpoint_url: str | None = Field(None, description="Of an S3-compatible service; Amazon's if not set.")
    s3_link_seconds: int = Field(3600, gt=0, le=7 * 24 * 3600, description="How long a link to a result is valid.")

    @property
    def few_steps(self) -> FewSteps | None:
        """How `quality=fast` is made; None: it is not."""
        return None if self.fast_lora is None else FEW_STEPS[self.fast_preset]

    @cached_property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'jobs.db'}"

    def job_folder(self, job_id: str) -> Path:
        """Where a job's files lie. Ids are ours and safe as file names."""
        return self.home / "jobs" / job_id
