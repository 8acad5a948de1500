"""Spans of a job's run, under the trace of the request that made it.

BentoML traces the requests, and exports what `tracing` in its configuration says. The request's span is noted with the
job, as W3C's traceparent, and the runner goes on from there, in whatever process and however much later.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from bentoml._internal.configuration.containers import BentoMLContainer
from opentelemetry.trace import Span, StatusCode, Tracer, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_propagator = TraceContextTextMapPropagator()
_KEY = "traceparent"


def traceparent() -> str | None:
    """The span that we are in, for another process to go on from; None if it is not exported."""
    carrier: dict[str, str] = {}
    if get_current_span().get_span_context().trace_flags.sampled:
        _propagator.inject(carrier)
    return carrier.get(_KEY)


@contextmanager
def span(name: str, parent: str | None = None, **attributes: str | int) -> Iterator[Span]:
    """What is done meanwhile, as a span within the one that we are in, or within `parent`, a traceparent."""
    context = _propagator.extract({_KEY: parent}) if parent else None
    named = {f"avatar.{key}": value for key, value in attributes.items()}
    begin = _tracer().start_as_current_span
    with begin(name, context, attributes=named, record_exception=False, set_status_on_exception=False) as begun:
        yield begun  # a job that is cancelled or handed back raises too, which is no error


def past_span(name: str, seconds: float, **attributes: str | int) -> None:
    """What has just been done, and took so long."""
    end = time.time_ns()
    named = {f"avatar.{key}": value for key, value in attributes.items()}
    _tracer().start_span(name, attributes=named, start_time=end - round(seconds * 1e9)).end(end)


def failed(error: Exception) -> None:
    """The span that we are in did not succeed."""
    get_current_span().record_exception(error)
    get_current_span().set_status(StatusCode.ERROR, type(error).__name__)


def _tracer() -> Tracer:
    return BentoMLContainer.tracer_provider.get().get_tracer("avatar_api")
