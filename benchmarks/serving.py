"""Requests per second and milliseconds per request with 1, 4 and 16 clients: by engine, together and one at a time.

    python -m benchmarks.serving
    python -m benchmarks.serving --checkpoint runs/demo/rated --clients 1 8
    vlaflow deploy runs/demo/rated --compute dense --batch 1 --batch 4 --batch 8
    python -m benchmarks.serving --checkpoint runs/demo/rated --engine aoti eager

Every way is ``vlaflow serve`` on the same weights, in a process of its own: with ``--batch 8`` for each engine, and with
``--batch 1`` for the last one. The clients are processes too, connected to all, and ask again as soon as they have an answer.
While one way is measured the others are idle. All of it shares this machine's cores, as on a robot's own computer; clients
elsewhere leave more to the server.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import tyro

from benchmarks._timing import Case, report, say, seconds_in_turns
from benchmarks.latency import make_observation, random_policy
from vlaflow.policies.base import Policy
from vlaflow.robot import Client, wire

SAME_CHUNK = 1e-4
"""Robot units: within a batch a sum may be rounded in another order."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        checkpoint: a policy with one view; by default the demo's, with random weights.
        set: changes to that default's config, e.g. backbone.width=384 backbone.heads=12.
        clients: how many at a time.
        batch: most requests answered together.
        requests: of all clients together in a round, at least one each.
        engine: of the servers; others than eager need programs of the checkpoint (vlaflow deploy).
        compute: the compute policy; by default the checkpoint's.
        steps: solver steps.
        threads: of torch, per server.
        rounds: per number of clients.
        json: file for the results.
    """

    checkpoint: Path | None = None
    set: tuple[str, ...] = ()
    clients: tuple[int, ...] = (1, 4, 16)
    batch: int = 8
    requests: int = 64
    engine: tuple[str, ...] = ("eager",)
    compute: str | None = None
    steps: int = 10
    threads: int = 1
    rounds: int = 10
    json: Path | None = None


@contextmanager
def serving(checkpoint: Path, ways: Sequence[tuple[str, int]], options: Options) -> Iterator[list[str]]:
    """A server per engine and batch size, in processes of their own, warm; yields their addresses."""
    command = [sys.executable, "-m", "vlaflow", "serve", str(checkpoint), "--port", "0"]
    command += ["--steps", str(options.steps), "--threads", str(options.threads)]
    command += ["--compute", options.compute] if options.compute else []
    with ExitStack() as stack:
        servers = []
        for engine, batch in ways:
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            server = subprocess.Popen([*command, "--engine", engine, "--batch", str(batch)], stderr=log, text=True)
            stack.callback(server.wait)
            stack.callback(server.terminate)
            servers.append((server, log))
        yield [_address(server, log) for server, log in servers]


def _address(server: subprocess.Popen[str], log: IO[str]) -> str:
    """Where a server listens, as soon as it does."""
    while True:
        log.seek(0)
        for line in log:
            if "ws://" in line:
                return line[line.index("ws://") :].strip()
        if server.poll() is not None:
            log.seek(0)
            raise SystemExit(f"A server ended before it served: {log.read()}")
        time.sleep(0.05)


@contextmanager
def connected(count: int, request: Path, addresses: Sequence[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """So many client processes, connected to every address."""
    command = [sys.executable, "-m", "benchmarks._load_client", str(request), *addresses]
    with ExitStack() as stack:
        clients = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(count)
        ]
        for client in clients:
            if _line(client) != "ready":
                raise SystemExit("A client could not start.")
        yield clients


def measure(count: int, request: Path, addresses: dict[str, str], options: Options) -> list[Case]:
    """All ways with so many clients."""
    each = max(options.requests // count, 1)
    say(f"{count} clients: {each * count} requests per round and way")
    taken: dict[str, list[list[float]]] = {way: [] for way in addresses}
    with connected(count, request, list(addresses.values())) as clients:

        def arm(which: int, way: str) -> Callable[[], None]:
            def ask() -> None:
                for client in clients:
                    assert client.stdin is not None
                    client.stdin.write(f"{which} {each}\n")
                    client.stdin.flush()
                taken[way].append([ms for client in clients for ms in json.loads(_line(client))])

            return ask

        seconds = seconds_in_turns({way: arm(i, way) for i, way in enumerate(addresses)}, options.rounds)
    kept = {way: rounds[-options.rounds :] for way, rounds in taken.items()}  # without the warm-up
    notes = {}
    for way, rounds in kept.items():
        p50, p99 = np.percentile(np.concatenate(rounds), [50, 99])
        notes[way] = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms over {sum(map(len, rounds))} requests"
    who = f"{count} client{'s' if count > 1 else ''}"
    cases = [Case.of_rates(f"{who}, together", "requests/s", each * count, seconds, notes)]
    return cases + [
        Case(f"{who}, p{q} of a request", "ms", {way: [float(np.percentile(r, q)) for r in kept[way]] for way in kept})
        for q in (50, 99)
    ]


def per_batch(address: str) -> float:
    """Requests per batch that a server has answered, from its metrics."""
    text = urllib.request.urlopen(f"{address.replace('ws', 'http')}/metrics").read().decode()
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return float(found['vlaflow_requests_total{outcome="answered"}']) / float(found["vlaflow_batches_total"])


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise SystemExit("A client ended early; its output is above.")
    return line


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        checkpoint = options.checkpoint or Path(scratch) / "policy"
        if options.checkpoint is None:
            random_policy(options.set).save_pretrained(checkpoint)
        seen = make_observation(Policy.from_pretrained(checkpoint))
        (image,) = seen.images.values()
        request = {"observation/image": image, "observation/state": seen.state, "prompt": seen.instruction, "seed": 0}
        file = Path(scratch) / "request.msgpack"
        file.write_bytes(wire.pack(request))
        ways = {f"{engine}, up to {options.batch} together": (engine, options.batch) for engine in options.engine}
        ways[f"{options.engine[-1]}, one at a time"] = options.engine[-1], 1
        addresses = dict(zip(ways, stack.enter_context(serving(checkpoint, list(ways.values()), options)), strict=True))
        answers = []
        for address in addresses.values():
            with Client(address) as client:
                answers.append(client.infer(request)["actions"])
        if any(not np.allclose(answers[-1], answer, atol=SAME_CHUNK) for answer in answers):
            raise SystemExit("The servers answer differently.")
        cases = [case for count in options.clients for case in measure(count, file, addresses, options)]
        for way, address in addresses.items():
            say(f"{way}: {per_batch(address):.2f} requests per batch over all clients")
    return report("serving", options, cases, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
