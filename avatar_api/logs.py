"""The log: BentoML's lines of text, or with AVATAR_LOG_FORMAT=json one JSON object a line, for a log collector.

Within `of_job(job_id)` a line carries the job's id, whoever writes it.
"""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from opentelemetry.trace import format_trace_id, get_current_span

_job: ContextVar[str | None] = ContextVar("job", default=None)


@contextmanager
def of_job(job_id: str) -> Iterator[None]:
    """What is logged meanwhile is about this job. It holds for the thread; a new one says it again."""
    token = _job.set(job_id)
    try:
        yield
    finally:
        _job.reset(token)


class JsonLines(logging.Formatter):
    """{"time", "level", "logger", "message", "process", "pid"} and, where there is one, "job", "trace", "exception"."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": getattr(record, "component", "")[1:-1],  # BentoML's name for it, in brackets
            "pid": record.process,
        }
        if job := _job.get():
            line["job"] = job
        if trace := get_current_span().get_span_context().trace_id:
            line["trace"] = format_trace_id(trace)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up(log_format: Literal["text", "json"]) -> None:
    """Our loggers write where BentoML's do. Called by each process once BentoML has set up its own."""
    ours, theirs = logging.getLogger("avatar_api"), logging.getLogger("bentoml")
    ours.setLevel(logging.INFO)
    ours.handlers, ours.propagate = theirs.handlers, False
    threading.excepthook = _thread_died
    if log_format == "json":
        for handler in (*theirs.handlers, *logging.getLogger().handlers):
            handler.setFormatter(JsonLines())
        logging.captureWarnings(True)


def _thread_died(died: threading.ExceptHookArgs) -> None:
    if died.exc_value is not None and died.exc_type is not SystemExit:
        error = (died.exc_type, died.exc_value, died.exc_traceback)
        name = died.thread.name if died.thread else "unknown"
        logging.getLogger("avatar_api").critical("thread %s died", name, exc_info=error)
