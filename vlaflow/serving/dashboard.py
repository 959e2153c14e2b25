"""The operator's page: the last observation and chunk, latencies, and a field for an instruction.

``/dashboard`` is a page without data; ``/dashboard/stream`` is a websocket that feeds it. The stream has the same rules as the
server: without a token, only this machine has access; otherwise the token is required (a browser cannot set headers, so the
token is sent as a subprotocol, never in an address). Only the page of this server may open the stream, and without a token
only under a name of this machine; otherwise any page in a browser could see the robot's images.

Inference never waits for a watching page. A reply only leaves a reference here; images are encoded in a thread, for each page
at its own pace, and a slow page misses frames.

The operator's instruction is off until it is set and remains until it is cleared. It replaces the prompt of a request only if
the request contains ``"follow_operator": true``; the reply then states the instruction that was used.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import io
import json
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from importlib import resources
from typing import Any

import numpy as np
import websockets
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from vlaflow.errors import RequestError
from vlaflow.serving.engine import Engine
from vlaflow.serving.request_log import OUTCOMES, RECENT, Event, RequestEntry, RequestLog, sentence
from vlaflow.serving.turns import PER_MESSAGE_S, LimitedConnection
from vlaflow.spec import Chunk, Observation

PAGE, STREAM = "/dashboard", "/dashboard/stream"
SUBPROTOCOL = Subprotocol("vlaflow.dashboard")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_FILES = {
    PAGE: ("dashboard.html", "text/html"),
    f"{PAGE}/style.css": ("dashboard.css", "text/css"),
    f"{PAGE}/script.js": ("dashboard.js", "text/javascript"),
}
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; frame-ancestors 'none'"
_WRONG = frozenset({"refused", "busy", "late", "failed", "turned away"})
_LONGEST_INSTRUCTION = 300
_LONGEST_MESSAGE = 4096
MOST_PAGE_BYTES = 2**16
"""Size of a message beyond which a page is disconnected."""
_SIDE = 480
"""Largest side of an image on the page in pixels."""


@dataclass
class Dashboard:
    """State of the operator's page; see the module docstring.

    Args:
        request_log, engine: those of the server.
        hello: first message to a page; JSON data.
        token: token of the server.
        rate_hz: largest number of messages per second to a page.
        most: largest number of open pages.

    Attributes:
        instruction: the operator's instruction; None if none is set.
        watchers: number of open pages.
        messages_sent: number of messages sent to pages.
    """

    request_log: RequestLog
    engine: Engine
    hello: Mapping[str, Any]
    token: str | None = None
    rate_hz: float = 5.0
    most: int = 4
    instruction: str | None = None
    watchers: int = 0
    messages_sent: int = 0
    _last: tuple[RequestEntry, Observation, Chunk, float] | None = None
    _work: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=120))
    _followed: int = 0
    _ignored: int = 0

    # -- called by the server ----------------------------------------------------------------------------------------

    def record(self, entry: RequestEntry) -> None:
        """Record a finished request."""
        if entry.chunk is not None and entry.observation is not None:
            self._last = entry, entry.observation, entry.chunk, time.monotonic()
            self._work.append((entry.chunk.layers, entry.chunk.nfe))

    def instruct(self, observation: Observation, follows: bool) -> Observation:
        """The observation, with the operator's instruction if one is set and the request follows it."""
        if self.instruction is None:
            return observation
        self._followed, self._ignored = self._followed + follows, self._ignored + (not follows)
        return replace(observation, instruction=self.instruction) if follows else observation

    # -- called by browsers ------------------------------------------------------------------------------------------

    def http(self, request: Request) -> Response | None:
        """The page, its style and its script, which contain no data; None for any other path."""
        if request.path not in _FILES:
            return None
        name, kind = _FILES[request.path]
        body = resources.files("vlaflow.serving").joinpath(name).read_bytes()
        if self.token is not None:
            body = body.replace(b"<body>", b'<body data-token="yes">')
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
            "Connection": "close",
        }
        return Response(HTTPStatus.OK, "OK", Headers(headers), body)

    def refusal(self, request: Request) -> str | None:
        """Why this request may not open the stream; None if it may."""
        if not same_origin(request):
            return "Only the page of this server may watch it."
        if self.token is None:
            return None if named_here(request) else "Without a token, only this machine may watch."
        offered = ",".join(request.headers.get_all("Sec-WebSocket-Protocol")).split(",")
        tokens = [word.strip().removeprefix("token.") for word in offered if word.strip().startswith("token.")]
        return None if any(_same(token, self.token) for token in tokens) else "This page needs the server's token."

    async def watch(self, connection: LimitedConnection, name: str) -> None:
        """Feed one page until it is closed."""
        if self.watchers >= self.most:
            await connection.close(1013, f"{self.most} pages are already watching.")
            return
        self.watchers += 1
        self.request_log.write("watching", name)
        listening = asyncio.create_task(self._listen(connection, name))
        try:
            await connection.send(json.dumps(_finite({"kind": "hello", **self.hello})))
            shown: RequestEntry | None = None
            while not listening.done():
                last = self._last if self._last is not None and self._last[0] is not shown else None
                shown = self._last[0] if self._last is not None else None
                now, lines = self._now(), [_line(event) for event in list(self.request_log.lines)[-12:]]
                began = time.perf_counter()
                message = await asyncio.to_thread(_message, now, lines, last)
                connection.spend(time.perf_counter() - began)
                await connection.send(message)
                self.messages_sent += 1
                await asyncio.wait([listening], timeout=1 / self.rate_hz)
                if not listening.done():
                    connection.establish()
                    await connection.turn()
        except websockets.ConnectionClosed:
            pass
        finally:
            listening.cancel()
            self.watchers -= 1
            self.request_log.write("watched", name)

    async def _listen(self, connection: LimitedConnection, name: str) -> None:
        """Receive the operator's instructions."""
        with suppress(websockets.ConnectionClosed):
            async for frame in connection:
                connection.spend(PER_MESSAGE_S)
                await connection.turn()
                await asyncio.sleep(0)  # a page that sends many messages at once must not block the others
                try:
                    words = _instruction(frame)
                except RequestError as error:
                    await connection.send(json.dumps({"kind": "refused", "sentence": str(error)}))
                    continue
                self.instruction, self._followed, self._ignored = words, 0, 0
                self.request_log.write("instruction", name, "cleared" if words is None else f"set to '{words}'")

    def _now(self) -> dict[str, Any]:
        request_log, now = self.request_log, time.monotonic()
        recent = list(request_log.recent)
        answered = [ms for at, ms, outcome in recent if outcome == "answered" and at > now - 60]
        return {
            "per_second": _rate([at for at, _, _ in recent], now),
            "latency_ms": np.percentile(answered, [50, 99]).round(2).tolist() if answered else None,
            "latency_of": len(answered),
            "clients": sorted(request_log.clients),
            "waiting": self.engine.waiting,
            "outcomes": {outcome: request_log.outcomes[outcome] for outcome in OUTCOMES},
            "work": list(self._work),
            "instruction": self.instruction,
            "followed": self._followed,
            "ignored": self._ignored,
            "age_s": None if self._last is None else round(now - self._last[3], 1),
        }


