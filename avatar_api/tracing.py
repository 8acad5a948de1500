"""Spans of a job's run, under the trace of the request that made it.

BentoML traces the requests, and exports what `tracing` in its configuration says. The request's span is noted with the
job, as W3C's traceparent, and the runner goes on from there, in whatever process and however much later.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from bentoml._internal.configuration.containers import BentoMLContainer
from opentelemetry.trace import Span, StatusCode, Tracer, get_current_span, use_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_propagator = TraceContextTextMapPropagator()
_KEY = "traceparent"


def traceparent() -> str | None:
    """The span that we are in, for another process to go on from; None if it is not exported."""
    carrier: dict[str, str] = {}
    if _exported(get_current_span()):
        _propagator.inject(carrier)
    return carrier.get(_KEY)


@contextmanager
def job_span(parent: str | None, **attributes: str | int) -> Iterator[None]:
    """A job's run, within `parent`, a traceparent, or as a trace of its own."""
    context = _propagator.extract({_KEY: parent}) if parent else None
    begun = _tracer().start_span("job", context, attributes=_named(attributes))
    if not _exported(begun):  # so neither is what it would hold
        yield
        return
    with use_span(begun, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        yield  # a job that is cancelled or handed back raises too, which is no error


@contextmanager
def span(name: str) -> Iterator[None]:
    """What is done meanwhile, as a span within the one that we are in, if there is one."""
    if not _exported(get_current_span()):
        yield
        return
    with _tracer().start_as_current_span(name, record_exception=False, set_status_on_exception=False):
        yield


def past_span(name: str, seconds: float, **attributes: str | int) -> None:
    """What has just been done, and took so long."""
    if _exported(get_current_span()):
        end = time.time_ns()
        begin = end - round(seconds * 1e9)
        _tracer().start_span(name, attributes=_named(attributes), start_time=begin).end(end)


def failed(error: Exception) -> None:
    """The span that we are in did not succeed."""
    get_current_span().record_exception(error)
    get_current_span().set_status(StatusCode.ERROR, type(error).__name__)


def _exported(span: Span) -> bool:
    return span.get_span_context().trace_flags.sampled


def _named(attributes: Mapping[str, str | int]) -> dict[str, str | int]:
    return {f"avatar.{name}": value for name, value in attributes.items()}


def _tracer() -> Tracer:
    return BentoMLContainer.tracer_provider.get().get_tracer("avatar_api")
