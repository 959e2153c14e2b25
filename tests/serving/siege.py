"""A server under every attack at once and in turn, while a well-behaved client asks: ``make siege``.

python -m tests.serving.siege --seconds 20 --together 600
python -m tests.serving.siege --before ../vlaflow-before --protocol vla-eval --attacks pings page
python -m tests.serving.siege --table runs/siege.json                 # the table for docs/trust.md, of an earlier run

The server is ``vlaflow serve --batch 1 --steps 2 --dashboard`` with the demo's policy (random weights): in a batch a product
may be rounded in another order, and bits are compared. The well-behaved client asks three times a second, first alone and then
while attackers in processes of their own (``attacks``) do their worst. ``--before`` is a checkout of another version, which is
measured in turn with this one. Goal: p99 at most twice that without an attacker, or at most 100 ms; equal answers; the server's
memory back within 50 MiB.

Next to the milliseconds of a request stand those of processor time that the server spends meanwhile, for this client and for
others: on a busy machine the former depend on what else runs, the latter hardly.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import msgpack
import numpy as np
import psutil
from websockets.sync.client import connect

from benchmarks.latency import make_observation, random_policy
from tests.serving.attacks import ATTACKS
from vlaflow.errors import RequestError
from vlaflow.robot.client import Client

HERE = Path(__file__).parents[2]
PERIOD_S = 0.3
MOST_RATIO, MOST_MS, MOST_GROWTH = 2.0, 100.0, 50 * 2**20
KEYS = {"openpi": "metaworld", "vla-eval": "vla-eval-simpler"}
TOGETHER = "all together"


@dataclass(frozen=True)
class Seen:
    """What a well-behaved client saw.

    Args:
        attack, version: of the server.
        alone, attacked: of each request, milliseconds and the server's milliseconds of processor time.
        others: answers that differ from the first one to the same request.
        failed: requests that were refused or lost.
        grown: bytes that the server's memory grew by.
        attacker: what the attackers did.
    """

    attack: str
    version: str
    alone: list[tuple[float, float]]
    attacked: list[tuple[float, float]]
    others: int
    failed: int
    grown: int
    attacker: dict[str, dict[str, int]]

    @property
    def wrong(self):
        """What misses the goal, in words."""
        (_, alone), (_, attacked) = self.milliseconds
        found = {
            f"p99 {attacked:.0f} ms instead of {alone:.0f} ms": attacked > max(MOST_RATIO * alone, MOST_MS),
            f"{self.others} other answers": self.others,
            f"{self.failed} failed requests": self.failed,
            f"the server grew by {self.grown / 2**20:.0f} MiB": self.grown > MOST_GROWTH,
        }
        return [words for words, is_so in found.items() if is_so]

    @property
    def milliseconds(self):
        """p50 and p99 alone, p50 and p99 attacked."""
        return [np.percentile([ms for ms, _ in taken], (50, 99)) for taken in (self.alone, self.attacked)]

    @property
    def cells(self):
        """Of the table: p50 / p99 alone and attacked, in milliseconds and in those of a processor, and MiB."""
        spent = [np.percentile([ms for _, ms in taken], (50, 99)) for taken in (self.alone, self.attacked)]
        both = [f"{p50:.0f} / {p99:.0f}" for p50, p99 in (*self.milliseconds, *spent)]
        return [*both, f"{self.grown / 2**20:.0f}"]

    def row(self):
        """Of what is printed as it goes."""
        return f"| {' | '.join([self.attack, self.version, *self.cells])} | {'; '.join(self.wrong) or '–'} |"


HEAD = (
    "| attack | version | ms alone: p50 / p99 | attacked | processor ms alone | attacked | MiB | missed |\n"
    + "|---" * 8
    + "|\n"
)


def table(all_seen):
    """A row per attack: p50 / p99, and processor time, of every version next to each other; then what was missed."""
    versions = list(dict.fromkeys(seen.version for seen in all_seen))
    columns = ("alone", "attacked", "processor ms, alone", "attacked", "MiB")
    heads = [f"{version}: {column}" if len(versions) > 1 else column for version in versions for column in columns]
    lines = ["| attack | " + " | ".join(heads) + " | requests |", "|---|" + "---:|" * (len(heads) + 1)]
    for attack in dict.fromkeys(seen.attack for seen in all_seen):
        rows = [seen for version in versions for seen in all_seen if (seen.attack, seen.version) == (attack, version)]
        cells = [cell for seen in rows for cell in seen.cells]
        lines.append(f"| {' | '.join([attack, *cells, str(len(rows[-1].attacked))])} |")
    missed = [f"- {seen.attack}, {seen.version}: {'; '.join(seen.wrong)}" for seen in all_seen if seen.wrong]
    return "\n".join([*lines, "", *(missed or ["Nothing was missed."]), ""])


class OpenpiClient:
    """Asks in openpi's protocol."""

    def __init__(self, address, observations):
        self._client = Client(address)
        self._requests = [
            {
                "observation/image": next(iter(o.images.values())),
                "observation/state": o.state,
                "prompt": o.instruction,
                "seed": i,
            }
            for i, o in enumerate(observations)
        ]

    def ask(self, number):
        """Actions, as bytes."""
        return self._client.infer(self._requests[number])["actions"].tobytes()

    def close(self):
        self._client.close()