def same_origin(request: Request) -> bool:
    """Whether the origin stated by a browser is the requested host."""
    origins, hosts = request.headers.get_all("Origin"), request.headers.get_all("Host")
    return len(origins) == len(hosts) == 1 and origins[0].partition("://")[2] == hosts[0]


def named_here(request: Request) -> bool:
    """Whether the requested host is a name of this machine, and not a foreign name that resolves to it."""
    host = "".join(request.headers.get_all("Host"))
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    return name.strip("[]") in LOOPBACK


def _line(event: Event) -> dict[str, Any]:
    return {"text": str(event), "wrong": event.event in _WRONG}


def _rate(times: Sequence[float], now: float, seconds: float = 10.0) -> float:
    """Events per second over the last seconds, or over a shorter period if ``times`` does not reach back that far."""
    if len(times) == RECENT:
        seconds = max(min(seconds, now - times[0]), 1e-3)
    return round(sum(at > now - seconds for at in times) / seconds, 2)


def _finite(value: Any) -> Any:
    """Replace values that are not finite by None, because JSON has no NaN or infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _message(
    now: dict[str, Any], lines: list[dict[str, Any]], last: tuple[RequestEntry, Observation, Chunk, float] | None
) -> str:
    """The message to a page; runs in a thread."""
    message: dict[str, Any] = {"kind": "now", **now, "lines": lines}
    if last is not None:
        entry, observation, chunk, _ = last
        message["chunk"] = {
            "client": entry.client,
            "request": entry.number,
            "instruction": observation.instruction,
            "actions": chunk.actions.round(5).tolist(),
            "draft": None if chunk.draft is None else chunk.draft.round(5).tolist(),
            "confidence": None if chunk.confidence is None else chunk.confidence.astype(float).round(4).tolist(),
            "regenerated": None if chunk.regenerated is None else chunk.regenerated.tolist(),
            "layers": chunk.layers,
            "nfe": chunk.nfe,
            "milliseconds": {part: round(ms, 2) for part, ms in chunk.milliseconds.items()},
        }
        message["images"] = {view: _data_url(image) for view, image in observation.images.items()}
    return json.dumps(_finite(message))


def _data_url(image: np.ndarray) -> str:
    """Encode an image as the data URL of a JPEG."""
    from PIL import Image

    thumbnail, file = Image.fromarray(image), io.BytesIO()
    thumbnail.thumbnail((_SIDE, _SIDE))
    thumbnail.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _instruction(frame: str | bytes) -> str | None:
    """Decode the operator's instruction; None clears it."""
    if len(frame) > _LONGEST_MESSAGE:  # decoding it would delay all clients
        raise RequestError(f"Messages of the page may have at most {_LONGEST_MESSAGE} bytes.")
    try:
        found = json.loads(frame)
    except (ValueError, RecursionError) as error:
        raise RequestError("Messages of the page must be JSON.") from error
    words = found.get("instruction", 0) if isinstance(found, dict) else 0
    if words is None:
        return None
    if not isinstance(words, str) or not words.strip() or len(words) > _LONGEST_INSTRUCTION:
        raise RequestError(f"An instruction must have 1 to {_LONGEST_INSTRUCTION} characters.")
    return sentence(words.strip())  # on one line


def _same(encoded: str, token: str) -> bool:
    try:
        decoded = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except (ValueError, binascii.Error):
        return False
    return hmac.compare_digest(decoded, token.encode())
