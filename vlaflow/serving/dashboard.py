"""The operator's page: what the policy saw last, what it answered, how long that took, and a box for an instruction.

``/dashboard`` is a page without data; ``/dashboard/stream`` is a websocket that feeds it. The server's rules hold for the
stream: on this machine alone without a token, and with the token otherwise (a browser cannot set headers, so it comes as a
subprotocol, never in an address). Only the page of this server may open it, and without a token only under a name of this
machine; else any page that a browser shows could look through the robot's eyes.

Inference never waits for a watcher. An answer leaves a reference here and no more; images are encoded in a thread, for each
watcher at its own pace, and a slow one misses frames.

The operator's instruction is off until it is set and stays until it is cleared. It takes the place of a request's prompt only
where the request says ``"follow_operator": true``, and then the reply says which words were used.
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
from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from vlaflow.errors import RequestError
from vlaflow.serving.engine import Engine
from vlaflow.serving.request_log import OUTCOMES, RECENT, Event, RequestEntry, RequestLog, sentence
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
_SIDE = 480
"""Pixels of an image on the page; larger ones are made smaller."""


@dataclass
class Dashboard:
    """See the module text.

    Args:
        journal, engine: of the server.
        hello: what the page is told first; JSON data.
        token: the server's.
        rate_hz: how often a watcher is told, at most.
        most: watchers at a time.

    Attributes:
        instruction: the operator's, while one is in force.
        watchers: pages that are open.
        told: messages sent to pages.
    """

    request_log: RequestLog
    engine: Engine
    hello: Mapping[str, Any]
    token: str | None = None
    rate_hz: float = 5.0
    most: int = 4
    instruction: str | None = None
    watchers: int = 0
    told: int = 0
    _last: tuple[RequestEntry, Observation, Chunk, float] | None = None
    _work: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=120))
    _followed: int = 0
    _ignored: int = 0

    # -- what the server tells ---------------------------------------------------------------------------------------

    def saw(self, entry: RequestEntry) -> None:
        """A request has ended."""
        if entry.chunk is not None and entry.observation is not None:
            self._last = entry, entry.observation, entry.chunk, time.monotonic()
            self._work.append((entry.chunk.layers, entry.chunk.nfe))

    def instruct(self, observation: Observation, follows: bool) -> Observation:
        """The observation with the operator's instruction, where one is set and the request follows it."""
        if self.instruction is None:
            return observation
        self._followed, self._ignored = self._followed + follows, self._ignored + (not follows)
        return replace(observation, instruction=self.instruction) if follows else observation

    # -- what browsers ask -------------------------------------------------------------------------------------------

    def http(self, request: Request) -> Response | None:
        """The page and its parts, which hold no data; None for every other path."""
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
        """Why this request may not open the stream; None where it may."""
        if not same_origin(request):
            return "Only the page of this server may watch it."
        if self.token is None:
            return None if named_here(request) else "Without a token the page opens on this machine alone."
        offered = ",".join(request.headers.get_all("Sec-WebSocket-Protocol")).split(",")
        tokens = [word.strip().removeprefix("token.") for word in offered if word.strip().startswith("token.")]
        return None if any(_same(token, self.token) for token in tokens) else "This page needs the server's token."

    async def watch(self, connection: ServerConnection, name: str) -> None:
        """Feed one page until it is closed."""
        if self.watchers >= self.most:
            await connection.close(1013, f"{self.most} pages watch already.")
            return
        self.watchers += 1
        self.request_log.say("watching", name)
        listening = asyncio.create_task(self._listen(connection, name))
        try:
            await connection.send(json.dumps(_finite({"kind": "hello", **self.hello})))
            shown: RequestEntry | None = None
            while not listening.done():
                last = self._last if self._last is not None and self._last[0] is not shown else None
                shown = self._last[0] if self._last is not None else None
                now, lines = self._now(), [_line(event) for event in list(self.request_log.lines)[-12:]]
                await connection.send(await asyncio.to_thread(_message, now, lines, last))
                self.told += 1
                await asyncio.wait([listening], timeout=1 / self.rate_hz)
        except websockets.ConnectionClosed:
            pass
        finally:
            listening.cancel()
            self.watchers -= 1
            self.request_log.say("watched", name)

    async def _listen(self, connection: ServerConnection, name: str) -> None:
        """Take what the operator types."""
        with suppress(websockets.ConnectionClosed):
            async for frame in connection:
                try:
                    words = _instruction(frame)
                except RequestError as error:
                    await connection.send(json.dumps({"kind": "refused", "sentence": str(error)}))
                    continue
                self.instruction, self._followed, self._ignored = words, 0, 0
                self.request_log.say("instruction", name, "cleared" if words is None else f"set to '{words}'")

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
    """Whether the origin that a browser names is the address that it asks."""
    origins, hosts = request.headers.get_all("Origin"), request.headers.get_all("Host")
    return len(origins) == len(hosts) == 1 and origins[0].partition("://")[2] == hosts[0]


def named_here(request: Request) -> bool:
    """Whether this machine is asked by a name of its own, and not by one that a stranger pointed at it."""
    host = "".join(request.headers.get_all("Host"))
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    return name.strip("[]") in LOOPBACK


def _line(event: Event) -> dict[str, Any]:
    return {"text": str(event), "wrong": event.event in _WRONG}


def _rate(moments: Sequence[float], now: float, seconds: float = 10.0) -> float:
    """Events per second over the last seconds, or over as far back as the moments go where they are cut short."""
    if len(moments) == RECENT:
        seconds = max(min(seconds, now - moments[0]), 1e-3)
    return round(sum(at > now - seconds for at in moments) / seconds, 2)


def _finite(value: Any) -> Any:
    """JSON has no infinities; what is no number is null there."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _message(
    now: dict[str, Any], lines: list[dict[str, Any]], last: tuple[RequestEntry, Observation, Chunk, float] | None
) -> str:
    """What a page is told; runs in a thread."""
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
        message["images"] = {view: _picture(image) for view, image in observation.images.items()}
    return json.dumps(_finite(message))


def _picture(image: np.ndarray) -> str:
    """A JPEG as a data address."""
    from PIL import Image

    picture, file = Image.fromarray(image), io.BytesIO()
    picture.thumbnail((_SIDE, _SIDE))
    picture.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _instruction(frame: str | bytes) -> str | None:
    """What the operator wants said; None to clear it."""
    try:
        found = json.loads(frame)
    except (ValueError, RecursionError) as error:
        raise RequestError("The page sends JSON.") from error
    words = found.get("instruction", 0) if isinstance(found, dict) else 0
    if words is None:
        return None
    if not isinstance(words, str) or not words.strip() or len(words) > _LONGEST_INSTRUCTION:
        raise RequestError(f"An instruction has 1 to {_LONGEST_INSTRUCTION} characters.")
    return sentence(words.strip())  # on one line


def _same(encoded: str, token: str) -> bool:
    try:
        given = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except (ValueError, binascii.Error):
        return False
    return hmac.compare_digest(given, token.encode())
