"""Records the server's events for the log, for ``/metrics`` and for observers.

A line of the log is a sentence, or a JSON object with ``JsonLines``. It never contains an image or a token. A refusal may quote
a part of a request, shortened and without control characters.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any, Literal

from vlaflow.errors import BusyError, DeadlineError, VlaflowError
from vlaflow.robot.wire import ArrayEncoding
from vlaflow.serving.engine import Engine
from vlaflow.spec import Chunk, Observation

logger = logging.getLogger("vlaflow.serving")

Outcome = Literal["answered", "continued", "reset", "refused", "busy", "late", "gone", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("answered", "continued", "reset", "refused", "busy", "late", "gone", "failed")
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
RECENT, LINES = 1024, 50
MOST_SENTENCE = 400


def sentence(error: object) -> str:
    """The text of an error on one line, without control characters, and without its middle if it is long."""
    text = str(error)
    if len(text) > MOST_SENTENCE:
        text = f"{text[: MOST_SENTENCE // 2]} ... {text[-MOST_SENTENCE // 2 :]}"
    return "".join(c if c.isprintable() else " " for c in text)


@dataclass(frozen=True)
class Event:
    """One line of the log.

    Args:
        event: what happened: an outcome of a request, or "warming up", "serving", "dashboard", "connected", "left",
            "turned away", "watching", "watched", "instruction", "stopping".
        client: address and port, if the event concerns a client.
        request: number of the request since the server started.
        ms: milliseconds from the arrival of the request to the reply.
        layers, nfe: amount of computation.
        note: further details in words.
    """

    event: str
    client: str | None = None
    request: int | None = None
    ms: float | None = None
    layers: int | None = None
    nfe: int | None = None
    note: str | None = None

    def __str__(self) -> str:
        who = " ".join(part for part in (self.client, f"#{self.request}" if self.request else None) if part)
        spent = f" in {self.ms:.1f} ms" if self.ms is not None else ""
        work = f", {self.layers} layers, {self.nfe} evaluations" if self.layers is not None else ""
        return f"{who + ': ' if who else ''}{self.event}{spent}{work}{': ' + self.note if self.note else ''}"


@dataclass
class RequestEntry:
    """A request in progress; the handler records its outcome, and the encoding in which it is to be answered."""

    client: str
    number: int
    began: float
    outcome: Outcome = "failed"
    note: str | None = None
    observation: Observation | None = None
    chunk: Chunk | None = None
    encoding: ArrayEncoding = ArrayEncoding.OPENPI

    def refused(self, error: VlaflowError) -> str:
        """Record an error and return its message for the client."""
        self.outcome = "busy" if isinstance(error, BusyError) else "late" if isinstance(error, DeadlineError) else "refused"
        self.note = sentence(error)
        return self.note


@dataclass
class RequestLog:
    """Counts, latencies and the log.

    Attributes:
        outcomes: number of requests by outcome.
        connections: number of connections, taken and turned away.
        clients: currently connected clients.
        recent: (end time, milliseconds, outcome) of the last requests.
        lines: last events of the log.
        observer: called with every finished request.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    connections: Counter[str] = field(default_factory=Counter)
    clients: set[str] = field(default_factory=set)
    layers: int = 0
    nfe: int = 0
    seconds: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    recent: deque[tuple[float, float, str]] = field(default_factory=lambda: deque(maxlen=RECENT))
    lines: deque[Event] = field(default_factory=lambda: deque(maxlen=LINES))
    observer: Callable[[RequestEntry], None] | None = None
    _requests: int = 0

    def write(self, event: str, client: str | None = None, note: str | None = None, **more: Any) -> None:
        """Write a line to the log."""
        self._log(Event(event, client, note=note, **more))

    @contextmanager
    def connected(self, client: str) -> Iterator[None]:
        """Context of a connected client."""
        self.clients.add(client)
        self.connections["taken"] += 1
        self.write("connected", client)
        try:
            yield
        finally:
            self.clients.discard(client)
            self.write("left", client)

    def turned_away(self, client: str, why: str) -> None:
        """Record a refused connection."""
        self.connections["turned away"] += 1
        self.write("turned away", client, why)

    @contextmanager
    def request(self, client: str) -> Iterator[RequestEntry]:
        """Context of a request, from its arrival to the reply."""
        self._requests += 1
        entry = RequestEntry(client, self._requests, time.perf_counter())
        try:
            yield entry
        except asyncio.CancelledError:
            entry.outcome = "gone"
            raise
        finally:
            seconds = time.perf_counter() - entry.began
            self.outcomes[entry.outcome] += 1
            self.recent.append((time.monotonic(), 1e3 * seconds, entry.outcome))
            chunk = entry.chunk
            if entry.outcome == "answered" and chunk is not None:
                self.layers += chunk.layers
                self.nfe += chunk.nfe
                self.seconds += seconds
                self.buckets[bisect_left(BUCKETS_S, seconds)] += 1
            work = {"layers": chunk.layers, "nfe": chunk.nfe} if chunk is not None else {}
            if entry.outcome != "continued":  # one line per chunk, not per step
                self._log(Event(entry.outcome, client, entry.number, 1e3 * seconds, note=entry.note, **work))
            if self.observer is not None:
                self.observer(entry)

    def _log(self, event: Event) -> None:
        self.lines.append(event)
        if logger.isEnabledFor(logging.INFO):
            logger.info("%s", event, extra={"event": event})

    def exposition(self, engine: Engine) -> str:
        """All counts in Prometheus' text format."""
        counts, times = engine.counts, "vlaflow_request_seconds"
        edges = [*(f"{edge:g}" for edge in BUCKETS_S), "+Inf"]
        cumulative = list(accumulate(self.buckets))
        histogram: dict[str, float] = {f'{times}_bucket{{le="{e}"}}': n for e, n in zip(edges, cumulative, strict=True)}
        histogram |= {f"{times}_sum": round(self.seconds, 6), f"{times}_count": cumulative[-1]}
        requests = {f'vlaflow_requests_total{{outcome="{o}"}}': self.outcomes[o] for o in OUTCOMES}
        connections = {
            'vlaflow_connections_total{outcome="taken"}': self.connections["taken"],
            'vlaflow_connections_total{outcome="turned_away"}': self.connections["turned away"],
        }
        families: list[tuple[str, str, str, Mapping[str, float] | float]] = [
            ("vlaflow_requests_total", "counter", "Requests received, by outcome.", requests),
            (times, "histogram", "Time from the arrival of a request to the reply, over answered requests.", histogram),
            ("vlaflow_connections_total", "counter", "Connections, taken and turned away.", connections),
            ("vlaflow_clients", "gauge", "Currently connected clients.", len(self.clients)),
            ("vlaflow_queue_depth", "gauge", "Requests waiting for the next batch.", engine.waiting),
            ("vlaflow_batches_total", "counter", "Batches computed.", counts.batches),
            ("vlaflow_inference_seconds_total", "counter", "Time spent computing batches.", round(counts.seconds, 6)),
            ("vlaflow_layers_total", "counter", "Backbone layers run, over answered requests.", self.layers),
            ("vlaflow_nfe_total", "counter", "Decoder evaluations, over answered requests.", self.nfe),
        ]
        lines = []
        for family, kind, text, found in families:
            rows = found if isinstance(found, Mapping) else {family: found}
            lines += [f"# HELP {family} {text}", f"# TYPE {family} {kind}", *(f"{row} {value}" for row, value in rows.items())]
        return "\n".join(lines) + "\n"


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, and the fields of the event or the message of other records."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        event = getattr(record, "event", None)
        if isinstance(event, Event):
            line |= {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(event).items() if v is not None}
        else:
            line |= {"event": "message", "logger": record.name, "note": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class OneLine(logging.Filter):
    """Filter for the log of the websocket library: only warnings, and errors of clients as one line without traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See ``logging.Filter``."""
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            record.msg, record.args = "%s (%s)", (sentence(record.getMessage()), type(error).__name__)
            record.exc_info, record.levelno, record.levelname = None, logging.INFO, "INFO"
            return True
        return record.levelno >= logging.WARNING
