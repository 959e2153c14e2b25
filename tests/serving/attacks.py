"""Ways to harm a server, each a process of its own without torch, for ``siege``.

python -m tests.serving.attacks NAME PORT PROTOCOL SECONDS

Every attack uses several connections, connects again when it is dropped, and prints as JSON how often it connected and how much
it sent.
"""

import io
import json
import random
import select
import socket
import struct
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from functools import cache, partial

import msgpack

from tests.serving import hostile

CONNECTIONS = 4
SILENT = 1100
_PAUSE_S = 0.02
"""Pause before the next attempt to connect, as the network's round trip would be."""


def message(protocol, image=None, **fields):
    """A frame with an observation, sound but for what is changed.

    Args:
        protocol: "openpi" or "vla-eval".
        image: instead of a small one.
        fields: further keys.
    """
    image = image or hostile.array(bytes(64 * 64 * 3), shape=(64, 64, 3))
    state = hostile.array(b"\0" * 16, "<f4", (4,))
    if protocol == "openpi":
        return msgpack.packb({"observation/image": image, "observation/state": state, "prompt": "x", **fields})
    plain = {"images": {"primary": _text_keys(image)}, "states": _text_keys(state), "task_description": "x", **fields}
    return msgpack.packb({"type": "observation", "payload": {k: _text_keys(v) for k, v in plain.items()}, "seq": 1})


def _text_keys(value):
    """vla-eval's markers are texts, openpi's are bytes."""
    return {k.decode() if isinstance(k, bytes) else k: v for k, v in value.items()} if isinstance(value, dict) else value


def nested(protocol):
    """Lists within lists: as many values as were once accepted, as many as are, and as deep as is."""
    inner = b"\xdc\x27\x00" + b"\xc0" * 9984
    deep = [0]
    for _ in range(28):
        deep = [deep]
    return [
        b"\xdc\x00\x1e" + inner * 30,
        b"\xdc\x17\x70" * 29 + b"\xc0" * 170_000,
        message(protocol, more=[[0] * 98] * 98),
        message(protocol, more=[{str(i): 0 for i in range(90)}] * 50),
        message(protocol, more=deep),
    ]


def large_images(protocol):
    """4096 × 4096 pixels: as they are, and in a few kilobytes."""
    side = 4096
    sent = [message(protocol, hostile.array(bytes(side * side * 3), shape=(side, side, 3)))]
    if protocol == "vla-eval":
        from PIL import Image

        for form in ("png", "jpeg"):
            Image.new("RGB", (side, side)).save(file := io.BytesIO(), form)
            sent.append(
                message(protocol, {"__image__": True, "format": form, "data": file.getvalue(), "shape": [side, side, 3]})
            )
    return sent


def large_prefix(protocol):
    """60 MB of actions."""
    return [message(protocol, action_prefix=hostile.array(bytes(60_000_000), "<f4", (3_750_000, 4)))]


@cache
def payloads(name, protocol):
    """Bytes to send over and over: the attack's frames."""
    if name == "frames":
        return b"".join(map(hostile.frame, hostile.frames(5000, 1)))
    if name == "pings":
        return hostile.frame(b"x" * 100, opcode=9) * 500
    if name == "tiny frames":
        return hostile.frame(b"\xc0") * 30_000
    if name == "fragments":
        return b"\x02\x81\0\0\0\0\xc0" + b"\x00\x81\0\0\0\0\xc0" * 30_000
    if name == "page":
        texts = [json.dumps([[[]] * 50_000]), "[" * 100_000, json.dumps({"instruction": "x" * 10**6}), "[" * 4000, "{}"]
        return b"".join(hostile.frame(text.encode(), opcode=1) for text in texts) + hostile.frame(b"{}", opcode=1) * 2000
    made = {"nested messages": nested, "large images": large_images, "large prefix": large_prefix}[name](protocol)
    return b"".join(map(hostile.frame, made))


def _connected(port, protocol, hello=hostile.HELLO):
    connection = hostile.Raw(port, hello)
    if b" 101 " not in connection.head.split(b"\r\n")[0] + b" ":
        connection.close()
        raise ConnectionError("refused")
    if protocol == "openpi" and hello is hostile.HELLO:
        connection.read()
    return connection


