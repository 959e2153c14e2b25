"""Frames that nobody should send, and sockets that send them: for ``test_hostility`` and ``make fuzz``.

Nothing here needs torch, so that an attacker is a process that is there at once:

    python -m tests.serving.hostile PORT FRAMES SEED

It prints, as JSON, how often the server answered how.
"""

import json
import select
import socket
import struct
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice

import msgpack
import numpy as np

BATCH = 64


def array(data=b"\0" * 12, dtype="|u1", shape=(2, 2, 3)):
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": list(shape)}


def scalar(data, dtype):
    return {b"__npgeneric__": True, b"data": data, b"dtype": dtype}


def request(**changes):
    """A sound request but for what is changed; None leaves a key out."""
    state = array(b"\0" * 16, "<f4", (4,))
    fields = {"observation/image": array(), "observation/state": state, "prompt": "x", **changes}
    return {key: value for key, value in fields.items() if value is not None}


# What a key of the protocol may find in its place: sound for the codec, rarely for the server.
KEYS = ("observation/image", "observation/state", "observation", "prompt", "seed")
KEYS += ("reset", "deadline_ms", "action_spec", "endpoint")
VALUES = [None, True, -1, 2**63, 0.5, float("nan"), float("inf"), "", "x" * 5000, "a\nb", b"", b"\xff" * 300]
VALUES += [[], [[1], [2, 3]], ["a"], [None] * 400, {}, {"a": {"b": 1}}, {b"a": 1}, {str(i): i for i in range(300)}]
VALUES += [{"x" * 3000 + str(i): 0 for i in range(40)}, {"kind": "ActionSpec", "dimensions": [{}], "robot": [], "rate_hz": "x"}]
VALUES += [array(), array(b"", shape=(0, 0, 3)), array(bytes(4097 * 3), shape=(4097, 1, 3))]
VALUES += [array(b"\0" * 8 * n, "<f8", shape) for n, shape in ((1, ()), (0, (0,)), (2, (2,)), (4, (2, 2)), (5000, (5000,)))]
VALUES += [array(np.full(4, x).tobytes(), "<f8", (4,)) for x in (np.nan, np.inf, 1e300)]
VALUES += [scalar(1, "<i4"), scalar(-1, "<f8"), scalar(1e30, "<f8"), scalar(2**64 - 1, "<u8"), scalar(True, "|b1")]

# What the codec itself must refuse inside an otherwise sound request.
UNSOUND = [array(dtype=t) for t in ("|O", "<c8", "|V4", "<U2", "<M8[s]", ">f4", "", "O", 5, None, "x" * 900)]
UNSOUND += [
    array(shape=s) for s in ((2**40, 2**40), (-1,), (1,) * 9, (2**63,), (0, 2**62), (12.0,), ("a",), (True, 12), (2, 2, 4))
]
UNSOUND += [array(data=d) for d in ("text", 5, None, [1] * 12, b"")]
UNSOUND += [scalar(d, "|i1") for d in (2**40, "1", None, [1], float("nan"))] + [scalar(1e300, "<f4")]
UNSOUND += [{b"__ndarray__": True}, {b"__npgeneric__": True}, "x" * 70_000]

