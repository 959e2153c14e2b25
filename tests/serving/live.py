"""A server in this process on a port of its own, and what its clients ask and expect."""

import asyncio
import threading
import time
from contextlib import contextmanager

import torch

from tests import helpers
from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.dense import Dense
from vlaflow.serving.observation_keys import choose
from vlaflow.serving.server import PolicyServer, ServerConfig

POLICY = helpers.policy()
PLACE = choose("metaworld", ("image",))


@contextmanager
def serving(policy=POLICY, compute=None, port=0, place=PLACE, warm_up=0, **settings):
    """A running server; yields it and its address."""
    server = PolicyServer(policy, compute or Dense(3), ServerConfig(**place, port=port, warm_up=warm_up, **settings))
    told = threading.Event()
    found = {}

    async def run():
        ready = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(server.serve(ready))
        found["port"], found["loop"] = await ready, asyncio.get_running_loop()
        told.set()
        await task

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert told.wait(10)
    try:
        yield server, f"ws://127.0.0.1:{found['port']}"
    finally:
        found["loop"].call_soon_threadsafe(server.stop)
        thread.join(10)
        assert not thread.is_alive()


def request(number=0, /, **more):
    seen = helpers.observation(number)
    return {"observation/image": seen.images["image"], "observation/state": seen.state, "prompt": seen.instruction, **more}


def expected(seed, noise):
    return POLICY.act(helpers.observation(seed), Dense(3), generator=torch.Generator().manual_seed(noise)).actions


def port_of(address):
    return int(address.rsplit(":", 1)[1])


def until(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


class Slow(ComputePolicy):
    """A compute policy that takes its time."""

    name, needs = "slow", Dense().needs

    def __init__(self, seconds):
        self.seconds = seconds

    def decode(self, *arguments):
        time.sleep(self.seconds)
        return Dense(1).decode(*arguments)