def _again(until, tell, action):
    """Repeat ``action`` until the time is over, also after it was disconnected."""
    while time.monotonic() < until:
        try:
            action()
        except (OSError, ConnectionError):
            tell["dropped"] += 1
            time.sleep(_PAUSE_S)


def flood(name, port, protocol, until, tell):
    """Send as fast as the server reads, and read whatever it answers."""
    hello = hostile.HELLO
    if name == "page":
        host = f"127.0.0.1:{port}".encode()
        hello = hello.replace(b"GET / ", b"GET /dashboard/stream ").replace(b"Host: 127.0.0.1", b"Host: " + host)
        hello = hello.replace(
            b"\r\n\r\n", b"\r\nOrigin: http://" + host + b"\r\nSec-WebSocket-Protocol: vlaflow.dashboard\r\n\r\n"
        )
    data = memoryview(payloads(name, protocol))

    def once():
        with _connected(port, protocol, hello) as connection:
            tell["connected"] += 1
            connection.socket.setblocking(False)
            at = 0
            while time.monotonic() < until:
                readable, writable, _ = select.select([connection.socket], [connection.socket], [], 0.5)
                if readable and not connection.socket.recv(1 << 20):
                    raise ConnectionError("closed")
                if writable:
                    sent = connection.socket.send(data[at : at + (1 << 18)])
                    at, tell["bytes"] = (at + sent) % len(data), tell["bytes"] + sent

    _again(until, tell, once)


def slow_readers(port, protocol, until, tell):
    """Ask, ping, and never read."""
    frames = hostile.frame(message(protocol)) + hostile.frame(b"x" * 100, opcode=9) + hostile.frame(b"\xc1") * 20

    def once():
        with _connected(port, protocol) as connection:
            tell["connected"] += 1
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.socket.settimeout(0.5)
            while time.monotonic() < until:
                with suppress(TimeoutError):
                    connection.socket.sendall(frames)
                    tell["sent"] += 1
                time.sleep(0.05)

    _again(until, tell, once)


def leavers(port, protocol, until, tell):
    """Ask and leave before the answer, politely or not."""
    ask, rng = hostile.frame(message(protocol)), random.Random(port)

    def once():
        with _connected(port, protocol) as connection:
            tell["connected"] += 1
            connection.socket.sendall(ask)
            time.sleep(rng.choice((0, 0.001, 0.01)))
            if rng.random() < 0.5:
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset

    _again(until, tell, once)


def silent(port, protocol, until, tell):
    """So many sockets that say nothing, a quarter of them after a complete handshake; those that are dropped come back."""
    sockets = []
    while time.monotonic() < until:
        while len(sockets) < SILENT // CONNECTIONS and time.monotonic() < until:
            try:
                if len(sockets) % 4:
                    sockets.append(socket.create_connection(("127.0.0.1", port), 5))
                else:
                    connection = socket.create_connection(("127.0.0.1", port), 5)
                    connection.sendall(hostile.HELLO)
                    sockets.append(connection)
                tell["connected"] += 1
            except OSError:
                tell["dropped"] += 1
                time.sleep(_PAUSE_S)
        time.sleep(0.1)
        alive = []
        for each in sockets:
            each.setblocking(False)
            try:
                gone = each.recv(1 << 16) == b""
            except BlockingIOError:
                gone = False
            except OSError:
                gone = True
            if gone:
                each.close()
                tell["dropped"] += 1
            else:
                alive.append(each)
        sockets = alive
    for each in sockets:
        each.close()


FLOODS = ("frames", "nested messages", "large images", "large prefix", "pings", "tiny frames", "fragments", "page")
ATTACKS = {name: partial(flood, name) for name in FLOODS}
ATTACKS |= {"slow readers": slow_readers, "silent sockets": silent, "clients that leave": leavers}


def attack(name, port, protocol, seconds):
    """Run one attack over several connections for so many seconds; what it did."""
    if name in FLOODS:
        payloads(name, protocol)  # made once, by whichever thread
    until, told = time.monotonic() + seconds, [Counter() for _ in range(CONNECTIONS)]
    threads = [threading.Thread(target=ATTACKS[name], args=(port, protocol, until, each), daemon=True) for each in told]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 10)
    return sum(told, Counter())


if __name__ == "__main__":
    name, port, protocol, seconds = sys.argv[1:5]
    sys.stdout.write(json.dumps(attack(name, int(port), protocol, float(seconds))) + "\n")
