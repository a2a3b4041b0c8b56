"""Traces by OpenTelemetry's own library, to a collector that speaks OTLP over HTTP.

Its settings are the variables that OpenTelemetry specifies: `OTEL_EXPORTER_OTLP_ENDPOINT` and its like,
`OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, MutableMapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kohakuriver import __version__
from kohakuriver.errors import KohakuRiverError

__all__ = ["OtelTracer"]

EXPORT_SECONDS = 2.0
"""How long handing traces over may take, unless the environment says otherwise: a command's end waits for it."""

_KINDS = {"client": SpanKind.CLIENT, "server": SpanKind.SERVER, "internal": SpanKind.INTERNAL}


class _Ids(RandomIdGenerator):
    """A trace that begins here has the id of the request, which is in the logs."""

    def __init__(self, request_id: Callable[[], str]) -> None:
        self._request_id = request_id

    def generate_trace_id(self) -> int:
        found = self._request_id()
        return int(found, 16) if found else super().generate_trace_id()


class OtelTracer:
    """Steps of `program` as spans. `request_id` is that of the request that is worked on just now, "" for none."""

    def __init__(self, program: str, request_id: Callable[[], str]) -> None:
        about = {SERVICE_VERSION: __version__}
        if not os.environ.get("OTEL_SERVICE_NAME"):
            about[SERVICE_NAME] = f"kohakuriver-{program}"
        if program == "command":  # whoever runs one has not asked how the collector does
            logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        limit = None if os.environ.get("OTEL_EXPORTER_OTLP_TIMEOUT") else EXPORT_SECONDS
        self._provider = TracerProvider(
            resource=Resource.create(about), id_generator=_Ids(request_id), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=limit)))
        self._tracer = self._provider.get_tracer("kohakuriver", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def span(self, name: str, kind: str, parent: str) -> Iterator[None]:
        context = self._propagator.extract({"traceparent": parent}) if parent else None
        with self._tracer.start_as_current_span(
            name, context=context, kind=_KINDS[kind], record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except KohakuRiverError as error:
                span.set_status(Status(StatusCode.ERROR, error.code))
                raise

    def inject(self, headers: MutableMapping[str, str]) -> None:
        self._propagator.inject(headers)

    def finish(self) -> None:
        self._provider.force_flush()
