"""The ways a run can be refused or fail. Each says what is wrong, with which input, and what would be right."""

import os
from pathlib import Path


class InputError(ValueError):
    """The caller's input is wrong.

    `param` is the input's name as the caller wrote it ("audio", "size", …); `code` is a short machine-readable
    reason ("invalid_value", "unsupported_format", "too_large", …); the message names value and remedy.
    """

    def __init__(self, param: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class CheckpointError(RuntimeError):
    """A model file is missing, damaged, misnamed or of the wrong shape; the message names file, key and expectation."""


def require(file: Path, remedy: str) -> None:
    """Raises CheckpointError where a file is not there or may not be read: safetensors says the same of both."""
    try:
        file.open("rb").close()
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; {remedy}.") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read by uid {os.geteuid()}: {error.strerror}.") from error


class RankError(RuntimeError):
    """Another process that shares the work failed, died or hangs; the message says which, and why."""