# What is no message at all, or one that asks for more than it holds.
BARE = [b"", b"\xc1", b"\x91" * 2000, b"\x81\xa0" * 2000, b"\xdc\xff\xff" * 300, b"\xdc\xff\xff" + b"\x80" * 70_000]
BARE += [head + b"\xff" * 4 for head in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")]
BARE += [b"\xd9\x05abc", b"\xa2\xff\xfe", b"\xc7\xff\x05", b"\xd6\xff\0\0\0\0"]
BARE += [b"\x81\xc0\xc0", b"\x81\x91\x01\x01", b"\x82\x01\x01\x01\x01"]


def frames(count, seed):
    """So many hostile messages, the same for the same seed.

    A fifth each of random bytes and ``BARE``, cut messages, messages with flipped bits, ``VALUES`` and ``UNSOUND``.
    """
    rng = np.random.default_rng(seed)
    sound = msgpack.packb(request(prompt=None))  # so that an intact one still ends before the network
    noise, numbers = rng.bytes(1 << 16), rng.integers(0, 1 << 30, (count, 4))
    replaced = [msgpack.packb(request(**{key: value})) for key in KEYS for value in VALUES]
    unsound = [msgpack.packb(request(**{key: value})) for key in KEYS[:2] for value in UNSOUND]
    for kind, a, b, c in (numbers % (5, 1 << 30, 1 << 30, 1 << 30)).tolist():
        if kind == 0:
            yield noise[a % 65_000 :][: b % 300] if c % 8 else BARE[a % len(BARE)]
        elif kind == 1:
            yield sound[: a % len(sound)]
        elif kind == 2:
            flipped = bytearray(sound)
            flipped[a % len(flipped)] ^= 1 + b % 255
            flipped[c % len(flipped)] ^= 1 << a % 8
            yield bytes(flipped)
        else:
            from_ = replaced if kind == 3 else unsound
            yield from_[a % len(from_)]


def frame(payload, opcode=2):
    """A client's websocket frame; a mask of zeros is a mask."""
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    else:
        length = struct.pack(">BH", 0xFE, size) if size < 1 << 16 else struct.pack(">BQ", 0xFF, size)
    return bytes([0x80 | opcode]) + length + b"\0\0\0\0" + payload


HELLO = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Raw:
    """A websocket connection by hand."""

    def __init__(self, port, hello=HELLO):
        self.socket = socket.create_connection(("127.0.0.1", port), 30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._left = b""
        if hello:
            self.socket.sendall(hello)
            while b"\r\n\r\n" not in self._left:
                self._more()
            self.head, self._left = self._left.split(b"\r\n\r\n", 1)

    def _more(self):
        got = self.socket.recv(1 << 20)
        if not got:
            raise ConnectionError("closed")
        self._left += got

    def read(self):
        """(opcode, payload) of the next frame."""
        while True:
            if len(self._left) >= 2:
                size, at = self._left[1], 2
                if size >= 126:
                    at = 4 if size == 126 else 10
                    size = int.from_bytes(self._left[2:at], "big")
                if len(self._left) >= at + size:
                    found = self._left[0] & 15, self._left[at : at + size]
                    self._left = self._left[at + size :]
                    return found
            self._more()

    def exchange(self, payloads):
        """Send all at once, and read as many answers, whichever way round they come."""
        out, answers = b"".join(map(frame, payloads)), []
        self.socket.setblocking(False)
        try:
            while out:
                readable, writable, _ = select.select([self.socket], [self.socket], [], 30)
                if readable:
                    self._more()
                if writable:
                    out = out[self.socket.send(out[: 1 << 18]) :]
        finally:
            self.socket.setblocking(True)
            self.socket.settimeout(30)
        while len(answers) < len(payloads):
            opcode, payload = self.read()
            if opcode in (1, 2):
                answers.append((opcode, payload))
            elif opcode == 9:  # hostile or not, who is alive says so
                self.socket.sendall(frame(payload, 10))
            elif opcode == 8:
                raise ConnectionError(f"closed by the server: {payload!r}")
        return answers

    def drained(self):
        """Read until the server hangs up."""
        with suppress(ConnectionError):
            while self.socket.recv(4096):
                pass

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def attack(port, count, seed):
    """Send the frames over one connection; how often they were answered how."""
    told, left = Counter(), frames(count, seed)
    with Raw(port) as connection:
        connection.read()  # the metadata
        while batch := list(islice(left, BATCH)):
            for opcode, answer in connection.exchange(batch):
                text = answer.decode() if opcode == 1 else ""
                defect = "server failed" in text or "Traceback" in text or "\n" in text or len(text) > 500
                told["defect" if defect else "refused" if text else "accepted"] += 1
    return told


def attacks(port, count, seed, connections=4):
    """The same over several connections at once."""
    with ThreadPoolExecutor(connections) as pool:
        parts = [pool.submit(attack, port, count // connections, connections * seed + i) for i in range(connections)]
        return sum((part.result() for part in parts), Counter())


if __name__ == "__main__":
    sys.stdout.write(json.dumps(attacks(*map(int, sys.argv[1:4]))))
