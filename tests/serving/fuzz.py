"""Hostile frames against a server while a well-behaved client asks: a part of it is a test, the whole is ``make fuzz``.

python -m tests.serving.fuzz --frames 100000 --seed 1
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import psutil

from tests.serving import hostile
from tests.serving.live import expected, port_of, request, serving
from vlaflow.robot.client import Client
from vlaflow.serving.engine import EngineConfig

MOST_GROWTH = 32 * 2**20
"""Bytes of the process: what the allocators of Python, torch and libc keep for themselves; frames held back would be more."""


@dataclass(frozen=True)
class Seen:
    """What the attacker was told, how often the client asked, the other answers it got, and what the process grew by."""

    told: Counter
    asked: int
    others: int
    grown: int

    @property
    def wrong(self):
        """What should not have been, in words."""
        found = {
            f"{self.told['defect']} frames met a defect of the server": self.told["defect"],
            f"the well-behaved client got {self.others} other answers of {self.asked}": self.others or self.asked < 5,
            f"the process grew by {self.grown / 2**20:.0f} MiB": self.grown > MOST_GROWTH,
        }
        return [words for words, is_so in found.items() if is_so]


def fuzz(frames, seed):
    """Attack from another process, over four connections.

    One request is computed at a time: in company a product may be rounded in another order, and bits are compared.
    """
    with serving(engine=EngineConfig(batch=1, queue=1000)) as (_, address), Client(address) as good:
        port = port_of(address)
        hostile.attacks(port, 400, seed + 1)  # what is allocated once
        known = [expected(number, number) for number in range(4)]
        gc.collect()
        before, asked, others = psutil.Process().memory_info().rss, 0, 0
        command = [sys.executable, "-m", "tests.serving.hostile", str(port), str(frames), str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attacker:
            while attacker.poll() is None:
                number = asked % len(known)
                others += not np.array_equal(good.infer(request(number, seed=number))["actions"], known[number])
                asked += 1
                time.sleep(0.005)
            told = Counter(json.load(attacker.stdout))
        gc.collect()
        return Seen(told, asked, others, psutil.Process().memory_info().rss - before)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    seen = fuzz(given.frames, given.seed)
    words = f"{dict(seen.told)}; {seen.asked} requests of a well-behaved client, {seen.others} other answers"
    sys.stdout.write(f"{words}; the process grew by {seen.grown / 2**20:.1f} MiB\n")
    sys.stdout.writelines(f"Wrong: {wrong}\n" for wrong in seen.wrong)
    return bool(seen.wrong)


if __name__ == "__main__":
    raise SystemExit(main())