class VlaEvalClient:
    """Begins an episode with every request, in vla-eval's protocol."""

    def __init__(self, address, observations):
        self._open = ExitStack()
        self._connection = self._open.enter_context(connect(address, compression=None))
        self._payloads = [
            {
                "images": {"primary": _marked(next(iter(o.images.values())))},
                "states": _marked(o.state),
                "task_description": o.instruction,
            }
            for o in observations
        ]

    def _send(self, kind, payload):
        self._connection.send(msgpack.packb({"type": kind, "payload": payload, "seq": 1}))

    def ask(self, number):
        """The first action, as bytes."""
        self._send("episode_start", {"task": {"episode_idx": number}})
        self._send("observation", self._payloads[number])
        reply = msgpack.unpackb(self._connection.recv(30))
        if reply["type"] != "action":
            raise RequestError(reply["payload"]["error"])
        return reply["payload"]["actions"]["data"]

    def close(self):
        self._open.close()


CLIENTS = {"openpi": OpenpiClient, "vla-eval": VlaEvalClient}


def _marked(array):
    return {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": list(array.shape)}


MAKE = "import sys; from benchmarks.latency import random_policy; random_policy(()).save_pretrained(sys.argv[1])"
"""A version reads what it wrote."""


@contextmanager
def served(tree, checkpoint, protocol, log):
    """A server of the version in ``tree``; yields its address and process."""
    subprocess.run(
        [sys.executable, "-c", MAKE, str(checkpoint)], cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, check=True
    )
    command = [sys.executable, "-m", "vlaflow", "serve", str(checkpoint), "--port", "0", "--batch", "1", "--dashboard"]
    command += ["--compute", "dense", "--steps", "2", "--observation-keys", KEYS[protocol]]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, env=environment, cwd=tree, start_new_session=True)
    try:
        while not (found := re.search(r"ws://\S+:\d+", log.read_text())):
            if process.poll() is not None:
                raise SystemExit(f"The server ended before it served: {log.read_text()}")
            time.sleep(0.2)
        yield found[0], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def processor_ms(process):
    """Milliseconds of processor time that a process has used."""
    found = 0
    for file in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that has ended
            found += int(file.read_text().split()[0])
    return found / 1e6


def asked(client, known, process, seconds):
    """Ask periodically; milliseconds in all and of the server's processors, answers that are not ``known``, and failures.

    Args:
        client: asks.
        known: answers by number of the request.
        process: of the server.
        seconds: for how long.
    """
    taken, others, failed, ends, number = [], 0, 0, time.monotonic() + seconds, 0
    while (began := time.monotonic()) < ends:
        which, number, spent = number % 4, number + 1, processor_ms(process)
        try:
            others += client.ask(which) != known[which]
        except Exception as error:
            failed += 1
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        taken.append((1e3 * (time.monotonic() - began), processor_ms(process) - spent))
        time.sleep(max(PERIOD_S - (time.monotonic() - began), 0.01))
    return taken, others, failed


@contextmanager
def attackers(names, port, protocol, seconds):
    """Processes with these attacks, of lower priority: elsewhere they would not compete for this machine's processors."""
    with ExitStack() as stack:
        running = {}
        for name in names:
            command = [
                "nice",
                "-n",
                "19",
                sys.executable,
                "-m",
                "tests.serving.attacks",
                name,
                str(port),
                protocol,
                str(seconds),
            ]
            running[name] = stack.enter_context(subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True))
        yield running


def besiege(name, names, version, address, process, protocol, observations, seconds, alone_s):
    """Ask alone, then under attack."""
    with ExitStack() as stack:
        client = CLIENTS[protocol](address, observations)
        stack.callback(client.close)
        known = {number: client.ask(number) for number in range(4)}
        alone, *_ = asked(client, known, process, alone_s)
        before = process.memory_info().rss
        with attackers(names, int(address.rsplit(":", 1)[1]), protocol, seconds) as running:
            time.sleep(0.5)
            attacked, others, failed = asked(client, known, process, seconds)
            told = {name: json.loads(each.stdout.readline() or "{}") for name, each in running.items()}
        time.sleep(1.5)
        asked(client, known, process, 1)
        return Seen(name, version, alone, attacked, others, failed, process.memory_info().rss - before, told)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--seconds", type=float, default=20, help="of each attack; 0 for all at once only")
    parser.add_argument("--alone", type=float, default=10, help="seconds without an attacker before each attack")
    parser.add_argument("--together", type=float, default=600, help="seconds of all attacks at once; 0 to leave them out")
    parser.add_argument("--protocol", choices=list(KEYS), default="openpi")
    parser.add_argument("--before", type=Path, help="checkout of another version")
    parser.add_argument("--json", type=Path, default=Path("runs/siege.json"), help="file for the results, after each attack")
    parser.add_argument("--table", type=Path, help="print the table of such a file, and measure nothing")
    given = parser.parse_args()
    if given.table:
        sys.stdout.write(table([Seen(**each) for each in json.loads(given.table.read_text())]))
        return 0
    given.json.parent.mkdir(parents=True, exist_ok=True)
    policy = random_policy(())
    observations = [make_observation(policy) for _ in range(4)]
    trees, all_seen = {"before": given.before and given.before.resolve(), "now": HERE}, []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {
            version: stack.enter_context(served(tree, Path(folder) / version, given.protocol, Path(folder) / f"{version}.log"))
            for version, tree in trees.items()
            if tree is not None
        }
        runs = [(name, [name], given.seconds) for name in given.attacks if given.seconds]
        runs += [(TOGETHER, given.attacks, given.together)] if given.together else []
        sys.stdout.write(HEAD)
        for name, names, seconds in runs:
            for version, (address, process) in servers.items():
                seen = besiege(name, names, version, address, process, given.protocol, observations, seconds, given.alone)
                all_seen.append(seen)
                sys.stdout.write(f"{seen.row()}\n")
                sys.stdout.flush()
                given.json.write_text(json.dumps([asdict(seen) for seen in all_seen]))
    return any(seen.wrong for seen in all_seen if seen.version == "now")


if __name__ == "__main__":
    raise SystemExit(main())
